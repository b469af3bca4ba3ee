"""Views made by torchvision, one image at a time: the slow reference that the other loaders are tested against."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mnclglf.config import ViewConfig
from mnclglf.data.loader import Batch, Loader
from mnclglf.data.views import ViewParameters, blur_window

_MODES = {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC}


def render_view(
    image: NDArray[np.uint8],
    parameters: ViewParameters,
    row: int,
    *,
    side: int,
    config: ViewConfig,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> Tensor:
    """Returns the view of `image`, uint8 [H, W, 3], by row `row` of the parameters: float32 [3, side, side].

    Rotation and resize round to uint8 levels, as they do on images from files. After them pixels are floats in [0, 1],
    clamped after each change of color. The last step normalizes them with mean [3] and std [3].
    """
    p = parameters
    pixels = torch.tensor(image).permute(2, 0, 1)
    if p.angle[row] != 0:
        pixels = F.rotate(pixels, float(p.angle[row]), F.InterpolationMode.BILINEAR)
    top, left, height, width = (int(column[row]) for column in (p.top, p.left, p.crop_height, p.crop_width))
    pixels = F.resized_crop(
        pixels, top, left, height, width, [side, side], _MODES[config.interpolation], antialias=True
    )
    pixels = _change_colors(F.to_dtype(pixels, torch.float32, scale=True), p, row)
    if p.flip[row]:
        pixels = F.horizontal_flip(pixels)
    if p.sigma[row] > 0:
        pixels = F.gaussian_blur(pixels, [blur_window(config, side)] * 2, [float(p.sigma[row])] * 2)
    if p.solarize[row]:
        pixels = F.solarize(pixels, 0.5)
    return F.normalize(pixels, mean.tolist(), std.tolist())


def _change_colors(pixels: Tensor, p: ViewParameters, row: int) -> Tensor:
    """Changes brightness, contrast, saturation, hue and gray, in this order, of float32 [3, S, S] in [0, 1]."""
    if p.brightness[row] != 1:
        pixels = F.adjust_brightness(pixels, float(p.brightness[row]))
    if p.contrast[row] != 1:
        pixels = F.adjust_contrast(pixels, float(p.contrast[row]))
    if p.saturation[row] != 1:
        pixels = F.adjust_saturation(pixels, float(p.saturation[row]))
    if p.hue[row] != 0:
        pixels = F.adjust_hue(pixels, float(p.hue[row]))
    return F.rgb_to_grayscale(pixels, num_output_channels=3) if p.gray[row] else pixels


class ReferenceLoader(Loader):
    """Loader that runs torchvision, one image after the other, without prefetching."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            rows = self._rows(step)
            yield self._batch(self._made(rows, step // self.steps_per_epoch), rows)

    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        return self._to_device(self._made(indices, epoch), torch.float32).split(len(indices))

    def _made(self, rows: NDArray[np.int64], epoch: int) -> list[Tensor]:
        """Makes one tensor per view, float32 [N, S, S, 3]."""
        parameters = self._draw(rows, epoch)
        made: list[list[Tensor]] = [[] for _ in parameters]
        with _one_thread():
            for number, row in enumerate(rows.tolist()):
                image = self._images.pixels(row)
                for view, drawn in zip(made, parameters, strict=True):
                    pixels = render_view(
                        image, drawn, number, side=self.side, config=self._config, mean=self.mean, std=self.std
                    )
                    view.append(pixels)
        return [torch.stack(view).permute(0, 2, 3, 1).contiguous() for view in made]


@contextmanager
def _one_thread() -> Generator[None]:
    """Context in which torch uses one thread.

    On images this small more threads are no faster, and on busy cores ten times slower (measured).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
