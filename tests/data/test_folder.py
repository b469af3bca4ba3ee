"""folder:PATH: what counts as an image, how it is labeled, what is found out about it, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mnclglf.data.datasets import load_dataset
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageFiles, ImageSet
from mnclglf.data.sources import cache_dir, folder
from mnclglf.data.sources.folder import check_picture
from mnclglf.reports.sources import inspect_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(height: int = 12, width: int = 15, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, image: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed=hash(path.name) % 1000) if image is None else image).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Makes cats with 2 images, one of them deeper, dogs with 3, and files that are no images."""
    made = tmp_path / "photos"
    for name in ("dogs/b.png", "dogs/a.JPG", "dogs/c.webp", "cats/x.jpeg", "cats/2019/y.Png"):
        write(made / name)
    (made / "dogs" / "notes.txt").write_text("not an image")
    (made / "dogs" / ".hidden.png").write_text("nor this")
    (made / ".git").mkdir()
    (made / "readme.md").write_text("about")
    return made


def load(root: Path, *, skip_corrupt: bool = False) -> tuple[ImageFiles, ImageSet | None]:
    train, test = load_dataset(f"folder:{root}", skip_corrupt=skip_corrupt)
    assert isinstance(train, ImageFiles)
    return train, test


def test_subfolders_are_classes(root: Path) -> None:
    train, test = load(root)
    assert test is None
    assert train.classes == ("cats", "dogs")
    assert train.paths == ("cats/2019/y.Png", "cats/x.jpeg", "dogs/a.JPG", "dogs/b.png", "dogs/c.webp")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert (train.name, train.split, train.labeled, len(train)) == (f"folder:{root}", "train", True, 5)
    np.testing.assert_array_equal(train.pixels(3), read_image(root / "dogs/b.png"))
    assert train.names(np.array([4, 0])) == ["dogs/c.webp", "cats/2019/y.Png"]


def test_without_subfolders_there_are_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        write(tmp_path / "flat" / name)
    train, test = load(tmp_path / "flat")
    assert (train.paths, train.labels.tolist(), train.classes, train.labeled) == (
        ("a.png", "b.png"),
        [-1, -1],
        (),
        False,
    )
    assert test is None


def test_train_and_val_are_a_split(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("cats", "dogs"):
            for number in range(count):
                write(tmp_path / "split" / part / name / f"{number}.png")
    train, test = load(tmp_path / "split")
    assert test is not None
    assert (len(train), len(test), train.split, test.split) == (6, 4, "train", "test")
    assert train.classes == test.classes == ("cats", "dogs")
    assert "evaluating on val" in caplog.text
    write(tmp_path / "split/val/birds/0.png")
    with pytest.raises(DataError, match=r"train and val have other classes, birds; give both"):
        load(tmp_path / "split")


def test_sizes_and_statistics_are_those_of_the_pixels(tmp_path: Path) -> None:
    made = [pixels(8, 40, 1), pixels(31, 9, 2), np.full((10, 10, 3), 7, np.uint8)]
    for number, image in enumerate(made):
        write(tmp_path / "flat" / f"{number}.png", image)
    train, _ = load(tmp_path / "flat")
    assert [x.tolist() for x in train.sizes(np.arange(3))] == [[8, 31, 10], [40, 9, 10]]
    mean, std = train.statistics()  # every image counts alike, whatever its size
    means = np.stack([(image / 255).mean((0, 1)) for image in made])
    squares = np.stack([((image / 255) ** 2).mean((0, 1)) for image in made])
    np.testing.assert_allclose(mean, means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(squares.mean(0) - means.mean(0) ** 2), rtol=1e-5)
    part = train.subset([2, 2])
    assert (part.paths, part.heights.tolist()) == (("2.png", "2.png"), [10, 10])
    np.testing.assert_allclose(part.statistics()[0], [7 / 255] * 3, rtol=1e-5)
    assert part.published_rows(np.array([0])).tolist() == [2]
    assert len({train.fingerprint(), part.fingerprint(), train.subset([0, 1, 2]).fingerprint()}) == 2


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    read = folder.read_file

    def counted(path: Path) -> bytes:
        reads.append(path.name)
        return read(path)

    monkeypatch.setattr(folder, "read_file", counted)
    return reads


def test_a_file_is_looked_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    before, _ = load(root)
    assert len(reads) == 5
    reads.clear()
    again, _ = load(root)
    assert reads == []
    assert again.fingerprint() == before.fingerprint()
    write(root / "dogs/b.png", pixels(20, 20))
    write(root / "dogs/new.png", pixels(9, 9))
    changed, _ = load(root)
    assert sorted(reads) == ["b.png", "new.png"]
    assert changed.heights[changed.paths.index("dogs/b.png")] == 20
    assert changed.fingerprint() != before.fingerprint()
    reads.clear()
    (root / "dogs/new.png").unlink()
    assert len(load(root)[0]) == 5
    assert reads == []


def turned(path: Path) -> None:
    with Image.open(path) as image:
        image.rotate(180).save(path, compress_level=0)


def other_pixels(path: Path) -> None:
    Image.fromarray(pixels(seed=99)).save(path, compress_level=0)


def replaced(path: Path) -> None:
    """Puts another file in the place, with another inode."""
    other_pixels(path.with_name("new.png"))
    path.with_name("new.png").replace(path)


def exchanged(path: Path) -> None:
    other = path.with_name("a.png")
    path.rename(path.with_name("kept"))
    other.rename(path)
    path.with_name("kept").rename(other)


@pytest.mark.parametrize("change", [turned, other_pixels, replaced, exchanged])
def test_other_contents_of_the_same_size_and_time_are_other_images(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    paths = [tmp_path / "flat" / name for name in ("a.png", "b.png")]
    for number, path in enumerate(paths):
        write(path)
        Image.fromarray(pixels(seed=number)).save(path, compress_level=0)
        os.utime(path, ns=(10**18, 10**18))
    before, _ = load(tmp_path / "flat")
    shutil.copytree(tmp_path / "flat", tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere")[0].fingerprint() == before.fingerprint()
    sizes = [path.stat().st_size for path in paths]
    change(paths[1])
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))
    assert [path.stat().st_size for path in paths] == sizes
    after, _ = load(tmp_path / "flat")
    assert after.fingerprint() != before.fingerprint()
    assert not after.matches(before.fingerprint())
    assert before.matches(before.fingerprint())


def test_a_former_fingerprint_is_compared_in_its_form_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, _ = load(root)
    names = "\0".join(train.paths).encode()  # the formula of the first version
    former = hashlib.sha256(names + train.labels.tobytes() + train.file_sizes.tobytes()).hexdigest()
    assert train.matches(former)
    assert "earlier version" in caplog.text
    assert "pixels" in caplog.text
    write(root / "dogs/b.png", pixels(20, 20))
    assert not load(root)[0].matches(former)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", None], ids=["empty", "no zip", "cut"])
def test_a_damaged_index_is_made_anew(root: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = load(root)
    (index,) = cache_dir("folder").iterdir()
    index.write_bytes(index.read_bytes()[:-200] if damage is None else damage)
    reads = count_reads(monkeypatch)
    again, _ = load(root)
    assert len(reads) == 5
    assert again.fingerprint() == before.fingerprint()


def test_an_index_that_cannot_be_kept_is_said_and_no_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, write: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_atomically", full)
    assert len(load(root)[0]) == 5
    assert "No space left on device" in caplog.text


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"<html>404</html>"}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "text"])
@pytest.mark.parametrize("name", ["dogs/a.JPG", "dogs/b.png", "dogs/c.webp"])
def test_a_corrupt_image_among_good_ones_is_named_or_left_out(
    root: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(root / name, how)
    for _ in range(2):  # the second time from the index
        with pytest.raises(DataError, match=f"1 of 5 .*{name}") as raised:
            load(root)
        assert "--skip-corrupt" in str(raised.value)
    train, _ = load(root, skip_corrupt=True)
    assert len(train) == 4
    assert name not in train.paths
    assert train.classes == ("cats", "dogs")
    assert "1 of 5 image files" in caplog.text
    write(root / name, pixels())
    assert len(load(root)[0]) == 5


def test_many_corrupt_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    for number in range(9):
        spoil(write(tmp_path / "flat" / f"{number}.png"), "cut")
    with pytest.raises(DataError, match=r"9 of 9 .*: 0\.png .*1\.png .*2\.png .*3\.png .*4\.png .*; \.\.\.") as raised:
        load(tmp_path / "flat")
    assert "5.png" not in str(raised.value)
    with pytest.raises(DataError, match="none is left to train on"):
        load(tmp_path / "flat", skip_corrupt=True)


def test_what_is_no_folder_of_images_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.*folder:PATH"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty.*\.jpg, \.jpeg, \.png, \.webp"):
        load(tmp_path / "empty")
    (root / "birds").mkdir()
    with pytest.raises(DataError, match=r"birds holds no image .*; fill it or remove it"):
        load(root)
    (root / "birds").rmdir()
    write(root / "loose.png")
    with pytest.raises(DataError, match=r"holds loose.png beside the folder cats"):
        load(root)


@pytest.mark.filterwarnings("ignore")
def test_tiny_and_enormous_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "flat/a.png", pixels(7, 30))
    with pytest.raises(DataError, match=r"a\.png is 7 x 30 pixels, smaller than 8"):
        load(tmp_path / "flat")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write(tmp_path / "flat/a.png", pixels(30, 31))
    with pytest.raises(DataError, match=r"a\.png .*930 pixels"):
        load(tmp_path / "flat")
    write(tmp_path / "flat/a.png", pixels(11, 10))  # between the limit and twice the limit, Pillow only warns
    with pytest.raises(DataError, match=r"a\.png .*110 pixels"):
        load(tmp_path / "flat")


def test_an_image_takes_no_memory_that_it_only_promises(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.png").read_bytes())
    data[data.index(b"IDAT") - 4] = 0x40  # of the chunk's length: 1 GB more
    (tmp_path / "a.png").write_bytes(data)
    tracemalloc.start()
    with suppress(DataError):
        read_image(tmp_path / "a.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def test_links_are_followed_and_circles_end(root: Path) -> None:
    (root / "dogs" / "again").symlink_to(root / "dogs")
    (root / "dogs" / "up").symlink_to(root)
    (root / "dogs" / "cats").symlink_to(root / "cats")  # another class's stay that class's
    (root / "cats" / "linked.png").symlink_to(root / "dogs" / "b.png")
    train, _ = load(root)
    assert train.paths == (
        "cats/2019/y.Png", "cats/linked.png", "cats/x.jpeg", "dogs/a.JPG", "dogs/b.png", "dogs/c.webp",
    )  # fmt: skip
    (root / "cats" / "broken.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"cats/broken\.png.*FileNotFoundError"):
        load(root)


def test_train_alone_is_the_folder_of_the_classes(root: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    root.rename(tmp_path / "whole" / "train")
    train, test = load(tmp_path / "whole")
    assert (train.classes, len(train), test) == (("cats", "dogs"), 5, None)


def test_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write(tmp_path / "flat" / "a.png").rename(tmp_path / "flat" / name)
    train, _ = load(tmp_path / "flat")
    assert train.paths == (name,)
    assert train.fingerprint() == load(tmp_path / "flat")[0].fingerprint()


def test_what_could_not_be_read_once_is_looked_at_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = folder.read_file

    def fails(path: Path) -> bytes:
        if path.name == "b.png":
            raise DataError(f"{path} cannot be read as an image (OSError: too many open files)")
        return read(path)

    monkeypatch.setattr(folder, "read_file", fails)
    assert len(load(root, skip_corrupt=True)[0]) == 4
    monkeypatch.setattr(folder, "read_file", read)
    assert len(load(root)[0]) == 5


def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.fromarray(pixels()).save(tmp_path / "flat" / "a.png", "GIF")
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        load(tmp_path / "flat")


def test_one_image_and_odd_names(tmp_path: Path) -> None:
    write(tmp_path / "flat" / "  naïve\n名.png")
    train, _ = load(tmp_path / "flat")
    assert (len(train), train.pixels(0).shape) == (1, (12, 15, 3))
    assert load(tmp_path / "flat")[0].paths == train.paths  # through the index


# kinds of images, each against a truth that was made otherwise


def png_of_16_bits(path: Path, levels: np.ndarray) -> Path:
    """Writes a PNG of 16-bit levels [H, W, 3], which Pillow cannot write."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


GRAY = np.arange(180, dtype=np.uint8).reshape(12, 15)


def test_gray_becomes_three_equal_channels(tmp_path: Path) -> None:
    expected = np.stack([GRAY] * 3, axis=2)
    Image.fromarray(GRAY).save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_image(tmp_path / "l.png"), expected)
    Image.fromarray(np.stack([GRAY, GRAY[::-1]], axis=2)).save(tmp_path / "la.png")  # with transparency
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), expected)
    Image.fromarray(GRAY.astype(np.uint16) * 257 + 100).save(tmp_path / "i16.png")  # 257 levels of 16 bits are one of 8
    np.testing.assert_array_equal(read_image(tmp_path / "i16.png"), expected)
    Image.fromarray(GRAY > 90).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bit.png"), np.where(expected > 90, 255, 0))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    image = pixels()
    alpha = np.dstack([image, GRAY])
    for name in ("rgba.png", "rgba.webp"):
        Image.fromarray(alpha).save(tmp_path / name, lossless=True, exact=True)
        np.testing.assert_array_equal(read_image(tmp_path / name), image)


def test_16_bits_a_channel(tmp_path: Path) -> None:
    image = pixels()
    path = png_of_16_bits(tmp_path / "rgb16.png", image.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), image)


def test_a_palette(tmp_path: Path) -> None:
    image = Image.fromarray(GRAY % 4)
    image.putpalette([10, 20, 30, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png")
    colors = np.array([[10, 20, 30], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), colors[GRAY % 4])


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0], ink[8:, :, 3] = 200, 128  # cyan above, half black below
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    found = read_image(tmp_path / "cmyk.jpg").astype(int)
    assert np.abs(found[2, 2] - [55, 255, 255]).max() <= 3  # red is 255 less the cyan; JPEG is not exact
    assert np.abs(found[13, 2] - [127, 127, 127]).max() <= 3


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # white to the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: to be shown a quarter clockwise
    Image.fromarray(image).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = read_image(tmp_path / "turned.jpg")
    assert found.shape == (32, 16, 3)
    assert found[2].mean() > 250 > 5 > found[-3].mean()  # white is up


def test_the_log_counts_what_takes_long(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder, "_MANY", 3)
    with caplog.at_level(logging.WARNING):
        load(root)
    assert "reading 5 image files" in caplog.text


def test_a_second_folder_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_dir \S*nowhere .*leave out --data-dir"):
        load_dataset(f"folder:{root}", tmp_path / "nowhere")


# layouts


def lay_out(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name)
    return root


@pytest.mark.parametrize(
    ("train", "tested"),
    [
        ("train", "valid"), ("Train", "Val"), ("TRAIN", "TEST"), ("training", "validation"),
        ("training_set", "test_set"),
        ("train", "dev"), ("train2017", "val2017"), ("trainset", "testset"), ("seg_train", "seg_test"),
        ("train-images", "test images"),
    ],
)  # fmt: skip
def test_every_usual_spelling_of_a_split_is_one(tmp_path: Path, train: str, tested: str) -> None:
    root = lay_out(tmp_path / "x", f"{train}/a/0.png", f"{train}/b/1.png", f"{tested}/a/2.png", f"{tested}/b/3.png")
    images, test = load(root)
    assert isinstance(test, ImageFiles)
    assert images.classes == test.classes == ("a", "b")
    assert (images.paths, test.paths) == (("a/0.png", "b/1.png"), ("a/2.png", "b/3.png"))


def test_valid_is_not_dropped_where_there_is_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, test = load(lay_out(tmp_path / "x", "train/a/0.png", "valid/a/1.png", "test/a/2.png"))
    assert isinstance(test, ImageFiles)
    assert test.paths == ("a/1.png",)
    assert "evaluating on valid" in caplog.text


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("plane/0.png", "train/1.png", "test/2.png"), r"plane beside test, train: .*folder named train"),
        (("train/a/0.png", "val/a/1.png", "loose.png"), r"loose\.png beside train, val"),
        (("train/a/0.png", "holdout/a/1.png"), r"holdout and train|train and holdout.*rename them to train and val"),
        (("train/a/0.png", "Training/a/1.png", "val/a/2.png"), r"Training, train.*rename one"),
        (("val/a/0.png", "test/a/1.png"), r"test, val and no train; rename"),
        (("test/a/0.png",), r"test and no train; rename"),
    ],
)
def test_what_may_be_a_split_is_refused_with_what_to_rename(tmp_path: Path, names: tuple[str, ...], named: str) -> None:
    with pytest.raises(DataError, match=named):
        load(lay_out(tmp_path / "x", *names))


def test_classes_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    assert load(lay_out(tmp_path / "x", "train/0.png", "plane/1.png"))[0].classes == ("plane", "train")
    assert load(lay_out(tmp_path / "y", "valid/0.png", "invalid/1.png"))[0].classes == ("invalid", "valid")
    train, test = load(lay_out(tmp_path / "z", "train/test/0.png", "train/plane/1.png", "train/train/2.png"))
    assert (train.classes, test) == (("plane", "test", "train"), None)


def test_one_folder_is_not_both_parts(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "x", "train/a/0.png")
    (root / "val").symlink_to(root / "train")
    with pytest.raises(DataError, match=r"val is the same folder as .*train; .*--validation-images"):
        load(root)


@pytest.mark.parametrize("empty", [False, True])
def test_a_class_without_test_images_is_said(tmp_path: Path, empty: bool, caplog: pytest.LogCaptureFixture) -> None:
    root = lay_out(tmp_path / "x", "train/a/0.png", "train/b/1.png", "train/c/2.png", "val/a/3.png", "val/c/4.png")
    if empty:
        (root / "val/b").mkdir()
    train, test = load(root)
    assert isinstance(test, ImageFiles)
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.labels.tolist() == [0, 2]
    assert "no image of b" in caplog.text
    (root / "train/d").mkdir()
    with pytest.raises(DataError, match=r"train/d holds no image.*fill it or remove it"):
        load(root)


def test_a_picture_may_not_become_an_image(tmp_path: Path) -> None:
    check_picture(tmp_path / "x/a-views.png", f"folder:{tmp_path / 'x'}")
    check_picture(tmp_path / "a.png", f"folder:{tmp_path / 'x'}")
    check_picture(tmp_path / "x/a.png", "digits")
    with pytest.raises(DataError, match=r"--out \S*a\.png lies in .*outside"):
        check_picture(tmp_path / "x/b/a.png", f"folder:{tmp_path / 'x'}")


@pytest.mark.parametrize("flat", [False, True])
def test_own_outputs_are_no_images(tmp_path: Path, flat: bool, caplog: pytest.LogCaptureFixture) -> None:
    names = ("0.png", "1.png") if flat else ("a/0.png", "b/1.png")
    root = lay_out(tmp_path / "x", *names)
    before, _ = load(root)
    for run in (root / "runs" / "one", root / "two", *(() if flat else (root / "a" / "three",))):
        write(run / "shown.png")
        (run / "config.json").write_text(json.dumps({"method": "byol", "dataset": "x", "recipe": "quick"}))
    inspect_source((before, None), root / "folder-x-images.png", Console(file=io.StringIO()))
    after, _ = load(root)
    assert (after.paths, after.classes) == (before.paths, before.classes)
    assert "folder-x-images.png" in caplog.text
    drawn = root / "x" / "y-images.png"
    drawn.parent.mkdir()
    inspect_source((before, None), drawn, Console(file=io.StringIO()))
    assert folder._is_picture(drawn)
    shutil.rmtree(drawn.parent)
    write(root / names[0].replace("0.png", "own-images.png"))  # of this name, but no picture of ours
    assert len(load(root)[0]) == 3


def test_formats_that_are_not_read_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = lay_out(tmp_path / "x", "a/0.png", "a/1.jpg", "a/2.webp", "b/3.bmp")
    Image.fromarray(pixels()).save(root / "b/4.jfif", "JPEG")
    for name in ("a/5.gif", "b/6.GIF", "b/7.tif", "b/8.txt"):
        (root / name).write_bytes(b"")
    assert load(root)[0].paths == ("a/0.png", "a/1.jpg", "a/2.webp", "b/3.bmp", "b/4.jfif")
    assert "2 .gif, 1 .tif" in caplog.text
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"only holds no image; .*1 \.tif"):
        load(only)


@pytest.mark.parametrize(("link", "to"), [("kitten", "cats"), ("Aaa", "cats"), ("round", "."), ("up", "..")])
def test_a_class_folder_that_is_a_link_is_blamed(root: Path, link: str, to: str) -> None:
    (root / link).symlink_to(root / to)
    with pytest.raises(DataError, match=rf"{link} is a link to .*; remove the link"):
        load(root)


def test_a_class_whose_images_are_another_s_says_so(root: Path) -> None:
    (root / "new").symlink_to(root / "cats" / "2019")
    (root / "cats" / "x.jpeg").unlink()
    with pytest.raises(DataError, match=r"cats holds no image .*class new.*; fill it or remove it"):
        load(root)


def test_folders_of_systems_are_no_classes(root: Path) -> None:
    for name in ("__MACOSX/cats/._x.png", "@eaDir/thumb.jpg", ".ipynb_checkpoints/a.png", "cats/@eaDir/x.png"):
        write(root / name)
    assert len(load(root)[0]) == 5
