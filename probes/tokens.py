"""Token sets: for each example a set of token features, of any length. Masks, pooling, the first-token sink.

Padded positions never enter: what is kept is one flat matrix of the valid tokens and where each example begins.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp.hooks.errors import ArgumentError

Pool = Literal["mean", "max", "last", "first", "cls"] | int
OnEmpty = Literal["raise", "drop"]
SINK_RATIO = 5.0


class FirstTokenWarning(UserWarning):
    """What was done with the first token of each example."""


class EmptyExampleWarning(UserWarning):
    """Which examples were left out because nothing of them is valid."""


@dataclass(frozen=True, eq=False)
class TokenSets:
    """Token features of n examples, the valid tokens of all of them one after the other.

    It slices by position, by index array and by boolean mask, so that splitters of scikit-learn can use it.

    Attributes:
        values: [tokens, d], floating point.
        offsets: [n + 1]; example i owns the rows offsets[i] to offsets[i + 1].
        source: [n], places in the input, where empty examples were dropped: ``y[sets.source]`` are their labels.

    Example:
        >>> sets = TokenSets.from_list([torch.ones(2, 3), torch.zeros(1, 3)])
        >>> len(sets), sets.lengths.tolist(), sets.pooled("mean")[0].tolist()
        (2, [2, 1], [1.0, 1.0, 1.0])
    """

    values: Float[Tensor, "tokens d"]
    offsets: Int64[Tensor, "n_plus_one"]
    source: Int64[Tensor, "n"] | None = None

    def __post_init__(self):
        """Refuse offsets that do not cut the tokens, and examples without a token.

        Raises:
            ArgumentError: If the offsets do not run from 0 to the number of tokens, or an example is empty.
        """
        if not len(self.offsets) or self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ArgumentError(f"offsets for {len(self.values)} tokens", "offsets from 0 to the number of tokens")
        empty = (self.lengths < 1).nonzero().flatten().tolist()
        if empty:
            raise ArgumentError(
                f"{len(empty)} examples without a valid token: {', '.join(map(str, empty[:10]))}",
                "at least one valid token in each example",
                'correct the mask, or TokenSets.from_padded(..., on_empty="drop") and y[sets.source]',
            )  # fmt: skip

    @classmethod
    def from_list(cls, items: Sequence[Any]) -> "TokenSets":
        """Token sets of arrays or tensors [tokens, d], one for each example.

        Raises:
            ArgumentError: If there are none, or they are not matrices of one width.
        """
        tensors = [_floating(item) for item in items]
        shapes = {tuple(t.shape[1:]) if t.ndim == 2 else None for t in tensors}
        if len(shapes) != 1 or None in shapes:
            raise ArgumentError(
                f"{len(tensors)} examples, features of shapes {sorted({tuple(t.shape) for t in tensors})[:5]}",
                "at least one example, each [tokens, d] with the same d",
            )
        lengths = torch.tensor([0, *(len(t) for t in tensors)], device=tensors[0].device)
        return cls(torch.cat(tensors), lengths.cumsum(0))

    @classmethod
    def from_padded(cls, features: Any, mask: Any = None, *, on_empty: OnEmpty = "raise") -> "TokenSets":
        """Token sets of features [n, T, d] and a mask [n, T], True where a token is valid.

        What stands at padded positions, NaN included, is never read.

        Args:
            features: [n, T, d].
            mask: [n, T], or None where every token is valid.
            on_empty: What happens to examples without a valid token: ``raise``, or ``drop`` them with a warning, so
                that ``source`` says which are left.

        Raises:
            ArgumentError: If the mask has another shape, is not boolean or of 0 and 1, or leaves an example empty.
        """
        if on_empty not in ("raise", "drop"):
            raise ArgumentError(f"on_empty={on_empty!r}", "raise or drop")
        tensor = _floating(features)
        if tensor.ndim != 3:
            raise ArgumentError(f"features of shape {list(tensor.shape)}", "[examples, tokens, d]")
        valid = as_mask(mask, tensor)
        lengths, source = valid.sum(1), None
        if on_empty == "drop":
            source = lengths.nonzero().flatten()
            _warn_dropped(lengths)
            lengths = lengths[source]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return cls(tensor[valid], offsets, source)

    @property
    def lengths(self) -> Int64[Tensor, "n"]:
        """Valid tokens of each example."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.values.shape[1]

    @property
    def owner(self) -> Int64[Tensor, "tokens"]:
        """The example of each token."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.values.device), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)):
            i = range(len(self))[int(key)]
            return self.values[self.offsets[i] : self.offsets[i + 1]]
        rows = torch.arange(len(self))[torch.as_tensor(key) if not isinstance(key, slice) else key]
        return self.take(rows)

    def take(self, rows: Int64[Tensor, "m"]) -> "TokenSets":
        """The examples of these rows, in this order."""
        rows = rows.to(self.offsets.device)
        lengths = self.lengths[rows]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=rows.device) - offsets[:-1].repeat_interleave(lengths)
        return TokenSets(self.values[self.offsets[:-1][rows].repeat_interleave(lengths) + within], offsets)

    def padded(self) -> tuple[Float[Tensor, "n T d"], Bool[Tensor, "n T"]]:
        """Features padded with zeros on the right to the longest example, and their mask."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.values.device) < self.lengths[:, None]
        padded = self.values.new_zeros(len(self), longest, self.width)
        padded[mask] = self.values
        return padded, mask

    def replace_values(self, values: Float[Tensor, "tokens k"]) -> "TokenSets":
        """The same sets with other features."""
        return TokenSets(values, self.offsets)

    def sums(self, values: Float[Tensor, "tokens k"]) -> Float[Tensor, "n k"]:
        """Sum of a value of each token over the tokens of each example, in float64."""
        total = torch.zeros(len(self), values.shape[1], dtype=torch.float64, device=values.device)
        return total.index_add_(0, self.owner, values.double())

    def pooled(self, pool: Pool) -> Float[Tensor, "n d"]:
        """One vector for each example, in float64: masked mean or max, the last or first valid token, or one position.

        ``cls`` is the first token by another name; a number counts valid tokens, from the end if it is negative.

        Raises:
            ArgumentError: If the pooling is not known, or an example is too short for a position.
        """
        if pool == "mean":
            return self.sums(self.values) / self.lengths[:, None]
        if pool == "max":
            highest = self.values.new_full((len(self), self.width), -torch.inf, dtype=torch.float64)
            index = self.owner[:, None].expand(-1, self.width)
            return highest.scatter_reduce_(0, index, self.values.double(), "amax")
        place = {"last": -1, "first": 0, "cls": 0}.get(pool, pool) if isinstance(pool, str) else pool
        if isinstance(place, bool) or not isinstance(place, int):
            raise ArgumentError(f"pool={pool!r}", "mean, max, last, first, cls or a position")
        short = int(self.lengths.min())
        if not -short <= place < short:
            raise ArgumentError(f"pool={place}", f"a position that every example has; the shortest has {short} tokens")
        return self.values[(self.offsets[:-1] if place >= 0 else self.offsets[1:]) + place].double()

    def has_sink(self) -> bool:
        """Whether first tokens have at least five times the norm of the others, by medians: an attention sink.

        In decoder language models the first token's norm is one to three orders of magnitude above the rest.
        """
        norms = self.values.double().norm(dim=1)
        first = torch.zeros(len(norms), dtype=torch.bool, device=norms.device)
        first[self.offsets[:-1][self.lengths > 1]] = True
        rest = ~first
        rest[self.offsets[:-1][self.lengths == 1]] = False
        if not first.any():
            return False
        return bool(norms[first].median() >= SINK_RATIO * norms[rest].median()) and bool(norms[first].any())

    def without_first(self) -> "TokenSets":
        """The sets without their first tokens; an example of one token keeps it, and a warning says how many did."""
        alone = int((self.lengths == 1).sum())
        if alone:
            text = f"{alone} of {len(self)} examples have one token: it is kept although first tokens are skipped"
            warnings.warn(text, FirstTokenWarning, stacklevel=3)
        keep = torch.ones(len(self.values), dtype=torch.bool, device=self.values.device)
        keep[self.offsets[:-1][self.lengths > 1]] = False
        lengths = (self.lengths - 1).clamp(min=1)
        return TokenSets(self.values[keep], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))


def _warn_dropped(lengths: Tensor) -> None:
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        text = f"{len(empty)} of {len(lengths)} examples have no valid token and are left out: "
        warnings.warn(text + ", ".join(map(str, empty[:10])), EmptyExampleWarning, stacklevel=3)


def as_mask(mask: Any, features: Tensor) -> Bool[Tensor, "n T"]:
    """A boolean mask for features [n, T, d]: True is valid.

    Raises:
        ArgumentError: If it has another shape, or other values than True and False or 1 and 0.
    """
    if mask is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    valid = torch.as_tensor(np.asarray(mask) if not isinstance(mask, Tensor) else mask, device=features.device)
    if valid.shape != features.shape[:2]:
        raise ArgumentError(f"a mask of shape {list(valid.shape)}", f"{list(features.shape[:2])}, as the features")
    if valid.dtype != torch.bool:
        if bool((valid < 0).any()):
            raise ArgumentError("a mask with negative values", "True or 1 where a token is valid",
                                "turn an additive mask (0 and -inf) into `mask == 0`")  # fmt: skip
        if not bool(((valid == 0) | (valid == 1)).all()):
            raise ArgumentError("a mask with values other than 0 and 1", "True or 1 where a token is valid")
        valid = valid.bool()
    return valid


def as_token_sets(X: Any, mask: Any = None) -> TokenSets:
    """Token sets of any accepted input.

    Args:
        X: `TokenSets`; a list of [tokens, d]; [n, T, d] with a mask; or [n, d], one token each.
        mask: [n, T] boolean, True where a token is valid; for [n, T, d] alone.

    Raises:
        ArgumentError: If the input is of no such kind, or holds NaN or infinity at a valid position.
    """
    padded = is_padded(X)
    if mask is not None and not padded:
        raise ArgumentError("a mask for features that are not [examples, tokens, d]", "no mask: nothing is padded")
    if isinstance(X, TokenSets):
        sets = X
    elif padded:
        sets = TokenSets.from_padded(X, mask)
    elif is_token_list(X):
        sets = TokenSets.from_list(X)
    else:
        matrix = _floating(X)
        if matrix.ndim != 2:
            raise ArgumentError(f"features of shape {list(matrix.shape)}", "[n, d], [n, T, d] or a list of [tokens, d]")
        sets = TokenSets(matrix, torch.arange(len(matrix) + 1, device=matrix.device))
    bad = (~torch.isfinite(sets.values)).any(1).nonzero().flatten()
    if len(bad):
        example = int(torch.searchsorted(sets.offsets, bad[0], right=True)) - 1
        raise ArgumentError(
            f"NaN or infinity at {len(bad)} valid tokens, first at example {example}, "
            f"token {int(bad[0] - sets.offsets[example])}",
            "finite features", "mask these tokens, or extract them in float32",
        )  # fmt: skip
    return sets


def is_padded(X: Any) -> bool:
    """Whether X is [n, T, d]."""
    return isinstance(X, (np.ndarray, Tensor)) and X.ndim == 3


def is_token_list(X: Any) -> bool:
    """Whether X is a list of [tokens, d]."""
    return isinstance(X, (list, tuple)) and bool(X) and getattr(X[0], "ndim", None) == 2


def is_token_input(X: Any) -> bool:
    """Whether X holds sets of tokens, not one vector for each example."""
    return isinstance(X, TokenSets) or is_padded(X) or is_token_list(X)


def _floating(X: Any) -> Tensor:
    tensor = X.detach() if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
    if tensor.is_complex():
        raise ArgumentError("complex features", "real features")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
