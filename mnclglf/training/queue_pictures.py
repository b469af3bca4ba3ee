"""What the queue's lookup returned over a run: some queries and their nearest neighbors, for the report."""

# s steps, p pairs of a step, t side of a thumbnail

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mnclglf.data.images import ImageSet
from mnclglf.data.thumbnails import thumbnails
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.files import write_atomically

PAIRS = 6  # of a step
MOMENTS = 6  # steps of a run that are kept, about evenly spread
NAMES = ("queries", "query_labels", "neighbors", "neighbor_labels")
Arrays = tuple[NDArray[np.generic], ...]  # as NAMES has them


class QueuePictures:
    """Keeps pairs of a query and its nearest neighbor from a few steps of a run, in RUN/queue.npz.

    The file has `steps` int64 [s], `queries` and `neighbors` uint8 [s, p, t, t, 3], and their labels [s, p], -1 without
    labels. Where fewer than p queries had a neighbor that is an image, not a random row, the step is left out.

    Args:
        path: the file; what a run wrote there before it was interrupted is kept.
        images: the training images.
        start: steps that are done.
        total: steps of the whole run.
    """

    def __init__(self, path: Path, images: ImageSet, start: int, total: int) -> None:
        self.path, self.images, self.total = path, images, total
        self.kept = {step: arrays for step, arrays in read_pairs(path).items() if step <= start}

    def is_due(self, done: int) -> bool:
        """Returns whether a step that logs is the first since the last moment that was to be kept."""
        moment = (done - 1) * MOMENTS // self.total
        return done == self.total or all((step - 1) * MOMENTS // self.total != moment for step in self.kept)

    def keep(self, done: int, indices: Tensor, neighbors: Tensor) -> None:
        """Keeps the first pairs of a step.

        Args:
            done: number of the step, from 1.
            indices: [N] data-set index of each query.
            neighbors: [N] data-set index of each nearest neighbor, -1 for a random row.
        """
        found = neighbors.cpu().numpy()
        known = np.flatnonzero(found >= 0)[:PAIRS]
        if len(known) < PAIRS:
            return
        pairs = indices.cpu().numpy()[known], found[known]
        self.kept[done] = tuple(x for rows in pairs for x in (thumbnails(self.images, rows), self.images.labels[rows]))
        write_pairs(self.path, self.kept)


def write_pairs(path: Path, kept: dict[int, Arrays]) -> None:
    """Writes the pairs of each step."""
    steps = sorted(kept)
    arrays = {name: np.stack([kept[step][i] for step in steps]) for i, name in enumerate(NAMES)}
    arrays["steps"] = np.array(steps)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]


def read_pairs(path: Path) -> dict[int, Arrays]:
    """Reads the pairs of each step; none if there is no file, or if it is damaged: they are only pictures.

    Raises:
        OSError: the file cannot be read now; it would be replaced by the pairs of later steps alone.
    """
    if not path.exists():
        return {}
    try:
        with open_arrays(path) as file:
            columns = [file[name] for name in NAMES]
            return {int(step): tuple(column[i] for column in columns) for i, step in enumerate(file["steps"])}
    except OSError:
        raise
    except Exception:  # numpy and zipfile raise many kinds of errors for a damaged file
        return {}
