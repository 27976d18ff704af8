"""Dictionaries from folders in SAELens's format, against the published formulas written out in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from interp import Dictionary, Site
from interp.hooks.errors import ArgumentError, DictionaryError

D_IN, D_SAE, D_OUT = 6, 15, 4
SITE = "blocks.1.hook_resid_pre"


def weights_of(architecture, **more):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    d_out = D_OUT if "transcoder" in architecture else D_IN
    found = {"W_enc": draw(D_IN, D_SAE), "W_dec": draw(D_SAE, d_out), "b_dec": draw(d_out)}
    if architecture == "gated":
        found |= {"b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": 0.3 * draw(D_SAE)}
    else:
        found["b_enc"] = draw(D_SAE)
    if "jumprelu" in architecture:
        found["threshold"] = draw(D_SAE).abs()
    if "skip" in architecture:
        found["W_skip"] = draw(D_OUT, D_IN)
    return found | more


def config_of(architecture, **more):
    found = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "device": "cuda"}
    found |= {"metadata": {"hook_name": SITE, "model_name": "tiny", "prepend_bos": True}}
    if "transcoder" in architecture:
        found |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
        found["metadata"]["hook_name_out"] = "blocks.1.hook_mlp_out"
    return found | more


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def rows(n=20):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def by_hand(architecture, w, x, k=None):
    """(f, x̂), one row and one latent at a time."""
    shift = torch.zeros(D_IN, dtype=torch.float64) if "transcoder" in architecture else w["b_dec"]
    f = torch.zeros(len(x), D_SAE, dtype=torch.float64)
    for row in range(len(x)):
        for i in range(D_SAE):
            p = float((x[row] - shift) @ w["W_enc"][:, i])
            if architecture == "gated":
                f[row, i] = (
                    max(p * float(w["r_mag"][i].exp()) + float(w["b_mag"][i]), 0) if p + w["b_gate"][i] > 0 else 0
                )
                continue
            p += float(w["b_enc"][i])
            f[row, i] = max(p, 0) if p > float(w.get("threshold", torch.full((D_SAE,), -1e9))[i]) else 0
        if k is not None:
            f[row, f[row].argsort(descending=True)[k:]] = 0
    out = torch.stack([sum(f[r, i] * w["W_dec"][i] for i in range(D_SAE)) + w["b_dec"] for r in range(len(x))])
    return f, out + x @ w["W_skip"].T if "W_skip" in w else out


ALL = ["standard", "gated", "jumprelu", "topk", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("architecture", ALL)
def test_latents_and_reconstruction_are_the_formulas(architecture, tmp_path):
    k = 3 if architecture == "topk" else None
    w, x = weights_of(architecture), rows()
    config = config_of(architecture) | ({"k": 3} if k else {})
    found = Dictionary.load(write(tmp_path / "sae", config, w))
    f, out = by_hand(architecture, w, x, k)
    assert 0 < (f > 0).double().mean() < 0.9
    torch.testing.assert_close(found.encode(x), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.reconstruct(x), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.decode(f, x), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.encode(x.reshape(4, 5, D_IN)).reshape(20, -1), f, rtol=1e-12, atol=1e-12)
    target = rows()[:, :D_OUT] + 1 if "transcoder" in architecture else x
    error = (target - out).norm(dim=-1) / target.norm(dim=-1)
    torch.testing.assert_close(found.reconstruction_error(x, target), error, rtol=1e-12, atol=1e-12)
    assert (found.name, found.site, found.metadata["model_name"]) == ("sae", Site(SITE), "tiny")
    assert str(found.target) == ("blocks.1.hook_mlp_out" if "transcoder" in architecture else SITE)
    assert (found.d_in, len(found), found.d_out) == (D_IN, D_SAE, out.shape[1])
    assert found.to_records()[0]["latents"] == D_SAE


@pytest.mark.parametrize("architecture", ALL)
def test_observables_read_the_encoder_and_the_decoder(architecture, tmp_path):
    w, x = weights_of(architecture), rows()
    found = Dictionary.load(write(tmp_path / "sae", config_of(architecture, k=D_SAE), w))
    f = found.encode(x)
    for i in range(D_SAE):
        on = f[:, i] > 0
        torch.testing.assert_close(found.encoder_observable(i).measure(x)[on], f[on, i], rtol=1e-10, atol=1e-10)
        assert found.encoder_observable(i).site == found.site
    base = found.decode(torch.zeros_like(f), x)
    one = torch.zeros_like(f)
    one[:, 2] = 1.0
    torch.testing.assert_close(found.decode(one, x) - base, found.direction(2).expand_as(base))
    y = torch.randn(5, found.d_out, dtype=torch.float64)
    together = found.decoder_observables([4, 2])
    torch.testing.assert_close(together.measure(y), y @ w["W_dec"][[4, 2]].T, rtol=1e-12, atol=1e-12)
    assert together.site == found.target
    assert "latent 4" in together.names[0]
    assert len(found.decoder_observables()) == D_SAE


def test_a_top_k_that_rescales_ranks_by_row_norms(tmp_path):
    w, x = weights_of("topk"), rows()
    found = Dictionary.load(write(tmp_path / "s", config_of("topk", k=3, rescale_acts_by_decoder_norm=True), w))
    norms = w["W_dec"].norm(dim=-1)
    folded = {"W_enc": w["W_enc"] * norms, "b_enc": w["b_enc"] * norms, "W_dec": w["W_dec"] / norms[:, None]}
    f, out = by_hand("topk", w | folded, x, 3)
    torch.testing.assert_close(found.encode(x), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.reconstruct(x), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.direction(1), folded["W_dec"][1], rtol=1e-12, atol=1e-12)


def test_normalised_inputs(tmp_path):
    w, x = weights_of("standard"), rows() * 7 + 2
    for kind in ("constant_norm_rescale", "layer_norm"):
        found = Dictionary.load(write(tmp_path / "s", config_of("standard", normalize_activations=kind), w))
        if kind == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = ((x - mean).pow(2).sum(-1, keepdim=True) / (D_IN - 1)).sqrt()
            f, out = by_hand("standard", w, (x - mean) / (std + 1e-5))
            out = out * std + mean
        else:
            scale = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
            f, out = by_hand("standard", w, x * scale)
            out = out / scale
        torch.testing.assert_close(found.encode(x), f, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.reconstruct(x), out, rtol=1e-11, atol=1e-11)
        with pytest.raises(ArgumentError, match=r"without x"):
            found.decode(f)
        with pytest.raises(ArgumentError, match=f"normalises its input \\({kind}\\)"):
            found.encoder_observable(0)
    folder = write(tmp_path / "s", config_of("standard", normalize_activations="expected_average_only_in"), w)
    with pytest.raises(DictionaryError, match="pass norm_scaling_factor="):
        Dictionary.load(folder)
    f, out = by_hand("standard", w, 0.5 * x)
    found = Dictionary.load(folder, norm_scaling_factor=0.5)
    torch.testing.assert_close(found.encode(x), f, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.reconstruct(x), out / 0.5, rtol=1e-11, atol=1e-11)


def test_older_folders(tmp_path):
    """Flat configurations, older names, top-k as an activation function, log thresholds, tuned scales."""
    w, x = weights_of("standard"), rows()
    flat = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": "blocks.0.attn.hook_z", "hook_point_head_index": 1}
    flat |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "apply_b_dec_to_input": False}
    found = Dictionary.load(write(tmp_path / "s", flat, w))
    assert str(found.site) == "blocks.0.attn.hook_z#1"
    f, _ = by_hand("standard", w, x + w["b_dec"], 2)
    torch.testing.assert_close(found.encode(x), f, rtol=1e-12, atol=1e-12)
    w = weights_of("jumprelu")
    logs = {k: v for k, v in w.items() if k != "threshold"} | {"log_threshold": w["threshold"].log()}
    found = Dictionary.load(write(tmp_path / "j", config_of("jumprelu"), logs))
    torch.testing.assert_close(found.encode(x), by_hand("jumprelu", w, x)[0], rtol=1e-12, atol=1e-12)
    scale = torch.linspace(0.5, 2, D_SAE, dtype=torch.float64)
    w = weights_of("standard", scaling_factor=scale)
    found = Dictionary.load(write(tmp_path / "t", config_of("standard", finetuning_scaling_factor=True), w))
    f, _ = by_hand("standard", w, x)
    torch.testing.assert_close(found.reconstruct(x), (f * scale) @ w["W_dec"] + w["b_dec"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.direction(3), scale[3] * w["W_dec"][3])
    with pytest.raises(DictionaryError, match="scaling_factor"):
        Dictionary.load(write(tmp_path / "t", config_of("standard"), w))
    w = weights_of("transcoder", b_dec=torch.ones(D_IN).double(), b_dec_out=torch.zeros(D_OUT).double())
    found = Dictionary.load(write(tmp_path / "u", config_of("transcoder", apply_b_dec_to_input=True), w))
    plain = weights_of("transcoder", b_dec=torch.zeros(D_OUT).double())
    torch.testing.assert_close(found.reconstruct(x), by_hand("transcoder", plain, x - 1)[1], rtol=1e-12, atol=1e-12)


def test_half_precision_is_read_into_float32(tmp_path):
    w = {k: v.bfloat16() for k, v in weights_of("standard").items()}
    found = Dictionary.load(write(tmp_path / "s", config_of("standard"), w))
    assert {t.dtype for t in found.weights.values()} == {torch.float32}
    assert found.encode(rows()).dtype == torch.float32


BAD = {
    "architecture": ({"architecture": "temporal"}, {}, r"architecture 'temporal' in .*one of standard, topk, gated"),
    "activation": ({"activation_fn": "tanh-relu"}, {}, "activation function 'tanh-relu'"),
    "normalisation": ({"normalize_activations": "l2"}, {}, "normalize_activations='l2'"),
    "missing key": ({}, {"b_enc": None}, r"exactly W_dec, W_enc, b_dec, b_enc; missing: b_enc"),
    "unknown key": ({}, {"W_extra": torch.ones(2)}, "unknown: W_extra"),
    "shape": ({}, {"W_enc": torch.ones(D_SAE, D_IN)}, r"W_enc of shape \[15, 6\] .*needed: \[6, 15\]"),
    "shape of a bias": ({}, {"b_dec": torch.ones(D_SAE)}, r"b_dec of shape \[15\]"),
    "dtype": ({}, {"b_enc": torch.ones(D_SAE, dtype=torch.long)}, "b_enc of dtype I64"),
    "NaN": ({}, {"b_enc": torch.full((D_SAE,), torch.nan)}, "b_enc in .* holds NaN"),
    "size": ({"d_sae": "15"}, {}, "d_sae='15'"),
    "huge": ({"d_sae": 1 << 40}, {}, "d_sae="),
    "no site": ({"metadata": {}}, {}, r"hook_name=None in .*pass site="),
    "no site's name": ({"metadata": {"hook_name": "a b"}}, {}, "hook_name='a b'"),
    "another decoder": ({"normalize_decoder": True}, {}, "normalize_decoder"),
    "metadata": ({"metadata": [1]}, {}, "metadata one too"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_folders_that_are_refused(case, tmp_path):
    config, weights, match = BAD[case]
    tensors = {k: v for k, v in (weights_of("standard") | weights).items() if v is not None}
    with pytest.raises(DictionaryError, match=match):
        Dictionary.load(write(tmp_path / "s", config_of("standard") | config, tensors))


def test_other_refusals(tmp_path):
    for config in (config_of("topk"), config_of("topk", k=D_SAE + 1), config_of("topk", k=True)):
        with pytest.raises(DictionaryError, match="k="):
            Dictionary.load(write(tmp_path / "k", config, weights_of("topk")))
    bad = config_of("transcoder", apply_b_dec_to_input=True)
    with pytest.raises(DictionaryError, match="only b_dec"):
        Dictionary.load(write(tmp_path / "t", bad, weights_of("transcoder")))
    with pytest.raises(DictionaryError, match="transcoder that normalises"):
        Dictionary.load(
            write(tmp_path / "t", config_of("transcoder", normalize_activations="layer_norm"), weights_of("transcoder"))
        )
    with pytest.raises(DictionaryError, match=r"cfg\.json cannot be read"):
        Dictionary.load(tmp_path / "nowhere")
    folder = write(tmp_path / "s", config_of("standard"), weights_of("standard"))
    (folder / "sae_weights.safetensors").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(DictionaryError, match="needed: a safetensors file"):
        Dictionary.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(DictionaryError, match="cannot be read"):
        Dictionary.load(folder)


def test_wrong_calls(tmp_path):
    found = Dictionary.load(write(tmp_path / "s", config_of("standard"), weights_of("standard")), site="hook_embed")
    assert found.site == found.target == Site("hook_embed")
    for bad in (-1, D_SAE):
        with pytest.raises(ArgumentError, match=rf"latent {bad} of s; needed: an index in 0\.\.14"):
            found.direction(bad)
    with pytest.raises(ArgumentError, match=r"shape \[2, 3\] at hook_embed"):
        found.encode(torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="2 latents; needed: 15"):
        found.decode(torch.ones(2, 2))
    with pytest.raises(ArgumentError, match="without a target"):
        Dictionary.load(write(tmp_path / "t", config_of("transcoder"), weights_of("transcoder"))).reconstruction_error(
            rows()
        )
