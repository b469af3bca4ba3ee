"""Packs the images of a source into shards: tar files as WebDataset writes them, with DALI's index beside each."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mnclglf.config import SHARDS, shown
from mnclglf.data.decoding import FORMATS
from mnclglf.data.errors import DataError
from mnclglf.data.images import EncodedImages, ImageSet
from mnclglf.data.ranges import LocalFile
from mnclglf.data.sources.shards import CLASSES_FILE, PACK_FILE, listed, samples_of, write_index
from mnclglf.data.tars import BLOCK
from mnclglf.runs.files import read_object, write_atomically, write_json
from mnclglf.runs.locks import held

_LOCK = ".packing.lock"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a shard holds at most, but for a single image."""

    images: int | None = None
    file_bytes: int | None = None

    def is_reached(self, images: int, file_bytes: int) -> bool:
        """Returns whether so many images, in a file of so many bytes, are too much."""
        return (self.images is not None and images > self.images) or (
            self.file_bytes is not None and file_bytes > self.file_bytes
        )


def pack(
    source: tuple[ImageSet, ImageSet | None], out: Path, limit: Limit, say: Callable[[str], object] = lambda line: None
) -> None:
    """Packs training and test images into OUT/train-000000.tar and so on; goes on where an earlier call stopped.

    Contents of image files are kept as they are; other images become PNG. A shard appears whole or not at all.

    Args:
        source: training images, and test images or None.
        out: folder, which is made.
        limit: most that a shard holds.
        say: prints a line.

    Raises:
        DataError: the folder holds something else, another process packs there, or an image cannot be read.
    """
    parts = {images.split: images for images in source if images is not None}
    wanted: dict[str, Any] = {
        "format": _FORMAT,
        "source": shown(source[0].name),
        "images": {name: images.fingerprint() for name, images in parts.items()},
        "counts": {name: len(images) for name, images in parts.items()},
        "images_per_shard": limit.images,
        "shard_bytes": limit.file_bytes,
    }
    if not _is_begun(out, wanted):
        out.mkdir(parents=True, exist_ok=True)
    with held(out / _LOCK) as mine:
        if not mine:
            raise DataError(f"{out} is being packed by {(out / _LOCK).read_text() or 'another process'}; wait for it")
        _is_begun(out, wanted)  # again: another process may have packed other images until we held the lock
        for left in out.glob(".*.tmp"):  # of a process that was killed: we hold the lock
            left.unlink(missing_ok=True)
        if (read_object(out / PACK_FILE) or {}).get("whole") is not True:
            write_json(out / PACK_FILE, {**wanted, "whole": False})
        classes = source[0].classes
        if classes:
            text = "".join(f"{' '.join(name.split())}\n" for name in classes).encode(errors="surrogateescape")
            write_atomically(out / CLASSES_FILE, lambda file: file.write(text))
        for name, images in parts.items():
            _pack_part(images, out, name, limit, say)
        write_json(out / PACK_FILE, {**wanted, "whole": True})
    say(f"packed: --dataset {SHARDS}{out.resolve()}")


def _is_begun(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Returns whether the same images were packed into the folder before, to the end or not.

    Raises:
        DataError: it holds something else.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise DataError(f"{out} is a file; give another folder to pack into")
    remedy = "choose another OUT, or delete that one"
    try:
        found = read_object(out / PACK_FILE)
    except ValueError as error:
        raise DataError(f"{error}; {remedy}") from error
    if found is None:
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others:
            raise DataError(f"{out} holds {others[0]} and is no pack of ours; {remedy}")
        return False
    # By what the images are: the same source may be given by another path.
    other = [name for name, value in wanted.items() if name != "source" and found.get(name) != value]
    if other:
        raise DataError(
            f"{out} holds another pack, of {found.get('source')}: {', '.join(other)} differ{'s' * (len(other) == 1)}; "
            f"{remedy}"
        )
    return True


def _pack_part(images: ImageSet, out: Path, name: str, limit: Limit, say: Callable[[str], object]) -> None:
    row, number = 0, 0
    while row < len(images):
        shard = out / f"{name}-{number:06}.tar"
        first, written = row, not shard.exists()
        if written:
            write_atomically(shard, lambda file, first=first: _write_shard(file, images, first, limit))
        file = LocalFile(str(shard))
        if shard.with_suffix(".idx").exists():
            samples = samples_of(file)
        else:
            samples = listed(file)
            write_index(shard, samples)
        row += len(samples)
        if written:
            which = f"image {first:,}" if row == first + 1 else f"images {first:,} to {row - 1:,}"
            say(f"{shard.name}: {which} of {len(images):,}")
        number += 1


def _write_shard(file: BinaryIO, images: ImageSet, first: int, limit: Limit) -> None:
    """Writes the images from a row on, as many as fit."""
    used = 2 * BLOCK  # the mark of the end, after which a tar is padded
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(first, len(images)):
            members = _members(images, row)
            used += sum(BLOCK + _padded(len(data), BLOCK) for data in members.values())
            if row > first and limit.is_reached(row - first + 1, _padded(used, tarfile.RECORDSIZE)):
                return
            for name, data in members.items():
                about = tarfile.TarInfo(name)  # without times and owners: the same images give the same bytes
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def _members(images: ImageSet, row: int) -> dict[str, bytes]:
    """Returns the members of a sample by name: the image, and its label if it has one."""
    key, label = f"{row:09}", int(images.labels[row])
    if isinstance(images, EncodedImages):
        members = {f"{key}{FORMATS[images.kinds[row].format].suffixes[0]}": images.contents(row)}
    else:
        stream = io.BytesIO()
        Image.fromarray(images.pixels(row)).save(stream, "PNG")
        members = {f"{key}.png": stream.getvalue()}
    return members | ({} if label < 0 else {f"{key}.cls": str(label).encode()})
