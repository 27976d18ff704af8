"""The explorer in a real browser, on a tiny model: clicks, links, cancelling, two users, no network."""

import json

import pytest

from tests.apps.serving import serving, settled
from tests.cases import build

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PROMPT = "Mary gave the book to"


@pytest.fixture(scope="module")
def address(tokenizer, tmp_path_factory):
    """A server on a folder with a tiny Llama."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serving("--model", str(folder)) as found:
        yield found


@pytest.fixture
def open_(browser, address):
    """Open pages in sessions of their own; whatever is asked of another machine is noted and not answered."""
    contexts = []

    def go(**fields: str):
        from urllib.parse import urlencode

        context = browser.new_context(viewport={"width": 1440, "height": 1400})
        contexts.append(context)
        page = context.new_page()
        seen: dict[str, list[str]] = {"errors": [], "elsewhere": []}
        page.on("pageerror", lambda e: seen["errors"].append(str(e)))

        def route(request):
            url = request.request.url
            if url.startswith((address, "data:", "blob:", address.replace("http", "ws"))):
                request.continue_()
            else:
                seen["elsewhere"].append(url)
                request.abort()

        page.route("**/*", route)
        page.goto(f"{address}/?{urlencode({'prompt': PROMPT} | fields)}")
        settled(page)
        return page, seen

    yield go
    for context in contexts:
        context.close()


def marks(page, figure: int, view: str):
    """The clickable marks of a view of the page's nth figure."""
    return page.locator("[data-testid=stVegaLiteChart]").nth(figure).locator(f"[class*='role-mark {view}'] path")


def changed(page, part: str) -> None:
    """Wait until the address holds this, and the page is settled."""
    page.wait_for_function("part => location.href.includes(part)", arg=part, timeout=30_000)
    settled(page)


def test_a_page_shows_figures_with_the_network_off(open_):
    page, seen = open_()
    assert page.locator("[data-testid=stVegaLiteChart] .marks").count() == 4
    assert seen == {"errors": [], "elsewhere": []}
    assert "Traceback" not in page.inner_text("body")


def test_a_clicked_column_and_a_clicked_head_change_the_page(open_):
    page, seen = open_()
    marks(page, 1, "cells").nth(1).click(force=True)
    changed(page, "position=1")
    page, _ = open_(page="Observables", target="John", foil="Mary")
    marks(page, 0, "heads").nth(5).click(force=True)
    changed(page, "layer=1")
    assert seen["errors"] == []


def test_a_path_is_followed_by_clicking_and_steered_along(open_):
    page, seen = open_(page="Observables", target="John", foil="Mary")
    marks(page, 3, "bars").first.click(force=True)
    changed(page, "path=L")
    first = page.url.partition("path=")[2]
    marks(page, 3, "bars").nth(1).click(force=True)
    page.wait_for_function("old => !location.href.endsWith('path=' + old)", arg=first, timeout=30_000)
    settled(page)
    page.get_by_text("Steer along it").wait_for()
    before = page.locator("[data-testid=stVegaLiteChart]").last.inner_text()
    slider = page.get_by_role("slider", name="Dose")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    changed(page, "dose=")
    assert page.locator("[data-testid=stVegaLiteChart]").last.inner_text() != before
    assert seen["errors"] == []


def test_a_link_opens_the_same_page(open_):
    page, _ = open_(page="Observables", target="John", foil="Mary", path="L1H0@2 -> logits@4", layer="1", head="3")
    again, _ = open_()
    again.goto(page.url)
    settled(again)
    texts = [p.locator("[data-testid=stVegaLiteChart]").all_inner_texts() for p in (page, again)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


def test_two_users_see_their_own_prompts(open_):
    prompts = ["the cat sat on", "John gave the cat to"]
    first, second = (open_(prompt=prompt)[0] for prompt in prompts)
    for page, prompt in zip((first, second), prompts, strict=True):
        assert page.get_by_role("textbox", name="Prompt", exact=True).input_value() == prompt
        tokens = page.locator("[data-testid=stVegaLiteChart]").nth(1).inner_text()
        assert ("John" in tokens) == ("John" in prompt)


def test_work_is_cancelled_and_run_again(open_):
    long = "the cat sat on " * 70
    page, seen = open_(prompt=f"{long}Mary", corrupt=f"{long}John", target="John", foil="Mary")
    page.get_by_role("button", name="Patch").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Run again").wait_for()
    assert "cancelled" in page.inner_text("body")
    assert seen["errors"] == []


def test_a_file_is_saved_and_is_what_is_shown(open_, tmp_path):
    page, _ = open_()
    page.get_by_text("Save or copy").first.click()
    with page.expect_download() as saving:
        page.get_by_role("button", name="JSON").first.click()
    saving.value.save_as(tmp_path / "figure.json")
    spec = json.loads((tmp_path / "figure.json").read_text())
    assert len(spec["datasets"]["rows"]) == 10
    page.get_by_text("import interp").first.wait_for()


def test_hostile_text_runs_nothing(open_):
    page, seen = open_(prompt="<img src=x onerror=alert(1)> </script><script>alert(2)</script> the cat :red[x]")
    dialogs = []
    page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    page.wait_for_timeout(500)
    assert dialogs == seen["errors"] == []
    assert page.locator("[data-testid=stMain] img[src=x]").count() == 0


@pytest.fixture
def packaged_pictures():
    """The packaged networks of pictures, or a word on why not."""
    from interp.hooks.loading import available
    from tests.conftest import missing

    wanted = {"efficientnet-lite0", "esrgan-slim-x2"}
    if lacking := wanted - {row["name"] for row in available() if row["cached"]}:
        missing(f"not in the cache: {', '.join(sorted(lacking))}")


def test_a_clicked_pixel_is_read(open_, packaged_pictures):
    page, seen = open_(page="Linear map", input="picture", image_model="esrgan-slim-x2")
    drawn = page.locator("[data-testid=stVegaLiteChart]").nth(1).locator(".marks")
    drawn.scroll_into_view_if_needed()
    box = drawn.bounding_box()  # So many marks are drawn on a canvas: 48 cells of 7 pixels, and a margin.
    margin = (box["width"] - 48 * 7) / 2
    page.mouse.click(box["x"] + margin + 30.5 * 7, box["y"] + margin + 20.5 * 7)
    changed(page, "pixel=20%2C30")
    assert "(20, 30)" in page.locator("[data-testid=stVegaLiteChart]").nth(2).inner_text()
    assert seen["errors"] == []


def test_a_file_that_is_no_picture_is_refused(open_, tmp_path, packaged_pictures):
    (tmp_path / "words.png").write_text("no picture")
    page, _ = open_(page="Linear map", input="picture")
    page.set_input_files("input[type=file]", tmp_path / "words.png")
    page.get_by_text("no picture").wait_for(timeout=60_000)
    assert "Traceback" not in page.inner_text("body")
