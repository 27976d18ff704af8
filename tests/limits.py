"""What works on which family, on tiny random models. python -m tests.limits prints the table of docs/limits.md."""

import functools
from collections.abc import Callable
from typing import Any

import torch

import interp
from interp.hooks.errors import InterpError
from tests.cases import CASES, HAND_LAYOUT, build, build_cnn, build_hand, inputs_for

OBSERVABLE = interp.Observable("7 - 9", (7, 9), (1.0, -1.0))
WAYS: dict[str, Callable[[interp.Model, Any], Any]] = {
    "capture": lambda m, x: m.capture(x, m.sites()[0]["site"]),
    "patterns": lambda m, x: m.capture(x, "blocks.1.attn.hook_pattern"),
    "steering": lambda m, x: m.run(x, plan=[interp.Scale(m.sites()[0]["site"], factor=0.5)]),
    "`generate`": lambda m, x: m.generate(x[:1], max_new_tokens=2),
    "`LinearScope`": lambda m, x: interp.LinearScope(m, x[:1]),
    "`direct_attribution`": lambda m, x: interp.direct_attribution(m, OBSERVABLE, x[:1]),
    "`logit_lens`": lambda m, x: interp.logit_lens(m, x[:1]),
    "`propagate`, heads": lambda m, x: interp.propagate(m, OBSERVABLE, x[:1], path="L0H1@2 -> L1H2@6"),
    "`propagate`, MLPs": lambda m, x: interp.propagate(m, OBSERVABLE, x[:1], path="L0MLP -> L1H2@6"),
    "`propagate_all`": lambda m, x: interp.propagate_all(m, OBSERVABLE, x[:1]),
    "`jacobian`": lambda m, x: interp.jacobian(m, x[:1], *_mlp(m), method="autograd").dense(),
    "... in closed form": lambda m, x: interp.jacobian(m, x[:1], *_mlp(m), method="closed").dense(),
    "`JacobianLens`": lambda m, x: interp.JacobianLens.fit(m, [x[:1]], skip=0),
    "`patch_grid`": lambda m, x: interp.patch_grid(m, x[:1], x[1:], OBSERVABLE, layers=[1], positions=[6]),
}
OTHERS = {"hand-written, with `Layout`": lambda: interp.attach(build_hand(), layout=interp.Layout(**HAND_LAYOUT)),
          "a convolutional network": lambda: interp.attach(build_cnn())}  # fmt: skip


def _mlp(model: interp.Model) -> tuple[str, str, str | None]:
    """In front of the second block's MLP, behind it, and the positions; without blocks the first two modules."""
    if model.layout is None:
        return model.sites()[0]["site"], model.sites()[1]["site"], None
    before = "resid_pre" if model.layout.parallel else "resid_mid"
    same = None if model.layout.modality == "image" else "same"
    return f"blocks.1.hook_{before}", "blocks.1.hook_mlp_out", same


def attached(name: str) -> tuple[interp.Model, Any]:
    """A tiny model of a row of the table, and its inputs."""
    if name in CASES:
        return interp.attach(build(name)), inputs_for(name)
    image = torch.linspace(0, 30, 2 * 3 * 6 * 6).sin().reshape(2, 3, 6, 6)
    return OTHERS[name](), image if "conv" in name else inputs_for("llama")


@functools.cache
def row(name: str) -> tuple[str, ...]:
    """For each way `yes`, or the error by which it is refused."""
    model, inputs = attached(name)
    found = []
    for way in WAYS.values():
        try:
            way(model, inputs)
        except InterpError as error:
            found.append(f"`{type(error).__name__}`")
        else:
            found.append("yes")
    return tuple(found)


def table() -> str:
    """The table, in Markdown."""
    head = ["| family | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]
    return "\n".join(head + [f"| {name} | " + " | ".join(row(name)) + " |" for name in [*CASES, *OTHERS]])


if __name__ == "__main__":
    print(table())
