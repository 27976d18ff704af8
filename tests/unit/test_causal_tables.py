"""The tables of the page on causal abstraction: the paper's numbers beside ours, part by part."""

from dataclasses import replace

import pytest

from interp.causal import mlp
from interp.saving import load_result, save_result
from tests.apps.test_run_alignments import sweep_of
from tests.tables import causal, networks, paper
from tests.tables.causal import TABLES, Tables, compute, ours, write_page


@pytest.fixture
def tables(tmp_path):
    return Tables(tmp_path / "tables", seeds=2, steps=4, pairs=300, tests=200)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "images").mkdir()
    found = tmp_path / "page.md"
    found.write_text("text\n" + "".join(f"<!-- {n} -->\n<!-- end of {n} -->\nbetween\n" for n in TABLES))
    return found


def test_the_page_names_what_was_not_run_and_keeps_what_stands_around_the_tables(tables, page):
    write_page(page, tables)
    first = page.read_text()
    assert first.startswith("text\n")
    assert first.count("between") == len(TABLES)
    assert (
        "| equality, both | orthogonal | 84.2 ± 8.2 / not run | 61.4 ± 8.6 / not run | 49.8 ± 0.5 / not run |" in first
    )
    assert "invertible linear (not in the paper) | - / not run" in first
    assert "| neurons, greedy search | 69.1 ± 12 / not run" in first
    assert first.count("2 seeds") == first.count("300 pairs, 4 steps of 256 pairs") == len(TABLES)
    write_page(page, tables)
    assert page.read_text() == first


def test_a_number_stands_beside_its_interval_and_untrained_networks():
    found = sweep_of()
    for row in found.rows:
        row["plain"] = 0.6 + 0.2 * row["seed"]
    low, high = causal.between([60.0, 80.0])
    assert ours(found, "plain", "block1") == f"**70.0** [{low:.1f}, {high:.1f}] (N₀ 50.0)"
    found.rows[0]["random trained"] = False
    assert ours(found, "plain", "block1").endswith("(N₀ 50.0, 1 of 2 trained)")


def test_every_published_number_has_its_place():
    assert {a for a, _ in paper.HEADLINE} == set(causal.TITLES)
    assert {m for _, m in paper.HEADLINE} <= set(causal.NAMES)
    assert all(len(cells) == 3 for cells in [*paper.HEADLINE.values(), *paper.HIDDEN.values()])
    assert set(paper.HIDDEN) == set(causal.HIDDEN)
    assert all(len(cells) == 2 for cells in paper.PROGRESSION.values())


@pytest.mark.slow
def test_parts_are_kept_and_not_computed_again(tables, page, monkeypatch):
    calls = []

    def quick(task, seeds, **options):
        calls.append(task.name)
        return [mlp(task, seed=seed) for seed in seeds], None

    monkeypatch.setattr(networks, "train_mlps", quick)
    monkeypatch.setattr(networks.fitted, "__defaults__", (2, 100))
    tables.folder.mkdir()
    write_page(page, tables)
    before = page.read_text().count("not run")
    compute(tables, page, ["both", "fitted and_or and_or"])
    assert calls == ["hierarchical equality"]
    assert set(tables.done()) == {"both", "fitted and_or and_or"}
    assert page.read_text().count("not run") == before - 4 * 3 - 4
    assert len(tables.neurons("left").rows) == 3 * 2
    marked = replace(load_result(tables.file("both")), budget="marked")
    save_result(marked, tables.file("both"))
    compute(tables, page, ["both"])
    assert tables.done()["both"].budget == "marked"
    tables.file("both").with_suffix(".json").unlink()
    compute(tables, page, ["both"])
    assert calls == ["hierarchical equality"]
    save_result(tables.done()["both"], tables.file("hidden"))
    causal.write_picture(page.parent / "images" / "frontier.png", tables)
    assert (page.parent / "images" / "frontier.png").read_bytes().startswith(b"\x89PNG")
