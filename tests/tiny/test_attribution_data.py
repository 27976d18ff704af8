"""Attribution over datasets: mean of single results, padding-proof, streamed, continued and merged."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, InputError, PositionError, SizeError
from interp.saving import load_result, save_result
from tests.cases import DECODERS, MIXED, build

PARTS = ("heads", "attention", "attention_bias", "mlps")


def weighted(model):
    return interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5])


def singles(model, observable, rows, unit="head", position=-1):
    places = position if isinstance(position, list) else [position] * len(rows)
    return [
        interp.direct_attribution(model, observable, [row], unit, position=p)
        for row, p in zip(rows, places, strict=True)
    ]


def assert_is_the_mean_of(found, alone, parts=PARTS):
    mean, n = found.attribution(), len(alone)
    for part in parts:
        values = torch.stack([getattr(one, part) for one in alone]).double()
        size = float(values.abs().max()) + 1e-9
        torch.testing.assert_close(getattr(mean, part), values.mean(0), rtol=0, atol=1e-5 * size)
        error = values.std(0, correction=1) / n**0.5
        torch.testing.assert_close(found.standard_error[part][0], error, rtol=0, atol=1e-5 * size)
    assert mean.measurement == pytest.approx(sum(a.measurement for a in alone) / n, rel=1e-4, abs=1e-5)
    assert found.completeness_error < 2e-6
    assert sum(r["value"] for r in found.to_records(0)) == pytest.approx(mean.measurement, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch_is_the_mean_of_single_examples(name, side):
    model = interp.attach(build(name))
    found = interp.attribute_dataset(model, weighted(model), MIXED, padding_side=side)
    assert found.n == len(MIXED)
    assert_is_the_mean_of(found, singles(model, weighted(model), MIXED))


@pytest.mark.parametrize("position", [-1, 1, [0, 2, -2]])
def test_positions(position):
    model = interp.attach(build("gemma2"))
    found = interp.attribute_dataset(model, weighted(model), MIXED, position=position, batch_size=2)
    assert_is_the_mean_of(found, singles(model, weighted(model), MIXED, position=position))


@pytest.mark.parametrize(("name", "side"), [("gemma2", "left"), ("gpt2", "right")])
def test_every_token_counts_where_all_positions_are_asked_for(name, side):
    model = interp.attach(build(name))
    places = [(row, p) for row in MIXED for p in range(len(row))]
    rows, at = [row for row, _ in places], [p for _, p in places]
    alone = singles(model, weighted(model), rows, position=at)
    for size, budget in ((16, "1GiB"), (2, 30_000)):
        found = interp.attribute_dataset(
            model, weighted(model), MIXED, position="all", batch_size=size, budget=budget, padding_side=side
        )
        assert found.n == len(places) == sum(map(len, MIXED))
        assert_is_the_mean_of(found, alone)
    with pytest.raises(SizeError, match="a prompt of 7 tokens, all of them attributed; needed: at most"):
        interp.attribute_dataset(model, weighted(model), MIXED, position="all", budget=12_000)


def test_positions_by_what_the_text_says(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    texts = ["the cat sat", "a red cat ran on", "cat and dog"]
    by_text = interp.attribute_dataset(model, weighted(model), texts, position="cat")
    by_index = interp.attribute_dataset(model, weighted(model), texts, position=torch.tensor([1, 2, 0]))
    torch.testing.assert_close(by_text.mean["heads"], by_index.mean["heads"])


@pytest.mark.parametrize("unit", ["component", "kv_head", "neuron", "component+neuron"])
def test_units(unit):
    model = interp.attach(build("phi3"))
    found = interp.attribute_dataset(model, weighted(model), MIXED, unit)
    parts = {"component": ("attention",), "kv_head": ("kv_heads",)}.get(unit, ("neurons", "mlp_bias"))
    assert_is_the_mean_of(found, singles(model, weighted(model), MIXED, unit), parts)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_and_generators_change_nothing(size):
    model = interp.attach(build("qwen2"))
    rows = [MIXED[i % 3][: 2 + i % 4] for i in range(7)]
    whole = interp.attribute_dataset(model, [weighted(model), interp.Observable.logit(model, 4)], rows, batch_size=7)
    parts = interp.attribute_dataset(
        model, [weighted(model), interp.Observable.logit(model, 4)], (row for row in rows), batch_size=size
    )
    for key, value in whole.mean.items():
        torch.testing.assert_close(parts.mean[key], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts.m2[key], whole.m2[key], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_keeps_what_was_finished_and_goes_on():
    model, rows = interp.attach(build("llama")), [MIXED[i % 3] for i in range(7)]

    def failing():
        yield from rows[:5]
        raise ConnectionError("the source is gone")

    kept = interp.AttributionSummary([weighted(model).name])
    with pytest.raises(ConnectionError):
        interp.attribute_dataset(model, weighted(model), failing(), batch_size=2, into=kept)
    assert kept.n == 4
    again = interp.attribute_dataset(model, weighted(model), rows[kept.n :], batch_size=2, into=kept)
    assert again is kept
    assert_is_the_mean_of(kept, singles(model, weighted(model), rows))
    with pytest.raises(InputError, match="token id 99"):
        interp.attribute_dataset(model, weighted(model), [[1, 2], [99]], batch_size=1, into=kept)
    assert kept.n == 8


def test_shards_merge():
    model, rows = interp.attach(build("gpt2")), [MIXED[i % 3] for i in range(5)]
    one, two = (interp.attribute_dataset(model, weighted(model), part) for part in (rows[:2], rows[2:]))
    both = one.merge(two)
    assert (one.n, two.n, both.n) == (2, 3, 5)
    assert_is_the_mean_of(both, singles(model, weighted(model), rows))


def test_the_unembedding_never_runs():
    model = interp.attach(build("llama"))
    model.module.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the unembedding ran"))
    assert interp.attribute_dataset(model, weighted(model), MIXED).n == 3


def test_rows_top_and_saving(tmp_path):
    model = interp.attach(build("llama"))
    found = interp.attribute_dataset(model, weighted(model), MIXED, "neuron")
    rows = found.to_records(neurons=2)
    assert {r["n"] for r in rows} == {3}
    assert all((r["standard_error"] is None) == (r["kind"] == "rest") for r in rows)
    assert found.top(3).columns == ["component", "value", "standard_error"]
    save_result(found, tmp_path / "one")
    back = load_result(tmp_path / "one")
    assert back.to_records(0) == found.to_records(0)
    assert back.merge(found).n == 6


def test_what_cannot_be_is_refused():
    model = interp.attach(build("llama"))
    call = lambda prompts, **more: interp.attribute_dataset(model, weighted(model), prompts, **more)
    with pytest.raises(ArgumentError, match="no prompts"):
        call([])
    with pytest.raises(ArgumentError, match="a list of prompts"):
        call("the cat")
    with pytest.raises(ArgumentError, match="over a dataset"):
        call(MIXED, unit="source")
    for positions, text in (([0, 1], "fewer"), ([0, 1, 0, 1], "more")):
        with pytest.raises(PositionError, match=f"{text} positions than prompts"):
            call(MIXED, position=positions)
    with pytest.raises(PositionError, match="position 5 in example 1"):
        call(MIXED, position=5)
    with pytest.raises(SizeError, match="bytes for one example"):
        call(MIXED, budget="1KiB")
    with pytest.raises(ArgumentError, match="or a text such as"):
        call(MIXED, budget="much")
    with pytest.raises(ArgumentError, match="the same observables"):
        call(MIXED, into=interp.AttributionSummary(["another"]))
    kept = interp.attribute_dataset(interp.attach(build("qwen3")), weighted(model), MIXED, "neuron")
    with pytest.raises(ArgumentError, match="one summary is of one model"):
        kept.merge(interp.AttributionSummary(kept.observables, "neuron", 1, {"heads": torch.zeros(1, 2, 2)}))


def test_a_small_budget_makes_small_batches():
    model, sizes = interp.attach(build("llama")), []
    model.module.model.embed_tokens.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    interp.attribute_dataset(model, weighted(model), MIXED, budget=6_000)
    assert sizes == [1, 1, 1]
