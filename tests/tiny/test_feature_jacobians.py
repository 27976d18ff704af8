"""Feature-to-feature Jacobians against jacrev through a dictionary's own decoder, the model's MLP, and an encoder."""

import pytest
import torch
from torch.func import jacrev

import interp
from interp.dictionaries.dictionary import Dictionary
from interp.hooks.errors import ArgumentError, SizeError
from interp.saving import load_result, save_result
from tests.cases import HAND_LAYOUT, IDS, build, build_hand

IN, OUT = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


def dictionary(site, architecture="standard", latents=40, **more):
    made = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64)
    w = {"W_enc": draw(32, latents), "W_dec": draw(latents, 32), "b_enc": draw(latents), "b_dec": draw(32)}
    if architecture == "jumprelu":
        w["threshold"] = draw(latents).abs()
    if architecture == "gated":
        w |= {"b_gate": w.pop("b_enc"), "b_mag": draw(latents), "r_mag": draw(latents)}
    site = interp.Site.parse(site)
    return Dictionary(architecture, architecture, site, site, w, k=7 if architecture == "topk" else None, **more)


def through(module, x, decoder, encoder):
    """Latents of the output as a function of latents of the input, around one token's stream."""
    block = module.transformer.h[1]
    start = decoder.encode(x)

    def run(f):
        moved = x + decoder.decode(f) - decoder.decode(start)
        return encoder.encode(block.mlp(block.ln_2(moved)))

    return jacrev(run)(start), start


KINDS = [("standard", {}), ("topk", {"rescales": True}), ("jumprelu", {}), ("gated", {}), ("topk", {})]


@pytest.mark.parametrize(("kind", "more"), KINDS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(KINDS)])
@pytest.mark.parametrize("method", ["closed", "autograd"])
def test_active_latents_against_jacrev(kind, more, method):
    module = build("gpt2", dtype=torch.float64)
    model = interp.attach(module)
    decoder, encoder = dictionary(IN, kind, **more), dictionary(OUT, kind, 37, **more)
    found = interp.feature_jacobians(model, IDS, IN, OUT, decoder, encoder, method=method)
    assert len(found) == 14
    assert found.method.startswith("closed form of the features" if method == "closed" else "autograd")
    acts = model.capture(IDS, IN)[IN]
    for one in (found[0], found[5], found[-1]):
        x = acts[one.example, one.position]
        wanted, start = through(module, x, decoder, encoder)
        assert torch.equal(one.inputs, start.nonzero()[:, 0])
        assert len(one.outputs) < encoder.n_latents
        full = torch.zeros_like(wanted).index_put((one.outputs[:, None], one.inputs[None]), one.matrix)
        assert (full[:, one.inputs] - wanted[:, one.inputs]).norm() < 1e-12 * wanted.norm()


def test_gated_mlps_streams_and_position_pairs():
    """E J Dᵀ of the model's own Jacobian, between chosen latents of plain matrices."""
    model = interp.attach(build_hand().double(), layout=interp.Layout(**HAND_LAYOUT))
    made = torch.Generator().manual_seed(0)
    decoder = torch.randn(20, 32, generator=made, dtype=torch.float64)
    encoder = torch.randn(32, 25, generator=made, dtype=torch.float64)
    llama = interp.attach(build("granite", dtype=torch.float64))
    cases = [
        (model, "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", [(2, 5), (0, 6)], {}),
        (llama, IN, OUT, "same", {}), (llama, IN, "blocks.1.hook_resid_post", "same", {}),
        (llama, "blocks.1.ln2.hook_out", OUT, "same", {}), (llama, IN, OUT, "same", {"linearization": "frozen"}),
    ]  # fmt: skip
    for which, source, target, positions, options in cases:
        between = interp.jacobian(which, IDS[:1], source, target, positions, **options).dense()
        on = torch.rand(len(between), 20, generator=made) < 0.4, torch.rand(len(between), 25, generator=made) < 0.4
        on[0][0] = False
        found = interp.feature_jacobians(
            which, IDS[:1], source, target, decoder, encoder, positions, active_inputs=on[0], active_outputs=on[1],
            **options,
        )  # fmt: skip
        assert found.method.startswith("closed form of the features") == (which is llama)
        for one, matrix, rows, columns in zip(found, between, on[1], on[0], strict=True):
            wanted = (encoder.T @ matrix @ decoder.T)[rows][:, columns]
            assert (one.matrix - wanted).norm() <= 1e-12 * wanted.norm()
            assert one.matrix.shape == (len(one.outputs), len(one.inputs))


def test_saved_and_listed(tmp_path):
    model = interp.attach(build("gpt2", dtype=torch.float64))
    found = interp.feature_jacobians(model, IDS[:1], IN, OUT, dictionary(IN), dictionary(OUT))
    save_result(found, tmp_path / "features")
    again = load_result(tmp_path / "features")
    assert torch.equal(again[3].matrix, found[3].matrix)
    row = again.to_records()[3]
    at = again[3].outputs.tolist().index(row["output"]), again[3].inputs.tolist().index(row["input"])
    assert abs(again[3].matrix[at]) == again[3].matrix.abs().max()
    largest = max(again[3].to_records(), key=lambda r: abs(r["value"]))
    assert (largest["output"], largest["input"]) == (row["output"], row["input"])


REFUSED = {
    "another site": ({"decoder": dictionary(OUT)}, ArgumentError, "one site"),
    "a normalised input": ({"encoder": dictionary(OUT, normalization="layer_norm")}, ArgumentError, "normalises"),
    "no active latents": ({"decoder": torch.ones(5, 32)}, ArgumentError, "active_inputs"),
    "active latents of others": ({"active_inputs": torch.ones(7, 3).bool()}, ArgumentError, r"\[7, 40\]"),
    "another width": (
        {"encoder": torch.ones(31, 5), "active_outputs": torch.ones(7, 5).bool()}, ArgumentError, "width 32",
    ),
    "all positions": ({"positions": None}, ArgumentError, "one source and one target"),
    "a reduction": ({"reduce": "mean"}, ArgumentError, "reduce="),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, text = REFUSED[case]
    model = interp.attach(build("gpt2"))
    given = {"source": IN, "target": OUT, "decoder": dictionary(IN), "encoder": dictionary(OUT)} | options
    with pytest.raises(error, match=text):
        interp.feature_jacobians(model, IDS[:1], **given)


def test_results_over_the_budget():
    model = interp.attach(build("gpt2"))
    many = dictionary(IN, latents=4000), dictionary(OUT, latents=4000)
    with pytest.raises(SizeError, match="active_inputs="):
        interp.feature_jacobians(model, IDS[:1], IN, OUT, *many, budget=1_000_000)
