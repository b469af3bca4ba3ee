"""Tests of the table and the page of mnclglf search."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from image_folder import pixels, write
from PIL import Image
from rich.console import Console

from mnclglf.data.listing import list_folder
from mnclglf.reports.neighbors import Answer, Shown, print_neighbors, shown_neighbors, thumbnail, write_neighbors

ODD = "a [bold]b[/bold] <i> | c\n:smile:.png"
ANSWERS = [Answer(Shown(ODD, "", 1.0, "data:image/png;base64,"), [Shown(ODD, "cats & dogs", 0.12345, "")])]


class Seen(HTMLParser):
    """Collects texts and pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.texts, self.pictures = list[str](), list[str | None]()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("i", "script", "link")
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_shows_names_as_they_are(terminal: bool) -> None:
    text = io.StringIO()
    print_neighbors(ANSWERS, Console(file=text, force_terminal=terminal, width=120, color_system=None))
    shown = text.getvalue()
    assert "a [bold]b[/bold] <i>" in shown
    assert ":smile:" in shown
    assert "0.1234" in shown or "0.1235" in shown
    if not terminal:
        *_, row = shown.splitlines()
        assert row.replace("\\|", "").count("|") == 6  # five columns


def test_the_page_shows_names_as_they_are_and_says_what_is_gone(tmp_path: Path) -> None:
    write_neighbors(tmp_path / "a.html", ANSWERS, title="<x>")
    seen = Seen()
    seen.feed((tmp_path / "a.html").read_text())
    assert seen.texts.count(ODD) == 2
    assert any("cats & dogs" in text for text in seen.texts)
    assert "cannot be read any more" in seen.texts
    assert seen.pictures == ["data:image/png;base64,"]


def test_a_thumbnail_keeps_the_sides_ratio_and_small_pixels() -> None:
    def size(image: np.ndarray) -> tuple[int, int]:
        head, data = thumbnail(image).split(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert opened.format is not None
            assert opened.format.lower() in head
            return opened.size

    assert size(pixels(300, 600)) == (192, 96)
    assert size(pixels(8, 9)) == (9, 8)
    assert size(pixels(2000, 9)) == (1, 192)


def test_rows_are_those_of_the_kept_images_and_minus_one_is_none(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"class{number % 2}" / f"{number}.png")
    listing = list_folder(tmp_path)  # class0/0, class0/2, class1/1, class1/3
    rows, near = np.array([[1, 0, -1]]), np.array([[0.9, 0.8, -np.inf]], np.float32)
    (answer,) = shown_neighbors([Path("q.png")], [pixels()], rows, near, listing, [0, 3])
    assert [(shown.name, shown.kind) for shown in answer.neighbors] == [
        ("class1/3.png", "class1"), ("class0/0.png", "class0"),
    ]  # fmt: skip
    (tmp_path / "class1" / "3.png").unlink()
    (answer,) = shown_neighbors([Path("q.png")], [pixels()], rows, near, listing, [0, 3])
    assert answer.neighbors[0].picture == ""
