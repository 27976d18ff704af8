"""A probe's direction is an observable: attributed to what wrote it, read under patches, pulled back to the input."""

import pytest
import torch

import interp
from interp.probes import LogisticProbe, MassMeanProbe
from tests.cases import build

SITE = "blocks.1.hook_resid_post"


def fitted(family):
    model = interp.attach(build(family))
    made = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 60, (30, 6), generator=made).tolist()
    y = [row[-1] % 2 for row in prompts]
    x = model.capture(prompts, SITE, "last")[SITE][:, 0]
    return model, prompts, x, LogisticProbe(C=1.0).fit(x, y)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox-parallel"])
@pytest.mark.parametrize("unit", ["component", "head", "head+neuron", "source"])
def test_what_wrote_the_direction_sums_to_the_probes_logit(family, unit):
    model, prompts, x, probe = fitted(family)
    found = interp.direct_attribution(model, probe.observable(f"{SITE}@last"), prompts[3], unit=unit)
    assert found.measurement == pytest.approx(float(probe.decision_function(x[3:4])[0]), rel=1e-4, abs=1e-4)
    assert found.total == pytest.approx(found.measurement, rel=1e-4, abs=1e-4)
    assert found.completeness_error < 1e-5
    acts = model.capture([prompts[3]], "blocks.0.hook_mlp_out", "last")
    wanted = float(acts["blocks.0.hook_mlp_out"][0, 0].double() @ probe.direction())
    assert float(found.mlps[0]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_positions_and_several_probes():
    model, prompts, x, probe = fitted("llama")
    other = MassMeanProbe().fit(x, [row[-1] % 2 for row in prompts])
    both = [p.observable(SITE) for p in (probe, other)]
    first, second = interp.direct_attribution(model, both, prompts[0], position=2)
    acts = model.capture([prompts[0]], SITE, 2)
    for found, p in ((first, probe), (second, other)):
        assert found.measurement == pytest.approx(float(p.decision_function(acts[SITE][:, 0])[0]), rel=1e-4, abs=1e-4)
    pre = interp.Observable.from_residual(probe.direction(), site="blocks.2.hook_resid_pre")
    again = interp.direct_attribution(model, pre, prompts[0], position=2)
    assert again.measurement + probe.intercept_[0] == pytest.approx(first.measurement, rel=1e-4)


def test_a_patch_moves_the_probe_as_another_run_says():
    model, prompts, _, probe = fitted("llama")
    clean, corrupt, obs = prompts[0], prompts[1], probe.observable(SITE)
    patched = model.capture([corrupt], SITE, "last", plan=[interp.Patch("blocks.0.hook_resid_post", clean)])
    whole = model.capture([clean], SITE, "last")
    torch.testing.assert_close(obs.read(patched), obs.read(whole), rtol=1e-4, atol=1e-4)


def test_the_direction_is_pulled_back_by_the_jacobian():
    model, prompts, _, probe = fitted("llama")
    source, at = "blocks.0.hook_resid_post", len(prompts[0]) - 1
    jacobian = interp.jacobian(model, [prompts[0]], source, SITE, [(at, at)])
    pulled = jacobian.dense()[0].T.double() @ probe.direction()
    x = model.capture([prompts[0]], source)[source].detach()
    step = 1e-2 * torch.nn.functional.normalize(torch.randn(x.shape[-1]), dim=0)
    read = lambda sign: float(probe.observable(SITE).read(
        model.capture([prompts[0]], SITE, "last", plan=[interp.Add(source, sign * step, positions="last")])
    ))  # fmt: skip
    assert (read(1) - read(-1)) / 2 == pytest.approx(float(pulled @ step.double()), rel=2e-2, abs=1e-4)
