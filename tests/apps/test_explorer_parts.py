"""What the explorer's pages are made of: calls and their scripts, the workshop, words that are shown as they are."""

import threading
import time

import pytest
import torch

from interp.apps.explorer.calls import call, carry_out, script, value
from interp.apps.explorer.desk import escaped
from interp.apps.explorer.workshop import Cancelled, Workshop
from interp.hooks.watching import watched
from tests.apps.samples import HOSTILE


def compute(wanted):
    return carry_out(wanted, lambda _, make: make())


def test_a_script_gives_what_the_call_gives():
    site = call("site", "interp.Site", value("address", 'blocks.3."odd'), head=(2,))
    text = call("text", "interp.Site.parse", "hook_embed").method("moved", "at", positions=3)
    both = call("both", "json.dumps", {"a": [1, (2,)], "b": None})
    space: dict = {}
    exec(script(site, text, both), space)
    assert space["site"] == compute(site)
    assert space["moved"] == compute(text)
    assert space["both"] == compute(both) == '{"a": [1, [2]], "b": null}'


def test_a_script_names_equal_calls_once_and_different_ones_apart():
    made = [call("site", "interp.Site.parse", name) for name in ("hook_embed", "hook_embed", "ln_final.hook_out")]
    text = script(call("pair", "builtins.list", made))
    assert text.count("interp.Site.parse(") == 2
    assert "site_2 = " in text
    assert made[0].key == made[1].key != made[2].key


def test_items_are_written_and_read():
    row = value("rows", [10, 20]).item("second", 1)
    assert script(row).endswith("second = rows[1]\n")
    assert compute(row) == 20


@pytest.mark.parametrize("text", [*HOSTILE, "a\tb", "*x* _y_ [l](u) :smile: $x$ `c` # h"])
def test_escaped_text_holds_no_markup(text):
    shown = escaped(text)
    assert "\n" not in shown
    bare = [c for i, c in enumerate(shown) if c in "<>*_[]`$#:" and (i == 0 or shown[i - 1] != "\\")]
    assert bare == []


class Gate:
    """Work that waits, in forward calls of a module, until it is let go."""

    def __init__(self):
        self.open, self.begun = threading.Event(), threading.Event()
        self.net = torch.nn.Identity()

    def work(self, name):
        self.begun.set()
        while not self.open.is_set():
            self.net(torch.zeros(1))
            time.sleep(0.005)
        return name


@pytest.fixture
def gate(monkeypatch):
    made = Gate()
    monkeypatch.setattr(torch, "gate_work", made.work, raising=False)
    return made


def test_equal_work_is_done_once_for_all_sessions(gate):
    shop = Workshop()
    first, second = (shop.ask(call("x", "torch.gate_work", "a"), name) for name in ("one", "two"))
    assert first is second
    gate.open.set()
    assert first.future.result(10) == "a"
    assert shop.get(call("x", "torch.gate_work", "a")) == "a"


def test_work_ends_when_the_last_session_leaves(gate):
    shop = Workshop()
    job = shop.ask(call("x", "torch.gate_work", "a"), "one")
    shop.ask(call("x", "torch.gate_work", "a"), "two")
    assert gate.begun.wait(10)
    job.leave("one")
    assert not job.wait(0.1)
    job.leave("two")
    with pytest.raises(Cancelled):
        job.future.result(10)
    gate.open.set()
    again = shop.ask(call("x", "torch.gate_work", "a"), "one")
    assert again is not job
    assert again.future.result(10) == "a"


def test_work_on_one_model_is_done_one_after_the_other(gate):
    shop = Workshop()
    jobs = [shop.ask(call("x", "torch.gate_work", name), name) for name in "ab"]
    assert gate.begun.wait(10)
    time.sleep(0.05)
    assert [job.running for job in jobs] == [True, False]
    gate.open.set()
    assert [job.future.result(10) for job in jobs] == ["a", "b"]


def test_closing_ends_what_is_under_way_and_what_waits(gate):
    shop = Workshop()
    jobs = [shop.ask(call("x", "torch.gate_work", name), name) for name in "ab"]
    assert gate.begun.wait(10)
    shop.close()
    with pytest.raises(Cancelled):
        jobs[0].future.result(10)
    assert jobs[1].future.cancelled()


def test_results_beyond_the_budget_are_forgotten_oldest_first():
    shop = Workshop(budget=3000)
    for name in "abcd":
        shop.keep(name, torch.zeros(256))
    assert [k for k in "abcd" if k in shop._kept] == ["c", "d"]


def test_an_error_in_watching_takes_all_hooks_off():
    from torch.nn.modules import module

    net, before = torch.nn.Sequential(torch.nn.Linear(2, 2)), dict(module._global_forward_pre_hooks)

    def stop(_):
        raise Cancelled

    with pytest.raises(Cancelled), watched(stop):
        net(torch.ones(1, 2))
    assert module._global_forward_pre_hooks == before
    net(torch.ones(1, 2))


def test_watching_sees_its_own_thread_alone():
    net, seen = torch.nn.Linear(2, 2), []
    with watched(seen.append):
        other = threading.Thread(target=net, args=(torch.ones(1, 2),))
        other.start()
        other.join()
        assert seen == []
        net(torch.ones(1, 2))
    assert seen == [net]
