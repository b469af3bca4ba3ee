from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, ViewConfig
from mnclglf.data import loaders as loader_module
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray, ImageFiles, ImageSet
from mnclglf.data.loader import Batch, Loader, batch_indices
from mnclglf.data.loaders import make_loader
from mnclglf.data.loaders.reference import render_view
from mnclglf.data.loaders.resident import ResidentLoader
from mnclglf.data.views import draw_parameters
from mnclglf.methods import Losses, SimCLR
from mnclglf.recipes import VIEWS
from mnclglf.training.step import TrainStep

try:
    import nvidia.dali  # noqa: F401

    BACKENDS = ["reference", "resident", "dali"]
except ImportError:
    BACKENDS = ["reference", "resident"]
needs_dali = pytest.mark.skipif("dali" not in BACKENDS, reason="the extra dali-cuda13 is not installed")
IMAGES, BATCH, SIDE = 23, 4, 12  # 5 steps per epoch and 3 images left over


@pytest.fixture
def images(photos: Callable[..., np.ndarray]) -> ImageArray:
    made = photos(IMAGES, 14)
    return ImageArray(name="photos", split="train", images=made, labels=np.zeros(IMAGES, np.int64), classes=("any",))


def loader_of(images: ImageSet, backend: str, **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "view": ViewConfig(rotation_degrees=10),
        "views": 3,
        "side": SIDE,
        "batch_size": BATCH,
        "seed": 5,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "backend": backend,
        "threads": 2,
    }
    return make_loader(images, **(arguments | changes))


def assert_same(one: Batch, two: Batch) -> None:
    assert torch.equal(one.indices, two.indices)
    for first, second in zip(one.each(), two.each(), strict=True):
        assert torch.equal(first, second)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 200), share=st.floats(0.01, 1), epoch=st.integers(0, 50))
def test_an_epoch_has_each_image_at_most_once(seed: int, count: int, share: float, epoch: int) -> None:
    size = max(1, int(count * share))
    steps = count // size
    rows = [batch_indices(seed, step, count, size) for step in range(epoch * steps, (epoch + 1) * steps)]
    assert all(len(part) == size for part in rows)
    seen = np.concatenate(rows)
    assert len(set(seen.tolist())) == steps * size
    assert seen.min() >= 0
    assert seen.max() < count


def test_epochs_and_seeds_have_other_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([batch_indices(seed, epoch * 10 + step, 100, 10) for step in range(10)]).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(100)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    # pinned: a run that a later version resumes must go on in the same order
    assert orders[0][:6] == [94, 92, 77, 97, 35, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_has_the_same_batch_wherever_the_run_starts(images: ImageArray, backend: str) -> None:
    whole = list(loader_of(images, backend).batches(0, 8))  # past the end of the first epoch, which has 5 steps
    assert len(whole) == 8
    loader = loader_of(images, backend)
    for start in (3, 5, 7):
        resumed = list(loader.batches(start, 8))
        assert len(resumed) == 8 - start
        for one, two in zip(resumed, whole[start:], strict=True):
            assert_same(one, two)
    assert not torch.equal(whole[0].views[0], whole[5].views[0])
    assert list(loader.batches(4, 4)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_normalized_by_the_statistics_that_are_given(images: ImageArray, backend: str) -> None:
    own = loader_of(images, backend)
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 0.4, 0.3], np.float32)
    given = loader_of(images, backend, statistics=(mean, std))
    rows = np.array([2, 0])
    for one, two in zip(own.render(rows, 0), given.render(rows, 0), strict=True):
        pixels = one.double().permute(0, 2, 3, 1).numpy() * own.std + own.mean
        # a few fp32 roundings of values up to 1 / 0.3
        np.testing.assert_allclose(two.permute(0, 2, 3, 1), (pixels - mean) / std, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_hold_the_views_of_their_images(images: ImageArray, backend: str) -> None:
    loader = loader_of(images, backend)
    assert loader.steps_per_epoch == IMAGES // BATCH
    seen: list[int] = []
    for step, batch in enumerate(loader.batches(0, loader.steps_per_epoch + 1)):
        rows = batch.indices.numpy()
        np.testing.assert_array_equal(rows, batch_indices(5, step, IMAGES, BATCH))
        rendered = loader.render(rows, step // loader.steps_per_epoch)
        for view, expected in zip(batch.each(), rendered, strict=True):
            assert torch.equal(view, expected)
        alone = loader.render(rows[2:3], step // loader.steps_per_epoch)
        for view, expected in zip(batch.each(), alone, strict=True):
            assert torch.equal(view[2:3], expected)
        seen += rows.tolist()
    assert len(set(seen[: loader.steps_per_epoch * BATCH])) == loader.steps_per_epoch * BATCH


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_epoch_seed_and_view_of_an_image_is_another(images: ImageArray, backend: str) -> None:
    rows = np.arange(IMAGES)
    loader = loader_of(images, backend)
    views = [*loader.render(rows, 0), *loader.render(rows, 1), *loader_of(images, backend, seed=6).render(rows, 0)]
    for number, one in enumerate(views):
        for other in views[:number]:
            assert (one - other).abs().mean(dim=(1, 2, 3)).min() > 0.01  # of every image


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_what_the_model_eats(images: ImageArray, backend: str, dtype: torch.dtype) -> None:
    (batch,) = loader_of(images, backend, dtype=dtype).batches(0, 1)
    assert batch.indices.dtype == torch.int64
    assert batch.indices.shape == (BATCH,)
    assert len(batch.each()) == 3
    for view in batch.each():
        assert view.shape == (BATCH, 3, SIDE, SIDE)
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
    (exact,) = loader_of(images, backend).batches(0, 1)
    for view, truth in zip(batch.each(), exact.each(), strict=True):
        torch.testing.assert_close(view.float(), truth, rtol=2**-8, atol=0)  # bfloat16 keeps 8 bits
    assert not torch.equal(exact.views[0], exact.views[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_normalized_with_the_images_statistics(images: ImageArray, backend: str) -> None:
    plain = ViewConfig(
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        flip_probability=0,
        jitter_probability=0,
        gray_probability=0,
        blur_probability=0,
    )
    loader = loader_of(images, backend, view=plain, side=14, views=1)
    (whole,) = loader.render(np.arange(IMAGES), 0)
    torch.testing.assert_close(whole.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_loaders_agree(images: ImageArray, backend: str) -> None:
    ours, truth = (list(loader_of(images, name).batches(2, 7)) for name in (backend, "reference"))
    for one, two in zip(ours, truth, strict=True):
        assert torch.equal(one.indices, two.indices)
        for first, second in zip(one.each(), two.each(), strict=True):
            # 0.25 levels (see test_parity) of about 1 / 60 deviation each
            assert (first - second).abs().mean() < 0.005


@needs_dali
def test_threads_do_not_change_the_batches(images: ImageArray) -> None:
    one, three = (list(loader_of(images, "dali", threads=threads).batches(0, 6)) for threads in (1, 3))
    for first, second in zip(one, three, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_outlives_the_batches_after_it(images: ImageArray, backend: str) -> None:
    """Checks that DALI's memory, which is not copied, is not written again while a tensor uses it."""
    loader = loader_of(images, backend)
    copies = [tuple(view.clone() for view in batch.each()) for batch in loader.batches(0, 9)]
    kept = list(loader.batches(0, 9))
    for batch, copy in zip(kept, copies, strict=True):
        for view, expected in zip(batch.each(), copy, strict=True):
            assert torch.equal(view, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch_is_written_where_it_is_asked_for(images: ImageArray, backend: str, dtype: torch.dtype) -> None:
    loader = loader_of(images, backend, dtype=dtype)
    expected = list(loader.batches(0, 7))
    loader.into = torch.zeros_like(expected[0].views)
    for batch, truth in zip(loader.batches(0, 7), expected, strict=True):
        assert batch.views.data_ptr() == loader.into.data_ptr()
        assert_same(batch, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_through_one_loader_do_not_mix(images: ImageArray, backend: str) -> None:
    loader = loader_of(images, backend)
    expected = list(loader.batches(0, 4))
    for one, two, truth in zip(loader.batches(0, 4), loader.batches(0, 4), expected, strict=True):
        assert_same(one, truth)
        assert_same(two, truth)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@needs_dali
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_a_run_that_is_left_early_leaves_no_thread(images: ImageArray) -> None:
    loader = loader_of(images, "dali", threads=4)
    list(loader.batches(0, 2))  # what stays for the process's life is there now
    before = threads()
    runs = [loader.batches(0, 1000) for _ in range(3)]
    for run in runs:
        next(run)
    assert threads() >= before + 12  # otherwise the count below would show nothing
    for run in runs:
        assert isinstance(run, Generator)
        run.close()
    stop = time.monotonic() + 5
    while threads() > before and time.monotonic() < stop:
        time.sleep(0.01)
    assert threads() <= before


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_images_are_an_error_before_the_run(images: ImageArray, backend: str) -> None:
    with pytest.raises(ValueError, match=r"23 training images.*24") as raised:
        loader_of(images, backend, batch_size=24)
    assert "--batch-size" in str(raised.value)
    assert loader_of(images, backend, batch_size=23).steps_per_epoch == 1


@needs_dali
def test_auto_takes_what_is_faster_on_a_cpu(
    images: ImageArray, files: ImageFiles, caplog: pytest.LogCaptureFixture
) -> None:
    assert loader_of(images, "auto").name == "resident"
    assert loader_of(images, "auto", side=34).name == "dali"
    assert loader_of(files, "auto").name == "dali"
    assert loader_of(images, "reference").name == "reference"
    assert not caplog.records


def test_without_dali_auto_says_so_and_dali_is_an_error(
    images: ImageArray, files: ImageFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # importing it fails
    with caplog.at_level(logging.WARNING):
        assert loader_of(images, "auto", side=34).name == "resident"
        assert loader_of(files, "auto").name == "reference"
    assert caplog.text.count('pip install "mnclglf[dali-cuda13]"') == 2
    with pytest.raises(ImportError, match=r'pip install "mnclglf\[dali-cuda13\]"'):
        loader_of(images, "dali")


def test_what_is_optional_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, mnclglf.data.loaders, mnclglf.data.datasets\n"
        "print([name for name in ('nvidia.dali', 'mlxtend', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# parts of a batch, files, and the choice of a loader


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_batches_of_one(images: ImageArray, backend: str, ranks: int) -> None:
    whole = list(loader_of(images, backend).batches(3, 7))
    parts = [list(loader_of(images, backend, rank=rank, ranks=ranks).batches(3, 7)) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].indices for part in parts]), batch.indices)
        for view, *shares in zip(batch.each(), *(part[step].each() for part in parts), strict=True):
            assert torch.equal(torch.cat(shares), view)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_reads_the_views_where_the_loader_wrote_them(images: ImageArray, backend: str) -> None:
    method = SimCLR(ModelConfig(width=4, projector_width=8), ObjectiveConfig()).train()
    step, seen = TrainStep(method, OptimConfig(), EngineConfig(), torch.float32), []
    forward = step.forward

    def watched(views: torch.Tensor, labels: torch.Tensor | None = None) -> Losses:
        seen.append(views.data_ptr())
        return forward(views, labels)

    step.forward = watched
    (batch,) = loader_of(images, backend, views=2).batches(0, 1)
    step(0, batch, lr=0.1, momentum=0.9)
    assert seen == [batch.views.data_ptr()]
    assert [view.data_ptr() for view in batch.each()] == [seen[0], seen[0] + batch.views.nbytes // 2]


def test_a_batch_that_cannot_be_shared_out_is_refused(images: ImageArray) -> None:
    with pytest.raises(ValueError, match="rank 0 of 3 has no whole share of a batch of 4"):
        loader_of(images, "reference", rank=0, ranks=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader_of(images, "reference", rank=2, ranks=2)


@pytest.fixture
def files(photos: Callable[..., np.ndarray], tmp_path: Path) -> ImageFiles:
    """Writes PNG files of many sizes, none of them square."""
    sizes = [(14 + row % 5, 12 + 2 * (row % 7) + 5 * (row % 2)) for row in range(IMAGES)]
    pixels = [image[:height, :width] for image, (height, width) in zip(photos(IMAGES, 40), sizes, strict=True)]
    for row, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{row:02} é.png")
    moments = np.array([[(image / 255).mean((0, 1)), ((image / 255) ** 2).mean((0, 1))] for image in pixels])
    return ImageFiles(
        name="folder:photos",
        split="train",
        labels=np.full(IMAGES, -1),
        classes=(),
        root=tmp_path,
        paths=tuple(f"{row:02} é.png" for row in range(IMAGES)),
        heights=np.array([height for height, _ in sizes], np.int32),
        widths=np.array([width for _, width in sizes], np.int32),
        file_sizes=np.array([(tmp_path / f"{row:02} é.png").stat().st_size for row in range(IMAGES)]),
        moments=moments,
    )


def test_files_give_the_views_of_their_pixels(files: ImageFiles) -> None:
    """Checks the reference's view of a file against torchvision's of the same array."""
    loader = loader_of(files, "reference")
    rows = np.array([5, 0, 22])
    for number, row in enumerate(rows):
        pixels = files.pixels(row)
        assert pixels.shape == (files.heights[row], files.widths[row], 3)
        for view in range(3):
            drawn = draw_parameters(5, 2, [row], view, ViewConfig(rotation_degrees=10), *pixels.shape[:2])
            config = ViewConfig(rotation_degrees=10)
            expected = render_view(pixels, drawn, 0, side=SIDE, config=config, mean=loader.mean, std=loader.std)
            assert torch.equal(loader.render(rows, 2)[view][number], expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize("change", ["pipe", "gone", "longer", "same length"])
def test_a_file_that_changed_is_named(files: ImageFiles, backend: str, change: str) -> None:
    """Replaces a file after it was examined. DALI would wait for a pipe; the alarm ends a test that waits."""
    loader = loader_of(files, backend)
    path = files.root / files.paths[7]
    told = {"pipe": "no file but a pipe", "gone": "No such file", "longer": "bytes, and had"}.get(
        change, "pixels, and was"
    )
    if change in ("pipe", "gone"):
        path.unlink()
    if change == "pipe":
        os.mkfifo(path)
    if change == "longer":
        Image.new("RGB", (90, 90)).save(path, compress_level=0)
    if change == "same length":
        data = io.BytesIO()
        Image.new("RGB", (9, 9)).save(data, "PNG")
        path.write_bytes(data.getvalue().ljust(int(files.file_sizes[7]), b"\0"))
    signal.alarm(60)
    with pytest.raises(DataError, match=rf"07 é\.png.*{told}"):
        list(loader.batches(0, loader.steps_per_epoch))
    signal.alarm(0)


@needs_dali
def test_dali_takes_few_threads_per_core(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks this, as DALI aborts the process where the system refuses a thread."""
    from mnclglf.data.loaders import dali

    given: list[int] = []

    def made(*_: object, threads: int, **__: object) -> None:
        given.append(threads)
        raise InterruptedError

    monkeypatch.setattr(dali, "view_pipeline", made)
    for threads in (3, 1000):
        with pytest.raises(InterruptedError):
            next(iter(loader_of(files, "dali", threads=threads).batches(0, 1)))
    assert given == [3, 4 * (os.cpu_count() or 1)]


@needs_dali
def test_dali_reads_files_as_the_reference_does(files: ImageFiles) -> None:
    ours, truth = (list(loader_of(files, name).batches(2, 7)) for name in ("dali", "reference"))
    for one, two in zip(ours, truth, strict=True):
        assert torch.equal(one.indices, two.indices)
        for first, second in zip(one.each(), two.each(), strict=True):
            assert (first - second).abs().mean() < 0.01  # as in test_parity; enlarged three times, some more


@needs_dali
def test_a_file_that_breaks_while_a_run_reads_is_named(files: ImageFiles) -> None:
    loader = loader_of(files, "dali")
    batches = loader.batches(0, 50)
    next(batches)
    broken = files.root / files.paths[7]
    broken.write_bytes(broken.read_bytes()[:60].ljust(broken.stat().st_size, b"\0"))  # of the same size
    with pytest.raises(DataError, match=r"07 é\.png cannot be read as an image"):
        for _ in batches:
            pass
    broken.unlink()
    with pytest.raises(DataError, match=r"07 é\.png cannot be read as an image"):
        loader.render(np.arange(IMAGES), 0)


@needs_dali
def test_a_file_that_is_replaced_while_a_run_reads_is_named(files: ImageFiles) -> None:
    replaced = files.root / files.paths[7]
    size = replaced.stat().st_size
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(replaced)
    replaced.write_bytes(replaced.read_bytes().ljust(size, b"\0"))
    with pytest.raises(DataError, match=r"07 é\.png.*9 x 9.*16 x 17"):
        loader_of(files, "dali").render(np.array([7]), 0)


def save_kinds(folder: Path, image: np.ndarray) -> list[str]:
    """Saves the same picture in every kind of file and returns the names."""
    picture, gray = Image.fromarray(image), Image.fromarray(image[..., 0])
    turned = Image.Exif()
    turned[0x0112] = 6
    save = {
        "rgb.jpg": lambda path: picture.save(path, quality=90),
        "half.jpg": lambda path: picture.save(path, quality=75, subsampling=2),
        "progressive.jpg": lambda path: picture.save(path, progressive=True),
        "gray.jpg": gray.save,
        "cmyk.jpg": picture.convert("CMYK").save,
        "turned.jpg": lambda path: picture.save(path, exif=turned),
        "turned.png": lambda path: picture.save(path, exif=turned),
        "turned.webp": lambda path: picture.save(path, exif=turned),
        "xmp.jpg": lambda path: picture.save(path, xmp=b'<x tiff:Orientation="6"/>'),
        "rgb.png": picture.save,
        "gray.png": gray.save,
        "gray alpha.png": gray.convert("LA").save,
        "alpha.png": picture.convert("RGBA").save,
        "palette.png": picture.convert("P").save,
        "bit.png": gray.convert("1").save,
        "16 bits.png": Image.fromarray(image[..., 0].astype(np.uint16) * 257).save,
        "lossy.webp": picture.save,
        "lossless.webp": lambda path: picture.save(path, lossless=True),
        "alpha.webp": lambda path: picture.convert("RGBA").save(path, lossless=True),
        "rgb.bmp": picture.save,
        "rgb.tif": picture.save,
        "turned.tif": lambda path: picture.save(path, tiffinfo={0x0112: 6}),
        "turned and packed.tiff": lambda path: picture.save(path, compression="tiff_lzw", tiffinfo={0x0112: 6}),
        "16 bits.tif": Image.fromarray(image[..., 0].astype(np.uint16) * 257).save,
        "cmyk.tif": picture.convert("CMYK").save,
        "alpha.tif": picture.convert("RGBA").save,
        "pages.tif": lambda path: picture.copy().save(path, save_all=True, append_images=[gray.copy()]),
        "moving.gif": lambda path: picture.copy().save(path, save_all=True, append_images=[gray.convert("RGB")]),
        "gray.gif": gray.save,
    }
    for name, write in save.items():
        write(folder / name)
    return sorted(save)


@needs_dali
def test_dali_decodes_every_kind_as_the_reference_does(
    photos: Callable[..., np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "kinds").mkdir()
    names = save_kinds(tmp_path / "kinds", np.ascontiguousarray(photos(1, 41)[0, :, :27]))
    kinds, _ = load_dataset(f"folder:{tmp_path / 'kinds'}")
    assert isinstance(kinds, ImageFiles)
    assert list(kinds.paths) == names
    whole = replace(VIEWS["eval"], crop_ratio=(0.1, 10))
    ours, truth = (
        loader_of(kinds, name, view=whole, side=28, batch_size=len(names)).render(np.arange(len(names)), 0)[0]
        for name in ("dali", "reference")
    )
    for name, one, two in zip(names, ours, truth, strict=True):
        assert (one - two).abs().mean() < 0.02, name  # a level of the resize is 1 / 60 deviation
    assert len(names) == 29


@needs_dali
def test_a_file_that_dali_cannot_read_ends_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks lossless WebP with EXIF, which Pillow reads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "odd").mkdir()
    exif = Image.Exif()
    exif[0x010F] = "maker"
    for number in range(4):
        picture = Image.fromarray(np.full((20, 20, 3), number, np.uint8))
        picture.save(tmp_path / "odd" / f"{number}.webp", lossless=True, exif=exif)
    odd, _ = load_dataset(f"folder:{tmp_path / 'odd'}")
    with pytest.raises(DataError, match=r"0\.webp, .*3\.webp.*--loader reference"):
        loader_of(odd, "dali").render(np.arange(4), 0)
    assert loader_of(odd, "reference").render(np.arange(4), 0)[0].shape == (4, 3, SIDE, SIDE)


def test_a_loader_that_cannot_run_leaves_it_to_the_other(
    images: ImageArray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaders = {name: loader_of(images, "reference") for name in ("dali", "resident")}

    def rate(loader: Loader, device: torch.device) -> float:
        if loader is loaders["dali"]:
            raise RuntimeError("CUDA driver version is insufficient\nmore")
        return 5.0

    monkeypatch.setattr(loader_module, "batches_per_second", rate)
    assert loader_module.fastest(loaders, torch.device("cpu")) is loaders["resident"]
    assert "loader dali cannot run here: RuntimeError: CUDA driver version is insufficient" in caplog.text
    del loaders["resident"]
    with pytest.raises(RuntimeError, match="none of the loaders dali can run"):
        loader_module.fastest(loaders, torch.device("cpu"))


def test_what_resident_cannot_hold_goes_to_dali_and_is_said(
    files: ImageFiles, images: ImageArray, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nvidia.dali", reason="the extra dali-cuda13 is not installed")
    assert loader_of(files, "resident").name == "dali"
    assert "folder:photos: images of any size are read when they are needed; taking dali" in caplog.text
    caplog.clear()
    assert loader_of(images, "resident", side=66).name == "dali"
    assert "sides of 66 are above 64" in caplog.text


def test_the_fastest_loader_is_taken_and_the_rates_are_said(
    images: ImageArray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaders = {name: loader_of(images, "reference") for name in ("dali", "resident")}
    rates = {id(loaders["dali"]): 90.0, id(loaders["resident"]): 2500.0}
    monkeypatch.setattr(loader_module, "batches_per_second", lambda loader, _: rates[id(loader)])
    with caplog.at_level(logging.WARNING):
        assert loader_module.fastest(loaders, torch.device("cpu")) is loaders["resident"]
    assert "loader resident: batches per second: dali 90, resident 2,500" in caplog.text
    monkeypatch.undo()
    assert 0 < loader_module.batches_per_second(loaders["dali"], torch.device("cpu")) < 1e6


def test_resident_holds_images_that_cannot_be_written_to(images: ImageArray) -> None:
    expected = list(loader_of(images, "resident").batches(0, 3))
    images.images.flags.writeable = False  # as an array mapped from a file
    for one, two in zip(loader_of(images, "resident").batches(0, 3), expected, strict=True):
        assert_same(one, two)


def test_resident_draws_no_further_than_the_run(images: ImageArray) -> None:
    loader = loader_of(images, "resident")
    assert isinstance(loader, ResidentLoader)
    drawn: list[int] = []
    numbers = loader._numbers
    loader._numbers = lambda step: (drawn.append(step), numbers(step))[1]
    assert len(list(loader.batches(3, 6))) == 3
    assert drawn == [3, 4, 5]
