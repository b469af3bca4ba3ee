"""The report's pictures that are built of small images: map, nearest neighbors, queue, combinations of patches."""

# s shown, q queries, k neighbors, R representations, C classes, t side of a thumbnail

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnclglf.reports.figures import PATCH_GAP
from mnclglf.reports.run_files import Views

COLUMNS = 40  # thumbnails in a row of the sheet
MOST_NAMED = 20  # classes with a name in the legend, and with a row in the table of mistakes
MISTAKES = 12  # shown where the table has no place
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7a3fb5", "#a0522d", "#4d4d4d", "#c2185b")
SHADED_ROWS = 3  # of the pictured images, in the figure of combinations


class Small(NamedTuple):
    """A thumbnail, its class, and whether that is the query's class; None without labels."""

    source: str
    label: str
    right: bool | None = None


class Map(NamedTuple):
    """Images as dots; `points` has x, y in [0, 1] and the class of each, in the order of the sheet."""

    points: list[tuple[float, float, int]]
    sheet: str
    columns: int
    side: int
    legend: list[tuple[str, str]]
    """Name and color of each class; empty for more than MOST_NAMED."""
    colors: list[str]
    labels: list[str]


class Query(NamedTuple):
    """A query and its nearest neighbors by each representation."""

    query: Small
    rows: list[tuple[str, list[Small]]]


class Mistakes(NamedTuple):
    """Which classes k-NN takes for which: a table of few classes, or the most frequent mistakes of many."""

    classes: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    """Class, then number of images and share of the class's images for each answer."""
    frequent: list[tuple[str, str, int, int]]
    """Class, answer, number of images, images of the class."""


class Moment(NamedTuple):
    """Pairs of a query and its neighbor after a step."""

    step: int
    pairs: list[tuple[Small, Small]]


Arrays = Mapping[str, NDArray[Any]]


def map_of(gallery: Arrays) -> Map | None:
    """Returns the map of the test images; None without one."""
    if "map" not in gallery or len(gallery["map"]) < 2:
        return None
    images, labels, classes = gallery["images"], gallery["labels"], [str(name) for name in gallery["classes"]]
    colors = [color_of(i, len(classes)) for i in range(max(1, len(classes)))]
    points = [
        (round(float(x), 4), round(float(y), 4), int(label))
        for (x, y), label in zip(gallery["map"], labels, strict=True)
    ]
    legend = [*zip(classes, colors, strict=False)] if len(classes) <= MOST_NAMED else []
    columns = min(COLUMNS, len(images))
    return Map(points, data_uri(sheet(images, columns)), columns, images.shape[1], legend, colors, classes)


def color_of(index: int, count: int) -> str:
    """Returns the color of a class: ten that can be told apart, or hues around the circle."""
    return HUES[index] if count <= len(HUES) else f"hsl({360 * index // count} 65% {40 if index % 2 else 55}%)"


def queries_of(gallery: Arrays) -> list[Query]:
    """Returns the queries with their neighbors."""
    if "neighbors" not in gallery:
        return []
    names, classes = [str(name) for name in gallery["representations"]], gallery["classes"]
    found: list[Query] = []
    for q, (image, label) in enumerate(zip(gallery["queries"], gallery["query_labels"], strict=True)):
        rows = [
            (name, _smalls(gallery["neighbors"][r, q], gallery["neighbor_labels"][r, q], classes, label))
            for r, name in enumerate(names)
        ]
        found.append(Query(Small(data_uri(image), _name(classes, label)), rows))
    return found


def mistakes_of(gallery: Arrays) -> Mistakes | None:
    """Returns which classes are mistaken for which; None without labels."""
    counts = gallery.get("confusion")
    if counts is None or len(counts) < 2:
        return None
    classes, totals = [str(name) for name in gallery["classes"]], counts.sum(axis=1)
    rows = [
        (classes[i], [(int(n), float(n / max(1, totals[i]))) for n in counts[i]])
        for i in range(len(counts) if len(counts) <= MOST_NAMED else 0)
    ]
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [tuple(int(x) for x in np.unravel_index(place, wrong.shape)) for place in order]
    frequent = [(classes[i], classes[j], int(wrong[i, j]), int(totals[i])) for i, j in pairs if wrong[i, j]]
    return Mistakes(classes, rows, frequent)


def moments_of(queue: Arrays) -> list[Moment]:
    """Returns what the queue's lookup returned, step by step."""
    if not queue:
        return []
    columns = [queue[name] for name in ("steps", "queries", "query_labels", "neighbors", "neighbor_labels")]
    found: list[Moment] = []
    for step, queries, query_labels, neighbors, labels in zip(*columns, strict=True):
        pairs: list[tuple[Small, Small]] = []
        for query, own, neighbor, other in zip(queries, query_labels, neighbors, labels, strict=True):
            right = None if own < 0 else bool(own == other)
            pairs.append((Small(data_uri(query), ""), Small(data_uri(neighbor), "", right)))
        found.append(Moment(int(step), pairs))
    return found


def combinations_of(views: Views, divided_views: Sequence[int], k: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns, for some pictured images, what each combination of k of the four patches sees, with its name."""
    numbers = [view for view in divided_views if view <= len(views.views)]
    if not numbers or not 1 <= k <= 4:
        return []
    pixels = np.nan_to_num(np.moveaxis(views.views[numbers[0] - 1], 1, -1) * views.std + views.mean).clip(0, 1)
    places = ("top left", "top right", "bottom left", "bottom right")
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for image in pixels[:SHADED_ROWS]:
        shown = [
            (" and ".join(places[i] for i in chosen), data_uri(only(image, chosen)))
            for chosen in combinations(range(4), k)
        ]
        found.append((data_uri((255 * image).astype(np.uint8)), shown))
    return found


def only(image: NDArray[np.float32], chosen: Sequence[int]) -> NDArray[np.uint8]:
    """Returns [S, S, 3] in [0, 1] as RGBA with the chosen ones of its 2 x 2 patches, gaps between them."""
    half = image.shape[0] // 2
    gap = max(1, round(PATCH_GAP * half))
    canvas = np.zeros((2 * half + gap, 2 * half + gap, 4), np.uint8)
    for place in chosen:
        row, column = divmod(place, 2)
        top, left = row * (half + gap), column * (half + gap)
        patch = image[row * half : (row + 1) * half, column * half : (column + 1) * half]
        canvas[top : top + half, left : left + half, :3] = (255 * patch).astype(np.uint8)
        canvas[top : top + half, left : left + half, 3] = 255
    return canvas


def sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Returns [n, t, t, 3] as one image with `columns` of them in a row."""
    n, side = images.shape[:2]
    rows = -(-n // columns)
    filled = np.zeros((rows * columns, side, side, 3), np.uint8)
    filled[:n] = images
    return filled.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def data_uri(image: NDArray[np.uint8]) -> str:
    """Returns an image as a data URI: PNG, in gray where it is; WebP for a large sheet of colors."""
    gray = image.shape[-1] == 3 and bool((image[..., :1] == image).all())
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if gray else image))
    photographs = not gray and image.shape[0] > 512
    kind, options = ("webp", {"quality": 85}) if photographs else ("png", {"optimize": True})
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _smalls(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: NDArray[np.str_], own: int) -> list[Small]:
    return [
        Small(data_uri(image), _name(classes, label), None if own < 0 else bool(label == own))
        for image, label in zip(images, labels, strict=True)
    ]


def _name(classes: NDArray[np.str_], label: int) -> str:
    return str(classes[label]) if label >= 0 else ""
