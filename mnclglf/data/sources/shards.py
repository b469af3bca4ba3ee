"""shards:PATTERN: tar files of images, as WebDataset writes them, here or behind http, https or s3."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mnclglf.config import is_remote, shown
from mnclglf.data.errors import DataError
from mnclglf.data.packed import PackedImages, ShardStore, Store
from mnclglf.data.ranges import RangeFile, file_system, short_hash
from mnclglf.data.shard_index import (
    Sample,
    group,
    image_of,
    index_text,
    is_fresh,
    label_of,
    parse_index,
    quoted_index_text,
)
from mnclglf.data.sources.examination import NO_LABEL
from mnclglf.data.sources.layout import few
from mnclglf.data.sources.packed import PackedSource, Part
from mnclglf.data.sources.source import Request, cache_dir
from mnclglf.data.tars import Member, list_members
from mnclglf.runs.files import read_bytes, read_object, write_atomically

logger = logging.getLogger(__name__)

CLASSES_FILE = "classes.txt"
"""File beside shards with the names of the classes, one a line, in the order of their numbers."""
PACK_FILE = "pack.json"
"""File beside shards that we packed, which says of what, and whether to the end."""
MOST_INDEX = 2**28  # bytes of an index; 100 per member


class Shards(PackedSource):
    """Source of the images in tar files."""

    suffix = ".tar"

    def load(self, request: Request) -> tuple[PackedImages, PackedImages | None]:
        folder = Path(self.pattern).expanduser()
        if (
            not is_remote(self.pattern)
            and folder.is_dir()
            and (read_object(folder / PACK_FILE) or {}).get("whole") is False
        ):
            raise DataError(f"{folder} is not packed to its end; give the same `mnclglf data pack` again")
        return super().load(request)

    def _open(self, files: Sequence[RangeFile]) -> tuple[Store, list[Part]]:
        parts: list[Part] = []
        images: list[Member] = []
        for file in files:
            found = [(sample, _image(sample, file)) for sample in samples_of(file)]
            inside = [(sample, image) for sample, image in found if image is not None]
            without = [sample.key for sample, image in found if image is None]
            if without:
                logger.warning("%s: %d samples have no image: %s", shown(file.name), len(without), few(without))
            images += [image for _, image in inside]
            parts.append(_part(file, inside))
        counts = [len(part.names) for part in parts]
        store = ShardStore(
            files=tuple(files),
            file_of=np.repeat(np.arange(len(files), dtype=np.int32), counts),
            offsets=np.array([image.offset for image in images], np.int64),
            sizes=np.array([image.size for image in images], np.int64),
            names=[image.name for image in images],
        )
        return store, parts

    def _class_names(self, files: Sequence[RangeFile]) -> tuple[str, ...]:
        text = _read_beside(f"{files[0].name.rpartition('/')[0]}/{CLASSES_FILE}")
        return tuple(text.splitlines()) if text else ()


def _part(file: RangeFile, inside: Sequence[tuple[Sample, Member]]) -> Part:
    def label(number: int) -> int:
        found = label_of(inside[number][0], lambda member: file.read(member.offset, member.size))
        return NO_LABEL if found is None else found

    return Part(
        file=file,
        names=[image.name for _, image in inside],
        sizes=[image.size for _, image in inside],
        label=label,
    )


def _image(sample: Sample, file: RangeFile) -> Member | None:
    try:
        return image_of(sample)
    except DataError as error:
        raise DataError(f"{shown(file.name)}: {sample.key!r} {error}") from error


def samples_of(file: RangeFile) -> list[Sample]:
    """Returns the samples of a shard, by its index if that is fresh; else the index is made.

    It lies beside the shard as NAME.idx, or in the cache where nothing can be written there.

    Raises:
        DataError: the shard cannot be read, is damaged, or is no tar.
    """
    kept = _kept_index(file)
    remote = is_remote(file.name)
    for text, quoted in ((lambda: _index_beside(file), False), (lambda: _read(kept), True))[:: -1 if remote else 1]:
        written = text()
        samples = parse_index(written, file.stamp.size, quoted=quoted) if written else None
        if samples is None or not (quoted or is_fresh(samples, lambda at, size: file.read(at, size, near=False))):
            continue
        if remote and not quoted:
            _keep(kept, samples)  # the next start need not ask for it
        return samples
    samples = listed(file)
    if remote:
        _keep(kept, samples)
        return samples
    try:
        write_index(Path(file.name), samples)
    except (OSError, ValueError):  # it can only be read there, or a name holds a blank
        _keep(kept, samples)
    return samples


def listed(file: RangeFile) -> list[Sample]:
    """Returns the samples of a shard, by its headers.

    Raises:
        DataError: the shard cannot be read, is damaged, or is no tar.
    """
    listing = list_members(file.read, file.stamp.size, shown(file.name))
    if listing.ignored:
        logger.warning("%s: %d members are left out: %s", shown(file.name), len(listing.ignored), few(listing.ignored))
    return group(listing.members, shown(file.name))


def write_index(shard: Path, samples: Sequence[Sample]) -> None:
    """Writes the index beside a shard.

    Raises:
        OSError: it cannot be written.
        ValueError: a name holds a blank, which the format cannot tell from the end of the name.
    """
    text = index_text(samples).encode(errors="surrogateescape")
    write_atomically(shard.with_suffix(".idx"), lambda file: file.write(text))


def _index_beside(file: RangeFile) -> str | None:
    """Returns the text of the index beside a shard; None if there is none, or it is older than the shard."""
    name = f"{file.name.removesuffix('.tar')}.idx"
    if not is_remote(name):
        try:
            if os.stat(name).st_mtime_ns < file.stamp.modified:
                return None
        except OSError:
            return None
    return _read_beside(name)


def _read_beside(name: str) -> str | None:
    """Returns the text of a file beside a shard; None if it cannot be read."""
    if not is_remote(name):
        return _read(Path(name))
    if "?" in name:  # a signed address is of one file
        return None
    try:
        return bytes(file_system(name).cat_file(name)).decode(errors="surrogateescape")
    except Exception:  # of any library that speaks with the server
        return None


def _read(path: Path) -> str | None:
    try:
        return read_bytes(path, MOST_INDEX).decode(errors="surrogateescape")
    except OSError:
        return None


def _kept_index(file: RangeFile) -> Path:
    """Returns the path of a shard's index in the cache, which is another one after the shard has changed."""
    return cache_dir("shards") / f"{file.key}-{short_hash(repr(file.stamp))}.idx"


def _keep(path: Path, samples: Sequence[Sample]) -> None:
    """Writes an index into the cache, in place of those of the shard before it changed."""
    text = quoted_index_text(samples).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.name.partition('-')[0]}-*.idx"):
            old.unlink(missing_ok=True)
        write_atomically(path, lambda file: file.write(text))
    except OSError as error:  # the next run lists the shard again
        logger.warning("the index of a shard cannot be kept in %s (%s)", path, error)
