"""Path search and exact path effects, against the model run with only the path changed."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError
from interp.propagation.exact_paths import ExactPaths
from tests.cases import DECODERS, build, inputs_for

DENSE = [name for name in DECODERS if name != "mixtral"]
OTHER = [[9, 2, 42, 8, 31, 9, 12]]


def case(name, **options):
    model = interp.attach(build(name, **options))
    observable = interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5])
    return model, observable, inputs_for(name)[:1]


def measured(model, observable, ids, plan=()):
    logits = model.capture(ids, "unembed.hook_out", plan=plan)["unembed.hook_out"][0, -1]
    return float(observable.measure(logits)) * model.layout.logit_scale


def deltas(model, count=3, size=0.5):
    made = torch.Generator().manual_seed(0)
    return size * torch.randn(count, model.bindings.sizes["d_model"], generator=made)


@pytest.mark.parametrize("name", DENSE)
def test_an_mlp_step_is_the_model_with_only_that_mlps_input_changed(name):
    model, observable, ids = case(name)
    last, place = model.n_layers - 1, ids.shape[1] - 1
    exact = ExactPaths(model, observable, ids)
    found = exact.effects(interp.Path.parse(f"L{last}MLP").check(model, ids.shape[1]), deltas(model))
    stream = "hook_resid_pre" if model.layout.parallel else "hook_resid_mid"
    site, out = f"blocks.{last}.{stream}", f"blocks.{last}.hook_mlp_out"
    for delta, effect in zip(deltas(model), found, strict=True):
        moved = model.capture(ids, out, plan=interp.Add(site, value=-delta, positions=place))[out][:, place]
        wanted = exact.measurement - measured(
            model, observable, ids, interp.Set(out, value=moved[:, None], positions=place)
        )
        assert float(effect) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "neox-parallel", "gpt-j"])
def test_a_head_step_is_the_model_with_only_that_heads_value_changed(name):
    """In the last layer, and where each head has values of its own, one value at one source is the whole path."""
    model, observable, ids = case(name)
    last, source, head = model.n_layers - 1, 2, 1
    exact = ExactPaths(model, observable, ids)
    path = interp.Path.parse(f"L{last}H{head}@{source}").check(model, ids.shape[1])
    site, value, mlp = f"blocks.{last}.hook_resid_pre", f"blocks.{last}.attn.hook_v", f"blocks.{last}.hook_mlp_out"
    held = interp.Set(mlp, value=model.capture(ids, mlp)[mlp])
    for delta, effect in zip(deltas(model), exact.effects(path, deltas(model)), strict=True):
        plan = interp.Add(site, value=-delta, positions=source)
        moved = model.capture(ids, value, plan=plan)[value][:, source : source + 1, head : head + 1]
        set_one = interp.Set(value, value=moved, head=head, positions=source)
        wanted = exact.measurement - measured(model, observable, ids, [set_one, held])
        assert float(effect) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_all_that_the_last_block_wrote_taken_away_leaves_what_entered_it(name):
    """The last layer's heads, their bias and its MLP, by the model's own stream in front of it."""
    model, observable, ids = case(name)
    last, place = model.n_layers - 1, ids.shape[1] - 1
    exact = ExactPaths(model, observable, ids)
    branch = exact.ref.weights.model.capture(ids, f"blocks.{last}.hook_attn_out")[f"blocks.{last}.hook_attn_out"]
    wrote = branch[0, place] + exact.mlp(last, place)
    effect = exact.effects(interp.Path((), place), wrote[None])
    stream = f"blocks.{last}.hook_resid_post"
    before = model.capture(ids, f"blocks.{last}.hook_resid_pre")[f"blocks.{last}.hook_resid_pre"]
    wanted = exact.measurement - measured(model, observable, ids, interp.Set(stream, value=before))
    assert float(effect) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "olmo2"])
def test_heads_by_source_sum_to_the_branch_but_for_its_bias(name):
    model, observable, ids = case(name)
    exact, place = ExactPaths(model, observable, ids), ids.shape[1] - 1
    norm = exact.ref.weights.norm("blocks.1.ln1_post")
    if norm is not None:
        pytest.skip("a post-norm computed afresh is not additive")
    branch = model.capture(ids, "blocks.1.hook_attn_out")["blocks.1.hook_attn_out"][0, place]
    bias = exact.ref.weights.output(1).bias
    total = exact.heads(1, place).sum((0, 1)) + (0 if bias is None else bias * model.layout.branch_scale)
    torch.testing.assert_close(total, branch, rtol=1e-4, atol=1e-5)


def test_a_linear_score_is_the_effect_where_everything_behind_is_linear():
    """Score and effect agree to first order: halving the change halves their difference twice."""
    model, observable, ids = case("gpt2", dtype=torch.float64)
    exact = ExactPaths(model, observable, ids)
    for text in ("", "L2MLP", "L1H1@2 -> L2H3@4", "L0H0@1 -> L1MLP -> L2MLP"):
        path = interp.Path.parse(text).check(model, ids.shape[1])
        vector = interp.propagate(model, observable, exact.ref, path=path).vector
        gaps = []
        for size in (1e-2, 5e-3):
            delta = deltas(model, size=size).double()
            gaps.append((exact.effects(path, delta) - delta @ vector).abs().max())
        assert gaps[1] < 0.3 * gaps[0]


def test_search_finds_the_best_of_all_paths_when_the_beam_holds_them_all():
    model, observable, ids = case("llama")
    found = interp.find_paths(model, observable, ids, OTHER, beam=10_000, max_length=2, score="patch")
    exact = ExactPaths(model, observable, ids, OTHER)
    place = ids.shape[1] - 1
    by_hand = {f"embed -> logits@{place}": float(exact.effects(interp.Path((), place), exact.embedding(place)[None]))}
    for layer in range(model.n_layers):
        by_hand[f"L{layer}MLP -> logits@{place}"] = float(
            exact.effects(interp.Path((), place), exact.mlp(layer, place)[None])
        )
    shown = dict(zip(found.paths, found.effects.tolist(), strict=True))
    for path, effect in by_hand.items():
        assert shown[path] == pytest.approx(effect, rel=1e-4, abs=1e-6)
    assert found.scores.abs().tolist() == sorted(found.scores.abs().tolist(), reverse=True)
    assert torch.equal(found.scores, found.effects)


def test_all_legal_edges_are_tried():
    model, observable, ids = case("llama")
    paths = interp.find_paths(model, observable, ids, OTHER, beam=10_000, max_length=2).paths
    place = ids.shape[1] - 1
    for legal in (
        f"L2MLP -> logits@{place}",
        f"L2H1@3 -> L2MLP -> logits@{place}",
        f"L1MLP -> L2MLP -> logits@{place}",
    ):
        assert legal in paths
    assert not any(p.startswith("L2MLP -> L2H") for p in paths)
    parallel, observable, ids = case("neox-parallel")
    paths = interp.find_paths(parallel, observable, ids, OTHER, beam=10_000, max_length=2).paths
    assert not any("L2H1@3 -> L2MLP" in p for p in paths)


def test_a_narrow_beam_keeps_the_best_and_signs_select():
    model, observable, ids = case("gpt2")
    wide = interp.find_paths(model, observable, ids, OTHER, beam=500, max_length=1)
    narrow = interp.find_paths(model, observable, ids, OTHER, beam=3, max_length=1)
    assert narrow.paths == wide.paths[:3]
    up = interp.find_paths(model, observable, ids, OTHER, beam=3, max_length=1, sign="positive")
    down = interp.find_paths(model, observable, ids, OTHER, beam=3, max_length=1, sign="negative")
    assert float(up.scores[0]) == float(wide.scores.max())
    assert float(down.scores[0]) == float(wide.scores.min())


def test_attribution_scores_of_one_step_sum_to_the_measurement():
    """Without a corrupt prompt and with divisors held, one-component paths and constants make up the whole."""
    model, observable, ids = case("llama")
    found = interp.find_paths(
        model, observable, ids, score="attribution", beam=10_000, max_length=1, linearization="frozen"
    )
    direct = interp.direct_attribution(model, observable, ids)
    biases = float(direct.attention_bias.sum()) + direct.constant + direct.rounding
    assert float(found.scores.double().sum()) + biases == pytest.approx(direct.measurement, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beam": 0}, "beam=0"), ({"max_length": 0}, "max_length=0"), ({"score": "guess"}, "'guess'"),
        ({"sign": "up"}, "'up'"), ({"score": "attribution"}, "with a corrupt prompt"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, text, unchecked):
    model, observable, ids = case("llama")
    with pytest.raises(ArgumentError, match=text):
        interp.find_paths(model, observable, ids, OTHER, **options)


def test_prompts_of_different_lengths_are_refused():
    model, observable, ids = case("llama")
    with pytest.raises(ArgumentError, match=r"clean has 7 tokens, corrupt 3; .*one length"):
        interp.find_paths(model, observable, ids, [[1, 2, 3]])
    with pytest.raises(ArgumentError, match="without a corrupt prompt"):
        interp.find_paths(model, observable, ids)
