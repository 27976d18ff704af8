"""Propagate: an observable pulled back along one path, or over all paths to one site."""

from typing import Any, Literal

from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.observables.observable import Observable
from interp.observables.sequences import refuse_sequence
from interp.propagation.feature_vectors import FeatureVector
from interp.propagation.mlp_points import MLPPoint
from interp.propagation.paths import Path, PathLike, Step
from interp.propagation.reference import Reference, Weights
from interp.propagation.stages import MLP, Pulled, pull_branch, pull_gain, pull_head, pull_norm_at
from interp.propagation.starts import Measured, path_to, pre_cap_note, start_of
from interp.propagation.totals import propagate_all

Attn = Literal["pattern", "ov"]


def propagate(
    model: Model, observable: Measured, prompt: Any = None, *, path: PathLike | None = None,
    site: SiteLike | None = None, linearization: LinearizationLike | None = None, reference: MLPPoint | None = None,
    attn: Attn | None = None,
) -> FeatureVector:  # fmt: skip
    """Return the feature vector of an observable at the input of a path, or at a site over all paths.

    Along a path y starts as W_Uᵀ n, and each component from last to first takes it through its own rule and the norm
    in front of it: a head from its destination t to its source s by A[t, s] W_V W_O, an MLP by its derivative. Skips
    add nothing. With a prompt the vector reads the stream that enters the first component, at its source position, and
    score + offset is what flows along the path there. Without one it is the data-free form, which says what the path
    reads but not how much: patterns and divisors are left out, and it reads the normalised input.

    Over all paths the vector is the row of the linearised network, as one backward pass gives it.

    An observable of a site (`Observable.from_residual`) starts there, as its own vector. A path to it ends at a
    residual stream or a branch's output; its position takes the place of the logits'.

    Args:
        model: A decoder.
        observable: What is pulled back. A sequence is read at several positions: it has totals (``site=``), no paths.
        prompt: One text or token ids, a `Reference`, or None for the data-free form.
        path: ``L9H1@3 -> L13H11@5 -> logits@-1``, in execution order, or a `Path`.
        site: A site with a position, ``blocks.6.hook_resid_pre@3``, or with a head and a position,
            ``blocks.6.attn.hook_z#2@3``, for the total vector: residual streams, branches, heads' z and v, neurons
            (``mlp.hook_post``), outputs of norms (``ln1.hook_out``), embeddings.
        linearization: What is held: ``path`` by default (norms and MLPs differentiated, patterns held); ``frozen`` for
            contributions that sum. Paths hold the attention pattern. The data-free form linearises nothing.
        reference: Where MLPs of a path are differentiated, if not at the prompt: `Boundary`, `MeanPoint` or
            `AverageGradient`.
        attn: Along a path, ``pattern``: a head passes on A[t, s] of what it reads, so that scores are what flows;
            ``ov``: A is left out (1), and divisors and MLPs are those at the path's positions. By default ``pattern``
            with a prompt; without one there is only ``ov``.

    Raises:
        ArgumentError: If not exactly one of path and site is given, a component does not exist or cannot feed the
            next, or activations are needed and there is no prompt.
        PositionError: If a position lies outside the prompt or behind its destination.
        SiteUnavailableError: If the model has no residual stream, or an MLP no closed form.

    Source: Dunefsky & Cohan 2024, sections 2 and 3.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> n = interp.Observable.logit_diff(model, " she", " he")
        >>> prompt = "So, Emma really is a great friend, isn't"
        >>> f = interp.propagate(model, n, prompt, path="L20H3@2")
        >>> str(f.site), f.vector.shape
        ('blocks.20.hook_resid_pre@2', torch.Size([576]))
    """
    if (path is None) == (site is None):
        raise ArgumentError(f"path={path!r} and site={site!r}", "exactly one of them")
    _check_attn(attn, prompt, site)
    if prompt is None:
        _refuse_without_prompt(site, linearization, reference)
    held = Linearization.of("path" if linearization is None else linearization)
    if site is not None:
        return _total(model, observable, prompt, Site.parse(site), held, reference)
    assert path is not None
    if held.attention != "frozen":
        raise ArgumentError(
            f"a path under attention={held.attention!r}", "attention='frozen'", "what moves a pattern is on the QK side"
        )
    if held.overrides:
        raise ArgumentError(
            f"a path under overrides {dict(held.overrides)}", "the four fields of a Linearization alone",
            "total vectors (site=) take overrides",
        )  # fmt: skip
    refuse_sequence(observable)
    assert isinstance(observable, Observable)
    chosen = path_to(model, observable, Path.parse(path))
    if prompt is None:
        return _data_free(model, observable, chosen)
    chosen.check(model)
    ref = Reference.of(model, prompt)
    return _along(ref, observable, chosen.check(model, ref.length), held, reference, attn == "ov")


def _check_attn(attn: str | None, prompt: Any, site: SiteLike | None) -> None:
    if attn not in (None, "pattern", "ov"):
        raise ArgumentError(f"attn={attn!r}", "'pattern' or 'ov'")
    if attn == "pattern" and prompt is None:
        raise ArgumentError("attn='pattern' without a prompt", "a prompt", "patterns are activations: pass prompt=")
    if attn == "ov" and site is not None:
        raise ArgumentError(
            f"attn='ov' at site={str(site)!r}", "a path: pass path=",
            "without patterns a sum over heads weights all of them alike",
        )  # fmt: skip


def _refuse_without_prompt(
    site: SiteLike | None, linearization: LinearizationLike | None, reference: MLPPoint | None
) -> None:
    if site is not None:
        raise ArgumentError(
            f"site={str(site)!r} without a prompt", "a prompt", "data-free vectors go along a path: pass path="
        )
    if linearization is not None:
        name = Linearization.of(linearization).name
        raise ArgumentError(
            f"linearisation {name!r} needs activations", "a prompt, or a Reference",
            "leave linearization= out for the data-free form",
        )  # fmt: skip
    if reference is not None:
        raise ArgumentError(f"reference={reference!r:.60} without a prompt", "a prompt", "it says where MLPs are read")


def _total(
    model: Model, observable: Measured, prompt: Any, site: Site, held: Linearization, reference: MLPPoint | None
) -> FeatureVector:
    if reference is not None:
        raise ArgumentError(
            f"site= with reference={reference!r:.60}", "no reference point", "reference points go along a path"
        )
    if site.positions != "last" and (not isinstance(site.positions, tuple) or len(site.positions) != 1):
        raise ArgumentError(f"site {site}", "one position, as in blocks.6.hook_resid_pre@3")
    return propagate_all(model, observable, prompt, linearization=held, sites=[site.whole]).vector(site)


def _along(
    ref: Reference, observable: Observable, path: Path, held: Linearization, reference: MLPPoint | None, ov: bool
) -> FeatureVector:
    model, here = ref.model, path.position
    y, offset, site, end = _end(ref, observable, path, held)
    behind = offset
    for step in reversed(path.steps):
        if step.head is None:
            y, offset = _through_mlp(ref, y, step.layer, here, held, reference, float(behind))
        else:
            y, offset, here = _through_head(ref, y, step, here, held, ov)
        behind = behind + offset
        site = Site(f"blocks.{step.layer}.{_entrance(model, step)}").at(positions=here)
    if path.embed:
        site = Site("hook_embed").at(positions=here)
    note = pre_cap_note(model) if observable.site is None else ""
    text = " -> ".join([*(["embed"] if path.embed else []), *map(str, path.steps), end])
    form = "ov" if ov else "reference"
    return FeatureVector(y, float(offset), site, observable.name, text, held, form, model, note)


def _end(ref: Reference, observable: Observable, path: Path, held: Linearization) -> tuple[Tensor, Tensor, Site, str]:
    """What a path starts back from: y, its constant, the site that y reads, and how the path's end is called."""
    if observable.site is not None:
        start = start_of(ref, [observable], path.position)
        site = observable.site.at(positions=path.position)
        return start.covectors[0, path.position], start.constant[0], site, str(site)
    w, constant = observable.pull_to_stream(ref.model)
    y, offset = pull_norm_at(ref, w.to(ref.weights.device, ref.weights.dtype), "ln_final", held.norm, path.position)
    site = Site(f"blocks.{ref.model.n_layers - 1}.hook_resid_post").at(positions=path.position)
    return y, offset + constant, site, f"logits@{path.position}"


def _through_head(
    ref: Reference, y: Tensor, step: Step, here: int, held: Linearization, ov: bool
) -> tuple[Tensor, Tensor, int]:
    if step.source is None:
        raise ArgumentError(
            f"{step} without a source position", f"one, as in {step}@3", "or no prompt: the data-free form"
        )
    assert step.head is not None
    y, _ = pull_branch(ref, y, step.layer, "ln1_post", held.norm, here)
    probability = 1.0 if ov else ref.pattern(step.layer)[step.head, here, step.source]
    y, values = pull_head(ref.weights, y, step.layer, step.head, probability)
    y, norm = pull_norm_at(ref, y, f"blocks.{step.layer}.ln1", held.norm, step.source)
    return y, values + norm, step.source


def _through_mlp(
    ref: Reference, y: Tensor, layer: int, here: int, held: Linearization, reference: MLPPoint | None, behind: float
) -> Pulled:
    y, post = pull_branch(ref, y, layer, "ln2_post", held.norm, here)
    mlp = MLP(ref, layer)
    own = ref.mlp_input(layer)[here]
    points = own[None] if reference is None else reference.points(ref, mlp, y, here, behind + float(post))
    pulled, _, offset = mlp.pull(y.expand(len(points), -1), held, points)
    y, norm = pull_norm_at(ref, pulled.mean(0), ref.mlp_norm(layer), held.norm, here)
    return y, post + offset.mean() + norm


def _entrance(model: Model, step: Step) -> str:
    assert model.layout is not None
    return "hook_resid_mid" if step.kind == "mlp" and not model.layout.parallel else "hook_resid_pre"


def _data_free(model: Model, observable: Observable, path: Path) -> FeatureVector:
    """Gains, centring and weights alone: what a path of heads reads in the normalised input of its first head."""
    weights = Weights(model)
    path.check(model)
    mlps = [str(step) for step in path.steps if step.kind == "mlp"]
    placed = [str(step) for step in path.steps if step.source is not None]
    if mlps or placed or path.embed:
        what = mlps or placed or ["embed"]
        raise ArgumentError(
            f"{', '.join(what)} on a path without a prompt", "heads without positions",
            "MLPs, positions and the embedding need a prompt's activations: pass prompt=",
        )  # fmt: skip
    y, offset, site, end = _data_free_end(weights, observable)
    for step in reversed(path.steps):
        assert step.head is not None
        y, _ = pull_gain(y * weights.layout.branch_scale, weights.norm(f"blocks.{step.layer}.ln1_post"))
        y, values = pull_head(weights, y, step.layer, step.head)
        name = f"blocks.{step.layer}.ln1"
        y, norm = pull_gain(y, weights.norm(name))
        offset = values + norm
        exists = weights.norm(name) is not None
        site = Site(f"{name}.hook_normalized" if exists else f"blocks.{step.layer}.hook_resid_pre")
    steps = " -> ".join([*map(str, path.steps), end])
    held = Linearization.of("path")
    note = pre_cap_note(model) if observable.site is None else ""
    return FeatureVector(y, float(offset), site, observable.name, steps, held, "data-free", model, note)


def _data_free_end(weights: Weights, observable: Observable) -> tuple[Tensor, Tensor, Site, str]:
    if observable.site is not None:
        assert observable.vector is not None
        y, site = observable.vector.to(weights.device, weights.dtype), observable.site.whole
        if len(y) != weights.sizes["d_model"]:
            raise ArgumentError(f"observable vector of length {len(y)}", f"{weights.sizes['d_model']}, as {site} has")
        return y, y.new_tensor(observable.offset), site, str(site)
    w, constant = observable.pull_to_stream(weights.model)
    y, offset = pull_gain(w.to(weights.device, weights.dtype), weights.norm("ln_final"))
    return y, offset + constant, Site("ln_final.hook_normalized"), "logits"
