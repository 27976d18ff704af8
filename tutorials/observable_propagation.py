# %% [markdown]
# # Observable propagation: feature vectors without training
#
# Dunefsky and Cohan, "Observable Propagation: Uncovering Feature Vectors in Transformers" (ICML 2024), ask which
# directions a transformer reads when it decides between " she" and " he", between occupations, between parties,
# between C and Python. They pull a linear readout of the logits back through the network. We ask the same questions of
# SmolLM2-135M, with prompts of our own, and set their numbers (for GPT-Neo-1.3B) beside ours at the end.
#
# Attention patterns are held: why a head looks where it looks is another question, which `attention_score` answers.

# %%
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import interp

torch.set_num_threads(1)
model = interp.load("smollm2-135m")
facts = {}


def measure(observable, texts, plan=()):
    """The observable at the last token of each text."""
    batch = model.batch(texts)
    last = batch.positions("last")[:, 0]
    return observable.measure(model.run(batch, plan=plan)[torch.arange(len(texts)), last])


def last_token_of(words, texts):
    """Position of each word's last token in its text, as `capture` takes them."""
    return [[int(model.batch(text).positions(word)[0, -1])] for word, text in zip(words, texts, strict=True)]


def r2(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1] ** 2)


# %% [markdown]
# ## 1. Pronouns: subject and object
#
# Two observables, and three prompts of each kind. Names are single tokens, women's and men's.

# %%
women = """Emma Olivia Sophia Isabella Mia Charlotte Amelia Evelyn Mary Anna Elizabeth Sarah Alice Julia Laura Emily
Grace Hannah Lily Rachel Claire Susan Karen Linda Nancy Helen Ruth Martha Jane Lucy""".split()
men = """Liam Noah Oliver James William Benjamin Henry Lucas Mason Ethan Jacob Michael John David Peter Paul Mark George
Thomas Robert Daniel Andrew Edward Charles Frank Simon Philip Martin Alan Brian""".split()
names = [name for name in women + men if len(model.tokenizer.encode(f" {name}", add_special_tokens=False)) == 1]
is_woman = torch.tensor([name in women for name in names])

subject = interp.Observable.logit_diff(model, " she", " he")
object_ = interp.Observable.logit_diff(model, " her", " him")
control = interp.Observable.logit_diff(model, " red", " blue")
subject_prompts = [
    "So, {} really is a great friend, isn't",
    "When {} came home that evening,",
    "After lunch {} said that",
]
object_prompts = [
    "I met {} at the station and gave the book to", "The teacher thanked {} and then praised",
    "We all like {}. Yesterday I saw",
]  # fmt: skip

rows = []
for observable, prompts in ((subject, subject_prompts), (object_, object_prompts)):
    for prompt in prompts:
        m = measure(observable, [prompt.format(name) for name in names])
        row = {"women": float(m[is_woman].mean()), "men": float(m[~is_woman].mean())}
        rows.append({"observable": observable.name, "prompt": prompt, **row})
print(interp.Table(rows, f"mean measurement over {len(names)} names"))
assert all(row["women"] > 0 > row["men"] for row in rows)

# %% [markdown]
# ## 2. Heads by their weights alone
#
# Without any data, a head's feature vector is γ ⊙ W_OVᵀ (γ_f ⊙ W_Uᵀ n): what it reads in its normalised input. A longer
# vector promises a larger contribution. Beside it: what each head in fact adds, by exact attribution, women minus men.


# %%
norms = interp.head_norms(model, [subject, object_])
largest = [[row["component"] for row in norms.top(4, observable=n.name)] for n in (subject, object_)]
print("longest vectors, subject:", *largest[0], " object:", *largest[1])

means = []
for some in (women, men):
    prompts = [prompt.format(name) for prompt in subject_prompts for name in some if name in names]
    means.append(interp.attribute_dataset(model, subject, prompts).mean["heads"][0])
added = means[0] - means[1]
order = added.flatten().abs().argsort(descending=True)[:4].tolist()
shown = [f"L{i // added.shape[1]}H{i % added.shape[1]} {float(added.flatten()[i]):+.2f}" for i in order]
print("largest contributions:   ", *shown)
rank = float(spearmanr(norms.norms[0].flatten(), added.flatten().abs()).statistic)
shared = set(largest[0]) & set(largest[1])
print(f"rank correlation of length and contribution over all {added.numel()} heads: {rank:.2f}")
assert len(shared) >= 3
assert rank > 0.4
facts["The same heads have the longest vectors for subject and object pronouns (4 of 4)."] = (
    f"{len(shared)} of 4 are shared: {', '.join(sorted(shared))}. Length ranks heads like their contribution only "
    f"roughly (rank correlation {rank:.2f}): it is a shortlist."
)

# %% [markdown]
# Is direct attribution right about what a head does? Patching decides: replace what one head writes by what it writes
# for the other name, recompute the final norm and the logits. `find_paths` scores all heads by one pull-back, and gives
# the exact effect of every candidate beside it.

# %%
clean, corrupt = (subject_prompts[0].format(name) for name in ("Emma", "John"))
single = interp.find_paths(model, subject, clean, corrupt, beam=8, max_length=1)
print(single.top(8))
assert single.correlation > 0.99
facts["Data-free and first-order scores are checked by path patching."] = (
    f"Over {single.tried:,} head x source and MLP paths, first-order scores and exact effects correlate with "
    f"{single.correlation:.3f}."
)

# %% [markdown]
# ## 3. Coupling: does " she" − " he" predict " her" − " him"?
#
# C(f → g) = f·g / ‖f‖² predicts the slope of g's score on f's. Cosines tell something only against the cosine of the
# two readouts themselves and against a control, here " red" − " blue". The fit is over all tokens but the first of each
# text.

# %%
texts = [prompt.format(name) for prompt in subject_prompts for name in names]
heads = [tuple(int(part) for part in head[1:].split("H")) for head in largest[0]]
acts = model.capture(texts, sorted({f"blocks.{layer}.ln1.hook_normalized" for layer, _ in heads}))
start = torch.cosine_similarity(subject.pull_to_stream(model)[0], object_.pull_to_stream(model)[0], dim=0)
rows = []
for layer, head in heads:
    f, g, c = (interp.propagate(model, n, path=f"L{layer}H{head}") for n in (subject, object_, control))
    fit = interp.validate_coupling(f, g, acts)
    rows.append({
        "head": f"L{layer}H{head}", "cosine": interp.cosine(f, g), "with control": interp.cosine(f, c),
        "coupling": fit.predicted, "slope": fit.slope, "r2": fit.r2, "tokens": fit.n,
    })  # fmt: skip
print(interp.Table(rows, f"subject to object pronouns; cosine of the readouts {float(start):.2f}"))
gap = max(abs(row["coupling"] - row["slope"]) for row in rows)
assert min(row["cosine"] for row in rows) > 0.9
assert gap < 0.1
each = [
    f"{row['head']}: {row['coupling']:.2f} against {row['slope']:.2f} (r² {row['r2']:.2f}, cosine {row['cosine']:.2f})"
    for row in rows
]
facts["Coupling coefficients predict slopes (0.71, 0.80, 0.75 against 0.77, 0.80, 0.76), cosines 0.94 to 0.99."] = (
    f"{'; '.join(each)}. Cosine of the readouts {float(start):.2f}, with the control at most "
    f"{max(abs(row['with control']) for row in rows):.2f}."
)

# %% [markdown]
# ## 4. Further back: along which paths, and from which words
#
# Search goes back from the logits, component by component. Each path's vector at its input says what it reads.

# %%
paths = interp.find_paths(model, subject, clean, corrupt, beam=8, max_length=4)
print(paths.top(12))
longest = next(p for p in paths.paths if p.count("->") == 3)
print("a path of three components:", longest)
vector = interp.propagate(model, subject, clean, path=longest)
print(vector.site, f"reads the stream after token {paths.tokens[vector.position]!r}")

scored = []
for prompt in subject_prompts:
    prompts = [prompt.format(name) for name in names]
    head = interp.propagate(model, subject, path=largest[0][0])
    scores = head.score(model.capture(prompts, head.site, positions=last_token_of(names, prompts))[head.site])[:, 0]
    scored.append(r2(scores, measure(subject, prompts)))
print(f"{largest[0][0]} read at the name alone, against the model's measurement: r² {scored}")
assert min(scored) > 0.9
facts["A head's score at the name predicts the measurement (r² 0.945 to 0.947)."] = (
    f"{largest[0][0]}: r² {min(scored):.2f} to {max(scored):.2f} in three templates, no training."
)

# %% [markdown]
# ## 5. Occupations: which direction carries gender bias?
#
# " nurse" + " teacher" + " secretary" − " programmer" − " doctor" − " engineer". Its readout has nothing to do with
# that of pronouns. At the name, though, the vectors of the two observables point the same way, and more so than with a
# control: the network asks the stream for the same feature. Which heads read it differs.

# %%
occupations = interp.Observable.tokens(
    model, [" nurse", " teacher", " secretary"], [" programmer", " doctor", " engineer"], name="occupations"
)
work = "My neighbour {} works as a"
work_texts = [work.format(name) for name in names]
m = measure(occupations, work_texts)
bias = float(m[is_woman].mean() - m[~is_woman].mean())
start = float(torch.cosine_similarity(subject.pull_to_stream(model)[0], occupations.pull_to_stream(model)[0], dim=0))
pronoun_prompt = "My neighbour {} works hard, and people say that"
rows = []
for layer in (2, 10, 20, 24):
    site = f"blocks.{layer}.hook_resid_pre@2"
    f = interp.propagate(model, subject, pronoun_prompt.format("Emma"), site=site)
    g, c = (interp.propagate(model, n, work.format("Emma"), site=site) for n in (occupations, control))
    rows.append({"site": site, "cosine": interp.cosine(f, g), "occupations with control": interp.cosine(g, c),
                 "pronouns with control": interp.cosine(f, c)})  # fmt: skip
print(
    interp.Table(rows, f"vectors of pronouns and occupations at the name; readouts {start:.2f}; gap {bias:.2f} logits")
)
assert bias > 2
assert rows[2]["cosine"] > 0.6 > abs(rows[2]["occupations with control"])
facts["Pronouns and occupations share a feature vector (cosine 0.966 at 6::6)."] = (
    f"Total vectors at the name: cosine {rows[0]['cosine']:.2f} in layer 2, {rows[2]['cosine']:.2f} in 20, "
    f"{rows[3]['cosine']:.2f} in 24; the readouts have {start:.2f}, the control at most "
    f"{max(abs(r['occupations with control']) for r in rows):.2f}."
)
bias_paths = interp.find_paths(model, occupations, work.format("Emma"), work.format("John"), beam=6, max_length=2)
carrier = next(p for p in bias_paths.paths if "H" in p).split(" -> ")[0].split("@")[0]
print(bias_paths.top(6))
print("heads: pronouns", largest[0][0], " occupations", carrier)

# %% [markdown]
# A score that predicts is not yet the component that carries. The pronoun head's score at the name predicts the
# occupations as well, yet that head adds little to them, and with the other sign.

# %%
where = last_token_of(names, work_texts)
head = interp.propagate(model, subject, path=largest[0][0])
predicts = r2(head.score(model.capture(work_texts, head.site, positions=where)[head.site])[:, 0], m)
own = interp.propagate(model, occupations, path=largest[0][0])
print(f"{largest[0][0]}: r² with occupations {predicts:.2f}; cosine of its two vectors {interp.cosine(head, own):.2f}")
assert predicts > 0.8
facts["The pronoun score predicts occupational bias (r² 0.88)."] = (
    f"r² {predicts:.2f}. But {largest[0][0]} does not carry it (its own vector for occupations has cosine "
    f"{interp.cosine(head, own):.2f} with the one for pronouns): {carrier} does. Prediction is not causation."
)

# %% [markdown]
# ## 6. Debiasing, and what it costs
#
# Take the pronoun direction out of the stream at the name: the gap between women's and men's names shrinks for
# pronouns and for occupations. A direction made for occupations alone, orthogonal to pronouns, spares the pronouns. The
# price is read on ordinary sentences, beside a random direction. That one is dear here: the stream of the first token
# is a hundred times longer than any other, and a direction with a part along it is costly to remove, whatever it means.

# %%
ordinary = [
    "All human beings are born free and equal in dignity and rights.",
    "The river rises in the mountains and flows through three valleys before it reaches the sea.",
    "Mix the flour with two eggs, add a cup of milk and leave the dough to rest for an hour.",
    "Prices rose by two per cent in the first quarter, more slowly than economists had expected.",
    "She put the letter back into its envelope and walked down to the harbour.",
    "A prime number has exactly two divisors, one and itself.",
]
pronoun_texts = [pronoun_prompt.format(name) for name in names]


def gap_of(observable, texts, plan=()):
    m = measure(observable, texts, plan)
    return float(m[is_woman].mean() - m[~is_woman].mean())


layer = 20
site = f"blocks.{layer}.hook_resid_pre@2"
f = interp.propagate(model, subject, pronoun_prompt.format("Emma"), site=site)
g = interp.propagate(model, occupations, work.format("Emma"), site=site)
made = torch.Generator().manual_seed(0)
directions = {
    "none": None, "pronouns": f.vector, "occupations": g.vector,
    "occupations, orthogonal to pronouns": interp.orthogonalize(g, [f]).vector,
    "random": torch.randn(len(f.vector), generator=made),
}  # fmt: skip
rows = []
for name, direction in directions.items():
    plan = [] if direction is None else [interp.ProjectOut(f"blocks.{layer}.hook_resid_pre", directions=direction)]
    price = interp.cost(model, plan, ordinary)
    gaps = {
        "pronoun gap": gap_of(subject, pronoun_texts, plan),
        "occupation gap": gap_of(occupations, work_texts, plan),
    }
    rows.append({"removed": name, **gaps, "loss": price.loss_under, "KL": price.divergence})
print(interp.Table(rows, f"removed from the stream in front of block {layer}, at all tokens"))
by_name = {row["removed"]: row for row in rows}
assert by_name["pronouns"]["occupation gap"] < 0.5 * by_name["none"]["occupation gap"]
assert by_name["random"]["occupation gap"] > 0.9 * by_name["none"]["occupation gap"]
kept = by_name["occupations, orthogonal to pronouns"]
before, after = by_name["none"], by_name["pronouns"]
facts["A feature vector can be used to debias (n_diff -3.61 logits, n_same +2.76 elsewhere)."] = (
    f"Projecting the pronoun vector out in front of block {layer} lowers the occupation gap from "
    f"{before['occupation gap']:.1f} to {after['occupation gap']:.1f} logits and the pronoun gap from "
    f"{before['pronoun gap']:.1f} to {after['pronoun gap']:.1f}, at {after['loss'] - before['loss']:+.3f} nats on "
    f"ordinary text. Made orthogonal to pronouns, the occupation vector takes "
    f"{before['occupation gap'] - kept['occupation gap']:.1f} and leaves pronouns at {kept['pronoun gap']:.1f}."
)

# %% [markdown]
# Steering adds the vector instead. First-order predictions hold for small doses only, and the two signs differ.

# %%
doses = (-0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1)
steered = interp.dose_response(model, occupations, work.format("Emma"), g, doses)
print(steered.table())
print(f"asymmetry of the largest dose: {steered.asymmetry:.2f}")
spread = float(steered.random.std(0).max())
assert float(steered.measured.max() - steered.measured.min()) > 3 * spread

# %% [markdown]
# ## 7. Party

# %%
democrats = """Barack Obama|Joe Biden|Hillary Clinton|Bernie Sanders|Elizabeth Warren|Nancy Pelosi|Al Gore|John Kerry|
Bill Clinton|Jimmy Carter|Kamala Harris|Chuck Schumer|Harry Reid|Cory Booker|Adam Schiff|Ted Kennedy|Lyndon Johnson|
Harry Truman|Walter Mondale|Andrew Cuomo""".replace("\n", "").split("|")
republicans = """Donald Trump|George Bush|Mitt Romney|John McCain|Ted Cruz|Marco Rubio|Paul Ryan|Mitch McConnell|
Ronald Reagan|Richard Nixon|Sarah Palin|Mike Pence|Dick Cheney|Newt Gingrich|Lindsey Graham|Rand Paul|Bob Dole|
Gerald Ford|Ron DeSantis|Barry Goldwater""".replace("\n", "").split("|")
party = interp.Observable.logit_diff(model, " Democrat", " Republican")
party_texts = [f"In Congress {name} was known as a" for name in democrats + republicans]
is_democrat = torch.arange(len(party_texts)) < len(democrats)
m = measure(party, party_texts)
own = float(roc_auc_score(is_democrat, m))
party_paths = interp.find_paths(model, party, party_texts[1], party_texts[24], beam=6, max_length=1)
best = next(p for p in party_paths.paths if "H" in p).split("@")[0]
print(party_paths.top(4))
vector = interp.propagate(model, party, path=best)
surname = last_token_of([name.split()[-1] for name in democrats + republicans], party_texts)
scores = vector.score(model.capture(party_texts, vector.site, positions=surname)[vector.site])[:, 0]
found, auc = r2(scores, m), float(roc_auc_score(is_democrat, scores))
print(f"the model's own AUC {own:.2f}; {best} read at the surname: r² {found:.2f}, AUC {auc:.2f}")
facts["Party: r² 0.763 along a path of two heads, 0.427 by one head alone."] = (
    f"{best} read at the surname: r² {found:.2f}, AUC {auc:.2f} (the model itself {own:.2f})."
)

# %% [markdown]
# ## 8. C against Python

# %%
in_c = [
    "int main(void) {\n    int i = 0;\n",
    "for (i = 0; i < n; i++) {\n    sum += a[i];\n}\n",
    "char *p = malloc(n);\nif (p == NULL) {\n",
    "struct node {\n    int value;\n    struct node *next;\n};\n",
    "while (*s != '\\0') {\n    s++;\n}\n",
    'printf("%d", x);\nreturn 0;\n',
    "void swap(int *a, int *b) {\n    int t = *a;\n",
    "switch (c) {\ncase 'a':\n    break;\n",
    "#include <stdio.h>\n\nint add(int a, int b) {\n",
    "unsigned long size = sizeof(buf);\nmemset(buf, 0, size);\n",
]
in_python = [
    "def main():\n    i = 0\n",
    "for i in range(n):\n    total += a[i]\n",
    "p = []\nif p is None:\n",
    "class Node:\n    def __init__(self, value):\n",
    "while s:\n    s = s[1:]\n",
    "print('%d' % x)\nreturn None\n",
    "def swap(a, b):\n    return b, a\n",
    "try:\n    x = int(text)\nexcept ValueError:\n",
    "import os\n\ndef add(a, b):\n",
    "with open(path) as f:\n    data = f.read()\n",
]
code = interp.Observable.logit_diff(model, " //", " #")
code_texts, is_c = in_c + in_python, torch.arange(20) < 10
m = measure(code, code_texts)
norms = interp.head_norms(model, [code])
best = norms.top(12, observable=code.name)
rows = []
for row in best:
    vector = interp.propagate(model, code, path=row["component"])
    acts = model.capture(code_texts, vector.site)
    scores = torch.stack([s[mask].mean() for s, mask in zip(vector.score(acts), acts.mask, strict=True)])
    auc = float(roc_auc_score(is_c, scores))
    rows.append({"head": vector.path.split(" ->")[0], "length": row["norm"], "AUC, mean over tokens": auc})
print(interp.Table(rows, f"the model's own AUC {float(roc_auc_score(is_c, m)):.2f}"))
top = max(rows, key=lambda row: row["AUC, mean over tokens"])
facts["C against Python: one head's vector has an AUC of 0.997, without training."] = (
    f"Of the 12 longest, {top['head']} has {top['AUC, mean over tokens']:.2f} on 20 snippets (the best of 12, so "
    f"take it with care); the longest alone has {rows[0]['AUC, mean over tokens']:.2f}."
)

# %% [markdown]
# ## 9. Against trained probes, with little data
#
# The vector of the longest head, made from weights alone, against probes trained on some of the same activations: same
# site, same token, held-out templates, 20 draws.

# %%
head = interp.propagate(model, subject, path=largest[0][0])
rows_of, measured, group = [], [], []
for index, prompt in enumerate(subject_prompts):
    prompts = [prompt.format(name) for name in names]
    rows_of.append(model.capture(prompts, head.site, positions=last_token_of(names, prompts))[head.site][:, 0])
    measured.append(measure(subject, prompts))
    group += [index] * len(names)
compared = interp.low_data_comparison(
    head, torch.cat(rows_of), torch.cat(measured), groups=group, sizes=(6, 20, 60), seeds=20
)  # fmt: skip
print(compared.table())
free = compared.r2[0, 0].mean()
few, many = compared.r2[1:, 0].mean(-1).max(), compared.r2[1:, -1].mean(-1).max()
assert free > few
facts["Feature vectors match probes trained on tens of examples (r² 0.945 linear, 0.899 mean difference)."] = (
    f"r² on held-out templates: {float(free):.2f} for the vector; the best probe {float(few):.2f} with 6 examples, "
    f"{float(many):.2f} with 60."
)

# %% [markdown]
# ## 10. How far to trust a linearisation
#
# Gains of norms are far from constant here: cv = std(γ)/mean(γ) says by how much a direction turns if the gain is left
# out. And a gradient is local even where its direction is not: the same direction in three templates, other lengths.

# %%
cv = [float(norm.gain.std() / norm.gain.mean()) for name, norm in model.bindings.norms.items() if name.endswith("ln1")]
print(f"cv of the gains in front of attention: median {sorted(cv)[len(cv) // 2]:.2f}, largest {max(cv):.2f}")
vectors = [interp.propagate(model, subject, p.format("Emma"), path="logits").vector for p in subject_prompts]
unit = torch.nn.functional.normalize(torch.stack(vectors), dim=1)
print("gradient through the final norm at three prompts: cosines", (unit @ unit.T).round(decimals=4).tolist())
print("lengths", [round(float(v.norm()), 4) for v in vectors])
facts["Gradients through the final norm have cosines above 0.99999 across prompts, lengths 0.266, 0.257, 0.255."] = (
    f"cosines of {float((unit @ unit.T).min()):.4f} or more, lengths "
    f"{', '.join(f'{float(v.norm()):.3f}' for v in vectors)}. Gains vary more here (cv up to {max(cv):.1f}), so a "
    f"vector without them would be another direction."
)

# %% [markdown]
# ## What the paper says, and what we measure

# %%
print("| the paper says (GPT-Neo-1.3B) | we measure (SmolLM2-135M) |\n|---|---|")
for says, measured_here in facts.items():
    print(f"| {says} | {measured_here} |")
