"""What would make an alignment's numbers silently wrong: it is refused, or cannot happen."""

import pytest
import torch

import interp
from interp.causal import (
    Alignment,
    CausalAbstractionWarning,
    CausalModel,
    IdentityMap,
    InterchangeDataset,
    InvertibleMap,
    OrthogonalMap,
    Partition,
    Pool,
    RevNetMap,
    Training,
    distributive_law,
    greedy_neurons,
    hierarchical_equality,
    load_alignment,
    mlp,
    save_alignment,
    sweep,
)
from interp.causal.complexity import sizes
from interp.causal.flexible_maps import BoundlessMap
from interp.causal.lanes import Lanes, cross_entropy
from interp.causal.report import Control
from interp.causal.scoring import score_lanes
from interp.causal.stages import HookStage, cut
from interp.hooks.errors import ArgumentError, DegenerateDataError, ShapeMismatchError, UnmatchedVariableError
from interp.runs.alignment_specs import AlignmentSweepSpec, PairsSpec

TASK = hierarchical_equality("both")
SPLITS = TASK.splits(300, 120, 100)
MODEL = interp.attach(mlp(TASK, seed=0))
SHORT = Training(steps=3, batch_size=50)
pytestmark = pytest.mark.filterwarnings("ignore::interp.causal.report.CausalAbstractionWarning")


def align(tau, sites="block1", sizes=(8, 8)):
    return Alignment(MODEL, TASK.causal_model, sites, tau, Partition(dict(zip(("v1", "v2"), sizes, strict=True))))


@pytest.mark.parametrize("split", ["train", "test", "mine"])
def test_labels_are_permuted_where_a_lane_is_fitted_whatever_its_split_is_called(split):
    data, lane = TASK.sample(200, seed=1, split=split), align(OrthogonalMap(16)).lane
    lane.shuffle = 7
    assert torch.equal(Lanes([lane], data, fitting=True).labels[0], data.shuffled(7).labels)
    assert torch.equal(Lanes([lane], data).labels[0], data.labels)


def test_a_shuffled_lane_is_scored_on_true_labels_of_validation_pairs():
    plain, shuffled = align(IdentityMap(16)).lane, align(IdentityMap(16)).lane
    shuffled.shuffle = 7
    one, other = score_lanes([plain, shuffled], SPLITS.validation)
    assert one.plain == other.plain


def test_losses_of_a_network_in_low_precision_are_taken_in_float32():
    logits, targets = torch.randn(1, 4000, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4000).long()
    low = logits.bfloat16()
    found = cross_entropy(low, targets)
    assert found.dtype == torch.float32
    wanted = torch.nn.functional.cross_entropy(low[0].double(), targets[0])
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_a_map_that_was_trained_twice_has_controls_with_the_steps_of_both():
    found = align(OrthogonalMap(16))
    found.fit(SPLITS, training=SHORT)
    found.fit(SPLITS, training=Training(steps=4, batch_size=50))
    assert found.training.steps == 7


def test_an_alignment_that_was_loaded_has_trained_controls_or_none(tmp_path):
    found = align(OrthogonalMap(16))
    found.fit(SPLITS, training=Training(steps=20, batch_size=50, lr=1e-2))
    save_alignment(found, tmp_path / "map")
    again = load_alignment(tmp_path / "map", MODEL, TASK.causal_model)
    with pytest.raises(ArgumentError, match="without the pairs"):
        again.evaluate(SPLITS.test)
    reports = [one.evaluate(SPLITS, seeds=1, restarts=1, measure=False) for one in (found, again)]
    assert reports[0].controls == reports[1].controls


def test_neurons_that_were_loaded_are_not_compared_with_neurons_that_were_not_searched_for(tmp_path):
    save_alignment(greedy_neurons(MODEL, TASK.causal_model, "block1", SPLITS.validation, most=1), tmp_path / "map")
    with pytest.raises(ArgumentError, match="greedy_neurons"):
        load_alignment(tmp_path / "map", MODEL, TASK.causal_model).evaluate(SPLITS)


def test_empty_interventions_are_not_counted_twice():
    data = TASK.sample(300, seed=4, interventions=[[], ["v1"], ["v2"]])
    network = mlp(TASK, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    blocks = Partition({"v1": 8, "v2": 8})
    lane = Alignment(interp.attach(network), TASK.causal_model, "block1", IdentityMap(16), blocks).lane
    score = score_lanes([lane], data)[0]
    assert score.plain != score.model_accuracy
    assert score.with_empty == score.plain


def test_sizes_of_a_map_that_learns_its_blocks_are_those_it_learned():
    tau = BoundlessMap(16, variables=1)
    with torch.no_grad():
        tau.boundary.fill_(3 / 16)
    found = sizes(tau, torch.ones(1, 16, dtype=torch.bool))
    assert found["aligned"] == 3
    assert found["effective dimension"] == (16**2 - 3**2 - 13**2) / 2
    assert tau.training


def test_the_sites_widths_are_read_once():
    stage, calls = cut(MODEL, ["block1", "block2"], SPLITS.test.pool, cache=False), []
    assert isinstance(stage, HookStage)
    capture = MODEL.capture
    MODEL.capture = lambda *a: calls.append(1) or capture(*a)
    try:
        for _ in range(3):
            stage.logits(stage.acts[:2], torch.arange(2))
    finally:
        del MODEL.capture
    assert len(calls) == 1


class _Never(RevNetMap):
    """Fails as soon as an arm is trained with it."""

    def parts(self):
        raise AssertionError("work was done before the refusal")


def shared_answers():
    task = hierarchical_equality("left")
    pool = task.pool(task.draw(10, torch.Generator().manual_seed(0)))
    pool = Pool(pool.inputs, pool.settings, {}, torch.zeros(10, 2, dtype=torch.int64))
    rows = torch.arange(10)
    data = InterchangeDataset.pair(task.causal_model, pool, rows, rows[:, None], torch.ones(10, 1, dtype=torch.bool))
    Alignment(MODEL, task.causal_model, "block1", IdentityMap(16), Partition({"v1": 8})).evaluate(data, controls=())


def pair(base, sources, pool=SPLITS.test.pool):
    chosen = torch.ones(1, 2, dtype=torch.bool)
    return InterchangeDataset.pair(TASK.causal_model, pool, torch.tensor([base]), torch.tensor([sources]), chosen)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: align(_Never(16)).evaluate(SPLITS.test, controls=("wrong_algorithm",)), ArgumentError, "wrong="),
        (lambda: align(_Never(16)).evaluate(SPLITS.test, by=["names"]), ArgumentError, "names"),
        (lambda: align(_Never(16)).evaluate(SPLITS.test, seeds=0), ArgumentError, "seeds=0"),
        (lambda: align(RevNetMap(16)).evaluate(TASK.sample(9, seed=8)), DegenerateDataError, "measure=False"),
        (lambda: align(BoundlessMap(16, variables=2)).evaluate(SPLITS.test, controls=("permuted",)),
         ArgumentError, "learns"),
        (lambda: sweep(MODEL, SPLITS, ["block1"], [{"kind": "boundless", "variables": 2}], sizes=[2], permuted=True),
         ArgumentError, "learns"),
        (lambda: sweep(MODEL, TASK.splits(100, 50, 9), ["block1"], ["revnet"], sizes=[2]),
         DegenerateDataError, "at least 64"),
        (lambda: align(OrthogonalMap(16)).fit(SPLITS.train, SPLITS.train), DegenerateDataError, "in both"),
        (lambda: align(IdentityMap(32), ["block1", "block1"]).evaluate(SPLITS.test),
         ShapeMismatchError, "different sites"),
        (lambda: pair(-1, [0, 1]), ShapeMismatchError, "-1"),
        (lambda: pair(0, [0, 10_000]), ShapeMismatchError, "10000"),
        (lambda: pair(0, [0, 1], Pool(torch.rand(3, 16), {})), UnmatchedVariableError, "x1"),
        (lambda: Pool(torch.rand(3, 16), {"x1": torch.rand(4)}), ShapeMismatchError, "3 inputs"),
        (shared_answers, DegenerateDataError, "one token"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_pairs_that_were_trained_on_are_not_reported_under_another_name():
    found = align(OrthogonalMap(16))
    found.fit(SPLITS, training=SHORT)
    with pytest.raises(DegenerateDataError, match="in both train and held out"):
        found.evaluate(SPLITS.train.take(torch.arange(100), split="held out"), controls=())


def test_pairs_of_another_algorithm_with_the_same_variables_are_refused():
    law = [distributive_law(name) for name in ("and_or", "and_or_and")]
    found = Alignment(
        interp.attach(mlp(law[0])), law[0].causal_model, "block1", IdentityMap(24), Partition({"v1": 2, "v2": 2})
    )
    with pytest.raises(UnmatchedVariableError, match="and-or-and"):
        found.evaluate(law[1].sample(50, seed=0), controls=())


def test_sources_that_depend_on_their_bases_are_not_joined_by_number():
    with pytest.raises(ArgumentError, match="depend on their bases"):
        hierarchical_equality("first_argument").sample(50, seed=0, inputs=20)


def test_all_maps_of_permuted_labels_count():
    values, trained = [0.5, 0.7], [True, False]
    assert Control("shuffle", values, trained, "").value == 0.6
    assert Control("random_model", values, trained, "").value == 0.5


def test_one_candidate_for_each_label():
    pool = SPLITS.test.pool
    three = CausalModel(
        TASK.causal_model.inputs, {"v1": (["x1", "x2"], lambda a, b: (a == b).all(-1))},
        (["v1"], lambda v: v.long() * 2), labels=3,
    )  # fmt: skip
    pool = Pool(
        pool.inputs, three.run({i: pool.settings[i] for i in three.inputs}), {}, torch.arange(2).expand(len(pool), -1)
    )
    rows = torch.arange(20)
    data = InterchangeDataset.pair(three, pool, rows, rows[:, None].flip(0), torch.ones(20, 1, dtype=torch.bool))
    lane = Alignment(MODEL, three, "block1", IdentityMap(16), Partition({"v1": 8})).lane
    with pytest.raises(UnmatchedVariableError, match="2 candidates"):
        Lanes([lane], data)


def test_a_matrix_that_is_nearly_singular_is_said():
    found = align(InvertibleMap(16, dtype=torch.float64))
    with torch.no_grad():
        found.tau.weight.copy_(torch.diag(torch.tensor([1e-5] + [1.0] * 15, dtype=torch.float64)))
    with pytest.warns(CausalAbstractionWarning, match="condition number"):
        found.fit(SPLITS, training=Training(steps=1, batch_size=50, lr=1e-9))


@pytest.mark.parametrize("work", [
    lambda wrong: align(_Never(16)).evaluate(SPLITS.test, controls=("random_model", "wrong_algorithm"), wrong=wrong),
    lambda wrong: sweep(MODEL, SPLITS, ["block1"], ["orthogonal"], sizes=[2], wrong=wrong, progress=_refuse_progress),
])  # fmt: skip
def test_a_wrong_algorithm_that_is_no_control_is_refused_before_any_arm_is_trained(work):
    with pytest.raises(ShapeMismatchError, match="2 variables"):
        work(hierarchical_equality("left").causal_model)


def _refuse_progress(line):
    raise AssertionError(line)


def test_a_run_whose_map_cannot_be_measured_is_refused_before_networks_are_trained():
    spec = AlignmentSweepSpec(
        task="distributive_law", algorithm="and_or", sites=("block1",), maps=("revnet",),
        sizes=(2,), pairs=PairsSpec(test=30),
    )  # fmt: skip
    with pytest.raises(DegenerateDataError, match="activations of width 24"):
        spec.prepare(_refuse_progress)
