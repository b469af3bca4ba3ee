"""folder:PATH: what counts as an image, how it is labeled, what is found out about it, and what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
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
from image_folder import load, pixels, write
from PIL import Image

from mnclglf.data import decoding
from mnclglf.data.datasets import load_dataset
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.sources import cache_dir, examination, folder
from mnclglf.data.stamp import Stamp


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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

    monkeypatch.setattr(examination, "write_atomically", full)
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


def test_an_image_that_cannot_be_read_now_is_not_left_out_as_corrupt(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, most: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(decoding, "read_bytes", failing)
    with pytest.raises(UnreachableError, match=r"cannot be read as an image \(Stale file handle\); check the disk"):
        load(root, skip_corrupt=True)


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
    with pytest.raises(DataError, match=r"empty.*\.jpg, .*\.png, \.webp, .*\.tiff"):
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
    Image.fromarray(pixels()).save(tmp_path / "flat" / "a.png", "TGA")
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
    monkeypatch.setattr(examination, "_MANY", 3)
    with caplog.at_level(logging.WARNING):
        load(root)
    assert "reading 5 image files" in caplog.text


def test_a_second_folder_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_dir \S*nowhere .*leave out --data-dir"):
        load_dataset(f"folder:{root}", tmp_path / "nowhere")


def test_a_class_of_corrupt_images_alone_is_not_left_out_in_silence(root: Path) -> None:
    for name in ("cats/x.jpeg", "cats/2019/y.Png"):
        spoil(root / name, "cut")
    with pytest.raises(DataError, match=r"cats.*repair them, or remove"):
        load(root, skip_corrupt=True)


def test_what_is_no_file_is_corrupt_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "dogs" / "pipe.png")
    with pytest.raises(DataError, match=r"dogs/pipe\.png cannot be read.*no file.*remove"):
        load(root)
    assert len(load(root, skip_corrupt=True)[0]) == 5


def test_an_empty_file_and_another_format_are_said_in_words(root: Path) -> None:
    (root / "dogs" / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"dogs/b\.png .*is empty"):
        load(root)
    (root / "dogs" / "b.png").write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=r"dogs/b\.png cannot be read as an image .*JPEG, PNG, WEBP, BMP, TIFF or GIF"
    ) as raised:
        load(root)
    assert "BytesIO" not in str(raised.value)


def test_the_stamp_knows_the_place_on_the_disk() -> None:
    status = os.stat_result((0o644, 1, 0, 1, 0, 0, 9, 0, 0, 0))
    moved = os.stat_result((0o644, 2, 0, 1, 0, 0, 9, 0, 0, 0))
    assert Stamp.of(status) != Stamp.of(moved)


def test_what_makes_other_images_and_what_does_not(root: Path) -> None:
    image = pixels(20, 20)
    write(root / "dogs/b.png", image)
    before = load(root)[0].fingerprint()
    image[-1, -1] ^= 1  # the last pixel alone
    write(root / "dogs/b.png", image)
    assert load(root)[0].fingerprint() != before
    image[-1, -1] ^= 1
    write(root / "dogs/b.png", image)
    os.utime(root / "dogs/a.JPG")
    write(root / "dogs/.hidden.png")
    assert load(root)[0].fingerprint() == before
    for old, new in (("dogs/b.png", "cats/b.png"), ("dogs/b.png", "dogs/d.png"), ("dogs", "wolves"), ("dogs", "ants")):
        (root / old).rename(root / new)
        assert load(root)[0].fingerprint() != before
        (root / new).rename(root / old)


def test_a_file_with_other_contents_of_the_same_size_is_named_and_a_touched_one_is_read(tmp_path: Path) -> None:
    first, second = pixels(20, 20, 1), pixels(20, 20, 2)
    path = tmp_path / "flat" / "a.bmp"
    write(path, first)
    train, _ = load(tmp_path / "flat")
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    assert np.array_equal(train.subset([0]).pixels(0), first)
    train.check(0)
    size = path.stat().st_size
    write(path, second)
    os.utime(path, ns=(later, later))
    assert path.stat().st_size == size
    for look in (train.pixels, train.subset([0]).check):
        with pytest.raises(DataError, match=r"a\.bmp has other contents than when the run started"):
            look(0)
