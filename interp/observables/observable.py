"""Observables: linear functionals of the logits, or of a site.

Source: Dunefsky & Cohan, "Observable Propagation: Uncovering Feature Vectors in Transformers", ICML 2024
(arXiv 2312.16291).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError, NonFiniteError
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.observables.reading import rows_at, working
from interp.observables.readout import Readout
from interp.observables.softcap import Softcap, read_softcap, tangent
from interp.observables.terms import MultiToken, Token, read_terms

if TYPE_CHECKING:
    from interp.observables.sequences import SequenceObservable


@dataclass(frozen=True, eq=False)
class Observable:
    """A linear functional m = n · logits + offset, with n given by tokens and weights, or by a vector.

    With a site it is a functional of that site's activation instead: m = vector · x + offset.

    Attributes:
        name: What it is called in tables.
        ids: Token ids with a weight each; empty where ``vector`` is given.
        weights: Their weights.
        vector: n itself [vocab], or the functional of a site [feature]; None for tokens.
        site: What is read; None for the logits.
        offset: A constant that is added: 0 for observables of the logits as they are.
        note: What to know when reading the numbers.

    Example:
        >>> import torch
        >>> Observable("a - b", (0, 1), (1.0, -1.0)).measure(torch.tensor([3.0, 1.0, 0.0])).item()
        2.0
    """

    name: str
    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    vector: Tensor | None = field(default=None, repr=False)
    site: Site | None = None
    offset: float = 0.0
    note: str = ""

    def __post_init__(self):
        """Refuse an observable that is zero, not finite or of two forms at once.

        Raises:
            ArgumentError: If n is zero, is given twice, or is of tokens at a site.
            NonFiniteError: If n or the offset holds NaN or infinity.
        """
        if len(self.ids) != len(self.weights) or min(self.ids, default=0) < 0:
            raise ArgumentError(
                f"{len(self.ids)} token ids {list(self.ids)[:5]} with {len(self.weights)} weights",
                "ids from 0 on, with a weight each",
            )
        if self.ids and (self.vector is not None or self.site is not None):
            raise ArgumentError(f"observable {self.name!r} of tokens, with a vector or a site", "tokens or a vector")
        n = self.weights_or_vector
        if not torch.isfinite(n).all() or not -float("inf") < self.offset < float("inf"):
            raise NonFiniteError(f"observable {self.name!r} holds NaN or infinity", "finite weights")
        totals: dict[int, float] = {}
        for i, w in zip(self.ids, self.weights, strict=True):
            totals[i] = totals.get(i, 0.0) + w
        if not any(totals.values()) and (self.vector is None or not self.vector.any()):
            raise ArgumentError(f"observable {self.name!r} is zero", "a target that differs from the foil")

    # Made of tokens --------------------------------------------------------------------------------------------------

    @classmethod
    def logit(
        cls, model: Model, token: Token, *, multi_token: MultiToken = "error", name: str | None = None
    ) -> "Observable":
        """Return the logit of one token, given as an id or as a string that encodes to exactly one.

        For a string of several ids, ``multi_token`` chooses ``error``; ``first``, its first id; or ``mean``, the
        average over its ids (of their unembedding rows: a heuristic).

        Raises:
            TokenError: If the token is not exactly one.
        """
        terms = read_terms(model, [token], [1.0], multi_token)
        return cls(name or f"logit {token!r}", terms.ids, terms.weights, note=terms.note)

    @classmethod
    def logit_diff(
        cls, model: Model, target: Token, foil: Token, *, multi_token: MultiToken = "error", name: str | None = None
    ) -> "Observable":
        """Return the logit of ``target`` minus the logit of ``foil``.

        Args:
            model: The model whose tokens are meant.
            target: The token that counts up: an id, or a string that encodes to exactly one.
            foil: The token that counts down.
            multi_token: For strings of several ids: ``error``; ``first``, the first ids in which target and foil
                differ; ``mean``, the average over each one's ids (of their unembedding rows: a heuristic).
            name: What it is called in tables.

        Raises:
            TokenError: If a token is not exactly one.
            ArgumentError: If target equals foil.
        """
        terms = read_terms(model, [target, foil], [1.0, -1.0], multi_token)
        return cls(name or f"{target!r} - {foil!r}", terms.ids, terms.weights, note=terms.note)

    @classmethod
    def tokens(
        cls, model: Model, positive: Sequence[Token], negative: Sequence[Token] = (), *,
        weights: Sequence[float] | None = None, mean: bool = False, multi_token: MultiToken = "error",
        name: str | None = None,
    ) -> "Observable":  # fmt: skip
        """Return Σ logits of ``positive`` - Σ logits of ``negative``.

        Args:
            model: The model whose tokens are meant.
            positive: Tokens that count up.
            negative: Tokens that count down.
            weights: One weight for each token, positive ones first; ±1 by default.
            mean: Average each side instead of summing it.
            multi_token: As for `logit_diff`; ``first`` reads behind the ids that all of the tokens share.
            name: What it is called in tables.

        Raises:
            TokenError: If a token is not exactly one.
            ArgumentError: If there are no tokens, or the weights do not match them.
        """
        if isinstance(positive, str) or isinstance(negative, str):
            raise ArgumentError(f"a string {positive if isinstance(positive, str) else negative!r}", "a list of tokens")
        both = [*positive, *negative]
        signs = [1.0 / len(positive) if mean else 1.0] * len(positive)
        signs += [-1.0 / len(negative) if mean else -1.0] * len(negative)
        if weights is not None and (mean or len(weights) != len(both)):
            raise ArgumentError(
                f"{len(weights)} weights for {len(both)} tokens (mean={mean})", "one for each, without mean"
            )
        terms = read_terms(model, both, signs if weights is None else weights, multi_token)
        return cls(name or f"{list(positive)} - {list(negative)}", terms.ids, terms.weights, note=terms.note)

    # Made of vectors -------------------------------------------------------------------------------------------------

    @classmethod
    def from_vector(cls, vector: Any, *, model: Model | None = None, name: str = "vector") -> "Observable":
        """Return m = vector · logits; with a model, the length is checked now rather than when it is used.

        Raises:
            ArgumentError: If the vector is not one-dimensional, is zero, or does not fit the model's vocabulary.
        """
        found = cls(name, vector=_as_vector(vector, "[vocab]"))
        if model is not None:
            found.check_logits(Readout.of(model).vocab)
        return found

    @classmethod
    def from_residual(
        cls, vector: Any, *, site: SiteLike, offset: float = 0.0, name: str | None = None
    ) -> "Observable":
        """Return m = vector · x + offset, with x the activation at a site: a probe, a decoder row, a feature vector.

        At a site with heads the vector is over heads and their widths, head by head; at a site of one head, over its
        width.

        Args:
            vector: [feature].
            site: Where x is read; kept in the observable, which refuses activations of another site.
            offset: A constant: a probe's intercept.
            name: What it is called in tables.

        Raises:
            ArgumentError: If the vector is not one-dimensional, or zero.
            SiteError: If the site does not parse.

        Example:
            >>> probe = Observable.from_residual([1.0, -2.0], site="blocks.3.hook_resid_post@last", offset=0.5)
            >>> probe.site, probe.measure(torch.tensor([2.0, 1.0])).item()
            (Site('blocks.3.hook_resid_post@last'), 0.5)
        """
        where = Site.parse(site)
        return cls(name or f"vector at {where}", vector=_as_vector(vector, "[feature]"), site=where, offset=offset)

    @classmethod
    def log_prob_gradient(
        cls, model: Model, token: Token, logits: Float[Tensor, "vocab"], *, name: str | None = None
    ) -> "Observable":
        """Return n = e_token - softmax(logits): the gradient of log p(token) with respect to the logits.

        ``logits`` are the reference, as the model gives them at one position; n is detached from them.

        Raises:
            TokenError: If the token is not exactly one.
        """
        (index,) = read_terms(model, [token], [1.0]).ids
        n = -torch.softmax(working(logits.detach()), -1)
        if index >= len(n):
            raise ArgumentError(f"token id {index}", f"ids below {len(n)}, the number of logits")
        n[index] += 1.0
        note = "gradient of the log-probability at the reference: n·logits is not the log-probability"
        return cls(name or f"log p({token!r})", vector=n, note=note)

    @classmethod
    def sequence(
        cls, model: Model, terms: Sequence[tuple[int, Any]], *, name: str | None = None
    ) -> "SequenceObservable":
        """Return m = Σ n_p · logits_p over positions p of one teacher-forced run, each with an n of its own.

        Args:
            model: The model whose tokens are meant.
            terms: Pairs (position, what): what is a token, a vector [vocab] or an Observable. The logits at a
                position are those of the next token.
            name: What it is called in tables.

        Raises:
            ArgumentError: If there are no terms, or a position is not an index from the start.
            TokenError: If a token is not exactly one.

        Example:
            >>> import interp
            >>> model = interp.load("smollm2-135m")
            >>> both = interp.Observable.sequence(model, [(4, " Mary"), (5, " went")])
            >>> both.measure(model.run("Then John went home and Mary")).shape
            torch.Size([1])
        """
        from interp.observables.sequences import sequence

        return sequence(model, terms, name)

    @classmethod
    def sequence_log_prob(
        cls, model: Model, prompt: Any, continuation: Any, *, name: str | None = None
    ) -> "SequenceObservable":
        """Return the linear form of log p(continuation | prompt): n_p = e_token - softmax(logits_p), held constant.

        It sums to Σ n_p · logits_p, not to the log-probability, whose value at the reference is kept beside it.

        Args:
            model: The model, which is run once on prompt and continuation.
            prompt: One text, or token ids.
            continuation: A text (encoded for itself, without special tokens), or token ids.
            name: What it is called in tables.

        Raises:
            InputError: If the prompt is not one, or the continuation is empty.
        """
        from interp.observables.sequences import sequence_log_prob

        return sequence_log_prob(model, prompt, continuation, name)

    # Reading ---------------------------------------------------------------------------------------------------------

    @property
    def weights_or_vector(self) -> Tensor:
        """The weights of the tokens [term] in float64, or the vector; detached."""
        return torch.tensor(self.weights, dtype=torch.float64) if self.vector is None else self.vector.detach()

    @property
    def weight_sum(self) -> float:
        """Σ n_i: what m changes by when all logits of a position move by 1."""
        return float(self.weights_or_vector.cpu().double().sum())

    @property
    def is_zero_sum(self) -> bool:
        """Whether m does not change when all logits of a position move by the same amount."""
        return bool(abs(self.weight_sum) <= 1e-6 * float(self.weights_or_vector.abs().sum()))

    def measure(self, x: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch"]:
        """Return n · x + offset, in float32 or better: x are logits, or rows of the observable's site.

        Raises:
            ArgumentError: If x has another width than n.
        """
        if self.site is None:
            self.check_logits(x.shape[-1])
        elif x.shape[-1] != len(self.weights_or_vector):
            raise ArgumentError(
                f"rows of width {x.shape[-1]} at {self.site}", f"{len(self.weights_or_vector)}, as the vector has"
            )
        x = working(x)
        read = x if self.vector is not None else x[..., list(self.ids)]
        return read @ self.weights_or_vector.to(read) + self.offset

    def __call__(self, x: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch"]:
        """As `measure`."""
        return self.measure(x)

    def read(self, acts: Activations) -> Float[Tensor, "batch *pos"]:
        """Return the measurement at the observable's own site (the logits, where it has none) in a capture.

        Raises:
            SiteError: If that site was not captured.
        """
        return self.measure(rows_at(acts, self.site or Site("logits")))

    def check_logits(self, vocab: int) -> None:
        """Refuse logits of another width, and an observable that is not of logits.

        Raises:
            ArgumentError: If n does not fit, or the observable has a site.
        """
        if self.site is not None:
            raise ArgumentError(
                f"observable {self.name!r} of {self.site}",
                "an observable of the logits",
                "read(acts) measures it there",
            )
        if self.vector is not None and len(self.vector) != vocab:
            raise ArgumentError(
                f"observable vector has length {len(self.vector)}",
                f"the model's vocabulary, {vocab} (unembedding rows)",
            )
        if max(self.ids, default=0) >= vocab:
            raise ArgumentError(f"token id {max(self.ids)}", f"ids below {vocab}")

    def pull_to_stream(
        self, model: Model, *, softcap: Softcap = "pre",
        logits: Float[Tensor, "vocab"] | None = None,
    ) -> tuple[Float[Tensor, "d_model"], float]:  # fmt: skip
        """Return (W_Uᵀ n, n · b_U + offset), times the logit scale: the observable at the final norm's output.

        In float32 or better. Token observables gather rows of W_U; a dense n is never made.

        Args:
            model: A model with an unembedding.
            softcap: Where the model caps its logits: ``pre`` reads n on the logits before the cap, ``linearize`` the
                cap's tangent at ``logits`` (see `linearize_softcap`).
            logits: The reference for ``linearize``.

        Raises:
            ArgumentError: If the model has no unembedding or another vocabulary, or the reference is missing.
        """
        w, offsets = Readout.of(model).pull([read_softcap(self, model, softcap, logits)])
        return w[0], float(offsets[0])

    def linearize_softcap(self, model: Model, logits: Float[Tensor, "vocab"]) -> "Observable":
        """Return the tangent of m at a reference, as an observable of the logits z before the cap c tanh(z/c).

        n_i becomes n_i (1 - (logits_i/c)²); the offset makes both agree at the reference. A model without a soft-cap
        gives this observable back.

        Args:
            model: The model that caps its logits.
            logits: The reference, as the model gives them at one position (behind the cap).

        Raises:
            ArgumentError: If the logits are not behind this cap, or so close to it that nothing is left.
        """
        return tangent(self, model, logits)

    # Plain data ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data (a vector as a list)."""
        found: dict[str, Any] = {"name": self.name}
        if self.vector is not None:
            found["vector"] = self.vector.tolist()
        else:
            found |= {"ids": list(self.ids), "weights": list(self.weights)}
        optional = {"site": str(self.site) if self.site else None, "offset": self.offset, "note": self.note}
        return found | {key: value for key, value in optional.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Observable":
        """Return the observable that `to_dict` wrote.

        Raises:
            ArgumentError: If there is a key that no observable has.
        """
        known = {"name", "ids", "weights", "vector", "site", "offset", "note"}
        if not {"name"} <= set(data) <= known:
            raise ArgumentError(f"an observable with the keys {sorted(data)}", f"a name, and of {sorted(known)}")
        fields: dict[str, Any] = dict(data)
        for key in ("ids", "weights"):
            fields[key] = tuple(data.get(key, ()))
        if "vector" in data:
            fields["vector"] = torch.tensor(data["vector"], dtype=torch.float64)  # JSON's numbers are doubles
        if "site" in data:
            fields["site"] = Site.parse(data["site"])
        return cls(**fields)


def _as_vector(vector: Any, shape: str) -> Tensor:
    """A detached floating-point copy of what is one-dimensional and real."""
    try:
        found = torch.as_tensor(vector)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"an observable vector of type {type(vector).__name__} ({error})", "numbers") from error
    if found.ndim != 1 or found.is_complex():
        raise ArgumentError(f"an observable vector of shape {list(found.shape)} ({found.dtype})", f"{shape}, real")
    return found.detach().clone() if found.is_floating_point() else found.float()
