"""The review page in Chromium, opened from a file. `make test-browser` runs these tests, `make test` skips them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generated_runs import Records, write_run

from scenarioclip_fast.data import rle
from scenarioclip_fast.generate.review import write_review
from scenarioclip_fast.generate.run_report import write_run_report
from scenarioclip_fast.report.page import Report, Section

playwright = pytest.importorskip("playwright.sync_api")

SCENES = 6  # on the page; one more is rejected by the captioner
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)"><!--<script>{{script}}&#60;'
OVERRIDE = "cat\u202egnp.exe\u2066"
LONG = "long " * 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "no chromium or google-chrome on PATH: install one, or set CHROMIUM to its path"
    with playwright.sync_playwright() as started:
        # Chromium has no sandbox for root.
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    return write_review(directory, write_run(directory, SCENES + 1), directory / "review.html", scenes=0)


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    yield from opened(browser, path)


def opened(browser: Any, path: Path, width: int = 1280) -> Iterator[Any]:
    """A page in a profile of its own; at the end, it must have reported nothing and requested nothing else."""
    context = browser.new_context(viewport={"width": width, "height": 844}, accept_downloads=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url, path) else None)
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not complaints


def is_foreign(url: str, path: Path) -> bool:
    return url != path.as_uri() and not url.startswith(("data:", "blob:"))


def saved(page: Any, press: Any) -> dict[str, Any]:
    with page.expect_download() as download:
        press()
    assert download.value.suggested_filename == "decisions.json"
    decisions: dict[str, Any] = json.loads(Path(download.value.path()).read_text())
    assert decisions["schema"] == 1
    return decisions["scenes"]


def keys(page: Any, *pressed: str) -> None:
    for key in pressed:
        page.keyboard.press(key)


def key_of(page: Any, i: int) -> str:
    return str(json.loads(page.text_content("#index"))["scenes"][i]["key"])


def retype(page: Any, text: str) -> None:
    keys(page, "Control+A", "Delete")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def test_keyboard(page: Any) -> None:
    """All decisions by keys alone; saved, and kept when the page is loaded again."""
    assert page.text_content("#count") == f"0 of {SCENES} scenes with decisions"
    keys(page, "j", "2", "x")  # scene 1: reject object 2
    assert page.get_attribute("#toggle-objects-1", "aria-pressed") == "true"
    keys(page, "1", "e")
    retype(page, "  wicker   basket ")
    assert page.text_content("#part-objects-0 .text") == "wicker basket"
    assert page.text_content("#count") == f"1 of {SCENES} scenes with decisions"  # a change is one
    keys(page, "Escape", "e")  # deselected, so that the action is edited
    retype(page, "packing a basket")
    keys(page, "Shift+1", "e")
    retype(page, "beside")
    keys(page, "a")  # goes on to scene 2
    assert page.input_value("#jump") == "3"
    keys(page, "1", "x", "r")
    assert page.input_value("#jump") == "4"
    keys(page, "a", "u")  # accepts scene 3 and takes it back
    assert page.input_value("#jump") == "4"
    keys(page, "ArrowRight", "r", "ArrowLeft")  # rejects scene 4, which goes on to scene 5; back at scene 4
    assert page.get_attribute("#reject", "aria-pressed") == "true"
    assert page.text_content("#count") == f"3 of {SCENES} scenes with decisions"
    expected = {
        key_of(page, 1): {
            "objects": {"1": {"reject": True}, "0": {"name": "wicker basket"}},
            "action": "packing a basket",
            "relations": {"0": {"predicate": "beside"}},
            "scene": "accept",
        },
        key_of(page, 2): {"objects": {"0": {"reject": True}}, "scene": "reject"},
        key_of(page, 4): {"scene": "reject"},
    }
    assert saved(page, lambda: page.keyboard.press("s")) == expected
    page.reload()
    assert page.text_content("#count") == f"3 of {SCENES} scenes with decisions"
    assert page.input_value("#jump") == "1"  # the first undecided one
    keys(page, "j")
    assert page.text_content("#part-objects-0 .text") == "wicker basket"
    assert saved(page, lambda: page.keyboard.press("s")) == expected


def test_edits_can_be_left_and_taken_back(page: Any) -> None:
    original = page.text_content("#part-objects-0 .text")
    keys(page, "1", "e")
    page.keyboard.type("other")
    keys(page, "Escape")
    assert page.text_content("#part-objects-0 .text") == original
    keys(page, "e")
    retype(page, "jar")  # letters of an edit are no commands
    assert page.input_value("#jump") == "1"
    keys(page, "e")
    retype(page, "")  # the original name again
    assert page.text_content("#part-objects-0 .text") == original
    keys(page, "x", "x", "a", "k", "a")
    assert saved(page, lambda: page.keyboard.press("s")) == {}
    keys(page, "u", "u")
    assert saved(page, lambda: page.keyboard.press("s")) == {}  # undone to a scene with a rejected object ...
    keys(page, "u")
    assert saved(page, lambda: page.keyboard.press("s")) == {key_of(page, 0): {"objects": {"0": {"reject": True}}}}


def test_mouse(page: Any, tmp_path: Path) -> None:
    box = page.locator("#boxes .box").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#objects li.on").count() == 1
    page.click("#toggle-objects-1")
    page.click("#edit-objects-0")
    page.fill("#edit", "thing")
    page.click("#part-relations-0")  # leaving the field keeps the edit
    assert page.text_content("#part-objects-0 .text") == "thing"
    assert page.locator("#region").evaluate("image => image.complete && image.naturalWidth") == 224
    page.click("#toggle-relations-0")
    page.click("#accept")
    page.click("#reject")
    page.select_option("#filter", "rejected")
    assert page.input_value("#jump") == "2"
    page.select_option("#filter", "undecided")
    assert page.input_value("#jump") == "3"
    assert page.is_disabled("#previous")  # scenes 1 and 2 are decided
    page.click("#undo")
    expected = saved(page, lambda: page.click("#save"))
    assert expected == {
        key_of(page, 0): {
            "objects": {"1": {"reject": True}, "0": {"name": "thing"}},
            "relations": {"0": {"reject": True}},
            "scene": "accept",
        }
    }
    other = {"elsewhere": {"scene": "reject"}, "__proto__": {"scene": "accept"}}
    file = tmp_path / "decisions.json"
    file.write_text(json.dumps({"schema": 1, "scenes": {**other, key_of(page, 3): {"scene": "accept"}}}))
    page.set_input_files("#file", file)
    playwright.expect(page.locator("#status")).to_contain_text("2 of them are not on this page, but kept")
    assert page.text_content("#count") == f"2 of {SCENES} scenes with decisions"
    merged = saved(page, lambda: page.click("#save"))
    assert merged == {**expected, **other, key_of(page, 3): {"scene": "accept"}}
    file.write_text('{"schema": 1, "scenes": {"a": {"objects": {"x": {}}}}}')
    page.set_input_files("#file", file)
    playwright.expect(page.locator("#status")).to_contain_text("expected valid objects of scene a")
    assert saved(page, lambda: page.click("#save")) == merged


def test_masks_are_drawn(page: Any) -> None:
    """The tinted pixels are those of the masks, which the page decodes by itself; colours of objects stay visible."""
    drawn = page.evaluate(
        """() => {
        const {width, height} = document.getElementById("masks");
        const {data} = document.getElementById("masks").getContext("2d").getImageData(0, 0, width, height);
        const alphas = [...data.filter((value, i) => i % 4 === 3 && value > 0)];
        return [height, width, alphas.length, [...new Set(alphas)].sort((a, b) => a - b)];
        }"""
    )
    scene = json.loads(page.text_content("#scene-0"))
    union = sum(rle.decode({"size": scene["size"], "counts": o["mask"]}).int() for o in scene["objects"]) > 0
    assert drawn[:3] == [*scene["size"], int(union.sum())]
    fill, outline = drawn[3]
    assert fill < 0.1 * 255 and outline == 255


def test_the_page_ends_at_the_buttons(browser: Any, path: Path) -> None:
    for width in (390, 1280):
        for page in opened(browser, path, width):
            left, right, nav = (page.locator(one).bounding_box() for one in ("#left", "#right", "nav"))
            end = page.evaluate("document.documentElement.scrollHeight")
            content = max(box["y"] + box["height"] for box in (left, right))
            assert end - content - nav["height"] <= 16 or end == 844  # no more than the gap between cards
            page.evaluate("scrollTo(0, 1e6)")
            assert (
                max(page.locator(one).evaluate("e => e.getBoundingClientRect().bottom") for one in ("#left", "#right"))
                <= nav["y"]
            )


def test_tables_of_scores_fit_a_narrow_screen(browser: Any, tmp_path: Path) -> None:
    rows = [["masks with an IoU of at least 0.75", "100.0 %", "100.0 %"]]
    report = Report("R", sections=[Section("S", ["", "before curation", "after"], rows)])
    for page in opened(browser, report.write(tmp_path / "report.html"), 390):
        assert page.locator(".scroll").evaluate("e => e.scrollWidth === e.clientWidth")


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_texts(browser: Any, tmp_path: Path, width: int) -> None:
    """Texts of others execute nothing, fetch nothing, and fit the page."""

    def change(i: int, records: Records) -> None:
        scene = records["curate"]["scene"]
        scene["caption"] = [EVIL, OVERRIDE, LONG, LONG.replace(" ", "")][i % 4]
        scene["action"] = scene["caption"]
        for k, entry in enumerate(scene["objects"]):
            entry["name"] = [EVIL, LONG, OVERRIDE, "\x1b[2J\x00"][(i + k) % 4]
        for relation in scene["relations"]:
            relation["predicate"] = [OVERRIDE, EVIL, LONG, LONG.replace(" ", "")][i % 4]
            relation["negatives"] = [EVIL, OVERRIDE, LONG]

    path = write_review(tmp_path, write_run(tmp_path, 5, change=change), tmp_path / "review.html", scenes=0)
    for page in opened(browser, path, width):
        for i in range(4):
            assert page.input_value("#jump") == str(i + 1)
            keys(page, "Shift+1", "e", "Enter", "x", "1", "e", "Enter")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("script").count() == page.locator('script[type="application/json"]').count() + 1
            assert page.locator("img").count() <= 2 and page.locator("#stage ~ img").count() == 0
            if i == 0:
                assert page.text_content("#caption") == EVIL
                assert page.text_content("#part-objects-0 .text") == EVIL
            if i == 1:
                assert page.text_content("#caption") == r"cat\u202egnp.exe\u2066"
            keys(page, "a")
        # An edit that was left unchanged is no decision.
        decided = saved(page, lambda page=page: page.keyboard.press("s"))
        assert [entry["objects"] for entry in decided.values() if "objects" in entry] == []
        assert all(entry["relations"] == {"0": {"reject": True}} for entry in decided.values())


def test_scores_have_a_heading(page: Any, browser: Any, tmp_path: Path) -> None:
    assert page.title().startswith("Generation review: ")
    heading, score = (page.locator(one).bounding_box() for one in ("#scores", "#part-objects-0 .note"))
    assert heading["y"] < score["y"] and page.text_content("#scores") == "score of the box"

    def change(i: int, records: Records) -> None:
        del records["curate"]["scene"]["scores"]

    path = write_review(tmp_path, write_run(tmp_path, 2, change=change), tmp_path / "review.html", scenes=0)
    for other in opened(browser, path):
        assert not other.is_visible("#scores")


def test_tables_of_the_report_scroll_by_themselves(browser: Any, path: Path, tmp_path: Path) -> None:
    """A narrow page does not scroll sideways, and every table can be scrolled to its end, also by keys."""
    report = write_run_report(path.parent, tmp_path / "report.html")
    for page in opened(browser, report, 390):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        tables = page.locator(".scroll:has(table)").all()
        assert len(tables) == 3
        wide = [table for table in tables if table.evaluate("e => e.scrollWidth > e.clientWidth")]
        assert wide
        for table in wide:
            table.focus()
            for _ in range(20):
                page.keyboard.press("ArrowRight")
            page.wait_for_function("document.activeElement.scrollLeft > 0")
            table.evaluate("e => e.scrollTo(e.scrollWidth, 0)")
            edge = table.locator("th:last-child").bounding_box()
            assert edge["x"] + edge["width"] <= 390
            assert table.evaluate("e => e.getBoundingClientRect().height") < 60 * table.locator("tr").count()


def test_narrow_screen_and_names(browser: Any, path: Path) -> None:
    """Everything fits 390 pixels; every control has a name and is large enough for a finger."""
    for page in opened(browser, path, 390):
        keys(page, "Shift+1")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for element in page.locator("button:visible, select:visible, input:visible").all():
            name = element.evaluate(
                "e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels[0]?.textContent.trim()"
            )
            assert name
            assert element.bounding_box()["height"] >= 24  # WCAG 2.2, target size (minimum)


CONTRAST = """selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()).map(e => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  let behind = e;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [numbers(getComputedStyle(e).color), numbers(getComputedStyle(behind).backgroundColor)].map(light);
  return [e.textContent.slice(0, 40), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
})"""


def test_help_names_the_command(browser: Any, path: Path) -> None:
    for page in opened(browser, path, 390):
        keys(page, "?")
        command = " ".join(page.inner_text("#help code").split())
        assert command == "scenarioclip-fast generate --out DIR --stages curate,pack --decisions decisions.json"
        assert page.locator("#help").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_contrast(page: Any) -> None:
    """All texts, also of pressed buttons, stand out from their background as WCAG 2.2 AA demands."""
    keys(page, "j", "r", "k", "a", "k", "2", "x", "1", "e")
    retype(page, "thing")
    for state in ("accept", "reject"):
        for key in ("", "2", "Shift+1"):
            keys(page, *filter(None, [key]))
            texts = page.evaluate(
                CONTRAST, "button, .badge, .note, .number, .text, .was, .box.on span, h1, h2, #count, #name"
            )
            assert len(texts) > 20
            assert {text: ratio for text, ratio in texts if ratio < 4.5} == {}, state
        keys(page, "j")
