"""Interventions: frozen descriptions of changes at sites. A list of them is a plan; it saves and loads as data."""

import importlib
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.hooks.errors import InterventionError
from interp.hooks.site import Site, SiteLike

FORMAT = "interp-plan-1"


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change at one site (or at each site that a glob selects).

    Attributes:
        site: Where. Heads and positions may stand in the site's text or in the two fields below.
        head: Query heads (key/value heads at key and value sites); None for all.
        positions: As in `Model.capture`: ints, one list for each example, ``"last"``, a substring, or None for all.
    """

    site: SiteLike
    head: int | Sequence[int] | None = field(default=None, kw_only=True)
    positions: Any = field(default=None, kw_only=True)
    kind: ClassVar[str] = ""

    def __post_init__(self):
        """Refuse a site or heads that do not parse.

        Raises:
            SiteError: If the site does not parse.
            InterventionError: If the heads are not ints, or heads or positions are named twice.
        """
        named = Site.parse(self.site)
        for field_name in ("head", "positions"):
            if getattr(named, field_name) is not None and getattr(self, field_name) is not None:
                raise InterventionError(f"{field_name} in the site {self.site} and as an argument", "one of the two")
        self.where  # noqa: B018

    @property
    def where(self) -> Site:
        """The parsed site, narrowed to the heads."""
        return Site.parse(self.site).at(head=_heads(self.head))

    @property
    def at(self) -> Any:
        """Positions, from the field or from the site's text."""
        return self.positions if self.positions is not None else Site.parse(self.site).positions

    def apply(self, value: Tensor, context: "Context") -> Tensor:
        """Return the new value of the selected part of the site."""
        raise InterventionError(
            "an Intervention without a kind", "Set, Add, Scale, Zero, Mean, Patch, ProjectOut, Erase or Function"
        )


PlanLike = Intervention | Sequence[Intervention]


def _heads(head: Any) -> tuple[int, ...] | None:
    if head is None:
        return None
    try:
        return tuple(operator.index(h) for h in (head if hasattr(head, "__iter__") else (head,)))
    except TypeError:
        raise InterventionError(f"head={head!r:.60}", "an int or ints") from None


@dataclass(frozen=True)
class Context:
    """What an intervention may look at beside its own value.

    Attributes:
        site: The site being changed.
        source: For Patch and Mean: the tensor resolved for this site, shaped like the selection.
        real: Mask [batch, n] of the selected positions that hold real tokens, or None.
    """

    site: Site
    source: Tensor | None = None
    real: Tensor | None = None


def _fit(given: Any, value: Tensor, what: str, site: Site) -> Tensor:
    try:
        given = torch.as_tensor(given).to(device=value.device, dtype=value.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise InterventionError(f"{what} {given!r:.60} at {site}", "a number or a tensor") from None
    try:
        return given.expand_as(value)
    except RuntimeError:
        raise InterventionError(
            f"{what} of shape {list(given.shape)} at {site}",
            f"a shape that broadcasts to {list(value.shape)}",
        ) from None


@dataclass(frozen=True, eq=False)
class Set(Intervention):
    """Replace the value."""

    value: Any = None
    kind = "set"

    def apply(self, value, context):
        """The given value."""
        return _fit(self.value, value, "value", context.site)


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add ``scale`` times a value, for example a steering vector."""

    value: Any = None
    scale: float = 1.0
    kind = "add"

    def apply(self, value, context):
        """value + scale · given."""
        return value + self.scale * _fit(self.value, value, "value", context.site)


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply by a factor."""

    factor: Any = 1.0
    kind = "scale"

    def apply(self, value, context):
        """value · factor."""
        return value * _fit(self.factor, value, "factor", context.site)


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Replace by zero."""

    kind = "zero"

    def apply(self, value, context):
        """Zeros."""
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """Replace by the mean over all real tokens of ``over`` (inputs of another run).

    Without ``over`` it is the mean over the selected real tokens of the run's own batch.
    """

    over: Any = None
    kind = "mean"

    def apply(self, value, context):
        """The mean, at every selected place."""
        if context.source is not None:
            return _fit(context.source, value, "mean", context.site)
        if context.real is None:
            return value.mean(0, keepdim=True).expand_as(value)
        weights = context.real.to(value.dtype).reshape(*context.real.shape, *[1] * (value.ndim - 2))
        return ((value * weights).sum((0, 1), keepdim=True) / weights.sum()).expand_as(value)


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Replace by the value of another run, or of another site of this run.

    Attributes:
        source: Inputs of the other run, an `Activations` that holds the site, a tensor shaped like the selection,
            or None for this run (then ``from_site`` must lie before the site).
        from_site: Site to read; by default the same.
        from_positions: Positions to read; by default the same.
    """

    source: Any = None
    from_site: SiteLike | None = None
    from_positions: Any = None
    kind = "patch"

    def apply(self, value, context):
        """The source's value."""
        return _fit(context.source, value, "patch source", context.site)


@dataclass(frozen=True, eq=False)
class ProjectOut(Intervention):
    """Remove the component in the span of directions [n, d] (or one [d]): x - Q Qᵀ x with Q an orthonormal basis."""

    directions: Any = None
    kind = "project_out"

    def apply(self, value, context):
        """The value's component orthogonal to the directions."""
        rows = torch.atleast_2d(torch.as_tensor(self.directions).to(value.device)).to(
            torch.float64 if value.dtype == torch.float64 else torch.float32
        )
        if rows.ndim != 2 or rows.shape[-1] != value.shape[-1]:
            raise InterventionError(f"directions {list(rows.shape)} at {context.site}", f"[n, {value.shape[-1]}]")
        basis, triangle = torch.linalg.qr(rows.T)
        if (triangle.diagonal().abs() <= 1e-6 * rows.norm(dim=1).max()).any():
            raise InterventionError(
                f"directions at {context.site} are linearly dependent or zero", "independent directions"
            )
        upper = value.to(basis.dtype)
        return (upper - (upper @ basis) @ basis.T).to(value.dtype)


@dataclass(frozen=True, eq=False)
class Erase(Intervention):
    """Move a subspace's coordinates to their mean: x - left · right · (x - mean).

    With left = v and right = vᵀ for a unit vector v it is the ablation of a direction to its mean; with a concept's
    erasure (`interp.probes.LeaceEraser`) it is oblique.

    Attributes:
        left: Where it moves [d, k].
        right: What it reads [k, d].
        mean: Mean of x [d].
    """

    left: Any = None
    right: Any = None
    mean: Any = None
    kind = "erase"

    def apply(self, value, context):
        """The value without the subspace's deviation from its mean."""
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        made = [torch.as_tensor(part).to(value.device, dtype) for part in (self.left, self.right, self.mean)]
        left, right, mean = made
        width = value.shape[-1]
        if left.ndim != 2 or right.shape != left.T.shape or mean.shape != (width,) or len(left) != width:
            shapes = [list(part.shape) for part in made]
            raise InterventionError(
                f"left, right, mean {shapes} at {context.site}", f"[{width}, k], [k, {width}], [{width}]"
            )
        upper = value.to(dtype)
        return (upper - ((upper - mean) @ right.T) @ left.T).to(value.dtype)


@dataclass(frozen=True, eq=False)
class Function(Intervention):
    """Replace by ``fn(value)``; ``fn`` must return a tensor of the same shape and not write to its argument."""

    fn: Callable[[Tensor], Tensor] | None = None
    kind = "function"

    def apply(self, value, context):
        """fn(value)."""
        if self.fn is None:
            raise InterventionError(f"Function at {context.site} without fn", "fn=callable")
        new = self.fn(value)
        if not isinstance(new, Tensor) or new.shape != value.shape:
            given = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InterventionError(f"function at {context.site} returned {given}", f"a tensor {list(value.shape)}")
        return new


_KINDS: dict[str, type[Intervention]] = {
    c.kind: c for c in (Set, Add, Scale, Zero, Mean, Patch, ProjectOut, Erase, Function)
}


def save_plan(plan: PlanLike, path: str | Path) -> None:
    """Write a plan to one safetensors file.

    Raises:
        InterventionError: If a part is not plain data (a lambda, an Activations source: give its tensor).

    Example:
        >>> import tempfile, os
        >>> file = os.path.join(tempfile.mkdtemp(), "plan.safetensors")
        >>> save_plan([Zero("blocks.3.hook_mlp_out", positions="last")], file)
        >>> load_plan(file)[0].site
        'blocks.3.hook_mlp_out'
    """
    plan = [plan] if isinstance(plan, Intervention) else plan
    tensors: dict[str, Tensor] = {}
    rows = [
        {"kind": step.kind} | {f.name: _encode(getattr(step, f.name), f"{i}.{f.name}", tensors) for f in fields(step)}
        for i, step in enumerate(plan)
    ]
    save_file(tensors, str(path), {"format": FORMAT, "plan": json.dumps(rows)})


def load_plan(path: str | Path, *, allow_functions: bool = False) -> list[Intervention]:
    """Read a plan that `save_plan` wrote.

    Args:
        path: The file.
        allow_functions: Whether to import the functions that a plan names. Importing runs code: say so only for
            plans of your own.

    Raises:
        InterventionError: If the file is not a plan, of another format, or names a function that is not allowed.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise InterventionError(f"{path} has format {meta.get('format')!r}", FORMAT)
            return [_step(row, file, allow_functions) for row in json.loads(meta["plan"])]
    except SafetensorError as error:
        raise InterventionError(f"{path} is not a plan: {error}", "a file that save_plan wrote") from error


def _step(row: dict[str, Any], file, allow_functions: bool) -> Intervention:
    kind = _KINDS.get(row["kind"])
    unknown = set(row) - {"kind"} - {f.name for f in fields(kind)} if kind else set()
    if kind is None or unknown:
        raise InterventionError(f"a plan with an unknown kind or field: {row}", f"kinds {', '.join(_KINDS)}")
    named = next((v["function"] for v in row.values() if isinstance(v, dict) and "function" in v), None)
    if named and not allow_functions:
        raise InterventionError(
            f"the plan names the function {named}", "allow_functions=True", "only for plans of your own"
        )
    return kind(**{k: _decode(v, file) for k, v in row.items() if k != "kind"})


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Site):
        return {"site": str(value)}
    if callable(value):
        module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "<")
        if module is None or "<" in qualname or "." in qualname:
            raise InterventionError(
                f"{qualname} cannot be saved", "a function at the top level of an importable module"
            )
        return {"function": f"{module}:{qualname}"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    raise InterventionError(
        f"{name} is a {type(value).__name__}", "plain data, tensors or texts", "take the tensor out of it"
    )


def _decode(value: Any, file) -> Any:
    if isinstance(value, list):
        return [_decode(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return file.get_tensor(value["tensor"])
    if "site" in value:
        return Site.parse(value["site"])
    module, name = value["function"].split(":")
    return getattr(importlib.import_module(module), name)
