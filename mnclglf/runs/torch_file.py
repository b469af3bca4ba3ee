"""Reading of what torch.save wrote: no code of the file is run, and no more memory is taken than the file has bytes."""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

MAX_DIRECTORY_BYTES = 2**24  # of the archive's directory: 200,000 tensors; Python takes ten times as much to read it
MAX_PICKLE_BYTES = 2**22  # of the pickle: 30,000 tensors; every byte of it can make an object of 64 bytes
END, END64_LOCATOR, END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
LONGEST_COMMENT = 200  # bytes

# What the pickle may name. torch.load(weights_only=True) allows more, and calls it as the file says: bytearray(2**33).
PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (?!Untyped|Typed)[A-Z]\w*Storage"
)


class NotPlainError(ValueError):
    """A file holds more than tensors and plain values."""


def read_comment(file: BinaryIO) -> bytes:
    """Returns the comment at the end of a zip archive.

    Python and torch each have a reader. They agree where the end is alone where it should be, as is checked here.

    Raises:
        ValueError: the file does not end as a zip archive does, or has too large a directory.
    """
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is no archive of torch.save, which writes one since torch 1.6")
    size = file.seek(0, 2)
    file.seek(max(0, size - LONGEST_COMMENT - END.size))
    tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) < place + END.size:
        raise ValueError("its end is missing")
    *_, length, start, comment_length = END.unpack_from(tail, place)
    comment = tail[place + END.size :]
    if comment_length != len(comment):
        raise ValueError("its end is missing")
    end = size - len(tail) + place
    if end >= END64_LOCATOR.size:
        file.seek(end - END64_LOCATOR.size)
        signature, _, place64, _ = END64_LOCATOR.unpack(file.read(END64_LOCATOR.size))
        if signature == b"PK\x06\x07":  # of more than 4 GiB, or 65,535 entries
            end -= END64_LOCATOR.size + END64.size
            if place64 != end:
                raise ValueError("its directory is damaged")
            file.seek(end)
            *_, length, start = END64.unpack(file.read(END64.size))
    if start + length != end or length > MAX_DIRECTORY_BYTES:
        raise ValueError("its directory is damaged")
    return comment


def check_archive(file: BinaryIO, *, checksums: bool) -> None:
    """Checks the directory of a zip archive before torch, whose reader is trusting, reads the file by it.

    torch reads an entry that is marked as a folder as no bytes at all, and leaves the memory for it as it was. It
    reserves the size that an entry is said to have.

    Args:
        file: the archive.
        checksums: compare every entry with its CRC too. Reads the whole file.

    Raises:
        ValueError, zipfile.BadZipFile: the archive is damaged, or not one that torch.save wrote.
    """
    size = file.seek(0, 2)
    read_comment(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.orig_filename for entry in entries]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"it has {repeated[0]!r} twice")
        if len({name.partition("/")[0] for name in names}) != 1 or not all(map(str.isprintable, names)):
            raise ValueError("its entries are not in one folder")
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored or entry.external_attr & 0x10 or entry.flag_bits & ~0x808:
                raise ValueError(f"{entry.filename} is not stored as torch.save does")
            if entry.header_offset + entry.file_size > size:
                raise ValueError(f"{entry.filename} ends after the file")
        promised = sum(entry.file_size for entry in entries)
        if promised > size:
            raise ValueError(f"its entries have {promised:,} bytes, and the file {size:,}")
        damaged = archive.testzip() if checksums else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")


def load_plain(file: BinaryIO) -> Any:
    """Returns the tensors, on the CPU, and plain values of an archive that `check_archive` has checked.

    Raises:
        NotPlainError: the file holds anything else. Nothing of it was made or run.
        Exception: of any kind, if torch cannot read the file.
    """
    for name in _named(file):
        if not PLAIN.fullmatch(name):
            raise NotPlainError(f"it names {name.replace(' ', '.')}")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _named(file: BinaryIO) -> Iterator[str]:
    """Yields the functions and classes that the pickle of an archive names; makes none of its objects."""
    with zipfile.ZipFile(file) as archive:
        root = archive.infolist()[0].filename.partition("/")[0]
        entry = archive.getinfo(f"{root}/data.pkl")
        if entry.file_size > MAX_PICKLE_BYTES:
            raise NotPlainError(f"its pickle has {entry.file_size:,} bytes, more than {MAX_PICKLE_BYTES:,}")
        pickled = archive.read(entry)
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL":
            yield str(argument)
        elif code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"):
            yield code.name
