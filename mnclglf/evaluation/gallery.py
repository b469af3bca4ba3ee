"""Pictures for the report from the features of a k-NN evaluation: a map, nearest neighbors, and classes mistaken."""

# n train images, m test images, s shown, q queries, k neighbors, R representations, C classes, t side of a thumbnail

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mnclglf.config import KnnConfig
from mnclglf.data.images import ImageSet
from mnclglf.data.thumbnails import thumbnails
from mnclglf.evaluation.knn import knn_scores, nearest_columns
from mnclglf.runs.files import write_atomically

SHOWN = 1000  # images on the map: more hide each other, and t-SNE of these takes seconds
QUERIES, NEIGHBORS = 10, 6
MOST_CLASSES = 1000  # of a confusion matrix
PERPLEXITY = 30.0  # of t-SNE, its authors' and scikit-learn's default
FEWEST_ON_A_MAP = 10


def save_gallery(
    path: Path,
    representations: Mapping[str, tuple[Tensor, Tensor]],
    train: ImageSet,
    test: ImageSet,
    settings: KnnConfig,
) -> None:
    """Writes the pictures of one encoder's evaluation into a .npz file.

    Its arrays: `images` uint8 [s, t, t, 3], `labels` int64 [s] and `map` fp32 [s, 2] in [0, 1] of some test images;
    `queries` uint8 [q, t, t, 3] with `query_labels` [q]; `neighbors` uint8 [R, q, k, t, t, 3] with `neighbor_labels`
    [R, q, k] and `representations` [R], their names; `classes` [C], names; `confusion` int64 [C, C], labels by k-NN's
    answers, with up to 1,000 classes.

    Args:
        path: the file.
        representations: (train [n, F], test [m, F]) features by name; the first is the encoder's.
        train: the n train images.
        test: the m test images.
        settings: neighbors that vote, and the temperature of the votes.
    """
    trained, tested = next(iter(representations.values()))
    shown, queries = spread(len(test), SHOWN), query_rows(test.labels, len(test.classes))
    found = {name: nearest_rows(near, far[queries], NEIGHBORS) for name, (near, far) in representations.items()}
    arrays: dict[str, NDArray[Any]] = {
        "images": thumbnails(test, shown),
        "labels": test.labels[shown],
        "map": tsne(tested[shown]),
        "classes": np.array(test.classes, dtype=np.str_),
        "queries": thumbnails(test, queries),
        "query_labels": test.labels[queries],
        "representations": np.array([*representations], dtype=np.str_),
        "neighbors": np.stack([_grid(thumbnails(train, rows.ravel()), rows.shape) for rows in found.values()]),
        "neighbor_labels": np.stack([train.labels[rows] for rows in found.values()]),
    }
    if len(test.classes) <= MOST_CLASSES:
        scores = knn_scores(
            trained,
            torch.from_numpy(train.labels),
            tested,
            classes=len(test.classes),
            k=settings.neighbors,
            temperature=settings.vote_temperature,
        )
        arrays["confusion"] = confusion(test.labels, scores.argmax(dim=1).numpy(), len(test.classes))
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Returns at most `most` rows of `count`, evenly spread: many data sets are sorted by class."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def query_rows(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Returns the first image of each of at most QUERIES classes that have one, spread over the classes."""
    present = np.flatnonzero(np.bincount(labels, minlength=classes))
    return np.array([np.flatnonzero(labels == present[i])[0] for i in spread(len(present), QUERIES)], dtype=np.int64)


def nearest_rows(train: Tensor, queries: Tensor, k: int) -> NDArray[np.int64]:
    """Returns the train rows with the highest cosine similarity to each query: [q, k], the nearest first."""
    similarities = F.normalize(queries.float()) @ F.normalize(train.float()).T
    columns = nearest_columns(similarities, min(k, len(train)))
    order = similarities.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order).numpy()


def tsne(features: Tensor) -> NDArray[np.float32]:
    """Returns places [s, 2] in [0, 1] by t-SNE of cosine distances; the same features give the same places."""
    from sklearn.manifold import TSNE

    if len(features) < FEWEST_ON_A_MAP:
        return np.full((len(features), 2), 0.5, np.float32)
    rows = F.normalize(features.float()).numpy()
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)
    low, high = places.min(axis=0), places.max(axis=0)
    return ((places - low) / np.maximum(high - low, np.finfo(np.float32).tiny)).astype(np.float32)


def confusion(labels: NDArray[np.int64], answers: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Returns how many images of each class (rows) got each answer (columns)."""
    return np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)


def _grid(images: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return images.reshape(*shape, *images.shape[1:])
