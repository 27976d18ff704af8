"""Jacobian lenses of tiny models against autograd through the model's own code; files, sums, bad input."""

import itertools
import json
import pickle
import zipfile

import pytest
import torch

import interp
from interp.hooks.errors import (
    ArgumentError,
    CompletenessError,
    InputError,
    LensFileError,
    RunError,
    SiteUnavailableError,
    SizeError,
    TrainModeError,
)
from tests.cases import DECODERS, build
from tests.tiny.test_jacobians import BLOCKS, CLOSE, dtype_of, relative

ROWS = [[3, 17, 42, 8, 25, 9, 33, 12], [5, 11, 50, 29, 7, 14, 60], [44, 2, 19, 23, 31, 8]]
FEW = dict(skip=2, max_tokens=16)


def twin(name, rows, skip=2):
    """By layer, the mean over prompts of (1/|V|) Σ_{t, t' in V} d x_last[t'] / d x_l[t]: row by row, by autograd."""
    module, found = build(name, dtype=dtype_of(name)), []
    for row in rows:
        outs = []
        keep = lambda m, a, o, outs=outs: outs.append(o[0] if isinstance(o, tuple) else o)
        hooks = [b.register_forward_hook(keep) for b in module.get_submodule(BLOCKS.get(name, "model.layers"))]
        module(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        kept = slice(skip, len(row) - 1)
        sums = outs[-1][0, kept].sum(0)
        each = [torch.autograd.grad(value, outs[:-1], retain_graph=True) for value in sums]
        found.append([torch.stack(grads)[:, 0, kept].mean(1) for grads in zip(*each, strict=True)])
    return [torch.stack(layer).mean(0) for layer in zip(*found, strict=True)]


def fit(name, rows=ROWS, **options):
    return interp.JacobianLens.fit(interp.attach(build(name, dtype=dtype_of(name))), rows, **(FEW | options))


@pytest.fixture(scope="module")
def model():
    return interp.attach(build("llama", dtype=torch.float64))


@pytest.fixture(scope="module")
def lens(model):
    return interp.JacobianLens.fit(model, ROWS, **FEW)


@pytest.mark.parametrize("name", DECODERS)
def test_the_lens_is_the_mean_of_the_models_own_jacobians(name):
    rows = ROWS[:1]
    wanted = twin(name, rows)
    close = 1e-4 if name == "mixtral" else CLOSE
    if name == "mixtral":
        with pytest.warns(interp.FallbackWarning, match="no closed form"):
            lens = fit(name, rows)
    else:
        lens = fit(name, rows, method="closed")
    assert lens.layers == [0, 1]
    for layer, matrix in lens.matrices.items():
        assert relative(matrix, wanted[layer].float()) < close


def test_prompts_count_equally_whatever_their_length(lens):
    wanted = twin("llama", ROWS)
    assert lens.count == 3
    assert lens.tokens == 5 + 4 + 3
    for layer in (0, 1):
        assert relative(lens.matrices[layer], wanted[layer].float()) < CLOSE


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_ways_agree(name):
    whole = fit(name, ROWS[:2])
    for options in (dict(method="autograd"), dict(precision="float32"), dict(layers=[0])):
        other = fit(name, ROWS[:2], **options)
        for layer in other.layers:
            assert relative(other.matrices[layer], whole.matrices[layer]) < 2e-6
    rough = fit(name, ROWS[:2], precision="bf16")
    assert 1e-4 < relative(rough.matrices[0], whole.matrices[0]) < 3e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_few_covectors_at_once_change_nothing(name, monkeypatch):
    whole = fit(name, ROWS[:1], check=False)
    monkeypatch.setattr("interp.lens.fit.PromptJacobians._rows", lambda self, sweep: 5)
    parts = fit(name, ROWS[:1], check=False)
    for layer in whole.layers:
        assert relative(parts.matrices[layer], whole.matrices[layer]) < 1e-6


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_contracted_scores_and_query_maps_agree(name, monkeypatch):
    """Also where the first positions are contracted and the others are not, in tiles that do not divide them."""
    found = {}
    ways = {"none": lambda seen: False, "all": lambda seen: True, "first": lambda seen: seen <= 4}
    for (way, pays), tile in itertools.product(ways.items(), (1, 2, 8)):
        monkeypatch.setattr("interp.jacobians.stream_sweep._TILE", tile)
        monkeypatch.setattr("interp.jacobians.stream_sweep._contracts", lambda k, h, w, seen, *_, p=pays: p(seen))
        found[way, tile] = fit(name, ROWS[:1], method="closed").matrices[0]
    for made in found.values():
        assert relative(made, found["none", 8]) < 1e-6


def test_turns_of_one_layer_serve_others_where_they_are_the_same(monkeypatch):
    """Rotations are, unless layers rotate at different speeds; norms of queries and keys are never."""
    from interp.jacobians import stream_sweep

    asked, plain = [], stream_sweep.find_turns
    monkeypatch.setattr(
        stream_sweep, "find_turns", lambda m, r, layers, s: asked.append(layers) or plain(m, r, layers, s)
    )
    for name, wanted in (("llama", [[2]]), ("qwen3", [[2], [1]]), ("gemma3", [[2], [1]])):
        asked.clear()
        fit(name, ROWS[:1], method="closed")
        assert asked == wanted, name


def test_sides_of_an_mlp_agree_and_the_cheaper_one_is_taken(monkeypatch):
    from interp.jacobians.stream_sweep import builds

    d, f = 576, 1536
    for gated, k in itertools.product((True, False), (1, 100, 210, 240, 300, 350, 576)):
        assert builds(k, d, f, gated) == (k > d / ((3 if gated else 2) - d / f))
    found = []
    for side in (True, False):
        monkeypatch.setattr("interp.jacobians.stream_sweep.builds", lambda *_, s=side: s)
        found.append(fit("llama", ROWS[:1], method="closed").matrices[0])
    assert relative(*found) < 1e-6


def test_a_prompt_is_cut_and_its_last_token_does_not_matter(model, lens):
    long = interp.JacobianLens.fit(model, [[*ROWS[0][:6], 1, 2, 4]], skip=2, max_tokens=6)
    short = interp.JacobianLens.fit(model, [[*ROWS[0][:5], 50]], **FEW)
    assert torch.equal(long.matrices[0], short.matrices[0])


def test_changes_are_those_of_the_mean(model, lens):
    one, two = (interp.JacobianLens.fit(model, ROWS[:n], **FEW) for n in (1, 2))
    stack = [torch.stack([x.matrices[i] for i in (0, 1)]) for x in (one, two, lens)]
    wanted = [1.0, *(float((b - a).norm() / b.norm()) for a, b in itertools.pairwise(stack))]
    assert lens.changes == pytest.approx(wanted, rel=1e-5)


def test_a_settled_fit_stops(model):
    rows = [[3, 17, 42, n, 25, 8] for n in range(3, 10)]
    assert interp.JacobianLens.fit(model, rows, until=0.5, **FEW).count == 4
    assert interp.JacobianLens.fit(model, rows, until=1e-300, **FEW).count == 7


def test_parts_merge_to_the_whole(model, lens):
    parts = [interp.JacobianLens.fit(model, rows, **FEW) for rows in (ROWS[:1], ROWS[1:])]
    merged = interp.JacobianLens.merge(parts)
    assert (merged.count, merged.tokens, merged.prompts) == (lens.count, lens.tokens, lens.prompts)
    assert relative(merged.matrices[1], lens.matrices[1]) < 1e-6
    with pytest.raises(ArgumentError, match="share a prompt"):
        interp.JacobianLens.merge([parts[0], lens])
    with pytest.raises(ArgumentError, match=r"differ in skip \(2, 1\)"):
        interp.JacobianLens.merge([parts[0], interp.JacobianLens.fit(model, ROWS[1:], **(FEW | dict(skip=1)))])
    with pytest.raises(ArgumentError, match=r"differ in .*weights_sha256"):
        interp.JacobianLens.merge([parts[0], interp.JacobianLens.fit(_other(), ROWS[1:], **FEW)])
    with pytest.raises(ArgumentError, match="fingerprint"):
        interp.JacobianLens.merge([])


def _other():
    module = build("llama", dtype=torch.float64)
    module.model.norm.weight.data.mul_(1.1)
    return interp.attach(module)


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on(model, lens, tmp_path, monkeypatch):
    from interp.lens.fit import PromptJacobians

    file, plain, calls = tmp_path / "part", PromptJacobians.__call__, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return plain(self, batch)

    monkeypatch.setattr(PromptJacobians, "__call__", dies)
    with pytest.raises(Killed):
        interp.JacobianLens.fit(model, ROWS, checkpoint=file, **FEW)
    with pytest.raises(RunError, match="differs in skip"):
        interp.JacobianLens.fit(model, ROWS, checkpoint=file, **(FEW | dict(skip=1)))
    with pytest.raises(RunError, match="2 other prompts"):
        interp.JacobianLens.fit(model, ROWS[1:], checkpoint=file, **FEW)
    found = interp.JacobianLens.fit(model, ROWS, checkpoint=file, **FEW)
    assert len(calls) == 4
    assert not list(tmp_path.iterdir())
    assert found.changes == lens.changes
    assert torch.equal(found.matrices[0], lens.matrices[0])
    file.write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be read"):
        interp.JacobianLens.fit(model, ROWS, checkpoint=file, **FEW)


def test_files_give_the_lens_back(lens, tmp_path):
    lens.save(tmp_path / "lens")
    for path in ("lens", "lens.json", "lens.safetensors"):
        found = interp.JacobianLens.load(tmp_path / path)
        assert (found.fingerprint, found.prompts, found.changes) == (lens.fingerprint, lens.prompts, lens.changes)
        assert all(torch.equal(found.matrices[i], lens.matrices[i]) for i in lens.layers)
    lens.export(tmp_path / "lens.pt", torch.float32)
    found = interp.JacobianLens.load(tmp_path / "lens.pt")
    assert (found.count, found.layers) == (3, [0, 1])
    assert torch.equal(found.matrices[1], lens.matrices[1])
    with pytest.raises(ArgumentError, match="fingerprint"):
        interp.JacobianLens.merge([found])
    with pytest.raises(ArgumentError, match=r"\.pt"):
        lens.export(tmp_path / "lens.bin")


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran",))


def _foreign(folder, good):
    d = good["d_model"]
    payloads = {
        "no J": ({"weights": 1}, "with weights"),
        "a list": ([1], "with list"),
        "wide": (good | {"d_model": 1 << 40}, "a whole number in"),
        "bool": (good | {"d_model": True}, "a whole number in"),
        "negative count": (good | {"n_prompts": -1}, "a whole number in"),
        "another width": (good | {"d_model": d + 1}, "dense float matrix"),
        "named layer": (good | {"J": {"first": torch.eye(d)}}, "whole number"),
        "ints": (good | {"J": {0: torch.ones(d, d, dtype=torch.int32)}}, "int32"),
        "sparse": (good | {"J": {0: torch.eye(d).to_sparse()}}, "dense"),
        "no tensor": (good | {"J": {0: [1.0]}}, "of list"),
        "one row for all": (good | {"J": {0: torch.zeros(1, 1).expand(d, d)}}, "share memory"),
        "nan": (good | {"J": {0: torch.full((d, d), torch.nan)}}, "NaN"),
        "code": (good | {"J": {0: Evil()}}, "cannot be read"),
    }
    for name, (payload, words) in payloads.items():
        torch.save(payload, folder / f"{name}.pt")
        yield folder / f"{name}.pt", words


def test_foreign_files_are_refused(lens, tmp_path):
    d = lens.width
    good = {"J": {0: torch.eye(d)}, "n_prompts": 1, "d_model": d}
    for path, words in _foreign(tmp_path, good):
        with pytest.raises(LensFileError, match=words):
            interp.JacobianLens.load(path)
    torch.save(good, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    files = {"cut": data[: len(data) // 2], "empty": b"", "pickle": pickle.dumps(good), "text": b"J = 1"}
    for name, content in files.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        with pytest.raises(LensFileError, match="cannot be read"):
            interp.JacobianLens.load(tmp_path / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
    with pytest.raises(LensFileError, match="stored"):
        interp.JacobianLens.load(tmp_path / "bomb.pt")
    with pytest.raises(LensFileError, match="at most 100 B"):
        interp.JacobianLens.load(tmp_path / "good.pt", most=100)
    with pytest.raises(LensFileError, match="of matrices"):
        interp.JacobianLens.load(_many(tmp_path, d), most=100_000)
    with pytest.raises(LensFileError, match="cannot be read"):
        interp.JacobianLens.load(tmp_path / "missing.pt")


def _many(folder, d):
    one = torch.eye(d)
    torch.save({"J": dict.fromkeys(range(100), one), "n_prompts": 1, "d_model": d}, folder / "many.pt")
    return folder / "many.pt"


def test_other_saved_results_are_refused(lens, tmp_path):
    from interp.saving import save_result

    save_result(interp.Table([{"a": 1}]), tmp_path / "table")
    with pytest.raises(RunError, match="holds a Table"):
        interp.JacobianLens.load(tmp_path / "table")
    lens.save(tmp_path / "lens")
    record = json.loads((tmp_path / "lens.json").read_text())
    (tmp_path / "lens.json").write_text(json.dumps(record)[:-9])
    with pytest.raises(RunError, match="cannot be read"):
        interp.JacobianLens.load(tmp_path / "lens")


def test_readout_is_the_final_norm_and_unembedding_of_what_was_carried(model, lens):
    read = lens.readout(model, ROWS[0], follow=[9, 17], k=3)
    assert (read.kind, read.layers) == ("Jacobian lens", ["0", "1", "2"])
    acts = model.capture(torch.tensor(ROWS[:1]), ["blocks.1.hook_resid_post", "logits"])
    module = model.module
    carried = acts["blocks.1.hook_resid_post"][0] @ lens.matrices[1].double().T
    wanted = torch.log_softmax(module.lm_head(module.model.norm(carried)), -1)
    assert torch.equal(read.top_ids[1], wanted.topk(3, -1).indices)
    assert (read.probabilities[1] - wanted[:, [9, 17]].exp()).abs().max() < 1e-5
    assert torch.equal(read.ranks[1], (wanted[:, :, None] > wanted[:, None, [9, 17]]).sum(1))
    final = torch.log_softmax(acts["logits"][0], -1)
    assert (read.probabilities[2] - final[:, [9, 17]].exp()).abs().max() < 1e-5
    assert lens.readout(model, ROWS[0], layers=[1]).layers == ["1", "2"]
    some = lens.readout(model, ROWS[0], follow=[9, 17], k=3, positions=[-1, 2])
    assert some.places == [len(ROWS[0]) - 1, 2]
    torch.testing.assert_close(some.probabilities, read.probabilities[:, some.places])
    assert some.tokens == [read.tokens[p] for p in some.places]
    assert interp.chart(read).to_dict()


def test_a_lens_of_identities_is_the_logit_lens(model):
    plain = interp.logit_lens(model, ROWS[0], follow=[9])
    eye = interp.JacobianLens({i: torch.eye(32) for i in (0, 1)}, 1).readout(model, ROWS[0], follow=[9])
    assert torch.equal(plain.ranks[1:], eye.ranks)
    assert torch.equal(plain.top_ids[1:], eye.top_ids)


def test_figures_compile(model, lens):
    import vl_convert

    ends = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    made = interp.jacobian(model, ROWS[0], *ends, "same")
    summaries = {how: made.reduce(how) for how in ("svd:4", "gram", "norm", "trace")}
    figures = [interp.chart(one, labels=[str(i) for i in range(8)]) for one in summaries.values()]
    figures.append(interp.chart(summaries["svd:4"], name="a", beside={"b": summaries["svd:4"]}))
    figures += [interp.chart(lens), interp.chart(lens, figure="changes", title="settles")]
    for figure in figures:
        assert vl_convert.vegalite_to_vega(json.loads(json.dumps(figure.to_dict(), allow_nan=False)))["marks"]
    with pytest.raises(ArgumentError, match="7 labels"):
        interp.chart(summaries["gram"], labels=["a"] * 7)
    with pytest.raises(ArgumentError, match="figure of mean"):
        interp.chart(made.reduce("mean"))
    with pytest.raises(ArgumentError, match="singular values"):
        interp.chart(summaries["gram"], beside={})
    with pytest.raises(ArgumentError, match="0 changes"):
        interp.chart(interp.JacobianLens(lens.matrices, 1), figure="changes")


BAD = {
    "one text": (dict(texts="the cat"), ArgumentError, "one prompt"),
    "two in one": (dict(texts=[[[1, 2, 3, 4], [5, 6, 7, 8]]]), InputError, "2 prompts in one entry"),
    "all short": (dict(texts=[[1, 2]]), ArgumentError, "more than 3 tokens"),
    "none": (dict(texts=[]), ArgumentError, "0 prompts"),
    "last layer": (dict(layers=[2]), ArgumentError, "needs no lens"),
    "no layer": (dict(layers=[]), ArgumentError, "different blocks"),
    "a layer twice": (dict(layers=[1, 1]), ArgumentError, "different blocks"),
    "negative layer": (dict(layers=[-1]), ArgumentError, r"0\.\.1"),
    "skip": (dict(skip=-1), ArgumentError, "skip of 0"),
    "cut": (dict(max_tokens=3), ArgumentError, "max_tokens"),
    "method": (dict(method="fast"), ArgumentError, "autograd"),
    "precision": (dict(precision="fp8"), ArgumentError, "bf16"),
    "precision of autograd": (dict(precision="bf16", method="autograd"), ArgumentError, "None"),
    "budget": (dict(budget=1000), SizeError, r"budget=\d+ or more; or max_tokens"),
    "until": (dict(until=0.0), ArgumentError, "positive"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_a_fit_is_refused(name, model):
    options, error, words = BAD[name]
    options = {"texts": ROWS} | FEW | options
    with pytest.raises(error, match=words):
        interp.JacobianLens.fit(model, options.pop("texts"), **options)


def test_models_without_such_a_lens_are_refused(model, lens):
    with pytest.raises(SiteUnavailableError, match="Jacobian lens of Bert"):
        interp.JacobianLens.fit(interp.attach(build("bert")), ROWS)
    dropped = build("gpt2")
    dropped.train()
    with pytest.raises(TrainModeError):
        interp.JacobianLens.fit(interp.attach(dropped), ROWS, **FEW)
    wide = interp.JacobianLens({0: torch.eye(7)}, 1)
    with pytest.raises(ArgumentError, match="width 7"):
        wide.readout(model, ROWS[0])
    with pytest.raises(ArgumentError, match="layer 5"):
        lens.readout(model, ROWS[0], layers=[5])
    with pytest.raises(ArgumentError, match="layer 7"):
        lens.transport(torch.ones(32), 7)
    with pytest.raises(CompletenessError, match="no closed form"):
        fit("mixtral", ROWS[:1], method="closed")


def test_short_prompts_are_left_out_with_a_word(model, lens):
    with pytest.warns(UserWarning, match="1 prompts of at most 3 tokens"):
        found = interp.JacobianLens.fit(model, [*ROWS, [4, 5, 6]], **FEW)
    assert torch.equal(found.matrices[0], lens.matrices[0])


def test_a_wrong_closed_form_is_seen(model, monkeypatch):
    from interp.jacobians.stream_sweep import HeadTables

    plain = HeadTables.rows
    monkeypatch.setattr(HeadTables, "rows", lambda self, t: plain(self, t) * 1.02)
    with pytest.raises(CompletenessError, match="off by"):
        interp.JacobianLens.fit(model, ROWS[:1], method="closed", **FEW)
    with pytest.warns(interp.FallbackWarning, match="autograd is used"):
        found = interp.JacobianLens.fit(model, ROWS[:1], **FEW)
    assert relative(found.matrices[0], twin("llama", ROWS[:1])[0].float()) < CLOSE


def test_transformer_lens_fits_the_same_and_reads_our_files(tokenizer, bridge_package, tmp_path):
    from transformer_lens.tools.analysis import JacobianLens as Theirs

    module = build("llama")
    theirs = bridge_package.TransformerBridge.boot_transformers(
        "local", hf_model=module, tokenizer=tokenizer, device="cpu"
    )
    texts = ["the cat sat on the mat and then Mary went", "when John saw the small blue house"]
    wanted = Theirs.fit(theirs, texts, corpus="two", skip_first_positions=2, show_progress=False)
    model = interp.attach(build("llama"), tokenizer=tokenizer)
    rows = [theirs.to_tokens(text)[0].tolist() for text in texts]
    ours = interp.JacobianLens.fit(model, rows, skip=2)
    for layer in ours.layers:
        assert relative(ours.matrices[layer], wanted.jacobians[layer]) < 1e-5
    ours.export(tmp_path / "ours.pt")
    wanted.save(str(tmp_path / "theirs.pt"))
    for file in ("ours.pt", "theirs.pt"):
        here, there = interp.JacobianLens.load(tmp_path / file), Theirs.load(str(tmp_path / file))
        read = here.readout(model, rows[0], k=3)
        other = there.readout(theirs, torch.tensor(rows[:1]), top_k=3, return_full_logits=True)
        for i, layer in enumerate((0, 1, 2)):
            assert torch.equal(read.top_ids[i], other.lens_topk_indices[layer])
            probabilities = other.lens_logits[layer].softmax(-1).gather(-1, read.top_ids[i])
            assert (read.top_probabilities[i] - probabilities).abs().max() < 1e-5


def test_a_fit_leaves_the_model_as_it_was(model):
    flags = [p.requires_grad for p in model.module.parameters()]
    interp.JacobianLens.fit(model, ROWS[:1], **FEW)
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())
    assert not any(m._forward_hooks for m in model.module.modules())


@pytest.mark.parametrize("shift", [0, -4], ids=["left", "right"])
def test_padding_of_a_prompt_is_no_part_of_it(model, lens, shift):
    padded = torch.tensor([[0] * 4 + ROWS[0]]).roll(shift, 1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None].roll(shift, 1)
    entry = {"input_ids": padded, "attention_mask": mask}
    wanted = interp.JacobianLens.fit(model, ROWS[:1], **FEW)
    found = interp.JacobianLens.fit(model, [entry], **FEW)
    assert found.tokens == wanted.tokens
    for layer, matrix in wanted.matrices.items():
        torch.testing.assert_close(found.matrices[layer], matrix)
    for read in (lambda prompt: lens.readout(model, prompt, [5]), lambda prompt: interp.logit_lens(model, prompt, [5])):
        plain, made = read(torch.tensor(ROWS[:1])), read(entry)
        assert made.tokens == plain.tokens
        torch.testing.assert_close(made.probabilities, plain.probabilities)


def test_positions_beside_a_prompt_are_refused(model):
    entry = {"input_ids": torch.tensor(ROWS[:1]), "position_ids": torch.arange(3, 11)[None]}
    with pytest.raises(InputError, match="leave position_ids out"):
        interp.JacobianLens.fit(model, [entry], **FEW)
