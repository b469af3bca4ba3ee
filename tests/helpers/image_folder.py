"""Folders of image files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageFiles, ImageSet


def pixels(height: int = 12, width: int = 15, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, image: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed=hash(path.name) % 1000) if image is None else image).save(path)
    return path


def lay_out(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name)
    return root


def load(root: Path, *, skip_corrupt: bool = False) -> tuple[ImageFiles, ImageSet | None]:
    train, test = load_dataset(f"folder:{root}", skip_corrupt=skip_corrupt)
    assert isinstance(train, ImageFiles)
    return train, test
