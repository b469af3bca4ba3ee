"""The one entrance to the data sets."""

from __future__ import annotations

from pathlib import Path

from mnclglf.data.images import ImageSet
from mnclglf.data.sources import Request, source_of


def load_dataset(
    name: str, data_dir: Path | None = None, *, download: bool = False, skip_corrupt: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    """The training images, and the test images where there are any.

    Args:
        name: which data set, or folder:PATH.
        data_dir: folder of its files; None looks in its usual places. mnist5k and digits come with Python packages and
            need none.
        download: fetch files that are found nowhere into data_dir, or into `cache_dir(name)`.
        skip_corrupt: leave out image files that cannot be read.

    Raises:
        ValueError: there is no data set of this name.
        DataError: files are missing, damaged or cannot be fetched.
    """
    return source_of(name).load(Request(data_dir=data_dir, download=download, skip_corrupt=skip_corrupt))
