"""Parquet files of images, as the Hugging Face hub stores them: their columns, and their images laid end to end.

An image within a Parquet file cannot be read alone: it lies in a compressed page among hundreds of others. So the
contents of the image files are written into a file of their own once, from which they are read in any order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import shown
from mnclglf.data.errors import DataError
from mnclglf.data.ranges import RangeFile
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.files import write_atomically

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

NULL = np.iinfo(np.int64).min
"""Label of a row without one."""
NO_IMAGE, ONLY_PATH = -1, -2
"""In place of the size of an image: the row has none, or only the path of one."""

_MAGIC, _ENCRYPTED, _POINTER = b"PAR1", b"PARE", b"version https://git-lfs"
_READ_BYTES = 2**20  # of a column at once
_MOST_TIMES = 64  # that images may take more than the file says; it holds equal ones once
_MOST_ROWS = 2**20  # beyond one per byte of the file
_LABELS = ("label", "labels")


class Columns(NamedTuple):
    """The columns that are read."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None
    """Names of the classes by number, where the file says them."""


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """What is known of the rows of a Parquet file whose images were unpacked."""

    sizes: NDArray[np.int64]
    """Bytes [n] of each image, which lie end to end; NO_IMAGE or ONLY_PATH without one."""
    labels: NDArray[np.int64]
    """Labels [n] as the file has them; numbers in `classes` if the file has text; NULL without one."""
    classes: tuple[str, ...] | None
    """Names of the classes by number, None if there are only numbers."""

    @property
    def file_bytes(self) -> int:
        """Returns the size of the file of the images."""
        return int(np.maximum(self.sizes, 0).sum())

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        classes = np.frombuffer(json.dumps(self.classes).encode(), np.uint8)
        arrays: dict[str, NDArray[Any]] = dict(sizes=self.sizes, labels=self.labels, classes=classes)
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_unpacked(path: Path, images: Path) -> Unpacked | None:
    """Returns what `Unpacked.save` wrote; None if that, or the file of the images, is missing or damaged."""
    try:
        with open_arrays(path) as file:
            classes = json.loads(file["classes"].tobytes())
            found = Unpacked(
                sizes=file["sizes"], labels=file["labels"], classes=None if classes is None else tuple(classes)
            )
        return found if images.stat().st_size == found.file_bytes else None
    except Exception:  # a damaged file makes numpy raise anything
        return None


def unpacked_bytes(file: RangeFile) -> int:
    """Returns about how many bytes the images of a Parquet file have, from what it says of itself.

    Raises:
        DataError: it cannot be read, or is no Parquet file.
    """
    with _opened(file) as parquet:
        return _told_bytes(parquet)


def unpack(file: RangeFile, out: Path) -> Unpacked:
    """Writes the images of a Parquet file end to end into `out`, whole or not at all; returns its other contents.

    Raises:
        DataError: the file cannot be read, is damaged, or has not one column of images.
        OSError: `out` cannot be written.
    """
    place = shown(file.name)
    rows = _Rows()
    with _opened(file) as parquet:
        columns = find_columns(parquet.schema_arrow, place)
        write_atomically(out, lambda written: _write(parquet, columns, written, rows, place))
    if rows.sizes and all(size == ONLY_PATH for size in rows.sizes):
        out.unlink()
        raise DataError(
            f"{place}: the column {columns.image!r} has paths of images, as {rows.path!r:.80}, and no bytes; write the "
            "bytes into it (datasets: embed_external_files), or give the image files as folder:PATH"
        )
    names, labels = columns.classes, np.array(rows.labels, np.int64)
    if rows.codes:
        names = tuple(sorted(rows.codes))
        number = {rows.codes[name]: at for at, name in enumerate(names)} | {NULL: NULL}
        labels = np.array([number[code] for code in rows.labels], np.int64)
    return Unpacked(sizes=np.array(rows.sizes, np.int64), labels=labels, classes=names)


def _told_bytes(parquet: pq.ParquetFile) -> int:
    """Returns how many bytes the file says that it holds, uncompressed, of all columns."""
    # Asking for a column that is encrypted would abort the process (pyarrow 26).
    metadata = parquet.metadata
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


class _Rows:
    """What is known of the rows so far."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.labels: list[int] = []
        self.codes: dict[str, int] = {}
        """Numbers of labels that are text, in the order in which they came."""
        self.path: object = None
        """A path of an image without bytes."""

    def add(self, values: list[Any]) -> list[bytes]:
        """Notes the images of some rows, and returns those that have bytes."""
        found: list[bytes] = []
        for value in values:
            data = cast("dict[str, Any]", value).get("bytes") if isinstance(value, dict) else value
            if data is not None:
                found.append(data)
                self.sizes.append(len(data))
                continue
            path = cast("dict[str, Any]", value).get("path") if isinstance(value, dict) else None
            self.path = path or self.path
            self.sizes.append(ONLY_PATH if path else NO_IMAGE)
        return found

    def add_labels(self, values: list[Any]) -> None:
        for value in values:
            known = self.codes.setdefault(value, len(self.codes)) if isinstance(value, str) else value
            self.labels.append(NULL if value is None else int(known))


def _write(parquet: pq.ParquetFile, columns: Columns, written: BinaryIO, rows: _Rows, place: str) -> None:
    told = _told_bytes(parquet)
    for batch in _batches(parquet, columns, place):
        written.writelines(rows.add(batch[0]))
        rows.add_labels(batch[1])
        if written.tell() > _MOST_TIMES * told + _READ_BYTES:
            raise DataError(f"{place} tells of {told:,} bytes and has images of {written.tell():,}; write it anew")


def _batches(parquet: pq.ParquetFile, columns: Columns, place: str) -> Generator[tuple[list[Any], list[Any]]]:
    """Yields images and labels of some rows at a time, so many that they fit into little memory."""
    import pyarrow as pa

    wanted = [columns.image, *([columns.label] if columns.label else [])]
    with _named(place):
        # One at a time, which costs 7 µs per row: a file may hold a large image once and name it in every row.
        for batch in parquet.iter_batches(1, columns=wanted, use_threads=False):
            images = batch.column(columns.image).to_pylist()
            labels = [-1] * len(images)
            if columns.label is not None:
                column = batch.column(columns.label)
                plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
                text = pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type)
                labels = (plain if text else plain.cast(pa.int64())).to_pylist()
            yield images, labels


@contextmanager
def _opened(file: RangeFile) -> Generator[pq.ParquetFile]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{shown(file.name)} needs the package pyarrow ({error}): pip install 'mnclglf[parquet]'"
        ) from error
    place = shown(file.name)
    _check_ends(file, place)
    with _named(place):
        # pre_buffer, the default, holds a whole row group: one of 0.8 GB took 1.6 GB of memory, and takes 0.7 GB so.
        parquet = pq.ParquetFile(cast(Any, _Reader(file)), buffer_size=_READ_BYTES, pre_buffer=False)
    with parquet:
        rows, size = parquet.metadata.num_rows, file.stamp.size
        if rows > size + _MOST_ROWS:  # empty ones take next to nothing
            raise DataError(f"{place} tells of {rows:,} rows and has {size:,} bytes; fetch it again, or write it anew")
        yield parquet


def _check_ends(file: RangeFile, place: str) -> None:
    """Raises DataError unless a file begins and ends as Parquet does."""
    start = file.read(0, len(_POINTER), near=False)
    if start.startswith(_POINTER):
        raise DataError(f"{place} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`")
    if start.startswith(_ENCRYPTED):
        raise DataError(f"{place} is encrypted; give a file that is not")
    if not start.startswith(_MAGIC):
        raise DataError(f"{place} is no Parquet file: it begins with {start[:12]!r}; fetch it again")
    size = file.stamp.size
    if size < 3 * len(_MAGIC) or file.read(size - len(_MAGIC), len(_MAGIC), near=False) != _MAGIC:
        raise DataError(f"{place} is cut: it does not end as Parquet does, after {size:,} bytes; fetch it again")


@contextmanager
def _named(place: str) -> Generator[None]:
    """Turns what pyarrow raises of a damaged file, which may be anything, into an error that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "give a file that is not encrypted" if "crypt" in text else "fetch it again, or write it anew"
        raise DataError(f"{place} cannot be read as Parquet ({text:.200}); {remedy}") from error


class _Reader(io.RawIOBase):
    """The file as pyarrow reads it."""

    def __init__(self, file: RangeFile) -> None:
        self.file, self.at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.stamp.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(self.at, size if size >= 0 else self.file.stamp.size - self.at)
        self.at += len(data)
        return data


def find_columns(schema: pa.Schema, place: str) -> Columns:
    """Returns the columns of the images and of the labels.

    The features in the metadata `huggingface` say which they are. Without them images are a struct with bytes, else a
    binary column, and labels are a column of that name.

    Raises:
        DataError: there is not one column of images, or not one of labels.
    """
    import pyarrow as pa

    types: list[tuple[str, pa.DataType]] = [(field.name, field.type) for field in schema]
    features = _features(schema.metadata or {})
    kinds = {name: feature.get("_type") for name, feature in features.items()}
    images = (
        [name for name, kind in types if kinds.get(name) == "Image" and _holds_image(kind)]
        or [name for name, kind in types if _holds_image(kind) and pa.types.is_struct(kind)]
        or [name for name, kind in types if _holds_image(kind)]
    )
    if len(images) != 1:
        raise DataError(_no_image(place, images, types))
    numbered = [name for name, _ in types if kinds.get(name) == "ClassLabel"]
    labels = numbered or [name for name, _ in types if name in _LABELS]
    labels = [name for name in labels if name == _LABELS[0]] or labels
    if len(labels) > 1:
        raise DataError(
            f"{place} has several columns of labels, {', '.join(map(repr, labels))}; rename the one to use to 'label'"
        )
    label = labels[0] if labels else None
    if label is not None:
        _check_label(place, label, dict(types)[label])
    names = features.get(label or "", {}).get("names")
    named = isinstance(names, list) and all(isinstance(name, str) for name in cast("list[Any]", names))
    return Columns(images[0], label, tuple(cast("list[str]", names)) if named and names else None)


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Returns what datasets wrote of each column; nothing if there is nothing."""
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _holds_image(kind: pa.DataType) -> bool:
    """Returns whether a column of this type may hold the contents of image files."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_image(field.type) for field in cast("pa.StructType", kind))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _no_image(place: str, images: list[str], types: list[tuple[str, pa.DataType]]) -> str:
    import pyarrow as pa

    if images:
        return (
            f"{place} has several columns of images, {', '.join(map(repr, images))}; keep one of them "
            "(pyarrow: table.drop_columns)"
        )
    for name, kind in types:
        if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_image(cast(Any, kind).value_type):
            return f"{place}: the column {name!r} has lists of images; write one image per row"
    listed = ", ".join(f"{name}: {kind}" for name, kind in types)
    return (
        f"{place} has no column of images among {listed:.200}; such a column is a struct of bytes and path, or binary"
    )


def _check_label(place: str, name: str, kind: pa.DataType) -> None:
    """Raises DataError unless labels can be of a type."""
    import pyarrow as pa

    plain = cast("pa.DictionaryType", kind).value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_it(plain) for is_it in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        raise DataError(
            f"{place}: the column {name!r} has {kind}; a label is one whole number or one text per image: write such a "
            "column, or drop this one"
        )
