"""parquet:PATTERN: Parquet files of images, as the Hugging Face hub stores them, here or behind http, https or s3."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnclglf.config import shown
from mnclglf.data.errors import DataError
from mnclglf.data.packed import ShardStore, Store
from mnclglf.data.parquet import NO_IMAGE, NULL, ONLY_PATH, Unpacked, read_unpacked, unpack, unpacked_bytes
from mnclglf.data.ranges import LocalFile, RangeFile, short_hash
from mnclglf.data.sources.examination import NO_LABEL
from mnclglf.data.sources.packed import PackedSource, Part
from mnclglf.data.sources.source import cache_dir
from mnclglf.runs.files import with_remedy
from mnclglf.runs.locks import one_at_a_time

logger = logging.getLogger(__name__)

_MISSING = {NO_IMAGE: "is null: the row has no image", ONLY_PATH: "has the path of an image and no bytes"}


class Parquet(PackedSource):
    """Source of the images in Parquet files, which are unpacked into the cache when they are first seen."""

    suffix = ".parquet"

    def _open(self, files: Sequence[RangeFile]) -> tuple[Store, list[Part]]:
        found = _unpacked(files, self.name)
        sizes = np.concatenate([rows.sizes for rows in found])
        ends = [np.cumsum(np.maximum(rows.sizes, 0)) for rows in found]
        parts = [_part(file, rows) for file, rows in zip(files, found, strict=True)]
        store = RowStore(
            files=tuple(LocalFile(str(_paths(file)[0])) for file in files),
            file_of=np.repeat(np.arange(len(files), dtype=np.int32), [len(rows.sizes) for rows in found]),
            offsets=np.concatenate(ends) - np.maximum(sizes, 0),
            sizes=sizes,
            names=[name for part in parts for name in part.names],
            places=tuple(shown(file.name) for file in files),
        )
        return store, parts

    def _class_names(self, files: Sequence[RangeFile]) -> tuple[str, ...]:
        return ()  # those that there are are of the parts


@dataclass(frozen=True, kw_only=True)
class RowStore(ShardStore):
    """Images of the rows of Parquet files, in the files that these were unpacked to."""

    places: tuple[str, ...]
    """Names of the Parquet files."""

    def read(self, number: int, *, near: bool) -> bytes:
        missing = _MISSING.get(int(self.sizes[number]))
        if missing:
            raise DataError(f"{self.place(number)} {missing}")
        return super().read(number, near=near)

    def place(self, number: int) -> str:
        return f"{self.places[self.file_of[number]]}/{self.names[number]}"


def _part(file: RangeFile, rows: Unpacked) -> Part:
    unlabeled = bool((rows.labels == NULL).all())

    def label(row: int) -> int:
        found = int(rows.labels[row])
        if found == NULL:
            if unlabeled:
                return NO_LABEL
            raise DataError("has the label null, and others have one")
        if found == NO_LABEL:  # datasets' number of no class
            return found
        most = 2**31 if rows.classes is None else len(rows.classes)
        if not 0 <= found < most:
            raise DataError(f"has the label {found}, and the classes are 0 to {most - 1}")
        return found

    return Part(
        file=file,
        names=[str(row) for row in range(len(rows.sizes))],
        sizes=np.maximum(rows.sizes, 0).tolist(),
        label=label,
        classes=rows.classes,
    )


def _unpacked(files: Sequence[RangeFile], name: str) -> list[Unpacked]:
    """Returns what is known of the rows of Parquet files; unpacks those that are not, while no other process does.

    Raises:
        DataError: a file cannot be read, or there is no room for its images.
    """
    found = [read_unpacked(*_paths(file)[::-1]) for file in files]
    if all(found):
        return [rows for rows in found if rows]
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(
            folder / ".unpacking.lock",
            lambda: logger.warning("%s: waiting for another process that unpacks Parquet files", shown(name)),
        ):
            for left in folder.glob(".*.tmp"):  # of a process that was killed: we hold the lock
                left.unlink(missing_ok=True)
            return _unpack_missing(files, folder, name)
    except OSError as error:
        raise DataError(
            f"{shown(name)} cannot be unpacked into {folder} ({with_remedy(error)}), or choose another folder of the "
            "cache by the environment variable XDG_CACHE_HOME"
        ) from error


def _unpack_missing(files: Sequence[RangeFile], folder: Path, name: str) -> list[Unpacked]:
    found = {file: read_unpacked(*_paths(file)[::-1]) for file in files}
    missing = [file for file in files if found[file] is None]
    needed, free = sum(unpacked_bytes(file) for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{shown(name)}: its images are unpacked into {folder}, which takes about {needed:,} bytes, and {free:,} "
            "are free there; make room, or choose another folder of the cache by the environment variable "
            "XDG_CACHE_HOME"
        )
    if missing:
        logger.warning(
            "%s: unpacking %d files into %s, once; about %s MB", shown(name), len(missing), folder, needed // 10**6
        )
    for file in missing:
        images, index = _paths(file)
        for old in folder.glob(f"{images.name.partition('-')[0]}-*"):  # of the file before it changed
            old.unlink(missing_ok=True)
        rows = found[file] = unpack(file, images)
        rows.save(index)
    return [rows for rows in found.values() if rows is not None]


def _folder() -> Path:
    return cache_dir("parquet") / "images"


def _paths(file: RangeFile) -> tuple[Path, Path]:
    """Returns the file of the images of a Parquet file, and of what is known of its rows; others after it changed."""
    name = f"{file.key}-{short_hash(repr(file.stamp))}"
    return _folder() / f"{name}.images", _folder() / f"{name}.npz"
