"""Tests of the files of a run: written whole or not at all, on any file system."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from mnclglf.runs import files
from mnclglf.runs.files import write_atomically


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
