"""MP+ on real data: a small vision transformer that knows the digits 0 to 4 is adapted to 5 to 9."""

import pytest
import torch
from torch import nn

import interp
from interp.hooks.errors import NotCachedError
from interp.probes import LogisticProbe, MomentHead, MomentProbe, PSRPAdapter, train_adapter
from tests.conftest import missing

pytestmark = pytest.mark.slow
WIDTH = 64


@pytest.fixture(scope="module")
def digits():
    try:
        return interp.labelled_images("digits")
    except NotCachedError as error:
        missing(f"digits: {error}")


def parts(digits, wanted, train, test):
    """Shuffled training and test parts of some digits, labels from 0."""
    keep = ((digits.labels >= wanted[0]) & (digits.labels <= wanted[-1])).nonzero().flatten()
    rows = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))][: train + test]
    return [(digits.images[r] - 0.13, digits.labels[r] - wanted[0]) for r in (rows[:train], rows[train:])]


def batches(x, y, size=64):
    def each():
        order = torch.randperm(len(y))
        return [({"pixel_values": x[rows]}, y[rows]) for rows in order.split(size)]

    return each


def knows_0_to_4(digits):
    """A vision transformer of three blocks, trained on 3,000 digits from 0 to 4."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=28,
                  patch_size=7, num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        add_pooling_layer=False,
    )  # fmt: skip
    head = nn.Linear(WIDTH, 5)
    (x, y), (x_test, y_test) = parts(digits, range(5), 2500, 500)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(6):
        for inputs, labels in batches(x, y)():
            loss = nn.functional.cross_entropy(head(model(**inputs).last_hidden_state[:, 0]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = head(model(x_test).last_hidden_state[:, 0]).argmax(1) == y_test
    assert right.float().mean() > 0.93
    return model


def test_an_adapted_transformer_learns_digits_that_it_did_not_know(digits):
    """Rates of MP and MP+ were chosen on 600 of the 3,000 training images, the others being trained on."""
    model = knows_0_to_4(digits)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (x, y), (x_test, y_test) = parts(digits, range(5, 10), 3000, 1000)
    with torch.no_grad():
        tokens, tokens_test = (model(part).last_hidden_state for part in (x, x_test))
    accuracy = {"LP": LogisticProbe(0.1).fit(tokens[:, 0], y).score(tokens_test[:, 0], y_test)}
    frozen = MomentProbe(hidden=64, first="cls", batch_size=64, lr=2e-3).fit(tokens, y)
    accuracy["MP"] = frozen.score(tokens_test, y_test)
    torch.manual_seed(1)
    head = MomentHead(WIDTH, 5, hidden=64, first="cls", combine="sum")
    with PSRPAdapter.wrap(model, rank=16) as adapter:
        with torch.no_grad():
            torch.testing.assert_close(adapter(x_test).last_hidden_state, tokens_test, rtol=0, atol=0)
        losses = train_adapter(adapter, head, lambda out: (out.last_hidden_state,), batches(x, y), epochs=20, lr=1e-2)
        with torch.no_grad():
            found = head(adapter(x_test).last_hidden_state).argmax(1)
    accuracy["MP+"] = float((found == y_test).float().mean())
    assert losses[-1] < losses[0] / 3
    print(accuracy)
    assert accuracy["LP"] > 0.5
    assert accuracy["MP+"] > accuracy["MP"] + 0.02
    assert accuracy["MP+"] > accuracy["LP"] + 0.06
    assert accuracy["MP"] > accuracy["LP"] + 0.03
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
