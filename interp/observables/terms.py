"""Terms of an observable: from tokens, as users name them, to ids with weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from interp.hooks.errors import ArgumentError, TokenError
from interp.hooks.model import Model
from interp.hooks.text import several_ids, token_ids

Token = str | int
MultiToken = Literal["error", "first", "mean"]
_WAYS_OUT = "pass an id, choose multi_token='first' or 'mean', or use Observable.sequence(...)"


@dataclass(frozen=True)
class Terms:
    """Ids with a weight each, and what to know about how they were found."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    note: str = ""


def read_terms(
    model: Model, tokens: Sequence[Token], weights: Sequence[float], multi_token: MultiToken = "error"
) -> Terms:
    """Return the ids and weights of a sum Σ w_i · logit of token i.

    Args:
        model: The model whose tokens are meant.
        tokens: Ids, or strings.
        weights: One for each token.
        multi_token: For strings of several ids: ``error``; ``first``, the first id behind those that all tokens
            share; ``mean``, the average over its ids (of their unembedding rows: a heuristic).

    Raises:
        TokenError: If a string has several ids under ``error``, or none of its own under ``first``.
        ArgumentError: If ``multi_token`` is none of these.
    """
    if multi_token not in ("error", "first", "mean"):
        raise ArgumentError(f"multi_token={multi_token!r}", "'error', 'first' or 'mean'")
    found = [token_ids(model, token) for token in tokens]
    several = [(token, ids) for token, ids in zip(tokens, found, strict=True) if len(ids) > 1]
    if not several:
        return Terms(tuple(ids[0] for ids in found), tuple(map(float, weights)))
    if multi_token == "error":
        token, ids = several[0]
        raise several_ids(model, str(token), ids, "exactly one for a term of an observable", _WAYS_OUT)
    if multi_token == "first":
        return _first(tokens, found, weights)
    note = "; ".join(f"{token!r} is the mean of the unembedding rows of ids {ids}" for token, ids in several)
    flat = [(i, float(w) / len(ids)) for ids, w in zip(found, weights, strict=True) for i in ids]
    return Terms(*map(tuple, zip(*flat, strict=True)), note=f"{note} (a heuristic)")  # type: ignore[arg-type]


def _first(tokens: Sequence[Token], found: list[list[int]], weights: Sequence[float]) -> Terms:
    """The first id of each token behind those that all tokens share."""
    shared: list[int] = []
    if len(tokens) > 1:
        for column in zip(*found, strict=False):
            if len(set(column)) > 1:
                break
            shared.append(column[0])
    bare = [token for token, ids in zip(tokens, found, strict=True) if len(ids) == len(shared)]
    if bare:
        raise TokenError(
            f"token {bare[0]!r} has the ids {shared}, with which every other token begins",
            "a first id that differs between target and foil",
            "use Observable.sequence(...) to read the logits behind it",
        )
    ids = tuple(i[len(shared)] for i in found)
    up, down = ({i for i, w in zip(ids, weights, strict=True) if s * w > 0} for s in (1, -1))
    if up & down:
        clash = [token for token, i in zip(tokens, ids, strict=True) if i in up & down]
        raise TokenError(f"tokens {clash} have the same first id {min(up & down)}", "first ids that differ in sign")
    note = f"first differing ids {list(ids)} of tokens of several ids"
    note += f", behind the ids {shared} that all share: read the logits there" if shared else ""
    return Terms(ids, tuple(map(float, weights)), note)
