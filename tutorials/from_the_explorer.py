# %% [markdown]
# # From the explorer to a script
#
# Below each figure of `interp explore`, "Save or copy" has Python that makes it again. The page runs the same calls as
# that text, so that what was shown and what is computed here cannot differ. The next cell is such a text, as the page
# Observables gives it for a prompt, two tokens and a path.

# %%
import interp

model = interp.load("smollm2-135m")
observable = interp.Observable.logit_diff(model, " Mary", " John")
prompt = "When Mary and John went to the store, John gave a drink to"
longer = interp.extend_path(model, observable, prompt, "L23H3@9 -> logits@13")
figure = interp.chart(longer, top=14)

# %% [markdown]
# Figures are Altair charts: `figure.save("path.svg")`, or `figure.to_dict()` for their data. The result beneath gives
# rows, and a data frame where pandas is installed.

# %%
print(longer.top(3))
print(len(longer.to_records()), "continuations")

# %% [markdown]
# What a page cannot do is a loop. The same question for every prompt of a kind, in both orders of the names:

# %%
template = "When {} and {} went to the store, {} gave a drink to"
pairs = [("Mary", "John"), ("John", "Mary")]
rows = []
for first, second in pairs:
    asked = interp.Observable.logit_diff(model, f" {first}", f" {second}")
    parts = interp.direct_attribution(model, asked, template.format(first, second, second))
    rows.append({"answer": first, "measured": parts.measurement, "L23H3": parts.head(23, 3)})
    assert parts.completeness_error < 1e-5
print(interp.Table(rows, "one head, both orders"))

# %% [markdown]
# And what a script computed can be looked at in the explorer: a specification in a file and `interp run` make a folder
# that `interp explore FOLDER` opens, without the model.
