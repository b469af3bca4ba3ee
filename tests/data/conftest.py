"""Photographs for the tests of the data package: noise would hide shifts, and smooth ramps would hide order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folder import write
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional as F


@pytest.fixture(scope="session")
def photos() -> Callable[..., np.ndarray]:
    """Returns a function of count, side and color that cuts uint8 [count, side, side, 3] from two photographs."""
    sources = [torch.tensor(load_sample_image(name)).permute(2, 0, 1) for name in ("china.jpg", "flower.jpg")]

    def cut(count: int, side: int, *, color: bool = True) -> np.ndarray:
        rng = np.random.default_rng(0)
        images = []
        for number in range(count):
            source, size = sources[number % 2], side * int(rng.integers(1, 4))
            top, left = (int(rng.integers(0, source.shape[axis] - size)) for axis in (1, 2))
            images.append(F.resized_crop(source, top, left, size, size, [side, side], antialias=True))
        made = torch.stack(images).permute(0, 2, 3, 1).contiguous().numpy()
        return made if color else np.repeat(made.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)

    return cut


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Makes cats with 2 images, one of them deeper, dogs with 3, and files that are no images."""
    made = tmp_path / "photos"
    for name in ("dogs/b.png", "dogs/a.JPG", "dogs/c.webp", "cats/x.jpeg", "cats/2019/y.Png"):
        write(made / name)
    (made / "dogs" / "notes.txt").write_text("not an image")
    (made / "dogs" / ".hidden.png").write_text("nor this")
    (made / ".git").mkdir()
    (made / "readme.md").write_text("about")
    return made
