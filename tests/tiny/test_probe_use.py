"""Erasure inside a model: what it reads afterwards, and whether answers depend on a direction that was built in."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError
from interp.probes import LeaceEraser, LogisticProbe, ablate_direction, erase_layers, probe_use
from tests.cases import WIDTH, build

SITE = "blocks.1.hook_resid_post"
READ, IDLE = torch.zeros(WIDTH), torch.zeros(WIDTH)
READ[3], IDLE[7] = 1.0, 1.0


def prompts(n=40):
    made = torch.Generator().manual_seed(0)
    return torch.randint(3, 60, (n, 6), generator=made).tolist()


@pytest.fixture(scope="module")
def model():
    return interp.attach(build("llama"))


def last(model, texts, site=SITE, plan=()):
    return model.capture(texts, site, "last", plan=plan)[site][:, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_hooked_eraser_is_the_eraser(family):
    model, texts = interp.attach(build(family)), prompts(20)
    y = torch.arange(20) % 2
    x = last(model, texts)
    eraser = LeaceEraser.fit(x, y)
    found = last(model, texts, plan=[eraser.hook(SITE, "last")])
    torch.testing.assert_close(found, eraser(x), rtol=1e-4, atol=1e-4)
    gap = found[y == 0].mean(0) - found[y == 1].mean(0)
    assert gap.norm() < 1e-4 * (x[y == 0].mean(0) - x[y == 1].mean(0)).norm()


def test_layers_are_erased_one_after_the_other(model):
    texts = prompts(40)
    y = torch.tensor([t[-2] % 2 for t in texts])
    sites = "blocks.*.hook_resid_post"
    plan = erase_layers(model, texts, y, sites, positions="last")
    assert [str(step.site) for step in plan] == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    for step in plan:
        x = last(model, texts, step.site, plan)
        assert LogisticProbe(C=1.0).fit(last(model, texts, step.site), y).score(last(model, texts, step.site), y) > 0.8
        gap = x[y == 0].mean(0) - x[y == 1].mean(0)
        assert gap.norm() < 1e-3 * x.std(0).norm()
    everywhere = erase_layers(model, [t[: 3 + i % 3] for i, t in enumerate(texts)], y, SITE)
    assert everywhere[0].positions is None


@torch.no_grad()
def built(direction_is_read: bool):
    """A model whose answer is one channel of its stream at the site, or another one."""
    module = torch.nn.Sequential(torch.nn.Linear(4, WIDTH), torch.nn.Linear(WIDTH, 1, bias=False))
    module[1].weight.copy_((READ if direction_is_read else IDLE)[None])
    return interp.attach(module)


@pytest.mark.parametrize("used", [True, False])
def test_use_is_told_from_mere_presence(used):
    torch.manual_seed(1)
    model, x = built(used), torch.randn(60, 4)
    features = model.capture(x, "0")["0"]
    step = ablate_direction("0", READ, features.mean(0))
    found = probe_use(model, x, step, lambda answers: answers[:, 0], features)
    torch.testing.assert_close(torch.as_tensor(found.before), model.run(x)[:, 0].double())
    if used:
        expected = (features[:, 3].mean() - features[:, 3]).double()
        torch.testing.assert_close(torch.as_tensor(found.change), expected, rtol=1e-4, atol=1e-5)
        assert found.verdict == "decodable and used"
        assert found.p == pytest.approx(1 / 41)
    else:
        assert abs(found.change).max() < 1e-6
        assert found.verdict == "decodable, use not shown"
    assert found.matched_share == pytest.approx(found.share, rel=1e-6)
    assert found.rank == 1
    assert [r["what"] for r in found.to_records()] == ["erased", "random subspaces", "subspaces of equal variance"]
    assert found.verdict in str(found)


def test_answers_of_a_language_model_at_its_last_tokens(model):
    texts = [t[: 3 + i % 4] for i, t in enumerate(prompts(12))]
    x = torch.cat([last(model, [t]) for t in texts])
    obs = interp.Observable.logit_diff(model, 5, 9)
    step = LeaceEraser.fit(x, torch.arange(12) % 2).hook(SITE, "last")
    found = probe_use(model, texts, step, obs, x, batch_size=5)
    alone = torch.cat([obs.measure(model.run([t])[:, -1]) for t in texts]).double()
    torch.testing.assert_close(torch.as_tensor(found.before), alone, rtol=1e-4, atol=1e-4)
    after = torch.cat([obs.measure(model.run([t], plan=[step])[:, -1]) for t in texts]).double()
    torch.testing.assert_close(torch.as_tensor(found.change), after - alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("more", "match"), [
    ({"random": 5}, "random=5"), ({"features": torch.randn(9, 3)}, "features of width 3"),
    ({"inputs": torch.randn(1, 4)}, "1 examples"), ({"measure": lambda a: a}, r"a measure that gives \[32, 1\]"),
])  # fmt: skip
def test_malformed_calls_are_refused(more, match):
    x = torch.randn(60, 4)
    model = built(True)
    given = {"inputs": x, "erase": ablate_direction("0", READ, torch.zeros(WIDTH)), "measure": lambda a: a[:, 0],
             "features": model.capture(x, "0")["0"]} | more  # fmt: skip
    with pytest.raises(ArgumentError, match=match):
        probe_use(model, **given)
