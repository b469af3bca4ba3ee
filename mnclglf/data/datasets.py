"""Loading of a data set by its name."""

from __future__ import annotations

from pathlib import Path

from mnclglf.data.errors import unreadable
from mnclglf.data.images import ImageSet
from mnclglf.data.sources import Request, source_of


def load_dataset(
    name: str, data_dir: Path | None = None, *, download: bool = False, skip_corrupt: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    """Returns the training images, and the test images or None.

    Args:
        name: name of the data set, or a place, as folder:PATH or shards:PATTERN.
        data_dir: folder of its files; None looks in its usual places. mnist5k, digits and places take none.
        download: fetch missing files into data_dir, or into `cache_dir(name)`.
        skip_corrupt: skip image files that cannot be read.

    Raises:
        ValueError: there is no data set of this name.
        DataError: files are missing, damaged or cannot be fetched.
    """
    source = source_of(name)
    source.check_folder(data_dir)
    data_dir = data_dir and data_dir.expanduser()
    try:
        return source.load(Request(data_dir=data_dir, download=download, skip_corrupt=skip_corrupt))
    except PermissionError as error:  # of a folder, by any source
        raise unreadable(Path(error.filename or data_dir or name), error) from error
