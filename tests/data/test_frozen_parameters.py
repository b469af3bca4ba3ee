"""Pinned random numbers of a view: a later version must draw the same ones, or old runs could not be repeated.

A new augmentation draws from further words. Its column is checked separately, and the hashes below do not change.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mnclglf.config import ViewConfig
from mnclglf.data.views import ViewParameters, draw_parameters
from mnclglf.recipes import VIEWS

COLUMNS = (
    "angle", "top", "left", "crop_height", "crop_width", "flip", "brightness", "contrast", "saturation", "hue", "gray",
    "sigma",
)  # fmt: skip
ON = ViewConfig(rotation_degrees=20, flip_probability=1, jitter_probability=1, gray_probability=1, blur_probability=1)
CONFIGS = {"default": ViewConfig(), "everything": ON} | VIEWS

VALUES = {
    "angle": [8.803030967712402, -19.544578552246094, -7.759047031402588],
    "top": [8, 3, 5],
    "left": [7, 0, 5],
    "crop_height": [24, 23, 26],
    "crop_width": [22, 27, 25],
    "flip": [True, True, True],
    "brightness": [0.6296752691268921, 0.9418647289276123, 1.3942548036575317],
    "contrast": [0.8173975944519043, 1.1303519010543823, 0.8486199378967285],
    "saturation": [0.941421389579773, 0.7617606520652771, 0.8946328163146973],
    "hue": [0.08339535444974899, 0.08448893576860428, 0.09528625756502151],
    "gray": [True, True, True],
    "sigma": [0.9599502682685852, 1.4628236293792725, 1.65420663356781],
}
HASHES = {
    "default": ["2f9f8185d1a10ae7", "183e52877a408141", "a691f04957b2e428", "cca68e02b4cee7f9"],
    "everything": ["673b267c36129c74", "dcb6a27674c1faf4", "72eb1e65293f7e2f", "fe6eb9a7a1ea8ce8"],
    "paper": ["2f9f8185d1a10ae7", "183e52877a408141", "a691f04957b2e428", "cca68e02b4cee7f9"],
    "simclr": ["1133fdd60c2d5fed", "4dd71c376d0474c9", "12839f7140f3e6ee", "6282bde3aa638c46"],
    "mocov2": ["2f9f8185d1a10ae7", "183e52877a408141", "a691f04957b2e428", "cca68e02b4cee7f9"],
    "byol": ["bc38da95f96db170", "7fc9f98ee1553e35", "7a115a992ec9783a", "3094baee9ee5385d"],
    "simsiam": ["fd78ee94f45ba62a", "47f9a750283f3892", "37a017a32b399730", "61b4aab771e6e28f"],
    "supervised": ["4d534d75bed1314e", "f5b30a97fa026b01", "dadaa06ad6b4b7e8", "eb29f6c1e3cd7e72"],
    "linear_train": ["9288c8b94db5f000", "f2eca56ad79d88ef", "27c528e6804d1423", "9e52737c4dbe788c"],
    "eval": ["3d615b5a77002329", "c1c908e842710619", "a0027aa420f0f984", "d913477577e333d4"],
    "quick": ["46804f6e34b8b486", "978ed1f64e7f1c8b", "7f34d20fa3701f24", "ed93908864534a60"],
}


def digest(p: ViewParameters) -> str:
    """Returns the SHA-256 of the twelve columns, in order; floats by value, independent of the byte order."""
    text = repr([(name, getattr(p, name).tolist()) for name in COLUMNS])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_first_views_by_value() -> None:
    p = draw_parameters(0, 0, [0, 1, 49_999], [0, 0, 1], ON, 32, 32)
    assert {name: getattr(p, name).tolist() for name in COLUMNS} == VALUES


@pytest.mark.parametrize("name", HASHES)
def test_every_view_of_several_seeds(name: str) -> None:
    drawn = [
        digest(draw_parameters(seed, epoch, np.arange(200), view, CONFIGS[name], height, width))
        for seed, epoch, view, height, width in [
            (0, 0, 0, 32, 32), (1, 5, 2, 28, 28), (2**32 - 1, 799, 1, 64, 48), (2**63 + 5, 3, 0, 8, 8),
        ]
    ]  # fmt: skip
    assert drawn == HASHES[name]
