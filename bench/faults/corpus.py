# pyright: reportPrivateUsage=false
"""Valid files of every kind that is read, each with its reader; attacks change them."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mnclglf.data.archives import extract, read_cifar_binary, read_cifar_pickle, read_idx, read_pickle
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.data.parquet import unpack, unpacked_bytes
from mnclglf.data.ranges import LocalFile
from mnclglf.data.shard_index import group, image_of, index_text, label_of
from mnclglf.data.sources import examination, tinyimagenet
from mnclglf.data.sources.shards import samples_of
from mnclglf.data.tars import list_members

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def image_file(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, kind)
    return stream.getvalue()


def cifar(key: bytes) -> bytes:
    return pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), key: [1, 2, 3]}, protocol=2)


def tar(mode: Literal["w", "w:gz"]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as file:
        for name in ("made/a.txt", "made/b/c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 300
            file.addfile(info, io.BytesIO(bytes(300)))
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("made/a.txt", bytes(300))
        file.writestr("made/b/c.txt", bytes(range(256)))
    return stream.getvalue()


def index() -> bytes:
    stream = io.BytesIO()
    names = np.frombuffer(b"a.png\0b.png", np.uint8)
    digests = np.ones((2, 32), np.uint8)
    np.savez(
        stream, names=names, numbers=np.zeros((2, 8), np.int64), moments=np.ones((2, 6)), digests=digests,
        kinds=np.frombuffer(b'[["PNG", "RGB", 8, false, false]]', np.uint8),
    )  # fmt: skip
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 64, 64, 3), np.uint8))
    return stream.getvalue()


def read_tar(path: Path) -> object:
    return extract(path, path.parent, "made", ["one"])


def shard() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as file:
        for number in range(3):
            for end, data in (("png", image_file("PNG")), ("cls", b"2"), ("json", b'{"label": 2}')):
                info = tarfile.TarInfo(f"train/{number:04}{'é' * number}.{end}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read_shard(path: Path) -> object:
    """Reads every sample of a shard as a source does, by the index beside it if there is one."""
    file = LocalFile(str(path))
    read: list[bytes] = []
    for sample in samples_of(file):
        with suppress(DataError):  # of a sample, which a source leaves out or names
            label_of(sample, lambda member: file.read(member.offset, member.size))
            if image := image_of(sample):
                read.append(file.read(image.offset, image.size))
    return read


def shard_index() -> bytes:
    """Returns the index of the shard that `read_index` reads by it."""
    data = shard()
    members = list_members(lambda at, size: data[at : at + size], len(data), "shard").members
    return index_text(group(members, "shard")).encode()


def read_index(path: Path) -> object:
    """Reads a whole shard beside an index, by this index where it fits."""
    whole = path.with_name("whole.tar")
    whole.write_bytes(shard())
    path.replace(whole.with_suffix(".idx"))
    try:
        return read_shard(whole)
    finally:
        whole.with_suffix(".idx").unlink(missing_ok=True)


def parquet() -> bytes:
    images = [{"bytes": image_file("PNG"), "path": f"{number}.png"} for number in range(4)]
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [0, 1, 1, 0]}), stream, row_group_size=2)
    return stream.getvalue()


def read_parquet(path: Path) -> object:
    file = LocalFile(str(path))
    unpacked_bytes(file)
    return unpack(file, path.with_name("images"))


def validation_files(path: Path) -> object:
    return tinyimagenet._validation_files(path.parents[1], ["n01", "n02"])


def mapped(path: Path) -> object:
    note = path.with_suffix(".json")
    note.write_text('{"made_of": "x", "crc32": 0}')
    return tinyimagenet._mapped(path, note, "x", 2)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
IDX = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4) + bytes(24)
READERS: dict[str, tuple[bytes, str, Callable[[Path], object]]] = {
    "idx": (IDX, "images-idx3-ubyte", read_idx),
    "idx.gz": (gzip.compress(IDX), "images-idx3-ubyte.gz", read_idx),
    "cifar binary": (bytes(3 * 3074), "train.bin", lambda p: read_cifar_binary(p, 3, classes=100, label_bytes=2)),
    "cifar pickle": (cifar(b"labels"), "data_batch_1", lambda p: read_cifar_pickle(p, 3)),
    "pickle": (pickle.dumps([np.arange(5), {b"a": (1, 2.0)}, b"x"], protocol=2), "batch", read_pickle),
    "tar": (tar("w"), "archive.tar", read_tar),
    "tar.gz": (tar("w:gz"), "archive.tar.gz", read_tar),
    "zip": (zipped(), "archive.zip", read_tar),
    "val_annotations": (b"val_0.JPEG\tn01\t0\t0\n" * 3, "val/val_annotations.txt", validation_files),
    "index of a folder": (index(), "index.npz", examination._read_index),
    "decoded array": (array(), "decoded.npy", mapped),
    "png": (image_file("PNG"), "a.png", read_image),
    "gray png": (image_file("PNG", "LA"), "a.png", read_image),
    "palette png": (image_file("PNG", "P"), "a.png", read_image),
    "jpeg": (image_file("JPEG"), "a.jpg", read_image),
    "cmyk jpeg": (image_file("JPEG", "CMYK"), "a.jpg", read_image),
    "webp": (image_file("WEBP"), "a.webp", read_image),
    "tiff": (image_file("TIFF"), "a.tif", read_image),
    "gif": (image_file("GIF", "P"), "a.gif", read_image),
    "shard": (shard(), "train-0.tar", read_shard),
    "index of a shard": (shard_index(), "whole.idx", read_index),
    "parquet": (parquet(), "train.parquet", read_parquet),
    "postscript": (POSTSCRIPT, "a.jpg", read_image),
}
"""By kind: valid contents, the name of the file, and its reader, which reads it or raises DataError."""
