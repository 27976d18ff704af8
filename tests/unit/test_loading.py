"""Names, places, networks and pictures: everything about loading that needs no model and no network."""

import numpy as np
import pytest
import torch
from PIL import Image

from interp.hooks import registries
from interp.hooks.cache import cache_dir
from interp.hooks.convert import efficientnet_key, read_keras_weights
from interp.hooks.errors import ArgumentError, ChecksumError, InputError, UnknownFamilyError
from interp.hooks.loading import load_parts
from interp.hooks.networks.efficientnet_lite import EfficientNetLite
from interp.hooks.networks.esrgan_slim import EsrganSlim
from interp.hooks.networks.images import CropResizeScale, RawPixels, open_image, to_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_client(monkeypatch):
    """Any attempt to run a registry's client fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a subprocess was started: {args}")

    monkeypatch.setattr(registries.subprocess, "run", refuse)


# names and places


def test_a_slip_of_the_pen_gets_the_near_name_without_any_network(no_client):
    with pytest.raises(ArgumentError, match="did you mean smollm2-135m"):
        load_parts("smollm2-135")
    with pytest.raises(ArgumentError, match=r"did you mean .*esrgan-slim-x2"):
        load_parts("esrgan_slim x2")


@pytest.mark.parametrize("name", ["./no/such folder", "a/b/c", "", "/nowhere/at/all"])
def test_names_that_look_like_nothing(name):
    with pytest.raises(ArgumentError, match=r"a folder, a \.gguf file or a hub id"):
        load_parts(name)


def test_gguf_paths(tmp_path):
    with pytest.raises(ArgumentError, match="does not exist"):
        load_parts(tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGML1234")
    with pytest.raises(InputError, match="GGML"):
        load_parts(tmp_path / "bad.gguf")
    assert not (cache_dir() / "converted").exists()


def test_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        load_parts(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"give the file itself: .*m\.gguf"):
        load_parts(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no model\*\.safetensors"):
        load_parts(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "gpt2"}', "no architecture"),
        ('{"model_type": "gpt2", "architectures": ["NoSuchForCausalLM"]}', "NoSuchForCausalLM"),
        ('{"model_type": "gpt2", "architectures": ["AutoTokenizer"]}', "AutoTokenizer"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
    ],
)
def test_configs_of_no_known_class(tmp_path, config, said):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnknownFamilyError, match=said):
        load_parts(tmp_path)


def test_places_and_dtypes_are_checked_first(no_client):
    with pytest.raises(ArgumentError, match="device_map"):
        load_parts("smollm2-135m", device="cpu", device_map="auto")
    for dtype in ("bfloat17", "int8", torch.int64, "nn"):
        with pytest.raises(ArgumentError, match="floating-point dtype"):
            load_parts("smollm2-135m", dtype=dtype)
    with pytest.raises(ArgumentError, match="a torch device"):
        load_parts("smollm2-135m", device="gpu")


# networks


def test_efficientnet_names_cover_the_network():
    ours = EfficientNetLite().state_dict()
    assert len(ours) == 296
    assert efficientnet_key("_fc.bias") == "classifier.bias"
    assert efficientnet_key("_bn1.running_mean") == "head.norm.running_mean"
    assert efficientnet_key("_blocks.15._project_conv.weight") == "features.15.project.conv.weight"
    assert "features.15.project.conv.weight" in ours
    with pytest.raises(KeyError):
        efficientnet_key("_swish.weight")


def test_efficientnet_shapes_and_padding():
    network = EfficientNetLite().eval()
    seen = []
    for block in network.features:
        block.register_forward_hook(lambda m, i, o: seen.append(list(o.shape[1:])))
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 1000)
    sides = [(16, 48)] + [(24, 24)] * 2 + [(40, 12)] * 2 + [(80, 6)] * 3 + [(112, 6)] * 3 + [(192, 3)] * 4 + [(320, 3)]
    assert seen == [[c, s, s] for c, s in sides]
    pads = [m.padding for m in network.modules() if isinstance(m, torch.nn.ZeroPad2d)]
    assert pads == [(0, 1, 0, 1), (0, 1, 0, 1), (1, 2, 1, 2), (0, 1, 0, 1), (1, 2, 1, 2)]


@pytest.mark.parametrize(("scale", "parameters"), [(2, 222_075), (3, 226_815), (4, 233_451), (8, 278_955)])
def test_esrgan_sizes(scale, parameters):
    network = EsrganSlim(scale)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(1, 3, 5, 7)).shape == (1, 3, 5 * scale, 7 * scale)


def test_keras_weights_are_read_in_order():
    rows = [
        {"name": "F_0/kernel", "shape": [1, 2, 3, 4], "dtype": "float32"},
        {"name": "F_0/bias", "shape": [4], "dtype": "float32"},
    ]
    values = np.arange(28, dtype="<f4")
    read = read_keras_weights(rows, values.tobytes())
    kernel = values[:24].reshape(1, 2, 3, 4)
    assert read["entry.weight"][3, 1, 0, 1] == kernel[0, 1, 1, 3]
    assert read["entry.weight"].shape == (4, 3, 1, 2)
    assert read["entry.bias"].tolist() == [24, 25, 26, 27]
    for data in (values[:-1].tobytes(), values.tobytes() + b"1234"):
        with pytest.raises(ChecksumError):
            read_keras_weights(rows, data)


# pictures


def test_crop_is_central_and_scaled():
    array = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    pixels = CropResizeScale()(array)
    inside = array[16:240, 38:262].astype(np.float32)
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0].permute(1, 2, 0), torch.from_numpy((inside - 127) / 128), rtol=0, atol=0)


def test_path_array_and_picture_agree(tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    first = RawPixels()(array)
    assert torch.equal(first, RawPixels()(tmp_path / "a.png"))
    assert torch.equal(first, RawPixels()(str(tmp_path / "a.png")))
    assert torch.equal(first, RawPixels()(Image.fromarray(array)))
    assert first[0, :, 2, 3].tolist() == array[2, 3].tolist()
    assert np.array_equal(np.array(to_image(first)), array)


def test_grey_alpha_and_orientation():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert torch.equal(RawPixels()(grey)[0, 1], torch.from_numpy(grey).float())
    assert RawPixels()(np.zeros((3, 4, 4), np.uint8)).shape == (1, 3, 3, 4)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    assert open_image(turned).size == (2, 4)


def test_to_image_clips_and_rounds():
    pixels = torch.tensor([-5.0, 0.4, 254.6, 300.0]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert np.array(to_image(pixels))[0, :, 0].tolist() == [0, 0, 255, 255]
    with pytest.raises(InputError):
        to_image(torch.zeros(2, 3, 4, 4))


def test_pictures_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for bad in (
        tmp_path / "a.png",
        tmp_path / "cut.png",
        tmp_path / "none.png",
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(3, 4, 4),
        7,
    ):
        with pytest.raises(InputError) as caught:
            CropResizeScale()(bad)
        assert caught.value.given
        assert caught.value.needed
        assert caught.value.do
