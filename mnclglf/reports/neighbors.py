"""The answers of mnclglf search: a table, and one self-contained HTML page with pictures."""

# q queries, k neighbors

from __future__ import annotations

import base64
import importlib.resources
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnclglf.data.errors import DataError
from mnclglf.data.listing import Listing
from mnclglf.runs.console import say
from mnclglf.runs.files import write_atomically

THUMBNAIL = 192  # longest side of a picture in pixels
LOSSLESS = 64  # pixels up to which a picture is a PNG, and shown with square pixels


class Shown(NamedTuple):
    """An image in the table and on the page."""

    name: str
    kind: str
    """Its class; empty for none."""
    similarity: float
    picture: str
    """data: address of a thumbnail; empty where the image could not be read any more."""


class Answer(NamedTuple):
    """A query with its neighbors, the nearest first."""

    query: Shown
    neighbors: list[Shown]


def shown_neighbors(
    paths: Sequence[Path],
    pictures: Sequence[NDArray[np.uint8]],
    rows: NDArray[np.int64],
    similarities: NDArray[np.float32],
    listing: Listing,
    kept: Sequence[int],
) -> list[Answer]:
    """Returns the answers to show.

    Args:
        paths: the query files [q].
        pictures: their images.
        rows: nearest rows [q, k] among the embeddings; -1 is none.
        similarities: theirs.
        listing: the images searched.
        kept: row in `listing` of each row of the embeddings.
    """
    answers: list[Answer] = []
    for path, picture, found, near in zip(paths, pictures, rows, similarities, strict=True):
        query = Shown(_text(str(path)), "", 1.0, thumbnail(picture))
        answers.append(
            Answer(
                query, [_shown(listing, kept[row], float(s)) for row, s in zip(found, near, strict=True) if row >= 0]
            )
        )
    return answers


def _shown(listing: Listing, row: int, similarity: float) -> Shown:
    try:
        picture = thumbnail(listing.pixels(row))
    except DataError:  # removed since it was listed
        picture = ""
    return Shown(_text(listing.names[row]), _text(listing.class_of(row) or ""), similarity, picture)


def _text(name: str) -> str:
    """Returns a file's name as text; bytes that are no text become \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """Returns an image uint8 [H, W, 3], reduced to THUMBNAIL pixels, as a data: address."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if max(image.size) <= LOSSLESS else "jpeg"
    data = io.BytesIO()
    image.save(data, kind)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def print_neighbors(answers: Sequence[Answer], console: Console) -> None:
    """Prints a table per query in a terminal, and one Markdown table in a pipe or a file."""
    titles = ("rank", "similarity", "class", "name")
    if not console.is_terminal:
        say(console, _markdown("query", *titles))
        say(console, "|---|--:|--:|---|---|")
    for query, neighbors in answers:
        shown = Table(title=Text(query.name), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for title in titles:
            shown.add_column(title, justify="right" if title in ("rank", "similarity") else "left", overflow="fold")
        for rank, (name, kind, similarity, _) in enumerate(neighbors, 1):
            cells = str(rank), f"{similarity:.4f}", kind, name
            shown.add_row(*map(Text, cells))  # a Text is not parsed as markup
            if not console.is_terminal:
                say(console, _markdown(query.name, *cells))
        if console.is_terminal:
            console.print(shown)


def _markdown(*cells: str) -> str:
    escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def write_neighbors(page: Path, answers: Sequence[Answer], *, title: str) -> None:
    """Writes the page."""
    source = importlib.resources.files("mnclglf.reports").joinpath("neighbors.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(source).render(answers=answers, title=_text(title))
    write_atomically(page, lambda file: file.write(text.encode()))
