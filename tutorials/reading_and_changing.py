# %% [markdown]
# # Reading and changing a model
#
# Load a small language model, read inside it, change it, and take its answer apart. Every decomposition below is
# checked against the model's own output; `completeness_error` says how well the parts sum to the whole.

# %%
import interp

model = interp.load("smollm2-135m")
prompt = "When Mary and John went to the store, John gave a drink to"
print(model)
print(model.tokens(prompt))

# %% [markdown]
# ## Sites
#
# A site is the address of one activation. Names are TransformerLens's classic ones; `model.sites` says what each means.

# %%
print(model.sites("blocks.6.*"))
acts = model.capture(prompt, ["blocks.*.hook_resid_post", "blocks.6.attn.hook_pattern"], positions="last")
print(acts["blocks.6.hook_resid_post"].shape, acts["blocks.6.attn.hook_pattern"].shape)

# %% [markdown]
# ## Interventions
#
# A plan is a list of frozen descriptions. It holds for one call; the model itself is never changed.

# %%
difference = interp.Observable.logit_diff(model, " Mary", " John")
print("as it is:       ", float(difference(model.run(prompt)[0, -1])))
plan = [interp.Zero("blocks.23.attn.hook_z", head=3)]
print("without L23H3:  ", float(difference(model.run(prompt, plan=plan)[0, -1])))
swapped = "When John and Mary went to the store, Mary gave a drink to"
plan = [interp.Patch("blocks.20.hook_resid_post", source=swapped)]
print("patched from the swapped prompt:", float(difference(model.run(prompt, plan=plan)[0, -1])))

# %% [markdown]
# ## Where the answer comes from
#
# Direct attribution: with the final norm's divisor held, the logit difference is a sum over heads, MLPs and the
# embedding. It does not say why a head looked where it did.

# %%
attribution = interp.direct_attribution(model, difference, prompt)
print(attribution.top(8))
print("completeness error", attribution.completeness_error)

# %% [markdown]
# The logit lens reads the stream after each block as if it were the last.

# %%
lens = interp.logit_lens(model, prompt, follow=[" Mary", " John"])
print(lens.at(-1)[-6:])

# %% [markdown]
# ## The network as a linear map
#
# Hold every attention pattern, norm divisor and gate, and the network is F x + r. For this model r is exactly zero:
# the tokens' votes sum to the logit difference.

# %%
scope = interp.LinearScope(model, prompt)
votes = scope.votes(" Mary", margin_to=" John")
print(votes.top(5))
print(f"votes {votes.total:.4f} + r {votes.residual:.4f} = {votes.value:.4f}")
print(scope.check())
assert votes.completeness_error < 1e-5
assert attribution.completeness_error < 1e-5
