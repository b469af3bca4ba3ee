"""Page of nearest neighbors: one self-contained HTML file with query images and what an encoder finds near to them."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from mnclglf.config import PLACED, short_name
from mnclglf.reports.tables import printable
from mnclglf.runs.files import write_atomically
from mnclglf.runs.quality import Tile

MOST_NAME = 40  # characters of a folder's name in a file's name, which holds 255 bytes
FIGURES = (
    ("alignment", "Alignment", "0 to 4, lower is better: two views of an image are near to each other"),
    ("uniformity", "Uniformity", "-8 to 0, lower is better: images are spread over all directions"),
    ("effective_rank", "Effective rank", "1 to the features' width: dimensions that are in use; 1 is a collapse"),
)


def page_name(dataset: str, other: bool) -> str:
    """Returns the file name of the page: neighbors.html, or one of its own for another data set than the run's."""
    if not other:
        return "neighbors.html"
    if not dataset.startswith(PLACED):
        return f"neighbors-{dataset}.html"
    place = hashlib.sha256(dataset.encode(errors="surrogateescape")).hexdigest()[:8]  # two folders may share a name
    return f"neighbors-{printable(short_name(dataset))[:MOST_NAME]}-{place}.html"


def write_neighbors(
    path: Path, tiles: Sequence[Sequence[Tile]], results: Sequence[Mapping[str, Any]], run: str
) -> None:
    """Writes the page.

    Args:
        path: file of the page.
        tiles: rows of pictures: a query, then its neighbors, nearest first.
        results: figures of quality.json that belong to the same images.
        run: name of the run.
    """
    source = importlib.resources.files("mnclglf.reports").joinpath("quality.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = [[_cell(tile, row[0].label) for tile in row] for row in tiles]
    page = environment.from_string(source).render(
        run=printable(run),
        dataset=printable(str(results[0]["dataset"])) if results[0]["dataset"] else "the run's own data",
        split=results[0]["split"],
        images=results[0]["images"],
        step=results[0]["step"],
        labeled=tiles[0][0].label is not None,
        table=quality_table(results),
        rows=rows,
    )
    write_atomically(path, lambda file: file.write(page.encode()))


def quality_table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one dict per set of images, with its title, its encoders and the rows of figures as text."""
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        key = tuple(result.get(name) for name in ("dataset", "split", "images", "epoch"))
        groups.setdefault(key, {})[str(result["representation"])] = result
    tables: list[dict[str, Any]] = []
    for (dataset, split, images, epoch), found in groups.items():
        title = f"{images:,} {split} images" + ("" if dataset is None else f" of {printable(str(dataset))}")
        first = next(iter(found.values()))
        tables.append(
            {
                "title": title + ("" if epoch is None else f", after epoch {epoch:g}"),
                "step": first["step"],
                "encoders": list(found),
                "figures": [
                    {"name": name, "meaning": meaning, "values": [_text(key, result) for result in found.values()]}
                    for key, name, meaning in FIGURES
                ],
            }
        )
    return tables


def quality_markdown(table: Mapping[str, Any]) -> str:
    """Returns one table of `quality_table` as Markdown."""
    lines = [f"| {table['title']} | {' | '.join(table['encoders'])} |".replace("\n", " ")]
    lines.append("|---" + "|--:" * len(table["encoders"]) + "|")
    lines += [f"| {row['name']} ({row['meaning']}) | {' | '.join(row['values'])} |" for row in table["figures"]]
    return "\n".join(lines) + "\n"


def _text(key: str, result: Mapping[str, Any]) -> str:
    if key == "effective_rank":
        return f"{result[key]:.1f} of {result['features']}"
    return f"{result[key]:.3f}"


def _cell(tile: Tile, wanted: str | None) -> dict[str, Any]:
    """Returns what the page shows of a tile; `same` is None for a query and without labels."""
    return {
        "image": _png(tile.pixels),
        "small": max(tile.pixels.shape[:2]) < 64,
        "name": printable(tile.name),
        "label": None if tile.label is None else printable(tile.label),
        "similarity": None if tile.similarity is None else f"{tile.similarity:.3f}",
        "same": None if tile.similarity is None or tile.label is None else tile.label == wanted,
    }


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
