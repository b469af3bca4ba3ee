"""Fuzzing of the file readers with damaged files: they read or raise DataError, and do nothing else.

MNCLGLF_FUZZ_EXAMPLES sets the number of inputs per reader (docs/reference/data.md has the numbers run so far).
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnclglf.data.archives import extract, read_cifar_binary, read_cifar_pickle, read_idx, read_pickle
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.data.sources import folder, tinyimagenet

EXAMPLES = int(os.environ.get("MNCLGLF_FUZZ_EXAMPLES", "100"))
LARGEST = 64 * 2**20  # bytes that a reader may take for a file of a few kilobytes
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def image(kind: str, mode: str = "RGB") -> bytes:
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
    np.savez(stream, names=names, numbers=np.ones((2, 7), np.int64), moments=np.ones((2, 6)), digests=digests)
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 64, 64, 3), np.uint8))
    return stream.getvalue()


def read_tar(path: Path) -> object:
    return extract(path, path.parent, "made", ["one"])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
IDX = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4) + bytes(24)
# (valid contents, the file's name, its reader)
READERS: dict[str, tuple[bytes, str, Callable[[Path], object]]] = {
    "idx": (IDX, "images-idx3-ubyte", read_idx),
    "idx.gz": (gzip.compress(IDX), "images-idx3-ubyte.gz", read_idx),
    "cifar binary": (bytes(3 * 3074), "train.bin", lambda p: read_cifar_binary(p, 3, classes=100, label_bytes=2)),
    "cifar pickle": (cifar(b"labels"), "data_batch_1", lambda p: read_cifar_pickle(p, 3)),
    "pickle": (pickle.dumps([np.arange(5), {b"a": (1, 2.0)}, b"x"], protocol=2), "batch", read_pickle),
    "tar": (tar("w"), "archive.tar", read_tar),
    "tar.gz": (tar("w:gz"), "archive.tar.gz", read_tar),
    "zip": (zipped(), "archive.zip", read_tar),
    "val_annotations": (b"val_0.JPEG\tn01\t0\t0\n" * 3, "val/val_annotations.txt", lambda p: validation_files(p)),
    "index of a folder": (index(), "index.npz", folder._read_index),
    "decoded array": (array(), "decoded.npy", lambda p: mapped(p)),
    "png": (image("PNG"), "a.png", read_image),
    "gray png": (image("PNG", "LA"), "a.png", read_image),
    "palette png": (image("PNG", "P"), "a.png", read_image),
    "jpeg": (image("JPEG"), "a.jpg", read_image),
    "cmyk jpeg": (image("JPEG", "CMYK"), "a.jpg", read_image),
    "webp": (image("WEBP"), "a.webp", read_image),
    "postscript": (POSTSCRIPT, "a.jpg", read_image),
}


def validation_files(path: Path) -> object:
    return tinyimagenet._validation_files(path.parents[1], ["n01", "n02"])


def mapped(path: Path) -> object:
    note = path.with_suffix(".json")
    note.write_text('{"made_of": "x", "crc32": 0}')
    return tinyimagenet._mapped(path, note, "x", 2)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draws valid contents with changes: bits flipped, bytes set, removed, inserted, doubled, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 5))):
        if not data:
            break
        at, length = draw(st.integers(0, len(data) - 1)), draw(st.sampled_from([1, 2, 4, 8, 64]))
        change = draw(st.sampled_from(["flip", "set", "cut out", "put in", "double", "end"]))
        if change == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            data[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
        elif change == "cut out":
            del data[at : at + length]
        elif change == "put in":
            data[at:at] = draw(st.binary(min_size=length, max_size=length))
        elif change == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    (made / "inside" / "val").mkdir(parents=True)
    return made


ALARMS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "exec", "socket.connect"}
armed = False
heard: list[str] = []


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    """Records the audit events that run code. Late imports run code too, but only installed code."""
    if armed and event in ALARMS:
        code = arguments[0] if event == "exec" else None
        installed = (sys.prefix, sys.base_prefix, "<frozen")
        if not getattr(code, "co_filename", "").startswith(installed):
            heard.append(event)


sys.addaudithook(listen)


@pytest.fixture(scope="module", autouse=True)
def warm(place: Path) -> Iterator[None]:
    """Runs each reader once, as its first use may import modules, which runs code.

    Lowers Pillow's limit of pixels, as an image takes the memory that its header asks for.
    """
    Image.init()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2**20
    for whole, file_name, read in READERS.values():
        (place / "inside" / file_name).write_bytes(whole)
        with suppress(DataError):  # PostScript always
            read(place / "inside" / file_name)
        shutil.rmtree(place / "inside" / "made", ignore_errors=True)
    yield
    Image.MAX_IMAGE_PIXELS = limit


def check(name: str, data: bytes, place: Path) -> None:
    global armed
    _, file_name, read = READERS[name]
    path = place / "inside" / file_name
    path.write_bytes(data)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outside, refusal = sorted(place.iterdir()), ""
    tracemalloc.start()
    heard.clear()
    armed = True
    try:
        read(path)
    except DataError as error:
        refusal = str(error)
    finally:
        armed = False
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        shutil.rmtree(place / "inside" / "made", ignore_errors=True)
    assert not refusal or path.name in refusal, "the file is not named"
    assert heard == [], "code was run"
    assert sorted(place.iterdir()) == outside, "something was written outside"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)  # with what libraries reserve
    assert max(peak, grown) < LARGEST, f"{max(peak, grown):,} bytes for a file of {len(data):,}"
    path.unlink()


SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore")  # Pillow and numpy warn of much that they then read
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, place: Path) -> None:
    whole = READERS[name][0]
    check(name, whole, place)

    @SETTINGS
    @given(data=damaged(whole))
    def fuzz(data: bytes) -> None:
        check(name, data, place)

    fuzz()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused(name: str, place: Path) -> None:
    @SETTINGS
    @given(data=st.binary(max_size=400), start=st.integers(0, 40))
    def fuzz(data: bytes, start: int) -> None:
        check(name, READERS[name][0][:start] + data, place)

    fuzz()


def test_the_alarm_rings(place: Path) -> None:
    """Checks that the checks above can fail, on a reader that runs code and one that takes much memory."""
    for read in (lambda p: os.system("true"), lambda p: exec("1"), lambda p: bytearray(2 * LARGEST)):
        READERS["broken"] = b"", "file", read
        try:
            with pytest.raises(AssertionError, match=r"code was run|bytes for a file"):
                check("broken", b"", place)
        finally:
            del READERS["broken"]
