"""Examples: single interchange interventions, with what the algorithm and the network answer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.causal.data import InterchangeDataset, Pool
from interp.causal.lanes import Lanes
from interp.causal.maps import stack
from interp.hooks.errors import ArgumentError
from interp.hooks.table import Table

if TYPE_CHECKING:
    from interp.causal.alignment import Alignment

_NUMBERS = 32  # of a vector that are written out


@torch.no_grad()
def interchange_examples(alignment: "Alignment", data: InterchangeDataset, n: int) -> Table:
    """The first pairs that flip and the first that stay, in turn; see `Alignment.examples`.

    Raises:
        ArgumentError: If n is not a positive int.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentError(f"n={n!r}", "a positive int")
    flips = data.flips
    turns = torch.cat([mask.nonzero()[:, 0][:n] for mask in (flips, ~flips)])
    order = torch.cat([torch.arange(int(mask.sum().clamp(max=n))) for mask in (flips, ~flips)]).argsort(stable=True)
    rows = turns[order][:n]
    some = data.take(rows)
    readout = alignment.training.readout if alignment.training is not None else "candidates"
    tau, every = stack([alignment.tau]).eval(), torch.arange(len(some))
    after, before = (
        Lanes([alignment.lane], d, readout).logits(tau, every)[0].argmax(1) for d in (some, some.without_intervention())
    )
    answers = _Answers(alignment, some, readout)
    found = []
    for i, intervened in enumerate(some.intervened()):
        row: dict[str, Any] = {
            "pair": int(rows[i]),
            "set": intervened,
            "base": _shown(alignment, some.pool, some.base[i]),
        }
        for k, variable in enumerate(some.variables):
            value = lambda at, v=variable: _value(some.pool.settings[v][at])
            own, chosen = value(some.base[i]), bool(some.chosen[i, k])
            row[variable] = f"{own} → {value(some.sources[i, k])}" if chosen else own
            row[f"source of {variable}"] = _shown(alignment, some.pool, some.sources[i, k]) if chosen else ""
        row |= {
            "algorithm before": answers.label(i, some.base_labels[i]), "algorithm": answers.label(i, some.labels[i]),
            "network before": answers.output(i, before[i]), "network": answers.output(i, after[i]),
        }  # fmt: skip
        found.append(row | {"right": answers.right(i, after[i], some.labels[i])})
    return Table(found, f"{alignment.tau} at {alignment.sites}, {alignment.causal_model.name}: {data.split} pairs")


class _Answers:
    """Labels and outputs as text: tokens where labels have tokens, else numbers."""

    def __init__(self, alignment: "Alignment", data: InterchangeDataset, readout: str):
        self.tokenizer, self.tokens = alignment.model.tokenizer, data.candidates
        self.whole = readout == "vocabulary"

    def label(self, row: int, label: Tensor) -> str:
        """A label of the algorithm."""
        return str(int(label)) if self.tokens is None else self._token(int(self.tokens[row, label]))

    def output(self, row: int, column: Tensor) -> str:
        """A column of the network's output."""
        return self._token(int(column)) if self.tokens is not None and self.whole else self.label(row, column)

    def right(self, row: int, column: Tensor, label: Tensor) -> bool:
        """Whether an output is a label's: by number, as two tokens may look alike."""
        wanted = self.tokens[row, label] if self.tokens is not None and self.whole else label
        return int(column) == int(wanted)

    def _token(self, index: int) -> str:
        return f"#{index}" if self.tokenizer is None else self.tokenizer.decode([index])


def _shown(alignment: "Alignment", pool: Pool, row: Tensor) -> str:
    """An input as text: a prompt, or numbers."""
    (given,) = pool.take(row[None])
    if isinstance(given, str):
        return given
    if isinstance(given, Tensor) and given.is_floating_point():
        numbers = [f"{x:.2f}" for x in given.flatten()[:_NUMBERS].tolist()]
        return " ".join([*numbers, *(["…"] if given.numel() > _NUMBERS else [])])
    ids = given.tolist() if isinstance(given, Tensor) else list(given)
    tokenizer = alignment.model.tokenizer
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def _value(value: Tensor) -> str:
    return " ".join(f"{x:.2f}" if isinstance(x, float) else str(int(x)) for x in value.flatten().tolist())
