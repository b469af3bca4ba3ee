"""The share of an image that crops keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from mnclglf.data.images import ImageArray
from mnclglf.data.summary import kept_by_crops
from mnclglf.recipes import VIEWS


def line_of(height: int, width: int, view: str = "paper") -> str:
    images = np.broadcast_to(np.uint8(0), (1000, height, width, 3))
    labels = np.full(1000, -1, np.int64)
    return kept_by_crops(
        ImageArray(name="x", split="train", images=images, labels=labels, classes=()), VIEWS[view], view
    )


def share(line: str, before: str) -> float:
    return int(line.partition(before)[2].partition("%")[0]) / 100


def test_of_a_square_it_is_torchvision_s() -> None:
    line = line_of(400, 400)
    assert "20% to 100% of the area" in line
    picture = torch.empty(3, 400, 400)
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(1000)]
    kept = np.mean([height * width for _, _, height, width in drawn]) / 400**2
    # The deviation of an area is 0.2, of two means of 1000 apart 0.9%; the line rounds to a percent.
    assert share(line, "keeps ") == pytest.approx(kept, abs=0.03)
    assert share(line, "evaluation ") == 1


def test_of_a_strip_it_is_the_widest_crop_of_its_height() -> None:
    """Of 40 x 400 no drawn crop fits but small ones: the central crop of 4 to 3 is 53 wide."""
    line = line_of(40, 400)
    assert share(line, "keeps ") == pytest.approx(53 / 400, abs=0.01)
    assert share(line, "evaluation ") == pytest.approx(0.1)
