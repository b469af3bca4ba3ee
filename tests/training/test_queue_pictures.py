"""Tests of the pairs of queries and neighbors that a run keeps for its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mnclglf.data.images import ImageArray
from mnclglf.training.queue_pictures import MOMENTS, PAIRS, QueuePictures, read_pairs

PIXELS = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
IMAGES = ImageArray(name="made", split="train", images=PIXELS, labels=np.arange(20) % 2, classes=("a", "b"))
INDICES, NEIGHBORS = torch.arange(8), torch.tensor([-1, 11, 12, 13, 14, 15, 16, 17])


def test_the_first_pairs_with_an_image_are_kept(tmp_path: Path) -> None:
    pictures = QueuePictures(tmp_path / "queue.npz", IMAGES, start=0, total=60)
    pictures.keep(5, INDICES, NEIGHBORS)
    with np.load(tmp_path / "queue.npz") as file:
        assert file["steps"].tolist() == [5]
        assert file["queries"][0, :, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
        assert file["neighbors"][0, :, 0, 0, 0].tolist() == [11, 12, 13, 14, 15, 16]
        assert file["query_labels"].tolist() == [[1, 0, 1, 0, 1, 0]]
        assert file["neighbor_labels"].tolist() == [[1, 0, 1, 0, 1, 0]]


def test_a_step_with_random_neighbors_is_left_out(tmp_path: Path) -> None:
    pictures = QueuePictures(tmp_path / "queue.npz", IMAGES, start=0, total=60)
    pictures.keep(5, INDICES, torch.full((8,), -1))
    pictures.keep(5, INDICES[:PAIRS], NEIGHBORS[:PAIRS])  # one of six is random
    assert not (tmp_path / "queue.npz").exists()


def test_moments_are_spread_and_the_last_step_is_one(tmp_path: Path) -> None:
    pictures = QueuePictures(tmp_path / "queue.npz", IMAGES, start=0, total=600)
    for done in range(10, 601, 10):
        if pictures.is_due(done):
            pictures.keep(done, INDICES, NEIGHBORS)
    assert sorted(read_pairs(tmp_path / "queue.npz")) == [10, 110, 210, 310, 410, 510, 600]
    assert len(pictures.kept) == MOMENTS + 1


def test_a_resumed_run_keeps_what_was_before_and_drops_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "queue.npz"
    first = QueuePictures(path, IMAGES, start=0, total=60)
    for done in (1, 12, 33):
        first.keep(done, INDICES, NEIGHBORS)
    again = QueuePictures(path, IMAGES, start=20, total=60)  # killed after step 33, resumed from step 20
    assert not again.is_due(20)
    assert again.is_due(31)
    again.keep(31, INDICES, NEIGHBORS)
    assert sorted(read_pairs(path)) == [1, 12, 31]


def test_a_damaged_file_stops_no_run(tmp_path: Path) -> None:
    path = tmp_path / "queue.npz"
    path.write_bytes(b"torn")
    QueuePictures(path, IMAGES, start=0, total=60).keep(1, INDICES, NEIGHBORS)
    assert sorted(read_pairs(path)) == [1]


def test_a_file_that_cannot_be_read_now_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "queue.npz"
    path.symlink_to("/proc/self/mem")  # reading it fails with EIO
    with pytest.raises(OSError, match=r"Input/output error: '.*queue\.npz'"):
        QueuePictures(path, IMAGES, start=20, total=60)
