"""Steering, orthogonal directions and what an intervention costs."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError
from tests.cases import IDS, build, inputs_for

SITE = "blocks.1.hook_resid_pre@3"


def case(name="gpt2", **options):
    model = interp.attach(build(name, **options))
    return model, interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5]), inputs_for(name)[:1]


def test_small_doses_follow_the_gradient_in_float64():
    model, observable, ids = case(dtype=torch.float64)
    vector = interp.propagate(model, observable, ids, site=SITE, linearization="exact")
    found = interp.dose_response(model, observable, ids, vector, (-1e-5, 0.0, 1e-5))
    slope = float(found.measured[2] - found.measured[0]) / (2e-5 * found.size)
    assert slope == pytest.approx(vector.norm, rel=1e-3)  # the gradient along its own direction is its norm
    assert found.asymmetry < 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox-parallel"])
def test_each_dose_is_a_run_of_its_own(name):
    model, observable, ids = case(name)
    vector = interp.propagate(model, observable, ids, site=SITE, linearization="frozen")
    found = interp.dose_response(model, observable, ids, vector, (-0.7, 0.0, 2.0), random=3)
    x = model.capture(ids, SITE)[SITE][0, 0]
    for dose, measured in zip(found.doses.tolist(), found.measured, strict=True):
        step = dose * x.norm() * vector.vector / vector.norm
        plan = interp.Add("blocks.1.hook_resid_pre", value=step, positions=3)
        wanted = observable.measure(model.run(ids, plan=plan)[0, -1])
        torch.testing.assert_close(measured, wanted, rtol=1e-4, atol=1e-4)
    assert float(found.measured[1]) == pytest.approx(float(observable.measure(model.run(ids)[0, -1])), rel=1e-5)
    assert found.random.shape == (3, 3)
    assert found.random[:, 1].std() < 1e-6  # at dose 0 a direction does not matter
    assert found.random[:, 2].std() > 1e-3


def test_further_interventions_hold_while_steering():
    model, observable, ids = case()
    vector = interp.propagate(model, observable, ids, site=SITE)
    held = interp.Zero("blocks.2.hook_mlp_out")
    found = interp.dose_response(model, observable, ids, vector, (0.0,), plan=held)
    assert float(found.measured[0]) == pytest.approx(
        float(observable.measure(model.run(ids, plan=held)[0, -1])), rel=1e-5
    )


def test_an_orthogonal_direction_raises_one_and_spares_the_others():
    model, observable, ids = case(dtype=torch.float64)
    spared = [interp.Observable.logit(model, 11), interp.Observable.logit_diff(model, 20, 31)]
    of = lambda n: interp.propagate(model, n, ids, site=SITE, linearization="exact")
    one, others = of(observable), [of(n) for n in spared]
    free = interp.orthogonalize(one, others)
    for other in others:
        assert abs(float(free.vector @ other.vector)) < 1e-10 * one.norm * other.norm
    move = lambda n: interp.dose_response(model, n, ids, free, (-1e-5, 1e-5)).measured
    up = float(move(observable).diff())
    assert up > 0
    for n in spared:
        assert abs(float(move(n).diff())) < 1e-3 * up
    twice = interp.orthogonalize(free, others)
    torch.testing.assert_close(twice.vector, free.vector)


def test_orthogonal_to_itself_or_to_another_site_is_refused():
    model, observable, ids = case()
    one = interp.propagate(model, observable, ids, site=SITE)
    with pytest.raises(ArgumentError, match="in the span of the others"):
        interp.orthogonalize(one, [one])
    with pytest.raises(ArgumentError, match="vectors of one site"):
        interp.orthogonalize(one, [interp.propagate(model, observable, ids, site="blocks.2.hook_resid_pre@3")])
    with pytest.raises(ArgumentError, match="at least one"):
        interp.orthogonalize(one, [])


def test_doses_need_a_position_and_a_direction():
    model, observable, ids = case()
    free = interp.propagate(model, observable, path="L1H2")
    with pytest.raises(ArgumentError, match="at one position"):
        interp.dose_response(model, observable, ids, free)
    vector = interp.propagate(model, observable, ids, site=SITE)
    with pytest.raises(ArgumentError, match="0 doses"):
        interp.dose_response(model, observable, ids, vector, ())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_cost_is_the_mean_loss_by_hand_whatever_the_batches(batch_size):
    model, _, _ = case("llama")
    texts, plan = [*IDS, [5, 11, 50]], interp.Scale("blocks.1.hook_mlp_out", factor=0.5)
    found = interp.cost(model, plan, texts, batch_size=batch_size)
    losses, n = torch.zeros(3), 0
    for ids in texts:
        plain, under = (torch.log_softmax(model.run([ids], plan=p)[0, :-1], -1) for p in ((), plan))
        wanted = torch.tensor(ids[1:])[:, None]
        losses += torch.stack(
            [-plain.gather(1, wanted).sum(), -under.gather(1, wanted).sum(), (plain.exp() * (plain - under)).sum()]
        )
        n += len(ids) - 1
    assert found.n == n
    torch.testing.assert_close(
        torch.tensor([found.loss, found.loss_under, found.divergence]), losses / n, rtol=1e-4, atol=1e-5
    )
    assert interp.cost(model, (), texts).divergence == pytest.approx(0.0, abs=1e-7)


def test_cost_needs_texts():
    model, _, _ = case()
    with pytest.raises(ArgumentError, match="a list of texts"):
        interp.cost(model, (), "one text")
    with pytest.raises(ArgumentError, match="two tokens or more"):
        interp.cost(model, (), [[5], [7]])
