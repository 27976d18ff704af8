"""Small results without any model, and the demo on tiny models."""

import torch
from torch import nn

from interp.attribution.direct import Attribution
from interp.hooks.attach import attach
from interp.hooks.networks.images import CropResizeScale
from interp.hooks.table import Table
from interp.hooks.votes import Votes
from interp.lens.logit_lens import LogitLens
from tests.cases import build, perturb

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\n",
    ' "quoted" \\',
    "<img src=x onerror=alert(2)>",
    "{{ 7 * 7 }}",
    "␣",
]


def attribution(layers: int = 3, heads: int | None = 4, name: str = "' a' - ' b'") -> Attribution:
    drawn = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=drawn)
    each, mlps = noise(layers, heads or 1), noise(layers)
    total = float(each.sum() + mlps.sum()) + 0.5
    return Attribution(
        observable=name, measurement=total, heads=each if heads else None, attention=each.sum(1),
        attention_bias=torch.zeros(layers), mlps=mlps, embeddings={"embedding": 0.25}, constant=0.25, rounding=0.0,
        position=4,
    )  # fmt: skip


def lens(tokens: list[str], layers: int = 3, followed: tuple[str, ...] = (" a", " b")) -> LogitLens:
    n, k = len(tokens), 2
    vocabulary = dict(enumerate([*tokens, "x", "y"]))
    drawn = torch.Generator().manual_seed(0)
    p = torch.rand(layers + 1, n, k, generator=drawn).sort(-1, descending=True).values / 2
    ranks = torch.arange(layers + 1).flip(0)[:, None, None].expand(layers + 1, n, len(followed)) * 10
    return LogitLens(
        layers=["embed", *map(str, range(layers))], tokens=tokens,
        top_ids=torch.arange((layers + 1) * n * k).reshape(layers + 1, n, k) % len(vocabulary), top_probabilities=p,
        entropy=torch.rand(layers + 1, n, generator=drawn), ranks=ranks,
        probabilities=torch.full(ranks.shape, 0.125), followed=list(followed), vocabulary=vocabulary,
    )  # fmt: skip


def token_votes(tokens: list[str], residual: float = -0.5) -> Votes:
    values = torch.linspace(-1, 2, len(tokens))
    positions = torch.full((len(tokens),), 0.25)
    total = float(values.double().sum() + positions.double().sum())
    return Votes(
        map=values, blocks={"hook_embed": values, "hook_pos_embed": positions}, total=total,
        abs_total=float(values.abs().sum() + positions.sum()), residual=residual, value=total + residual,
        labels=tokens, target="' a' - ' b'",
    )  # fmt: skip


def picture_votes(height: int = 20, width: int = 28) -> Votes:
    values = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    total = float(values.double().sum())
    return Votes(
        map=values, blocks={"input": values}, total=total, abs_total=float(values.abs().sum()), residual=1.5,
        value=total + 1.5, labels=None, target="palace, castle",
    )  # fmt: skip


def tokens_table(tokens: list[str]) -> Table:
    return Table(
        [{"token": t, "id": i, "logit": -float(i), "probability": 0.5 / (i + 1)} for i, t in enumerate(tokens)]
    )


class TinyEyes(nn.Module):
    """A convolution, a ReLU and a head with enough classes for a list of ten."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 12)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def tiny_load(tokenizer):
    """What stands in for `interp.load`: a random Llama with a word tokenizer, a random classifier."""

    def load(name, **_):
        identity = {"source": "test", "name": name, "licence": "none", "sha256": "0" * 64}
        if name == "tiny-eyes":
            torch.manual_seed(0)
            labels = [f"class {i}, kind {i}" for i in range(12)]
            looks = CropResizeScale(size=20, margin=4)
            return attach(perturb(TinyEyes()).eval(), preprocess=looks, labels=labels, identity=identity)
        return attach(build("llama"), tokenizer, identity=identity)

    return load
