"""Networks of one call, and what every LinearScope of one must satisfy."""

import torch
from torch import nn

import interp


class Call(nn.Module):
    """A function of the input as a network, with the modules that it uses."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.fn(x)


def draw(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scope_of(fn, x, linearization="frozen", **options):
    """The scope of a module, or of a function, at x."""
    module = fn if isinstance(fn, nn.Module) else Call(fn)
    return interp.LinearScope(interp.attach(module.to(x.dtype).eval(), check=False), x, linearization, **options)


def assert_checks(scope, tolerance=1e-11):
    """Completeness, linearity and adjoint hold to float64's precision."""
    for row in scope.check():
        assert row["error"] <= tolerance, row
