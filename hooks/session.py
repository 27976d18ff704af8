"""One run of a model with hooks: edits and reads at sites, early stop, and removal of exactly what was installed."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.attention import AttentionTaps, eager_attention
from interp.hooks.bindings import ATTENTION_TAPS, Binding
from interp.hooks.errors import InterventionError, InterventionNotAppliedError, ModelStateError, SiteError
from interp.hooks.interventions import Context, Intervention
from interp.hooks.layouts import child
from interp.hooks.site import Site
from interp.hooks.views import Given, cast, first_tensor, with_first

_ONCE = ("hook_pos_embed", "hook_type_embed")


class _Stop(Exception):
    """Everything that was asked for has been read."""


@dataclass(frozen=True)
class Read:
    """A site to read, narrowed to heads and padded position indices [batch, n]."""

    site: Site
    binding: Binding
    where: Tensor | None = None


@dataclass(frozen=True)
class Edit:
    """An intervention resolved for one site of one batch."""

    step: Intervention
    site: Site
    binding: Binding
    where: Tensor | None = None
    source: Tensor | None = None
    real: Tensor | None = None
    from_read: Read | None = None


@dataclass(frozen=True)
class Selection:
    """Part of a site's tensor: some positions of each example, some heads."""

    binding: Binding
    heads: tuple[int, ...] | None
    where: Tensor | None

    def _front(self, full: Tensor) -> tuple[Tensor, tuple[Any, ...] | None]:
        """The tensor with axes moved to [batch, (pos), (head), ...], and the index of the selected part."""
        axes = self._axes()
        if not axes:
            return full, None
        moved = full.movedim(axes, list(range(1, 1 + len(axes))))
        rows = torch.arange(full.shape[0], device=full.device)[:, None]
        if self.where is None:
            return moved, (slice(None), list(self.heads))  # type: ignore[arg-type]
        where = self.where.to(full.device)
        if self.heads is None:
            return moved, (rows, where)
        heads = torch.tensor(self.heads, device=full.device)
        return moved, (rows[..., None], where[..., None], heads[None, None])

    def get(self, full: Tensor) -> Tensor:
        """The selected part, axes in the site's order."""
        moved, index = self._front(full)
        return full if index is None else self._back(moved[index])

    def put(self, full: Tensor, new: Tensor) -> Tensor:
        """The full tensor with the selected part replaced."""
        full = full.clone()
        moved, index = self._front(full)
        if index is None:
            # Copied in, never handed on: the model may write to its own tensors, but not to the user's.
            return full.copy_(cast(new, full))
        moved[index] = cast(self._to_front(new), full)
        return full

    def _axes(self) -> list[int]:
        """The axes along which a part is selected: positions, then heads."""
        found = ((self.binding.pos_axis, self.where), (self.binding.head_axis, self.heads))
        return [axis for axis, used in found if used is not None and axis is not None]

    def _back(self, part: Tensor) -> Tensor:
        axes = self._axes()
        return part.movedim(list(range(1, 1 + len(axes))), axes)

    def _to_front(self, part: Tensor) -> Tensor:
        axes = self._axes()
        return part.movedim(axes, list(range(1, 1 + len(axes))))


class Session(AbstractContextManager):
    """Hooks for one run. Use as a context manager around the forward call.

    Args:
        module: The model.
        reads: What to read; results are in ``values`` by site.
        edits: What to change, in order.
        stop: Stop the forward once everything is read.
        keep_graph: Keep autograd graphs in what is read.
        on_read: Called with each value read, instead of keeping it (for runs of several forwards).
        size: Number of examples, so that position embeddings, which models compute once for all, have a row for each.
        extent: [batch, pos] of token inputs, which a free module's tensor must have where positions are asked for.
    """

    def __init__(
        self, module: nn.Module, reads: Sequence[Read], edits: Sequence[Edit] = (), *, stop: bool = False,
        keep_graph: bool = False, on_read: Callable[[Site, Tensor], None] | None = None, size: int | None = None,
        extent: tuple[int, ...] | None = None,
    ):  # fmt: skip
        self.module, self.reads, self.edits = module, reads, edits
        self.stop, self.keep_graph, self.on_read, self.size = stop, keep_graph, on_read, size
        self.extent = extent
        self.values: dict[Site, Tensor] = {}
        self.applied: set[int] = set()
        self.active, self.paused = True, False
        self._thread, self._depth = threading.get_ident(), 0
        self._sources: dict[int, Tensor] = {}
        self._stack = ExitStack()
        self._taps = self._group()

    def _group(self) -> dict[tuple[str, str], list[Binding]]:
        """Bindings by tapped place, each in execution order."""
        found: dict[str, Binding] = {b.address + str(b.where): b for b in self._bindings()}
        taps: dict[tuple[str, str], list[Binding]] = {}
        for binding in sorted(found.values(), key=lambda b: b.order):
            taps.setdefault((binding.module, binding.where), []).append(binding)
        return taps

    def _bindings(self):
        yield from (r.binding for r in self.reads)
        for edit in self.edits:
            yield edit.binding
            if edit.from_read is not None:
                yield edit.from_read.binding

    def __enter__(self) -> "Session":
        try:
            self._install()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self._stack.close()
        if kind is _Stop:
            return True
        if kind is None:
            self._check_all_ran()
        return False

    def _install(self) -> None:
        attention: dict[str, set[str]] = {}
        for path, where in self._taps:
            module = child(self.module, path)
            if module is None:
                raise SiteError(f"module {path!r} does not exist", "the path of a submodule")
            if where in ATTENTION_TAPS:
                attention.setdefault(path, set()).add(where)
            elif where in ("out", "raw_out"):
                self._own(module.register_forward_hook(self._after(path, where), with_kwargs=True))
            else:
                self._own(module.register_forward_pre_hook(self._before(path, where), with_kwargs=True))
        if attention:
            self._install_attention(attention)
        if not self._taps:
            return
        # The hooks answer to this thread's outermost call only: a model that is called again from within, or by
        # another thread, runs as it is.
        self._own(self.module.register_forward_pre_hook(self._enter_root, prepend=True))
        self._own(self.module.register_forward_hook(self._leave_root, always_call=True))

    def _enter_root(self, module, args) -> None:
        if threading.get_ident() == self._thread:
            self._depth += 1

    def _leave_root(self, module, args, output) -> None:
        if threading.get_ident() == self._thread:
            self._depth -= 1

    @property
    def silent(self) -> bool:
        """Whether a call that comes in now is none of this session's."""
        elsewhere = self._depth != 1 or threading.get_ident() != self._thread
        return not self.active or self.paused or elsewhere

    def _install_attention(self, wanted: dict[str, set[str]]) -> None:
        self._stack.enter_context(eager_attention(self.module))
        visit = lambda path, part, value: self._visit(path, part, value, None)
        taps = AttentionTaps(wanted, visit, lambda: self.silent)
        for path in wanted:
            module = child(self.module, path)
            self._own(module.register_forward_pre_hook(lambda m, a, path=path: taps.enter(path)))  # type: ignore[union-attr]
            self._own(module.register_forward_hook(lambda m, a, o, path=path: taps.leave(path)))  # type: ignore[union-attr]
        self._stack.enter_context(taps)

    def _own(self, handle) -> None:
        self._stack.callback(handle.remove)

    def _before(self, path: str, where: str):
        def hook(module, args, kwargs):
            if where == "raw_in":
                new = self._visit(path, where, (args, kwargs), None)
                return None if new[0] is args and new[1] is kwargs else new
            given = _first_argument(path, args, kwargs)
            new = self._visit(path, where, given, None)
            if new is given:
                return None
            if where == "shared_in":
                # The residual sum reads this very tensor: a replaced argument would change one reader of two.
                given.copy_(new)
                return None
            return _replace_argument(given, new, args, kwargs)

        return hook

    def _after(self, path: str, where: str):
        def hook(module, args, kwargs, output):
            if where == "raw_out":
                new = self._visit(path, where, output, None)
                return None if new is output else new
            value, rebuild = _main(output, path)
            if self.size and value.shape[0] == 1 and any(b.address in _ONCE for b in self._taps[path, where]):
                value = value.expand(self.size, *value.shape[1:])
            given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            new = self._visit(path, "out", value, None if given is None else Given(given))
            return None if new is value else rebuild(new)

        return hook

    def _visit(self, path: str, where: str, base: Any, given: Given | None) -> Any:
        """Apply edits and take reads at one tap; return the base, replaced if an edit was made."""
        if self.silent:
            return base
        for binding in self._taps[path, where]:
            for index, edit in enumerate(self.edits):
                if edit.binding is binding or edit.binding == binding:
                    base = self._apply(index, edit, base, given)
            value = None
            for index, edit in enumerate(self.edits):
                if edit.from_read is not None and edit.from_read.binding == binding:
                    value = binding.view.get(base, given)
                    selection = Selection(binding, edit.from_read.site.head, edit.from_read.where)
                    self._check_extent(selection, value)
                    self._sources[index] = selection.get(value).clone()
            for read in self.reads:
                if read.binding == binding:
                    value = binding.view.get(base, given)
                    selection = Selection(binding, read.site.head, read.where)
                    self._check_extent(selection, value)
                    self._take(read, selection.get(value))
        # Of several products in front of a softmax the last counts, so the first is no place to stop.
        if (
            self.stop
            and where not in ("rot_q", "rot_k")
            and len(self.values) == len(self.reads)
            and len(self.applied) == len(self.edits)
        ):
            raise _Stop
        return base

    def _take(self, read: Read, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise SiteError(
                f"{read.site} gives a {type(value).__name__}",
                "a tensor",
                "add a selector, for example [0] or [last_hidden_state]",
            )
        # A copy: a later in-place operation of the model would change what was read.
        value = value.clone() if self.keep_graph else value.detach().clone(memory_format=torch.contiguous_format)
        if self.on_read is not None:
            self.on_read(read.site, value)
        elif read.site in self.values and read.binding.where not in ATTENTION_TAPS:
            raise SiteError(
                f"{read.site} runs more than once in one forward call",
                "a module that runs once",
                "name a neighbour that does, for example the module in front of a shared activation",
            )
        else:
            self.values[read.site] = value

    def _apply(self, index: int, edit: Edit, base: Any, given: Given | None) -> Any:
        full = edit.binding.view.get(base, given)
        if not isinstance(full, Tensor):
            raise SiteError(f"{edit.site} gives a {type(full).__name__}", "a tensor", "add a selector")
        selection = Selection(edit.binding, edit.site.head, edit.where)
        self._check_extent(selection, full)
        source = edit.source
        if edit.from_read is not None:
            if index not in self._sources:
                raise InterventionError(
                    f"{edit.site} patched from {edit.from_read.site}", "a source that lies before the site"
                )
            source = self._sources[index]
        # The step sees a copy, so that neither it nor the write-back below can touch a tensor that autograd saved.
        # While it computes, these hooks are silent: it may run the model itself.
        self.paused = True
        try:
            new = edit.step.apply(selection.get(full).clone(), Context(edit.site, source, edit.real))
        finally:
            self.paused = False
        self.applied.add(index)
        return edit.binding.view.put(base, selection.put(full, new), given)

    def _check_extent(self, selection: Selection, value: Tensor) -> None:
        """A free module's tensor has token positions only if it is [batch, pos, ...] of the inputs."""
        if selection.where is None or not selection.binding.where.startswith("raw"):
            return
        if value.ndim != 3 or tuple(value.shape[:2]) != self.extent:
            raise SiteError(
                f"positions at {selection.binding.address}, which gives {list(value.shape)}",
                f"a tensor [batch, pos, width] with [batch, pos] = {list(self.extent or ())}",
                "read all of it and select yourself",
            )

    def _check_all_ran(self) -> None:
        missed = [str(edit.site) for index, edit in enumerate(self.edits) if index not in self.applied]
        if missed:
            raise InterventionNotAppliedError(
                f"nothing was changed at {', '.join(missed)}", "sites that run on this input"
            )
        unread = [str(r.site) for r in self.reads if self.on_read is None and r.site not in self.values]
        if unread:
            raise SiteError(f"nothing was read at {', '.join(unread)}", "sites that run on this input")


def _first_argument(path: str, args, kwargs) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ModelStateError(f"{path} was called without a tensor", "a module that takes one")


def _replace_argument(old: Tensor, new: Tensor, args, kwargs):
    for index, value in enumerate(args):
        if value is old:
            return (*args[:index], new, *args[index + 1 :]), kwargs
    return args, {k: new if v is old else v for k, v in kwargs.items()}


def _main(output: Any, path: str) -> tuple[Any, Callable[[Tensor], Any]]:
    """The main tensor of a module's output, and a function that puts another in its place."""
    if path == "" and hasattr(output, "logits"):
        return output.logits, lambda new: type(output)(**{**output, "logits": new})
    return first_tensor(output), lambda new: with_first(output, new)
