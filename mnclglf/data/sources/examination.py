"""Findings about image files: every one is decoded once, when it is first seen, and what was found is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnclglf.data.decoding import Decoded, Kind, decode_image
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.images import moments_of_image
from mnclglf.data.sources.layout import is_drawn
from mnclglf.data.stamp import Stamp
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.files import write_atomically

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 8  # pixels
DRAWN = "is a picture that mnclglf drew"
NO_LABEL = -1
_DIGEST_BYTES = hashlib.sha256().digest_size
_NAMED = 5  # corrupt files named in a message
_FAILURES = (  # of a disk or of the network below a file system, not of one image file
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)
_UNKNOWN = Kind("", "", 0, alpha=False, several=False)  # of a file that cannot be read
_PART = 5000  # number of files after which the findings may be written
_KEPT_SECONDS = 30.0  # between two writes, each of all findings: 166 bytes per image
_MANY = 2000  # number of files from which on a message says that reading takes a while


@dataclass(frozen=True)
class Examined:
    """Findings about an image file."""

    stamp: Stamp
    digest: bytes = b""
    orientation: int = 1
    height: int = 0
    width: int = 0
    moments: tuple[float, ...] = (0.0,) * 6
    kind: Kind = _UNKNOWN
    problem: str = ""
    label: int = NO_LABEL
    """Number of the class, where it lies beside the image; else NO_LABEL."""


def examine(
    names: Sequence[str],
    stamps: Sequence[Stamp],
    look: Callable[[int], Examined],
    *,
    index: Path,
    place: object,
    threads: int = 0,
) -> list[Examined]:
    """Decodes every image once and returns the findings.

    Findings about intact files are kept in `index` and used until a file's stamp differs. A damaged index is made
    again.

    Args:
        names: names of the files [n].
        stamps: what is known of each file without reading it [n].
        look: function that examines the file of a number.
        index: file of the findings.
        place: where the files are, for messages.
        threads: least number of threads.
    """
    known = _read_index(index)
    # Corrupt files are not in the index: they are examined again.
    fresh = [number for number in range(len(names)) if (names[number], stamps[number]) not in known]
    if len(fresh) > _MANY:
        logger.warning("reading %s image files of %s, once, to check them", f"{len(fresh):,}", place)
    since = kept = time.monotonic()
    looked: dict[int, Examined] = {}

    def keep() -> None:
        """Writes what is known by now."""
        found = [looked.get(number) or known.get((names[number], stamps[number])) for number in range(len(names))]
        done = [(name, entry) for name, entry in zip(names, found, strict=True) if entry is not None]
        _write_index(index, [name for name, _ in done], [entry for _, entry in done])

    with ThreadPoolExecutor(max(threads, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        # In parts, each kept when it is done: so an interruption loses little, and need not wait for all the rest.
        for start in range(0, len(fresh), _PART):
            part = fresh[start : start + _PART]
            looked |= zip(part, pool.map(look, part), strict=True)
            if start + _PART < len(fresh) and time.monotonic() - kept > _KEPT_SECONDS:
                keep()
                kept = time.monotonic()
    seconds = time.monotonic() - since
    if len(fresh) > _MANY:
        logger.warning("read them in %.0f s, %s images/s", seconds, f"{len(fresh) / seconds:,.0f}")
    found = [looked.get(number) or known[names[number], stamps[number]] for number in range(len(names))]
    if len(known) != sum(not entry.problem for entry in found) or any(not entry.problem for entry in looked.values()):
        keep()
    return found


def usable(data: bytes, path: Path | str) -> Decoded:
    """Returns the image of a file's contents if it counts as an image of a data set; `path` is named in the error.

    Raises:
        DataError: it cannot be read, is too small, or is a picture that we drew (the message then ends with DRAWN).
    """
    if is_drawn(data):
        raise DataError(f"{path} {DRAWN}")
    decoded = decode_image(data, path)
    height, width = decoded.pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(f"{path} is {height} x {width} pixels, smaller than {SMALLEST_SIDE}")
    return decoded


def look_at(read: Callable[[], bytes], path: Path | str, stamp: Stamp, label: int = NO_LABEL) -> Examined:
    """Returns the findings about an image file; a DataError about its contents becomes its problem.

    Args:
        read: function that returns the contents.
        path: what begins the message of an error.
        stamp: stamp of the file, before it was read.
        label: number of its class.

    Raises:
        UnreachableError: the disk or the network fails, which may end. Else --skip-corrupt would leave out good images.
    """
    try:
        data = read()
        pixels, orientation, kind = usable(data, path)
    except UnreachableError:
        raise
    except DataError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FAILURES:
            text = f"{error}; check the disk or the network and try again, or remove the file"
            raise UnreachableError(text) from error
        return Examined(stamp, problem=str(error).removeprefix(f"{path} "))
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(data).digest()
    moments = tuple(moments_of_image(pixels).ravel().tolist())
    return Examined(stamp, digest, orientation, height, width, moments, kind, label=label)


def kept_numbers(names: Sequence[str], found: Sequence[Examined], place: object, *, skip_corrupt: bool) -> list[int]:
    """Returns the numbers of the files that can be used; warns of the number of corrupt ones if they may be skipped.

    Raises:
        DataError: some are corrupt and may not be skipped, or all are; the message names the first.
    """
    corrupt = corrupt_files(names, found)
    kept = [number for number, entry in enumerate(found) if not entry.problem]
    if not corrupt:
        return kept
    count = f"{len(corrupt)} of {len(names)} image files of {place} cannot be used"
    if not skip_corrupt:
        raise DataError(
            f"{count}: {'; '.join(corrupt[:_NAMED])}{'; ...' if len(corrupt) > _NAMED else ''}. Repair or remove them, "
            "or leave them out with --skip-corrupt"
        )
    if len(corrupt) == len(names):
        raise DataError(f"{count}: none is left to train on; the first: {corrupt[0]}")
    logger.warning("%s and are left out", count)
    return kept


def corrupt_files(names: Sequence[str], found: Sequence[Examined]) -> list[str]:
    """Returns the files that cannot be used, each with the reason."""
    bad = [(name, entry) for name, entry in zip(names, found, strict=True) if entry.problem not in ("", DRAWN)]
    return [f"{name} {entry.problem}" for name, entry in bad]


def fields_of(names: Sequence[str], found: Sequence[Examined], kept: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of EncodedImages that are known by examination, of the files with the numbers `kept`."""
    orientations = np.array([found[number].orientation for number in kept], dtype=np.uint8)
    return dict(
        paths=tuple(names[number] for number in kept),
        heights=np.array([found[number].height for number in kept], dtype=np.int32),
        widths=np.array([found[number].width for number in kept], dtype=np.int32),
        file_sizes=np.array([found[number].stamp.size for number in kept], dtype=np.int64),
        moments=np.array([found[number].moments for number in kept], dtype=np.float64).reshape(-1, 2, 3),
        orientations=orientations if (orientations > 1).any() else None,
        digests=tuple(found[number].digest for number in kept),
        kinds=tuple(found[number].kind for number in kept),
        corrupt=tuple(corrupt_files(names, found)),
    )


def _write_index(path: Path, names: Sequence[str], found: Sequence[Examined]) -> None:
    """Writes the findings about intact files. Corrupt ones are left out: they may be readable at the next attempt."""
    kept = [(name, entry) for name, entry in zip(names, found, strict=True) if not entry.problem]
    named = np.frombuffer("\0".join(name for name, _ in kept).encode(errors="surrogateescape"), np.uint8)
    found = [entry for _, entry in kept]
    kinds = sorted({entry.kind for entry in found})
    codes = {kind: code for code, kind in enumerate(kinds)}
    numbers = [(*x.stamp, x.orientation, x.height, x.width, codes[x.kind]) for x in found]
    digests = np.frombuffer(b"".join(x.digest for x in found), np.uint8).reshape(-1, _DIGEST_BYTES)
    arrays: dict[str, NDArray[Any]] = dict(
        names=named,
        numbers=np.array(numbers, np.int64).reshape(-1, 8),
        moments=np.array([x.moments for x in found], np.float64).reshape(-1, 6),
        digests=digests,
        kinds=np.frombuffer(json.dumps(kinds).encode(), np.uint8),
        labels=np.array([x.label for x in found], np.int64),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    except OSError as error:  # the next run examines the files again
        logger.warning("what was seen of the images cannot be kept in %s (%s)", path, error)


def _read_index(path: Path) -> dict[tuple[str, Stamp], Examined]:
    """Returns findings by name and stamp; empty if the index is missing, damaged or an earlier version's."""
    try:
        with open_arrays(path) as file:
            names = file["names"].tobytes().decode(errors="surrogateescape").split("\0")
            numbers, moments = file["numbers"].tolist(), file["moments"].tolist()
            digests = file["digests"].reshape(-1, _DIGEST_BYTES)
            kinds = [Kind(*values) for values in json.loads(file["kinds"].tobytes())]
            # An index of an earlier version has no labels: it is of files, whose folders say them.
            labels = file["labels"].tolist() if "labels" in file else [NO_LABEL] * len(numbers)
        return {
            (name, Stamp(*at)): Examined(
                Stamp(*at), digest.tobytes(), orientation, height, width, tuple(row), kinds[code], label=label
            )
            for name, (*at, orientation, height, width, code), digest, row, label in zip(
                names, numbers, digests, moments, labels, strict=True
            )
        }
    except Exception:  # a damaged file makes numpy raise anything
        return {}
