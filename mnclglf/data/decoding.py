"""Decoding of image files with Pillow, upright as their EXIF orientation says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mnclglf.data.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
_TRANSPOSES = {  # by EXIF orientation; Pillow's exif_transpose reads XMP too, which DALI does not
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns the image of a JPEG, PNG or WebP file, uint8 [H, W, 3], upright as its EXIF orientation says.

    Gray becomes three equal channels, transparency is dropped, 16 bits become 8.

    Raises:
        DataError: it cannot be read to its end, or has more pixels than Pillow trusts.
    """
    try:
        # From memory: reading in place allocates what a chunk's length field claims, up to 2 GB. Only these formats:
        # Pillow would run Ghostscript on others, and DALI does not know them.
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width * image.height:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            transpose = _TRANSPOSES.get(exif.get(ExifTags.Base.Orientation, 1))
            upright = image if transpose is None else image.transpose(transpose)
            if upright.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion would cut them off at 255
                levels = np.asarray(upright, dtype=np.float64) / 257
                upright = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except Exception as error:  # a damaged file makes Pillow raise anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error
