"""Files of specifications: YAML and TOML alike, fields replaced from the command line, mistakes named."""

import pytest

from interp.hooks.errors import ArgumentError
from interp.runs.run import canonical
from interp.runs.specs import read_spec

YAML = """
kind: linear_scope
model: smollm2-135m
inputs: [{text: The cat}, {text: The dog}]
svd: {k: 3}
"""
TOML = """
kind = "linear_scope"
model = "smollm2-135m"
inputs = [{text = "The cat"}, {text = "The dog"}]
[svd]
k = 3
"""


@pytest.fixture
def spec(tmp_path):
    """Read a text as a file, with fields replaced."""

    def read(text, *overrides, name="spec.yaml"):
        (tmp_path / name).write_text(text)
        return read_spec(tmp_path / name, overrides)

    return read


def test_toml_says_the_same_as_yaml(spec):
    one, other = spec(YAML), spec(TOML, name="spec.toml")
    assert one == other
    assert canonical(one.model_dump(mode="json")) == canonical(other.model_dump(mode="json"))


def test_fields_are_replaced(spec):
    made = spec(YAML, "inputs.1.text='  A bird'", "svd.k=7", "stability=true", "token_blocks.probes=4", "figures=[]")
    assert made.inputs[1].text == "  A bird"
    assert (made.svd.k, made.stability, made.token_blocks.probes, made.figures) == (7, True, 4, ())
    assert made == spec(YAML.replace("The dog", '"  A bird"').replace("k: 3", "k: 7") + "stability: true\n"
                        "token_blocks: {probes: 4}\nfigures: []")  # fmt: skip
    assert spec(YAML, "svd=null").svd is None


BAD = {
    "a key that is misspelt": ("svd.kk=4", "svd.kk=4: key 'svd.kk' is unknown.*one of k,.*did you mean k"),
    "a key of the file": ("modell=x", "key 'modell' is unknown.*did you mean model"),
    "a value of another type": ("svd.k=many", "svd.k 'many'"),
    "no value": ("svd", "needed: key=value"),
    "an empty part": ("svd..k=3", "needed: key=value"),
    "an index outside": ("inputs.2.text=x", "'2' in inputs.*from 0 to 1"),
    "no index": ("inputs.text=x", "'text' in inputs.*from 0 to 1"),
    "into a text": ("model.name=x", "model is 'smollm2-135m'.*give it whole: model={name"),
    "no YAML": ("model=[", "is not YAML.*quotes"),
    "another kind": ("kind=linear_scpe", "kind 'linear_scpe'.*did you mean linear_scope"),
}


@pytest.mark.parametrize(("override", "said"), BAD.values(), ids=BAD)
def test_a_bad_override_is_refused(spec, override, said):
    with pytest.raises(ArgumentError, match=said):
        spec(YAML, override)


@pytest.mark.parametrize(
    ("text", "said"), [("a = [", "is not TOML"), ("a = 1\na = 2", "is not TOML"), ("[svd]\nk = 3", "kind None")]
)
def test_bad_toml_is_refused(spec, text, said):
    with pytest.raises(ArgumentError, match=said):
        spec(text, name="spec.toml")
