"""Make the pictures in docs/explorer/ on the packaged models: python -m tests.apps.explorer_screenshots [NAME ...].

The page Alignment shows the newest run of ``interp run tutorials/specs/alignments.yaml`` in ./runs.
"""

import io
import shutil
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.apps.conftest import CHROMIUM, FLAGS
from tests.apps.serving import serving, settled

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "explorer"
_MOST_BYTES, _UPPER = 300_000, 1590
PATH = "L0MLP -> L23H3@9 -> logits@13"
SHOTS = {
    "prompt": ({"layer": "23", "head": "3"}, ["Patch"]),
    "observables": ({"page": "Observables", "layer": "23", "head": "3", "path": PATH}, []),
    "tokens": ({"page": "Linear map"}, ["Estimate norms"]),
    "classes": (
        {"page": "Linear map", "input": "picture", "against": "bell cote, bell cot"}, [],
    ),
    "pixels": (
        {"page": "Linear map", "input": "picture", "image_model": "esrgan-slim-x2", "pixel": "20,22"},
        ["Compute six"],
    ),
    "jacobians": ({"page": "Jacobians", "layer": "6"}, ["Compute 8", "Compute the Jacobians", "Fit a lens"]),
    "alignment": ({"page": "Alignment", "example": "3"}, []),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Write the pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = next(filter(None, map(shutil.which, CHROMIUM)))
    with serving() as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        for name in names or SHOTS:
            fields, buttons = SHOTS[name]
            if name == "alignment":
                fields = fields | {"run": max(Path("runs").glob("alignment_sweep-*")).name}
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            print(name, flush=True)
            page.goto(f"{address}/?{urlencode(fields)}")
            settled(page, 600, calm_for=10)
            for button in buttons:
                page.get_by_role("button", name=button).first.click()
                page.wait_for_timeout(1500)
                settled(page, 600, calm_for=10)
            height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
            page.set_viewport_size({"width": 1440, "height": int(height) + 10})
            page.wait_for_timeout(1000)
            _write(page.screenshot(animations="disabled"), name)
            page.close()
        browser.close()


def _write(png: bytes, name: str) -> None:
    """Write a picture, and for the README the upper part of one."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    _save(image, FOLDER / f"{name}.png")
    if name == "observables":
        _save(image.crop((0, 0, image.width, _UPPER)), FOLDER / "heads.png")


def _save(image: Image.Image, path: Path) -> None:
    """Write a picture; of fewer colours where it would be large."""
    made = io.BytesIO()
    image.save(made, "PNG", optimize=True)
    if made.tell() > _MOST_BYTES:
        made = io.BytesIO()
        image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    path.write_bytes(made.getvalue())


if __name__ == "__main__":
    main(sys.argv[1:])
