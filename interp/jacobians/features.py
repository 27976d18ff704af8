"""Feature-to-feature Jacobians: how the latents of one dictionary move those of another, active latents only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary
from interp.hooks.errors import ArgumentError, SizeError
from interp.hooks.examples import each_example
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Rows
from interp.jacobians.gates import Gates
from interp.jacobians.jacobian import jacobian
from interp.jacobians.places import Place
from interp.jacobians.plan import readable
from interp.jacobians.results import Jacobians


@dataclass(frozen=True, eq=False)
class FeatureJacobian(Rows):
    """d output latent / d input latent at one token, between the active ones.

    Attributes:
        matrix: [output, input].
        outputs: Latents of the rows.
        inputs: Latents of the columns.
        example: Index of the example.
        position: Of the target, from the example's first token.
    """

    matrix: Float[Tensor, "output input"] = field(repr=False)
    outputs: Int64[Tensor, "output"] = field(repr=False)
    inputs: Int64[Tensor, "input"] = field(repr=False)
    example: int
    position: int

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each entry that is not zero: the latents and the derivative."""
        return [
            {"output": int(self.outputs[o]), "input": int(self.inputs[i]), "value": float(self.matrix[o, i])}
            for o, i in self.matrix.nonzero().tolist()
        ]


@dataclass(frozen=True, eq=False)
class FeatureJacobians(Rows, Sequence):
    """Feature-to-feature Jacobians, one for each token or position pair.

    Attributes:
        found: Them.
        source: Site that the input latents write.
        target: Site that the output latents read.
        linearization: What was held in the model between the two.
        method: How they were computed.
    """

    found: list[FeatureJacobian] = field(repr=False)
    source: str
    target: str
    linearization: str
    method: str

    def __getitem__(self, index: int) -> FeatureJacobian:  # type: ignore[override]
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[FeatureJacobian]:
        return iter(self.found)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each: example, position, numbers of latents, the largest entry and its latents."""
        rows = []
        for one in self.found:
            row = {"example": one.example, "position": one.position, "outputs": len(one.outputs)}
            row |= {"inputs": len(one.inputs), "largest": 0.0, "output": None, "input": None}
            if one.matrix.numel():
                at = divmod(int(one.matrix.abs().argmax()), one.matrix.shape[1])
                row |= {"largest": float(one.matrix[at]), "output": int(one.outputs[at[0]])}
                row |= {"input": int(one.inputs[at[1]])}
            rows.append(row)
        return rows


def feature_jacobians(
    model: Model, inputs: Any, source: SiteLike, target: SiteLike,
    decoder: Dictionary | Float[Tensor, "latent_in d_in"], encoder: Dictionary | Float[Tensor, "d_out latent_out"],
    positions: Any = "same", *, active_inputs: Bool[Tensor, "n latent_in"] | None = None,
    active_outputs: Bool[Tensor, "n latent_out"] | None = None, **options: Any,
) -> FeatureJacobians:  # fmt: skip
    """Return Jacobians between the active latents of two dictionaries, J_F = diag(s) E J Dᵀ.

    J is the model's Jacobian from source to target at the activations that the model has (not at their
    reconstructions), D the decoder's rows, E the encoder's columns and s the encoder's slopes: 1 where a ReLU or
    JumpReLU latent is on or a top-k one is chosen, 0 elsewhere. For an MLP nothing as wide as the model's Jacobian is
    formed: E W_out, W_pre Dᵀ and W_up Dᵀ once, then two products of active rows for each token. Jacobian sparse
    autoencoders, Farnik et al. 2025 (arXiv 2502.18147), section 3.

    Args:
        model: An attached model.
        inputs: As for `jacobian`.
        source: Site that the decoder writes.
        target: Site that the encoder reads.
        decoder: The dictionary whose latents are inputs, or decoder rows [latent_in, d_in].
        encoder: The dictionary whose latents are outputs, or encoder columns [d_out, latent_out].
        positions: As for `jacobian`, except that each map has one source and one target position.
        active_inputs: Which input latents count, for each map [n, latent_in]; needed where the decoder is a matrix. By
            default those that are not zero at the source position.
        active_outputs: Which output latents count, likewise.
        options: Further ones of `jacobian`: ``linearization``, ``precision``, ``budget``, ``method``, ``check``.

    Raises:
        ArgumentError: If a dictionary belongs to another site or normalises what it reads, matrices do not fit the
            sites, active latents are missing or do not fit, or positions are not single.
        SizeError: If the result does not fit the budget.

    Example:
        >>> import interp, torch
        >>> model = interp.load("smollm2-135m")
        >>> decoder, encoder = torch.randn(100, 576), torch.randn(576, 80)
        >>> active = torch.zeros(3, 100).bool().index_fill(1, torch.arange(5), True)
        >>> found = interp.feature_jacobians(
        ...     model, "The cat sat", "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", decoder, encoder,
        ...     active_inputs=active, active_outputs=active[:, :80],
        ... )
        >>> len(found), found[0].matrix.shape
        (3, torch.Size([5, 5]))
    """
    if refused := sorted({"reduce", "out", "out_dtype", "rows", "columns"} & options.keys()):
        raise ArgumentError(f"{refused[0]}= of feature Jacobians", "options of jacobian() that say how")
    between = jacobian(model, inputs, source, target, positions, **options)
    assert isinstance(between, Jacobians)
    for end, given in enumerate((decoder, encoder)):
        _check_dictionary(given, end, between.ends[end].site)
    if not all(place.single == (True, True) for place in between.places):
        raise ArgumentError(f"positions={positions!r}", "one source and one target position for each map", "use 'same'")
    examples = each_example(model, inputs)
    _, d_out, d_in = between.shape
    writers = _end(model, examples, between, decoder, active_inputs, 0, d_in)
    readers = _end(model, examples, between, encoder, active_outputs, 1, d_out)
    _check_size(readers, writers, between)
    matrices, method = _between(between, readers, writers)
    found = [
        FeatureJacobian(matrix, readers.latents[rows], writers.latents[columns], place.example, place.targets[0])  # type: ignore[index]
        for matrix, rows, columns, place in zip(matrices, readers.at, writers.at, between.places, strict=True)
    ]
    return FeatureJacobians(found, *between.site_names, between.linearization.name, method)


class _End(NamedTuple):
    """One dictionary: the latents that are active in any map, their rows, and which of them are in each map."""

    latents: Tensor
    rows: Tensor
    at: list[Tensor]


def _end(
    model: Model, examples: list[Batch], between: Jacobians, given: Dictionary | Tensor, active: Tensor | None,
    end: int, width: int,
) -> _End:  # fmt: skip
    name = ("active_inputs", "active_outputs")[end]
    if isinstance(given, Dictionary):
        count, d = given.n_latents, (given.d_in if end else given.d_out)
        active = _seen(model, examples, between.places, given, end) if active is None else active
    else:
        count, d = given.shape[end], given.shape[1 - end]
    if active is None:
        raise ArgumentError(f"a matrix without {name}", f"{name} [{len(between)}, {count}], true where a latent counts")
    if tuple(active.shape) != (len(between), count) or d != width:
        raise ArgumentError(
            f"{count} latents of width {d} with {name} {list(active.shape)}",
            f"width {width}, as {between.site_names[end]} has, and {name} [{len(between)}, {count}]",
        )
    latents = active.any(0).nonzero()[:, 0]
    at = [torch.searchsorted(latents, one.nonzero()[:, 0]).to(between.like.device) for one in active]
    return _End(latents.cpu(), _rows(given, latents, end).to(between.like), [one.cpu() for one in at])


def _rows(given: Dictionary | Tensor, latents: Tensor, end: int) -> Tensor:
    """What one unit of each latent adds to x̂, or by what each latent changes with x where it is on."""
    if isinstance(given, Tensor):
        return (given.T if end else given)[latents]
    w = given.weights
    norms = w["W_dec"][latents].norm(dim=-1, keepdim=True)
    if end:
        rows = w["W_enc"][:, latents].T
        rows = rows * w["r_mag"][latents].exp()[:, None] if "r_mag" in w else rows
        return rows * norms if given.rescales else rows
    rows = w["W_dec"][latents]
    rows = rows * w["finetuning_scaling_factor"][latents][:, None] if "finetuning_scaling_factor" in w else rows
    return rows / norms if given.rescales else rows


def _seen(model: Model, examples: list[Batch], places: list[Place], given: Dictionary, end: int) -> Tensor:
    """Which latents are not zero at each map's position."""
    on = []
    for index, batch in enumerate(examples):
        mine = [(p.targets if end else p.sources)[0] + batch.starts[0] for p in places if p.example == index]  # type: ignore[index]
        on.append(given.read(model.capture(batch, given.site))[0, mine] != 0)
    return torch.cat(on)


def _check_dictionary(given: Dictionary | Tensor, end: int, site: Site) -> None:
    """Refuse a dictionary of another site, and one that is not linear in what it writes or reads."""
    if not isinstance(given, Dictionary):
        return
    own = (given.target, given.site)[end]
    if own.whole != site:
        raise ArgumentError(
            f"{given.name}, which {('writes', 'reads')[end]} {own}, with {('source', 'target')[end]} {site}",
            "one site", "Dictionary.load(site=, target=) says where it belongs",
        )  # fmt: skip
    if given.normalization != "none":
        raise ArgumentError(
            f"{given.name}, which normalises ({given.normalization})",
            "a dictionary that is linear in its active latents",
        )


def _check_size(readers: _End, writers: _End, between: Jacobians) -> None:
    each = between.like.element_size()
    needed = sum(len(rows) * len(columns) for rows, columns in zip(readers.at, writers.at, strict=True)) * each
    if needed > between.budget:
        raise SizeError(
            f"{len(between)} feature Jacobians of {readable(needed)}, the budget is {readable(between.budget)}",
            f"budget={needed}", "fewer positions, or active_inputs= and active_outputs= of the latents that matter",
        )  # fmt: skip


@torch.no_grad()
def _between(between: Jacobians, readers: _End, writers: _End) -> tuple[list[Tensor], str]:
    chosen = list(zip(readers.at, writers.at, strict=True))
    gates = Gates.of(between)
    if gates is not None:
        wide = (len(readers.rows) + 2 * len(writers.rows)) * gates.p.shape[-1] * gates.p.element_size()
        if wide <= between.budget:
            return gates.between(gates.sides(readers.rows, writers.rows), chosen), "closed form of the features"
    found = []
    for map_, (rows, columns) in zip((between[i] for i in range(len(between))), chosen, strict=True):
        if not len(rows) or not len(columns):
            found.append(between.like.new_zeros(len(rows), len(columns)))
            continue
        pulled = map_.rmatvec(readers.rows[rows].reshape(-1, *map_.out_shape))
        found.append(pulled.flatten(1) @ writers.rows[columns].T)
    return found, f"{between.method}, a row for each output latent"
