"""Members of tar files: tarfile finds the same; what is malicious, damaged or cut is refused or left out by name."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import write_tar

from mnclglf.data.errors import DataError
from mnclglf.data.tars import Listing, list_members

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


def listed(data: bytes) -> Listing:
    return list_members(lambda at, size: data[at : at + size], len(data), "x.tar")


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def packed(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


@settings(max_examples=100, deadline=None)
@given(
    members=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=12), st.binary(max_size=1500)), max_size=6),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(members: list[tuple[list[str], bytes]], format: int) -> None:
    data = packed([("/".join(parts), content) for parts, content in members], format)
    found = listed(data)
    assert [tuple(member) for member in found.members] == by_tarfile(data)
    assert found.ignored == []
    for member, (_, content) in zip(found.members, members, strict=True):
        assert data[member.offset : member.offset + member.size] == content


def test_a_long_name_of_ustar_is_whole() -> None:
    name = f"{'a' * 80}/{'b' * 60}/{'c' * 90}.jpg"
    assert [member.name for member in listed(packed([(name, b"1")])).members] == [name]


def test_members_of_gnu_tar_are_found(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", f"{'b' * 90}/{'c' * 90}.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() * 99)
    os.link(tmp_path / "in/a/1.jpg", tmp_path / "in/a/3.jpg")
    os.symlink("1.jpg", tmp_path / "in/a/4.jpg")
    for form in ("gnu", "oldgnu", "pax", "posix"):
        subprocess.run(
            ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."],
            check=True,
        )
        data = (tmp_path / "x.tar").read_bytes()
        found = listed(data)
        assert [tuple(member) for member in found.members] == by_tarfile(data)
        assert len(found.members) == 3
        assert len(found.ignored) == 2
        assert "3.jpg" in found.ignored[0]
        assert "a link" in found.ignored[0]


def test_sparse_members_are_left_out_and_what_follows_is_found(tmp_path: Path) -> None:
    with (tmp_path / "hole.jpg").open("wb") as file:
        for at in range(40):  # more pieces than one header holds
            file.seek(at * 65536)
            file.write(b"data")
    (tmp_path / "next.jpg").write_bytes(b"whole")
    for form in ("gnu", "posix"):
        subprocess.run(["tar", f"--format={form}", "-Scf", "x.tar", "hole.jpg", "next.jpg"], check=True, cwd=tmp_path)
        data = (tmp_path / "x.tar").read_bytes()
        found = listed(data)
        ((name, at, size),) = found.members
        assert (name, data[at : at + size]) == ("next.jpg", b"whole")
        assert "sparse" in found.ignored[0]


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../out.jpg", "a/../../out.jpg"])
def test_a_name_that_points_outside_is_left_out(name: str) -> None:
    found = listed(packed([(name, b"x"), ("a.jpg", b"y")]))
    assert [member.name for member in found.members] == ["a.jpg"]
    assert name in found.ignored[0]
    assert "outside" in found.ignored[0]


def test_links_devices_and_pipes_are_left_out() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"):
            member = tarfile.TarInfo(f"{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("folder/"))
    found = listed(stream.getvalue())
    assert found.members == []
    assert len(found.ignored) == 6


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def changed(field: slice, value: bytes) -> bytes:
    data = packed([("a.jpg", b"x" * 600)])
    header = bytearray(data[:512])
    header[field] = value
    return with_checksum(header) + data[512:]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "without the mark"),
        (packed([("a.jpg", b"x" * 600)])[:700], "beyond its end"),
        (packed([("a.jpg", b"x" * 600)])[:1536], "without the mark"),
        (packed([("a.jpg", b"x" * 600)])[:1700], "without the mark"),
        (b"\xff\xd8\xff" + bytes(range(256)) * 8, "no tar"),
        (changed(slice(124, 136), b"77777777777\0"), "8,589,934,591 bytes goes beyond"),
        (changed(slice(124, 136), b"\x80" + b"\xff" * 11), "beyond its end"),
        (changed(slice(124, 136), b"\xff" * 12), "no number"),
        (changed(slice(124, 136), b"-0000000001\0"), "no number"),
        (changed(slice(124, 136), b"0000000999x\0"), "no number"),
        (changed(slice(0, 5), b"b.jpg")[:150] + b"9" + changed(slice(0, 5), b"b.jpg")[151:], "checksum"),
        (packed([(f"{'a/' * 300}b.jpg", b"x")], tarfile.PAX_FORMAT)[:900], "beyond its end"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_cut_is_refused_by_name(data: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=rf"^x\.tar is .*{problem}.*at byte [\d,]+; copy it again"):
        listed(data)


def pax(records: bytes) -> bytes:
    header = bytearray(packed([("notes", records)]))
    header[156:157] = b"x"
    return with_checksum(header[:512]) + bytes(header[512 : 512 + -(-len(records) // 512) * 512])


@pytest.mark.parametrize("records", [b"99 path=x\n", b"path=x\n", b"3 =", b"0 a=b\n", b"-5 a=b\n", b"9 path x\n"])
def test_notes_that_cannot_be_read_are_refused(records: bytes) -> None:
    with pytest.raises(DataError, match=r"^x\.tar is damaged: the notes"):
        listed(pax(records) + packed([("a.jpg", b"x")]))


@pytest.mark.parametrize(("size", "problem"), [(b"99999999999", "beyond"), (b"-1", "no number"), (b"1e3", "no number")])
def test_notes_with_a_wrong_size_are_refused(size: bytes, problem: str) -> None:
    record = b" size=" + size + b"\n"
    record = str(len(record) + 2).encode() + record
    with pytest.raises(DataError, match=problem):
        listed(pax(record) + packed([("a.jpg", b"x")]))


def test_a_name_of_megabytes_is_not_read() -> None:
    with pytest.raises(DataError, match=r"have 2,000,\d+ bytes"):
        listed(packed([("a" * 2_000_000 + ".jpg", b"x")], tarfile.GNU_FORMAT))


def test_a_compressed_tar_is_refused_with_what_unpacks_it() -> None:
    with pytest.raises(DataError, match=r"x\.tar is compressed.*gunzip"):
        listed(gzip.compress(packed([("a.jpg", b"x")])))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_are_listed_or_refused(data: st.DataObject) -> None:
    whole = bytearray(packed([("a.jpg", b"x" * 600), ("b" * 150, b"y")], data.draw(st.sampled_from([1, 2]))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + 1] = data.draw(st.binary(min_size=1, max_size=3))
    whole = whole[: data.draw(st.integers(0, len(whole)))]
    with suppress(DataError):
        found = listed(bytes(whole))
        assert all(member.offset >= 0 and member.offset + member.size <= len(whole) for member in found.members)


def test_what_the_helper_writes_is_what_tarfile_reads(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.cls", b"2")]).read_bytes()
    assert [name for name, _, _ in by_tarfile(data)] == ["a.jpg", "a.cls"]
