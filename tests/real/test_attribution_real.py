"""Attribution on SmolLM2: finer parts sum, datasets are means of single prompts, norms are those of the vectors."""

import pytest
import torch

import interp

pytestmark = pytest.mark.slow
PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "Then, Mary and John had a long talk. John said it to",
    "John and Mary went out, and",
]


def test_sources_neurons_datasets_and_norms(smollm2):
    mary = interp.Observable.logit_diff(smollm2, " Mary", " John")
    she = interp.Observable.logit_diff(smollm2, " she", " he")
    found = interp.direct_attribution(smollm2, mary, PROMPTS[0], "source+neuron")
    assert found.completeness_error < 1e-5
    logits = smollm2.run(PROMPTS[0])[0, -1]
    assert found.total == pytest.approx(float(mary.measure(logits)), abs=1e-3)
    assert next(r for r in found.to_records() if r["component"] == "L20H3@1")["token"] == " Mary"

    alone = [interp.direct_attribution(smollm2, [mary, she], prompt) for prompt in PROMPTS]
    summary = interp.attribute_dataset(smollm2, [mary, she], PROMPTS, batch_size=2)
    wanted = torch.stack([torch.stack([a.heads for a in pair]) for pair in alone]).double().mean(0)
    assert (summary.mean["heads"] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert summary.completeness_error < 1e-5

    norms = interp.head_norms(smollm2, [mary, she])
    for layer, head in ((0, 0), (13, 5), (29, 8)):
        vectors = [interp.propagate(smollm2, n, path=f"L{layer}H{head}") for n in (mary, she)]
        assert norms.norms[:, layer, head].tolist() == pytest.approx([f.norm for f in vectors], rel=1e-5)
        assert float(norms.cosine(0, 1)[layer, head]) == pytest.approx(interp.cosine(*vectors), abs=1e-5)
