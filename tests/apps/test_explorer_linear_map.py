"""The explorer's page Linear map: tokens, classes, pictures, and files that are none."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import interp
from interp.apps.explorer import pictures
from interp.hooks.networks.images import RawPixels
from tests.apps.explorer_app import check_scripts
from tests.cases import perturb


class TinyPictures(nn.Module):
    """A picture in, one twice as large out."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 12, 3, padding=1)

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.last(self.first(x).relu()), 2)


@pytest.fixture
def images(explorer, monkeypatch, tmp_path):
    """An explorer whose image models are tiny, and whose pictures lie in a folder of their own."""
    plain = interp.load

    def load(name, **_):
        if name == "esrgan-slim-x2":
            torch.manual_seed(0)
            return interp.attach(perturb(TinyPictures()).eval(), preprocess=RawPixels(), identity={"name": name})
        return plain("tiny-eyes" if name == "efficientnet-lite0" else name)

    monkeypatch.setattr(interp, "load", load)
    monkeypatch.setattr(pictures, "folder", lambda: tmp_path)
    monkeypatch.setattr(pictures, "_SIDE", 12)
    return lambda **fields: explorer(page="Linear map", **fields)


def test_tokens_vote(images):
    app = images(target="John", foil="Mary").settle()
    assert app.titles == ["Which tokens vote", "What r is made of", "From each token to each position"]
    app.press("Estimate norms")
    assert check_scripts(app) == len(app.figures) >= 2
    app.at.toggle(key="stability").set_value(True)
    app.settle()
    assert "stability=True" in app.scripts[0]
    assert check_scripts(app) == len(app.figures)


def test_pixels_vote_for_a_class_and_a_margin(images):
    app = images(input="picture").settle()
    assert len(app.figures) == 4
    assert check_scripts(app) == 4
    app.set("against", next(f"class {i}, kind {i}" for i in range(12) if f"class {i}, kind {i}" != _class(app)))
    assert app.errors or "margin_to=" in app.scripts[1]


def _class(app):
    return app.at.session_state["link"]["class"]


def test_a_pixel_is_read_and_singular_pairs_are_asked_for(images):
    app = images(input="picture", image_model="esrgan-slim-x2", pixel="3,4").settle()
    assert "at=(3, 4)" in app.scripts[1]
    assert "at=(6, 8)" in app.scripts[3]
    app.press("Compute six singular")
    assert check_scripts(app) == len(app.figures) == 6


def test_a_pixel_outside_is_refused(images):
    app = images(input="picture", image_model="esrgan-slim-x2", pixel="300,4").settle()
    assert any("inside 12 x 12" in text.replace("\\", "") for text in app.errors)


def upload(folder, data: bytes) -> str:
    (folder / ("0" * 16)).write_bytes(data)
    return "upload:" + "0" * 16


def test_an_uploaded_picture_is_shown(images, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(buffer, "PNG")
    app = images(input="picture", image=upload(tmp_path, buffer.getvalue())).settle()
    assert app.errors == []
    assert len(app.figures) == 4


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"0" * 40], ids=["empty", "text", "torn"])
def test_a_file_that_is_no_picture_is_refused(images, tmp_path, data):
    app = images(input="picture", image=upload(tmp_path, data)).settle()
    assert "no picture" in app.errors[0]
    assert app.figures == []


def test_an_address_names_no_other_files(images):
    app = images(input="picture", image="/etc/hostname").settle()
    assert "uploaded here" in app.errors[0]
