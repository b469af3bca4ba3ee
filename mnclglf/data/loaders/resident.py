"""Views made from images that stay on the device, by the kernel of mnclglf_kernels.ops.augment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.loader import Batch, Loader
from mnclglf.data.views import ViewParameters, blur_window
from mnclglf_kernels import Backend, augment
from mnclglf_kernels.ops.augment import LARGEST_SIDE, PARAMETERS, ViewFormat

_COPIED_IMAGES = 4096  # images copied to the device at once


def problem(images: ImageSet, side: int, most: int = LARGEST_SIDE) -> str | None:
    """Returns why images cannot be resident, or have sides above `most` pixels; None where they can."""
    if not isinstance(images, ImageArray):
        return "images of any size are read when they are needed"
    largest = max(side, *images.images.shape[1:3])
    return f"sides of {largest} are above {most}" if largest > most else None


class ResidentLoader(Loader):
    """The whole set as one tensor of bytes on the device; no worker; a step copies only the views' parameters.

    Args:
        images: images in memory, up to 64 x 64, as are the views: see `problem`.
        backend: backend of augment.
        others: other arguments of Loader.
    """

    def __init__(self, images: ImageArray, *others: Any, backend: Backend = "auto", **named: Any) -> None:
        super().__init__(images, *others, **named)
        self._backend: Backend = backend
        self._stored = _on_device(images.images, self._device)
        self._mean, self._std = (torch.from_numpy(x).to(self._device) for x in (self.mean, self.std))
        config = self._config
        self._format = ViewFormat(
            side=self.side,
            cubic=config.interpolation == "bicubic",
            blur_window=blur_window(config, self.side) if config.blur_probability else 1,
            rotates=config.rotation_degrees > 0,
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as drawing:  # draws the next step's numbers while this one is used
            drawn = drawing.submit(self._numbers, start)
            for step in range(start, stop):
                rows, parameters = (x.to(self._device, non_blocking=True) for x in drawn.result())
                if step + 1 < stop:
                    drawn = drawing.submit(self._numbers, step + 1)
                views = rows.new_empty(0, dtype=self._dtype) if self.deferred else self.views_of(rows, parameters)
                yield Batch(views, rows, parameters)

    def views_of(self, rows: Tensor, parameters: Tensor) -> Tensor:
        """Returns the views of a batch, [V * N, 3, S, S], from its rows and parameters, which are on the device."""
        return self._made(rows, parameters, self._dtype, self.into)

    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        rows, parameters = (x.to(self._device) for x in self._tensors(indices, epoch))
        return self._made(rows, parameters, torch.float32).split(len(indices))

    def _made(self, rows: Tensor, parameters: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Returns views [V * N, 3, S, S]."""
        given = self._stored, rows, parameters, self._mean, self._std
        return augment(*given, self._format, dtype=dtype, out=into, backend=self._backend)

    def _numbers(self, step: int) -> tuple[Tensor, Tensor]:
        rows, parameters = self._tensors(self._rows(step), step // self.steps_per_epoch)
        if self._device.type == "cuda":  # a copy from pageable memory would wait for the device
            return rows.pin_memory(), parameters.pin_memory()
        return rows, parameters

    def _tensors(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, Tensor]:
        """Returns rows [N] and the parameters of their views, [V * N, 13], view-major."""
        return torch.from_numpy(rows.copy()), parameter_table(self._draw(rows, epoch))


def parameter_table(views: Sequence[ViewParameters]) -> Tensor:
    """Returns augment's parameters of V views of N images, fp32 [V * N, 13], view-major."""
    columns = [view.arrays() for view in views]
    table = np.concatenate([np.stack([view[name] for name in PARAMETERS], 1) for view in columns])
    return torch.from_numpy(table.astype(np.float32))


def _on_device(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Returns [n, H, W, 3] as [n, 3, H, W]: plane by plane in a GPU's memory, as a view of the array on the CPU."""
    if device.type == "cpu" and images.flags.writeable:  # from_numpy warns about read-only arrays
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    stored = torch.empty(len(images), 3, *images.shape[1:3], dtype=torch.uint8, device=device)
    for start in range(0, len(images), _COPIED_IMAGES):
        part = torch.tensor(images[start : start + _COPIED_IMAGES])
        stored[start : start + _COPIED_IMAGES] = part.to(device).permute(0, 3, 1, 2)
    return stored
