"""A real browser, and a finished run of the demo on tiny models."""

import contextlib
import os
import shutil

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


def _missing(reason: str):
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI needs this: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        _missing(f"playwright is not installed: {error}")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        _missing(f"no browser: none of {', '.join(CHROMIUM)}")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield started
        started.close()


def _files_only(route):
    if route.request.url.startswith("file:"):
        route.continue_()
    else:
        route.abort()


@pytest.fixture
def open_page(browser):
    """A function that opens a report from the file system, and what that caused: requests, errors, dialogs."""
    with contextlib.ExitStack() as stack:

        def open_(path, width: int = 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            stack.callback(page.close)
            seen: dict[str, list[str]] = {"requests": [], "errors": [], "dialogs": []}
            page.route(
                "**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort()
            )
            page.on("request", lambda r: seen["requests"].append(r.url[:120]))
            page.on("console", lambda m: seen["errors"].append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: seen["errors"].append(str(e)))
            page.on("dialog", lambda d: (seen["dialogs"].append(d.message), d.dismiss()))
            page.goto(path.resolve().as_uri())
            page.wait_for_selector("body[data-drawn=yes]", timeout=60_000)
            return page, seen

        yield open_


@pytest.fixture(scope="session")
def tiny_run(tokenizer, tmp_path_factory):
    """The demo's run on tiny models. Read only."""
    from interp.runs import demo
    from tests.apps.samples import tiny_load

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load", tiny_load(tokenizer))
        prompts = ({"prompt": "Mary gave the book to", "target": "John", "foil": "Mary"}, {"prompt": "the cat sat on"})
        spec = demo.DemoSpec(model="tiny-words", image_model="tiny-eyes", prompts=prompts)
        return demo.run_demo(spec, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def explorer(monkeypatch, tmp_path, tokenizer):
    """Open sessions of an explorer on tiny models, with a workshop of its own."""
    import interp
    from interp.apps.explorer import desk
    from tests.apps.explorer_app import PROMPT, App
    from tests.apps.samples import tiny_load

    desk.workshop.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interp, "load", tiny_load(tokenizer), raising=False)
    monkeypatch.setenv("INTERP_EXPLORE_MODEL", "tiny-words")
    monkeypatch.delenv("INTERP_EXPLORE_RUN", raising=False)
    return lambda **fields: App(**{"prompt": PROMPT} | fields)
