"""Cosines and couplings against formulas, fitted slopes and samples of the sphere's slice."""

import math

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, SiteError
from interp.hooks.linearization import Linearization
from interp.hooks.site import Site
from interp.propagation.feature_vectors import FeatureVector, ZeroVectorWarning
from interp.saving import load_result, save_result

D = 20


def vector(values=None, site="blocks.1.ln1.hook_normalized", held="path", form="data-free"):
    values = torch.randn(D, dtype=torch.float64) if values is None else torch.as_tensor(values)
    return FeatureVector(values, 0.25, Site.parse(site), "she - he", "L1H1", Linearization.of(held), form)


def scaled(f, by):
    return vector(f.vector * by)


def test_product_of_both_directions_is_the_squared_cosine():
    for _ in range(5):
        f, g = vector(), vector()
        cosine, there, back = interp.cosine(f, g), interp.coupling(f, g), interp.coupling(g, f)
        assert there * back == pytest.approx(cosine**2, abs=1e-12)
        assert math.copysign(1, there) == math.copysign(1, cosine)
        assert there == pytest.approx(cosine * g.norm / f.norm, abs=1e-12)
        assert interp.coupling(scaled(f, 3.0), scaled(g, -0.5)) == pytest.approx(-0.5 / 3.0 * there, abs=1e-12)


def test_with_the_samples_covariance_it_is_the_fitted_slope():
    mixing = torch.randn(D, D, dtype=torch.float64)
    x = torch.randn(500, D, dtype=torch.float64) @ mixing + 2.0
    f, g = vector(), vector()
    fit = interp.validate_coupling(f, g, x)
    design = torch.stack([x @ f.vector, torch.ones(len(x), dtype=torch.float64)], 1)
    slope, intercept = torch.linalg.lstsq(design, x @ g.vector).solution.tolist()
    assert fit.slope == pytest.approx(slope, rel=1e-9)
    assert fit.intercept == pytest.approx(intercept, rel=1e-7)
    assert fit.r2 == pytest.approx(
        float(torch.corrcoef(torch.stack([x @ f.vector, x @ g.vector]))[0, 1] ** 2), rel=1e-9
    )
    assert interp.coupling(f, g, torch.cov(x.T)) == pytest.approx(slope, rel=1e-10)
    assert abs(fit.slope - fit.predicted) > 1e-2


def test_isotropic_samples_have_the_predicted_slope_and_share():
    count = 20_000
    f = vector()
    g = vector(f.vector + 0.7 * torch.randn(D, dtype=torch.float64))
    fit = interp.validate_coupling(f, g, torch.randn(count, D, dtype=torch.float64))
    error = g.norm / f.norm * math.sqrt((1 - fit.predicted_r2) / count)
    assert abs(fit.slope - fit.predicted) <= 5 * error
    error = 2 * math.sqrt(fit.predicted_r2) * (1 - fit.predicted_r2) / math.sqrt(count)
    assert abs(fit.r2 - fit.predicted_r2) <= 5 * error
    assert fit.n == count


def slice_of_the_sphere(f, score, norm, count):
    """Uniform samples of ‖x‖ = norm with f · x = score."""
    unit = f.vector / f.vector.norm()
    x = torch.randn(count, D, dtype=torch.float64)
    x = x - (x @ unit)[:, None] * unit
    along = score / f.norm
    return along * unit + x / x.norm(dim=1, keepdim=True) * math.sqrt(norm**2 - along**2)


def test_slice_of_the_sphere_has_the_predicted_mean_and_range():
    count, norm = 50_000, math.sqrt(D)
    f = vector()
    g = vector(0.5 * f.vector + torch.randn(D, dtype=torch.float64))
    score = 0.6 * norm * f.norm
    scores = g.score(slice_of_the_sphere(f, score, norm, count))
    assert abs(float(scores.mean()) - score * interp.coupling(f, g)) <= 5 * float(scores.std()) / math.sqrt(count)
    low, high = interp.coupling_range(f, g, score, norm)
    assert low <= float(scores.min())
    assert float(scores.max()) <= high
    # The ends are reached: by the slice's point along what of g is across f.
    across = g.vector - f.vector * (g.vector @ f.vector) / f.norm**2
    along = score / f.norm**2 * f.vector
    rest = across / across.norm() * math.sqrt(norm**2 - (score / f.norm) ** 2)
    assert float(g.vector @ (along + rest)) == pytest.approx(high, rel=1e-12)
    assert float(g.vector @ (along - rest)) == pytest.approx(low, rel=1e-12)


def test_a_range_of_parallel_vectors_is_a_point_and_one_out_of_reach_is_refused():
    f = vector()
    low, high = interp.coupling_range(f, scaled(f, 2.0), 1.0, 5.0)
    assert (low, high) == (pytest.approx(2.0), pytest.approx(2.0))
    with pytest.raises(ArgumentError, match=r"a score of 100 .*at most .*norm 1\.0"):
        interp.coupling_range(f, f, 100.0, 1.0)


def test_a_zero_vector_gives_nan_and_a_warning():
    zero, f = vector(torch.zeros(D).double()), vector()
    for measure in (interp.cosine, interp.coupling):
        with pytest.warns(ZeroVectorWarning, match="norm zero is NaN"):
            assert math.isnan(measure(zero, f))
    with pytest.warns(ZeroVectorWarning):
        assert all(math.isnan(end) for end in interp.coupling_range(zero, f, 0.0, 1.0))
    with pytest.raises(ArgumentError, match="a zero vector"):
        zero.normalized()


def test_vectors_that_do_not_compare_are_refused(unchecked):
    f = vector()
    for other, error, text in (
        (vector(site="blocks.2.ln1.hook_normalized"), SiteError, r"blocks\.1.* and blocks\.2"),
        (vector(site="blocks.1.ln1.hook_normalized#1"), SiteError, "vectors of one site"),
        (vector(held="frozen"), ArgumentError, r"path \(data-free\) and frozen"),
        (vector(form="reference"), ArgumentError, "one linearisation"),
    ):
        for measure in (interp.cosine, interp.coupling):
            with pytest.raises(error, match=text):
                measure(f, other)
    with pytest.raises(ArgumentError, match=r"covariance of shape \[3, 3\]; needed: \[20, 20\]"):
        interp.coupling(f, f, torch.eye(3))
    with pytest.raises(ArgumentError, match="what='angle'"):
        interp.pairwise([f], "angle")


def test_pairwise_is_the_single_numbers():
    vectors = [vector() for _ in range(3)]
    table = interp.pairwise(vectors, "coupling")
    assert table.tolist() == [[interp.coupling(f, g) for g in vectors] for f in vectors]


def test_normalized_keeps_direction_and_scales_the_offset():
    f = vector()
    one = f.normalized()
    assert one.norm == pytest.approx(1.0)
    assert one.offset == pytest.approx(f.offset / f.norm)
    assert interp.cosine(f, one) == pytest.approx(1.0)


def test_a_vector_prints_short_and_comes_back_from_disk(tmp_path):
    f = vector(site="blocks.6.attn.hook_z#3@5")
    assert repr(f).startswith("FeatureVector(she - he at blocks.6.attn.hook_z#3@5 along L1H1 (data-free): width 20")
    assert "tensor" not in repr(f)
    assert "<table>" in f._repr_html_()
    save_result(f, tmp_path / "f")
    again = load_result(tmp_path / "f")
    assert torch.equal(again.vector, f.vector)
    assert (again.site, again.linearization, again.model) == (f.site, f.linearization, None)
    assert again.to_records() == f.to_records()
    assert interp.cosine(f, again) == pytest.approx(1.0)
