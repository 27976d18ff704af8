"""One network of each kind, written in each spelling of its activations and sums: what LinearScope makes of it.

`python -m tests.spellings` in the root of the repository writes docs/linear_scope_networks.md from a run of the grid.
tests/unit/test_spellings.py holds every cell, and that the page says the same.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import InterpError
from tests.cases import CASES, build, inputs_for
from tests.nets import draw

PAGE = Path(__file__).parents[1] / "docs" / "linear_scope_networks.md"
PRESETS = ("frozen", "exact")
TOLERANCE = 1e-10


# Spellings: for each activation, a callable; and how two values are added


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


class Custom(torch.autograd.Function):
    """An activation with a backward of its own, which no function mode sees into."""

    @staticmethod
    def forward(ctx, x, name):
        ctx.save_for_backward(x)
        ctx.name = name
        return FUNCTION[name](x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            probe = x.detach().requires_grad_()
            return gradient * torch.autograd.grad(FUNCTION[ctx.name](probe).sum(), probe)[0], None


MODULE = {
    "relu": nn.ReLU, "leaky": functools.partial(nn.LeakyReLU, 0.1), "silu": nn.SiLU, "hardswish": nn.Hardswish,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip
FUNCTION = {
    "relu": F.relu, "leaky": lambda x: F.leaky_relu(x, 0.1), "silu": F.silu, "hardswish": F.hardswish,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip
METHOD = {
    "relu": lambda x: x.relu(), "leaky": lambda x: x.clamp(min=0).add(x.clamp(max=0).mul(0.1)),
    "silu": lambda x: x.mul(x.sigmoid()), "hardswish": lambda x: x.mul(x.add(3).clamp(0, 6)).div(6),
    "tanh": lambda x: x.tanh(), "sigmoid": lambda x: x.sigmoid(),
}  # fmt: skip
OPERATOR = {
    "relu": lambda x: x * (x > 0), "leaky": lambda x: x * (x > 0) + 0.1 * x * (x <= 0),
    "silu": lambda x: x * torch.sigmoid(x), "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "tanh": lambda x: 2 * torch.sigmoid(2 * x) - 1, "sigmoid": lambda x: (1 + torch.tanh(x / 2)) / 2,
}  # fmt: skip
IN_PLACE = {
    "relu": lambda x: x.relu_(), "leaky": lambda x: F.leaky_relu_(x, 0.1), "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True), "tanh": lambda x: x.tanh_(),
    "sigmoid": lambda x: x.sigmoid_(),
}  # fmt: skip


def _iadd(a, b):
    a += b
    return a


def _scripted(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript.
        return torch.jit.script(MODULE[name]())


class Spelling:
    """How a network writes its activations and sums: ``act(name)`` and ``add()`` give callables, one for each place."""

    def __init__(self, act: Callable[[str], Callable], add: Callable[[], Callable] = lambda: lambda a, b: a + b):
        self.act, self.add = act, add


def _reused() -> Spelling:
    held = functools.cache(lambda name: MODULE[name]())
    return Spelling(held)


SPELLINGS = {
    "module": lambda: Spelling(lambda name: MODULE[name](), Sum),
    "functional": lambda: Spelling(FUNCTION.__getitem__, lambda: torch.add),
    "method": lambda: Spelling(METHOD.__getitem__, lambda: lambda a, b: a.add(b)),
    "operator": lambda: Spelling(OPERATOR.__getitem__),
    "in place": lambda: Spelling(IN_PLACE.__getitem__, lambda: _iadd),
    "reused": _reused,
    "scripted": lambda: Spelling(_scripted),
    "custom autograd": lambda: Spelling(lambda name: lambda x: Custom.apply(x, name)),
}
REFUSED = {"scripted": "CompiledModelError", "custom autograd": "UnsupportedOpError"}


# Kinds: each takes a spelling and gives every pre-activation to one activation only, as in-place forms need


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Net(nn.Module):
    """A network of parts by name; ``parts`` are modules or functions."""

    def __init__(self, run: Callable, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def mlp(s: Spelling) -> nn.Module:
    run = lambda n, x: n.out(n.sum(n.b(n.two(h := n.a(n.one(x)))), h))
    parts = {"one": nn.Linear(6, 8), "two": nn.Linear(8, 8), "out": nn.Linear(8, 4)}
    return Net(run, a=s.act("relu"), b=s.act("silu"), sum=s.add(), **parts)


def resnet(s: Spelling) -> nn.Module:
    def run(n, x):
        x = F.max_pool2d(n.a(n.bn(n.stem(x))), 3, 2, 1)
        return n.head(n.c(n.sum(n.two(n.b(n.one(x))), x)).mean((2, 3)))

    parts = {"stem": conv(3, 8), "bn": nn.BatchNorm2d(8), "one": conv(8, 8), "two": conv(8, 8), "head": nn.Linear(8, 4)}
    return Net(run, a=s.act("relu"), b=s.act("relu"), c=s.act("relu"), sum=s.add(), **parts)


def vgg(s: Spelling) -> nn.Module:
    def run(n, x):
        x = F.max_pool2d(n.a(n.one(x)), 2, ceil_mode=True)
        return n.last(n.c(n.dense(F.max_pool2d(n.b(n.two(x)), 2).flatten(1))))

    parts = {"one": conv(3, 6), "two": conv(6, 8), "dense": nn.Linear(32, 8), "last": nn.Linear(8, 4)}
    return Net(run, a=s.act("relu"), b=s.act("relu"), c=s.act("relu"), **parts)


def inception(s: Spelling) -> nn.Module:
    def run(n, x):
        pooled = n.proj(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        return torch.cat([n.a(n.one(x)), n.b(n.three(x)), n.c(n.five(x)), pooled], 1).mean((2, 3))

    parts = {"one": conv(3, 4, 1), "three": conv(3, 4), "five": conv(3, 4, 5), "proj": conv(3, 2, 1)}
    return Net(run, a=s.act("relu"), b=s.act("relu"), c=s.act("relu"), **parts)


def densenet(s: Spelling) -> nn.Module:
    def run(n, x):
        for bn, act, layer in ((n.bn1, n.a, n.one), (n.bn2, n.b, n.two)):
            x = torch.cat([x, layer(act(bn(x)))], 1)
        return x.amax((2, 3))

    parts = {"bn1": nn.BatchNorm2d(3), "one": conv(3, 4), "bn2": nn.BatchNorm2d(7), "two": conv(7, 4)}
    return Net(run, a=s.act("relu"), b=s.act("relu"), **parts)


def mobilenet(s: Spelling) -> nn.Module:
    def run(n, x):
        hidden = n.b(n.depthwise(n.a(n.expand(x))))
        gate = n.d(n.up(n.c(n.down(hidden.mean((2, 3))))))
        return n.sum(n.project(hidden * gate[:, :, None, None]), x)

    parts = {"expand": conv(4, 8, 1), "depthwise": conv(8, 8, groups=8), "project": conv(8, 4, 1)}
    parts |= {"down": nn.Linear(8, 4), "up": nn.Linear(4, 8)}
    acts = {"a": s.act("hardswish"), "b": s.act("relu"), "c": s.act("relu"), "d": s.act("sigmoid")}
    return Net(run, sum=s.add(), **acts, **parts)


def unet(s: Spelling) -> nn.Module:
    def run(n, x):
        skip = n.a(n.norm(n.down(x)))
        return n.out(torch.cat([skip, n.up(n.b(n.bottom(F.max_pool2d(skip, 2))))], 1))

    parts = {"down": conv(1, 6), "bottom": conv(6, 8), "up": nn.ConvTranspose2d(8, 6, 2, stride=2), "out": conv(12, 1)}
    return Net(run, a=s.act("silu"), b=s.act("leaky"), norm=nn.GroupNorm(2, 6), **parts)


def residual_dense(s: Spelling) -> nn.Module:
    def run(n, x):
        first = n.head(x - 0.5)
        dense = n.one(n.fuse(torch.cat((first, n.a(n.grow(first))), 1)) * 0.2, first)
        return F.pixel_shuffle(n.tail(n.two(dense, first)), 2) + 0.5

    parts = {"head": conv(3, 8), "grow": conv(8, 4), "fuse": conv(12, 8, 1), "tail": conv(8, 12)}
    return Net(run, a=s.act("leaky"), one=s.add(), two=s.add(), **parts)


def translator(s: Spelling) -> nn.Module:
    def run(n, x):
        x = n.a(n.norm(n.one(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        x = n.b(F.instance_norm(n.up(x)))
        return n.c(n.out(F.pad(x, [1] * 4, "reflect")))

    parts = {"one": nn.Conv2d(1, 4, 3), "up": nn.ConvTranspose2d(4, 4, 2, 2), "out": nn.Conv2d(4, 1, 3)}
    acts = {"a": s.act("relu"), "b": s.act("relu"), "c": s.act("tanh")}
    return Net(run, norm=nn.InstanceNorm2d(4, affine=True), **acts, **parts)


def gated_cell(s: Spelling) -> nn.Module:
    def run(n, x):
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            reset, update = n.gate(n.gates(torch.cat([step, state], -1))).chunk(2, -1)
            fresh = n.act(n.new(torch.cat([step, reset * state], -1)))
            state = n.sum(update * (fresh - state), state)
        return state

    parts = {"gates": nn.Linear(6, 6), "new": nn.Linear(6, 3)}
    return Net(run, gate=s.act("sigmoid"), act=s.act("tanh"), sum=s.add(), **parts)


def gated_mlp(s: Spelling) -> nn.Module:
    def run(n, x):
        hidden = n.norm(x)
        return n.sum(n.down(n.act(n.gate(hidden)) * n.up(hidden)), x)

    parts = {"gate": nn.Linear(6, 8), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "norm": nn.RMSNorm(6)}
    return Net(run, act=s.act("silu"), sum=s.add(), **parts)


def attention(s: Spelling) -> nn.Module:
    def run(n, x):
        hidden = n.norm(x)
        scores = n.q(hidden) @ n.k(hidden).transpose(-1, -2) / 2
        x = n.one(n.o(scores.softmax(-1) @ n.v(hidden)), x)
        return n.two(n.down(n.act(n.up(n.norm2(x)))), x)

    parts = {name: nn.Linear(6, 6) for name in "qkvo"}
    parts |= {"norm": nn.LayerNorm(6), "norm2": nn.LayerNorm(6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}
    return Net(run, act=s.act("relu"), one=s.add(), two=s.add(), **parts)


KINDS = {
    "MLP": (mlp, (1, 6)), "ResNet": (resnet, (1, 3, 8, 8)), "VGG": (vgg, (1, 3, 8, 8)),
    "Inception": (inception, (1, 3, 6, 6)), "DenseNet": (densenet, (1, 3, 5, 5)),
    "MobileNet": (mobilenet, (1, 4, 6, 6)), "U-Net": (unet, (1, 1, 8, 8)),
    "residual dense": (residual_dense, (1, 3, 5, 5)), "translator": (translator, (1, 1, 6, 6)),
    "gated cell": (gated_cell, (1, 4, 3)), "gated MLP": (gated_mlp, (1, 3, 6)), "attention": (attention, (1, 4, 6)),
}  # fmt: skip


# The grid


def network(kind: str, spelling: str) -> nn.Module:
    """A kind in a spelling; weights are the same in every spelling, norms are not the identity."""
    torch.manual_seed(0)
    net = KINDS[kind][0](SPELLINGS[spelling]()).double().eval()
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=made, dtype=torch.float64)
                value.copy_(noise.abs() + 0.5 if "running_var" in name else noise / max(1, value[0].numel()) ** 0.5)
    return net


def scope(kind: str, spelling: str, preset: str) -> interp.LinearScope:
    """The scope of a kind in a spelling."""
    return interp.LinearScope(interp.attach(network(kind, spelling), check=False), draw(*KINDS[kind][1]), preset)


def spelled(kind: str, spelling: str) -> tuple[str, float]:
    """Verdict of a cell, and its worst error: completeness, linearity at ten times the norm, adjoint, both presets.

    The verdict is "holds"; or "another F" for a map that passes its checks and differs from the module spelling's; or
    "fails"; or the name of the error that was raised.
    """
    worst, apart = 0.0, 0.0
    for preset in PRESETS:
        try:
            found = scope(kind, spelling, preset)
        except InterpError as refusal:
            return type(refusal).__name__, 0.0
        plain = scope(kind, "module", preset)
        w = draw(3, *found.out_shape, seed=2)
        apart = max(apart, _gap(found.rmatvec(w), plain.rmatvec(w)), _gap(found.r, plain.r))
        worst = max(worst, _gap(found.y, found.model.run(found.x)), *(row["error"] for row in found.check()))
    if worst > TOLERANCE:
        return "fails", worst
    return ("holds", max(worst, apart)) if apart <= TOLERANCE else ("another F", worst)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def loaded(family: str) -> tuple[str, float]:
    """Verdict and worst error, in float32, of a tiny random model of a family as it is loaded."""
    try:
        found = interp.LinearScope(interp.attach(build(family), check=False), inputs_for(family)[:1])
    except InterpError as refusal:
        return type(refusal).__name__, 0.0
    rows = found.check(probes=1)
    return ("holds" if all(row["holds"] for row in rows) else "fails"), max(row["error"] for row in rows)


def cell(verdict: str, error: float) -> str:
    """How the page writes a cell: the worst error of a map that holds, else what was raised."""
    said = {"holds": f"{error:.0e}", "another F": f"{error:.0e}, another F"}
    return said.get(verdict, f"`{verdict}`")


def page() -> str:
    """The page, from a run of the whole grid."""
    lines = ["| network | " + " | ".join(SPELLINGS) + " |", "|---" * (len(SPELLINGS) + 1) + "|"]
    for kind in KINDS:
        lines.append(f"| {kind} | " + " | ".join(cell(*spelled(kind, s)) for s in SPELLINGS) + " |")
    families = ["| family | as loaded |", "|---|---|", *(f"| {name} | {cell(*loaded(name))} |" for name in CASES)]
    return TEXT.format(networks="\n".join(lines), families="\n".join(families))


TEXT = """# Networks and spellings

What LinearScope makes of each kind of network in each spelling of its activations and sums. `python -m tests.spellings`
makes this page; `tests/unit/test_spellings.py` runs the same grid.

A number is the worst relative error, in float64 and over the presets `frozen` and `exact`, of these: F x + r is the
network's output; a replay at ten times the input's norm is F v + r; <F v, w> = <v, Fᵀ w>; F and r are those of the
module spelling; the output is untouched. A name is the error by which a spelling is refused, under either preset,
before it can give a wrong map.

{networks}

- module: `nn.ReLU()` at each place; functional: `F.relu`, `torch.add`; method: `x.relu()`, `x.mul(x.sigmoid())`;
  operator: `x * (x > 0)`, `a + b`; in place: `x.relu_()`, `a += b`; reused: one module at all places.
- scripted: the activation is a `torch.jit.script` module. Give the module that it was made from.
- custom autograd: the activation is a `torch.autograd.Function`. Write it as torch calls, or register it:
  `interp.register_unit(Custom, interp.Unit(...))`; then it holds.
- another F: the map holds, and is not that of the module spelling. `frozen` knows a gate by the call that makes it (of
  two activations it holds the sigmoid rather than the tanh), and here each is written by means of the other. `exact`
  gives the same F.
- `BilinearOpError`: of SiLU written as `x * sigmoid(x)` times another live value, `frozen` does not guess which factor
  is the gate. `product="split"` and `exact` hold.

Language models and encoders come in one spelling, their own. Tiny random models of each family, in float32, preset
`frozen`:

{families}
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(), encoding="utf-8")
