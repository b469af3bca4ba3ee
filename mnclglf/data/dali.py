# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false, reportArgumentType=false
"""Views made by DALI: one pipeline for the CPU and for the GPU, without randomness or state of its own.

The parameters of each view are inputs, drawn by views.draw_parameters; the operations and their order are those of
reference.py. Pixels are floats from 0 to 255 after the resize, clamped where torchvision clamps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from nvidia.dali.pipeline import Pipeline

from mnclglf.config import ViewConfig
from mnclglf.data.views import ViewParameters, blur_kernel_size

PREFETCH = 2  # batches in the making while one is consumed
_LUMA = [0.2989, 0.587, 0.114]  # torchvision's weights of red, green and blue
_WHITE = 255.0


def input_names(config: ViewConfig) -> list[str]:
    """The inputs of a pipeline: only what the config switches on, or DALI would copy the rest in vain."""
    names = ["image", "start", "shape"]
    if config.rotation_degrees > 0:
        names += ["angle"]
    if config.flip_probability > 0:
        names += ["flip"]
    changes = [name for name in ("brightness", "contrast", "saturation", "hue") if getattr(config, name) > 0]
    if config.jitter_probability > 0 and changes:
        names += ["jitter", *changes]
    if config.gray_probability > 0:
        names += ["gray"]
    if config.blur_probability > 0:
        names += ["blur", "sigma"]
    return names


def view_inputs(images: NDArray[np.uint8], parameters: ViewParameters, config: ViewConfig) -> list[NDArray[np.generic]]:
    """The inputs of one batch, in the order of `input_names`.

    Args:
        images: uint8 [n, H, W, 3], the image of each row of the parameters.
        parameters: n views.
        config: what they were drawn with.
    """
    p = parameters
    inputs = p.arrays() | {
        "image": images,
        "start": np.stack([p.top, p.left], axis=1),
        "shape": np.stack([p.crop_height, p.crop_width], axis=1),
        "flip": p.flip.astype(np.int32),
        "jitter": (p.brightness != 1) | (p.contrast != 1) | (p.saturation != 1) | (p.hue != 0),
        "blur": p.sigma > 0,
    }
    return [inputs[name] for name in input_names(config)]


def view_pipeline(
    source: Iterator[list[NDArray[np.generic]]],
    config: ViewConfig,
    *,
    side: int,
    batch_size: int,
    threads: int,
    device_id: int | None,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> Pipeline:
    """A pipeline that turns each item of `source` into float32 views [n, side, side, 3], normalised.

    Args:
        source: `view_inputs` of each batch; its end is the pipeline's end.
        config: how views are made.
        side: of a view in pixels.
        batch_size: most views in an item.
        threads: CPU threads.
        device_id: the GPU's number, or None for the CPU.
        mean: [3] of the images scaled to [0, 1].
        std: [3] of the images scaled to [0, 1].
    """
    names = input_names(config)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # outputs own their memory: a tensor made from one stays valid
        enable_conditionals=True,  # a fifth faster on the CPU than doing everything to every view, measured
    )
    def pipeline():
        layouts = ["HWC" if name == "image" else "" for name in names]
        values = fn.external_source(source=source, num_outputs=len(names), layout=layouts)
        given = {name: values[number] for number, name in enumerate(names)}  # the conversion of `if` has no strict zip
        pixels = given["image"] if device_id is None else given["image"].gpu()
        pixels = fn.cast(_crop(pixels, given, side, config.interpolation), dtype=types.FLOAT)
        # DALI's `if` takes the views for which its input is true; where the config has no such input it is not built.
        if given.get("jitter"):
            pixels = _jitter(pixels, given)
        if given.get("gray"):
            pixels = fn.coord_transform(pixels, M=_LUMA * 3)
        if given.get("blur"):
            pixels = fn.gaussian_blur(pixels, sigma=given["sigma"], window_size=blur_kernel_size(side))
        return fn.crop_mirror_normalize(
            pixels,
            mirror=given.get("flip", 0),
            mean=[_WHITE * float(value) for value in mean],
            std=[_WHITE * float(value) for value in std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    return pipeline()


def _crop(pixels: Any, given: dict[str, Any], side: int, interpolation: str) -> Any:
    """The rotation, the crop and its resize, of uint8 [H, W, 3].

    The crop is cut out before it is resized: with resize's own roi_start and roi_end, pixels from outside the crop
    bleed into its edge (up to 78 of 255 levels from torchvision, measured).
    """
    if "angle" in given:
        pixels = fn.rotate(pixels, angle=given["angle"], keep_size=True, interp_type=types.INTERP_LINEAR, fill_value=0)
    pixels = fn.slice(pixels, start=given["start"], shape=given["shape"], axes=[0, 1])
    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    return fn.resize(pixels, size=[side, side], interp_type=kind, antialias=True)


def _jitter(pixels: Any, given: dict[str, Any]) -> Any:
    """Brightness, contrast, saturation and hue, as far as they are given, of float [S, S, 3]."""
    if "brightness" in given:
        pixels = dmath.min(pixels * given["brightness"], _WHITE)
    if "contrast" in given:
        factor = given["contrast"]
        mean = fn.reductions.mean(fn.coord_transform(pixels, M=_LUMA), axes=[0, 1, 2], keep_dims=True)
        pixels = _clamp(pixels * factor + mean * (1.0 - factor), _WHITE)
    if "saturation" in given:
        factor = given["saturation"]
        pixels = _clamp(pixels * factor + fn.coord_transform(pixels, M=_LUMA) * (1.0 - factor), _WHITE)
    if "hue" in given:
        pixels = _shift_hue(pixels, given["hue"])
    return pixels


def _shift_hue(pixels: Any, turns: Any) -> Any:
    """Adds turns to the hue in HSV, of float [S, S, 3]: DALI's own hue turns the colours in YIQ, which is not the same.

    With m the least and C the largest less the least of r, g, b, the hue in sixths of a turn is
    q = 1 + (g + b - r - m) / C where g >= b and 6 - q elsewhere. At hue h, red is m + C clamp(|h - 3| - 1), green
    m + C clamp(2 - |h - 2|), blue m + C clamp(2 - |h - 4|).
    """
    red, green, blue = pixels[:, :, 0:1], pixels[:, :, 1:2], pixels[:, :, 2:3]
    least = dmath.min(dmath.min(red, green), blue)
    chroma = dmath.max(dmath.max(red, green), blue) - least
    sixths = (green + blue - red - least) / dmath.max(chroma, 1e-6) + 1.0
    hue = (2.0 * (green >= blue) - 1.0) * sixths * (1.0 / 6.0) + turns
    hue = 6.0 * (hue - dmath.floor(hue))
    ramps = fn.cat(dmath.abs(hue - 3.0) - 1.0, 2.0 - dmath.abs(hue - 2.0), 2.0 - dmath.abs(hue - 4.0), axis=2)
    return least + chroma * _clamp(ramps, 1.0)


def _clamp(pixels: Any, largest: float) -> Any:
    return dmath.min(dmath.max(pixels, 0.0), largest)  # half the time of dmath.clamp, measured on the CPU
