"""What each figure is called, what one sees in it, and what it does not show: one sentence each, with its numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from interp.hooks.errors import ArgumentError
from interp.plots.style import legible, signed, visible


@dataclass(frozen=True)
class Caption:
    """Words for one figure.

    Attributes:
        title: What is drawn.
        sees: What one sees.
        silent: What it does not show.
    """

    title: str
    sees: str
    silent: str


def caption(result: Any) -> Caption:
    """Return the words for a result that can be drawn.

    Raises:
        ArgumentError: If there are none for results of this kind.

    Example:
        >>> from interp.hooks.table import Table
        >>> caption(Table([{"token": " the", "probability": 0.5}])).sees
        'The model gives ␣the 50.0 %.'
    """
    words = _words(result)
    if words is None:
        raise ArgumentError(f"a {type(result).__name__}", "a result that there are words for")
    return words(result)


def has_words(result: Any) -> bool:
    """Whether there are words for results of this kind."""
    return _words(result) is not None


def _words(result: Any) -> Callable[[Any], Caption] | None:
    known = {"LogitLens": _lens, "Attribution": _attribution, "Votes": _votes, "Table": _table}
    return next((known[c.__name__] for c in type(result).__mro__ if c.__name__ in known), None)


def _table(table: Any) -> Caption:
    kind = "token" if "token" in table.columns else "class"
    names = [visible(str(r[kind])) if kind == "token" else legible(str(r[kind])) for r in table]
    parts = [f"{n} {_percent(r['probability'])}" for n, r in zip(names, table, strict=True)]
    then = f", then {parts[1]}" if len(parts) > 1 else ""
    return Caption(
        "What comes next" if kind == "token" else "What the network sees",
        f"The model gives {parts[0]}{then}.",
        "How likely each answer is, not where it comes from.",
    )


def _lens(lens: Any) -> Caption:
    sees = "Each cell is the token that the layer would give if it were the last."
    if lens.followed:
        ranks = lens.ranks[:, -1, :]
        arrivals = [_arrival(visible(t), ranks[:, n].tolist(), lens.layers) for n, t in enumerate(lens.followed)]
        sees = f"{sees} Behind the whole prompt, {' and '.join(arrivals)}."
    return Caption(
        "The answer, layer by layer",
        sees,
        "Each layer is read with the last one's norm and unembedding: what is present in another form stays unseen. "
        "Click a column to see its ranks.",
    )


def _arrival(token: str, ranks: list[int], layers: list[str]) -> str:
    """From which layer on a token is the most likely, or at which rank it ends."""
    if ranks[-1]:
        return f"{token} ends at rank {ranks[-1] + 1}"
    first = max((i for i, rank in enumerate(ranks) if rank), default=-1) + 1
    return f"{token} is first from layer {layers[first]} on"


def _attribution(found: Any) -> Caption:
    rows = [r for r in found.to_records() if r["kind"] not in ("constant", "rounding")]
    best = max(rows, key=lambda r: abs(r["value"]))
    note = f" It is {found.note}." if found.note else ""
    return Caption(
        "Which heads and MLPs",
        f"{legible(found.observable)} = {found.measurement:.3f} is the sum of what every head, MLP, the embedding and "
        f"constants add; the largest part is {best['component']} with {signed(best['value'], 2)}.{note}",
        "Only what a part itself adds at the last position, with the final norm's divisor held: what a head did by way "
        "of later layers counts as theirs. Click cells or bars to sum parts.",
    )


def _votes(votes: Any) -> Caption:
    return _token_votes(votes) if votes.map.ndim == 1 else _pixel_votes(votes)


def _token_votes(votes: Any) -> Caption:
    best = int(votes.map.abs().argmax())
    name = visible(votes.labels[best]) if votes.labels else f"entry {best}"
    constant = (
        "there are no constants (r = 0)" if votes.residual == 0 else f"constants give r = {signed(votes.residual)}"
    )
    return Caption(
        "Which tokens vote",
        f"{legible(votes.target)} = {votes.value:.3f} is the sum of one vote for each token; {constant}. "
        f"The largest vote is {name} with {signed(float(votes.map[best]), 2)}.",
        "Attention patterns, norms and gates are held as they are for this prompt: a vote is not what would happen if "
        "the token were another.",
    )


def _pixel_votes(votes: Any) -> Caption:
    share = votes.bias_share
    if 0 <= share <= 1:
        weight = f"r makes {_percent(share)} of the output"
    else:
        weight = "votes and r pull in opposite directions"
    cancel = f" (in absolute values {votes.abs_total:,.0f}: they largely cancel)" if votes.cancellation > 10 else ""
    return Caption(
        f"Which pixels vote for {legible(votes.target)}",
        f"The pixels' votes sum to {signed(votes.total)}{cancel}, constants give r = {signed(votes.residual)}, "
        f"together {signed(votes.value)}: {weight}. Click cells to sum their votes.",
        "The network's decisions are held as they are for this picture, and r depends on which input counts as zero: "
        "a vote is not what would happen if the cell were covered.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"
