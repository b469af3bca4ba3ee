"""The pages in a browser: nothing off the screen, nothing that axe-core finds, and a map that shows its images.

Needs Chromium, which `apt-get install chromium` has. .ci/run installs it and sets MNCLGLF_TEST_BROWSER=1, so that there
a missing one is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from mnclglf.reports.compare import write_comparison
from mnclglf.reports.neighbors import Answer, Shown, thumbnail
from mnclglf.reports.neighbors import write_neighbors as write_answers
from mnclglf.reports.page import write_report
from mnclglf.reports.quality_page import write_neighbors as write_quality_page
from mnclglf.runs.quality import FeatureQuality, Tile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("MNCLGLF_TEST_BROWSER"),
        reason="there is no Chromium: apt-get install chromium",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def pages(make_named_run: Callable[..., Path], add_pictures: Callable[..., None], tmp_path: Path) -> dict[str, Path]:
    """Writes a report with all its pictures, one with none, one of many classes, and the other pages."""
    runs = [make_named_run("one"), make_named_run("a run with a rather long name, as people give them", steps=100)]
    for run in runs:
        add_pictures(run)
    many = make_named_run("many")
    add_pictures(many, classes=120)
    (tmp_path / "empty").mkdir()
    found = {"whole": write_report(runs[0]), "empty": write_report(tmp_path / "empty"), "many": write_report(many)}
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    tiles = [Tile(picture, f"a folder/and a long name {i}.jpg", "cat", 0.9 if i else None) for i in range(9)]
    figures = dict(images=9, step=5, alignment=0.5, uniformity=-2.0, effective_rank=7.0, features=8)
    results = [FeatureQuality(representation="pretrained", split="test", **figures)]  # pyright: ignore
    write_quality_page(tmp_path / "neighbors.html", [tiles], [asdict(result) for result in results], "runs/x")
    shown = Shown("a folder/and a long name.jpg", "cat", 0.9, thumbnail(picture))
    answers = [Answer(shown, [shown] * 9), Answer(shown, [shown._replace(picture="")])]
    write_answers(tmp_path / "search.html", answers, title="photos")
    others = {name: tmp_path / f"{name}.html" for name in ("neighbors", "search", "comparison")}
    write_comparison(runs, others["comparison"])
    return found | others


def opened(browser: Browser, path: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
    """Returns the page, and the list of what its script complains of."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # pyright: ignore
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(path.as_uri())
    return page, problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_pages_fit_the_screen_and_are_accessible(browser, pages, width, scheme) -> None:
    for name, path in pages.items():
        page, problems = opened(browser, path, width, scheme)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width, name
        cut = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, .tip')"
        assert page.evaluate(f"[...document.querySelectorAll('main *')].filter({cut}).map(e => e.outerHTML)") == [], (
            name
        )
        found = Axe().run(page).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == [], name
        assert problems == [], name
        page.context.close()


def test_axe_finds_what_is_wrong(browser, tmp_path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<html><body><main><img src='x.png'><p style='color:#ccc'>pale</p></main></body></html>")
    page, _ = opened(browser, path, 800, "light")
    found = {rule["id"] for rule in Axe().run(page).response["violations"]}
    assert {"image-alt", "color-contrast", "html-has-lang"} <= found


@pytest.mark.parametrize("width", [360, 1400])
def test_the_map_shows_the_image_under_the_pointer(browser, pages, width) -> None:
    page, problems = opened(browser, pages["whole"], width, "light")
    with np.load(pages["whole"].parent / "gallery.npz") as file:
        places, labels, names = file["map"], file["labels"], file["classes"]
    lonely = int(np.argmax(np.sort(np.linalg.norm(places[:, None] - places, axis=2), axis=1)[:, 1]))
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map svg").bounding_box()
    assert box is not None
    right, down = ((2 + 100 * float(place)) / 104 for place in places[lonely])  # the drawing has a margin of 2
    page.mouse.move(box["x"] + right * box["width"], box["y"] + down * box["height"])
    tip = page.locator("#map .tip")
    assert tip.is_visible()
    assert tip.inner_text() == names[labels[lonely]]
    place = tip.locator("i").evaluate("e => getComputedStyle(e).backgroundPosition")
    columns = min(40, len(places))
    assert place == f"{-16 * (lonely % columns)}px {-16 * (lonely // columns)}px"  # 8 pixels, at twice their size
    shown = tip.bounding_box()
    assert shown is not None
    assert shown["x"] >= 0
    assert shown["x"] + shown["width"] <= width
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == names[labels[0]]
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert problems == []
