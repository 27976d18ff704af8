"""From decodable to used: what a model's answers lose when a probe's subspace is erased, against matched controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.interventions import Erase
from interp.hooks.model import Model, main_tensor
from interp.hooks.site import SiteLike
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.probes.erasure import LeaceEraser, LeaceFitter, Method
from interp.probes.intervals import Interval, bootstrap_ci, permutation_p

Measure = Observable | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ProbeUse(Rows):
    """How far answers move when a subspace is erased, and when others like it are.

    Attributes:
        site: Where.
        rank: Dimensions erased.
        before: [n], the measurement of each example.
        change: [n], measurement under the erasure less before.
        random: [draws, n], the same for random subspaces of the rank.
        matched: [draws, n], for subspaces of the rank that hold as much variance as was removed.
        share: Share of the variance that the erasure removes.
        matched_share: Mean share that the matched ones remove.
        score: Mean |change| by the mean |change| of matched subspaces, with its interval over examples.
    """

    site: str
    rank: int
    before: Float[np.ndarray, "n"] = field(repr=False)
    change: Float[np.ndarray, "n"] = field(repr=False)
    random: Float[np.ndarray, "draws n"] = field(repr=False)
    matched: Float[np.ndarray, "draws n"] = field(repr=False)
    share: float
    matched_share: float
    score: Interval

    @property
    def p(self) -> float:
        """(1 + control subspaces, random or matched, that move as much) / (1 + controls)."""
        return permutation_p(_size(self.change), np.array([_size(c) for c in (*self.random, *self.matched)]))

    @property
    def verdict(self) -> str:
        """``used`` where the erasure moves more than matched controls do, by interval and by p below 0.05."""
        used = self.score.low > 1 and self.p < 0.05
        return "decodable and used" if used else "decodable, use not shown"

    def to_records(self) -> list[dict[str, Any]]:
        """One row for the erasure, one for each kind of control."""
        rows = [{"what": "erased", "mean change": float(self.change.mean()), "mean |change|": _size(self.change),
                 "spread over draws": "", "variance removed": self.share}]  # fmt: skip
        for name, changes, share in (("random subspaces", self.random, ""),
                                     ("subspaces of equal variance", self.matched, self.matched_share)):  # fmt: skip
            sizes = [_size(c) for c in changes]
            rows.append({"what": name, "mean change": float(changes.mean()), "mean |change|": float(np.mean(sizes)),
                         "spread over draws": float(np.std(sizes)), "variance removed": share})  # fmt: skip
        return rows

    def table(self) -> Table:
        """The rows as a table."""
        title = f"{self.site}, rank {self.rank}: {self.verdict}; use {self.score}, p = {self.p:.3f}"
        return Table(self.to_records(), title)

    def __str__(self) -> str:
        return str(self.table())


def _size(change: np.ndarray) -> float:
    return float(np.abs(change).mean())


@torch.no_grad()
def probe_use(
    model: Model, inputs: Sequence[Any] | Tensor, erase: Erase, measure: Measure, features: Float[Tensor, "n d"], *,
    random: int = 20, batch_size: int = 32, seed: int = 0, level: float = 0.95,
) -> ProbeUse:  # fmt: skip
    """Erase a probe's subspace inside the model, and the same number of other dimensions, and compare the answers.

    A probe shows that a label can be read from a site. Whether the model reads it there is another question: this one.
    Controls are mean ablations at the same places: of random subspaces, and of subspaces that remove as much variance.

    Args:
        model: The model.
        inputs: Texts or token ids, or a tensor of examples.
        erase: `LeaceEraser.hook(site)`, or `ablate_direction(site, probe.direction(), mean)`.
        measure: An `Observable` of the last token's logits, or a function of them [n, vocabulary] that gives [n].
        features: Activations of the site, from which the controls' variance is taken; many rows are better.
        random: Draws of each kind of control, at least 20.
        batch_size: Examples in one run.
        seed: Of the draws.
        level: Coverage of the interval.

    Raises:
        ArgumentError: If there are fewer than 20 draws or 2 examples, or widths differ.
    """
    left, right = (torch.as_tensor(part).double() for part in (erase.left, erase.right))
    if random < 20 or len(inputs) < 2:
        raise ArgumentError(f"random={random} and {len(inputs)} examples", "at least 20 draws and 2 examples")
    if features.shape[1] != len(left):
        raise ArgumentError(f"features of width {features.shape[1]}", f"{len(left)}, as the erasure")
    x = features.double().cpu()
    mean, covariance = x.mean(0), torch.cov(x.T, correction=0)
    removed = float(((left.T @ left) * (right @ covariance @ right.T)).sum())
    total, rank = float(covariance.trace()), left.shape[1]
    made = torch.Generator().manual_seed(seed)
    bases = [_random_basis(len(left), rank, made) for _ in range(random)]
    equal = [_with_variance(basis, covariance, removed) for basis in bases]
    run = lambda plan: _measured(model, inputs, plan, measure, batch_size)
    off = lambda basis: [Erase(erase.site, basis, basis.T.clone(), mean, head=erase.head, positions=erase.positions)]
    before = run([])
    change = run([erase]) - before
    others = np.stack([run(off(basis)) - before for basis in bases])
    matched = np.stack([run(off(basis)) - before for basis in equal])
    ratio = lambda a, b: float(np.mean(a) / max(float(np.mean(b)), 1e-300))
    score = bootstrap_ci((np.abs(change), np.abs(matched).mean(0)), ratio, level=level, seed=seed)
    kept = float(np.mean([float((b.T @ covariance @ b).trace()) for b in equal])) / total
    return ProbeUse(str(erase.where), rank, before, change, others, matched, removed / total, kept, score)


def _random_basis(d: int, rank: int, made: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(d, rank, generator=made, dtype=torch.float64))[0]


def _with_variance(basis: Tensor, covariance: Tensor, wanted: float) -> Tensor:
    """The basis turned towards the loudest or the quietest directions until its span holds the wanted variance."""
    rank = basis.shape[1]
    held = lambda b: float((b.T @ covariance @ b).trace())
    _, vectors = torch.linalg.eigh(covariance)
    end = vectors[:, -rank:] if held(basis) < wanted else vectors[:, :rank]
    turned = lambda t: torch.linalg.qr((1 - t) * basis + t * end)[0]
    low, high = 0.0, 1.0
    if (held(turned(high)) - wanted) * (held(basis) - wanted) > 0:
        return turned(high)  # no subspace of this rank holds so much, or so little
    for _ in range(50):
        middle = (low + high) / 2
        if (held(turned(middle)) - wanted) * (held(basis) - wanted) > 0:
            low = middle
        else:
            high = middle
    return turned(high)


def _measured(model: Model, inputs: Any, plan: list[Erase], measure: Measure, batch_size: int) -> np.ndarray:
    function = measure.measure if isinstance(measure, Observable) else measure
    found = []
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        batch = model.batch(part if isinstance(part, Tensor) else list(part))
        output = main_tensor(model.run(batch, plan=plan))
        if batch.mask is not None and output.ndim == 3:
            output = output[torch.arange(batch.size), batch.positions("last")[:, 0].to(output.device)]
        values = function(output)
        if values.shape != (batch.size,):
            raise ArgumentError(f"a measure that gives {list(values.shape)}", f"[{batch.size}], one for each example")
        found.append(values.double().cpu())
    return torch.cat(found).numpy()


@torch.no_grad()
def erase_layers(
    model: Model, inputs: Sequence[Any] | Tensor, y: Any, sites: SiteLike | Sequence[SiteLike], *,
    positions: Any = None, method: Method = "leace", batch_size: int = 32,
) -> list[Erase]:  # fmt: skip
    """A plan that erases a concept site by site, each fitted on activations under the erasures before it.

    A concept that is erased at one layer can be computed anew by the next; one plan of all layers leaves it nowhere.

    Args:
        model: The model.
        inputs: Texts or token ids.
        y: A label for each.
        sites: In the order of execution; globs select many.
        positions: Where; by default at every token, each with the label of its text.
        method: As in `LeaceEraser.fit`.
        batch_size: Examples in one run.

    Raises:
        ErasureError: If a concept is not gone.
    """
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if len(labels) != len(inputs):
        raise ArgumentError(f"y of length {len(labels)} for {len(inputs)} inputs", "a label for each")
    plan: list[Erase] = []
    for site, _ in model.resolve(sites):
        fitter = LeaceFitter(labels)
        for start in range(0, len(inputs), batch_size):
            part = inputs[start : start + batch_size]
            acts = model.capture(part if isinstance(part, Tensor) else list(part), site, positions, plan=plan)
            value = acts[site]
            rows, mask = labels[start : start + batch_size], acts.mask
            whole = mask is not None and acts.where[str(site)] is None
            valid = mask if whole else torch.ones(value.shape[:-1], dtype=torch.bool)
            assert valid is not None
            owner = torch.arange(len(rows)).view(-1, *[1] * (valid.ndim - 1)).expand(valid.shape)[valid.cpu()]
            fitter.update(value[valid.to(value.device)], rows[owner.numpy()])
        eraser: LeaceEraser = fitter.eraser(method)
        plan.append(eraser.hook(site, positions))
    return plan
