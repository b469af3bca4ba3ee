"""augment: three views of a batch of stored images, beside torchvision one image after the other."""

from __future__ import annotations

import numpy as np
import torch

from bench.side_by_side import DEVICE, Case, Implementation, Work, by_implementation
from mnclglf.data.loaders.reference import render_view
from mnclglf.data.loaders.resident import parameter_table
from mnclglf.data.views import blur_window, draw_parameters
from mnclglf.recipes import VIEWS
from mnclglf_kernels import augment
from mnclglf_kernels.ops.augment import Recipe

VIEW = VIEWS["paper"]


def augment_case(*, images: int = 256, side: int = 32) -> Case:
    def make(implementation: Implementation) -> Work:
        pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
        drawn = [draw_parameters(0, 0, np.arange(images), view, VIEW, side, side) for view in range(3)]
        mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
        if implementation.backend == "reference":
            settings = dict(side=side, config=VIEW, mean=mean, std=std)

            def reference() -> list[torch.Tensor]:
                views = [render_view(pixels[row], view, row, **settings) for view in drawn for row in range(images)]
                return [torch.stack(views).to(DEVICE, implementation.dtype, memory_format=torch.channels_last)]

            return Work(reference)
        numbers = parameter_table(drawn).to(DEVICE)
        stored = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(DEVICE)
        statistics = [torch.from_numpy(values).to(DEVICE) for values in (mean, std)]
        given = stored, torch.arange(images, device=DEVICE), numbers, *statistics
        recipe = Recipe(side, blur_window=blur_window(VIEW, side))
        return Work(lambda: [augment(*given, recipe, dtype=implementation.dtype, backend=implementation.backend)])

    return Case("augment", f"3 x {images} views, {side} x {side}", "forward", "elementwise", make)


@by_implementation([augment_case(), augment_case(side=64)])
def test_augment(case, implementation, side_by_side) -> None:
    side_by_side(case, implementation)
