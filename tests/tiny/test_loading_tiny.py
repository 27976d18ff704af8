"""Loading folders, GGUF files and the hub's local cache, with random models of a few kilobytes."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from huggingface_hub import constants
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from interp.hooks import convert
from interp.hooks.cache import cache_dir, sha256_file
from interp.hooks.errors import InputError, NotCachedError, UnknownFamilyError
from interp.hooks.loading import load_parts

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=2, n_head=2))


def tiny_tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))


@pytest.fixture
def gpt2_folder(tmp_path):
    tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_folder_keeps_its_dtype_unless_told(gpt2_folder):
    parts = load_parts(gpt2_folder)
    assert isinstance(parts.module, GPT2LMHeadModel)
    assert parts.module.dtype == torch.bfloat16
    assert not parts.module.training
    assert parts.tokenizer is None
    assert parts.preprocess is None
    assert parts.labels is None
    for dtype in ("float32", torch.float32, "torch.float32"):
        assert load_parts(str(gpt2_folder), dtype=dtype, device="cpu").module.dtype == torch.float32


def test_identity_of_a_folder_is_plain_data(gpt2_folder):
    identity = load_parts(gpt2_folder).identity
    assert identity == json.loads(json.dumps(identity))
    assert identity["source"] == "folder"
    assert identity["path"] == str(gpt2_folder)
    assert identity["architecture"] == "GPT2LMHeadModel"
    assert identity["sha256"] == sha256_file(gpt2_folder / "model.safetensors")


def test_identity_of_shards_depends_on_every_shard(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "m", max_shard_size="2KB")
    first = load_parts(tmp_path / "m").identity
    assert len(first["files"]) > 1
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
    model.save_pretrained(tmp_path / "n", max_shard_size="2KB")
    second = load_parts(tmp_path / "n").identity
    assert first["sha256"] != second["sha256"]
    assert first["files"] != second["files"]


def test_tokenizer_comes_along(gpt2_folder):
    tiny_tokenizer().save_pretrained(gpt2_folder)
    assert load_parts(gpt2_folder).tokenizer("b").input_ids == [1]


@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM])
def test_the_config_chooses_the_class(tmp_path, model_class):
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model_class(config).save_pretrained(tmp_path / "m")
    parts = load_parts(tmp_path / "m")
    assert type(parts.module) is model_class
    assert parts.identity["architecture"] == model_class.__name__


def test_image_classifier_folder(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=16, id2label={0: "cat", 1: "dog", 2: "newt"}, label2id={"cat": 0, "dog": 1, "newt": 2},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "m")
    parts = load_parts(tmp_path / "m")
    assert parts.labels == ["cat", "dog", "newt"]
    assert parts.tokenizer is None
    pixels = parts.preprocess(np.full((50, 40, 3), 255, np.uint8))
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.max() == 1
    assert parts.module(pixels).logits.shape == (1, 3)
    with pytest.raises(InputError):
        parts.preprocess(tmp_path / "none.png")


def test_device_map_passes_through(gpt2_folder, monkeypatch):
    given = []
    original = GPT2LMHeadModel.from_pretrained.__func__

    def spy(cls, *args, **options):
        given.append(options.get("device_map", "nothing"))
        return original(cls, *args, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", classmethod(spy))
    spread = {"transformer": "cpu", "lm_head": "cpu"}
    assert load_parts(gpt2_folder, device_map=spread).module.device.type == "cpu"
    load_parts(gpt2_folder, device="cpu")
    assert given == [spread, "nothing"]


# GGUF


def write_gguf(path, architecture="llama"):
    """A one-block Llama with 4-bit (Q4_1) matrices; returns name -> float32 values that the file stands for."""
    width, wide, vocab = 32, 64, 259
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *(chr(0x100 + i) for i in range(256)), "Āā"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (vocab, width), "output": (vocab, width), "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (16, width), "blk.0.attn_v": (16, width), "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (wide, width), "blk.0.ffn_up": (wide, width), "blk.0.ffn_down": (width, wide),
    }  # fmt: skip
    random, values = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        packed = quantize(random.standard_normal(shape, np.float32), gguf.GGMLQuantizationType.Q4_1)
        values[name] = dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        values[name] = random.standard_normal(width, np.float32)
        writer.add_tensor(f"{name}.weight", values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_gguf_is_converted_once_and_bit_for_bit(tmp_path, monkeypatch):
    values = write_gguf(tmp_path / "tiny.gguf")
    parts = load_parts(tmp_path / "tiny.gguf")
    state = parts.module.state_dict()
    block = "model.layers.0"
    same = {
        "model.embed_tokens.weight": "token_embd",
        "lm_head.weight": "output",
        "model.norm.weight": "output_norm",
        f"{block}.self_attn.v_proj.weight": "blk.0.attn_v",
        f"{block}.self_attn.o_proj.weight": "blk.0.attn_output",
        f"{block}.mlp.down_proj.weight": "blk.0.ffn_down",
    }
    for ours, theirs in same.items():
        assert state[ours].dtype == torch.float32
        assert torch.equal(state[ours], torch.from_numpy(values[theirs])), ours
    assert parts.module.config._attn_implementation != "eager"
    assert parts.tokenizer is not None
    assert parts.identity["source"] == "gguf"
    assert parts.identity["sha256"] == sha256_file(tmp_path / "tiny.gguf")
    (made,) = (cache_dir() / "converted").iterdir()
    assert parts.identity["sha256"][:24] in made.name

    monkeypatch.setattr(convert, "_forget_quantization", None)  # a second conversion would call it
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "copy.gguf")
    again = load_parts(tmp_path / "copy.gguf", dtype="bfloat16")
    assert again.module.dtype == torch.bfloat16
    assert list((cache_dir() / "converted").iterdir()) == [made]


def test_gguf_of_an_unknown_architecture_or_cut_short(tmp_path):
    write_gguf(tmp_path / "odd.gguf", architecture="no-such-arch")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "odd.gguf").read_bytes()[:2000])
    for name in ("odd.gguf", "cut.gguf"):
        with pytest.raises(UnknownFamilyError, match=name):
            load_parts(tmp_path / name)
    assert list((cache_dir() / "converted").iterdir()) == []


# the hub's local cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache of the hub, with the hub switched off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(hub, folder, name):
    """Lay a folder into the hub's local cache as a download would."""
    repo = hub / ("models--" + name.replace("/", "--"))
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    for path in folder.iterdir():
        blob = repo / "blobs" / (sha256_file(path) if path.suffix == ".safetensors" else path.name)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("name", ["some/tiny-gpt2", "tinygpt"])
def test_the_hubs_local_cache_is_enough(hub, gpt2_folder, name):
    tiny_tokenizer().save_pretrained(gpt2_folder)
    put(hub, gpt2_folder, name)
    parts = load_parts(name)
    assert parts.identity["source"] == "hub"
    assert parts.identity["name"] == name
    assert parts.identity["revision"] == REVISION
    assert parts.identity["sha256"] == sha256_file(gpt2_folder / "model.safetensors")
    assert parts.tokenizer("b").input_ids == [1]
    assert not (cache_dir() / "hashes").exists(), "the hub's cache names files by hash: nothing is read twice"


def test_without_network_the_local_cache_is_used(hub, gpt2_folder, monkeypatch):
    """The hub is on, but does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    asked = []

    def no_answer(url, **options):
        asked.append(url)
        raise HTTPError("no route")

    put(hub, gpt2_folder, "some/tiny-gpt2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_answer)
    assert load_parts("some/tiny-gpt2").identity["revision"] == REVISION
    assert len(asked) == 1
    with pytest.raises(NotCachedError, match=r"cannot be reached.*hf download some/other"):
        load_parts("some/other")


def test_what_the_hub_has_not_given_is_named(hub, gpt2_folder):
    with pytest.raises(NotCachedError, match=r"switched off.*`hf download some/other`") as caught:
        load_parts("some/other")
    assert "://" not in str(caught.value)
    (put(hub, gpt2_folder, "some/half") / "model.safetensors").unlink()
    with pytest.raises(NotCachedError, match="not whole"):
        load_parts("some/half")
