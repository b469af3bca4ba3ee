"""Files of embeddings, .npy, .parquet or .npz, written row by row; what was written survives the end of the process.

Beside the file FILE lies FILE.json, which says what the embeddings were made of; a .npy has its names in FILE.csv.
While rows are written they are in FILE.partial, which is a .npy but for the count in its header, and FILE.partial.json
counts them.
"""

# n rows, F feature width

from __future__ import annotations

import csv
import io
import json
import os
import time
import zipfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import require
from mnclglf.data.listing import Listing
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.files import read_object, write_atomically, write_json

FORMAT = 1
SUFFIXES = (".npy", ".parquet", ".npz")
GROUP_ROWS = 16384  # rows written at once: 32 MB of 512 features
SAVE_SECONDS = 5.0  # between two records of what is done
_HEADER_BYTES = 128
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip holds: the same rows make the same bytes


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the rows of a file were made of."""

    encoder: str
    """Hash of the encoder and of how its images are prepared."""
    run: str
    """Run directory."""
    source: str
    """Name of the images' source."""
    features: int
    """Feature width F."""
    images: int = 0
    """Images done, in the order of the source; those left out count."""
    fingerprint: str = ""
    """Hash of the names, classes and states of these images."""
    left_out: tuple[tuple[int, str], ...] = field(default=())
    """Row in the source and problem of each image without a row here."""
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Returns the number of rows n."""
        return self.images - len(self.left_out)

    def kept(self) -> Iterator[int]:
        """Yields the source's row of each row."""
        absent = {row for row, _ in self.left_out}
        return (row for row in range(self.images) if row not in absent)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Origin:
        """Returns the origin whose fields were written as JSON."""
        others = dict(values)
        left_out = tuple((int(row), str(problem)) for row, problem in others.pop("left_out"))
        return cls(**others, left_out=left_out)

    @classmethod
    def read(cls, path: Path) -> Origin | None:
        """Reads an origin; None if there is no file, or one of another version.

        Raises:
            ValueError: the file is damaged; the message names the remedy.
        """
        try:
            values = read_object(path)
            return None if values is None or values.get("format") != FORMAT else cls.of(values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and the embeddings are made anew") from error


def beside(path: Path, ending: str) -> Path:
    """Returns the path with an ending after its suffix: photos.npy.json."""
    return path.with_name(f"{path.name}.{ending}")


def check_out(out: Path) -> None:
    """Raises UsageError or ImportError unless embeddings can be written under this name."""
    require(
        out.suffix in SUFFIXES,
        f"--out {out} must end in .npy, .parquet or .npz, which says what is written, not {out.suffix!r}",
    )
    require(not out.is_dir(), f"{out} is a folder; give the name of a file, as {out / 'embeddings.npy'}")
    if out.suffix == ".parquet":
        require_pyarrow()


def require_pyarrow() -> None:
    """Raises ImportError unless pyarrow is installed."""
    if find_spec("pyarrow") is None:
        raise ImportError(
            "a .parquet file needs the package pyarrow, which is not installed: pip install 'mnclglf[parquet]'; or "
            "choose a name that ends in .npy or .npz"
        )


class EmbeddingFile:
    """A file of embeddings on its way; `append` and `finish` it.

    Args:
        out: the file.
        origin: what its rows are made of; `images` and what follows from it are of the rows that are kept.
    """

    def __init__(self, out: Path, origin: Origin) -> None:
        self.out, self.origin = out, origin
        self.partial, self.state = beside(out, "partial"), beside(out, "partial.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        self.partial.touch()
        self.file = self.partial.open("r+b")
        self.file.truncate(self._bytes)  # of a killed process: rows that were not counted any more
        self.file.seek(self._bytes)
        self.save()  # now: a count of other rows, of an earlier process, must not meet these

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which was said; what is not saved does not count
            self.file.close()

    @property
    def _bytes(self) -> int:
        return _HEADER_BYTES + 4 * self.origin.rows * self.origin.features

    def append(self, rows: NDArray[np.float32], origin: Origin) -> None:
        """Adds rows, after which the file is that of `origin`.

        Raises:
            OSError: the disk is full, or the file cannot be written; what was saved before stays.
        """
        with self._explained():
            self.file.write(rows.astype("<f4", copy=False).tobytes())
        self.origin = origin
        if time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Records what is done; a process that is killed after it loses nothing of it."""
        with self._explained():
            self.file.flush()
            os.fsync(self.file.fileno())  # before the count: rows that are counted are on the disk
            write_json(self.state, asdict(self.origin))
        self.saved_at = time.monotonic()

    @contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Adds the file and the remedy to an error of the system."""
        try:
            yield
        except OSError as error:
            problem = f"{error.strerror}; what was saved is kept: free space, and the same command goes on"
            raise OSError(error.errno, problem, str(error.filename or self.partial)) from error

    def finish(self, listing: Listing) -> None:
        """Puts the whole file in its place.

        A process that is killed in between does the same again: the partial file goes last.
        """
        self.file.seek(0)
        self.file.write(npy_header(self.origin.rows, self.origin.features))
        self.save()
        rows = np.memmap(self.partial, "<f4", "r", _HEADER_BYTES, (self.origin.rows, self.origin.features))
        write_json(beside(self.out, "json"), asdict(self.origin))
        if self.out.suffix == ".npy":
            write_atomically(beside(self.out, "csv"), lambda file: write_names(file, listing, self.origin))
            self.partial.replace(self.out)
        else:
            write = write_parquet if self.out.suffix == ".parquet" else write_npz
            write_atomically(self.out, lambda file: write(file, rows, listing, self.origin))
            self.partial.unlink()
        self.state.unlink()

    @classmethod
    def begun(cls, out: Path) -> Origin | None:
        """Returns what the partial file beside `out` holds; None if there is none that can be used."""
        partial, state = beside(out, "partial"), beside(out, "partial.json")
        with suppress(ValueError):
            origin = Origin.read(state)
            if origin is not None and partial.exists():
                needed = _HEADER_BYTES + 4 * origin.rows * origin.features
                return origin if partial.stat().st_size >= needed else None
        return None


def npy_header(rows: int, features: int) -> bytes:
    """Returns the header of a .npy of float32 [rows, features], always of the same length."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (rows, features)})
    assert header.tell() == _HEADER_BYTES  # numpy leaves room for any count
    return header.getvalue()


def text_of(name: str) -> str:
    """Returns a file's name as text that any file can hold; bytes that are no text become \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def write_names(file: BinaryIO, listing: Listing, origin: Origin) -> None:
    """Writes the names as CSV, one line per row of the .npy: name, split, label, class."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "split", "label", "class"))
    for row in origin.kept():
        label = int(listing.labels[row])
        name, kind = text_of(listing.names[row]), text_of(listing.class_of(row) or "")
        writer.writerow((name, listing.split(row), label, kind))
    text.flush()
    text.detach()


def write_npz(file: BinaryIO, rows: NDArray[np.float32], listing: Listing, origin: Origin) -> None:
    """Writes arrays embeddings [n, F], names [n], splits [n], labels [n] and classes, a part at a time."""
    longest = max((len(text_of(listing.names[row])) for row in origin.kept()), default=1)

    def add(name: str, dtype: str, shape: tuple[int, ...], parts: Iterator[NDArray[Any]]) -> None:
        info = zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME)
        # Embeddings are noise to a compressor; names are short in a wide array.
        info.compress_type = zipfile.ZIP_STORED if name == "embeddings" else zipfile.ZIP_DEFLATED
        with archive.open(info, "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            )
            for part in parts:
                member.write(part.astype(dtype).tobytes())

    n = origin.rows
    with zipfile.ZipFile(file, "w") as archive:
        add("embeddings", "<f4", rows.shape, (rows[start : start + GROUP_ROWS] for start in range(0, n, GROUP_ROWS)))
        groups = lambda: _groups(origin)  # noqa: E731
        add("names", f"<U{longest}", (n,), (np.array([text_of(listing.names[i]) for i in g]) for g in groups()))
        add("splits", "<U5", (n,), (np.array([listing.split(i) for i in g]) for g in groups()))
        add("labels", "<i8", (n,), (listing.labels[g] for g in groups()))
        classes = np.array([text_of(name) for name in listing.classes] or [], dtype=np.str_)
        add("classes", classes.dtype.str, classes.shape, iter([classes]))


def write_parquet(file: BinaryIO, rows: NDArray[np.float32], listing: Listing, origin: Origin) -> None:
    """Writes columns name, split, label, class and embedding, a list of F float32, in row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("name", pa.string()),
            ("split", pa.string()),
            ("label", pa.int64()),
            ("class", pa.string()),
            ("embedding", pa.list_(pa.float32(), origin.features)),
        ],
        metadata={"mnclglf": json.dumps(asdict(replace(origin, left_out=())))},
    )
    dictionary: Any = ["split", "class"]  # pyarrow's stubs know True and False only
    with pq.ParquetWriter(file, schema, use_dictionary=dictionary) as writer:
        start = 0
        for group in _groups(origin):
            part = np.ascontiguousarray(rows[start : start + len(group)])
            start += len(group)
            labels = [int(label) if label >= 0 else None for label in listing.labels[group]]
            classes = [None if name is None else text_of(name) for name in map(listing.class_of, group)]
            columns = [
                pa.array([text_of(listing.names[row]) for row in group], pa.string()),
                pa.array([listing.split(row) for row in group], pa.string()),
                pa.array(labels, pa.int64()),
                pa.array(classes, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), origin.features),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _groups(origin: Origin) -> Iterator[list[int]]:
    """Yields the source's rows in groups."""
    group: list[int] = []
    for row in origin.kept():
        group.append(row)
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def made_of(path: Path) -> Origin:
    """Returns what a whole file of embeddings is made of.

    Raises:
        ValueError: FILE.json is missing or damaged.
    """
    origin = Origin.read(beside(path, "json"))
    if origin is None:
        raise ValueError(f"{beside(path, 'json')} is missing; remove {path}, and the embeddings are made anew")
    return origin


def is_whole(path: Path, origin: Origin) -> bool:
    """Returns whether a file has the length that its kind says; the embeddings are not read."""
    try:
        if path.suffix == ".npy":
            return path.stat().st_size == _HEADER_BYTES + 4 * origin.rows * origin.features
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:  # its directory is at the end
                return "embeddings.npy" in archive.namelist()
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows == origin.rows  # of its end too
    except (ValueError, zipfile.BadZipFile):
        return False


def read_embeddings(path: Path) -> NDArray[np.float32]:
    """Returns the embeddings [n, F] of a file: mapped into memory of a .npy, else in memory.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            with open_arrays(path) as arrays:
                return arrays["embeddings"]
        require_pyarrow()
        import pyarrow.parquet as pq

        column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the same command makes it anew") from error
