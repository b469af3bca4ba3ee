"""What a set of image files is made of, in a few lines: for `mnclglf data inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import ViewConfig
from mnclglf.data.images import EncodedImages, ImageSet
from mnclglf.data.views import draw_parameters

SIDES = (64, 128, 224, 512, 1024, 2048)  # bounds of the table of shorter sides, in pixels
SHAPES = {"upright": 0.8, "square": 1.25, "wide": 2.0}  # bounds of width over height; above the last: very wide
_MOST_DRAWN = 20_000  # images whose crops are drawn
_NAMED = 5  # corrupt files named


def summary_of(images: EncodedImages) -> list[str]:
    """Returns lines that count the files by format, color, bits, transparency, sides and shape, and the corrupt."""
    kinds = images.kinds
    turned = 0 if images.orientations is None else int((images.orientations > 1).sum())
    lines = [
        f"formats: {counted(kind.format for kind in kinds)}",
        f"colors: {counted(kind.color for kind in kinds)}",
        f"bits per channel: {counted(str(kind.bits) for kind in kinds)}",
        f"with transparency, which is dropped: {sum(kind.alpha for kind in kinds):,}; of several pages or frames, of "
        f"which the first is read: {sum(kind.several for kind in kinds):,}; turned by EXIF: {turned:,}",
        f"shorter side in pixels: {_sides(np.minimum(images.heights, images.widths))}",
        f"width over height: {_shapes(images.widths / images.heights)}",
    ]
    if images.corrupt:
        named = "; ".join(images.corrupt[:_NAMED]) + ("; ..." if len(images.corrupt) > _NAMED else "")
        lines.append(f"cannot be used: {len(images.corrupt):,} of {len(images) + len(images.corrupt):,}: {named}")
    return lines


def kept_by_crops(images: ImageSet, view: ViewConfig, name: str) -> str:
    """Returns a line with the share of an image that a random crop of the view keeps, and the crop for evaluation.

    The crops are drawn as in training, one of each image, of at most 20,000 evenly spaced images.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), _MOST_DRAWN), dtype=np.int64))
    height, width = images.sizes(rows)
    drawn = draw_parameters(0, 0, rows, 0, view, height, width)
    kept = drawn.crop_height * drawn.crop_width / (height.astype(np.float64) * width)
    center = np.minimum(height, width) / np.maximum(height, width)
    (least, most), (narrow, broad) = view.crop_scale, view.crop_ratio
    return (
        f"crop of view {name} ({least:.0%} to {most:.0%} of the area, {narrow:.2f} to {broad:.2f} times as wide as "
        f"high) keeps {kept.mean():.0%} of an image on average; the central square for evaluation {center.mean():.0%}, "
        f"of the longest image {center.min():.0%}"
    )


def counted(names: Iterable[str]) -> str:
    """Returns each name with its count, the most frequent first."""
    found = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in found)


def _sides(shorter: NDArray[np.int32]) -> str:
    counts = np.bincount(np.searchsorted(SIDES, shorter, side="right"), minlength=len(SIDES) + 1)
    names = [f"below {SIDES[0]}", *(f"from {side}" for side in SIDES)]
    return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True) if count)


def _shapes(ratios: NDArray[np.float64]) -> str:
    counts = np.bincount(np.searchsorted(list(SHAPES.values()), ratios, side="right"), minlength=len(SHAPES) + 1)
    names = [*(f"{name} (below {bound:g})" for name, bound in SHAPES.items()), f"very wide (from {SHAPES['wide']:g})"]
    return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True) if count)
