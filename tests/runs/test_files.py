"""Tests of the files of a run: written whole or not at all, on any file system."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from mnclglf.runs import files
from mnclglf.runs.files import (
    cache_folder,
    check_writable,
    clear_left_over,
    naming,
    open_file,
    read_bytes,
    read_config,
    read_json,
    read_object,
    write_atomically,
)
from mnclglf.runs.metrics import read_records


def failing_fsync(monkeypatch: pytest.MonkeyPatch, number: int, *, of_folders: bool) -> None:
    """Lets fsync fail, of folders or of files."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fail)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_that_cannot_fsync_a_folder_is_written(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_fsync(monkeypatch, number, of_folders=True)
    write_atomically(tmp_path / "x", lambda file: file.write(b"whole"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"whole")]


def test_a_folder_that_cannot_be_opened_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str | Path, flags: int, *rest: int, **more: int) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(files.os, "open", refuse)
    write_atomically(tmp_path / "x", lambda file: file.write(b"whole"))
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_file_whose_own_fsync_fails_is_named_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"earlier")
    failing_fsync(monkeypatch, errno.EIO, of_folders=False)
    with pytest.raises(OSError, match=r"Input/output error: '.*/x'"):
        write_atomically(tmp_path / "x", lambda file: file.write(b"later"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"earlier")]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    def full(_: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/x'") as raised:
        write_atomically(tmp_path / "x", full)
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_two_processes_of_one_number_do_not_write_into_one_temporary_file(tmp_path: Path) -> None:
    def inner(file: BinaryIO) -> None:  # as from another container that shares the folder
        write_atomically(tmp_path / "x", lambda other: other.write(b"inner"))
        file.write(b"outer")

    write_atomically(tmp_path / "x", inner)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"outer")]


KILLED = """
import os, signal, sys
from pathlib import Path
from mnclglf.runs.files import clear_left_over, write_atomically

def write(file):
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    signal.pause()

write_atomically(Path(sys.argv[1]), write)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / ".x.pt.tmp"
    other.touch()  # a user's own
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    (temporary,) = set(tmp_path.iterdir()) - {other}
    clear_left_over(tmp_path)
    assert temporary.read_bytes() == b"half"
    process.kill()
    process.wait()
    process.stdout.close()
    write_atomically(tmp_path / "y", lambda file: file.write(b"another file's writer"))
    assert temporary.exists()
    write_atomically(path, lambda file: file.write(b"whole"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"x", "y", ".x.pt.tmp"}


def test_a_temporary_file_that_is_cleared_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, cleared = files.fcntl.flock, list[str]()

    def late(file: BinaryIO, operation: int) -> None:
        if not cleared:
            cleared.append(file.name)
            os.unlink(file.name)
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_atomically(tmp_path / "x", lambda file: file.write(b"whole"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"whole")]
    assert cleared


@pytest.fixture
def without_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user number that the system does not know, without HOME; returns the temporary folder."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    files._warn_once.cache_clear()
    return tmp_path


def test_without_a_home_caches_are_in_the_temporary_folder(
    without_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [cache_folder() for _ in range(3)] == 3 * [without_home / "mnclglf-4000000001"]
    assert caplog.text.count("mnclglf-4000000001; set XDG_CACHE_HOME") == 1


@pytest.mark.parametrize("made", ["link", "open to all", "file"])
def test_a_temporary_cache_that_another_user_may_have_made_is_not_used(
    made: str, without_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    usual = without_home / "mnclglf-4000000001"
    if made == "link":
        usual.symlink_to(tmp_path_factory.mktemp("of-another"))
    elif made == "file":
        usual.touch()
    else:
        usual.mkdir()
        usual.chmod(0o777)
    found = cache_folder()
    assert found != usual
    assert found == cache_folder()
    assert found.parent == without_home
    assert stat.S_IMODE(found.lstat().st_mode) == 0o700


def test_a_home_where_nothing_can_be_made_is_no_home(without_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(files.os, "access", lambda path, _: Path(path) != Path("/"))
    assert cache_folder() == without_home / "mnclglf-4000000001"
    home = without_home / "home"
    (home / ".cache" / "mnclglf").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    assert cache_folder() == home / ".cache" / "mnclglf"  # can only be read, and holds what was fetched


def test_the_usual_places_of_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mnclglf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / "mnclglf"


def test_where_nothing_can_be_written_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "a" / "b", "give another --out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"give another --out: '.*/file'"):
        check_writable(tmp_path / "file" / "run", "give another --out")

    def refuse(*_: object, dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / "x"))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=rf"Permission denied.*give another --out: '{tmp_path}'"):
        check_writable(tmp_path / "a" / "b", "give another --out")


UNREADABLE = Path("/proc/self/mem")  # opens, and reading it fails with EIO, of which the system names no file


@pytest.mark.parametrize("read", [read_json, read_object, lambda path: read_config(path.parent)])
def test_a_file_that_fails_as_it_is_read_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "config.json"
    path.symlink_to(UNREADABLE)
    with pytest.raises(OSError, match=r"Input/output error: '.*/config.json'"):
        read(path)


def test_an_error_that_names_a_file_or_is_none_of_the_system_stays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'other'"), naming(tmp_path / "x"):
        open("other").close()
    with pytest.raises(OSError, match=r"^told$"), naming(tmp_path / "x"):
        raise OSError("told")


@pytest.mark.parametrize("read", [open_file, lambda path: read_bytes(path, 9), read_object, read_records])
def test_what_has_no_end_is_not_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    """Checks pipes, with and without a writer, sockets and devices. The alarm ends a test that waits."""
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "held")
    holding = os.open(tmp_path / "held", os.O_RDWR)
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))  # 108 bytes at most
        signal.alarm(20)
        for name in ("pipe", "held", "zeros", "folder", "socket"):
            with pytest.raises(OSError, match=name) as raised:
                read(tmp_path / name)
            assert raised.value.filename == str(tmp_path / name)
        signal.alarm(0)
    os.close(holding)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_bytes(tmp_path / "sparse", 9)
    (tmp_path / "nine").write_bytes(b"123456789")
    assert read_bytes(tmp_path / "nine", 9) == b"123456789"
