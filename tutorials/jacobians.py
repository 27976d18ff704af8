# %% [markdown]
# # Jacobians: spectra, similarity, a lens, linear relations
#
# What a part of a network does near one input is a matrix, its Jacobian. Four things to do with such matrices in
# SmolLM2-135M: look at their spectra, compare them between tokens, average them over a corpus into a lens, and turn
# them into a linear map from a subject to its object.

# %%
import torch

import interp

torch.set_num_threads(1)
model = interp.load("smollm2-135m")
figures, facts = {}, {}
MID, OUT = "blocks.{}.hook_resid_mid", "blocks.{}.hook_mlp_out"

# %% [markdown]
# ## 1. Spectra of MLPs across layers
#
# The Jacobian of an MLP, norm included, at each token: 576 x 576, of which `reduce="svd:k"` keeps singular values. A
# few directions are amplified, most are damped; how steep the spectrum is changes with depth.

# %%
text = "Every evening the old fisherman rowed"
layers = [0, 5, 11, 17, 23, 29]
spectra = {
    f"layer {i}": interp.jacobian(model, text, MID.format(i), OUT.format(i), "same", reduce="svd:128") for i in layers
}
first, *rest = spectra
figures["spectra"] = interp.chart(
    spectra[first], name=first, beside={name: spectra[name] for name in rest}, title="MLP Jacobians of SmolLM2-135M"
)
largest = {name: float(one.value[:, 0].median()) for name, one in spectra.items()}
# How many directions carry half of the squared norm that these values hold
half = {
    name: float(((one.value**2).cumsum(1) < 0.5 * (one.value**2).sum(1, keepdim=True)).sum(1).float().mean() + 1)
    for name, one in spectra.items()
}
for name in spectra:
    print(f"{name:9} largest {largest[name]:8.2f}   half of the squares in {half[name]:5.1f} directions")
facts["largest"], facts["half"] = largest, half

# %% [markdown]
# ## 2. Which tokens' Jacobians are alike
#
# Inner products of all pairs of Jacobians, in closed form: no matrix is ever made. Occurrences of one word are nearer
# to each other than to other words.

# %%
text = "The cat chased the dog, and then the dog chased the cat, until the cat slept."
gram = interp.jacobian(model, text, MID.format(8), OUT.format(8), "same", reduce="gram")
tokens = [model.tokenizer.decode([i]) for i in model.batch(text).ids[0].tolist()]
figures["similarity"] = interp.chart(gram, labels=tokens, title="Cosine of tokens' MLP Jacobians, layer 8")
norms = gram.value.diagonal().sqrt()
cosines = gram.value / torch.outer(norms, norms)
same = torch.tensor([[a == b for b in tokens] for a in tokens])
own = torch.eye(len(tokens), dtype=torch.bool)
facts["same word"], facts["other word"] = float(cosines[same & ~own].mean()), float(cosines[~same].mean())
assert facts["same word"] > facts["other word"] + 0.2
print(f"same word {facts['same word']:.2f}, other words {facts['other word']:.2f}")

# %% [markdown]
# ## 3. A Jacobian lens
#
# The logit lens reads a middle layer with the last layer's unembedding. A Jacobian lens first carries the state to
# the last layer, by the Jacobian averaged over a corpus: here articles of the Universal Declaration of Human Rights
# and sentences about films. Published lenses average up to a thousand prompts; a handful is enough to see it work.
# The first 16 tokens of each prompt are left out, as attention sinks.

# %%
articles = [
    "Everyone has the right to life, liberty and security of person. No one shall be held in slavery or servitude.",
    "Everyone has the right to freedom of thought, conscience and religion; this right includes freedom to change his"
    " religion or belief.",
    "Everyone has the right to education. Education shall be free, at least in the elementary and fundamental stages.",
]
films = interp.labelled_texts("movies").texts
films = [t for t in films if len(model.batch(t).ids[0]) > 22][:3]
lens = interp.JacobianLens.fit(model, articles + films, max_tokens=21, until=0.02)
print(lens, "changes", [round(c, 3) for c in lens.changes])
figures["lens settles"] = interp.chart(lens, figure="changes", title="How the lens settles")
figures["lens layers"] = interp.chart(lens, title="Distance of the lens's matrices from the identity")

prompt, answer = "Japan is an island country, and its capital is", " Tokyo"
read = lens.readout(model, prompt, [answer])
plain = interp.logit_lens(model, prompt, [answer])
figures["readout"] = interp.chart(read, title="Jacobian lens")
figures["logit lens"] = interp.chart(plain, title="Logit lens")


def first_layer(one, below=10):
    """The first layer from which on the answer stays among the most likely tokens."""
    ranks = dict(zip(one.layers, one.ranks[:, -1, 0].tolist(), strict=True))
    late = [layer for layer, rank in ranks.items() if rank >= below]
    return int(late[-1]) + 1 if late else 0


facts["lens layer"], facts["logit lens layer"] = first_layer(read), first_layer(plain)
assert facts["lens layer"] < facts["logit lens layer"]
print(f"{answer!r} among the first ten from layer {first_layer(read)} (lens), {first_layer(plain)} (logit lens)")

# %% [markdown]
# ## 4. Linear relations
#
# A relation as one affine map: from the state of the subject's last token in the middle to the last state behind the
# prompt, R(s) = β W s + b, with W and b averaged over three examples. Faithful: R says what the model says, for new
# subjects. Causal: moving the subject's state by W†(o' - o) makes the model say the other object.

# %%
relations = {
    "capital": (
        "The capital of {} is",
        [("France", "Paris"), ("Japan", "Tokyo"), ("Germany", "Berlin")],
        [("Italy", "Rome"), ("Egypt", "Cairo"), ("Spain", "Madrid"), ("Russia", "Moscow"), ("Greece", "Athens"),
         ("Poland", "Warsaw"), ("Norway", "Oslo"), ("Austria", "Vienna")],
    ),
    "language": (
        "People in {} speak",
        [("France", "French"), ("Japan", "Japanese"), ("Germany", "German")],
        [("Italy", "Italian"), ("Spain", "Spanish"), ("Russia", "Russian"), ("Greece", "Greek"),
         ("Poland", "Polish"), ("China", "Chinese"), ("Turkey", "Turkish"), ("Sweden", "Swedish")],
    ),
    "opposite": (
        "The opposite of {} is",
        [("hot", "cold"), ("big", "small"), ("up", "down")],
        [("fast", "slow"), ("left", "right"), ("good", "bad"), ("light", "dark"), ("high", "low"), ("old", "young")],
    ),
}  # fmt: skip
scores = {}
for name, (template, examples, pairs) in relations.items():
    relation = interp.LinearRelation.fit(model, template, examples, layer=14)
    scores[name] = relation.evaluate(model, pairs, rank=60)
    print(name, scores[name])
first, *rest = scores
figures["relations"] = interp.chart(
    scores[first], name=first, beside={name: scores[name] for name in rest}, title="Linear relations from layer 14"
)
facts["faithfulness"] = {name: score.faithfulness for name, score in scores.items()}
facts["causality"] = {name: score.causality for name, score in scores.items()}
assert min(facts["faithfulness"].values()) > 0.3
assert facts["causality"]["capital"] > 0.5
