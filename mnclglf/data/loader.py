"""The base of the loaders: batches of views, in an order that depends on the seed and the step alone.

So any step can be the first one, and resuming needs no state.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnclglf.config import ViewConfig, require
from mnclglf.data.images import ImageSet, Statistics
from mnclglf.data.philox import block_permutation, permutation
from mnclglf.data.views import ViewParameters, blur_window, draw_parameters


class Batch(NamedTuple):
    """The input of a training step."""

    views: Tensor
    """[V * N, 3, S, S], view by view, normalized, channels_last, in the autocast dtype, on the device."""
    indices: Tensor
    """Rows of the image set, int64 [N], on the device."""
    parameters: Tensor | None = None
    """What the views are made by, fp32 [V * N, 13], on the device; None where they are not made there. mnclglf_kernels'
    augment names the columns."""

    def each(self) -> tuple[Tensor, ...]:
        """Returns the V views, [N, 3, S, S] each, which share the batch's memory."""
        return self.views.split(len(self.indices))


BLOCKS_TOGETHER = 4
"""Blocks whose images are shuffled together, where the order is one of blocks."""


def batch_indices(
    seed: int, step: int, count: int, batch_size: int, shuffle_block: int | None = None
) -> NDArray[np.int64]:
    """Returns the rows of a global step's images, int64 [batch_size]; an epoch is a random order of `count` images.

    With `shuffle_block` it is the order of `block_permutation`, in groups of BLOCKS_TOGETHER blocks.
    """
    epoch, position = divmod(step, count // batch_size)
    return _epoch_order(seed, epoch, count, shuffle_block)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=2)  # batches of two epochs can be in the prefetch queue at once
def _epoch_order(seed: int, epoch: int, count: int, shuffle_block: int | None) -> NDArray[np.int64]:
    if shuffle_block is None:
        order = permutation(count, seed=seed, epoch=epoch)
    else:
        order = block_permutation(count, shuffle_block, BLOCKS_TOGETHER, seed=seed, epoch=epoch)
    order.flags.writeable = False  # the cache hands the same array to every caller
    return order


class Loader(ABC):
    """Makes the views of an image set; the same step gives the same batch, wherever a run starts.

    Args:
        images: images to train on.
        config: how a view is made.
        views: views of each image in a batch.
        side: side of a view in pixels.
        batch_size: images in a batch of all ranks together.
        seed: seed of the order and of the views.
        dtype: dtype of the views in a batch.
        device: where batches go.
        threads: CPU threads; no result depends on them.
        rank: number of the part of every batch that this process makes.
        ranks: parts of a batch.
        statistics: mean [3] and deviation [3] that views are normalized with; None takes the images' own.
        shuffle_block: images of a block, in whose order an epoch is shuffled; None shuffles all images together.

    Raises:
        ValueError: there are fewer images than a batch holds, a batch cannot be divided evenly among the ranks, or the
            views are too small for their blur.
    """

    def __init__(
        self,
        images: ImageSet,
        config: ViewConfig,
        *,
        views: int,
        side: int,
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        rank: int = 0,
        ranks: int = 1,
        statistics: Statistics | None = None,
        shuffle_block: int | None = None,
    ) -> None:
        require(
            len(images) >= batch_size,
            f"{images.name} has {len(images)} training images, fewer than one batch of {batch_size}; "
            "lower --batch-size or take more images",
        )
        if batch_size % ranks or not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks} has no whole share of a batch of {batch_size}; change batch_size")
        blur_window(config, side)  # raises if it is too wide
        self.steps_per_epoch = len(images) // batch_size
        """Whole batches per epoch; an incomplete last one is dropped."""
        self.mean, self.std = statistics or images.statistics()
        """[3] each, of the images scaled to [0, 1]: what views are normalized with."""
        self.side = side
        self.into: Tensor | None = None
        """Where the views of every batch are written, [V * N, 3, S, S] channels_last, over those of the batch before;
        None for new tensors."""
        self.deferred = False
        """Whether the views of the next batches are empty, as the step makes them: only of ResidentLoader."""
        self._images = images.to_shuffle(shuffle_block and BLOCKS_TOGETHER * shuffle_block)
        self._shuffle_block = shuffle_block
        self._config = config
        self._views = views
        self._batch_size = batch_size
        self._share = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self._seed = seed
        self._dtype = dtype
        self._device = device
        self._threads = threads

    @property
    def name(self) -> str:
        """Returns the name that --loader takes."""
        return type(self).__name__.removesuffix("Loader").lower()

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of the global steps start .. stop - 1, across epochs."""

    @abstractmethod
    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        """Returns the views of these images in this epoch, each float32 [n, 3, S, S], on the device."""

    def _rows(self, step: int) -> NDArray[np.int64]:
        """Returns this rank's part of the rows of a step's images."""
        count, size = len(self._images), self._batch_size
        return batch_indices(self._seed, step, count, size, self._shuffle_block)[self._share]

    def _draw(self, rows: NDArray[np.int64], epoch: int) -> list[ViewParameters]:
        """Draws the parameters of these images, view by view."""
        sizes = self._images.sizes(rows)
        return [draw_parameters(self._seed, epoch, rows, view, self._config, *sizes) for view in range(self._views)]

    def _batch(self, views: Sequence[Tensor], rows: NDArray[np.int64]) -> Batch:
        """Makes a batch of views [N, S, S, 3] of any dtype, on any device."""
        indices = torch.from_numpy(rows.copy())
        if self._device.type == "cuda":
            indices = indices.pin_memory()  # a copy from pageable memory would wait for the device
        made = self._to_device(views, self._dtype, self.into)
        return Batch(made, indices.to(self._device, non_blocking=True))

    def _to_device(self, views: Sequence[Tensor], dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Moves V times [N, S, S, 3] to the device, as [V * N, 3, S, S] in the same order of memory: channels_last."""
        if into is None:
            count, height, width, channels = len(views) * len(views[0]), *views[0].shape[1:]
            shape = count, channels, height, width
            into = torch.empty(shape, dtype=dtype, device=self._device, memory_format=torch.channels_last)
        for place, view in zip(into.split(len(views[0])), views, strict=True):
            place.copy_(view.permute(0, 3, 1, 2), non_blocking=True)
        return into
