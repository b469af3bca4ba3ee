"""Tests of the pictures behind the report: neighbors against scikit-learn, counts by hand, a map that is a map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from mnclglf.config import KnnConfig
from mnclglf.data.images import ImageArray
from mnclglf.evaluation.gallery import confusion, nearest_rows, query_rows, save_gallery, spread, tsne


def images(count: int, classes: int = 3, split: str = "test") -> ImageArray:
    """Returns images whose every pixel is their row."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(6, 1).repeat(6, 2).repeat(3, 3)
    names = tuple(f"c{i}" for i in range(classes))
    return ImageArray(name="made", split=split, images=pixels, labels=np.arange(count) % classes, classes=names)


def clusters(count: int, classes: int = 3, seed: int = 0) -> torch.Tensor:
    """Returns rows [count, 8] around one direction per class."""
    random = np.random.default_rng(seed)
    centers = np.eye(8)[:classes][np.arange(count) % classes]
    return torch.from_numpy((centers + 0.1 * random.normal(size=(count, 8))).astype(np.float32))


def test_neighbors_are_scikit_learns_nearest_first() -> None:
    train, queries = clusters(40), clusters(5, seed=1)
    _, expected = NearestNeighbors(metric="cosine", algorithm="brute").fit(train).kneighbors(queries, 6)
    assert np.array_equal(nearest_rows(train, queries, 6), expected)
    assert nearest_rows(train[:2], queries, 6).shape == (5, 2)


def test_the_file_holds_what_it_says(tmp_path: Path) -> None:
    train, test = images(60, split="train"), images(30)
    near, far = clusters(60), clusters(30, seed=1)
    path = tmp_path / "gallery.npz"
    save_gallery(
        path, {"pretrained": (near, far), "raw pixels": (far.repeat(2, 1), far)}, train, test, KnnConfig(neighbors=5)
    )
    with np.load(path) as file:
        assert file["representations"].tolist() == ["pretrained", "raw pixels"]
        assert file["classes"].tolist() == ["c0", "c1", "c2"]
        assert np.array_equal(file["images"], test.images)
        assert file["queries"][:, 0, 0, 0].tolist() == [0, 1, 2]  # the first of each class
        # By the second representation the nearest train row of query i is row i or i + 30, which are equal.
        assert file["neighbors"][1, :, 0, 0, 0, 0].tolist() == [0, 1, 2]
        theirs = KNeighborsClassifier(5, metric="cosine", weights=votes)  # pyright: ignore[reportArgumentType]
        expected = theirs.fit(near, train.labels)
        assert np.array_equal(file["confusion"], confusion_matrix(test.labels, expected.predict(far)))
        assert np.array_equal(file["labels"], test.labels)


def votes(distances: np.ndarray) -> np.ndarray:
    """Returns exp(s / 0.07) for cosine similarity s = 1 - distance."""
    return np.exp((1 - distances) / 0.07)


def test_confusion_counts_answers_by_class() -> None:
    assert confusion(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_the_map_keeps_clusters_together_and_is_the_same_every_time() -> None:
    places, labels = tsne(clusters(60)), np.arange(60) % 3
    assert places.min() == 0
    assert places.max() == 1
    nearest = NearestNeighbors(n_neighbors=4).fit(places).kneighbors(return_distance=False)
    assert (labels[nearest] == labels[:, None]).mean() > 0.95
    assert np.array_equal(places, tsne(clusters(60)))
    assert tsne(torch.ones(5, 8)).tolist() == [[0.5, 0.5]] * 5  # too few for a map
    assert np.isfinite(tsne(torch.ones(40, 8))).all()  # a collapsed encoder


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 10, [0, 1, 2]), (9, 3, [0, 4, 8]), (1, 5, [0])])
def test_rows_are_spread(count: int, most: int, expected: list[int]) -> None:
    assert spread(count, most).tolist() == expected


def test_queries_leave_out_classes_without_an_image() -> None:
    assert query_rows(np.array([5, 5, 2, 7]), 9).tolist() == [2, 0, 3]
    assert len(query_rows(np.arange(100), 100)) == 10
