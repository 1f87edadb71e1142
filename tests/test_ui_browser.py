"""The page in a real browser: asked with the keyboard, on a phone, in the dark, and by axe."""

from __future__ import annotations

import base64
import gc
import io
import json
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parts import HashingEncoder, small_recipe
from PIL import Image
from test_ui import pictured, png

from retrodiff.bridges.credited import read_credit
from retrodiff.retrieval import Uniform
from retrodiff.ui import LIMITS, Shelf, Shelves, Studio, shown

pytest.importorskip("gradio", reason="gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

CHROMIUM = next(
    (p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/google-chrome")) if p.exists()), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    # Of Gradio itself: what newer packages call deprecated, and an event loop left open.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATIENCE = 20_000
"""Milliseconds that a busy machine may take."""


@pytest.fixture(scope="module")
def studio():
    encoder = HashingEncoder(8)
    art, photos = pictured(30, 1), pictured(20, 2)
    model = small_recipe(encoder, art).proposal(Uniform()).build()
    shelves = Shelves([Shelf("art", art), Shelf("photos", photos, chosen=False)])
    return Studio(model, shelves, "small", replace(LIMITS, upload=10**6))


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What Gradio and Playwright leave open is collected here, not in another file's tests."""
    yield
    for _ in range(3):
        gc.collect()


@pytest.fixture(scope="module")
def place(studio) -> Iterator[tuple[str, Any]]:
    """The address of a running page, and a browser that reaches nothing else."""
    with ExitStack() as stack:
        address = stack.enter_context(shown(studio, examples=["a bell", "a cat"]))
        playwright = stack.enter_context(sync_api.sync_playwright())
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        stack.callback(browser.close)
        yield address, browser


class Visit:
    """A page that is open, and what it tried to reach."""

    def __init__(self, place: tuple[str, Any], **options: Any):
        self.address, browser = place
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        self.elsewhere: list[str] = []
        self.broken: list[str] = []
        self.page.route(lambda url: not url.startswith((self.address, "data:")), self._refused)
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self.page.goto(self.address)
        expect(self.cards).to_have_count(12)

    def _refused(self, route: Any) -> None:
        self.elsewhere.append(route.request.url)
        route.abort()

    @property
    def cards(self) -> Any:
        return self.page.locator("#rd-near .rd-card")

    @property
    def samples(self) -> Any:
        return self.page.locator("#rd-made .rd-sample")

    def names(self) -> list[str]:
        return self.page.locator("#rd-near .rd-name").all_inner_texts()

    def settings(self) -> None:
        self.page.get_by_role("button", name="Settings").click()
        expect(self.page.locator("#rd-where")).to_be_visible()

    def sampled(self, count: int = 4) -> None:
        self.page.get_by_role("button", name="Sample", exact=True).click()
        expect(self.page.locator("#rd-made .rd-links")).to_have_count(count)


@pytest.fixture
def visit(place) -> Iterator[Visit]:
    visit = Visit(place, viewport={"width": 1280, "height": 900})
    yield visit
    visit.page.close()
    assert visit.broken == []


def test_neighbors_follow_the_prompt_and_samples_form(visit):
    """Nothing is asked of the network meanwhile."""
    expect(visit.page).to_have_title("retrodiff: small")
    expect(visit.page.get_by_label("Prompt")).to_have_value("a bell")
    before = visit.names()
    visit.page.get_by_label("Prompt").fill("something else")  # as pasting does, without keys
    expect(visit.page.locator("#rd-near .rd-name")).not_to_have_text(before)
    expect(visit.page.locator("#rd-near .used")).to_have_count(3)
    visit.sampled()
    assert visit.samples.count() == 4
    painter = visit.samples.nth(1).locator(".rd-by").first
    painter.hover()
    heat = visit.samples.nth(1).locator(".rd-heat")
    expect(heat).to_have_class("rd-heat on")
    assert heat.get_attribute("src") == painter.get_attribute("data-heat")
    expect(visit.samples.nth(0).locator(".rd-heat")).to_have_class("rd-heat")
    # A card above lights all samples.
    visit.page.locator("#rd-near .used img").first.hover()
    expect(visit.page.locator("#rd-made .rd-heat.on")).to_have_count(4)
    assert visit.elsewhere == []


def test_what_is_downloaded_says_where_it_comes_from(visit, tmp_path):
    visit.sampled()
    for name in ("Download sample 2 as PNG", "Download all with their origin (zip)"):
        with visit.page.expect_download() as download:
            visit.page.get_by_role("link", name=name).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
    credit = read_credit(tmp_path / "a-bell-seed0-1.png")
    assert credit["prompt"] == "a bell"
    assert credit["same_pixels"]
    assert len(credit["references"]) == 3
    with zipfile.ZipFile(tmp_path / "a-bell-seed0.zip") as packed:
        assert len(packed.namelist()) == 8
        about = json.loads(packed.read("a-bell-seed0-1.png.json"))
    assert about["references"] == credit["references"]


def test_neighbors_are_pinned_and_dropped(visit):
    names = visit.names()
    visit.page.get_by_role("button", name=f"Pin {names[7]}").click()
    expect(visit.page.locator("#rd-near .pinned .rd-name")).to_have_text(names[7])
    assert visit.names()[0] == names[7]
    visit.page.get_by_role("button", name=f"Leave out {names[0]}").click()
    expect(visit.page.get_by_text("1 left out: take back")).to_be_visible()
    assert names[0] not in visit.names()
    visit.sampled()
    painters = visit.samples.first.locator(".rd-by")
    assert names[7] in (painters.first.get_attribute("title") or "")
    assert not any(names[0] in (p.get_attribute("title") or "") for p in painters.all())
    visit.page.get_by_text("1 left out: take back").click()
    expect(visit.page.get_by_text("1 left out")).to_have_count(0)
    assert names[0] in visit.names()


def test_databases_are_swapped_and_compared(visit):
    visit.settings()
    visit.page.locator("#rd-names").get_by_label("photos").check()
    visit.page.locator("#rd-names").get_by_label("art").uncheck()
    expect(visit.page.locator("#rd-near .rd-name").nth(1)).to_have_text(re.compile("^2/"))
    visit.page.get_by_label("Compare with others").check()
    expect(visit.page.locator("#rd-near-other .rd-card")).to_have_count(12)
    visit.sampled()
    expect(visit.page.locator("#rd-made-other .rd-links")).to_have_count(4)
    expect(visit.page.locator("#rd-made h2")).to_have_text("Samples: photos")


def test_what_does_not_fit_is_said_in_a_line(visit):
    visit.settings()
    where = visit.page.locator("#rd-where :is(textarea, input)")
    where.press_sequentially("colour ==", delay=20)
    visit.page.wait_for_timeout(500)
    alert = visit.page.get_by_role("alert")
    expect(alert).to_have_count(0)  # half a condition is not complained of
    where.fill("colour == 'red'")
    where.blur()
    expect(alert).to_contain_text("unknown column 'colour'; columns: file, license, number")
    assert "Traceback" not in visit.page.content()
    assert "\n" not in alert.inner_text().strip()
    expect(alert).to_be_in_viewport()  # though the neighbors that it stands above are not
    where.fill("license == 'MIT'")
    where.press("Enter")
    expect(alert).to_have_count(0)
    expect(visit.page.locator("#rd-near .rd-license").first).to_have_text("MIT")
    expect(visit.page.get_by_text("CC0", exact=True)).to_have_count(0)


def test_without_a_prompt_the_page_says_what_to_do(visit):
    visit.page.locator("#rd-names").get_by_label("photos").check()  # an older search
    visit.page.get_by_label("Prompt").fill("")
    expect(visit.page.locator("#rd-near")).to_contain_text("Type a prompt, or give a picture")
    expect(visit.cards).to_have_count(0)
    visit.page.get_by_role("button", name="Sample", exact=True).click()
    expect(visit.page.get_by_role("alert")).to_contain_text("write a prompt, or give a picture")


def test_a_picture_is_asked_with(visit):
    before = visit.names()
    place = visit.page.locator(".rd-drop input")
    place.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(40)})
    expect(visit.page.get_by_alt_text("The picture that is asked with")).to_be_visible()
    expect(visit.page.locator("#rd-near .rd-name").first).not_to_have_text(before[0])
    visit.page.get_by_role("button", name="Remove the picture").click()
    expect(visit.page.locator("#rd-near .rd-name").first).to_have_text(before[0])
    place.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(visit.page.get_by_role("alert")).to_contain_text("The picture cannot be read")
    visit.page.wait_for_timeout(1000)  # it stays after the search that follows
    expect(visit.page.get_by_role("alert")).to_contain_text("The picture cannot be read")
    large = {"name": "b.png", "mimeType": "image/png", "buffer": b"0" * 1_500_000}
    place.set_input_files(large)
    expect(visit.page.get_by_role("alert")).to_contain_text("1.5 MB, more than 1.0 MB")


def test_the_keyboard_is_enough(visit):
    press = visit.page.keyboard.press
    expect(visit.page.get_by_label("Prompt")).to_be_focused()
    visit.page.keyboard.type(" of brass")
    press("Enter")
    expect(visit.page.locator("#rd-made .rd-links")).to_have_count(4)
    reached: list[str] = []
    for _ in range(200):
        press("Tab")
        focused = visit.page.evaluate(
            "() => { const e = document.activeElement;"
            " if (e.tagName === 'BUTTON' && e.innerText.startsWith('Settings')) return 'settings';"
            " return e.dataset.act ?? (e.dataset.heat ? 'heat' : e.dataset.prompt)"
            " ?? (e.download ? 'download' : e.type ?? e.tagName) }"
        )
        if focused == "pin" and "pin" not in reached:
            press("Space")
            expect(visit.page.locator("#rd-near .pinned")).to_have_count(1)
            assert visit.page.evaluate("document.activeElement.dataset.act") == "pin"
        if focused == "heat":
            expect(visit.page.locator(".rd-heat.on")).to_have_count(1)
        reached.append(focused)
        if focused == "settings":
            press("Enter")
            break
    assert {"pin", "drop", "heat", "download", "file", "a bell"} <= set(reached)
    expect(visit.page.locator("#rd-where")).to_be_visible()


# Things to press that are lower or narrower than 24 pixels; what is in a label is pressed by it.
SMALL = """() => [...document.querySelectorAll("button, a, label, summary")].filter((part) => {
  const { width, height } = part.getBoundingClientRect();
  return width && height && (width < 24 || height < 24) && part.checkVisibility();
}).map((part) => part.innerText)"""


def test_a_phone_needs_no_scrolling_sideways(place):
    visit = Visit(place, viewport={"width": 360, "height": 800}, is_mobile=True, has_touch=True)
    assert visit.cards.first.bounding_box()["y"] < 740  # neighbors begin on the first screen
    visit.page.get_by_role("button", name="Sample", exact=True).tap()
    expect(visit.page.locator("#rd-made h2")).to_be_in_viewport()  # one is taken to the samples
    expect(visit.page.locator("#rd-made .rd-links")).to_have_count(4)
    visit.settings()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (visit.samples.nth(i).bounding_box() for i in (0, 1))
    assert first["width"] >= 150
    assert second["x"] + second["width"] <= 360
    assert second["y"] == first["y"]
    assert visit.page.evaluate(SMALL) == []
    visit.samples.first.locator(".rd-by").first.tap()
    expect(visit.samples.first.locator(".rd-heat")).to_have_class("rd-heat on")
    visit.page.close()


def test_a_phone_compares_side_by_side(place):
    visit = Visit(place, viewport={"width": 360, "height": 800}, is_mobile=True, has_touch=True)
    visit.page.get_by_label("Compare with others").check()
    expect(visit.page.locator("#rd-near-other .rd-card")).to_have_count(12)
    visit.sampled()
    expect(visit.page.locator("#rd-made-other .rd-links")).to_have_count(4)
    other = visit.page.locator("#rd-made-other .rd-sample").first.bounding_box()
    own = visit.samples.first.bounding_box()
    assert own["x"] + own["width"] <= other["x"]
    assert other["x"] + other["width"] <= 360
    visit.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(place, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    visit = Visit(place, viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    visit.settings()
    visit.sampled()
    body = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", body)[:3])) > 3 * 128
    assert light == (scheme == "light")
    found = axe.Axe().run(visit.page).response["violations"]
    told = [
        (one["id"], one["impact"], [node["target"] for node in one["nodes"]][:4])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert told == []
    visit.page.close()


def test_only_what_the_page_needs_is_served(place):
    address, _ = place

    def status(path: str, data: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/") == 200
    assert status("/gradio_api/file=/etc/passwd") == 404
    assert status("/gradio_api/upload", b"x") == 404
    assert status("/gradio_api/proxy=http://example.org/") == 404
    assert status("/docs") == 404
    assert status("/", Host="evil.example") == 421
    assert status("/gradio_api/queue/join", b"x" * 25_000_000) == 413


def test_a_sample_is_the_models_own(visit, studio, tmp_path):
    visit.sampled()
    source = visit.samples.first.locator(".rd-pixel").get_attribute("src")
    seen = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    own = studio.model.sample(prompts=["a bell"] * 4).pil()[0]
    assert seen.convert("RGB").tobytes() == own.tobytes()
