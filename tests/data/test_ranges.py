"""Files that are read in parts: what has changed is seen, and what a server says keeps no secret."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from mnclglf.data import ranges
from mnclglf.data.errors import DataError
from mnclglf.data.ranges import LocalFile, RemoteFile


def test_a_file_that_is_written_anew_in_its_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    path.write_bytes(b"A" * 10)
    file = LocalFile(str(path))
    assert file.read(0, 4) == b"AAAA"
    with path.open("r+b") as again:
        again.write(b"B" * 10)
    os.utime(path, ns=(0, file.stamp.modified + 1))  # two writes may be within one tick of the clock
    with pytest.raises(DataError, match=r"train\.tar has changed since it was first read"):
        file.read(4, 4)


class Server:
    """What fsspec tells of a file."""

    def __init__(self, **about: Any) -> None:
        self.about = about

    def info(self, name: str) -> dict[str, Any]:
        return {"name": name, "size": 10, **self.about}

    def cat_file(self, name: str, start: int, end: int) -> bytes:
        raise RuntimeError(f"503, url='{name}' and https://me:pw@h/b?X-Amz-Signature=SECRET.")


def remote(**about: Any) -> RemoteFile:
    file = RemoteFile("https://user:pw@h/x.tar?X-Amz-Signature=SECRET")
    file._system = Server(**about)
    return file


@pytest.mark.parametrize("key", ["ETag", "Last-Modified", "LastModified", "Content-MD5", "Digest", "mtime", "created"])
def test_versions_of_a_file_of_one_size_differ(key: str) -> None:
    first, again, second = (remote(**{key: value}).stamp for value in ("1", "1", "2"))
    assert first == again
    assert first != second


def test_a_server_that_tells_no_version_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    ranges._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert remote().stamp == remote().stamp
    assert caplog.text.count("https://h/x.tar: the server tells no version of the file") == 1


def test_what_a_server_says_is_told_without_what_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(DataError) as caught:
        remote(ETag="1").read(0, 4)
    assert str(caught.value) == (
        "https://h/x.tar: the server does not answer (RuntimeError: 503, url='https://h/x.tar' and https://h/b); "
        "try again"
    )


def test_a_file_has_one_key_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    keys = {LocalFile(name).key for name in ("a/x.tar", f"{tmp_path}/a/x.tar", "link/x.tar", "a/../a/x.tar")}
    assert len(keys) == 1
    monkeypatch.chdir(tmp_path / "a")
    assert LocalFile("x.tar").key in keys
    assert LocalFile("a/x.tar").key not in keys
    assert remote().key == RemoteFile("https://h/x.tar").key  # a signed address is another one tomorrow


def test_an_address_of_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(DataError, match=r"foo://x\.tar cannot be opened \(.*\); give http, https or s3"):
        ranges.file_system("foo://x.tar")
