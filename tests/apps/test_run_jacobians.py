"""Runs of Jacobians: what they hold is what the functions give, and a wrong specification makes no folder."""

import pytest
import torch
from typer.testing import CliRunner

import interp
from interp.apps import cli
from interp.runs import language_specs
from interp.runs.run import Run
from tests.apps.samples import tiny_load

LONG = "Mary gave the book to John and the cat sat on the mat"
SPEC = f"""
kind: jacobians
model: tiny-words
prompt: Mary gave the book to
source: hook_resid_mid
target: hook_mlp_out
values: 3
layers: [1]
lens: {{texts: ["{LONG} {LONG}"], follow: [John]}}
"""


@pytest.fixture
def call(monkeypatch, tmp_path, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_specs, "load", tiny_load(tokenizer))

    def run(text: str):
        (tmp_path / "spec.yaml").write_text(text)
        return CliRunner().invoke(cli.app, ["run", "spec.yaml"])

    return run


def test_results_are_those_of_the_functions(call, tmp_path, tokenizer):
    result = call(SPEC)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "runs").iterdir()
    run, model = Run.open(path), tiny_load(tokenizer)("tiny-words")
    assert run.names == ["spectra", "similarity-1", "values-1", "lens", "readout", "logit-lens"]
    dense = interp.jacobian(
        model, "Mary gave the book to", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "same"
    ).dense()
    values = torch.linalg.svdvals(dense)[:, :3]
    torch.testing.assert_close(run.load("values-1").value, values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.load("spectra").values[1, 0], values[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        run.load("similarity-1").value, torch.einsum("aij,bij->ab", dense, dense), rtol=1e-4, atol=1e-5
    )
    again = run.load("lens").readout(model, "Mary gave the book to", ["John"])
    torch.testing.assert_close(run.load("readout").probabilities, again.probabilities)
    assert len(run.figures) == 4
    assert "Jacobian lens" in (path / "report.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hook_mlp_out", "hook_mlp_outs", "hook_mlp_outs"), ("layers: [1]", "layers: [9]", "blocks.9"),
        ("values: 3", "value: 3", "did you mean values"), ("follow: [John]", "follow: [Mary John]", "Mary John"),
        ("layers: [1]", "layers: [1, 1]", "different layers"), ("values: 3", "values: 0", "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_wrong_specification_makes_no_folder(call, tmp_path, old, new, words):
    assert old in SPEC
    result = call(SPEC.replace(old, new))
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "runs").exists()
