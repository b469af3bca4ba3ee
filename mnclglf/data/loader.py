"""Batches of views, in an order that depends on the seed and the step alone: any step can be the first."""

from __future__ import annotations

import functools
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnclglf.config import LoaderName, ViewConfig
from mnclglf.data.images import ImageArray
from mnclglf.data.philox import permutation
from mnclglf.data.reference import render_view
from mnclglf.data.views import ViewParameters, draw_parameters

logger = logging.getLogger(__name__)

_DALI_REMEDY = 'pip install "mnclglf[dali-cuda13]"'


class Batch(NamedTuple):
    """What a step trains on."""

    views: tuple[Tensor, ...]
    """Each [N, 3, S, S], normalised, channels_last, in the autocast dtype, on the device."""
    indices: Tensor
    """Rows of the image set, int64 [N], on the device."""


def batch_indices(seed: int, step: int, count: int, batch_size: int) -> NDArray[np.int64]:
    """Rows of the images of a global step, int64 [batch_size]: each epoch is a random order of `count` images."""
    epoch, position = divmod(step, count // batch_size)
    return _epoch_order(seed, epoch, count)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=2)  # two epochs meet in the prefetch queue
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    order = permutation(count, seed=seed, epoch=epoch)
    order.flags.writeable = False  # callers share it
    return order


class Loader(ABC):
    """Makes the views of an image set; the same step gives the same batch, wherever a run starts."""

    def __init__(
        self,
        images: ImageArray,
        view: ViewConfig,
        *,
        views: int,
        side: int,
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
    ) -> None:
        if len(images) < batch_size:
            raise ValueError(
                f"{images.name} has {len(images)} training images, fewer than one batch of {batch_size}; "
                "lower --batch-size or take more images"
            )
        self.steps_per_epoch = len(images) // batch_size
        """Whole batches in an epoch; an incomplete last one is dropped."""
        self.mean, self.std = images.statistics()
        """[3] each, of the images scaled to [0, 1]: what views are normalised with."""
        self.side = side
        self._images = images.images
        self._config = view
        self._views = views
        self._batch_size = batch_size
        self._seed = seed
        self._dtype = dtype
        self._device = device
        self._threads = threads

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of the global steps start .. stop - 1, across epochs."""

    @abstractmethod
    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        """The views that these images have in this epoch, each float32 [n, 3, S, S], on the device."""

    def _rows(self, step: int) -> NDArray[np.int64]:
        return batch_indices(self._seed, step, len(self._images), self._batch_size)

    def _draw(self, rows: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.uint8], ViewParameters]:
        """Images and parameters of all views of these rows, view-major: row v * N + n is view v of image n."""
        height, width = self._images.shape[1:3]
        rows, views = np.tile(rows, self._views), np.repeat(np.arange(self._views), len(rows))
        return self._images[rows], draw_parameters(self._seed, epoch, rows, views, self._config, height, width)

    def _split(self, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """View-major [V * N, S, S, 3] as V tensors [N, 3, S, S] that share its memory order: channels_last."""
        return pixels.to(self._device, dtype, non_blocking=True).permute(0, 3, 1, 2).chunk(self._views)

    def _batch(self, pixels: Tensor, rows: NDArray[np.int64]) -> Batch:
        indices = torch.from_numpy(rows.copy())
        if self._device.type == "cuda":
            indices = indices.pin_memory()  # from pageable memory the copy would wait for the device
        return Batch(self._split(pixels, self._dtype), indices.to(self._device, non_blocking=True))


class ReferenceLoader(Loader):
    """torchvision, one image after the other."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            rows = self._rows(step)
            yield self._batch(self._pixels(rows, step // self.steps_per_epoch), rows)

    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        return self._split(self._pixels(indices, epoch), torch.float32)

    def _pixels(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """float32 [V * N, S, S, 3]."""
        images, parameters = self._draw(rows, epoch)

        def render(row: int) -> Tensor:
            return render_view(
                images[row],
                parameters,
                row,
                side=self.side,
                interpolation=self._config.interpolation,
                mean=self.mean,
                std=self.std,
            )

        with _one_thread():
            pixels = [render(row) for row in range(len(images))]
        return torch.stack(pixels).permute(0, 2, 3, 1).contiguous()


@contextmanager
def _one_thread() -> Generator[None]:
    """On images this small more threads of torch are no faster, and on busy cores ten times slower (measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DaliLoader(Loader):
    """DALI, on the GPU where the device is one, else on the CPU; it works ahead while a batch is used.

    On a GPU a batch belongs to the stream that is current when it is taken: its memory is used again in that order.
    """

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        steps = range(start, stop)
        plan = ((self._rows(step), step // self.steps_per_epoch) for step in steps)
        with closing(self._pixels(plan, self._batch_size)) as made:
            for step, pixels in zip(steps, made, strict=True):
                yield self._batch(pixels, self._rows(step))

    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        (pixels,) = self._pixels(iter([(indices, epoch)]), len(indices))
        return self._split(pixels, torch.float32)

    def _pixels(self, plan: Iterator[tuple[NDArray[np.int64], int]], most: int) -> Generator[Tensor]:
        """float32 [V * N, S, S, 3] for each (rows, epoch) of the plan, in DALI's memory, with at most `most` rows."""
        from mnclglf.data.dali import view_inputs, view_pipeline

        cuda = self._device.type == "cuda"
        device_id = torch.empty(0, device=self._device).device.index if cuda else None  # plain "cuda" has no index
        pipeline = view_pipeline(
            (view_inputs(*self._draw(rows, epoch), self._config) for rows, epoch in plan),
            self._config,
            side=self.side,
            batch_size=most * self._views,
            threads=self._threads,
            device_id=device_id,
            mean=self.mean,
            std=self.std,
        )
        while True:
            try:
                # Given the stream that uses it, an output is waited for and freed in that stream's order: no host sync.
                (views,) = pipeline.run(torch.cuda.current_stream(self._device) if cuda else None)
            except StopIteration:
                return
            yield torch.from_dlpack(views.as_tensor())


def make_loader(
    images: ImageArray,
    view: ViewConfig,
    *,
    views: int,
    side: int,
    batch_size: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: LoaderName,
    threads: int,
) -> Loader:
    """The loader of a run.

    Args:
        images: what to train on.
        view: how a view is made.
        views: views of each image in a batch.
        side: of a view in pixels.
        batch_size: N, images in a batch.
        seed: of the order and of the views.
        dtype: of the views in a batch.
        device: where batches go.
        backend: auto is dali where it can be imported, else reference.
        threads: CPU threads of dali; no result depends on it.

    Raises:
        ValueError: there are fewer images than a batch holds.
        ImportError: backend is dali and DALI is not installed.
    """
    made = {"dali": DaliLoader, "reference": ReferenceLoader}[_resolve(backend)]
    return made(
        images,
        view,
        views=views,
        side=side,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        threads=threads,
    )


def _resolve(backend: LoaderName) -> str:
    if backend == "reference":
        return backend
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        if backend == "dali":
            raise ImportError(f"loader dali needs DALI ({error}); install it: {_DALI_REMEDY}") from error
        logger.warning("DALI is not installed: using the slow reference loader; install it: %s", _DALI_REMEDY)
        return "reference"
    return "dali"
