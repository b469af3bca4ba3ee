"""Decoding of image files with Pillow, rotated upright by their orientation. FORMATS is the table of the formats."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from mnclglf.data.errors import DataError
from mnclglf.runs.files import NO_FILE, read_bytes

# Broken EXIF costs the orientation alone. Once and for all: threads must not change the filters in turns.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


class Format(NamedTuple):
    """An image format that is read."""

    suffixes: tuple[str, ...]
    by_dali: bool
    """Whether DALI reads it, to Pillow's pixels; else Pillow decodes it for every loader."""


FORMATS = {
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif"), by_dali=True),
    "PNG": Format((".png",), by_dali=True),
    "WEBP": Format((".webp",), by_dali=True),
    "BMP": Format((".bmp",), by_dali=True),
    "TIFF": Format((".tif", ".tiff"), by_dali=False),  # DALI turns by no tag, and has other rules for 16 bits and CMYK
    "GIF": Format((".gif",), by_dali=False),
}
"""Formats by Pillow's name. Of a file with several pages or frames, the first is read."""
SUFFIXES = tuple(suffix for kind in FORMATS.values() for suffix in kind.suffixes)
"""Suffixes of the files that are read."""


class Kind(NamedTuple):
    """What a file holds, before it is made uint8 [H, W, 3]."""

    format: str  # a key of FORMATS
    mode: str  # Pillow's, e.g. L, RGBA or CMYK
    bits: int  # per channel
    alpha: bool  # some transparency, which is dropped
    several: bool  # more than one page or frame, of which the first is read

    @property
    def color(self) -> str:
        """Returns gray, palette, CMYK or color."""
        if self.mode.startswith(("1", "L", "I")) and self.mode != "LAB":
            return "gray"
        return {"P": "palette", "PA": "palette", "CMYK": "CMYK"}.get(self.mode, "color")


class Decoded(NamedTuple):
    """An image file's contents."""

    pixels: NDArray[np.uint8]  # [H, W, 3], upright
    orientation: int  # by which a loader turns that decodes the file itself, 1 to 8
    kind: Kind


MOST_SCANS = 100  # of a JPEG; a progressive one has about ten, and each goes over the whole image
MOST_BYTES = 2**30  # of a file: an image of the most pixels has 716 MB at most, of 16 bits, not packed
_PNG = b"\x89PNG\r\n\x1a\n"
_SCAN = b"\xff\xda"  # begins one, and stands nowhere within
_BMP_BITS, _RLE4 = (1, 4, 8, 24, 32), 2  # DALI reads no others
# Not Pillow's exif_transpose, which also reads XMP, unlike DALI.
TURNS = {2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 1, 0), 7: (1, 1, 1), 8: (1, 0, 1)}
"""By EXIF orientation, whether an image is transposed, then mirrored left to right, then top to bottom."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns the image of a file in one of FORMATS, uint8 [H, W, 3], rotated upright by its orientation.

    Gray becomes three equal channels, transparency is dropped, 16 bits become 8; CMYK becomes RGB without a profile.

    Raises:
        DataError: the file cannot be read to its end, or has more pixels than Pillow's limit.
    """
    return decode_image(read_file(path), path).pixels


def read_file(path: Path) -> bytes:
    """Returns the contents of an image file.

    Raises:
        DataError: the file cannot be read, or is no file but a pipe or a device.
    """
    try:
        return read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def size_of_file(path: Path) -> int:
    """Returns the size of an image file in bytes, without opening it.

    Raises:
        DataError: the file cannot be accessed, or is no file but a pipe or a device.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} cannot be read as an image ({NO_FILE})")
    return status.st_size


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read as an image ({error}); make it readable for this user")
    return DataError(f"{path} cannot be read as an image ({error.strerror or error})")


def decode_image(data: bytes, path: Path | str) -> Decoded:
    """Returns the image of a file's contents, as read_image does, and its kind; `path` is named in the error.

    Raises:
        DataError: the contents are not such an image, or the image is too large.
    """
    if not data:
        raise DataError(f"{path} cannot be read as an image (it is empty)")
    try:
        # From memory: reading from the file allocates what a chunk's length field claims, up to 2 GB. Only these
        # formats: for others Pillow may run Ghostscript.
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as opened:
            image: Image.Image = opened
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width * image.height:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            if _format_of(image) == "JPEG" and (scans := data.count(_SCAN)) > MOST_SCANS:
                raise ValueError(f"a JPEG of {scans:,} scans, more than {MOST_SCANS}: save it again")
            if image.format == "BMP":
                _check_bmp(data)
            if image.format == "PNG":
                _check_png(data)
            kind = _kind_of(image, data)
            pixels = to_rgb(image)
            if kind.format == "TIFF":  # Pillow turns those, from some version on, and removes the tag
                return Decoded(_turned(pixels, image.getexif().get(ExifTags.Base.Orientation, 1)), 1, kind)
            orientation = orientation_of(data)
            return Decoded(_turned(pixels, orientation), orientation if FORMATS[kind.format].by_dali else 1, kind)
    except UnidentifiedImageError as error:
        *most, last = FORMATS
        what = f"it is no {', '.join(most)} or {last}, or damaged at its start"
        raise DataError(f"{path} cannot be read as an image ({what})") from error
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Returns Pillow's image as uint8 [H, W, 3], not turned.

    Raises:
        ValueError: its numbers have no known range, as floats and integers of 32 bits have none.
    """
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips at 255
        levels = np.asarray(image, dtype=np.float64) / 257
        if image.mode.startswith("F") or (image.mode == "I" and levels.max() > 255):
            raise ValueError(f"pixels of mode {image.mode} have no known range: convert them to 8 or 16 bits")
        image = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _format_of(image: Image.Image) -> str:
    """Returns a key of FORMATS. Pillow has a name of its own for a JPEG of several pictures, as many cameras write."""
    assert image.format is not None
    return "JPEG" if image.format == "MPO" else image.format


def _kind_of(image: Image.Image, data: bytes) -> Kind:
    """Returns what an opened image holds."""
    bits = 1 if image.mode == "1" else 16 if image.mode.startswith("I") else 8
    if image.format == "PNG":
        bits = data[24]  # of the header, as Pillow reads 16 bits of color as 8
    if image.format == "TIFF":
        bits = int(np.max(image.getexif().get(ExifTags.Base.BitsPerSample, bits)))  # one number, or one per channel
    alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
    try:
        several = bool(getattr(image, "is_animated", False))
    except Exception:  # of damage after the first
        several = False
    return Kind(_format_of(image), image.mode, bits, alpha, several)


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
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
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
