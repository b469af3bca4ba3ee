"""Compares our loaders with others: images per second and core, the time a step waits, memory over many batches.

All make three views of every image as the recipe `paper` defines them. DALI, resident and reference are our loaders;
torchvision, lightly and kornia do the same operations with random numbers of their own, as their documentation shows
them. The rate per core is images over seconds of CPU time of all threads: what a loader takes from a training step on
the CPU, and what a GPU machine's cores can deliver. Every round starts each loader anew and runs it to its end,
including the building of DALI's pipeline.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnclglf.config import EngineConfig, ViewConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.loaders import make_loader
from mnclglf.data.views import blur_window
from mnclglf.recipes import VIEWS
from mnclglf.training.loop import Waiting
from mnclglf.training.start import choose_machine

MACHINE = choose_machine(EngineConfig())
DEVICE, DTYPE = MACHINE.device, MACHINE.dtype
VIEW: ViewConfig = VIEWS["paper"]
ROUNDS = 5
SECONDS = 1.5  # per loader and round
STEP_SECONDS = 1.0  # the stand-in for a training step takes so long
STEPS = 12
BATCHES = 2000  # in the memory test
SETTLED = 200  # batches before the memory is compared
SMALL = 64  # images per batch of the memory test

MakeViews = Callable[[int], object]
"""Makes the three views of so many images."""


def random_images(side: int, count: int = 2048) -> ImageArray:
    """Returns smooth noise: resampling costs the same on any image, and JPEG needs something to compress."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    pixels = torch.nn.functional.interpolate(torch.from_numpy(coarse).permute(0, 3, 1, 2).float(), size=side)
    images = pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
    return ImageArray(name="noise", split="train", images=images, labels=np.zeros(count, np.int64), classes=("any",))


def jpeg_files(folder: Path, count: int = 256) -> ImageSet:
    """Writes JPEG files of 500 x 375, the size of most of ImageNet's, and returns them as an image set."""
    for number, pixels in enumerate(random_images(500, count).images):
        Image.fromarray(pixels[:375]).save(folder / f"{number}.jpg", quality=90)
    return load_dataset(f"folder:{folder}")[0]


def our_run(images: ImageSet, backend: str, side: int, batch: int) -> MakeViews:
    settings: dict[str, Any] = dict(views=3, side=side, batch_size=batch, seed=0, dtype=DTYPE, threads=2)
    loader = make_loader(images, VIEW, backend=backend, device=DEVICE, **settings)  # pyright: ignore[reportArgumentType]
    if loader.name != backend:
        raise ImportError(f"{backend} cannot hold {side} x {side} or files")

    def run(count: int) -> None:
        for _ in loader.batches(0, max(1, count // batch)):
            pass

    return run


def one_by_one(view: Callable[[int], object]) -> MakeViews:
    """Applies a transform to one image at a time, on one thread, as a worker process does."""

    def run(count: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for number in range(count):
            for _ in range(3):
                view(number)
        torch.set_num_threads(threads)

    return run


def torchvision_run(images: ImageSet, side: int) -> MakeViews:
    from torchvision.transforms import v2

    window, jitter = blur_window(VIEW, side), (VIEW.brightness, VIEW.contrast, VIEW.saturation, VIEW.hue)
    mean, std = (values.tolist() for values in images.statistics())
    cubic = v2.InterpolationMode.BICUBIC
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(side, VIEW.crop_scale, interpolation=cubic, antialias=True),
            v2.RandomHorizontalFlip(VIEW.flip_probability),
            v2.RandomApply([v2.ColorJitter(*jitter)], VIEW.jitter_probability),
            v2.RandomGrayscale(VIEW.gray_probability),
            v2.RandomApply([v2.GaussianBlur(window, VIEW.blur_sigma)], VIEW.blur_probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    return one_by_one(lambda number: transform(images.pixels(number % len(images))))


def lightly_run(images: ImageSet, side: int) -> MakeViews:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    mean, std = (values.tolist() for values in images.statistics())
    transform = SimCLRViewTransform(
        input_size=side,
        cj_prob=VIEW.jitter_probability,
        cj_strength=1.0,
        cj_bright=VIEW.brightness,
        cj_contrast=VIEW.contrast,
        cj_sat=VIEW.saturation,
        cj_hue=VIEW.hue,
        min_scale=VIEW.crop_scale[0],
        random_gray_scale=VIEW.gray_probability,
        gaussian_blur=VIEW.blur_probability,
        sigmas=VIEW.blur_sigma,
        normalize={"mean": mean, "std": std},
    )
    return one_by_one(lambda number: transform(Image.fromarray(images.pixels(number % len(images)))))


def kornia_run(images: ImageSet, side: int, batch: int) -> MakeViews:
    import kornia.augmentation as K

    mean, std = (torch.from_numpy(values) for values in images.statistics())
    window = blur_window(VIEW, side)
    transform = K.AugmentationSequential(
        K.RandomResizedCrop((side, side), VIEW.crop_scale, resample="bicubic"),
        K.RandomHorizontalFlip(p=VIEW.flip_probability),
        K.ColorJitter(VIEW.brightness, VIEW.contrast, VIEW.saturation, VIEW.hue, p=VIEW.jitter_probability),
        K.RandomGrayscale(p=VIEW.gray_probability),
        K.RandomGaussianBlur((window, window), VIEW.blur_sigma, p=VIEW.blur_probability),
        K.Normalize(mean, std),
    )

    def run(count: int) -> None:
        for start in range(0, count, batch):
            some = np.arange(start, start + batch) % len(images)
            pixels = torch.from_numpy(np.asarray(images.read(some))).permute(0, 3, 1, 2).float() / 255
            for _ in range(3):
                transform(pixels)

    return run


def runs(images: ImageSet, side: int, batch: int) -> tuple[dict[str, MakeViews], dict[str, str]]:
    """Returns what can run here by name, and why the rest cannot."""
    makers: dict[str, Callable[[], MakeViews]] = {
        **{name: (lambda name=name: our_run(images, name, side, batch)) for name in ("dali", "resident", "reference")},
        "torchvision v2": lambda: torchvision_run(images, side),
        "lightly": lambda: lightly_run(images, side),
    }
    if isinstance(images, ImageArray):  # kornia augments batches of one size
        makers["kornia"] = lambda: kornia_run(images, side, batch)
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


@pytest.mark.parametrize("side", [32, 64, 224])
def test_images_per_second(side: int, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = jpeg_files(Path(folder)) if side == 224 else random_images(side)
        batch = 64 if side == 224 else 256
        found, missing = runs(images, side, batch)
        counts = {name: calibrated(run, batch) for name, run in found.items()}
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in found}  # a core's and the machine's
        for _ in range(ROUNDS):
            for name, run in found.items():
                cores, wall = time.process_time(), time.perf_counter()
                run(counts[name])
                spent = time.process_time() - cores, time.perf_counter() - wall
                rates[name].append((counts[name] / spent[0], counts[name] / spent[1]))
    kind = "JPEG files of 500 x 375" if side == 224 else f"images of {side} x {side} in memory"
    say(
        f"loaders: {kind}, three views of {side} x {side}, batch {batch}, {ROUNDS} rounds: images/s (least to greatest)"
    )
    for name, measured in rates.items():
        core, wall = ([rate[which] for rate in measured] for which in (0, 1))
        against = [own[0] / theirs[0] for own, theirs in zip(measured, rates["torchvision v2"], strict=True)]
        say(
            f"  {name:15}{statistics.median(core):8,.0f} per core ({min(core):,.0f} to {max(core):,.0f})"
            f"{statistics.median(wall):8,.0f} together, x torchvision v2 per core {statistics.median(against):.1f} "
            f"({min(against):.1f} to {max(against):.1f})"
        )
    for name, reason in missing.items():
        say(f"  left out: {name}: {reason}")


def calibrated(run: MakeViews, batch: int) -> int:
    """Returns how many images fill a round, in whole batches."""
    run(batch)
    since = time.perf_counter()
    run(2 * batch)
    return batch * max(2, round(2 * SECONDS / (time.perf_counter() - since)))


def test_waiting(say: Callable[[str], None]) -> None:
    """Measures how long a step that keeps all cores busy waits for its batch of 256 with the default loader."""
    images = random_images(32)
    a = torch.randn(1024, 1024, device=DEVICE)
    for backend in ("auto", "resident"):
        settings: dict[str, Any] = dict(views=3, side=32, batch_size=256, seed=0, dtype=DTYPE, threads=2)
        loader, waiting = make_loader(images, VIEW, backend=backend, device=DEVICE, **settings), Waiting()
        for _ in waiting.timed(loader, 0, STEPS):
            until = time.perf_counter() + STEP_SECONDS
            while time.perf_counter() < until:
                _ = a @ a
        say(f"waiting: loader {loader.name}, steps of {STEP_SECONDS} s on all cores: {waiting.summary()}")


def resident_bytes() -> int:
    """Returns this process's resident memory."""
    with open("/proc/self/statm") as statistics_file:
        return int(statistics_file.read().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux lists it")
def test_memory_over_many_batches(say: Callable[[str], None]) -> None:
    images = random_images(32)
    for backend in ("dali", "resident"):
        settings: dict[str, Any] = dict(views=3, side=32, batch_size=SMALL, seed=0, dtype=DTYPE, threads=2)
        with suppress(ImportError):
            loader = make_loader(images, VIEW, backend=backend, device=DEVICE, **settings)
            sizes = list(memory_sizes(loader.batches(0, BATCHES)))
            before, after = sizes[SETTLED - 1], max(sizes[-SETTLED:])
            say(
                f"memory: {backend}, {BATCHES} batches of {SMALL}: {before / 2**20:.1f} MiB after {SETTLED}, "
                f"{after / 2**20:.1f} at most in the last {SETTLED}: {after / before - 1:+.2%}"
            )


def memory_sizes(batches: Iterator[object]) -> Iterator[int]:
    for _ in batches:
        yield resident_bytes()
