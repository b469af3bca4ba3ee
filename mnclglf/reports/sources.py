"""The commands data inspect and data views: print and draw the images of a source, and each loader's views of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from mnclglf.config import LoaderName, require
from mnclglf.data.errors import DataError
from mnclglf.data.images import EncodedImages, ImageSet, view_side
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import make_loader
from mnclglf.data.summary import kept_by_crops, summary_of
from mnclglf.data.views import whole_views
from mnclglf.recipes import VIEWS, view_of
from mnclglf.reports.figures import divided, picture_grid
from mnclglf.runs.console import say
from mnclglf.runs.files import write_atomically

GRID_CLASSES, GRID_IMAGES = 10, 8  # columns and rows in the picture of a source
THUMBNAIL = 128  # largest side of an image in a picture, in pixels


def inspect_source(source: tuple[ImageSet, ImageSet | None], picture: Path, console: Console) -> None:
    """Prints sizes, classes and channel statistics of training and test images, and draws some images."""
    train, test = source
    for images in (train, *((test,) if test is not None else ())):
        for line in described(images):
            say(console, line)
    titles, columns = some_images(train)
    write_atomically(
        picture, lambda file: file.write(picture_grid(titles, columns, heading=f"{train.name}, {train.split}"))
    )
    say(console, f"picture: {picture.resolve()}")


def described(images: ImageSet) -> list[str]:
    """Returns lines that describe an image set."""
    heights, widths = images.sizes(np.arange(len(images)))

    def spread(values: NDArray[np.int32]) -> str:
        least, middle, most = values.min(), int(np.median(values)), values.max()
        return f"{least}" if least == most else f"{least} to {most} (median {middle})"

    lines = [f"{images.name} {images.split}: {len(images):,} images, {spread(heights)} high, {spread(widths)} wide"]
    if images.labeled:
        counts = np.bincount(images.labels, minlength=len(images.classes))
        if len(counts) <= GRID_CLASSES:
            named = ", ".join(f"{name} {count:,}" for name, count in zip(images.classes, counts, strict=True))
            lines.append(f"  {len(counts)} classes: {named}")
        else:
            lines.append(f"  {len(counts)} classes of {counts.min():,} to {counts.max():,} images")
    else:
        lines.append("  no labels")
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in images.statistics())
    lines.append(f"  red, green, blue in [0, 1]: mean {mean}; standard deviation {std}")
    if isinstance(images, EncodedImages) and images.kinds:
        lines += [f"  {line}" for line in (*summary_of(images), kept_by_crops(images, VIEWS["paper"], "paper"))]
    return lines


def some_images(images: ImageSet) -> tuple[list[str], list[list[NDArray[Any]]]]:
    """Returns titles and columns of a picture: evenly spaced classes, and evenly spaced images of each."""
    if not images.labeled:
        chosen = np.linspace(0, len(images) - 1, GRID_CLASSES * GRID_IMAGES, dtype=np.int64)
        groups = [("", part) for part in np.array_split(np.unique(chosen), GRID_CLASSES) if len(part)]
    else:
        present = np.unique(images.labels)
        labels = present[np.unique(np.linspace(0, len(present) - 1, GRID_CLASSES, dtype=np.int64))]
        rows = [np.flatnonzero(images.labels == label) for label in labels]
        spread = [part[np.unique(np.linspace(0, len(part) - 1, GRID_IMAGES, dtype=np.int64))] for part in rows]
        groups = list(zip([images.classes[label] for label in labels], spread, strict=True))
    return [name[:18] for name, _ in groups], [[thumbnail(images.pixels(row)) for row in part] for _, part in groups]


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[Any]:
    """Returns the center of an image, reduced to THUMBNAIL pixels."""
    side = min(THUMBNAIL, *pixels.shape[:2])
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    return whole_views([pixels], side, zero, one, torch.float32)[0].permute(1, 2, 0).clamp(0, 1).numpy()


def show_views(
    images: ImageSet, picture: Path, console: Console, view_name: str, *, side: int | None, count: int, seed: int
) -> None:
    """Draws the views that every loader makes of some images, and prints their differences."""
    view = view_of(view_name, images.name)
    require(1 <= count <= len(images), f"{count} images cannot be shown of {len(images)}; give --images from 1 on")
    side = view_side(images, side)
    require(side % 2 == 0, f"side {side} must be even: an image is divided into 2 x 2 patches")
    shown = np.linspace(0, len(images) - 1, count, dtype=np.int64)
    settings: dict[str, Any] = dict(views=3, side=side, batch_size=1, seed=seed, dtype=torch.float32, threads=2)
    made: dict[str, NDArray[np.float32]] = {}  # [V, n, S, S, 3] in [0, 1]
    for name in (name for name in get_args(LoaderName) if name != "auto"):
        try:
            loader = make_loader(images, view, backend=name, device=torch.device("cpu"), **settings)
            if loader.name == name:  # else make_loader fell back to another, with a warning
                made[name] = in_unit(loader, loader.render(shown, epoch=0))
        except (ImportError, RuntimeError, DataError) as error:
            say(console, f"left out: {name}: {error}")
    if not made:
        raise ValueError(f"no loader can make views of {images.name}; the reasons are above")
    first, *others = made
    for other in others:
        difference = 255 * np.abs(made[other] - made[first])
        apart = f"{difference.mean():.2f} levels of 255 apart on average, {difference.max():.0f} at most"
        say(console, f"{other} and {first}: {apart}")
    titles, columns = ["image"], [[thumbnail(images.pixels(row)) for row in shown]]
    for name, views in made.items():
        titles += [f"{name}\nview {number + 1}" for number in range(3)]
        columns += [list(group) for group in views]
    for number in (0, 2):
        titles.append(f"patches of\nview {number + 1}")
        columns.append([divided(pixels) for pixels in made[first][number]])
    heading = f"{images.name}, view {view_name}, {side} x {side}"
    write_atomically(picture, lambda file: file.write(picture_grid(titles, columns, heading=heading)))
    say(console, f"picture: {picture.resolve()}")


def in_unit(loader: Loader, views: tuple[torch.Tensor, ...]) -> NDArray[np.float32]:
    """Returns views [n, 3, S, S] without their normalization, as [V, n, S, S, 3] in [0, 1]."""
    pixels = torch.stack(views).permute(0, 1, 3, 4, 2).numpy()
    return (pixels * loader.std + loader.mean).clip(0, 1)
