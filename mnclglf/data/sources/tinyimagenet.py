"""TinyImageNet-200: JPEG files, decoded once into an array that is mapped into memory."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import DataConfig
from mnclglf.data.archives import extract
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError, damaged, unreadable
from mnclglf.data.images import ImageArray
from mnclglf.data.sources.layout import is_visible
from mnclglf.data.sources.source import Request, Source, cache_dir, check_md5, download, missing
from mnclglf.data.stamp import Stamp
from mnclglf.runs.files import MOST_JSON, open_file, read_bytes, write_atomically

logger = logging.getLogger(__name__)

FOLDER = "tiny-imagenet-200"
ARCHIVE = "tiny-imagenet-200.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SIDE = 64
_VERIFIED_BYTES = 2**24  # bytes read at once for the checksum


class TinyImageNet(Source):
    """100,000 + 10,000 images of 200 classes, 64 x 64; the test images are the published validation images.

    A smaller folder in the same format is read as well.
    """

    name = "tinyimagenet"
    class_count = 200
    tuned = True
    quick_data = DataConfig(image_size=32, train_images=10_000)

    def load(self, request: Request) -> tuple[ImageArray, ImageArray]:
        folder = request.data_dir or cache_dir(self.name)
        root = _find(folder)
        if root is None and request.download:
            download([URL], folder / ARCHIVE, MD5)
            root = _find(folder)
        if root is None:
            raise missing("TinyImageNet", f"{FOLDER}/ or {ARCHIVE}", [folder], request)
        classes = _classes(root)
        train = [(path, label) for label, wnid in enumerate(classes) for path in _class_files(root, wnid)]
        names = _class_names(root, classes)
        return (
            self._image_set(root, "train", train, names),
            self._image_set(root, "test", _validation_files(root, classes), names),
        )

    def _image_set(
        self, root: Path, split: str, files: Sequence[tuple[Path, int]], classes: tuple[str, ...]
    ) -> ImageArray:
        images = decoded(root, split, [path for path, _ in files])
        labels = np.array([label for _, label in files], dtype=np.int64)
        return ImageArray(name=self.name, split=split, images=images, labels=labels, classes=classes)


def _find(folder: Path) -> Path | None:
    for root in (folder / FOLDER, folder):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    if (folder / ARCHIVE).is_file():
        check_md5(folder / ARCHIVE, MD5)
        return extract(folder / ARCHIVE, folder, FOLDER, ["train", "val"])
    return None


def _classes(root: Path) -> list[str]:
    """Returns the wnids, which are the folders of train/, sorted."""
    found = sorted(path.name for path in (root / "train").iterdir() if is_visible(path.name) and path.is_dir())
    if not found:
        raise damaged(root / "train", "holds no folder of a class")
    return found


def _class_files(root: Path, wnid: str) -> list[Path]:
    folder = root / "train" / wnid / "images"
    found = sorted(path for path in folder.glob("*.JPEG") if is_visible(path.name)) if folder.is_dir() else []
    if not found:
        raise damaged(folder, "holds no *.JPEG")
    return found


def _class_names(root: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    """Returns the first name of each class in words.txt; a class that is missing there keeps its wnid."""
    words: dict[str, str] = {}
    if (root / "words.txt").is_file():
        lines = _read_lines(root / "words.txt")
        words = {key: names.split(",")[0].strip() for key, tab, names in (x.partition("\t") for x in lines) if tab}
    return tuple(words.get(wnid) or wnid for wnid in wnids)


def _validation_files(root: Path, wnids: Sequence[str]) -> list[tuple[Path, int]]:
    path, labels = root / "val" / "val_annotations.txt", {wnid: label for label, wnid in enumerate(wnids)}
    found: list[tuple[Path, int]] = []
    for number, line in enumerate(_read_lines(path), start=1):
        name, tab, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not tab or wnid not in labels:
            raise damaged(path, f"line {number}, {line[:80]!r}, does not name a file and a class of train/")
        if "/" in name or name.startswith(".") or "\0" in name:
            raise damaged(path, f"line {number} names the file {name[:80]!r}, which is not one of val/images")
        found.append((root / "val" / "images" / name, labels[wnid]))
    if not found:
        raise damaged(path, "names no image")
    return sorted(found)


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in read_bytes(path, MOST_JSON).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def decoded(root: Path, split: str, files: Sequence[Path]) -> NDArray[np.uint8]:
    """Returns the images of these files, uint8 [n, 64, 64, 3], mapped into memory from an array file.

    The array file lies beside the image files, or in `cache_dir` if their folder is read-only. A note beside it names
    its sources and its checksum. If either does not match, the array file is made again.
    """
    try:
        listed = [(str(path.relative_to(root)), *Stamp.of(path.stat())) for path in files]
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise unreadable(Path(error.filename), error) from error
        raise damaged(root, f"lacks an image that it lists ({error})") from error
    made_of = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    writable = os.access(root, os.W_OK)
    own = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    folder = root if writable else cache_dir("tinyimagenet") / own
    array, note = folder / f"decoded-{split}.npy", folder / f"decoded-{split}.json"
    whole = _mapped(array, note, made_of, len(files))
    if whole is not None:
        return whole
    logger.warning("decoding %s images of TinyImageNet into %s, once", f"{len(files):,}", array)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        checksum = _Checksum()
        write_atomically(array, lambda file: _write(file, files, checksum))
        text = json.dumps({"made_of": made_of, "crc32": checksum.value})
        write_atomically(note, lambda file: file.write(text.encode()))
    except OSError as error:
        raise DataError(
            f"{array} cannot be written ({error}); it takes {len(files) * SIDE * SIDE * 3:,} bytes: make room there"
        ) from error
    whole = _mapped(array, note, made_of, len(files))
    if whole is None:
        raise DataError(f"{array} is not what was just written there; is another program writing to it? Try again")
    return whole


class _Checksum:
    """Running CRC-32 of the data added."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, data: Any) -> None:
        self.value = zlib.crc32(data, self.value)


def _write(file: BinaryIO, files: Sequence[Path], checksum: _Checksum) -> None:
    file.write(_header(len(files)))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without the GIL
        for pixels in threads.map(_read_square, files):
            data = pixels.tobytes()
            checksum.add(data)
            file.write(data)


def _header(count: int) -> bytes:
    """Returns the header of a numpy file of this many images."""
    stream = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _map(array: Path, count: int) -> NDArray[np.uint8]:
    """Returns the images of the file, mapped copy-on-write."""
    return np.memmap(array, np.uint8, mode="c", offset=len(_header(count)), shape=(count, SIDE, SIDE, 3))


def _read_square(path: Path) -> NDArray[np.uint8]:
    pixels = read_image(path)
    if pixels.shape != (SIDE, SIDE, 3):
        raise damaged(path, f"is an image of {pixels.shape[0]} x {pixels.shape[1]} where {SIDE} x {SIDE} is expected")
    return pixels


def _mapped(array: Path, note: Path, made_of: str, count: int) -> NDArray[np.uint8] | None:
    """Returns the array if it is intact and made from these files, else None."""
    try:
        noted, header = json.loads(read_bytes(note, MOST_JSON)), _header(count)
        with open_file(array) as file:
            as_expected = file.read(len(header)) == header
        whole = array.stat().st_size == len(header) + count * SIDE * SIDE * 3
        if not as_expected or not whole or noted["made_of"] != made_of:
            return None
        images = _map(array, count)
        checksum, flat = _Checksum(), images.reshape(-1)
        for start in range(0, len(flat), _VERIFIED_BYTES):
            checksum.add(flat[start : start + _VERIFIED_BYTES])
        return images if checksum.value == noted["crc32"] else None
    except Exception:  # missing, or damaged in any way: it is made again
        return None
