"""A lens of SmolLM2 against TransformerLens's, and its artefact in both libraries."""

import pytest
import torch

import interp

TEXT = """Everyone has the right to life, liberty and security of person. No one shall be held in slavery or
servitude; slavery and the slave trade shall be prohibited in all their forms."""


@pytest.mark.slow
def test_transformer_lens_gives_the_same_lens(smollm2, bridge_package, tmp_path):
    from transformer_lens.tools.analysis import JacobianLens as Theirs

    theirs = bridge_package.TransformerBridge.boot_transformers(
        "local", hf_model=smollm2.module, tokenizer=smollm2.tokenizer, device="cpu"
    )
    options = dict(source_layers=[25, 27, 28], max_seq_len=20, show_progress=False)
    wanted = Theirs.fit(theirs, [TEXT], corpus="one article", **options)
    ids = theirs.to_tokens(TEXT)[:, :20]
    ours = interp.JacobianLens.fit(smollm2, ids, layers=[25, 27, 28])
    for layer in ours.layers:
        gap = ours.matrices[layer] - wanted.jacobians[layer]
        assert gap.norm() <= 1e-5 * wanted.jacobians[layer].norm()
    rough = interp.JacobianLens.fit(smollm2, ids, layers=[25, 27, 28], precision="bf16")
    assert (rough.matrices[25] - ours.matrices[25]).norm() <= 2e-2 * ours.matrices[25].norm()
    ours.export(tmp_path / "lens.pt")
    here, there = interp.JacobianLens.load(tmp_path / "lens.pt"), Theirs.load(str(tmp_path / "lens.pt"))
    read = here.readout(smollm2, ids, k=1)
    other = there.readout(theirs, ids, top_k=1)
    for i, layer in enumerate((25, 27, 28, 29)):
        assert torch.equal(read.top_ids[i], other.lens_topk_indices[layer])
