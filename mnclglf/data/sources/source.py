"""The base of the data sets, and what they share: where files are looked for, downloads, checksums."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mnclglf.config import DataConfig
from mnclglf.data.errors import DataError, damaged, unreadable
from mnclglf.data.images import ImageSet
from mnclglf.runs.files import cache_folder, open_file


@dataclass(frozen=True, kw_only=True)
class Request:
    """The user's settings of the files."""

    data_dir: Path | None = None
    """Folder of the files; None looks in the source's usual places."""
    download: bool = False
    """Fetch missing files."""
    skip_corrupt: bool = False
    """Skip image files that cannot be read."""


class Source(ABC):
    """A data set: the places of its files, their readers and the recipes' settings for it.

    Attributes:
        name: the name that --dataset takes.
        class_count: number of classes.
        needs_files: False if the images come with a Python package.
        flips: False if a mirrored image has another meaning; its views are then never flipped.
        tuned: True if the settings of --recipe tuned were made for such images.
        quick_data: image settings of --recipe quick.
        quick_epochs: epochs of --recipe quick.
        sized: False if the images are of many sizes or large; recipe paper then makes views of 224 x 224, with the
            stem for such.
        quick_view: settings of the views of --recipe quick that differ from the named view's.
    """

    name: str
    class_count: int = 10
    needs_files: bool = True
    flips: bool = True
    tuned: bool = False
    sized: bool = True
    quick_data: DataConfig = DataConfig(image_size=16)
    quick_epochs: int = 16
    quick_view: Mapping[str, float] = MappingProxyType({})

    def check_folder(self, data_dir: Path | None) -> None:
        """Raises DataError for a folder of a data set that comes with a package, where it would have no effect."""
        if data_dir is not None and not self.needs_files:
            raise DataError(
                f"data_dir {data_dir} has no effect: {self.name} comes with a Python package; leave out --data-dir"
            )

    @abstractmethod
    def load(self, request: Request) -> tuple[ImageSet, ImageSet | None]:
        """Returns the training images, and the test images or None.

        Raises:
            DataError: files are missing, damaged or cannot be fetched.
        """


def cache_dir(name: str) -> Path:
    """Returns the folder of downloads without a data_dir: <XDG_CACHE_HOME or ~/.cache>/mnclglf/<name>."""
    return cache_folder() / name


def check_md5(path: Path, expected: str) -> None:
    """Raises DataError unless the file has this MD5."""
    try:
        with open_file(path) as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    if found != expected:
        raise damaged(path, f"has MD5 {found} where {expected} is published")


def download(urls: Sequence[str], target: Path, md5: str) -> None:
    """Fetches `target` from the first address whose file has this MD5. The file appears whole or not at all."""
    from torchvision.datasets import utils

    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    problems: list[str] = []
    for url in urls:
        try:
            utils.download_url(url, part.parent, filename=part.name, md5=md5)
            part.replace(target)
            return
        except (OSError, RuntimeError) as error:  # the latter: the MD5 differs
            part.unlink(missing_ok=True)
            problems.append(f"{url} ({error})")
    raise DataError(
        f"cannot download {target.name}: {'; '.join(problems)}. Try again, or fetch it by hand into {target.parent}"
    )


def missing(title: str, looked_for: str, places: Sequence[Path], request: Request, *, otherwise: str = "") -> DataError:
    """Returns an error that names the missing files, the places searched and the remedy."""
    where = ", ".join(str(place) for place in places)
    now, remedy = "", ", or let --download of `mnclglf train` or `mnclglf data inspect` fetch them"
    if request.download:
        now, remedy = " even after --download", ""
    return DataError(
        f"{title}'s files are missing{now}: looked for {looked_for} in {where}; give the folder that holds them as "
        f"--data-dir{remedy}{otherwise}"
    )
