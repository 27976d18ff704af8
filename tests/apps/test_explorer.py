"""The explorer's frame and its page Prompt: controls, refusals, progress, cancelling, links, scripts."""

import threading

import pytest

import interp
from interp.apps.explorer import desk
from interp.hooks.errors import NotCachedError
from tests.apps.explorer_app import PROMPT, App, check_scripts
from tests.apps.samples import HOSTILE, tiny_load


def test_a_prompt_gives_tokens_lens_and_patterns(explorer):
    app = explorer().settle()
    assert app.titles == [
        "What comes next", "What is followed", "The answer, layer by layer", "What heads look at",
        "Which places carry the answer",
    ]  # fmt: skip
    assert len(app.figures) == 4
    assert app.errors == []


def test_scripts_give_the_same_numbers(explorer):
    app = explorer(corrupt="John gave the book to", position="3", layer="1", head="2").settle().press("Patch")
    assert len(app.figures) == 5
    assert check_scripts(app) == 5
    assert any("interp.patch_grid(" in text for text in app.scripts)
    assert app.scripts[0].splitlines()[:2] == ["import interp", ""]


def test_the_address_says_what_is_shown_and_opens_it_again(explorer):
    app = explorer().settle()
    app.set("layer", 1).set("position", 2)
    said = {key: value[0] if isinstance(value, list) else value for key, value in app.at.query_params.items()}
    assert said["layer"] == "1"
    assert said["position"] == "2"
    assert said["prompt"] == PROMPT
    again = App(**said).settle()
    assert again.figures == app.figures
    assert again.control("layer").value == 1


def test_target_and_foil_are_picked_and_typed(explorer):
    app = explorer().settle()
    first = app.scripts[1]
    app.set("target", app.control("target").options and app.at.session_state["link"]["foil"])
    assert app.scripts[1] != first or app.errors
    app.at.text_input(key="write target").set_value("John")
    app.settle()
    assert '["John"' in app.scripts[1]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"prompt": ""}, ["an empty prompt", "Needed"]),
        ({"prompt": "the cat " * 20_000}, ["160,000 characters", "100,000"]),
        ({"prompt": "the cat " * 1_000}, ["2,000 tokens", "1,024", "shorten it"]),
        ({"page": "Nowhere"}, ["page", "Nowhere", "Prompt"]),
        ({"model": "../../secrets"}, ["secrets", "interp explore"]),
        ({"target": "John Mary"}, ["encodes to 2 ids"]),
    ],
    ids=["empty", "huge", "many tokens", "unknown page", "model that is not offered", "two tokens"],
)
def test_what_cannot_be_shown_is_refused_with_words(explorer, fields, parts):
    app = explorer(**fields).settle()
    said = " ".join(app.errors).replace("\\", "")
    for part in parts:
        assert part in said


def test_a_missing_model_is_said_and_can_be_tried_again(explorer, monkeypatch, tokenizer):
    def missing(name, **_):
        raise NotCachedError(f"model {name!r} is not here", "its files", f"run interp fetch {name}")

    monkeypatch.setattr(interp, "load", missing)
    app = explorer().settle()
    assert "interp fetch tiny" in app.errors[0].replace("\\", "")
    monkeypatch.setattr(interp, "load", tiny_load(tokenizer))
    app.press("Try again")
    assert app.errors == []
    assert len(app.figures) == 4


def test_prompts_of_other_lengths_are_refused_by_patching(explorer):
    app = explorer(corrupt="the cat").settle().press("Patch")
    assert "tokens" in app.errors[0]


def test_hostile_text_is_shown_as_it_is(explorer, monkeypatch):
    app = explorer(prompt=" ".join(HOSTILE) + " :red[x] $y$ **z** the cat").settle()
    assert "<script>" not in app.words.replace("\\<", "")
    labels = [str(o.content if hasattr(o, "content") else o) for o in app.control("position").options]
    assert not [text for text in labels if "<" in text.replace("\\<", "")]


def slow(monkeypatch, gate: threading.Event):
    """Loading waits at a gate."""
    plain = interp.load

    def load(name, **_):
        assert gate.wait(30)
        return plain(name)

    monkeypatch.setattr(interp, "load", load)


def test_work_is_said_and_cancelled_and_run_again(explorer, monkeypatch):
    gate = threading.Event()
    slow(monkeypatch, gate)
    app = explorer().run()
    assert "Cancel" in app.labels
    next(b for b in app.at.button if b.label == "Cancel").click()
    app.run()
    assert "Run again" in app.labels
    assert "cancelled" in app.words
    gate.set()
    app.press("Run again")
    assert len(app.figures) == 4


def test_two_sessions_with_different_prompts_do_not_mix(explorer):
    prompts = ["the cat sat on", "Mary gave the book to John", "John gave the cat to"]
    alone = {}
    for prompt in prompts:
        alone[prompt] = explorer(prompt=prompt).settle().figures
    desk.workshop.cache_clear()
    apps = {prompt: explorer(prompt=prompt) for prompt in prompts}
    for _ in range(3):  # What the one waits for is computed between runs of the others.
        for app in apps.values():
            app.run()
    for app in apps.values():
        app.settle()
    for prompt, app in apps.items():
        assert app.figures == alone[prompt]
        assert all(prompt in text for text in app.scripts)
