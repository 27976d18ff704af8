"""Patching on SmolLM2: the subject's name matters early, the last token late."""

import pytest

import interp

pytestmark = pytest.mark.slow
TEXT = "When {} and {} went to the store, {} gave a drink to"


def test_the_answer_moves_from_the_subject_to_the_last_token(smollm2):
    clean, corrupt = TEXT.format("Mary", "John", "John"), TEXT.format("Mary", "John", "Mary")
    mary = interp.Observable.logit_diff(smollm2, " Mary", " John")
    tokens = smollm2.tokens(clean)
    subject = max(row["position"] for row in tokens if row["token"] == " John")
    exact = interp.patch_grid(smollm2, clean, corrupt, mary, layers=[0, 12, 24, 29])
    restored = exact.normalised
    assert restored[:2, subject].min() > 0.7
    assert restored[2:, subject].abs().max() < 0.3
    assert restored[2:, -1].min() > 0.7
    assert restored[:2, -1].abs().max() < 0.3
    assert restored[:, 0].abs().max() < 1e-3
    assert exact.tokens[subject] == " John/ Mary"
    heads = interp.attribution_patching(smollm2, clean, corrupt, mary, sites="z", by=("layer", "head"), audit=16)
    assert heads.audit["correlation"] > 0.8
    direct = interp.path_patch(smollm2, mary, clean, corrupt, direction="denoise")
    assert direct.values.shape == (30, 9)
    assert int(direct.effects.max(1).values.argmax()) >= 12
