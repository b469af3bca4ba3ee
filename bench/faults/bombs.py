"""Small files that ask for much memory or time. Each must be read, or refused in words, within the harness's bounds."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bench.faults.corpus import READERS, image_file
from mnclglf.reports.run_files import read_arrays
from mnclglf.runs.checkpoint import load_checkpoint
from mnclglf.runs.files import read_config, read_object
from mnclglf.runs.metrics import last_record, stream_records
from mnclglf.settings import read_settings
from mnclglf.training.initial_weights import read_pickle, read_safetensors

GIB = 2**30
SPARSE = 2**40  # bytes of a file without contents
Maker = Callable[[], bytes]
Reader = Callable[[Path], object]


@cache
def _zeros(mebibytes: int) -> bytes:
    """Returns so many MiB of zeros as a deflate stream without an end: one piece, again and again."""
    piece = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = piece.compress(bytes(2**20)) + piece.flush(zlib.Z_FULL_FLUSH)
    return data * mebibytes


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, pixels: bytes = b"") -> bytes:
    """Returns a gray PNG of this size, with chunks before its pixels, which are a zlib stream (of zeros)."""
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    data = pixels or zlib.compress(bytes((width + 1) * height))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _png_chunk(b"IHDR", header),
            *before,
            _png_chunk(b"IDAT", data),
            _png_chunk(b"IEND", b""),
        ]
    )


def jpeg(width: int, height: int) -> bytes:
    """Returns a JPEG whose header tells another size than it has."""
    data = bytearray(image_file("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">2H", height, width)
    return bytes(data)


def scans(count: int) -> bytes:
    """Returns a progressive JPEG of 1,448 x 1,448 whose last scan comes so many times: each goes over all blocks."""
    stream = io.BytesIO()
    Image.new("L", (1448, 1448)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """Returns a GIF of this size, whose frames have one pixel."""
    frame = b"," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<2H3B", width, height, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


def webp(width: int, height: int) -> bytes:
    """Returns a WebP with a canvas of this size around a small image."""
    inside = image_file("WEBP")[12:]
    header = (
        b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    body = b"WEBP" + header + inside
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(**tags: tuple[int, int, int, int]) -> bytes:
    """Returns a gray TIFF of 8 x 8; a tag is its number, type, count and value."""
    usual = {
        "width": (256, 4, 1, 8), "height": (257, 4, 1, 8), "bits": (258, 3, 1, 8), "compression": (259, 3, 1, 1),
        "photometric": (262, 3, 1, 1), "offset": (273, 4, 1, 8), "rows": (278, 4, 1, 8), "bytes": (279, 4, 1, 64),
    }  # fmt: skip
    entries = sorted({**usual, **tags}.values())
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    # The directory is its own successor: a ring of pages.
    return (
        b"II*\0"
        + struct.pack("<I", 72)
        + bytes(64)
        + struct.pack("<H", len(entries))
        + directory
        + struct.pack("<I", 72)
    )


def bmp(width: int, height: int) -> bytes:
    """Returns a BMP whose header tells this size."""
    data = bytearray(image_file("BMP"))
    data[18:26] = struct.pack("<2i", width, height)
    return bytes(data)


def gzipped(start: bytes, mebibytes: int) -> bytes:
    """Returns some bytes and so many MiB of zeros, gzipped."""
    return gzip.compress(start) + gzip.compress(bytes(2**20)) * mebibytes


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Returns the header of a member of a tar, which may tell any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zipped(size: int, told: int) -> bytes:
    """Returns a zip with a member of so many MiB of zeros, whose directory tells another size."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("made/one", b"x")
    data = stream.getvalue()
    head, directory = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    content = _zeros(size) + zlib.compress(b"", wbits=-15)
    local = data[head : head + 18] + struct.pack("<II", len(content), told) + data[head + 26 : head + 38]
    central = (
        data[directory : directory + 20]
        + struct.pack("<II", len(content), told)
        + data[directory + 28 : directory + 54]
    )
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local) + len(content), 0)
    return local + content + central + end


def npy(shape: tuple[int, ...]) -> bytes:
    """Returns the start of an array of bytes of this shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(64)


def npz(name: str, data: bytes) -> bytes:
    """Returns an archive of one array."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}.npy", data)
    return stream.getvalue()


def parquet(rows: int, size: int) -> bytes:
    """Returns Parquet with the same image of so many bytes in every row, which the file holds once."""
    one = pa.array([bytes(size)])
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), one)
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": images}), stream, compression="zstd", store_schema=False)
    return stream.getvalue()


def empty_rows(count: int) -> bytes:
    """Returns Parquet with so many rows without an image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, pa.schema([("image", kind)]), compression="zstd") as writer:
        part = pa.table({"image": pa.nulls(10**6, kind)})
        for _ in range(count // 10**6):
            writer.write_table(part)
    return stream.getvalue()


def aliases(depth: int) -> bytes:
    """Returns YAML with a list of eight times the list before, so many times."""
    lists = [f"{chr(98 + at)}: &{chr(98 + at)} [{', '.join([f'*{chr(97 + at)}'] * 8)}]\n" for at in range(depth)]
    return f"a: &a [1]\n{''.join(lists)}".encode()


def merges(depth: int) -> bytes:
    """Returns YAML with a mapping that merges the one before nine times, so many times."""
    lines = [f"a{at}: &a{at} {{<<: [{', '.join([f'*a{at - 1}'] * 9)}]}}\n" for at in range(1, depth)]
    return f"a0: &a0 {{lr: 1}}\n{''.join(lines)}".encode()


def names(count: int) -> bytes:
    """Returns JSON with so many settings."""
    return json.dumps({f"setting{at}": 1 for at in range(count)}).encode()


def notes(count: int) -> bytes:
    """Returns the start of a tar with so many MiB of short notes."""
    note = b"6 a=b\n" * (2**20 // 6)
    one = tar_header("notes", len(note), b"x") + note + bytes(-len(note) % 512)
    return one * count + tar_header("a.png", 0) + bytes(1024)


def read_metrics(path: Path) -> object:
    """Reads metrics.jsonl as the list of runs and the report do."""
    return last_record(path), sum(len(records) for records, _ in stream_records(path))


def header(size: int) -> bytes:
    """Returns safetensors whose header tells so many bytes."""
    return struct.pack("<Q", size) + b"{}"


FILES: dict[str, tuple[str, Maker]] = {
    "PNG of 60,000 x 60,000": ("png", lambda: png(60_000, 60_000, pixels=b"\x78\x9c" + _zeros(64))),
    "PNG of 1 x 60,000": ("png", lambda: png(1, 60_000)),
    "PNG of 60,000 x 1": ("png", lambda: png(60_000, 1)),
    "PNG whose pixels go on for 4 GiB": ("png", lambda: png(8, 8, pixels=b"\x78\x9c" + _zeros(4096))),
    "PNG with a text of 2 GiB": ("png", lambda: png(8, 8, _png_chunk(b"zTXt", b"a\0\0\x78\x9c" + _zeros(2048)))),
    "PNG with a text of 2 GiB, international": (
        "png",
        lambda: png(8, 8, _png_chunk(b"iTXt", b"a\0\1\0\0\0\x78\x9c" + _zeros(2048))),
    ),
    "PNG with a profile of 2 GiB": ("png", lambda: png(8, 8, _png_chunk(b"iCCP", b"a\0\0\x78\x9c" + _zeros(2048)))),
    "PNG with a chunk that tells 2 GiB": ("png", lambda: png(8, 8, struct.pack(">I", 2**31 - 1) + b"tEXta\0")),
    "JPEG of 65,500 x 65,500": ("jpeg", lambda: jpeg(65_500, 65_500)),
    "JPEG with 100,000 scans": ("jpeg", lambda: scans(100_000)),
    "GIF of 65,535 x 65,535": ("gif", lambda: gif(65_535, 65_535)),
    "GIF with a million frames": ("gif", lambda: gif(64, 64, 1_000_000)),
    "WebP of 16,777,216 x 16,777,216": ("webp", lambda: webp(2**24, 2**24)),
    "WebP of 16,000 x 16,000": ("webp", lambda: webp(16_000, 16_000)),
    "BMP of 2,147,483,647 x 2,147,483,647": ("png", lambda: bmp(2**31 - 1, 2**31 - 1)),
    "TIFF of 1,000,000 x 1,000,000": (
        "tiff",
        lambda: tiff(width=(256, 4, 1, 10**6), height=(257, 4, 1, 10**6)),
    ),
    "TIFF, a ring of pages": ("tiff", tiff),
    "TIFF with a tag of 2 billion numbers": ("tiff", lambda: tiff(bits=(258, 3, 2**31, 8))),
    "TIFF with a strip of 4 GiB": ("tiff", lambda: tiff(bytes=(279, 4, 1, 2**32 - 1))),
    "IDX of 1 GiB that goes on for 8": ("idx.gz", lambda: gzipped(struct.pack(">4BI", 0, 0, 8, 1, 2**30), 8192)),
    "IDX of 8 GiB": ("idx", lambda: struct.pack(">4B3I", 0, 0, 8, 3, 2**11, 2**11, 2**11)),
    "tar.gz with a file of 8 GiB": ("tar.gz", lambda: gzipped(tar_header("made/one", 8 * GIB - 1), 8192)),
    "tar.gz with a name of 8 GiB": ("tar.gz", lambda: gzipped(tar_header("a", 8 * GIB - 1, b"L"), 8192)),
    "tar.gz with notes of 8 GiB": ("tar.gz", lambda: gzipped(tar_header("a", 8 * GIB - 1, b"x"), 8192)),
    "tar with a name of 8 GiB": ("tar", lambda: tar_header("a", 8 * GIB - 1, b"L")),
    "zip with a file of 4 GiB that tells 1 KiB": ("zip", lambda: zipped(4096, 1024)),
    "zip with a file of 4 GiB": ("zip", lambda: zipped(4095, 4095 * 2**20)),
    "shard with a name of 8 GiB": ("shard", lambda: tar_header("a", 8 * GIB - 1, b"L")),
    "shard with 11 million notes": ("shard", lambda: notes(64)),
    "shard with a file of 8 GiB": ("shard", lambda: tar_header("a.png", 8 * GIB - 1)),
    "Parquet of 4 MiB with 8 GiB of images": ("parquet", lambda: parquet(2048, 2**22)),
    "Parquet with 10 million empty rows": ("parquet", lambda: empty_rows(10**7)),
    "index with an array of 2^60 bytes": ("index of a folder", lambda: npz("names", npy((2**60,)))),
    "index with an array of 1 GiB": ("index of a folder", lambda: npz("names", npy((GIB,)) + bytes(2**24))),
    "array of 2^60 bytes": ("decoded array", lambda: npy((2**60,))),
    "pickle of 2^60 bytes": ("pickle", lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"."),
    "pickle of 1 GiB of bytes": ("pickle", lambda: b"\x80\x05\x96" + struct.pack("<Q", GIB) + b"."),
    "pickle of a number of 2 GiB": ("pickle", lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."),
}
"""By name: the kind of the file, of READERS, and what makes it."""
OTHERS: dict[str, tuple[str, Reader, Maker | None]] = {
    "settings, aliases of aliases": ("run.yaml", read_settings, lambda: aliases(14)),
    "settings, merges of merges": ("run.yaml", read_settings, lambda: merges(40)),
    "settings, 60,000 names": ("run.json", read_settings, lambda: names(60_000)),
    "settings, an alias of itself": ("run.yaml", read_settings, lambda: b"epochs: &x {a: *x}\n"),
    "settings, nested": ("run.yaml", read_settings, lambda: b"[" * 10**6),
    "settings, nested JSON": ("run.json", read_settings, lambda: b"[" * 10**6),
    "settings, a number of a million digits": ("run.yaml", read_settings, lambda: b"epochs: " + b"9" * 10**6),
    "settings of 1 TiB": ("run.yaml", read_settings, None),
    "config.json, nested": ("run/config.json", lambda path: read_config(path.parent), lambda: b"[" * 10**7),
    "config.json of 1 TiB": ("run/config.json", lambda path: read_config(path.parent), None),
    "evaluation.json of 1 TiB": ("evaluation.json", read_object, None),
    "metrics.jsonl, a line of 1 TiB": ("metrics.jsonl", read_metrics, None),
    "metrics.jsonl, nested": ("metrics.jsonl", read_metrics, lambda: b"[" * 10**7),
    "queue.npz of 130 kB with 128 MiB": (
        "queue.npz",
        read_arrays,
        lambda: npz("keys", npy((GIB // 8,)) + bytes(GIB // 8)),
    ),
    "queue.npz of 1 TiB": ("queue.npz", read_arrays, None),
    "checkpoint of 1 TiB": ("step-00000004.pt", load_checkpoint, None),
    "weights of 1 TiB": ("weights.pt", read_pickle, None),
    "safetensors of 1 TiB": ("weights.safetensors", read_safetensors, None),
    "safetensors with a header of 2^60 bytes": ("weights.safetensors", read_safetensors, lambda: header(2**60)),
}
"""By name: the name of the file, its reader, and what makes it; None for a file of 1 TiB without contents."""


def _drop(name: str, read: Reader, make: Maker | None, place: Path) -> None:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if make is None:
        with path.open("wb") as file:
            file.truncate(SPARSE)
    else:
        path.write_bytes(make())
    read(path)


BOMBS: dict[str, Callable[[Path], None]] = {
    **{name: partial(_drop, *READERS[kind][1:], make) for name, (kind, make) in FILES.items()},
    **{f"{kind} of 1 TiB": partial(_drop, *READERS[kind][1:], None) for kind in READERS},
    **{name: partial(_drop, *other) for name, other in OTHERS.items()},
}
"""By name, what writes a bomb into a folder and reads it."""
