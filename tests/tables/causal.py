"""The tables of docs/causal_abstraction.md: the paper's numbers beside ours, at a budget that is named.

    make tables                                    three seeds, the reduced budget
    make tables SEEDS=10 STEPS=4000                longer

What is finished is kept in the folder and not computed again; the page is written after every part.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import interp
from interp.causal import AlignmentSweep, Training, greedy_neurons, sweep, untrained
from interp.saving import load_result, save_result
from tests.tables import paper
from tests.tables.networks import fitted, halfway, task_of, trained

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "causal_abstraction.md"
TITLES = {
    "both": "equality, both", "left": "equality, left", "first_argument": "equality, first argument",
    "and_or": "law, and-or", "and_or_and": "law, and-or-and",
}  # fmt: skip
NAMES = {
    "search": "neurons, greedy search", "neurons": "neurons, halves as they come", "orthogonal": "orthogonal",
    "invertible": "invertible linear (not in the paper)", "revnet": "RevNet, 10 blocks",
}  # fmt: skip
STATES = ("untrained", "a quarter", "trained")
HIDDEN = (1, 2, 4, 8, 16)
SEARCHED = 1000  # pairs that choose neurons


@dataclass(frozen=True)
class Tables:
    """A folder, and the budget of every number.

    Attributes:
        folder: Where networks, cells and finished parts are.
        seeds: How many: of networks, maps and controls.
        steps: Of every map.
        pairs: To train on.
        tests: To score on.
    """

    folder: Path
    seeds: int = 3
    steps: int = 800
    pairs: int = 128_000
    tests: int = 10_000

    @property
    def numbers(self) -> list[int]:
        """The seeds."""
        return list(range(self.seeds))

    @property
    def training(self) -> Training:
        """How every map is trained."""
        return Training(lr=5e-3, batch_size=256, steps=self.steps, patience=100, decay="linear")

    def run(self, networks: Sequence[nn.Sequential], algorithm: str, blocks: Sequence[int], maps: dict[str, Any]):
        """Sweep over maps and blocks, half of the coordinates for each variable."""
        task = task_of(algorithm)
        size = task.width // 2  # type: ignore[operator]
        data = task.splits(self.pairs, 2000, self.tests, seed=5)
        return sweep(
            [interp.attach(n) for n in networks], data, [f"block{b}" for b in blocks], maps, sizes=[size],
            seeds=self.numbers, training=self.training, restarts=1, measure=False, path=self.folder / "cells", lanes=27,
        )  # fmt: skip

    def headline(self, algorithm: str) -> AlignmentSweep:
        """All maps at all blocks of networks that solve the task."""
        networks = trained(self.folder / "networks", algorithm, self.numbers)
        return self.run(networks, algorithm, (1, 2, 3), maps_for(algorithm))

    def neurons(self, algorithm: str) -> AlignmentSweep:
        """Neurons that a greedy search finds on validation pairs, beside searches on untrained networks."""
        task, rows = task_of(algorithm), []
        data = task.splits(100, SEARCHED, self.tests, seed=5)
        networks = [interp.attach(n) for n in trained(self.folder / "networks", algorithm, self.numbers)]
        for block, (seed, network) in ((b, pair) for b in (1, 2, 3) for pair in enumerate(networks)):
            found = greedy_neurons(network, task.causal_model, f"block{block}", data)
            control = [untrained(network, 10_000 + seed)]
            report = found.evaluate(data, seeds=1, restarts=1, random_models=control, measure=False)
            (row,), random = report.scores[0].to_records(), report.controls["random_model"]
            rows.append(row | {
                "map": "search", "site": f"block{block}", "size": network.module[0][0].out_features // 2, "seed": seed,
                "iia": report.iia.estimate, "random": random.value, "random plain": random.value,
                "random trained": True, "shuffled": report.controls["shuffle"].value, "trained": True,
                "selectivity": report.selectivity, "validation loss": report.fit["validation_loss"],
                "random validation loss": report.fit["chance"],
            })  # fmt: skip
        budget = f"neurons up to half of all, chosen by {SEARCHED:,} pairs"
        return AlignmentSweep(rows, task.causal_model.name, list(task.variables), budget, "as many searches")

    def hidden(self) -> AlignmentSweep:
        """RevNets of one block."""
        networks = trained(self.folder / "networks", "both", self.numbers)
        maps = {f"revnet {m}": {"kind": "revnet", "blocks": 1, "hidden": m} for m in HIDDEN}
        return self.run(networks, "both", (1, 2, 3), maps)

    def progression(self, state: str) -> AlignmentSweep:
        """Networks on their way."""
        maps = {name: spec for name, spec in maps_for("both").items() if name != "neurons"}
        return self.run(halfway(self.folder / "networks", state, self.numbers), "both", (1, 3), maps)

    def fit(self, built: str, asked: str) -> AlignmentSweep:
        """Networks that were fitted to one algorithm, aligned with another."""
        return self.run(fitted(self.folder / "networks", built, self.numbers), asked, (2,), maps_for(asked))

    @property
    def parts(self) -> dict[str, Callable[[], AlignmentSweep]]:
        """What is computed, in this order."""
        found: dict[str, Callable[[], AlignmentSweep]] = {"both": lambda: self.headline("both"), "hidden": self.hidden}
        found["and_or_and"] = lambda: self.headline("and_or_and")
        for built, asked in (("and_or", "and_or"), ("and_or", "and_or_and"), ("and_or_and", "and_or_and"),
                             ("and_or_and", "and_or")):  # fmt: skip
            found[f"fitted {built} {asked}"] = lambda built=built, asked=asked: self.fit(built, asked)
        for state in STATES:
            found[f"progression {state}"] = lambda state=state: self.progression(state)
        for algorithm in ("and_or", "left", "first_argument"):
            found[algorithm] = lambda algorithm=algorithm: self.headline(algorithm)
        return found | {f"neurons {a}": lambda a=a: self.neurons(a) for a in TITLES}

    def file(self, part: str) -> Path:
        """Stem of a finished part's files."""
        return self.folder / f"{part} {self.seeds} {self.steps} {self.pairs}".replace(" ", "-")

    def done(self) -> dict[str, AlignmentSweep]:
        """The finished parts."""
        return {
            part: load_result(self.file(part)) for part in self.parts if self.file(part).with_suffix(".json").is_file()
        }


def maps_for(algorithm: str) -> dict[str, Any]:
    """The maps of the headline, by their name in the tables."""
    hidden = task_of(algorithm).width
    return {
        "neurons": "identity", "orthogonal": "orthogonal", "invertible": "invertible",
        "revnet": {"kind": "revnet", "blocks": 10, "hidden": hidden},
    }  # fmt: skip


# The page ---


def published(cell: paper.Cell | None) -> str:
    """A number of the paper."""
    if cell is None:
        return "-"
    return f"{cell[0]:g}" + (f" ± {cell[1]:g}" if cell[1] is not None else "")


def ours(found: AlignmentSweep | None, name: str, site: str) -> str:
    """Mean of the accuracy on all pairs with its interval over seeds, and that of untrained networks."""
    if found is None:
        return "not run"
    (row,) = [r for r in found.summary() if r["map"] == name and r["site"] == site]
    values = [100 * r["plain"] for r in found.rows if r["map"] == name and r["site"] == site]
    interval = f" [{', '.join(f'{v:.1f}' for v in between(values))}]" if len(values) > 1 else ""
    label = "" if row["random trained"] == row["seeds"] else f", {row['random trained']} of {row['seeds']} trained"
    return f"**{sum(values) / len(values):.1f}**{interval} (N₀ {100 * row['random plain']:.1f}{label})"


def between(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of per cents."""
    from interp.intervals import student

    found = student(values, bounds=(0.0, 100.0))
    return found.low, found.high


def budget(tables: Tables) -> str:
    """What stands above each table."""
    return (
        f"{tables.seeds} seeds (network, map and control together), {tables.pairs:,} pairs, {tables.training}, "
        f"linear decay; {tables.tests:,} test pairs. Paper: {paper.BUDGET}."
    )


def headline_table(done: dict[str, AlignmentSweep]) -> list[str]:
    """Algorithms by maps, three blocks."""
    lines = ["| algorithm | map | block 1 | block 2 | block 3 |", "|---|---|---|---|---|"]
    for algorithm, title in TITLES.items():
        for name, shown in NAMES.items():
            numbers = paper.HEADLINE.get((algorithm, name), [None] * 3)
            found = done.get(f"neurons {algorithm}" if name == "search" else algorithm)
            cells = [f"{published(n)} / {ours(found, name, f'block{b}')}" for b, n in enumerate(numbers, start=1)]
            lines.append(f"| {title}{guess(done.get(algorithm))} | {shown} | {' | '.join(cells)} |")
    return lines


def guess(found: AlignmentSweep | None) -> str:
    """What the best constant answer to each intervention reaches, where that is not half."""
    share = 0.5 if found is None else found.summary()[0]["best constant"]
    return f" (constant guess {100 * share:.1f})" if share > 0.52 else ""


def hidden_table(done: dict[str, AlignmentSweep]) -> list[str]:
    """RevNets of one block by hidden width."""
    lines = ["| hidden width | block 1 | block 2 | block 3 |", "|---|---|---|---|"]
    for m in HIDDEN:
        cells = [
            f"{published(paper.HIDDEN[m][b - 1])} / {ours(done.get('hidden'), f'revnet {m}', f'block{b}')}"
            for b in (1, 2, 3)
        ]
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return lines


def progression_table(done: dict[str, AlignmentSweep]) -> list[str]:
    """Maps by state of the network, blocks 1 and 3."""
    lines = ["| map | network | block 1 | block 3 |", "|---|---|---|---|"]
    for name in ("orthogonal", "invertible", "revnet"):
        for state in STATES:
            numbers = paper.PROGRESSION.get((name, state), [None, None])
            found = done.get(f"progression {state}")
            cells = [f"{published(n)} / {ours(found, name, f'block{b}')}" for n, b in zip(numbers, (1, 3), strict=True)]
            lines.append(f"| {NAMES[name]} | {state} | {' | '.join(cells)} |")
    return lines


def fitted_table(done: dict[str, AlignmentSweep]) -> list[str]:
    """Networks that hold an algorithm, aligned with it and with the other."""
    lines = ["| network fitted to | aligned with | map | block 2 |", "|---|---|---|---|"]
    for built in ("and_or_and", "and_or"):
        for asked in (built, "and_or" if built == "and_or_and" else "and_or_and"):
            for name, shown in list(NAMES.items())[1:]:
                number = published(paper.FITTED.get((built, asked, name)))
                cell = ours(done.get(f"fitted {built} {asked}"), name, "block2")
                lines.append(f"| {TITLES[built]} | {TITLES[asked]} | {shown} | {number} / {cell} |")
    return lines


TABLES = {
    "headline": headline_table, "hidden": hidden_table, "progression": progression_table, "fitted": fitted_table,
}  # fmt: skip


def write_page(page: Path, tables: Tables) -> None:
    """Put the tables between their marks; what stands around them stays."""
    text, done = page.read_text(encoding="utf-8"), tables.done()
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = before + start + "\n".join([budget(tables), "", *make(done), ""]) + end + rest.split(end)[1]
    page.write_text(text, encoding="utf-8")


def write_picture(file: Path, tables: Tables) -> None:
    """Draw the frontier of hierarchical equality, RevNets of one block among the maps, once both parts are there."""
    import vl_convert

    done = tables.done()
    if not {"both", "hidden"} <= set(done):
        return
    found = replace(done["both"], rows=[*done["both"].rows, *done["hidden"].rows])
    names = {"neurons": "neurons", "revnet": "RevNet 10x16"} | {f"revnet {m}": f"RevNet 1x{m}" for m in HIDDEN}
    for row in found.rows:
        row["map"] = names.get(row["map"], row["map"])
    file.write_bytes(vl_convert.vegalite_to_png(interp.chart(found).to_dict(), scale=1.2))


def compute(tables: Tables, page: Path | None = PAGE, parts: Sequence[str] = ()) -> None:
    """Compute what is missing, part by part, and write the page after each."""
    for part, make in tables.parts.items():
        if (parts and part not in parts) or tables.file(part).with_suffix(".json").is_file():
            continue
        began = time.perf_counter()
        found = make()
        save_result(found, tables.file(part))
        with open(tables.folder / "times.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, "seconds": time.perf_counter() - began}) + "\n")
        if page is not None:
            write_page(page, tables)
            write_picture(page.parent / "images" / "causal_frontier.png", tables)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "tables" / "causal")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--pairs", type=int, default=128_000)
    parser.add_argument("--parts", nargs="*", default=())
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    compute(Tables(given.folder, given.seeds, given.steps, given.pairs), parts=given.parts)


if __name__ == "__main__":
    main()
