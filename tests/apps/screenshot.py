"""Make the README's picture from a run: python -m tests.apps.screenshot RUN docs/demo.png (needs Chromium)."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from interp.apps.report import write_report
from interp.runs.run import Run
from tests.apps.conftest import CHROMIUM, FLAGS

# Two figures of the report side by side, under their headings; the rest is put away.
ARRANGE = """
() => {
  const side = (section, figure, width) => {
    const box = document.createElement("div");
    box.style.width = width;
    const heading = document.querySelector(`#${section} h2`);
    heading.style.fontSize = "19px";
    box.append(heading, document.querySelector(`[data-figure='${figure}']`).closest("figure"));
    return box;
  };
  const frame = document.createElement("div");
  frame.id = "frame";
  frame.style.cssText = "display:flex;gap:40px;width:max-content;padding:18px 22px;background:white";
  frame.append(side("prompt-1", "prompt-1-attribution", "1010px"), side("image", "image-votes", "470px"));
  document.body.append(frame);
  document.querySelectorAll("figcaption, .vega-embed details").forEach(e => e.remove());
  document.querySelectorAll("header, section").forEach(e => (e.style.display = "none"));
}
"""


def main(run: str, picture: str) -> None:
    """Write the picture."""
    report = write_report(Run.open(run))
    path = next(filter(None, map(shutil.which, CHROMIUM)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("body[data-drawn=yes]")
        page.evaluate(ARRANGE)
        page.locator("#frame").screenshot(path=Path(picture))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
