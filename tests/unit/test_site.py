"""Site: what parses, prints back; what cannot be printed back is refused."""

import pickle

import pytest

from interp.hooks.errors import SiteError
from interp.hooks.site import Site

FORMS = {
    "hook_embed": Site("hook_embed"),
    "blocks.6.hook_resid_post": Site("blocks.6.hook_resid_post"),
    "blocks.*.attn.hook_z": Site("blocks.*.attn.hook_z"),
    "blocks.?.hook_mlp_out": Site("blocks.?.hook_mlp_out"),
    "blocks.6.attn.hook_z#3": Site("blocks.6.attn.hook_z", head=(3,)),
    "blocks.6.attn.hook_z#3,5": Site("blocks.6.attn.hook_z", head=(3, 5)),
    "blocks.6.attn.hook_z#3@5": Site("blocks.6.attn.hook_z", head=(3,), positions=(5,)),
    "blocks.6.attn.hook_z@-1": Site("blocks.6.attn.hook_z", positions=(-1,)),
    "blocks.6.attn.hook_z@0,-2,7": Site("blocks.6.attn.hook_z", positions=(0, -2, 7)),
    "ln_final.hook_normalized@last": Site("ln_final.hook_normalized", positions="last"),
    "features.3.conv:in": Site("features.3.conv", io="in"),
    "encoder[last_hidden_state]": Site("encoder", selector=("last_hidden_state",)),
    "encoder[0][attentions][-1]": Site("encoder", selector=(0, "attentions", -1)),
    "encoder:in[1]": Site("encoder", io="in", selector=(1,)),
    "a:in[hidden_states]#1@last": Site("a", "in", ("hidden_states",), (1,), "last"),
    "module.with_underscore.0": Site("module.with_underscore.0"),
}


@pytest.mark.parametrize("text", FORMS)
def test_round_trip(text):
    site = Site.parse(text)
    assert site == FORMS[text]
    assert str(site) == text
    assert Site.parse(str(site)) == site
    assert hash(site) == hash(FORMS[text])
    assert eval(repr(site), {"Site": Site.parse}) == site
    assert pickle.loads(pickle.dumps(site)) == site
    assert Site.parse(site) is site


def test_out_is_the_default_and_is_not_printed():
    assert Site.parse("conv:out") == Site("conv")
    assert str(Site.parse("conv:out[0]")) == "conv[0]"


@pytest.mark.parametrize("text", [
    "", " ", "a b", "a@", "a#", "a#x", "a#-1", "a@first", "a@1,", "a@1.5", "a[]", "a[0", "a:both", "a:in:out", "a@1#2",
    "#3", "@1", "[0]", ":in", "a#1#2", "a@last,1",
])  # fmt: skip
def test_what_does_not_parse(text):
    with pytest.raises(SiteError) as caught:
        Site.parse(text)
    assert repr(text) in str(caught.value)
    assert "needed: the form ADDRESS" in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, 2.5, ["hook_embed"], object()])
def test_what_is_not_text(value, unchecked):
    with pytest.raises(SiteError):
        Site.parse(value)


@pytest.mark.parametrize("fields", [
    {"address": "a b"}, {"address": "a@3"}, {"address": "a", "head": "x"}, {"address": "a", "head": (-1,)},
    {"address": "a", "positions": "first"}, {"address": "a", "positions": ()}, {"address": "a", "head": ()},
    {"address": "a", "selector": ("x]y",)}, {"address": "a", "selector": ("0",)}, {"address": "a", "io": "both"},
    {"address": "a", "head": True}, {"address": "a", "positions": 1.5},
])  # fmt: skip
def test_fields_that_could_not_be_printed_and_parsed_back(fields, unchecked):
    with pytest.raises(SiteError):
        Site(**fields)


def test_numbers_and_lists_become_tuples(unchecked):
    assert Site("a", head=3, positions=[1, 2]) == Site("a", head=(3,), positions=(1, 2))
    assert Site("a", positions=range(3)).positions == (0, 1, 2)


def test_narrowing():
    site = Site("blocks.0.attn.hook_z")
    assert str(site.at(head=(1,), positions="last")) == "blocks.0.attn.hook_z#1@last"
    assert site.at() == site
    assert Site.parse("a#2@3").whole == Site("a")
    assert Site.parse("a:in[0]#2@3").whole == Site("a", "in", (0,))
    assert Site.parse("blocks.*.x").is_glob
    assert not site.is_glob


def test_frozen():
    with pytest.raises(AttributeError):
        Site("a").address = "b"  # type: ignore[misc]
