"""ActivationStore: what is on disk is what the model computes, whatever the batches, and a kill changes no byte."""

import json
import os
import signal

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, InputError, NonFiniteError, SiteError, SizeError, StoreError
from interp.probes import MassMeanProbe, closed_forms, stream_probes, sweep
from interp.store import files as store_files
from interp.store.build import StoreWarning
from interp.store.store import ActivationStore
from tests.cases import build, build_cnn, build_hand

SITES = ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z"]


def rows(n=11):
    made = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, 60, (int(k),), generator=made).tolist() for k in torch.randint(1, 12, (n,), generator=made)
    ]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.filterwarnings("ignore:.*one token")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_store_holds_what_single_runs_give(family, tmp_path):
    model, inputs = interp.attach(build(family)), rows()
    store = ActivationStore.build(
        model, inputs, SITES, tmp_path / "s", pools=["mean", "max", "last", "first"], tokens=SITES, batch_size=3,
        shard=4000,
    )  # fmt: skip
    assert store.manifest["chunks"] > 2
    assert [ids.tolist() for ids in store.token_ids] == inputs
    skip = lambda x: x[1:] if family != "bert" and len(x) > 1 else x
    for site in store.sites:
        alone = [model.capture([row], site)[site][0].flatten(1) for row in inputs]
        values, offsets = store.tokens(site)
        torch.testing.assert_close(values, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert offsets.diff().tolist() == [len(row) for row in inputs]
        for pool, function in {
            "mean": lambda x: skip(x).mean(0), "max": lambda x: skip(x).amax(0), "last": lambda x: x[-1],
            "first": lambda x: x[0],
        }.items():  # fmt: skip
            expected = torch.stack([function(x) for x in alone])
            torch.testing.assert_close(store.pooled(site, pool), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*one token")
def test_the_batch_size_and_the_order_of_inputs_change_nothing(tmp_path):
    model, inputs, site = interp.attach(build("llama")), rows(), "blocks.2.hook_resid_post"
    stores = [
        ActivationStore.build(model, given, site, tmp_path / name, tokens=site, batch_size=size)
        for name, given, size in (("one", inputs, 1), ("many", inputs, 32), ("reversed", inputs[::-1], 4))
    ]
    one, many, back = (s.pooled(site) for s in stores)
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one, back.flip(0), rtol=1e-4, atol=1e-6)


def test_texts_labels_and_special_tokens(tmp_path, tokenizer):
    model = interp.attach(build("gpt2"), tokenizer)
    texts = ["<bos> the cat sat <eos>", "<bos> a dog <eos>"]
    store = ActivationStore.build(
        model, texts, "blocks.1.hook_resid_post", tmp_path / "s", tokens="blocks.1.hook_resid_post",
        labels=["x", "y"], groups=[0, 0], skip_special=True, skip_first=False,
    )  # fmt: skip
    assert (store.labels, store.groups, len(store)) == (["x", "y"], [0, 0], 2)
    whole = [model.capture(text, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"][0] for text in texts]
    assert store.tokens(store.sites[0]).offsets.tolist() == [0, 3, 5]
    expected = torch.stack([x[1:-1].mean(0) for x in whole])
    torch.testing.assert_close(store.pooled(store.sites[0]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"special tokens alone: \[1\]"):
        ActivationStore.build(model, ["the cat", "<bos> <eos>"], store.sites, tmp_path / "t", skip_special=True)


def test_empty_texts_are_dropped_with_their_labels_where_that_is_asked_for(tmp_path, tokenizer, unchecked):
    model = interp.attach(build("gpt2"), tokenizer)
    texts = ["<bos> the cat sat <eos>", "", "<bos> <eos>", "<bos> a dog <eos>", "cat"]
    site = "blocks.1.hook_resid_post"
    build_it = lambda name, given, **more: ActivationStore.build(
        model, given, site, tmp_path / name, tokens=site, skip_special=True, **more
    )
    with pytest.raises(InputError, match="empty"):
        build_it("refused", texts)
    with pytest.warns(StoreWarning, match=r"3 of 5 examples .* left out: 1, 2, 4"):
        store = build_it("dropped", texts, labels=list("abcde"), groups=[0, 1, 2, 3, 4], on_empty="drop")
    assert (store.labels, store.groups, store.source.tolist()) == (["a", "d"], [0, 3], [0, 3])
    same = build_it("chosen", [texts[0], texts[3]], labels=["a", "d"], groups=[0, 3])
    assert same.source.tolist() == [0, 1]
    for pool in same.pools:
        assert torch.equal(store.pooled(site, pool), same.pooled(site, pool))
    assert torch.equal(store.tokens(site).values, same.tokens(site).values)
    with pytest.warns(StoreWarning, match=r"2 of 5 examples .* left out: 1, 2"):
        assert build_it("lone", texts, on_empty="drop", skip_first=False).source.tolist() == [0, 3, 4]
    with pytest.raises(InputError, match="all of them empty"):
        build_it("none", ["", "<bos> <eos>"], on_empty="drop")
    with pytest.raises(ArgumentError, match="labels of length 4 for 5"):
        build_it("short", texts, labels=list("abcd"), on_empty="drop")


def test_an_untrained_copy_is_built_beside_and_stands_in_sweeps(tmp_path):
    model, site, inputs = interp.attach(build("gpt2")), "blocks.1.hook_resid_post", rows(12)
    y = [i % 2 for i in range(12)]
    alone = ActivationStore.build(model, inputs, site, tmp_path / "a", pools=["last"], labels=y)
    store = ActivationStore.build(model, inputs, site, tmp_path / "b", pools=["last"], labels=y, untrained=3)
    assert alone.untrained is None
    assert store.sha256 == alone.sha256
    copy = interp.causal.untrained(model, 3)
    last = torch.stack([copy.capture([row], site)[site][0, -1] for row in inputs])
    torch.testing.assert_close(store.untrained.pooled(site, "last"), last, rtol=1e-4, atol=1e-5)
    found = sweep(store, None, [MassMeanProbe()], pools=["last"], folds=2)
    by_hand = sweep(store.untrained, None, [MassMeanProbe()], pools=["last"], folds=2)
    assert [r["untrained"] for r in found.rows] == [r["value"] for r in by_hand.rows]
    assert contents(tmp_path / "b") == contents(
        ActivationStore.build(model, inputs, site, tmp_path / "b", pools=["last"], labels=y, untrained=3).path
    )


def test_feature_maps_are_sets_of_places(tmp_path):
    module = build_cnn()
    model, images = interp.attach(module), torch.randn(7, 3, 6, 6)
    store = ActivationStore.build(model, images, "skip", tmp_path / "s", pools=["mean"], tokens="skip", batch_size=2)
    maps = model.capture(images, "skip")["skip"]
    torch.testing.assert_close(store.pooled("skip"), maps.mean((2, 3)), rtol=1e-5, atol=1e-6)
    values, offsets = store.tokens("skip")
    assert offsets.diff().tolist() == [36] * 7
    torch.testing.assert_close(values[36:72], maps[1].flatten(1).T, rtol=1e-5, atol=1e-6)
    assert store.token_ids is None


def test_sites_at_positions(tmp_path):
    model, site = interp.attach(build("gpt2")), "blocks.1.hook_resid_post@last"
    store = ActivationStore.build(model, [[5, 6, 7], [8, 9]], site, tmp_path / "s", pools=["mean"], tokens=site)
    expected = model.capture([[5, 6, 7], [8, 9]], site)[site][:, 0]
    torch.testing.assert_close(store.pooled(site), expected)
    assert store.tokens(site).offsets.tolist() == [0, 1, 2]


# a kill


def build_hand_store(path, progress=lambda _: None):
    model = interp.attach(build_hand(), layout="modules")
    sites = ["stack.0", "stack.1"]
    return ActivationStore.build(
        model, torch.arange(40).view(10, 4), sites, path, tokens="stack.1", batch_size=2, shard=1, progress=progress
    )


def killed(path, when):
    """Build in a child that is killed with signal 9: after a chunk, within a file, or before its row in the table."""
    child = os.fork()
    if child == 0:
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if when == "within a file":
            whole = store_files.write_atomically

            def half(file, data):
                if file.name == "000002.safetensors":
                    file.with_name(f".{file.name}.1.tmp").write_bytes(data[: len(data) // 2])
                    die()
                whole(file, data)

            store_files.write_atomically = half
        elif when == "before the table":
            append = store_files.StoreFiles.append
            store_files.StoreFiles.append = lambda self, row: die() if row["chunk"] == 2 else append(self, row)
        try:
            build_hand_store(path, lambda text: die() if text.startswith("chunk 3") else None)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["after a chunk", "within a file", "before the table"])
def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(when, tmp_path):
    build_hand_store(tmp_path / "whole")
    killed(tmp_path / "cut", when)
    with pytest.raises(StoreError, match=r"has [23] of 5 chunks.*call build again"):
        ActivationStore.open(tmp_path / "cut")
    said = []
    build_hand_store(tmp_path / "cut", said.append)
    assert len(said) == (2 if when == "after a chunk" else 3)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_damaged_chunks_are_written_anew(tmp_path):
    build_hand_store(tmp_path / "s")
    before = contents(tmp_path / "s")
    chunk, table = tmp_path / "s/chunks/000001.safetensors", tmp_path / "s/chunks.jsonl"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    table.write_text(table.read_text()[:-20])
    with pytest.raises(StoreError, match="4 of 5"):
        ActivationStore.open(tmp_path / "s")
    said = []
    build_hand_store(tmp_path / "s", said.append)
    assert said == ["chunk 2 of 5", "chunk 5 of 5"]
    assert contents(tmp_path / "s") == before
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"000001.*SHA-256"):
        ActivationStore.open(tmp_path / "s").verify()


def test_a_complete_store_does_not_run_the_model_again(tmp_path, monkeypatch):
    first = build_hand_store(tmp_path / "s")
    said = []
    again = build_hand_store(tmp_path / "s", said.append)
    assert (said, again.sha256) == ([], first.sha256)


# other models, inputs, choices


@pytest.mark.filterwarnings("ignore:.*one token")
@pytest.mark.parametrize(("change", "field"), [
    ({"model": "other weights"}, "model.weights_sha256"), ({"model": "other class"}, "model.class"),
    ({"model": "double"}, "model.(weights_sha256|dtype)"), ({"model": "no tokenizer"}, "tokenizer_sha256"),
    ({"inputs": rows(5)}, "inputs_sha256"), ({"sites": "blocks.1.hook_resid_post"}, "pooled_sites"),
    ({"dtype": "float16"}, "dtype"), ({"pools": ["last"]}, "pools"), ({"labels": list(range(11))}, "columns_sha256"),
    ({"batch_size": 2}, "batch_size"), ({"skip_first": False}, "skip_first"),
])  # fmt: skip
def test_another_store_is_refused_by_name(change, field, tmp_path, tokenizer):
    make = lambda model="same", inputs=None, sites="blocks.0.hook_resid_post", **more: ActivationStore.build(
        attached(model, tokenizer), inputs or rows(), sites, tmp_path / "s", **more
    )
    make()
    with pytest.raises(StoreError, match=rf"^{field} is"):
        make(**change)


def attached(kind, tokenizer):
    module = build("llama" if kind == "other class" else "gpt2")
    if kind == "other weights":
        with torch.no_grad():
            module.transformer.h[2].mlp.c_fc.weight[0, 0] += 1e-3
    return interp.attach(module.double() if kind == "double" else module, None if kind == "no tokenizer" else tokenizer)


def test_other_versions_are_refused_only_while_a_store_is_unfinished(tmp_path):
    build_hand_store(tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    record = json.loads(manifest.read_text())
    record["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(record))
    build_hand_store(tmp_path / "s")
    (tmp_path / "s/chunks/000003.safetensors").unlink()
    with pytest.raises(StoreError, match=r"versions\.torch is"):
        build_hand_store(tmp_path / "s")


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(StoreError, match="holds files but no manifest"):
        build_hand_store(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(StoreError, match="not a store"):
        ActivationStore.open(tmp_path)


# numbers


def test_float16_that_overflows_is_kept_in_float32(tmp_path):
    model = interp.attach(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
    images = torch.cat([torch.ones(4, 2), torch.full((4, 2), 1e6)])
    with pytest.warns(StoreWarning, match=r"0 reaches .*beyond float16: these chunks are kept in float32"):
        store = ActivationStore.build(model, images, "0", tmp_path / "s", pools=["last"], dtype="float16",
                                      batch_size=4, shard=1)  # fmt: skip
    found, expected = store.pooled("0", "last"), model.capture(images, "0")["0"]
    assert torch.equal(found[4:], expected[4:])
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-3, atol=1e-3)
    assert (
        ActivationStore.build(model, images, "0", tmp_path / "b", pools=["last"], dtype="bfloat16")
        .pooled("0", "last")
        .isfinite()
        .all()
    )


def test_nan_at_a_real_token_is_refused(tmp_path):
    module = build("gpt2")
    model = interp.attach(module)
    with torch.no_grad():
        module.transformer.wte.weight[13] = torch.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.hook_resid_post in 3 tokens, first at example 1"):
        ActivationStore.build(model, [[5, 6], [7, 13, 8]], "blocks.0.hook_resid_post", tmp_path / "s")


def test_the_size_is_told_before_and_held_to(tmp_path):
    model, inputs = interp.attach(build("gpt2")), [[5, 6, 7], [8, 9]]
    plan = ActivationStore.estimate(model, inputs, "blocks.*.hook_resid_post", tokens="blocks.1.hook_resid_post")
    assert plan.bytes == 2 * 3 * 2 * 32 * 4 + 5 * 32 * 4
    assert str(plan) == "2 examples, 5 tokens, 3 sites: 0.00218 MB"
    with pytest.raises(SizeError, match="2 examples, 5 tokens"):
        ActivationStore.build(model, inputs, "blocks.*.hook_resid_post", tmp_path / "s", budget=100)
    assert not (tmp_path / "s").exists()
    store = ActivationStore.build(
        model, inputs, "blocks.*.hook_resid_post", tmp_path / "s", tokens="blocks.1.hook_resid_post"
    )
    tensors = sum(row["bytes"] for row in store._chunks.values())
    assert plan.bytes <= tensors <= plan.bytes + 2000


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"pools": ["median"]}, ArgumentError, "pools="), ({"dtype": "int8"}, ArgumentError, "dtype="),
    ({"sites": "blocks.0.attn.hook_pattern"}, SiteError, "axes batch head"),
    ({"sites": "nowhere"}, SiteError, "unknown"), ({"inputs": "one text"}, InputError, "inputs="),
    ({"inputs": []}, InputError, "inputs="),
    ({"labels": [1]}, ArgumentError, "labels of length 1 for 2"), ({"pools": []}, ArgumentError, "at least one"),
    ({"skip_first": "yes"}, ArgumentError, "skip_first"), ({"batch_size": 0}, ArgumentError, "batch_size=0"),
    ({"skip_special": True}, ArgumentError, "skip_special"), ({"labels": [{1}, {2}]}, ArgumentError, "labels"),
])  # fmt: skip
def test_malformed_arguments_are_refused_before_anything_is_written(options, error, match, tmp_path, unchecked):
    given = {"inputs": [[5, 6], [7]], "sites": "blocks.0.hook_resid_post"} | options
    model = interp.attach(build("gpt2"))
    with pytest.raises(error, match=match):
        ActivationStore.build(model, given.pop("inputs"), given.pop("sites"), tmp_path / "s", **given)
    assert not (tmp_path / "s").exists()


def test_what_is_not_kept_is_refused(tmp_path):
    store = build_hand_store(tmp_path / "s")
    for read in (lambda: store.pooled("stack.0", "max"), lambda: store.pooled("x"), lambda: store.tokens("stack.0")):
        with pytest.raises(StoreError):
            read()
    assert "10 examples, mean/last of 2 sites" in repr(store)


def test_the_unembedding_is_not_computed(tmp_path):
    module = build("gpt2")
    seen = []
    module.lm_head.register_forward_hook(lambda *_: seen.append(1))
    ActivationStore.build(interp.attach(module, check=False), [[5, 6]], "blocks.*.hook_resid_post", tmp_path / "s")
    assert not seen


def test_equal_texts_of_a_store_are_kept_together(tmp_path):
    model = interp.attach(build("llama"))
    rows = [[5 + i, 6, 7 + i % 3] for i in range(30)] + [[5, 6, 7]] * 5
    y = [i % 2 for i in range(30)] + [0] * 5
    store = ActivationStore.build(model, rows, "blocks.1.hook_resid_post", tmp_path / "s", labels=y)
    found = sweep(store, None, [MassMeanProbe()], pools=["last"], folds=3)
    assert found.duplicates == 5
    texts = [" ".join(map(str, row)) for row in rows]
    expected = sweep(store, None, [MassMeanProbe()], pools=["last"], folds=3, texts=texts)
    assert [r["value"] for r in found.rows] == [r["value"] for r in expected.rows]
    assert "5 repeated texts kept together" in str(found)


def test_blocks_are_the_rows_of_a_site_with_their_examples(tmp_path):
    model = interp.attach(build("llama"))
    store = ActivationStore.build(
        model, rows(23), SITES[0], tmp_path / "s", tokens="blocks.1.hook_resid_post", batch_size=4, shard="3kB"
    )
    site = "blocks.1.hook_resid_post"
    for pool in ("mean", "tokens"):
        parts = list(store.blocks(site, pool, rows=3))
        assert len(parts) > 8
        assert max(len(values) for _, values in parts) == 3
        owner, values = (torch.cat(side) for side in zip(*parts, strict=True))
        if pool == "mean":
            assert torch.equal(values[owner.argsort()], store.pooled(site))
        else:
            tokens, offsets = store.tokens(site)
            assert torch.equal(values[owner.argsort(stable=True)], tokens)
            assert torch.equal(owner.bincount(), offsets.diff())
    with pytest.raises(StoreError, match="max of blocks"):
        next(store.blocks(site, "max"))


def test_probes_of_a_store_are_those_of_its_matrices(tmp_path):
    model = interp.attach(build("llama"))
    y = [i % 2 for i in range(23)]
    store = ActivationStore.build(model, rows(23), SITES[0], tmp_path / "s", batch_size=4, shard="3kB")
    matrices = {site: store.pooled(site) for site in store.sites}
    for function, options in ((closed_forms, {}), (stream_probes, {"C": 0.1})):
        ours, theirs = function(store, y, **options), function(matrices, y, **options)
        for site in store.sites:
            pair = [found[site].lda if function is closed_forms else found[site] for found in (ours, theirs)]
            torch.testing.assert_close(*(p.direction() for p in pair), rtol=1e-5, atol=1e-6)
