"""Figures of features without labels, and their file quality.json: {"version": 1, "results": [...]}."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mnclglf.runs.files import read_object, write_json
from mnclglf.runs.locks import writing_in

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FeatureQuality:
    """Alignment, uniformity and effective rank of an encoder's features of one set of images."""

    representation: str
    """Name of the encoder: "pretrained" or "untrained"."""
    dataset: str | None = None
    """Data set of the images; None for the run's own."""
    split: str
    """Part of the data set: "test", or where there are no test images "validation" or "train"."""
    images: int
    """Number of images."""
    step: int
    """Step of the checkpoint."""
    epoch: float | None = None
    """Epochs of training of the checkpoint; None for the run's newest."""
    alignment: float
    """Mean squared distance of the unit features of two random views of an image, 0 to 4; lower is better."""
    uniformity: float
    """Log of the mean of exp(-2 d^2) over all pairs of images, d their distance, -8 to 0; lower is better."""
    effective_rank: float
    """Number of dimensions that the features use, 1 to `features`."""
    features: int
    """Width of the features."""

    def __post_init__(self) -> None:
        for name in ("alignment", "uniformity", "effective_rank"):
            value: object = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} {value} is no finite number")

    @property
    def key(self) -> tuple[str, str | None, str, int, float | None]:
        """Returns the key of a result; a new result replaces the saved one with the same key."""
        return self.representation, self.dataset, self.split, self.images, self.epoch


class Tile(NamedTuple):
    """Picture of the page of nearest neighbors."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    name: str
    """Path of the file, or number of the image in the data set."""
    label: str | None
    """Name of its class; None without labels."""
    similarity: float | None
    """Cosine similarity to the query; None for the query itself."""


def load_qualities(path: Path) -> list[FeatureQuality]:
    """Reads the results in a quality.json; none if there is no file.

    Raises:
        ValueError: the file does not hold results; the message names it and the remedy.
    """
    remedy = "remove it and run mnclglf quality again"
    try:
        content = read_object(path)
        if content is None:
            return []
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']} where {VERSION} is read")
        return [FeatureQuality(**entry) for entry in cast("list[dict[str, Any]]", content["results"])]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold results of mnclglf quality ({error}); {remedy}") from error


def save_qualities(path: Path, results: Iterable[FeatureQuality]) -> list[FeatureQuality]:
    """Merges `results` into a quality.json and returns all its results; one replaces that with the same key."""
    with writing_in(path.parent):
        merged = {result.key: result for result in load_qualities(path)}
        merged.update({result.key: result for result in results})
        write_json(path, {"version": VERSION, "results": [dataclasses.asdict(result) for result in merged.values()]})
    return list(merged.values())
