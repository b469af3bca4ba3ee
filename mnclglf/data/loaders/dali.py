# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false, reportArgumentType=false
"""Views made by DALI: one pipeline for CPU and GPU, for images in memory and in files.

The pipeline has no randomness or state of its own: the parameters of each view are inputs, drawn by
views.draw_parameters. The operations and their order are those of reference.py. After the resize, pixels are floats
from 0 to 255, clamped where torchvision clamps.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from mnclglf.config import ViewConfig
from mnclglf.data.decoding import FORMATS, TURNS
from mnclglf.data.errors import DataError
from mnclglf.data.images import EncodedImages, ImageFiles
from mnclglf.data.loader import Batch, Loader
from mnclglf.data.packed import PackedImages
from mnclglf.data.views import ViewParameters, blur_window

# Of a core: more are no faster, and DALI aborts the process where the system refuses one.
MOST_THREADS = 4
PREFETCH = 2  # batches made ahead while one is used
_LUMA = [0.2989, 0.587, 0.114]  # torchvision's weights of red, green and blue
_WHITE = 255.0
_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)


class DaliLoader(Loader):
    """Loader that runs DALI on the device, GPU or CPU, and prefetches while a batch is used.

    On a GPU a batch belongs to the stream that is current when it is taken: its memory is reused in stream order.
    """

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        steps = range(start, stop)
        plan = ((self._rows(step), step // self.steps_per_epoch) for step in steps)
        with closing(self._made(plan, self._share.stop - self._share.start)) as made:
            for step, views in zip(steps, made, strict=True):
                yield self._batch(views, self._rows(step))

    def render(self, indices: NDArray[np.int64], epoch: int) -> tuple[Tensor, ...]:
        (views,) = self._made(iter([(indices, epoch)]), len(indices))
        return self._to_device(views, torch.float32).split(len(indices))

    def _made(self, plan: Iterator[tuple[NDArray[np.int64], int]], most: int) -> Generator[list[Tensor]]:
        """Yields one tensor [N, S, S, 3] per view, float32 in DALI's memory, for each (rows, epoch); N <= `most`."""
        cuda = self._device.type == "cuda"
        device_id = torch.empty(0, device=self._device).device.index if cuda else None  # plain "cuda" has no index
        ahead: deque[NDArray[np.int64]] = deque()  # rows that DALI has asked for and not yet returned

        def source() -> Iterator[list[Any]]:
            plan_to_read, plan_to_draw = itertools.tee(plan)
            read = self._read_ahead(rows for rows, _ in plan_to_read)
            for (rows, epoch), images in zip(plan_to_draw, read, strict=True):
                ahead.append(rows)
                drawn = [view_inputs(parameters, self._config) for parameters in self._draw(rows, epoch)]
                yield [*images, *self._turns(rows), *(column for view in drawn for column in view)]

        pipeline = view_pipeline(
            source(),
            self._config,
            views=self._views,
            side=self.side,
            batch_size=most,
            threads=min(self._threads, MOST_THREADS * (os.cpu_count() or 1)),
            device_id=device_id,
            mean=self.mean,
            std=self.std,
            encoded=isinstance(self._images, EncodedImages),
            paths=isinstance(self._images, ImageFiles),
            decoded=bool(self._decoded.any()),
            turned=self._turned,
        )
        while True:
            try:
                # With the stream that uses an output, DALI orders its wait and release in that stream: no host sync.
                views = pipeline.run(torch.cuda.current_stream(self._device) if cuda else None)
            except StopIteration:
                return
            except RuntimeError as error:
                if isinstance(self._images, EncodedImages):
                    _blame(self._images, [row for rows in ahead for row in rows], error)
                raise
            ahead.popleft()
            yield [torch.from_dlpack(view.as_tensor()) for view in views]

    @property
    def _turned(self) -> bool:
        return isinstance(self._images, EncodedImages) and self._images.orientations is not None

    def _turns(self, rows: NDArray[np.int64]) -> list[NDArray[np.generic]]:
        """Returns the pipeline's inputs for files that are not all upright, [n] each; none for other images."""
        if not self._turned:
            return []
        transposed, *mirrored = np.array([TURNS.get(int(self._images.orientations[row]), (0, 0, 0)) for row in rows]).T
        return [transposed.astype(np.bool_), *(column.astype(np.int32) for column in mirrored)]

    @functools.cached_property
    def _decoded(self) -> NDArray[np.bool_]:
        """Whether Pillow decodes each image [n], as DALI does not read its format; all False for images in memory."""
        if not isinstance(self._images, EncodedImages) or not self._images.kinds:
            return np.zeros(len(self._images), np.bool_)
        return np.array([not FORMATS[kind.format].by_dali for kind in self._images.kinds])

    def _read_ahead(self, plan: Iterator[NDArray[np.int64]]) -> Iterator[list[Any]]:
        """Yields the pipeline's first inputs for each batch of rows: pixels, or what `_encoded` returns of files."""
        images = self._images
        if not isinstance(images, EncodedImages):
            return ([pixels] for pixels in images.read_ahead(plan, self._threads))
        plan, plan_to_read = itertools.tee(plan)
        if isinstance(images, PackedImages):
            sources = images.contents_ahead(plan_to_read, self._threads)
        else:
            sources = ([self._path(row) for row in rows] for rows in plan_to_read)
        return map(self._encoded, plan, sources)

    def _path(self, row: int) -> bytes:
        """Returns the path of a file, which DALI opens; reading a pipe in its place would wait for ever."""
        assert isinstance(self._images, EncodedImages)
        self._images.check(row)
        return self._images.place(row).encode(errors="surrogateescape")

    def _encoded(self, rows: NDArray[np.int64], sources: list[bytes]) -> list[Any]:
        """Returns paths or contents of files; where Pillow decodes some, also whether it does, and their pixels."""
        assert isinstance(self._images, EncodedImages)
        arrays = [np.frombuffer(source, np.uint8) for source in sources]
        if not self._decoded.any():
            return [arrays]
        decoded = self._decoded[rows]
        pixels = [_NO_PIXELS] * len(rows)
        for place, image in zip(np.flatnonzero(decoded), self._images.read(rows[decoded]), strict=True):
            pixels[place] = image
        return [arrays, decoded, pixels]


def _blame(images: EncodedImages, rows: list[int], error: RuntimeError) -> None:
    """Raises DataError that names the file behind a DALI error, which does not name it, if it can be found.

    The file is damaged or has changed, or Pillow reads it and DALI does not.
    """
    for row in rows:
        images.pixels(row)  # DataError if it cannot be read, or has changed
    if rows and any(word in str(error) for word in ("decode", "parser", "nvImageCodec", "image")):
        named = ", ".join(images.names(np.array(rows[:8])))
        raise DataError(
            f"DALI cannot read one of {named}{', ...' if len(rows) > 8 else ''} ({_reason(error)}), though Pillow can; "
            "convert it, leave it away, or take --loader reference"
        ) from error


def _reason(error: RuntimeError) -> str:
    """Returns the line that matters of DALI's many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    return (after or ["no text"])[0][:200]


def input_names(config: ViewConfig) -> list[str]:
    """Returns a view's inputs: only those that the config switches on, or DALI would copy the rest in vain."""
    names = ["start", "shape"]
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
    if config.solarize_probability > 0:
        names += ["solarize"]
    return names


def view_inputs(p: ViewParameters, config: ViewConfig) -> list[NDArray[np.generic]]:
    """Returns the inputs of one view of a batch, in the order of `input_names`."""
    inputs = p.arrays() | {
        "start": np.stack([p.top, p.left], axis=1),
        "shape": np.stack([p.crop_height, p.crop_width], axis=1),
        "flip": p.flip.astype(np.int32),
        "jitter": (p.brightness != 1) | (p.contrast != 1) | (p.saturation != 1) | (p.hue != 0),
        "blur": p.sigma > 0,
    }
    return [inputs[name] for name in input_names(config)]


def view_pipeline(
    source: Iterator[list[Any]],
    config: ViewConfig,
    *,
    views: int,
    side: int,
    batch_size: int,
    threads: int,
    device_id: int | None,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    encoded: bool = False,
    paths: bool = False,
    decoded: bool = False,
    turned: bool = False,
) -> Pipeline:
    """Returns a pipeline that makes one output per view from each item of `source`, float32 [n, side, side, 3].

    Args:
        source: iterator over batches. An item is the images, uint8 [n, H, W, 3], or with `encoded` the contents of
            files, each uint8 [length], or with `paths` their paths; with `decoded` whether each is decoded, and its
            pixels; with `turned` whether each is transposed, mirrored left to right and mirrored top to bottom; then
            `view_inputs` of every view. The pipeline ends with it.
        config: settings of a view.
        views: number of views per image; an image is read and decoded once.
        side: side of a view in pixels.
        batch_size: largest number of images in an item.
        threads: CPU threads.
        device_id: number of the GPU, or None for the CPU.
        mean: channel means [3] of the images scaled to [0, 1].
        std: channel deviations [3] of the images scaled to [0, 1].
        encoded: True if images come as files.
        paths: True if files come as paths.
        decoded: True if some files come as pixels instead.
        turned: True if some files are not upright.
    """
    names = input_names(config)
    device = "cpu" if device_id is None else "gpu"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # outputs own their memory, so a tensor made from one stays valid
        enable_conditionals=True,  # a fifth faster on the CPU than applying every operation to every view (measured)
    )
    def pipeline():
        layouts = ["" if encoded else "HWC", *["", "HWC"] * decoded] + [""] * (3 * turned + views * len(names))
        images, *values = fn.external_source(source=source, num_outputs=len(layouts), layout=layouts)
        if encoded:  # "mixed" decodes on the GPU
            decoder = "cpu" if device == "cpu" else "mixed"
            # Turned by our own reading of the orientation, as DALI knows other places and spellings of it than Pillow.
            settings = dict(device=decoder, output_type=types.RGB, adjust_orientation=False)
            if decoded:
                is_decoded, pixels, *values = values
                if is_decoded:
                    images = pixels.gpu() if device == "gpu" else pixels
                else:
                    images = fn.decoders.image(fn.io.file.read(images) if paths else images, **settings)
            else:
                images = fn.decoders.image(fn.io.file.read(images) if paths else images, **settings)
        elif device == "gpu":
            images = images.gpu()
        if turned:
            transposed, mirrored, upside_down, *values = values
            if transposed:
                images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
            images = fn.flip(images, horizontal=mirrored, vertical=upside_down)
        made = []
        for view in range(views):
            given = {name: values[view * len(names) + number] for number, name in enumerate(names)}
            made.append(_view(images, given, config, side, mean, std))
        return tuple(made)

    return pipeline()


def _view(
    images: Any,
    given: dict[str, Any],
    config: ViewConfig,
    side: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> Any:
    """Returns one view, float32 [side, side, 3], of uint8 [H, W, 3].

    DALI's `if` selects the images whose input is true. An operation without an input is not built.
    """
    pixels = fn.cast(_crop(images, given, side, config.interpolation), dtype=types.FLOAT)
    if given.get("jitter"):
        pixels = _jitter(pixels, given)
    if given.get("gray"):
        pixels = fn.coord_transform(pixels, M=_LUMA * 3)
    if given.get("blur"):
        pixels = fn.gaussian_blur(pixels, sigma=given["sigma"], window_size=blur_window(config, side))
    if given.get("solarize"):
        pixels = pixels + (pixels >= _WHITE / 2) * (_WHITE - 2.0 * pixels)
    return fn.crop_mirror_normalize(
        pixels,
        mirror=given.get("flip", 0),
        mean=[_WHITE * float(value) for value in mean],
        std=[_WHITE * float(value) for value in std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def _crop(pixels: Any, given: dict[str, Any], side: int, interpolation: str) -> Any:
    """Rotates, crops and resizes uint8 [H, W, 3].

    The crop is cut out before the resize: with resize's own roi_start and roi_end, pixels outside the crop bleed into
    its edge (measured: up to 78 of 255 levels from torchvision).
    """
    if "angle" in given:
        pixels = fn.rotate(pixels, angle=given["angle"], keep_size=True, interp_type=types.INTERP_LINEAR, fill_value=0)
    pixels = fn.slice(pixels, start=given["start"], shape=given["shape"], axes=[0, 1])
    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    return fn.resize(pixels, size=[side, side], interp_type=kind, antialias=True)


def _jitter(pixels: Any, given: dict[str, Any]) -> Any:
    """Changes brightness, contrast, saturation and hue of float [S, S, 3], each if it is given."""
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
    """Adds turns to the HSV hue of float [S, S, 3]; DALI's own hue rotates in YIQ, which is a different operation.

    With m the least of r, g, b and C the largest minus the least, the hue in sixths of a turn is
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
