"""Decoding of image files with Pillow, rotated upright by their EXIF orientation."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from mnclglf.data.errors import DataError

# Broken EXIF costs the orientation alone. Once and for all: threads must not change the filters in turns.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_PNG = b"\x89PNG\r\n\x1a\n"
_BMP_BITS, _RLE4 = (1, 4, 8, 24, 32), 2  # DALI reads no others
# Not Pillow's exif_transpose, which also reads XMP, unlike DALI.
TURNS = {2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 1, 0), 7: (1, 1, 1), 8: (1, 0, 1)}
"""By EXIF orientation, whether an image is transposed, then mirrored left to right, then top to bottom."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns the image of a JPEG, PNG, WebP or BMP file, uint8 [H, W, 3], rotated upright by its EXIF orientation.

    Gray becomes three equal channels, transparency is dropped, 16 bits become 8.

    Raises:
        DataError: the file cannot be read to its end, or has more pixels than Pillow's limit.
    """
    return decode_image(read_file(path), path)


def read_file(path: Path) -> bytes:
    """Returns the contents of an image file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for a writer
            raise DataError(f"{path} is no file but a pipe or a device; remove it")
        return path.read_bytes()
    except PermissionError as error:
        raise DataError(f"{path} cannot be read as an image ({error}); make it readable for this user") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def decode_image(data: bytes, path: Path) -> NDArray[np.uint8]:
    """Returns the image of a file's contents, as read_image does; `path` is named in the error.

    Raises:
        DataError: the contents are not such an image, or the image is too large.
    """
    if not data:
        raise DataError(f"{path} cannot be read as an image (it is empty)")
    try:
        # From memory: reading from the file allocates what a chunk's length field claims, up to 2 GB. Only these
        # formats: for others Pillow may run Ghostscript, and DALI cannot decode them.
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            image: Image.Image = opened
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width * image.height:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            if image.format == "BMP":
                _check_bmp(data)
            if image.format == "PNG":
                _check_png(data)
            if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion clips at 255
                levels = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
            return _turned(np.array(image.convert("RGB")), orientation_of(data))
    except UnidentifiedImageError as error:
        what = f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or damaged at its start"
        raise DataError(f"{path} cannot be read as an image ({what})") from error
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Returns an image [H, W, 3], upright by its EXIF orientation."""
    transposed, mirrored, upside_down = TURNS.get(orientation, (0, 0, 0))
    pixels = pixels.swapaxes(0, 1) if transposed else pixels
    pixels = pixels[:, ::-1] if mirrored else pixels
    return np.ascontiguousarray(pixels[::-1] if upside_down else pixels)


def orientation_of(data: bytes) -> int:
    """Returns the EXIF orientation of an image file, 1 to 8; 1, which is upright, if it has none that can be read.

    Every loader turns by this one: readers differ in the places and spellings of it that they know.
    """
    try:
        exif = Image.Exif()
        exif.load(_exif_of(data))
        found = exif.get(ExifTags.Base.Orientation, 1)
        return int(found) if found in TURNS else 1
    except Exception:  # Pillow raises anything for damaged EXIF; the pixels are whole
        return 1


def _exif_of(data: bytes) -> bytes:
    if not data.startswith(_PNG):
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.info.get("exif", b"")
    # Pillow finds a chunk after the pixels only when it decodes them.
    return next((content for kind, content in _png_chunks(data) if kind == b"eXIf"), b"")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields kind and content of the chunks of a PNG, up to its end or to where it is cut."""
    at, kind = len(_PNG), b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def _check_png(data: bytes) -> None:
    """Raises ValueError for an animation whose still image is none of its frames: DALI reads the first frame."""
    before = set[bytes]()
    for kind, _ in _png_chunks(data):
        if kind == b"IDAT":
            break
        before.add(kind)
    if b"acTL" in before and b"fcTL" not in before:
        raise ValueError("an animated PNG with a still image of its own: convert it to a PNG of one image")


def _check_bmp(data: bytes) -> None:
    """Raises ValueError for a kind of BMP that DALI does not read."""
    header, bits, compression = (
        int.from_bytes(data[at : at + size], "little") for at, size in ((14, 4), (28, 2), (30, 4))
    )
    if header < 40 or bits not in _BMP_BITS or compression == _RLE4:
        raise ValueError(f"a BMP of {bits} bits, header {header}, compression {compression}: convert it to PNG")
