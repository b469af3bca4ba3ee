"""folder:PATH: a user's own image files, of any size, labeled by subfolder or not."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mnclglf.config import FOLDER, DataConfig
from mnclglf.data.decoding import decode_image, orientation_of, read_file
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageFiles, moments_of
from mnclglf.data.sources.layout import few, find_images, find_splits, is_drawn, report_pictures
from mnclglf.data.sources.source import Request, Source, Stamp, cache_dir
from mnclglf.runs.files import write_atomically

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 8  # pixels
_DIGEST_BYTES = hashlib.sha256().digest_size
_NAMED = 5  # corrupt files named in a message
_DRAWN = "is a picture that mnclglf drew"
_MANY = 2000  # number of files from which on a message says that reading takes a while


class Folder(Source):
    """Source of the image files below a folder.

    Subfolders train and val (or test), in any usual spelling, hold the training and the test images; without them all
    images are for training.
    The first level of subfolders names the classes; files without subfolders have no labels.

    Args:
        name: folder:PATH.
    """

    quick_data = DataConfig(image_size=32)

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = Path(name.removeprefix(FOLDER)).expanduser()

    def load(self, request: Request) -> tuple[ImageFiles, ImageFiles | None]:
        if request.data_dir is not None:
            raise DataError(
                f"data_dir {request.data_dir} names a second folder beside {self.name}; leave out --data-dir, or give "
                f"{FOLDER}{request.data_dir}"
            )
        if not self.root.is_dir():
            raise DataError(
                f"{self.root} is not a folder; give the folder of your images as {FOLDER}PATH, and the new place of a "
                "run's images that were moved as --data-dir"
            )
        train_folder, test_folder = find_splits(self.root)
        train = self._image_set(train_folder, "train", request.skip_corrupt)
        if test_folder is None:
            return train, None
        test = self._image_set(test_folder, "test", request.skip_corrupt, classes=train.classes)
        counts = np.bincount(test.labels, minlength=len(train.classes)) if train.classes else np.ones(1)
        if not counts.all():
            absent = [name for name, count in zip(train.classes, counts, strict=True) if not count]
            logger.warning("%s has no image of %s, which is left out of the accuracy", test_folder, few(absent))
        return train, test

    def _image_set(
        self, root: Path, split: str, skip_corrupt: bool, *, classes: tuple[str, ...] | None = None
    ) -> ImageFiles:
        paths, labels, classes = find_images(root, classes)
        found = examine(root, paths)
        report_pictures(
            root, [root / path for path, entry in zip(paths, found, strict=True) if entry.problem == _DRAWN]
        )
        whole = np.array([not entry.problem for entry in found])
        if not all(entry.problem in ("", _DRAWN) for entry in found):
            _report_corrupt(root, paths, found, skip_corrupt)
        kept = [number for number in range(len(paths)) if whole[number]]
        unusable = set(labels) - {labels[number] for number in kept}
        if unusable and split == "train":
            names = few([classes[label] for label in sorted(unusable)]) if classes else "any"
            raise DataError(f"{root} has no image of class {names} that can be used; repair them, or remove its folder")
        orientations = np.array([found[number].orientation for number in kept], dtype=np.uint8)
        return ImageFiles(
            name=self.name,
            split=split,
            labels=np.array(labels, dtype=np.int64)[kept],
            classes=classes,
            root=root.resolve(),
            paths=tuple(paths[number] for number in kept),
            heights=np.array([found[number].height for number in kept], dtype=np.int32),
            widths=np.array([found[number].width for number in kept], dtype=np.int32),
            file_sizes=np.array([found[number].stamp.size for number in kept], dtype=np.int64),
            moments=np.array([found[number].moments for number in kept], dtype=np.float64).reshape(-1, 2, 3),
            orientations=orientations if (orientations > 1).any() else None,
            digests=tuple(found[number].digest for number in kept),
        )


@dataclass(frozen=True)
class Examined:
    """Findings about an image file."""

    stamp: Stamp
    digest: bytes = b""
    orientation: int = 1
    height: int = 0
    width: int = 0
    moments: tuple[float, ...] = (0.0,) * 6
    problem: str = ""


def examine(root: Path, paths: Sequence[str]) -> list[Examined]:
    """Decodes every image once and returns the findings.

    Findings about intact files are kept in `cache_dir("folder")` and used until a file's `stamp` differs.
    A damaged index is made again.
    """
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]
    index = cache_dir("folder") / f"{key}.npz"
    known, now = _read_index(index), [stamp(root / path) for path in paths]
    # Corrupt files are not in the index: they are examined again.
    fresh = [path for path, at in zip(paths, now, strict=True) if (path, at) not in known]
    if len(fresh) > _MANY:
        logger.warning("reading %s image files of %s, once, to check them", f"{len(fresh):,}", root)
    since = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL
        looked = dict(zip(fresh, threads.map(lambda path: _look(root / path), fresh), strict=True))
    if time.monotonic() - since > 60:
        logger.warning("read them in %.0f s", time.monotonic() - since)
    found = [looked.get(path) or known[path, at] for path, at in zip(paths, now, strict=True)]
    if len(known) != sum(not entry.problem for entry in found) or any(not looked[path].problem for path in fresh):
        _write_index(index, paths, found)
    return found


def stamp(path: Path) -> Stamp:
    """Returns the stamp of a file; zeros if it cannot be accessed."""
    try:
        return Stamp.of(path.stat())
    except OSError:
        return Stamp()


def _look(path: Path) -> Examined:
    before = stamp(path)
    try:
        data = read_file(path)
        if is_drawn(data):
            return Examined(before, problem=_DRAWN)
        pixels = decode_image(data, path)
    except DataError as error:
        return Examined(before, problem=str(error).removeprefix(f"{path} "))
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        return Examined(before, problem=f"is {height} x {width} pixels, smaller than {SMALLEST_SIDE}")
    counts = np.array(Image.fromarray(pixels).histogram(), dtype=np.float64).reshape(3, 256)
    digest = hashlib.sha256(data).digest()
    return Examined(
        before, digest, orientation_of(data), height, width, tuple(np.concatenate(moments_of(counts)).tolist())
    )


def _report_corrupt(root: Path, paths: Sequence[str], found: Sequence[Examined], skip: bool) -> None:
    """Warns of the number of corrupt files if they may be skipped; else raises DataError that names the first."""
    bad = [(path, entry) for path, entry in zip(paths, found, strict=True) if entry.problem not in ("", _DRAWN)]
    corrupt = [f"{path} {entry.problem}" for path, entry in bad]
    count = f"{len(corrupt)} of {len(paths)} image files of {root} cannot be used"
    if not skip:
        raise DataError(
            f"{count}: {'; '.join(corrupt[:_NAMED])}{'; ...' if len(corrupt) > _NAMED else ''}. Repair or remove them, "
            "or leave them out with --skip-corrupt"
        )
    if len(corrupt) == len(paths):
        raise DataError(f"{count}: none is left to train on; the first: {corrupt[0]}")
    logger.warning("%s and are left out", count)


def _write_index(path: Path, names: Sequence[str], found: Sequence[Examined]) -> None:
    """Writes the findings about intact files. Corrupt ones are left out: they may be readable at the next attempt."""
    kept = [(name, entry) for name, entry in zip(names, found, strict=True) if not entry.problem]
    named = np.frombuffer("\0".join(name for name, _ in kept).encode(errors="surrogateescape"), np.uint8)
    found = [entry for _, entry in kept]
    numbers = np.array([(*x.stamp, x.orientation, x.height, x.width) for x in found], np.int64).reshape(-1, 7)
    digests = np.frombuffer(b"".join(x.digest for x in found), np.uint8).reshape(-1, _DIGEST_BYTES)
    moments = np.array([x.moments for x in found], np.float64).reshape(-1, 6)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = dict(names=named, numbers=numbers, moments=moments, digests=digests)
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    except OSError as error:  # the next run examines the files again
        logger.warning("what was seen of the images cannot be kept in %s (%s)", path, error)


def _read_index(path: Path) -> dict[tuple[str, Stamp], Examined]:
    """Returns findings by path and stamp; empty if the index is missing, damaged or an earlier version's."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = file["names"].tobytes().decode(errors="surrogateescape").split("\0")
            numbers, moments = file["numbers"].tolist(), file["moments"].tolist()
            digests = file["digests"].reshape(-1, _DIGEST_BYTES)
        return {
            (name, Stamp(*at)): Examined(Stamp(*at), digest.tobytes(), orientation, height, width, tuple(row))
            for name, (*at, orientation, height, width), digest, row in zip(
                names, numbers, digests, moments, strict=True
            )
        }
    except Exception:  # a damaged file makes numpy raise anything
        return {}
