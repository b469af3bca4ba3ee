"""Members of a tar file by offset and size. Nothing is extracted: names are only names, and what is no file is ignored.

It reads the forms in use: POSIX (ustar and pax) and GNU's. A damaged or truncated file raises DataError, which
names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple, NoReturn

from mnclglf.data.errors import DataError

BLOCK = 512  # bytes of a header; contents are padded to a multiple
MOST_META = 2**20  # bytes of a long name or of pax records
_MOST_DIGITS = 8  # of the length of a record, and the blank after it
_FILES = (b"0", b"\0", b"7")
_FOLDER, _SPARSE, _LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"5", b"S", b"L", b"K", b"x", b"g"
_OTHERS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", _SPARSE: "sparse"}
_PACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}

ReadAt = Callable[[int, int], bytes]
"""Returns the bytes of a file from an offset on, so many, or fewer at its end."""


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Place of its contents in bytes from the start of the tar."""
    size: int
    """Bytes of its contents."""


@dataclass
class Listing:
    """What a tar holds."""

    members: list[Member] = field(default_factory=list[Member])
    ignored: list[str] = field(default_factory=list[str])
    """Names of the members that are not read, each with the reason."""


def list_members(read: ReadAt, size: int, place: str) -> Listing:
    """Lists the files in a tar, in its order.

    Args:
        read: reads the tar.
        size: bytes of the tar.
        place: name of the tar, for messages.

    Raises:
        DataError: the tar is compressed, damaged, or ends too early.
    """
    _check_start(read(0, 8), place)
    listing = Listing()
    for name, offset, length, kind in _headers(read, size, place):
        problem = _problem(name, kind)
        if problem:
            listing.ignored.append(f"{name[:200]!r} ({problem})")
        elif kind != _FOLDER and not name.endswith("/"):  # as the first form of tar had folders
            listing.members.append(Member(name, offset, length))
    return listing


def is_header(header: bytes, size: int) -> bool:
    """Returns whether a block is the header of a file of this size, as it stands before the file's contents."""
    try:
        return len(header) == BLOCK and _checksum_fits(header) and _number(header[124:136]) == size
    except ValueError:
        return False


def _check_start(start: bytes, place: str) -> None:
    for magic, program in _PACKERS.items():
        if start.startswith(magic):
            raise DataError(f"{place} is compressed, so nothing in it can be read alone; unpack it with {program}")


def _headers(read: ReadAt, size: int, place: str) -> Iterator[tuple[str, int, int, bytes]]:
    """Yields name, offset and size of the contents, and kind of every member."""

    def refuse(problem: str) -> NoReturn:
        raise DataError(f"{place} {problem} at byte {at:,}; copy it again, or pack it anew")

    at, long_name, of_all, of_next = 0, "", dict[str, str](), dict[str, str]()
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            refuse("is cut: it ends without the mark of a tar's end")
        if not any(header):
            return
        if not _checksum_fits(header):
            refuse("is damaged or no tar: the checksum of a header is wrong")
        kind, notes = header[156:157], {**of_all, **of_next}
        is_meta = kind in (_PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK)
        try:
            length = _number(header[124:136])
            if "size" in notes and not is_meta:
                length = _number(notes["size"].encode(), base=10)
        except ValueError:
            refuse("is damaged: a header holds a size that is no number")
        start = at + BLOCK
        if kind == _SPARSE:
            start += _more_headers(read, header, at)
        if start + length > size:
            refuse(f"is cut, or lies: a member of {length:,} bytes goes beyond its end")
        after = start + -(-length // BLOCK) * BLOCK
        if is_meta:
            if length > MOST_META:
                refuse(f"is damaged: a name or its notes have {length:,} bytes")
            data = read(start, length)
            if kind == _LONG_NAME:
                long_name = _text(data)
            elif kind != _LONG_LINK:
                try:
                    (of_all if kind == _PAX_OF_ALL else of_next).update(_pax_records(data))
                except ValueError:
                    refuse("is damaged: the notes of a member cannot be read")
        else:
            sparse = any(key.startswith("GNU.sparse") for key in notes)
            yield notes.get("path") or long_name or _name(header), start, length, _SPARSE if sparse else kind
            long_name, of_next = "", {}
        at = after


def _more_headers(read: ReadAt, header: bytes, at: int) -> int:
    """Returns the bytes of the further headers of a sparse member in GNU's form."""
    extra, more = 0, header[482:483]
    while more not in (b"", b"\0"):
        extra += BLOCK
        more = read(at + extra, BLOCK)[504:505]
    return extra


def _checksum_fits(header: bytes) -> bool:
    try:
        said = _number(header[148:156])
    except ValueError:
        return False
    counted = header[:148] + b" " * 8 + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in counted) if not counted.isascii() else sum(counted)
    return said in (sum(counted), signed)  # old programs added signed bytes


def _number(text: bytes, base: int = 8) -> int:
    """Returns a number of a header, in digits or in GNU's binary form.

    Raises:
        ValueError: it is none, or negative.
    """
    if text.startswith(b"\x80"):
        return int.from_bytes(text[1:])
    digits = text.partition(b"\0")[0].strip()
    if digits.startswith((b"-", b"+")) or b"_" in digits:
        raise ValueError(digits)
    return int(digits or b"0", base)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    """Returns the records of a pax header: each is its length, a blank, a key, =, a value and a newline."""
    records: dict[str, str] = {}
    data, at = data.rstrip(b"\0"), 0
    while at < len(data):
        length = int(data[at : at + _MOST_DIGITS].partition(b" ")[0])
        record = data[at : at + length]
        text = record.partition(b" ")[2]
        if not record.endswith(b"\n") or length != len(record) or b"=" not in text:
            raise ValueError(record)
        at += length
        key, _, value = text[:-1].partition(b"=")
        records[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
    return records


def _problem(name: str, kind: bytes) -> str:
    """Returns why a member is not read; empty if it is."""
    if kind not in (*_FILES, _FOLDER):
        return f"it is {_OTHERS.get(kind, 'of an unknown kind')}"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "its name points outside"
    return ""
