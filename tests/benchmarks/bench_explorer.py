"""Page loads and interactions of the explorer on SmolLM2-135M in Chromium, model loaded beforehand.

    python -m tests.benchmarks.bench_explorer

Writes docs/benchmarks/explorer.md.
"""

import os
import platform
import shutil
import time
from pathlib import Path
from urllib.parse import urlencode

import torch
from playwright.sync_api import sync_playwright

from tests.apps.conftest import CHROMIUM, FLAGS
from tests.apps.serving import serving, settled

FIGURE = "[data-testid=stVegaLiteChart] .marks"
LONG = "The quick brown fox jumps over the lazy dog while Mary and John go to the store. " * 40
# 512 tokens of SmolLM2's.
PAGES = {
    "Prompt, 14 tokens": {},
    "Prompt, about 500 tokens": {"prompt": LONG[:2300]},
    "Observables": {"page": "Observables", "path": "L23H3@9 -> logits@13"},
    "Linear map, text": {"page": "Linear map"},
    "Linear map, classes": {"page": "Linear map", "input": "picture"},
}


def loads(browser, address: str) -> list[tuple[str, float, float]]:
    """Seconds to the first figure and to the last one, for each page in a session of its own."""
    found, context = [], browser.new_context(viewport={"width": 1440, "height": 1400})
    warm = context.new_page()  # The page's own scripts are in the browser's cache from then on.
    warm.goto(address)
    settled(warm, 600)
    warm.close()
    for name, fields in PAGES.items():
        page = context.new_page()
        start = time.perf_counter()
        page.goto(f"{address}/?{urlencode(fields)}")
        page.wait_for_selector(FIGURE, timeout=300_000)
        first = time.perf_counter() - start
        settled(page, 600)
        found.append((name, first, time.perf_counter() - start - 1.0))
        print(*found[-1], flush=True)
        page.close()
    return found


def interactions(browser, address: str) -> list[tuple[str, float]]:
    """Seconds from a click to the page as it is then."""
    page = browser.new_page(viewport={"width": 1440, "height": 1400})
    page.goto(address)
    settled(page, 600)
    found = []
    clicks = (
        ("another token: new tokens and lens column", "␣Mary", 1), ("a third token", "␣and", 2),
        ("the first of these again: remembered", "␣Mary", 1),
    )  # fmt: skip
    for name, token, position in clicks:
        start = time.perf_counter()
        page.get_by_text(token, exact=True).first.click()
        page.wait_for_function("p => location.href.includes('position=' + p)", arg=str(position))
        settled(page, 600)
        found.append((name, time.perf_counter() - start - 1.0))
    page.close()
    return found


def main() -> None:
    """Measure, and write the page."""
    path = next(filter(None, map(shutil.which, CHROMIUM)))
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with serving(OMP_NUM_THREADS=threads) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        pages, clicks = loads(browser, address), interactions(browser, address)
        browser.close()
    load = os.getloadavg()[0]
    lines = [
        "# Times of the explorer", "",
        f"`python -m tests.benchmarks.bench_explorer` on SmolLM2-135M, float32, {platform.machine()} CPU with "
        f"{os.cpu_count()} cores, {threads} threads, load {load:.1f} (other work beside it), headless Chromium on "
        "the same cores, model loaded and scripts cached beforehand; a page's times begin at its address. One run.",
        "", "| page | first figure, s | all figures, s |", "|---|---|---|",
        *(f"| {name} | {first:.1f} | {last:.1f} |" for name, first, last in pages),
        "", "| interaction | s |", "|---|---|", *(f"| {name} | {seconds:.1f} |" for name, seconds in clicks), "",
    ]  # fmt: skip
    (Path(__file__).parents[2] / "docs" / "benchmarks" / "explorer.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
