"""folder:PATH: a user's own image files, of any size, labeled by subfolder or not."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mnclglf.config import FOLDER, DataConfig
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageFiles, moments_of
from mnclglf.data.sources.source import Request, Source, Stamp, cache_dir
from mnclglf.runs.files import write_atomically

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST_SIDE = 8  # pixels
_DIGEST_BYTES = hashlib.sha256().digest_size
_NAMED = 5  # corrupt files named in a message
_MANY = 2000  # number of files from which on a message says that reading takes a while


class Folder(Source):
    """Source of the image files below a folder.

    Subfolders train and val (or test) hold the training and the test images; without them all images are for training.
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
        parts = [name for name in ("train", "val", "test") if (self.root / name).is_dir()]
        if parts == ["train"] and len([path for path in self.root.iterdir() if path.is_dir()]) == 1:
            return self._image_set(self.root / "train", "train", request.skip_corrupt), None
        if "train" not in parts or len(parts) == 1:
            return self._image_set(self.root, "train", request.skip_corrupt), None
        if len(parts) == 3:
            logger.warning("%s has val and test: evaluating on val", self.root)
        train = self._image_set(self.root / "train", "train", request.skip_corrupt)
        test = self._image_set(self.root / parts[1], "test", request.skip_corrupt)
        if train.classes != test.classes:
            differing = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(
                f"{self.root}: train and {parts[1]} have other classes, {', '.join(differing[:_NAMED])}; give both the "
                "same subfolders"
            )
        return train, test

    def _image_set(self, root: Path, split: str, skip_corrupt: bool) -> ImageFiles:
        paths, labels, classes = find_images(root)
        found = examine(root, paths)
        whole = np.array([not entry.problem for entry in found])
        if not whole.all():
            _report_corrupt(root, paths, found, skip_corrupt)
        kept = [number for number in range(len(paths)) if whole[number]]
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
            digests=tuple(found[number].digest for number in kept),
        )


def find_images(root: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Returns the paths of the images relative to `root`, their labels, and the classes (none without subfolders).

    Raises:
        DataError: there is no image, a subfolder has no image, or images lie beside subfolders.
    """
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [path for path in entries if path.is_dir()]
    loose = [path.name for path in entries if _is_image(path)]
    if not folders:
        if not loose:
            raise DataError(f"{root} holds no image; {', '.join(SUFFIXES)} are read")
        return loose, [-1] * len(loose), ()
    if loose:
        raise DataError(
            f"{root} holds {loose[0]} beside the folder {folders[0].name}: move the images into folders, one a class, "
            "or the folders away, for images without labels"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        others = {os.path.realpath(path) for path in (root, *folders) if path != folder}
        inside = sorted(str(path.relative_to(root)) for path in _walk(folder, others))
        if not inside:
            raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)}); fill it or remove it")
        paths += inside
        labels += [label] * len(inside)
    return paths, labels, tuple(folder.name for folder in folders)


def _is_image(path: Path) -> bool:
    """Returns whether the name is that of an image; a broken link counts, and is later reported as corrupt."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _walk(folder: Path, others: set[str]) -> Iterator[Path]:
    """Yields the images below a folder; follows links, but enters each real folder once and no other class's folder.

    Raises:
        DataError: a folder cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or move it away")

    seen = set(others)
    for at, inner, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(at)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (path for path in (Path(at, name) for name in files) if _is_image(path))


@dataclass(frozen=True)
class Examined:
    """Findings about an image file."""

    stamp: Stamp
    digest: bytes = b""
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
        pixels = read_image(path)
        digest = hashlib.sha256(path.read_bytes()).digest()
    except (DataError, OSError) as error:
        return Examined(before, problem=str(error).removeprefix(f"{path} "))
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        return Examined(before, problem=f"is {height} x {width} pixels, smaller than {SMALLEST_SIDE}")
    counts = np.array(Image.fromarray(pixels).histogram(), dtype=np.float64).reshape(3, 256)
    return Examined(before, digest, height, width, tuple(np.concatenate(moments_of(counts)).tolist()))


def _report_corrupt(root: Path, paths: Sequence[str], found: Sequence[Examined], skip: bool) -> None:
    """Warns of the number of corrupt files if they may be skipped; else raises DataError that names the first."""
    corrupt = [f"{path} {entry.problem}" for path, entry in zip(paths, found, strict=True) if entry.problem]
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
    numbers = np.array([(*x.stamp, x.height, x.width) for x in found], np.int64).reshape(-1, 6)
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
            (name, Stamp(*at)): Examined(Stamp(*at), digest.tobytes(), height, width, tuple(row))
            for name, (*at, height, width), digest, row in zip(names, numbers, digests, moments, strict=True)
        }
    except Exception:  # a damaged file makes numpy raise anything
        return {}
