# %% [markdown]
# # A first look
#
# Load a small language model, say what is asked, and take its answer apart. The next steps are in
# `reading_and_changing.py`.

# %%
import interp

model = interp.load("smollm2-135m")
prompt = "When Mary and John went to the store, John gave a drink to"
mary = interp.Observable.logit_diff(model, " Mary", " John")
print(interp.next_tokens(model, prompt, 3))
print(interp.direct_attribution(model, mary, prompt).top(5))  # which heads and MLPs wrote the answer
print(interp.LinearScope(model, prompt).votes(" Mary", margin_to=" John").top(5))  # which tokens vote for it
without = model.run(prompt, plan=[interp.Zero("blocks.23.attn.hook_z", head=3)])
print(f"{mary(model.run(prompt)[0, -1]):.2f}, and without one head {mary(without[0, -1]):.2f}")
