"""The table of indirect objects in docs/causal_abstraction.md: a trained model and untrained ones, three tests.

    make tables

Each row is kept in the folder and not computed again.
"""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

import interp
from interp.causal import Alignment, Partition, Training, build_map, indirect_object_splits, untrained
from interp.hooks.model import Model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "causal_abstraction.md"
MAPS = {
    "low rank, 16": ({"kind": "low_rank", "rank": 16}, 16),
    "RevNet 8x64, half": ({"kind": "revnet", "blocks": 8, "hidden": 64}, None),
}
TESTS = {"test": "new prompts", "names": "unseen names", "frames": "unseen frames"}
PAIRS, HELD_OUT, PROMPTS = 2000, 300, 150


@cache
def networks() -> dict[str, tuple[Model, str]]:
    """Networks by name, each with its site."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    trained = interp.load("smollm2-135m")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=trained.module.config.vocab_size, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    pythia = interp.attach(GPTNeoXForCausalLM(config).eval(), tokenizer=trained.tokenizer)
    return {
        "SmolLM2-135M": (trained, "blocks.20.hook_resid_post@last"),
        "SmolLM2-135M, untrained": (untrained(trained, 0), "blocks.20.hook_resid_post@last"),
        "of Pythia-31M's shape, untrained": (pythia, "blocks.3.hook_resid_post@last"),
    }


def row(name: str, kind: str, steps: int) -> dict[str, Any]:
    """Train one map on one network and score it on all tests."""
    model, site = networks()[name]
    splits = indirect_object_splits(model, PAIRS, HELD_OUT, HELD_OUT, prompts=PROMPTS)
    spec, size = MAPS[kind]
    width = model.bindings.sizes["d_model"]  # type: ignore[union-attr]
    (variable,) = splits.train.variables
    found = Alignment(
        model, splits.train.causal_model, site, build_map(spec, width), Partition({variable: size or width // 2})
    )
    fit = found.fit(splits, training=Training(lr=1e-3, batch_size=32, steps=steps, patience=100, decay="linear"))
    report = found.evaluate(splits, controls=(), measure=False)
    made = {
        "network": name,
        "map": kind,
        "steps": steps,
        "trained": fit.trained,
        "right": report.scores[0].model_accuracy,
    }
    for score in report.scores:
        made[score.split] = [score.headline.estimate, score.headline.low, score.headline.high]
    return made


def compute(folder: Path, steps: int) -> list[dict[str, Any]]:
    """All rows; those in the folder are read."""
    found = []
    for name in ("SmolLM2-135M", "SmolLM2-135M, untrained", "of Pythia-31M's shape, untrained"):
        for kind in MAPS:
            file = folder / f"{name}-{kind}-{steps}.json".replace(" ", "-").replace(",", "")
            if not file.is_file():
                made = json.dumps(row(name, kind, steps))
                file.write_text(made)
            found.append(json.loads(file.read_text()))
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the page."""
    lines = [f"| network | its own accuracy | map | {' | '.join(TESTS.values())} |", "|---|---|---|---|---|---|"]
    for r in rows:
        cell = lambda split, r=r: "**{:.1f}** [{:.1f}, {:.1f}]".format(*(100 * v for v in r[split]))
        label = "" if r["trained"] else " (not trained)"
        lines.append(
            f"| {r['network']} | {100 * r['right']:.0f} | {r['map']}{label} | {' | '.join(map(cell, TESTS))} |"
        )
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "tables" / "indirect")
    parser.add_argument("--steps", type=int, default=80)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = compute(given.folder, given.steps)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split("<!-- indirect -->\n")
    behind = rest.split("<!-- end of indirect -->")[1]
    budget = (
        f"One seed, {PAIRS:,} pairs of {PROMPTS} prompts, {given.steps} steps of 32 pairs, lr 0.001, linear decay; "
        f"{HELD_OUT} pairs in each test, the better of the two names. Intervals are over pairs."
    )
    made = "\n".join([budget, "", *table(rows), ""])
    PAGE.write_text(f"{before}<!-- indirect -->\n{made}<!-- end of indirect -->{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
