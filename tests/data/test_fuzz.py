"""Fuzzing of the file readers with damaged files: they read or raise DataError, and do nothing else.

MNCLGLF_FUZZ_EXAMPLES sets the number of inputs per reader (docs/reference/data.md has the numbers run so far).
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.faults.corpus import READERS
from mnclglf.data.errors import DataError

EXAMPLES = int(os.environ.get("MNCLGLF_FUZZ_EXAMPLES", "100"))
LARGEST = 64 * 2**20  # bytes that a reader may take for a file of a few kilobytes


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
    path.unlink(missing_ok=True)


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
