"""Norms of every head's data-free vector, against the vectors themselves."""

import warnings

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, SiteUnavailableError
from interp.plots import chart
from interp.propagation.feature_vectors import ZeroVectorWarning
from interp.saving import load_result, save_result
from tests.cases import DECODERS, build


def pair(model):
    many = interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5], name="many")
    return [many, interp.Observable.logit_diff(model, 9, 4, name="two")]


@pytest.mark.parametrize("name", DECODERS)
def test_norms_cosines_and_couplings_are_those_of_the_vectors(name):
    model = interp.attach(build(name))
    first, second = pair(model)
    found = interp.head_norms(model, [first, second])
    cosines, couplings = found.cosine("many", "two"), found.coupling(0, 1)
    assert found.norms.shape == (2, model.n_layers, model.layout.n_heads)
    for layer in range(model.n_layers):
        for head in range(model.layout.n_heads):
            f, g = (interp.propagate(model, n, path=f"L{layer}H{head}") for n in (first, second))
            for index, vector in enumerate((f, g)):
                assert float(found.norms[index, layer, head]) == pytest.approx(vector.norm, rel=1e-5)
            assert float(cosines[layer, head]) == pytest.approx(interp.cosine(f, g), rel=1e-4, abs=1e-6)
            assert float(couplings[layer, head]) == pytest.approx(interp.coupling(f, g), rel=1e-4, abs=1e-6)


def test_start_cosine_rows_and_top():
    model = interp.attach(build("llama"))
    found = interp.head_norms(model, pair(model))
    w = [n.pull_to_stream(model)[0] for n in pair(model)]
    assert found.start_cosine(0, 1) == pytest.approx(float(torch.cosine_similarity(*w, dim=0)), rel=1e-5)
    assert found.cosine(1, 1).min() == pytest.approx(1.0)
    rows = found.to_records()
    assert len(rows) == found.norms.numel()
    best = max((r for r in rows if r["observable"] == "two"), key=lambda r: r["norm"])
    assert found.top(1, "two")[0] == {"component": best["component"], "norm": best["norm"]}
    one = interp.head_norms(model, pair(model)[1])
    torch.testing.assert_close(one.norms[0], found.norms[1])


def test_a_zero_vector_has_no_cosine():
    module = build("llama")
    with torch.no_grad():
        module.model.layers[1].self_attn.v_proj.weight.zero_()
    model = interp.attach(module)
    found = interp.head_norms(model, pair(model))
    with pytest.warns(ZeroVectorWarning, match="norm zero"):
        cosines = found.cosine(0, 1)
    assert cosines[1].isnan().all()
    assert cosines[0].isfinite().all()


def test_saved_drawn_and_refused(tmp_path):
    model = interp.attach(build("gemma2"))
    found = interp.head_norms(model, pair(model))
    save_result(found, tmp_path / "norms")
    back = load_result(tmp_path / "norms")
    assert torch.equal(back.inner(0, 1), found.inner(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = chart(found, observable="two").to_dict()["datasets"]["cells"]
    assert max(r["value"] for r in cells) == pytest.approx(float(found.norms[1].max()))
    with pytest.raises(ArgumentError, match="observable 'three'"):
        found.cosine("many", "three")
    with pytest.raises(SiteUnavailableError, match="residual sum"):
        interp.head_norms(interp.attach(build("bert")), interp.Observable("x", (1,), (1.0,)))
