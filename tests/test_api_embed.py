"""Tests of mnclglf.embed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from image_folder import lay_out

import mnclglf

TINY: dict[str, Any] = dict(
    method="simsiam", dataset="digits", recipe="quick", epochs=1, batch_size=64, train_images=128, image_size=8,
    width=2, projector_width=16, predictor_width=8, device="cpu", precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mnclglf.Run:
    return mnclglf.train(out=tmp_path_factory.mktemp("api") / "run", **TINY)


def test_embed_returns_array_names_and_labels(run: mnclglf.Run, tmp_path: Path) -> None:
    photos = lay_out(tmp_path / "photos", "cats/1.png", "cats/2.png", "dogs/3.png")
    found = mnclglf.embed(run, photos, device="cpu")
    assert (found.array.shape, found.array.dtype) == ((3, 16), np.float32)
    assert found.names == ["cats/1.png", "cats/2.png", "dogs/3.png"]
    assert (found.labels.tolist(), found.classes, found.splits) == ([0, 0, 1], ("cats", "dogs"), ["train"] * 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]  # nothing is kept
    for name in ("a.npy", "a.npz", "a.parquet"):
        kept = mnclglf.embed(run, f"folder:{photos}", out=tmp_path / name, device="cpu")
        np.testing.assert_array_equal(kept.array, found.array)
    assert isinstance(kept.array, np.ndarray)
    shutil.rmtree(photos)
    with pytest.raises(ValueError, match=r"photos.*not a folder"):
        mnclglf.embed(run, f"folder:{photos}")
    with pytest.raises(ValueError, match=r"photos.*is no folder and none of"):
        mnclglf.embed(run, photos)


def test_images_in_memory_are_refused_with_the_remedy(run: mnclglf.Run) -> None:
    with pytest.raises(ValueError, match=r"source is a list: give a folder .*load_encoder"):
        mnclglf.embed(run, cast(Any, [np.zeros((16, 16, 3), np.uint8)]))


def test_corrupt_images_have_no_row(run: mnclglf.Run, tmp_path: Path) -> None:
    photos = lay_out(tmp_path / "photos", "cats/1.png", "cats/2.png", "dogs/3.png")
    (photos / "cats" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cats/1\.png .*--skip-corrupt"):
        mnclglf.embed(run, photos, device="cpu")
    found = mnclglf.embed(run, photos, skip_corrupt=True, device="cpu")
    assert found.names == ["cats/2.png", "dogs/3.png"]
    assert found.labels.tolist() == [0, 1]
