"""Safe readers of downloaded files: they run no code from a file, write nowhere else and check all they read.

A file that is short, corrupt, too large or in another format raises DataError, which names it and the remedy.
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import pickle
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from mnclglf.data.errors import DataError, damaged, unreadable
from mnclglf.data.tars import MOST_META
from mnclglf.runs.files import open_file, read_at_most

LARGEST_BYTES = 2**30  # limit of a file read here, unpacked: five times the largest in use
LARGEST_IDX = 2**28  # the same of an IDX file
CIFAR_SHAPE = (3, 32, 32)
_IDX_UINT8 = 0x08
_GZIP_ERRORS = (OSError, EOFError, zlib.error)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Returns the array of an IDX file of bytes (the MNIST family's format); a name in .gz is unzipped.

    Raises:
        DataError: the file is missing, damaged, not of bytes, or its length differs from its header's.
    """
    try:
        with open_file(path) as opened, gzip.open(opened) if path.suffix == ".gz" else opened as file:
            shape = _read_idx_shape(file, path)
            size = math.prod(shape)
            if size > LARGEST_IDX:
                raise damaged(path, f"its header promises {size:,} bytes, more than {LARGEST_IDX:,}")
            data = read_at_most(file, size + 1)
    except _GZIP_ERRORS as error:
        raise unreadable(path, error) from error
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data):,}"
        raise damaged(path, f"its header promises {size:,} bytes and it holds {found}")
    try:
        return np.frombuffer(data, np.uint8).reshape(shape)
    except ValueError as error:  # more axes than numpy has, or too long ones beside one of 0
        raise damaged(path, f"its header promises an array of {len(shape)} axes ({error})") from error


def _read_idx_shape(file: BinaryIO | gzip.GzipFile, path: Path) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != bytes([0, 0, _IDX_UINT8]):
        raise damaged(path, f"starts with {magic.hex()}: not an IDX file of bytes (000008..)")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise damaged(path, "ends within its header")
    return struct.unpack(f">{magic[3]}I", sizes)


def read_cifar_binary(
    path: Path, records: int, *, classes: int = 10, label_bytes: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns images [records, 32, 32, 3] and labels [records] of a file of CIFAR's binary version.

    A record is `label_bytes` bytes of labels, of which the last is used, and 3,072 bytes of pixels: 1,024 of red row by
    row, then green, then blue.

    Raises:
        DataError: the file is missing, does not hold exactly this many records, or has a label out of range.
    """
    record_bytes = label_bytes + math.prod(CIFAR_SHAPE)
    data = np.frombuffer(_read_exactly(path, records * record_bytes), np.uint8).reshape(records, record_bytes)
    labels = data[:, label_bytes - 1].tolist()
    return _cifar_images(data[:, label_bytes:]), _cifar_labels(labels, classes, path)


def read_cifar_pickle(
    path: Path, records: int, *, classes: int = 10, key: bytes = b"labels"
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns images [records, 32, 32, 3] and labels [records], those at `key`, of a file of CIFAR's Python version.

    Raises:
        DataError: the file is missing, damaged, holds anything but arrays, bytes and plain containers, or does not hold
            exactly this many records.
    """
    batch = read_pickle(path)
    if not isinstance(batch, dict):
        raise damaged(path, f"holds a {type(batch).__name__} where a dict should be")
    data, labels = batch.get(b"data"), batch.get(key)
    shape = (records, math.prod(CIFAR_SHAPE))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != shape:
        raise damaged(path, f"its b'data' is not a uint8 array of shape {shape}")
    if not isinstance(labels, list) or len(labels) != records or not all(type(label) is int for label in labels):
        raise damaged(path, f"its {key} is not a list of {records} integers")
    return _cifar_images(data), _cifar_labels(labels, classes, path)


def _cifar_images(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(planes.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1))


def _cifar_labels(labels: list[int], classes: int, path: Path) -> NDArray[np.int64]:
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise damaged(path, f"has labels from {min(labels)} to {max(labels)}, outside 0..{classes - 1}")
    return np.array(labels, dtype=np.int64)


def _read_exactly(path: Path, size: int) -> bytes:
    try:
        with open_file(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found == size:
                return file.read()
    except OSError as error:
        raise unreadable(path, error) from error
    raise damaged(path, f"has {found:,} bytes where {size:,} are expected")


def read_pickle(path: Path, largest: int = LARGEST_BYTES) -> Any:
    """Returns the contents of a pickle of numpy arrays, bytes, numbers and plain containers.

    Python 2 strings become bytes. Of the names in the file, only those that make numeric arrays are called.

    Raises:
        DataError: the file is missing, damaged, larger than `largest` bytes, or names anything else.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                raise damaged(path, f"has {size:,} bytes, more than {largest:,}")
            return _ArrayUnpickler(io.BytesIO(file.read()), encoding="bytes").load()
    except DataError:
        raise
    except PermissionError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a damaged pickle raises anything: IndexError, MemoryError, KeyError, ...
        raise damaged(path, f"is not a pickle of plain arrays ({type(error).__name__}: {error})") from error


class _ArrayUnpickler(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage]
    """Unpickler that admits only numeric numpy arrays, made by the functions below instead of numpy's own.

    It derives from the unpickler in Python: the one in C reserves memory for the sizes that a file claims, up to 16 GB
    from a few bytes (found by fuzzing). BYTEARRAY8 does so in both, so it is removed; no version of CIFAR uses it.
    """

    dispatch = {  # noqa: RUF012  # pickle's own form
        code: load
        for code, load in pickle._Unpickler.dispatch.items()  # pyright: ignore[reportPrivateUsage]
        if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        known = module.replace("numpy._core.", "numpy.core.")  # its name since numpy 2
        try:
            return _ADMITTED[known, name]
        except KeyError:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is not admitted") from None


def _text(value: str | bytes) -> str:
    """Returns a name as a string; names in a Python 2 pickle arrive as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else value


def _make_dtype(code: str | bytes, *_: object) -> np.dtype[Any]:
    made = np.dtype(_text(code))
    if made.kind not in "biuf":
        raise pickle.UnpicklingError(f"has an array of {made}, which is not a plain number")
    # A copy: the pickle sets its byte order next, which numpy's built-in dtypes refuse.
    return np.dtype(made, copy=True)


def _make_array(*_: object) -> NDArray[Any]:
    """Returns an empty array; the pickle sets its type, shape and contents next."""
    return np.empty(0, np.uint8)


def _make_scalar(dtype: np.dtype[Any], data: bytes) -> np.generic:
    return np.frombuffer(data, dtype, count=1)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Returns bytes from text: Python 3 writes them so in the protocols that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encodes as {encoding!r}")
    return text.encode("latin1")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _make_array,
    ("numpy.core.multiarray", "scalar"): _make_scalar,
    ("numpy", "ndarray"): None,  # only named, as an argument of _reconstruct
    ("numpy", "dtype"): _make_dtype,
    ("_codecs", "encode"): _encode,
}


def extract(archive: Path, folder: Path, member: str, holds: Sequence[str]) -> Path:
    """Extracts the folder `member` of a tar or zip file into `folder`, whole or not at all, and returns its path.

    Only plain files and folders are admitted, and none outside `folder`; owners and special modes are dropped. If
    `member` exists with all that it `holds`, another process was faster and nothing is done.

    Raises:
        DataError: the archive is damaged, too large, holds anything else, or cannot be extracted to the disk.
    """
    if (folder / member).exists():
        if all((folder / member / name).exists() for name in holds):
            return folder / member
        raise DataError(f"{folder / member} is there and not whole; remove it, so that {archive.name} can be unpacked")
    unpack = _unpack_zip if archive.suffix == ".zip" else _unpack_tar
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{archive.name}.") as temporary:
            unpack(archive, Path(temporary))
            made = Path(temporary, member)
            if not made.is_dir():
                raise damaged(archive, f"holds no folder {member}")
            return made.rename(folder / member)
    except DataError:
        raise
    except PermissionError as error:
        if error.filename == str(archive):
            raise unreadable(archive, error) from error
        raise DataError(f"{archive} cannot be extracted into {folder} ({error}); extract it there by hand") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{archive} cannot be extracted into {folder} ({error}); make room there") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
            return folder / member
        raise damaged(archive, f"cannot be extracted into {folder} ({error})") from error
    except Exception as error:  # a damaged archive raises anything: TarError, BadZipFile, struct.error, ...
        raise damaged(archive, f"cannot be extracted into {folder} ({type(error).__name__}: {error})") from error


def _unpack_tar(archive: Path, folder: Path) -> None:
    # tarfile must not guess the compression: its xz reader reserves the memory that the first bytes of a file ask for.
    with (
        open_file(archive) as opened,
        gzip.open(opened) if archive.suffix == ".gz" else opened as file,
        tarfile.open(fileobj=cast(Any, _InParts(file)), mode="r:") as tar,
    ):
        members: list[tarfile.TarInfo] = []
        total = 0
        for member in tar:  # checked one by one: to find the next, tarfile reads past this one's contents
            total += member.size
            _check_size(archive, total)
            if not (member.isfile() or member.isdir()):
                raise damaged(archive, f"holds {member.name}, which is neither a file nor a folder")
            members.append(member)
        tar.extractall(folder, members=members, filter="data")


class _InParts:
    """A file of which tarfile reads no more at once than it should: the length of a long name is in the archive."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MOST_META:
            raise ValueError(f"a name or its notes have {size:,} bytes")
        return self.file.read(size)


def _unpack_zip(archive: Path, folder: Path) -> None:
    with open_file(archive) as opened, zipfile.ZipFile(opened) as file:
        members = file.infolist()
        _check_size(archive, sum(member.file_size for member in members))
        for member in members:
            name, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
            if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
                raise damaged(archive, f"holds {member.filename}, which points outside")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise damaged(archive, f"holds {member.filename}, which is neither a file nor a folder")
        file.extractall(folder)


def _check_size(archive: Path, total: int) -> None:
    if total > LARGEST_BYTES:
        raise damaged(archive, f"unpacks to {total:,} bytes, more than {LARGEST_BYTES:,}")
