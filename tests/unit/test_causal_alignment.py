"""Alignments of networks whose algorithm is known, because its weights were written by hand."""

from collections import OrderedDict

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import interp
from interp.causal import (
    Alignment,
    AlignmentReport,
    CausalAbstractionWarning,
    CausalModel,
    FixedMap,
    IdentityMap,
    LowRankMap,
    OrthogonalMap,
    Partition,
    Training,
    hierarchical_equality,
    load_alignment,
    mlp,
    save_alignment,
)  # fmt: skip
from interp.causal.maps import random_orthogonal
from interp.hooks.errors import (
    ArgumentError,
    DegenerateDataError,
    ShapeMismatchError,
    SiteNotFoundError,
    UncontrolledError,
    UnmatchedVariableError,
)  # fmt: skip
from interp.saving import load_result, save_result

TASK = hierarchical_equality("both")
BLOCKS = {"v1": [0, 1], "v2": [2, 3]}
NOT_A_CHOICE = (ArgumentError, TypeCheckError)  # where types are checked, as in these tests, they refuse it first
pytestmark = pytest.mark.filterwarnings("ignore::interp.causal.report.CausalAbstractionWarning")


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def written(turn=None):
    """x -> |x1 - x2|, |x3 - x4| -> whether they differ, in units 0, 1 and 2, 3 of ``found`` -> whether both agree.

    With a rotation, what ``found`` holds is turned, and turned back behind it.
    """
    apart = torch.zeros(16, 16)
    for pair in range(2):
        for i in range(4):
            for sign, row in ((1, 0), (-1, 4)):
                apart[8 * pair + row + i, 8 * pair + i], apart[8 * pair + row + i, 8 * pair + 4 + i] = sign, -sign
    total = torch.zeros(4, 16)
    total[:2, :8], total[2:, 8:] = 200, 200  # units k and k - 1 past a threshold: their difference is 0 or 1
    differ = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])
    turn = torch.eye(4) if turn is None else turn
    return nn.Sequential(OrderedDict(
        apart=nn.Sequential(linear(apart), nn.ReLU()),
        total=nn.Sequential(linear(total, torch.tensor([0.0, -1, 0, -1])), nn.ReLU()),
        flags=nn.Sequential(linear(differ.T @ differ / 2), nn.ReLU()), found=linear(turn),
        back=nn.Sequential(linear(turn.T), linear(2 * torch.tensor([[1.0, 0, -1, 0], [-1, 0, 1, 0]])), nn.ReLU()),
        head=linear(torch.tensor([[1.0, 1], [-1, -1]]), torch.tensor([0.0, 1])),
    )).eval()  # fmt: skip


def align(network, tau, site="found", partition=BLOCKS, **options):
    return Alignment(interp.attach(network), TASK.causal_model, site, tau, Partition(partition), **options)


@pytest.fixture(scope="module")
def splits():
    return TASK.splits(1500, 500, 500)


@pytest.fixture(scope="module")
def turned(splits):
    """A network that holds its variables in a rotated frame, and a rotation trained to find them."""
    turn = random_orthogonal(4, torch.Generator().manual_seed(5)).float()
    found = align(written(turn), OrthogonalMap(4, seed=1))
    found.fit(splits, training=Training(steps=600, batch_size=256, lr=1e-2))
    return turn, found


def test_the_written_network_solves_the_task(splits):
    pool = splits.test.pool
    assert torch.equal(written()(pool.inputs).argmax(1), pool.settings["output"])


def test_units_that_are_the_variables_align_and_exchanged_ones_do_not(splits):
    report = align(written(), IdentityMap(4)).evaluate(
        splits, controls=("random_model", "shuffle", "permuted"), seeds=2
    )
    assert report.scores[0].plain == 1.0
    assert report.scores[0].model_accuracy == 1.0
    assert report.controls["permuted"].value < 0.8
    assert report.iia.estimate == 1.0
    assert report.selectivity == pytest.approx(1.0 - report.controls["random_model"].value)


def test_a_rotated_frame_is_found_by_its_rotation_only(splits, turned):
    turn, trained = turned
    score = lambda tau: align(written(turn), tau).evaluate(splits, controls=(), measure=False).scores[0].plain
    assert score(FixedMap(4, turn)) == 1.0
    assert score(IdentityMap(4)) < 0.9
    assert trained.evaluate(splits, controls=(), measure=False).scores[0].plain > 0.97


def test_controls_of_a_trained_map_reach_little(splits, turned):
    _, trained = turned
    report = trained.evaluate(splits, seeds=2, restarts=2, controls=("random_model", "shuffle", "wrong_algorithm"),
                              wrong=wrong_algorithm())  # fmt: skip
    assert report.iia.estimate > 0.97
    assert report.controls["shuffle"].value < 0.75
    assert report.controls["wrong_algorithm"].value < report.iia.estimate - 0.1
    assert report.selectivity > 0.2
    assert "random N" in repr(report)
    assert "shuffled" in repr(report)
    assert f"selectivity {report.selectivity:+.2f}" in report.line


def wrong_algorithm():
    """The same inputs, but v1 says whether the first and third vector have the same sign at 0."""
    crossed = lambda x, y: (x[:, 0] > 0) == (y[:, 0] > 0)
    return CausalModel(
        ["x1", "x2", "x3", "x4"], {"v1": (["x1", "x3"], crossed), "v2": (["x2", "x4"], crossed)},
        (["v1", "v2"], lambda a, b: a == b), name="wrong",
    )  # fmt: skip


# What may not be read without controls ---


def test_an_accuracy_without_controls_is_not_shown(splits):
    report = align(written(), IdentityMap(4)).evaluate(splits, controls=())
    with pytest.raises(UncontrolledError, match=r"without random_model, shuffle.*controls="):
        _ = report.iia
    with pytest.raises(UncontrolledError):
        _ = report.selectivity
    assert "IIA withheld" in repr(report)
    assert "1.000 [" not in repr(report)
    assert not {"headline", "plain", "flip"} & set(report.to_records()[0])
    assert "headline" not in report._repr_html_()
    assert report.uncontrolled_iia.estimate == 1.0


def test_a_network_that_does_not_solve_the_task_is_named():
    with pytest.warns(CausalAbstractionWarning, match="the network is right on"):
        align(mlp(TASK), IdentityMap(16), "block1", {"v1": 8, "v2": 8}).evaluate(
            TASK.splits(200, 200, 200), controls=()
        )


# The way it is computed changes nothing ---


def test_keeping_the_lower_network_changes_nothing(splits):
    scores = [
        align(written(), FixedMap(4, seed=2), cache=cache).evaluate(splits, controls=()) for cache in (True, False)
    ]
    assert scores[0].scores[0] == scores[1].scores[0]


def test_a_swap_is_the_network_run_on_swapped_units(splits):
    network, data = written(), splits.test
    base, source = (TASK.pool({k: data.pool.settings[k][rows] for k in TASK.causal_model.inputs})
                    for rows in (torch.arange(20), torch.arange(20, 40)))  # fmt: skip
    found = align(network, IdentityMap(4)).intervene(base, source, ["v2"])
    upto, behind = network[:4], network[4:]
    h = upto(base.inputs)
    h[:, 2:] = upto(source.inputs)[:, 2:]
    torch.testing.assert_close(found, behind(h).detach())


def test_training_leaves_the_network_as_it_was(turned):
    turn, trained = turned
    module = trained.model.module
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    torch.testing.assert_close(module.state_dict(), written(turn).state_dict())


def test_a_low_rank_map_gets_as_far_as_an_orthogonal_one():
    task = hierarchical_equality("left")
    turn = random_orthogonal(64, torch.Generator().manual_seed(5)).float()[:, :4]  # four units, in 64 coordinates
    splits, losses = task.splits(600, 300, 300), []
    for tau in (OrthogonalMap(64, seed=1), LowRankMap(64, 2, seed=1)):
        found = Alignment(interp.attach(written(turn)), task.causal_model, "found", tau, Partition({"v1": 2}))
        losses.append(found.fit(splits, training=Training(steps=100, batch_size=64)).validation_loss)
    assert losses[1] < losses[0]


def test_the_same_seed_gives_the_same_map(splits):
    fits = []
    for _ in range(2):
        one = align(written(), OrthogonalMap(4, seed=3))
        one.fit(splits, training=Training(steps=40, batch_size=128))
        fits.append(one.tau(torch.eye(4)))
    assert torch.equal(*fits)


# Files ---


def test_a_saved_alignment_is_the_same_and_goes_on(turned, splits, tmp_path):
    turn, trained = turned
    save_alignment(trained, tmp_path / "map")
    found = load_alignment(tmp_path / "map", interp.attach(written(turn)), TASK.causal_model)
    scores = [a.evaluate(splits, controls=(), measure=False).scores[0] for a in (trained, found)]
    assert scores[0] == scores[1]
    assert found.training == trained.training
    assert found.result == trained.result
    found.fit(splits, training=Training(steps=30, batch_size=64, lr=1e-2))
    w = found.tau(torch.eye(4))
    torch.testing.assert_close(w @ w.mT, torch.eye(4), atol=1e-5, rtol=0)


def test_a_report_is_read_back_with_its_controls(splits, tmp_path):
    report = align(written(), IdentityMap(4)).evaluate(splits, seeds=1, restarts=1)
    save_result(report, tmp_path / "report")
    assert repr(load_result(tmp_path / "report")) == repr(report)


def test_a_wrong_algorithm_with_one_label_is_refused(splits):
    constant = CausalModel(
        ["x1", "x2", "x3", "x4"], {"v1": (["x1"], lambda x: x[:, 0] > 0), "v2": (["x2"], lambda x: x[:, 0] > 0)},
        (["v1", "v2"], lambda a, b: a & ~a), name="constant",
    )  # fmt: skip
    with pytest.raises(DegenerateDataError, match="constant"):
        align(written(), IdentityMap(4)).evaluate(splits, controls=("wrong_algorithm",), wrong=constant)


def test_a_saved_alignment_of_another_algorithm_is_refused(turned, tmp_path):
    save_alignment(turned[1], tmp_path / "map")
    with pytest.raises(UnmatchedVariableError, match=r"'left equality'.*both equalities"):
        load_alignment(tmp_path / "map", interp.attach(written()), hierarchical_equality("left").causal_model)
    save_result(splits_row(), tmp_path / "other")
    with pytest.raises(ArgumentError, match="Table"):
        load_alignment(tmp_path / "other", interp.attach(written()), TASK.causal_model)


def splits_row():
    from interp.hooks.table import Table

    return Table([{"a": 1}])


# Refusals ---


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda s: align(written(), IdentityMap(5)).evaluate(s), ShapeMismatchError, "width 4"),
    (lambda s: align(written(), IdentityMap(4), "nowhere").evaluate(s), SiteNotFoundError, "nowhere"),
    (lambda s: align(written(), IdentityMap(4), partition={"w": 2}), UnmatchedVariableError, "'w'"),
    (lambda s: align(written(), IdentityMap(4), partition={"v1": 2}).evaluate(s), UnmatchedVariableError, "v1, v2"),
    (lambda s: align(written(), IdentityMap(4)).evaluate(s.train, controls=()), DegenerateDataError, "training pairs"),
    (lambda s: align(written(), IdentityMap(4)).evaluate(s, controls=("coin",)), NOT_A_CHOICE, "coin"),
    (lambda s: align(written(), IdentityMap(4)).evaluate(s, controls=("wrong_algorithm",)), ArgumentError, "wrong="),
    (lambda s: align(written(), OrthogonalMap(4)).fit(s.train), DegenerateDataError, "no validation"),
    (lambda s: Training(steps=0), ArgumentError, "steps=0"),
])  # fmt: skip
def test_what_gives_no_number_is_refused(call, error, text, splits):
    with pytest.raises(error, match=text):
        call(splits)


def test_a_report_is_a_report(splits):
    assert isinstance(align(written(), IdentityMap(4)).evaluate(splits, controls=()), AlignmentReport)
