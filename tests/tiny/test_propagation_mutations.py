"""Planted errors, each with the check that must catch it: the check passes as the code is, and fails with the error."""

from dataclasses import replace

import pytest
import torch

from interp.hooks.block_weights import Projection
from interp.hooks.errors import InterpError
from interp.hooks.weights import Norm
from interp.observables.observable import Observable
from interp.propagation import components, exact_paths, propagate, stages, totals
from interp.propagation.reference import Reference, Weights
from tests import propagation_oracles as oracles
from tests.tiny import test_propagation as proofs

PATH = ((0, 2, 3), (1, None, None), (2, 1, 4))


def path(name):
    return lambda: oracles.path_is_autograd(name, PATH)


def flow(name, *step):
    return lambda: oracles.path_offset_is_what_flows(name, (step,))


def totals_of(name, held="frozen"):
    return lambda: oracles.totals_are_autograd(name, held)


def sums(name):
    return lambda: oracles.totals_sum_to_the_measurement(name)


def check_exact_and_frozen():
    proofs.test_exact_jacobians_times_activations_do_not_sum_to_the_measurement()


def norms_by(monkeypatch, change):
    """Every stage sees its norm through a change."""
    right = Weights.norm
    monkeypatch.setattr(Weights, "norm", lambda self, name: change(right(self, name), name, self))


def kv_map(m):
    m.setattr(Weights, "group", lambda self, head: head % self.layout.n_kv_heads)


def repeated_kv(m):
    right = stages.pull_heads

    def wrong(weights, y, layer, pattern):
        heads, kv = weights.layout.n_heads, weights.layout.n_kv_heads
        order = torch.arange(heads).reshape(-1, kv).T.flatten()
        _, z, _, _ = right(weights, y, layer, pattern)
        moved = torch.einsum("hts,...thd->...shd", pattern, weights.output(layer).pull(y))[..., order, :]
        v = moved.unflatten(-2, (kv, -1)).sum(-2)
        offset = weights.output(layer).constant(y).sum(-1) + weights.values(layer).constant(v).sum(-1)
        return weights.values(layer).pull(v), z, v, offset

    m.setattr(totals, "pull_heads", wrong)


def no_gain(m):
    m.setattr(Norm, "gain", property(lambda self: None))


def plain_gain(m):
    norms_by(m, lambda norm, name, w: norm and replace(norm, offset=0.0))


def swapped_norms(m):
    def change(norm, name, weights):
        if name.endswith((".ln1", ".ln2")):
            other = name[:-1] + ("2" if name.endswith("1") else "1")
            return weights.bindings.norms.get(other, norm)
        return norm

    norms_by(m, change)


def first_norm_for_both(m):
    m.setattr(Reference, "mlp_norm", lambda self, layer: f"blocks.{layer}.ln1")


def uncentred(m):
    """‖x‖ where ‖P x‖ is meant, and no centring."""
    norms_by(m, lambda norm, name, w: norm and replace(norm, centred=False))


def no_value_bias(m):
    right = Weights.values
    m.setattr(Weights, "values", lambda self, layer: Projection(right(self, layer).weight, None))


def no_norm_bias(m):
    m.setattr(Norm, "bias", property(lambda self: None))


def no_post_norm(m):
    wrong = lambda ref, y, layer, norm, mode, at=slice(None): (
        y * ref.weights.layout.branch_scale, y.new_zeros(y.shape[:-1]),
    )  # fmt: skip
    m.setattr(propagate, "pull_branch", wrong)
    m.setattr(totals, "pull_branch", wrong)


def no_branch_scale(m):
    def wrong(ref, y, layer, norm, mode, at=slice(None)):
        return stages.pull_norm_at(ref, y, f"blocks.{layer}.{norm}", mode, at)

    m.setattr(propagate, "pull_branch", wrong)
    m.setattr(totals, "pull_branch", wrong)


def no_logit_scale(m):
    right = Observable.pull_to_stream

    def wrong(self, model, **options):
        w, offset = right(self, model, **options)
        return w / model.layout.logit_scale, offset / model.layout.logit_scale

    m.setattr(Observable, "pull_to_stream", wrong)


def other_activation(m):
    m.setattr(Reference, "activation", lambda self, layer: torch.nn.functional.gelu)


def pattern_of_the_source(m):
    """A[s, t] for A[t, s]."""
    right = Reference.pattern
    m.setattr(Reference, "pattern", lambda self, layer: right(self, layer).transpose(-1, -2))


def exact_for_frozen(m):
    """The Jacobian where the divisor is to be held: trap 1."""
    right = stages.pull_norm
    m.setattr(stages, "pull_norm", lambda y, norm, mode, scale, n: right(y, norm, "tangent", scale, n))


def transposed_output(m):
    right = Weights.output
    m.setattr(Weights, "output", lambda self, layer: replace(o := right(self, layer), weight=o.weight.flip(0)))


def previous_position(m):
    """Divisors read one position off."""
    right = propagate.pull_norm_at
    shift = lambda at: at - 1 if isinstance(at, int) and at else at
    m.setattr(propagate, "pull_norm_at", lambda ref, y, name, mode, at: right(ref, y, name, mode, shift(at)))


def skip_forgotten(m):
    right = totals._Sweep._mlp

    def wrong(self, layer, total, wanted):
        x, offset = right(self, layer, total, wanted)
        return x - total, offset

    m.setattr(totals._Sweep, "_mlp", wrong)


MUTATIONS = [
    (kv_map, path("llama")), (repeated_kv, totals_of("llama", "path")), (no_gain, path("gpt2")),
    (no_gain, totals_of("llama")), (plain_gain, path("gemma2")), (plain_gain, totals_of("gemma3")),
    (swapped_norms, path("gpt2")), (swapped_norms, totals_of("llama", "path")), (first_norm_for_both, path("llama")),
    (uncentred, path("gpt2")), (uncentred, totals_of("gpt-j")), (no_value_bias, flow("llama", 2, 3, 4)),
    (no_value_bias, flow("gpt2", 2, 3, 4)), (no_norm_bias, sums("gpt2")), (no_norm_bias, flow("gpt2", 2, 3, 4)),
    (no_post_norm, path("gemma2")), (no_post_norm, totals_of("olmo2")), (no_branch_scale, path("granite")),
    (no_branch_scale, totals_of("granite")), (no_logit_scale, path("cohere")), (no_logit_scale, path("granite")),
    (other_activation, path("llama")), (other_activation, totals_of("gpt2", "path")),
    (pattern_of_the_source, path("llama")), (pattern_of_the_source, totals_of("gpt2")),
    (exact_for_frozen, totals_of("llama")), (exact_for_frozen, check_exact_and_frozen),
    (transposed_output, path("llama")), (transposed_output, totals_of("gpt2")), (previous_position, path("llama")),
    (skip_forgotten, totals_of("llama")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mutate", "check"), MUTATIONS, ids=[f"{m.__name__}-{i}" for i, (m, _) in enumerate(MUTATIONS)]
)
def test_a_planted_error_is_caught(mutate, check, monkeypatch):
    check()
    mutate(monkeypatch)
    with pytest.raises((AssertionError, InterpError)):
        check()


def test_a_missing_eps_is_caught(monkeypatch):
    """What the exact Jacobian leaves of its own input is due to eps alone."""
    from tests.tiny.test_propagation import (
        test_exact_jacobians_times_activations_do_not_sum_to_the_measurement as check,
    )

    check()
    right = stages.pull_norm

    def wrong(y, norm, mode, scale, normalized):
        unit = normalized / normalized.pow(2).mean(-1, keepdim=True).sqrt()
        return right(y, replace(norm, eps=0.0), mode, scale, unit)

    monkeypatch.setattr(stages, "pull_norm", wrong)
    with pytest.raises(AssertionError):
        check_exact_and_frozen()


def test_a_wrong_eps_in_the_offset_is_caught(monkeypatch):
    oracles.totals_sum_to_the_measurement("gpt2", "path")
    norms_by(monkeypatch, lambda norm, name, w: norm and replace(norm, eps=1e-2))
    with pytest.raises((AssertionError, InterpError)):
        oracles.totals_sum_to_the_measurement("gpt2", "path")


def names_one_token(make, tokenizer):
    """An observable's token is the string's own, not the one that the tokenizer puts in front, nor a part of it."""
    import interp
    from interp.hooks.errors import TokenError
    from tests.cases import build

    model = interp.attach(build("llama"), tokenizer)
    assert make(model, "cat").ids == (tokenizer.convert_tokens_to_ids("cat"),)
    with pytest.raises(TokenError, match="encodes to 2 ids"):
        make(model, "a cat")


@pytest.fixture
def with_bos(tokenizer):
    """The tiny tokenizer, which puts <bos> in front."""
    import copy

    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", own.bos_token_id)]
    )
    assert own("cat").input_ids[0] == own.bos_token_id
    return own


def test_bos_or_the_first_of_several_ids_as_the_token_is_caught(with_bos):
    def bos(model, text):
        return Observable(text, (model.tokenizer(text).input_ids[0],), (1.0,))

    def first(model, text):
        return Observable(text, (model.tokenizer(text, add_special_tokens=False).input_ids[0],), (1.0,))

    names_one_token(Observable.logit, with_bos)
    for wrong in (bos, first):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            names_one_token(wrong, with_bos)


def test_components_that_lose_a_head_are_caught(monkeypatch):
    """What is left of the stream is called rounding: it may not be large."""

    def rounding_is_small():
        model, _, ids = oracles.case("llama")
        found = components.components(
            Reference(model, ids, components.written_sites(model)), "blocks.2.hook_resid_post", 3
        )
        last = found.values[found.names.index("rounding")]
        assert float(last.norm()) <= 1e-6 * float(found.values.sum(0).norm())

    rounding_is_small()
    right = components._add_heads
    monkeypatch.setattr(
        components, "_add_heads", lambda ref, layer, position, add: right(ref, layer, max(position - 1, 0), add)
    )
    with pytest.raises(AssertionError):
        rounding_is_small()


def test_exact_effects_by_the_wrong_value_head_are_caught(monkeypatch):
    """A path's exact effect is its linear score to first order."""
    import interp

    def first_order():
        model, observable, ids = oracles.case("llama")
        exact = exact_paths.ExactPaths(model, observable, ids)
        path = interp.Path.parse("L1H1@2 -> L2H3@4").check(model, ids.shape[1])
        delta = 1e-3 * torch.randn(4, 32, dtype=torch.float64)
        score = delta @ interp.propagate(model, observable, exact.ref, path=path).vector
        assert float((exact.effects(path, delta) - score).norm() / score.norm()) < 0.05

    first_order()
    right = exact_paths.ExactPaths._through

    def wrong(self, step, source, destination, deltas):
        return right(self, replace(step, head=(step.head + 2) % 4), source, destination, deltas)

    monkeypatch.setattr(exact_paths.ExactPaths, "_through", wrong)
    with pytest.raises(AssertionError):
        first_order()
