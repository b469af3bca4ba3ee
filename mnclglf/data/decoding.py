"""Decoding of image files with Pillow, rotated upright by their EXIF orientation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mnclglf.data.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
_TRANSPOSES = {  # by EXIF orientation; not Pillow's exif_transpose, which also reads XMP, unlike DALI
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path) -> NDArray[np.uint8]:
    """Returns the image of a JPEG, PNG or WebP file, uint8 [H, W, 3], rotated upright by its EXIF orientation.

    Gray becomes three equal channels, transparency is dropped, 16 bits become 8.

    Raises:
        DataError: the file cannot be read to its end, or has more pixels than Pillow's limit.
    """
    try:
        # From memory: reading from the file allocates what a chunk's length field claims, up to 2 GB. Only these
        # formats: for others Pillow may run Ghostscript, and DALI cannot decode them.
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width * image.height:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            transpose = _TRANSPOSES.get(exif.get(ExifTags.Base.Orientation, 1))
            upright = image if transpose is None else image.transpose(transpose)
            if upright.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion clips at 255
                levels = np.asarray(upright, dtype=np.float64) / 257
                upright = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error
