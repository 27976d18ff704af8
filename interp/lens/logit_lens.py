"""The logit lens: what the unembedding reads in the stream at each layer.

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError, SiteUnavailableError
from interp.hooks.examples import each_example
from interp.hooks.inputs import Batch
from interp.hooks.layouts import child
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.hooks.text import token_id
from interp.hooks.weights import linear_bias, linear_weight


@dataclass(frozen=True)
class LogitLens(Rows):
    """Readouts of the stream at each layer, of one prompt: as it is, or carried to the last layer by a Jacobian lens.

    Attributes:
        layers: Names of the streams: ``embed``, then each block's output.
        tokens: The prompt's tokens.
        top_ids: Most likely next tokens [layer, pos, k].
        top_probabilities: Their probabilities [layer, pos, k].
        entropy: Of the readout's distribution, in nats [layer, pos].
        ranks: Rank (0 is first) of each followed token [layer, pos, token].
        probabilities: Probability of each followed token [layer, pos, token].
        followed: The followed tokens.
        vocabulary: Token strings of ``top_ids`` by id.
        kind: ``logit lens`` or ``Jacobian lens``.
        positions: Which positions of the prompt are read, or None for all; ``tokens`` are theirs.
    """

    layers: list[str]
    tokens: list[str]
    top_ids: Int[Tensor, "layer pos k"] = field(repr=False)
    top_probabilities: Float[Tensor, "layer pos k"] = field(repr=False)
    entropy: Float[Tensor, "layer pos"] = field(repr=False)
    ranks: Int[Tensor, "layer pos token"] = field(repr=False)
    probabilities: Float[Tensor, "layer pos token"] = field(repr=False)
    followed: list[str]
    vocabulary: dict[int, str] = field(repr=False)
    kind: str = "logit lens"
    positions: list[int] | None = field(default=None, repr=False)

    @property
    def places(self) -> list[int]:
        """The position in the prompt of each column."""
        return list(range(len(self.tokens))) if self.positions is None else self.positions

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each layer and position: the most likely token, its probability, the entropy, followed tokens."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, (place, token) in enumerate(zip(self.places, self.tokens, strict=True)):
                row = {
                    "layer": layer,
                    "position": place,
                    "token": token,
                    "top": self.vocabulary[int(self.top_ids[i, j, 0])],
                }
                row |= {"probability": float(self.top_probabilities[i, j, 0]), "entropy": float(self.entropy[i, j])}
                for n, name in enumerate(self.followed):
                    row |= {
                        f"rank of {name}": int(self.ranks[i, j, n]),
                        f"p of {name}": float(self.probabilities[i, j, n]),
                    }
                rows.append(row)
        return rows

    def at(self, position: int = -1) -> Table:
        """Return the rows of one column (of those that were read), layer by layer."""
        index = range(len(self.tokens))[position]
        rows = [
            {k: v for k, v in r.items() if k not in ("position", "token")}
            for r in self.to_records()
            if r["position"] == self.places[index]
        ]
        return Table(rows, f"{self.kind} behind {self.tokens[index]!r}")

    def _repr_html_(self) -> str:
        return self.at(-1)._repr_html_()


@torch.no_grad()
def logit_lens(
    model: Model, prompt: Any, follow: Sequence[str | int] = (), k: int = 5, *, positions: Any = None, plan=()
) -> LogitLens:
    """Return the logit lens of one prompt: softmax(W_U N(x_l) + b_U) for the embedding and each block's output x_l.

    The last layer's readout equals the model's own distribution.

    Args:
        model: A decoder with a final norm and an unembedding.
        prompt: One text, or token ids.
        follow: Tokens whose rank and probability are followed through the layers.
        k: How many of the most likely tokens to keep.
        positions: Behind which tokens to read, as `capture` takes them; all by default. Each costs a product with W_U
            at every layer.
        plan: Interventions under which the model runs.

    Raises:
        SiteUnavailableError: If the model has no final norm and unembedding.
        TokenError: If a followed token is not exactly one.
        ArgumentError: If there is more than one prompt, or k is out of range.
        PositionError: If a position lies outside the prompt.
    """
    batch, ids = check_readout(model, prompt, follow, k)
    names = stream_names(model)
    places = None if positions is None else batch.positions(positions)[0].tolist()
    acts = capture_streams(model, batch, list(names.values()), plan, places)
    streams = {layer: acts[name][0] for layer, name in names.items()}
    return read_streams(model, batch, streams, ids, k, positions=places)


def check_readout(model: Model, prompt: Any, follow: Sequence[str | int], k: int) -> tuple[Batch, list[int]]:
    """Return the prompt as a batch without padding, and the followed tokens' ids.

    Raises:
        SiteUnavailableError: If the model has no final norm and unembedding.
        TokenError: If a followed token is not exactly one.
        ArgumentError: If there is more than one prompt, or k is out of range.
    """
    layout = model.layout
    if layout is None or layout.final_norm is None or layout.unembed is None or layout.post_ln:
        raise SiteUnavailableError(
            f"logit lens on {type(model.module).__name__} ({model.family})", "a final norm and an unembedding"
        )
    batch = model.batch(prompt)
    if isinstance(follow, str):
        raise ArgumentError(f"follow={follow!r}", "a list of tokens")
    if batch.size != 1 or not 1 <= k <= (model.reader.vocab or k):
        raise ArgumentError(f"{batch.size} prompts and k={k}", f"one prompt and k in 1..{model.reader.vocab}")
    return each_example(model, batch)[0], [token_id(model, t) for t in follow]


def stream_names(model: Model) -> dict[str, str]:
    """The site of each layer's stream: ``embed``, then each block's output."""
    return {"embed": "blocks.0.hook_resid_pre"} | {str(i): f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)}


def capture_streams(
    model: Model, batch: Batch, names: list[str], plan: Any, positions: list[int] | None = None
) -> Activations:
    """Return streams of one prompt, the last one among them, which must read as the model's own logits.

    Raises:
        ArgumentError: If a plan acts behind the last stream.
    """
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    acts = model.capture(batch, list(dict.fromkeys([*names, last, "logits"])), positions=positions, plan=plan)
    readout = read_logits(model, acts[last][0])
    if not torch.allclose(readout, acts["logits"][0].float(), rtol=1e-2, atol=1e-2 * float(readout.abs().max())):
        raise ArgumentError("logits that are not the last stream's readout", "a plan in front of the final norm")
    return acts


def read_streams(
    model: Model, batch: Batch, streams: dict[str, Tensor], follow: list[int], k: int, kind: str = "logit lens", *,
    positions: list[int] | None = None,
) -> LogitLens:  # fmt: skip
    """Return what the final norm and the unembedding read in streams [pos, d_model], by layer."""
    rows = [_read(model, stream, follow, k) for stream in streams.values()]
    top_p, top_i, entropy, ranks, probabilities = (torch.stack(column) for column in zip(*rows, strict=True))
    decode = (lambda i: model.tokenizer.decode([i])) if model.tokenizer is not None else str
    ids_of = batch.ids[0].tolist()  # type: ignore[index]
    return LogitLens(
        layers=list(streams),
        tokens=[decode(i) for i in (ids_of if positions is None else [ids_of[p] for p in positions])],
        top_ids=top_i, top_probabilities=top_p, entropy=entropy, ranks=ranks, probabilities=probabilities,
        followed=[decode(i) for i in follow],
        vocabulary={i: decode(i) for i in top_i.unique().tolist()},
        kind=kind, positions=positions,
    )  # fmt: skip


def read_logits(model: Model, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos vocab"]:
    """W_U N(x) + b_U with the model's scale and soft-cap, in float32."""
    layout, norm = model.layout, model.bindings.norms["ln_final"]  # type: ignore[union-attr]
    head = child(model.module, layout.unembed)  # type: ignore[union-attr, arg-type]
    weight, bias = linear_weight(head, layout.unembed), linear_bias(head)  # type: ignore[union-attr, arg-type]
    logits = norm(stream).to(weight.dtype) @ weight.T
    logits = ((logits if bias is None else logits + bias) * layout.logit_scale).float()  # type: ignore[union-attr]
    if layout.logit_softcap is not None:  # type: ignore[union-attr]
        logits = layout.logit_softcap * torch.tanh(logits / layout.logit_softcap)  # type: ignore[union-attr]
    return logits


def _read(model: Model, stream: Float[Tensor, "pos d_model"], follow: list[int], k: int) -> tuple[Tensor, ...]:
    logits = read_logits(model, stream)
    log_p = torch.log_softmax(logits, -1)
    p, i = log_p.exp().topk(k, -1)
    entropy = -(log_p.exp() * log_p).nansum(-1)
    chosen = logits[:, follow]
    ranks = (
        (logits[:, None, :] > chosen[:, :, None]).sum(-1) if follow else torch.zeros(len(stream), 0, dtype=torch.long)
    )
    return p.cpu(), i.cpu(), entropy.cpu(), ranks.cpu(), log_p[:, follow].exp().cpu()
