"""StoredJacobians: Jacobians in a file, read without the model."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.budget import bytes_of
from interp.hooks.errors import StoreError
from interp.hooks.linear_map import LinearMap
from interp.hooks.linearization import Linearization
from interp.hooks.table import Rows
from interp.jacobians.files import Shard, open_shard, read_header
from interp.jacobians.plan import readable, refuse_large

if TYPE_CHECKING:
    from interp.jacobians.reductions import JacobianSummary


class StoredJacobians(Rows):
    """Jacobians [n, out, in] that `jacobian` wrote to a path.

    An index gives one as a `LinearMap`; iteration gives (slice, matrices) in chunks within the budget. The file is
    mapped into memory: only what is asked for is read.

    Args:
        path: The file, or the folder of files.
        budget: Bytes that a chunk or a dense result may take.

    Attributes:
        record: What made them: model, inputs, sites, places, linearisation, method, precision, versions.
        linearization: What was held.

    Raises:
        StoreError: If the path holds no Jacobians, or not all of them yet.
    """

    def __init__(self, path: str | Path, budget: int | str = "2GiB"):
        self.path, self.budget = Path(path), bytes_of(budget)
        progress = self.path.with_name(f"{self.path.name}.progress.json")
        if progress.exists():
            raise StoreError(
                f"{path}, of which {progress.name} says that it is not finished", "a finished file",
                "the same call of jacobian(..., out=path) goes on where it stopped",
            )  # fmt: skip
        self._shards = self._find()
        self.record = {k: v for k, v in read_header(self._shards[0].path)[0]["record"].items() if k != "span"}
        self.linearization = Linearization(**self.record["linearization"])
        self._tensors = [open_shard(shard.path)[0] for shard in self._shards]

    def _find(self) -> list[Shard]:
        files = sorted(self.path.glob("jacobians-*.safetensors")) if self.path.is_dir() else [self.path]
        if not files:
            raise StoreError(f"{self.path} without files of Jacobians", "a path that jacobian(..., out=path) wrote")
        shards = [Shard(f, slice(*read_header(f)[0]["record"]["span"])) for f in files]
        ends = [0, *(shard.span.stop for shard in shards)]
        whole = len(read_header(files[0])[0]["record"]["places"])
        if ends[-1] != whole or any(s.span.start != end for s, end in zip(shards, ends, strict=False)):
            raise StoreError(f"{self.path} with {len(files)} files up to Jacobian {ends[-1]}", f"all {whole}")
        return shards

    def __len__(self) -> int:
        return self._shards[-1].span.stop

    @property
    def shape(self) -> tuple[int, int, int]:
        """[maps, outputs, inputs]."""
        _, rows, columns = self._tensors[0]["jacobians"].shape
        return len(self), rows, columns

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype that chunks have: float32 where the file holds less."""
        dtype = self._tensors[0]["jacobians"].dtype
        return torch.empty(0, dtype=dtype if dtype.itemsize >= 4 else torch.float32)

    @property
    def site_names(self) -> tuple[str, str]:
        """Source and target."""
        return self.record["source"], self.record["target"]

    @property
    def method(self) -> str:
        """How they were computed, in words."""
        return f"read from {self.path.name}"

    def __getitem__(self, index: int) -> LinearMap:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Jacobian {index} of {len(self)}")
        matrix = self._matrices(slice(index % len(self), index % len(self) + 1))[0]
        shapes = tuple(self.record["in_shape"]), tuple(self.record["out_shape"])
        return LinearMap(
            lambda v: (v.flatten(1) @ matrix.T).reshape(len(v), *shapes[1]),
            lambda w: (w.flatten(1) @ matrix).reshape(len(w), *shapes[0]),
            *shapes, matrix, self.linearization, budget=self.budget,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for span in self._chunks():
            yield span, self._matrices(span)

    def dense(self) -> Float[Tensor, "n out in"]:
        """Return all matrices.

        Raises:
            SizeError: If they do not fit the budget.
        """
        refuse_large(math.prod(self.shape) * self.like.element_size(), self.budget, *self.shape)
        return self._matrices(slice(0, len(self)))

    def reduce(self, how: str | Callable[[Tensor], Any]) -> "JacobianSummary":
        """Return a summary, chunk by chunk; see `jacobian` for what there is.

        Raises:
            ArgumentError: If there is no such summary.
            SizeError: If the summary itself does not fit the budget.
        """
        from interp.jacobians.reductions import reduce

        return reduce(self, how)

    def _chunks(self) -> Iterator[slice]:
        _, rows, columns = self.shape
        step = max(1, int(self.budget / 2 / max(rows * columns * self.like.element_size(), 1)))
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def _matrices(self, span: slice, out: Tensor | None = None) -> Tensor:
        parts = []
        for shard, tensors in zip(self._shards, self._tensors, strict=True):
            start, stop = max(span.start, shard.span.start), min(span.stop, shard.span.stop)
            if start >= stop:
                continue
            here = slice(start - shard.span.start, stop - shard.span.start)
            part = tensors["jacobians"][here].to(self.like)
            parts.append(part * tensors["scales"][here, None, None] if "scales" in tensors else part)
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found if out is None else out.copy_(found)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each map: example, sites, positions, linearisation."""
        common = {key: self.record[key] for key in ("source", "target", "method")}
        names = ("example", "sources", "targets")
        held = {"linearization": self.linearization.name}
        return [dict(zip(names, place, strict=False)) | common | held for place in self.record["places"]]

    def __repr__(self) -> str:
        size = sum(t["jacobians"].nbytes for t in self._tensors)
        ends = f"{self.record['target']} by {self.record['source']}"
        return f"{len(self)} Jacobians of {ends} ({self.linearization.name}; {readable(size)} at {self.path})"
