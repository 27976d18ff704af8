# %% [markdown]
# # A tour of networks guided by linear interpreters
#
# Around one input x, hold every decision that a network made (which ReLUs were open, which pixel a pooling chose), and
# the network is an affine map: y = F x + r. F and r belong to this input. A column of F is what one input pixel
# projects into the output; a row is the filter by which one output reads the input; r is what the constants inside the
# network put into the output by themselves.
#
# This tutorial repeats the tour of Navarrete Michelini, Liu, Lu and Jiang, "A Tour of Convolutional Networks Guided by
# Linear Interpreters" (ICCV 2019) on other networks: a classifier, a super-resolution network, networks that are
# trained here, and, which the paper did not look at, a language model. Each of the paper's findings is measured, and
# the last cell prints a table of what it says and what we find. Set INTERP_FIGURES to a folder to keep the figures.

# %%
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

import interp

torch.set_num_threads(1)  # these networks are small: more threads are slower
figures, facts = {}, {}

# %% [markdown]
# ## 1. Classification: pixels vote, and constants decide
#
# EfficientNet-Lite0 looks at two photographs. For a class k, the row F[k] times the picture gives a vote for each
# pixel. Votes and r sum to the logit; `completeness_error` says how well.
#
# What counts as "no input" is a choice. The network sees pixels as (value - 127)/128, so that zero is a mean grey; a
# black picture is -127/128. `origin` sets it: y = F (x - o) + (r + F o). A logit has a free shift that all classes
# share; the centred logit (minus the mean over classes) and the margin to the runner-up do not.

# %%
classifier = interp.load("efficientnet-lite0")
sample = load_sample_images()
pictures = {Path(n).stem: image for n, image in zip(sample.filenames, sample.images, strict=True)}
photographs = {name: classifier.preprocess(image) for name, image in pictures.items()}
origins = {"grey": torch.zeros(1, 3, 1, 1), "black": torch.full((1, 3, 1, 1), -127 / 128)}

rows, winners, scopes = [], [], {}
for name, pixels in photographs.items():
    for origin, o in origins.items():
        scope = interp.LinearScope(classifier, pixels, origin=o)
        scopes[name, origin] = scope
        y = scope.y[0]
        first, second = y.topk(2).indices.tolist()
        targets = {"logit": (first,), "centred": (scope.direction(first) - 1 / len(y),), "margin": (first, second)}
        for kind, target in targets.items():
            votes = scope.votes(*target)
            assert votes.completeness_error < 1e-6
            parts = {"votes": votes.total, "r": votes.residual, "value": votes.value, "share of r": votes.bias_share}
            rows.append({"picture": name, "origin": origin, "of": kind, **parts, "cancellation": votes.cancellation})
        # Which class is largest in each part alone? `scope.r` is for origin zero, so F o is added here.
        constant = scope.r[0] + scope.matvec(scope.origin.expand_as(scope.x)[0])
        largest = {"F x": y - constant, "r": constant, "sum": y}
        labels = {part: classifier.labels[int(value.argmax())].split(",")[0] for part, value in largest.items()}
        winners.append({"picture": name, "origin": origin, **labels})

print(interp.Table(rows, "how much of each output is r"))
print(interp.Table(winners, "largest class of each part alone"))

# %% [markdown]
# Half of a logit and more is r, for either origin. Votes of single pixels are large and cancel almost completely
# (`cancellation` is the sum of their sizes over the size of their sum). Neither part alone names the class reliably:
# the answer is in the sum of F x and r. Shares of a margin may lie outside [0, 1]; r then speaks for the other class.

# %%
shares = [row["share of r"] for row in rows if row["of"] == "centred"]
right = {part: sum(w[part] == w["sum"] for w in winners) for part in ("F x", "r")}
assert min(shares) > 0.4
assert right["F x"] + right["r"] <= 3
facts["Classifiers rely heavily on bias parameters."] = (
    f"r is {min(shares):.0%} to {max(shares):.0%} of the centred logit (2 photographs, 2 origins). F x alone names "
    f"the network's class in {right['F x']} of 4 cases, r alone in {right['r']}."
)

# %% [markdown]
# `bias_report` says where r comes from: each module's constants times the gradient at its output. Single layers put in
# much more than the total, with alternating signs.

# %%
name = "flower"
scope = scopes[name, "grey"]
first, second = (classifier.labels[k] for k in scope.y[0].topk(2).indices.tolist())
votes, report = scope.votes(first, margin_to=second), scope.bias_report(first, margin_to=second)
print(report.by_module()[:8])
print(f"sum of all modules {report.residual:.3f}, sum of sizes {report.values.abs().sum():.1f}")
assert report.completeness_error < 1e-6
picture = classifier.preprocess.undo(photographs[name])
figures["votes"] = interp.chart(scope.votes(first), picture=picture, title=f"votes for {first}")
figures["bias"] = interp.chart(report, linear=votes.total, title=f"{first} against {second}: constants by module")
figures["bias_maps"] = interp.chart(report, figure="maps", title="where constants act")
figures["outputs"] = interp.chart(scope, figure="outputs", title="centred logits of the largest classes")
figures["classes"] = interp.chart(scope, figure="votes", title="votes and rows of three classes")
figures["row"] = interp.chart(scope, at=first, size=224)

# %% [markdown]
# A row holds at one input. `stability` makes rows at noisy copies of it. Noise of one grey level, which nobody sees,
# flips some decisions: class and logit stay, the row does not. Even a quarter of a level, less than rounding to 8 bits
# adds, costs a quarter of the cosine. Sums of votes over 16 x 16 cells are steadier, and still far from steady. So read
# a vote map as the account of this one picture, and look at cells rather than at pixels.

# %%
rows, noise = [], torch.Generator().manual_seed(0)
for name, pixels in photographs.items():
    scope = scopes[name, "grey"]
    k = int(scope.y[0].argmax())
    cells = F.avg_pool2d(scope.votes(k).map[None], 16).flatten()
    for grey in (0.25, 1.0, 4.0):
        steady = scope.stability(k, noise=grey / 128 * pixels.numel() ** 0.5 / float(pixels.norm()), samples=2)
        near = interp.LinearScope(classifier, pixels + grey / 128 * torch.randn(pixels.shape, generator=noise))
        moved = F.avg_pool2d(near.votes(k).map[None], 16).flatten()
        kept = {"class kept": int(near.y[0].argmax()) == k, "logit": float(near.y[0, k])}
        found = {"row": steady.mean_cosine, "cells of votes": float(torch.cosine_similarity(cells, moved, 0))}
        rows.append({"picture": name, "grey levels": grey, "flips": steady.mean_flips, **kept, **found})
print(interp.Table(rows, "noise: decisions flipped, and cosines with row and votes of the clean picture"))
one = [row["row"] for row in rows if row["grey levels"] == 1.0]
assert all(row["class kept"] for row in rows if row["grey levels"] <= 1)
assert max(one) < 0.9
facts["The decision looks like a pixel-wise vote for each class."] = (
    f"True as arithmetic (votes and r sum to the logit), but single votes cancel by factors of hundreds and more, and "
    f"under noise of one grey level rows keep a cosine of only {min(one):.2f} to {max(one):.2f}."
)

# %% [markdown]
# ## 2. Super-resolution: an adaptive interpolation without constants
#
# ESRGAN-slim doubles a picture's size: 12 convolutions, 4 ReLUs. Here r is nearly nothing, so the output is F x. Pixels
# are 0..255, and the origin is black.

# %%
enlarger = interp.load("esrgan-slim-x2")
square = Image.fromarray(pictures["china"]).crop((106, 0, 533, 427))
small = enlarger.preprocess(square.resize((128, 128), Image.Resampling.LANCZOS))
scope = interp.LinearScope(enlarger, small)
share = float(scope.r.norm() / scope.y.norm())
print(f"‖r‖ is {share:.1e} of ‖y‖; its largest value is {float(scope.r.abs().max()):.3f} grey levels")
print(scope.check())
assert share < 1e-3
figures["sr_parts"] = interp.chart(scope, size=170)
figures["sr_impulse"] = interp.chart(scope, figure="impulse", at=(45, 56), radius=6)
figures["sr_receptive"] = interp.chart(scope, figure="receptive", at=(90, 113), radius=6)
along = [(45, 50 + 2 * k) for k in range(7)]
figures["sr_strip"] = interp.chart(scope, figure="strip", along=along, radius=5, size=105)

# %% [markdown]
# Is a constant picture kept? F applied to ones gives the sums of all rows at once. Around a flat picture they are 1 to
# three digits; around a real one they are 1 on average and depart from it at edges. Columns are small kernels that sum
# to about 4, one pixel becoming 2 x 2. What lies around a pixel changes its kernel, but only a little.

# %%
inner = (slice(None), slice(24, -24), slice(24, -24))
sums = scope.matvec(torch.ones(scope.in_shape))[inner]
flat = interp.LinearScope(enlarger, torch.full((1, 3, 48, 48), 128.0))
flat_sums = flat.matvec(torch.ones(flat.in_shape))[inner]
print(f"row sums at a flat picture {float(flat_sums.mean()):.4f} ± {float(flat_sums.std()):.4f}")
print(f"row sums at the photograph {float(sums.mean()):.4f} ± {float(sums.std()):.4f}")
assert max(abs(float(flat_sums.mean()) - 1), abs(float(sums.mean()) - 1)) < 0.01

places = torch.randint(20, 108, (40, 2), generator=torch.Generator().manual_seed(0)).tolist()
white = torch.zeros(len(places), *scope.in_shape)
for probe, (i, j) in zip(white, places, strict=True):
    probe[:, i, j] = 1.0
columns = scope.matvec(white).mean(1)
cut = lambda c, i, j: c[2 * i - 8 : 2 * i + 10, 2 * j - 8 : 2 * j + 10]
near = torch.stack([cut(c, i, j) for c, (i, j) in zip(columns, places, strict=True)])
local = near[:, 6:12, 6:12].pow(2).sum((1, 2)) / columns.pow(2).sum((1, 2))
unit = F.normalize(near.flatten(1))
print(f"energy of a column within 6 x 6 output pixels: {float(local.min()):.3f} or more")
print(f"sums of columns: {float(columns.sum((1, 2)).mean()):.2f} ± {float(columns.sum((1, 2)).std()):.2f}")
print(f"two columns, each around its pixel: cosine {float(unit.mm(unit.T).min()):.3f} or more")
assert float(local.min()) > 0.9

# %% [markdown]
# Singular vectors of F for a window of the output: v is read from the input, u is written to the output, σ times as
# large. Doubling each pixel in both directions has σ = 2. The first pairs are local oscillations in several directions,
# like wavelets. Values are so close to each other that neighbouring vectors may mix: it is their kind that matters.

# %%
crop = interp.LinearScope(enlarger, small[:, :, 24:48, 64:88])
window = torch.zeros(crop.out_shape)
window[:, 8:-8, 8:-8] = 1.0
svd = crop.svd(12, window=window)
shown = svd.v.mean(1)
area = shown.pow(2).sum((1, 2)) ** 2 / shown.pow(4).sum((1, 2)) / shown[0].numel()
constant = shown.sum((1, 2)) ** 2 / (shown[0].numel() * shown.pow(2).sum((1, 2)))
print(svd.table())
print("share of the crop that v covers, and of its energy that is constant")
print([f"{float(a):.1%}, {float(c):.1%}" for a, c in zip(area, constant, strict=True)])
assert float(svd.residuals.max()) < 1e-4
assert 1.8 < float(svd.s[-1]) <= float(svd.s[0]) < 3.0
assert max(float(area.max()), float(constant.max())) < 0.15
figures["sr_values"] = interp.chart(svd, expected=2.0)
figures["sr_pairs"] = interp.chart(svd, figure="pairs", count=8, size=100)
facts["Super-resolution relies on a basis that resembles wavelets."] = (
    f"Singular vectors of a window are local (each covers {float(area.max()):.0%} or less of the crop), oscillate "
    f"(mean part {float(constant.median()):.1%} of the energy, median) and look oriented; σ from {float(svd.s[0]):.2f} "
    f"down to {float(svd.s[-1]):.2f}, about the enlargement of 2."
)
facts["(Expected, not the paper's:) r is tiny, constants are kept, columns are local kernels."] = (
    f"‖r‖/‖y‖ = {share:.0e}; row sums {float(sums.mean()):.3f} ± {float(sums.std()):.3f}, at a flat picture "
    f"{float(flat_sums.mean()):.3f} ± {float(flat_sums.std()):.3f}; {float(local.min()):.0%} or more of a column's "
    f"energy within 6 x 6 pixels."
)

# %% [markdown]
# ## 3. Image to image: copy-move or template creation
#
# The paper sees two strategies in networks from images to images. We train one architecture on real digits, on two
# tasks with the same noisy input. *Move*: the digit, clean and displaced by (3, -4). *Template*: the average picture of
# the digit's class, always at the same place. The first can be done by transporting content, the second needs a picture
# that the input does not hold. A third network has an output channel for each task.

# %%
digits = load_digits()
images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=(12, 12), mode="bilinear")
classes, DOWN, RIGHT = torch.tensor(digits.target), 3, -4
templates = torch.stack([images[:1500][classes[:1500] == c].mean(0) for c in range(10)])
templates = F.pad(templates, (4, 4, 4, 4))


class Translator(nn.Module):
    """A small U-Net with a dense middle: it can transport locally and decide globally."""

    def __init__(self, channels: int, w: int = 8, middle: int = 96):
        super().__init__()
        self.enter = nn.Conv2d(1, w, 3, padding=1)
        self.down1, self.down2 = nn.Conv2d(w, 2 * w, 3, 2, 1), nn.Conv2d(2 * w, 4 * w, 3, 2, 1)
        dense = nn.Linear(100 * w, middle), nn.ReLU(), nn.Linear(middle, middle), nn.ReLU(), nn.Linear(middle, 100 * w)
        self.middle = nn.Sequential(nn.Flatten(), *dense, nn.ReLU(), nn.Unflatten(1, (4 * w, 5, 5)))
        self.up1, self.up2 = nn.Conv2d(8 * w, 2 * w, 3, padding=1), nn.Conv2d(4 * w, w, 3, padding=1)
        self.last, self.leave = nn.Conv2d(2 * w, w, 3, padding=1), nn.Conv2d(w, channels, 3, padding=1)

    def forward(self, x):
        a = self.enter(x).relu()
        b = self.down1(a).relu()
        c = self.down2(b).relu()
        up = F.interpolate(self.up1(torch.cat([c, self.middle(c)], 1)).relu(), scale_factor=2)
        up = F.interpolate(self.up2(torch.cat([up, b], 1)).relu(), scale_factor=2)
        return self.leave(self.last(torch.cat([up, a], 1)).relu())


def example(index, made):
    """Digits at random places of a 20 x 20 picture, with noise, and what each task wants of them."""
    clean = torch.zeros(len(index), 1, 20, 20)
    for n, (i, j) in enumerate(torch.randint(0, 3, (len(index), 2), generator=made).tolist()):
        clean[n, :, i + 3 : i + 15, j + 5 : j + 17] = images[index[n]]
    wanted = {"move": torch.roll(clean, (DOWN, RIGHT), (2, 3)), "template": templates[classes[index]]}
    return clean + 0.05 * torch.randn(clean.shape, generator=made), wanted


def train(tasks, steps=1500):
    torch.manual_seed(0)
    made, network = torch.Generator().manual_seed(0), Translator(len(tasks))
    optimiser = torch.optim.AdamW(network.parameters(), 5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
    for _ in range(steps):
        x, wanted = example(torch.randint(0, 1500, (32,), generator=made), made)
        loss = F.mse_loss(network(x), torch.cat([wanted[t] for t in tasks], 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


new = torch.arange(1500, 1797)
noisy, wanted = example(new, torch.Generator().manual_seed(1))
networks = {}
for tasks in (("move",), ("template",), ("move", "template")):
    networks[tasks] = interp.attach(train(tasks), layout="modules")
    with torch.no_grad():
        error = networks[tasks].module(noisy) - torch.cat([wanted[t] for t in tasks], 1)
    missed = [float(error[:, c].var() / wanted[t].var()) for c, t in enumerate(tasks)]
    print("network for", " and ".join(tasks), "- variance it misses on new digits:", [f"{m:.1%}" for m in missed])
    assert max(missed) < 0.1

# %% [markdown]
# These numbers, over 30 new digits, tell the strategies apart:
#
# - the share of r in the output, <r, y>/<y, y>;
# - transport: of the energy of the columns of ink pixels, how much arrives within one pixel of (row + 3, column - 4),
#   which is 3 x 3 of 400 output pixels;
# - how often r alone, and F x alone, is nearest to the template of the digit's own class;
# - for templates, the share of r in what is special to the class, that is along its template minus the mean template.
#   The mean could be a constant in any network, so that the plain share of r says too much. The rest of what is special
#   comes from F x, as in a network that has not quite learned to ignore how the digit was written.


# %%
def strategy(model, channel, task, count=30):
    found = {"share of r": 0.0, "transport": 0.0, "r is its template": 0.0, "F x is its template": 0.0}
    special = [0.0, 0.0]
    for n in range(count):
        scope, k = interp.LinearScope(model, noisy[n : n + 1]), int(classes[new[n]])
        y, r, linear = scope.y[0, channel], scope.r[0, channel], scope.Fx[0, channel]
        ink = [(i, j) for i, j in (noisy[n, 0] > 0.3).nonzero().tolist() if i + DOWN < 19 and j + RIGHT >= 1]
        energy = scope.columns([(0, i, j) for i, j in ink])[:, channel] ** 2
        ends = [(slice(i + DOWN - 1, i + DOWN + 2), slice(j + RIGHT - 1, j + RIGHT + 2)) for i, j in ink]
        arrived = sum(e[end].sum() for e, end in zip(energy, ends, strict=True))
        nearest = lambda part: int((part - templates[:, 0]).pow(2).sum((1, 2)).argmin())
        found["share of r"] += float((r * y).sum() / (y * y).sum()) / count
        found["transport"] += float(arrived / energy.sum()) / count
        found["r is its template"] += (nearest(r) == k) / count
        found["F x is its template"] += (nearest(linear) == k) / count
        direction = (templates[k] - templates.mean(0))[0]
        special = [s + float((part * direction).sum()) for s, part in zip(special, (r, y), strict=True)]
    return found | ({"r of what is special": special[0] / special[1]} if task == "template" else {})


rows = []
for tasks, model in networks.items():
    for channel, task in enumerate(tasks):
        rows.append({"network": " and ".join(tasks), "output": task, **strategy(model, channel, task)})
print(interp.Table(rows, "two strategies, by F and r"))

moves, creates = ([row for row in rows if row["output"] == task] for task in ("move", "template"))
assert all(row["share of r"] < 0.25 and row["transport"] > 0.75 for row in moves)
assert all(row["share of r"] > 0.75 and row["transport"] < 0.25 for row in creates)
assert all(row["r of what is special"] > 0.5 for row in creates)

scope = interp.LinearScope(networks["move", "template"], noisy[3:4])
figures["digits_parts"] = interp.chart(scope, size=112, title="one network, two strategies")
brightest = int(noisy[3, 0, 5:15, 6:14].argmax())
at = (5 + brightest // 8, 6 + brightest % 8)
for task in ("move", "template"):
    scope = interp.LinearScope(networks[task,], noisy[3:4])
    figures[f"digits_{task}"] = interp.chart(scope, figure="impulse", at=at, radius=9, title=f"network for {task}")

facts["Image-to-image networks use two strategies: copy-move and template creation."] = (
    f"Both, told apart by F and r. Moving a digit: r is {moves[0]['share of r']:.0%} of the output, and "
    f"{moves[0]['transport']:.0%} of the columns' energy arrives where the pixels should go. Drawing the class's "
    f"template: r is {creates[0]['share of r']:.0%} ({creates[0]['r of what is special']:.0%} of what is special to "
    f"the class), {creates[0]['transport']:.0%} arrives; r alone is nearest to its class's template for "
    f"{creates[0]['r is its template']:.0%} of digits, F x alone for {creates[0]['F x is its template']:.0%}. One "
    f"network for both: r is {moves[1]['share of r']:.0%} of one output, {creates[1]['share of r']:.0%} of the other."
)

# %% [markdown]
# ## 4. A language model: tokens vote
#
# With attention patterns, norm divisors and gates held, SmolLM2 is linear in its token embeddings, and as it has no
# constants r is exactly zero: votes of the tokens sum to the logit. A gated MLP multiplies two factors that both depend
# on the input. `gate` holds one of them, `split` gives half of the product to each. Both are complete, and they differ
# in how credit is spread.
#
# `exact` is the Jacobian, and its votes are gradient x input. Norms make the network all but blind to the scale of its
# input, so that the gradient hardly sees the logit at all: nearly all of it falls into r.

# %%
language = interp.load("smollm2-135m")
prompt = "When Mary and John went to the store, John gave a drink to"
modes = {
    "gate": interp.Linearization(activation="gain", norm="frozen", attention="frozen", product="gate"),
    "split": interp.Linearization(activation="gain", norm="frozen", attention="frozen", product="split"),
    "gradient x input": "exact",
}
rows, by_token, by_logit = [], {}, {}
for mode, linearization in modes.items():
    scope = interp.LinearScope(language, prompt, linearization)
    logit, margin = scope.votes(" Mary"), scope.votes(" Mary", margin_to=" John")
    for kind, votes in {"logit": logit, "margin": margin}.items():
        assert votes.completeness_error < 1e-4
        parts = {"votes": votes.total, "r": votes.residual, "share of r": votes.bias_share}
        rows.append({"mode": mode, "of": kind, **parts})
    by_token[mode], by_logit[mode] = margin, logit
    if mode != "gradient x input":
        assert float(scope.r.abs().max()) == 0.0
print(interp.Table(rows, "' Mary', and ' Mary' - ' John'"))
tokens = by_token["gate"].labels
for of, found in {"' Mary'": by_logit, "' Mary' - ' John'": by_token}.items():
    votes = [{"token": t, **{m: float(v.map[i]) for m, v in found.items()}} for i, t in enumerate(tokens)]
    print(interp.Table(votes, f"votes for {of}"))

mary = tokens.index(" Mary")
voted = {mode: float(votes.map[mary]) for mode, votes in by_token.items()}
assert all(int(by_token[mode].map.argmax()) == mary for mode in ("gate", "split"))
lost = by_logit["gradient x input"].bias_share
assert lost > 0.8
assert int(by_token["gradient x input"].map.argmax()) != mary
figures["tokens"] = interp.chart(by_token["gate"], title="votes of tokens, gate")
figures["tokens_logit"] = interp.chart(by_logit["gate"], title="votes for the logit itself, gate")
figures["tokens_split"] = interp.chart(by_token["split"], title="votes of tokens, split")
figures["tokens_jacobian"] = interp.chart(by_token["gradient x input"], title="gradient x input")
facts["(Not in the paper:) a language model."] = (
    f"r = 0 exactly under gate and split; ␣Mary votes {voted['gate']:+.2f} and {voted['split']:+.2f} for the margin of "
    f"{by_token['gate'].value:.2f}. Under gradient x input r is {lost:.0%} of the logit, and the "
    f"same token votes {voted['gradient x input']:+.2f}."
)

# %% [markdown]
# What does the Jacobian miss? Differentiate one thing at a time and hold the rest as `gate` does. With norms
# differentiated, two thirds of the logit go into r: the output hardly depends on the scale of what enters a norm, so
# that the gradient of its divisor cancels most of what the votes would carry. Patterns and gated products,
# differentiated, are counted once for each of their factors: votes grow to many times the logit, and r takes them back.
# (The activation stands in the gate, which is held.) In the Jacobian all of this adds up to votes that say little about
# the logit.

# %%
rows = []
for field in ("norm", "attention", "activation", "product"):
    held = {"activation": "gain", "norm": "frozen", "attention": "frozen", "product": "gate"} | {field: "tangent"}
    votes = interp.LinearScope(language, prompt, interp.Linearization(**held)).votes(" Mary")
    rows.append({"differentiated": field, "votes": votes.total, "r": votes.residual, "share of r": votes.bias_share})
print(interp.Table(rows, "' Mary' with one thing differentiated, the rest held"))
assert rows[0]["share of r"] > 0.5
assert all(row["r"] < 0 for row in rows if row["differentiated"] in ("attention", "product"))

# %% [markdown]
# F from embeddings to a residual stream is made of blocks F[t, s]: from the token s to the position t. Their norms say
# how much an embedding could move the stream; their products with the tokens' own embeddings, what these tokens do. To
# the middle of the network, from 16 random probes for each position. Blocks ahead of a position are exactly zero. The
# first token's own block is larger than all others by two orders of magnitude: it is an attention sink, and what it
# holds is the same for most prompts. So look at margins beside logits, and at the other tokens' blocks.

# %%
middle = interp.LinearScope(language, prompt, modes["gate"], output="blocks.14.hook_resid_post")
blocks = middle.token_blocks(probes=16)
assert blocks.norms.triu(1).abs().max() == 0
sink, others = float(blocks.norms[0, 0]), blocks.norms[1:]
after, to = others[-1].argsort(descending=True)[:4].tolist(), tokens[-1]
print(f"block of the first token {sink:.0f}; the largest other {float(others.max()):.0f}")
print(f"what {to!r} reads most, by norm: {[tokens[s] for s in after]}")
own = blocks.contributions[-1].argsort(descending=True)[:4].tolist()
print(f"what {to!r} gets most, by contribution: {[tokens[s] for s in own]}")
assert sink > 10 * float(others.max())
figures["blocks"] = interp.chart(blocks, title="norms of blocks, up to block 14")
figures["blocks_contributions"] = interp.chart(blocks, of="contributions", title="what tokens contribute")

# %% [markdown]
# ## What the paper says, and what we measure

# %%
print("| the paper says | we measure |\n|---|---|")
for says, measured in facts.items():
    print(f"| {says} | {measured} |")

if folder := os.environ.get("INTERP_FIGURES"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.save(Path(folder) / f"{name}.png", scale_factor=1.5)
