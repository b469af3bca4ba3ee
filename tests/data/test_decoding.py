"""Image files' orientation and formats: alike in Pillow and DALI, for every spelling of the orientation."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnclglf.config import ViewConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.decoding import decode_image, read_image
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageFiles
from mnclglf.data.loaders.reference import ReferenceLoader

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as decoding.py does; pytest resets it

needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")

ROWS, COLUMNS = np.mgrid[0:16, 0:24]
PIXELS = np.stack([ROWS * 15, COLUMNS * 10, (ROWS + COLUMNS) * 3], 2).astype(np.uint8)
UPRIGHT = {  # EXIF 2.32, table 5: where the first row and the first column of the file belong
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.swapaxes(0, 1),
    6: PIXELS.swapaxes(0, 1)[:, ::-1],
    7: PIXELS.swapaxes(0, 1)[::-1, ::-1],
    8: PIXELS.swapaxes(0, 1)[::-1],
}
BROKEN = {
    "garbage": b"no header at all",
    "big": b"II+\0\x08\0\0\0",
    "one": b"M",
    "two": b"II",
    "three": b"II*",
    "cut": b"II*\0\x08\0\0\0\x05\0",
}


def exif(orientation: int, *, order: str = "<", kind: int = 3) -> bytes:
    """Returns a TIFF header with one entry; kind 1 is BYTE, 3 SHORT, 4 LONG."""
    value = {1: "BBH", 3: "HH", 4: "I"}[kind]
    packed = struct.pack(order + value, orientation, *([0] * (len(value) - 1)))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IHHHI", 8, 1, 0x0112, kind, 1) + packed + bytes(4)


def encoded(suffix: str, data: bytes | None) -> bytes:
    stream = io.BytesIO()
    kind, options = {"jpg": ("JPEG", {"quality": 95}), "webp": ("WEBP", {"lossless": True}), "png": ("PNG", {})}[suffix]
    given: dict[str, Any] = dict(options)
    if data is not None and suffix != "png":
        given["exif"] = b"Exif\0\0" + data if suffix == "jpg" else data
    Image.fromarray(PIXELS).save(stream, kind, **given)
    return stream.getvalue() if suffix != "png" or data is None else with_chunk(stream.getvalue(), data, b"IDAT")


def with_chunk(png: bytes, data: bytes, before: bytes) -> bytes:
    at = png.index(before) - 4
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    return png[:at] + chunk + png[at:]


def animated(*, default_image: bool) -> bytes:
    stream, frame = io.BytesIO(), Image.fromarray(255 - PIXELS)
    Image.fromarray(PIXELS).save(
        stream, "PNG", save_all=True, append_images=[frame, frame.rotate(180)], default_image=default_image
    )
    return stream.getvalue()


def cases() -> dict[str, tuple[bytes, int]]:
    """Returns files by name, with the orientation that they are to be turned by."""
    made: dict[str, tuple[bytes, int]] = {}
    for suffix in ("jpg", "png", "webp"):
        made[f"none.{suffix}"] = encoded(suffix, None), 1
        for number in range(1, 9):
            made[f"{number}.{suffix}"] = encoded(suffix, exif(number)), number
        made[f"motorola.{suffix}"] = encoded(suffix, exif(6, order=">")), 6
        made[f"long.{suffix}"] = encoded(suffix, exif(6, kind=4)), 6
        made[f"nine.{suffix}"] = encoded(suffix, exif(9)), 1
        made |= {f"{name}.{suffix}": (encoded(suffix, data), 1) for name, data in BROKEN.items()}
    made["after.png"] = with_chunk(encoded("png", None), exif(6), b"IEND"), 6
    past = encoded("png", None)
    made["past the end.png"] = past + with_chunk(past, exif(6), b"IEND")[len(past) - 12 : -12], 1
    several, other = io.BytesIO(), Image.new("RGB", (9, 9))
    Image.fromarray(UPRIGHT[1]).save(several, "MPO", save_all=True, append_images=[other])
    made["several pictures.jpg"] = several.getvalue(), 1
    made["animated.png"] = animated(default_image=False), 1
    made["broken after.png"] = with_chunk(encoded("png", None), b"II+", b"IEND"), 1
    return made


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFiles:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "flat").mkdir()
    for name, (data, _) in cases().items():
        (tmp_path / "flat" / name).write_bytes(data)
    images, _ = load_dataset(f"folder:{tmp_path / 'flat'}")
    assert isinstance(images, ImageFiles)
    return images


def test_every_file_is_read_and_turned_upright(files: ImageFiles) -> None:
    expected = cases()
    assert set(files.paths) == set(expected)
    for row, name in enumerate(files.paths):
        truth = UPRIGHT[expected[name][1]].astype(int)
        assert files.pixels(row).shape == truth.shape == (files.heights[row], files.widths[row], 3), name
        assert np.abs(files.pixels(row) - truth).mean() < 4, name  # JPEG; another orientation is 40 off


@needs_dali
def test_dali_turns_as_pillow_does(files: ImageFiles) -> None:
    from mnclglf.data.loaders.dali import DaliLoader

    view = ViewConfig(
        crop_scale=(1.0, 1.0), crop_ratio=(0.1, 10.0), flip_probability=0.0, jitter_probability=0.0,
        gray_probability=0.0, blur_probability=0.0, interpolation="bilinear",
    )  # fmt: skip
    settings: dict[str, Any] = dict(
        views=1, side=16, batch_size=8, seed=1, dtype=torch.float32, device=torch.device("cpu"), threads=1,
        statistics=(np.zeros(3, np.float32), np.full(3, 1 / 255, np.float32)),
    )  # fmt: skip
    rows = np.arange(len(files))
    (ours,), (truth,) = (make(files, view, **settings).render(rows, 0) for make in (DaliLoader, ReferenceLoader))
    apart = (ours - truth).abs().mean(dim=(1, 2, 3))
    assert apart.max() < 3, files.paths[int(apart.argmax())]  # levels of 255; another orientation is 40 off
    upright = files.subset([files.paths.index("none.png")])
    assert upright.orientations is not None


def bmp(bits: int, compression: int, data: bytes, palette: bytes = b"") -> bytes:
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def test_kinds_of_bmp(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    for name, made in (("rgb", image), ("l", image.convert("L")), ("p", image.convert("P")), ("1", image.convert("1"))):
        made.save(tmp_path / f"{name}.bmp")
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.bmp"), np.array(made.convert("RGB")))
    for name, data in (("16", bmp(16, 0, bytes(128))), ("rle4", bmp(4, 2, b"\x08\x11\0\0" * 8 + b"\0\1", bytes(64)))):
        (tmp_path / f"{name}.bmp").write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}\.bmp .*convert it"):  # DALI does not read it
            read_image(tmp_path / f"{name}.bmp")


def test_an_animation_with_a_still_image_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(animated(default_image=True))  # Pillow shows the still, DALI the first frame
    with pytest.raises(DataError, match=r"a\.png .*animated.*convert it"):
        read_image(tmp_path / "a.png")


def tiff(pixels: np.ndarray, *, bits: int, photometric: int, order: str = "<", tags: tuple[bytes, ...] = ()) -> bytes:
    """Returns an uncompressed TIFF written by hand; pixels [H, W, C], of `bits` bits each."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{order}u{bits // 8}").tobytes()
    counts = struct.pack(f"{order}{channels}H", *[bits] * channels)
    at = 8 + len(data)

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        packed = struct.pack(f"{order}HH" if kind == 3 else f"{order}I", *((value, 0) if kind == 3 else (value,)))
        return struct.pack(f"{order}HHI", tag, kind, count) + packed

    entries = [
        entry(256, 3, 1, width),
        entry(257, 3, 1, height),
        entry(258, 3, channels, at) if channels < 3 else struct.pack(f"{order}HHII", 258, 3, channels, at),
        entry(259, 3, 1, 1),
        entry(262, 3, 1, photometric),
        entry(273, 4, 1, 8),
        *tags,
        entry(277, 3, 1, channels),
        entry(278, 3, 1, height),
        entry(279, 4, 1, len(data)),
    ]
    if channels == 1:
        entries[2] = entry(258, 3, 1, bits)
    head = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return head + struct.pack(f"{order}I", at + len(counts)) + data + counts + directory


def turning(number: int) -> tuple[bytes, ...]:
    return (struct.pack("<HHIHH", 0x0112, 3, 1, number, 0),)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_tiff_is_turned_upright_once(number: int, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(PIXELS, bits=8, photometric=2, tags=turning(number)))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), UPRIGHT[number])


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_a_tiff_become_8(order: str, tmp_path: Path) -> None:
    levels = (np.arange(16 * 24).reshape(16, 24, 1) * 170).astype(np.uint16)
    (tmp_path / "gray.tif").write_bytes(tiff(levels, bits=16, photometric=1, order=order))
    expected = np.rint(levels / 257).astype(np.uint8).repeat(3, axis=2)
    np.testing.assert_array_equal(read_image(tmp_path / "gray.tif"), expected)
    (tmp_path / "rgb.tif").write_bytes(tiff(PIXELS.astype(np.uint16) * 257, bits=16, photometric=2, order=order))
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.tif"), PIXELS)


def test_the_first_page_or_frame_is_read(tmp_path: Path) -> None:
    first, second = Image.fromarray(PIXELS[..., 0]), Image.fromarray(255 - PIXELS[..., 0])
    for name in ("pages.tif", "frames.gif"):
        first.save(tmp_path / name, save_all=True, append_images=[second, first])
        np.testing.assert_array_equal(read_image(tmp_path / name), PIXELS[..., :1].repeat(3, axis=2))


def test_numbers_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)).save(tmp_path / "floats.tif")
    Image.fromarray(np.full((20, 20), 10**6, np.int32)).save(tmp_path / "int32.tif")
    for name in ("floats", "int32"):
        with pytest.raises(DataError, match=rf"{name}\.tif .*mode [FI] .*convert them to 8 or 16 bits"):
            read_image(tmp_path / f"{name}.tif")


def test_what_a_file_holds_is_known(tmp_path: Path) -> None:
    image, gray = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])
    sixteen = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    clear = image.copy()
    clear.putalpha(100)
    expected = {
        "rgb.jpg": (image, ("JPEG", "color", 8, False, False)),
        "cmyk.jpg": (image.convert("CMYK"), ("JPEG", "CMYK", 8, False, False)),
        "gray.png": (gray, ("PNG", "gray", 8, False, False)),
        "16.png": (sixteen, ("PNG", "gray", 16, False, False)),
        "bit.png": (gray.convert("1"), ("PNG", "gray", 1, False, False)),
        "palette.png": (image.convert("P"), ("PNG", "palette", 8, False, False)),
        "alpha.png": (image.convert("RGBA"), ("PNG", "color", 8, True, False)),
        "gray alpha.png": (image.convert("LA"), ("PNG", "gray", 8, True, False)),
        "alpha.webp": (clear, ("WEBP", "color", 8, True, False)),
        "rgb.bmp": (image, ("BMP", "color", 8, False, False)),
        "16.tif": (sixteen, ("TIFF", "gray", 16, False, False)),
        "cmyk.tif": (image.convert("CMYK"), ("TIFF", "CMYK", 8, False, False)),
        "still.gif": (image.convert("P"), ("GIF", "palette", 8, False, False)),
    }
    for name, (picture, kind) in expected.items():
        picture.save(tmp_path / name)
        found = decode_image((tmp_path / name).read_bytes(), tmp_path / name).kind
        assert (found.format, found.color, found.bits, found.alpha, found.several) == kind, name
    color = tiff(PIXELS.astype(np.uint16) * 257, bits=16, photometric=2)  # which Pillow reads as RGB of 8 bits
    assert decode_image(color, tmp_path / "x.tif").kind[:4] == ("TIFF", "RGB", 16, False)
    gray.save(tmp_path / "pages.tif", save_all=True, append_images=[gray])
    assert decode_image((tmp_path / "pages.tif").read_bytes(), tmp_path).kind.several


def test_a_jpeg_of_several_pictures_is_its_first(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((24, 24, 3), level, np.uint8)) for level in (200, 20))
    first.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "camera.jpg") as opened:
        assert opened.format == "MPO"  # which is what Pillow makes of it
    decoded = decode_image((tmp_path / "camera.jpg").read_bytes(), "camera.jpg")
    assert (decoded.kind.format, decoded.kind.several) == ("JPEG", True)
    assert np.abs(decoded.pixels.astype(int) - 200).max() < 4  # JPEG
