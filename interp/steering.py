"""Steering: what adding a feature vector does, against its first-order prediction and against random directions.

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 5.3 and the preprint's debiasing, with doses in
units of the stream's norm and controls.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.interventions import Add, Intervention, PlanLike
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.observables.readout import Readout
from interp.observables.sequences import refuse_sequence
from interp.propagation.feature_vectors import FeatureVector


@dataclass(frozen=True)
class DoseResponse(Rows):
    """A measurement under growing doses of a direction.

    Attributes:
        observable: What is measured.
        site: Where the direction is added, with its position.
        doses: In units of ‖x‖ at that position.
        measured: n · logits at each dose.
        predicted: First order: m + dose ‖x‖ (gradient · direction).
        random: The same doses of random directions, [direction, dose].
        size: ‖x‖, the unit.
    """

    observable: str
    site: str
    doses: Float[Tensor, "dose"]
    measured: Float[Tensor, "dose"]
    predicted: Float[Tensor, "dose"]
    random: Float[Tensor, "direction dose"] = field(repr=False)
    size: float

    @property
    def asymmetry(self) -> float:
        """|m(+) + m(-) - 2 m(0)| / |m(+) - m(-)| of the largest dose that is given with both signs; NaN without one."""
        by_dose = {round(d, 9): m for d, m in zip(self.doses.tolist(), self.measured.tolist(), strict=True)}
        both = [d for d in by_dose if d > 0 and -d in by_dose]
        if not both or 0.0 not in by_dose:
            return float("nan")
        up, down, zero = by_dose[max(both)], by_dose[-max(both)], by_dose[0.0]
        return abs(up + down - 2 * zero) / max(abs(up - down), 1e-30)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each dose; the random directions by their mean and standard deviation."""
        mean, spread = self.random.mean(0).tolist(), self.random.std(0).tolist()
        rows = zip(self.doses.tolist(), self.measured.tolist(), self.predicted.tolist(), mean, spread, strict=True)
        names = ("dose", "measured", "first order", "random mean", "random spread")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"{self.observable} while adding to {self.site} (unit ‖x‖ = {self.size:.3g})")


def dose_response(
    model: Model, observable: Observable, prompt: Any, vector: FeatureVector,
    doses: Sequence[float] = (-1, -0.5, 0, 0.5, 1), *, position: int = -1, random: int = 8, seed: int = 0,
    plan: PlanLike = (),
) -> DoseResponse:  # fmt: skip
    """Return a measurement under doses of a direction at its own site and position, with its prediction and controls.

    A feature vector is a covector; adding it to activations takes the Euclidean metric for granted. The direction is
    brought to norm 1, and a dose of 1 is as long as the stream itself at that position. All doses and directions run as
    one batch.

    Args:
        model: A decoder.
        observable: What is measured.
        prompt: One text or token ids.
        vector: The direction; its site names one position.
        doses: Multiples of ‖x‖.
        position: Whose next-token logits are measured.
        random: How many random directions serve as controls.
        seed: Of the random directions.
        plan: Further interventions, under which everything runs.

    Raises:
        ArgumentError: If the vector is zero or has no position, the observable is not one of the logits at one
            position, or there are no doses or controls.
    """
    refuse_sequence(observable)
    observable.check_logits(Readout.of(model).vocab)
    if vector.position is None or vector.norm == 0:
        raise ArgumentError(f"a vector of norm {vector.norm:.3g} at {vector.site}", "a direction at one position")
    if not len(doses) or random < 1:
        raise ArgumentError(f"{len(doses)} doses and random={random}", "at least one of each")
    batch, where = model.batch(prompt), str(vector.site.whole)
    if batch.size != 1 or batch.ids is None:
        raise ArgumentError(f"{batch.size} prompts", "one text, or one list of token ids")
    first = [plan] if isinstance(plan, Intervention) else list(plan)
    acts = model.capture(
        batch, where, positions=vector.position, plan=first,
        gradient_of=lambda logits: observable.measure(logits[:, batch.positions(position)[0, 0]]),
    )  # fmt: skip
    assert acts.gradients is not None
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    x, slope = acts[where][0, 0].to(dtype), acts.gradients[where][0, 0].to(dtype)
    size, unit = float(x.norm()), (vector.vector / vector.norm).to(x)
    made = torch.Generator().manual_seed(seed)
    others = torch.randn(random, len(unit), generator=made).to(x)
    directions = torch.cat([unit[None], others / others.norm(dim=1, keepdim=True)])
    given = torch.tensor([float(d) for d in doses], dtype=dtype)
    found = _measure(model, observable, batch.ids, where, vector.position, position, size * given, directions, first)
    zero = _measure(
        model, observable, batch.ids, where, vector.position, position, given.new_zeros(1), unit[None], first
    )
    predicted = zero[0, 0] + size * given * float(slope @ unit)
    return DoseResponse(observable.name, str(vector.site), given, found[0], predicted, found[1:], size)


def _measure(
    model: Model, observable: Observable, ids: Tensor, site: str, at: int, position: int, doses: Tensor,
    directions: Float[Tensor, "direction d"], plan: list,
) -> Float[Tensor, "direction dose"]:  # fmt: skip
    """One run for each direction, the doses as its batch."""
    rows = []
    for direction in directions:
        moved = (doses[:, None].to(direction) * direction)[:, None]
        step = Add(site, value=moved, positions=at)
        logits = model.run(ids.expand(len(doses), -1), plan=[*plan, step])[:, position]
        rows.append(observable.measure(logits.to(doses.dtype)).cpu())
    return torch.stack(rows)


def orthogonalize(vector: FeatureVector, against: Sequence[FeatureVector]) -> FeatureVector:
    """Return the part of a vector that is orthogonal to others: its first-order effect on their scores is zero.

    With ``against`` the gradients of other observables at the site, adding the result raises one observable and spares
    the others to first order.

    Raises:
        ArgumentError: If the vectors are of different sites, or nothing is left.
    """
    for other in against:
        if other.site.whole != vector.site.whole or len(other.vector) != len(vector.vector):
            raise ArgumentError(f"vectors at {vector.site} and {other.site}", "vectors of one site")
    if not against:
        raise ArgumentError("no vectors to be orthogonal to", "at least one")
    y = vector.vector.double()
    basis, sizes, _ = torch.linalg.svd(torch.stack([v.vector.double() for v in against]).T, full_matrices=False)
    basis = basis[:, sizes > 1e-10 * sizes.max().clamp(min=1e-300)]
    left = y - basis @ (basis.T @ y)
    if float(left.norm()) <= 1e-10 * float(y.norm()):
        raise ArgumentError(f"a vector at {vector.site} in the span of the others", "one with a part of its own")
    names = ", ".join(v.observable for v in against)
    return replace(vector, vector=left.to(vector.vector), path=f"{vector.path}, orthogonal to {names}")


@dataclass(frozen=True)
class Cost(Rows):
    """What a plan costs on ordinary text.

    Attributes:
        loss: Mean next-token loss of the model as it is, in nats.
        loss_under: Under the plan.
        divergence: Mean KL(plain ‖ under the plan) of next-token distributions, in nats.
        n: Number of predicted tokens.
    """

    loss: float
    loss_under: float
    divergence: float
    n: int

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        return [asdict(self)]


@torch.no_grad()
def cost(model: Model, plan: PlanLike, texts: Any, *, batch_size: int = 8) -> Cost:
    """Return what interventions cost: next-token loss with and without them, and how far predictions move.

    Args:
        model: A decoder.
        plan: The interventions.
        texts: Ordinary texts, a list of strings or of lists of token ids.
        batch_size: Texts in one run.

    Raises:
        ArgumentError: If there are no texts of two tokens or more, or the batch size is below 1.
    """
    if isinstance(texts, str) or not len(texts) or batch_size < 1:
        raise ArgumentError(f"texts={texts!r:.40} and batch_size={batch_size}", "a list of texts, and at least 1")
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    for start in range(0, len(texts), batch_size):
        batch = model.batch(list(texts[start : start + batch_size]))
        assert batch.ids is not None
        assert batch.mask is not None
        real = batch.mask[:, 1:] & batch.mask[:, :-1]
        wanted = batch.ids[:, 1:][real]
        plain, under = (
            torch.log_softmax(model.run(batch, plan=steps)[:, :-1][real.to(model.device)].float(), -1)
            for steps in ((), plan)
        )
        losses = [-row.gather(1, wanted[:, None]).sum() for row in (plain, under)]
        moved = (plain.exp() * (plain - under)).sum()
        totals += torch.stack([*losses, moved]).double().cpu()
        count += len(wanted)
    if not count:
        raise ArgumentError("texts of one token each", "texts of two tokens or more")
    loss, loss_under, divergence = (totals / count).tolist()
    return Cost(loss, loss_under, divergence, count)
