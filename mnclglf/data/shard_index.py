"""Samples of a shard, and the index of their places in DALI's format.

A shard is a tar file as WebDataset writes it: members that follow each other and share a key, which is the name up to
the first dot of its last part, are one sample. The index is text. Its first line is the version and the number of
samples; each further line has for every component of a sample its extension, offset, size and name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote

from mnclglf.data.decoding import SUFFIXES
from mnclglf.data.errors import DataError
from mnclglf.data.tars import BLOCK, Member, is_header

VERSION = "v1.2"
MOST_LABEL = 2**20  # bytes of a member that holds a label
_CHECKED = 8  # members whose headers are compared with an index
_JSON_LABELS = ("label", "cls")
_DIGITS = re.compile("[0-9]{1,10}")
_BLANK = re.compile(r"\s")


class Sample(NamedTuple):
    """Members of a shard that belong together."""

    key: str
    components: dict[str, Member]
    """Members by extension, which is the name after the key and its dot."""


def group(members: Iterable[Member], place: str) -> list[Sample]:
    """Returns the samples of a shard; members without a key or an extension, as hidden files, are left out.

    Raises:
        DataError: a key comes again after another, or an extension twice under one key.
    """
    samples: list[Sample] = []
    keys = set[str]()
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot:
            continue
        key = f"{folder}{slash}{stem}"
        if not samples or samples[-1].key != key:
            if key in keys:
                raise DataError(
                    f"{place} holds members of {key!r} that do not follow each other; pack it anew in the order of the "
                    "names (tar --sort=name)"
                )
            keys.add(key)
            samples.append(Sample(key, {}))
        if extension in samples[-1].components:
            raise DataError(f"{place} holds {member.name!r} twice; pack it anew with each name once")
        samples[-1].components[extension] = member
    return samples


def image_of(sample: Sample) -> Member | None:
    """Returns the image of a sample, None if it has none: that of an extension such as jpg, else such as large.jpg.

    Raises:
        DataError: there are several; the message goes on after the sample's key.
    """
    whole = [member for ext, member in sample.components.items() if f".{ext.lower()}" in SUFFIXES]
    found = whole or [
        member for ext, member in sample.components.items() if f".{ext.lower().rpartition('.')[2]}" in SUFFIXES
    ]
    if len(found) > 1:
        names = ", ".join(repr(member.name) for member in found)
        raise DataError(f"has several images, {names}; pack it anew with one image per sample")
    return found[0] if found else None


def label_of(sample: Sample, read: Callable[[Member], bytes]) -> int | None:
    """Returns the number of a sample's class, from its .cls or its .json; None if it has no label.

    Raises:
        DataError: it is no whole number from 0 on, or there are two; the message goes on after the sample's key.
    """
    found: dict[str, int] = {}
    for extension, member in sample.components.items():
        kind = extension.lower()
        if kind not in ("cls", "json"):
            continue
        if member.size > MOST_LABEL:
            raise DataError(f"has a .{extension} of {member.size:,} bytes, which is too long for a label")
        data = read(member)  # what fails here is not the sample's fault
        try:
            text = data.decode()
            said = {kind: text.strip()} if kind == "cls" else _json_labels(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"has a .{extension} that cannot be read ({error})") from error
        for name, value in said.items():
            number = int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
                raise DataError(
                    f"has the label {value!r:.40} in its .{extension}; give the number of its class, from 0 on"
                )
            found[f"{name} of its .{extension}" if kind == "json" else "its .cls"] = number
    if len(set(found.values())) > 1:
        raise DataError(f"has several labels: {', '.join(f'{value} in {name}' for name, value in found.items())}")
    return next(iter(found.values()), None)


def _json_labels(text: str) -> dict[str, object]:
    values = json.loads(text)
    return {name: values[name] for name in _JSON_LABELS if name in values} if isinstance(values, dict) else {}


def index_text(samples: Sequence[Sample]) -> str:
    """Returns the index of a shard, with names as they are.

    Raises:
        ValueError: a name holds a blank, which the format cannot tell from the end of the name.
    """
    if any(_BLANK.search(member.name) for sample in samples for member in sample.components.values()):
        raise ValueError("a name holds a blank")
    return _text(samples, str)


def quoted_index_text(samples: Sequence[Sample]) -> str:
    """Returns the index of a shard with quoted names, as addresses have them, for our own use."""
    return _text(samples, lambda name: quote(name, errors="surrogateescape"))


def _text(samples: Sequence[Sample], written: Callable[[str], str]) -> str:
    lines = [f"{VERSION} {len(samples)}"]
    for sample in samples:
        parts = (
            f"{written(extension)} {member.offset} {member.size} {written(member.name)}"
            for extension, member in sample.components.items()
        )
        lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"


def parse_index(text: str, size: int, *, quoted: bool = False) -> list[Sample] | None:
    """Returns the samples of an index; None if it is no index of a shard of this size.

    Args:
        text: contents of the index.
        size: bytes of the shard.
        quoted: whether names are quoted.
    """
    first, *lines = text.split("\n")
    version, _, count = first.partition(" ")
    if version != VERSION or lines[-1:] != [""] or count != str(len(lines) - 1):
        return None
    members: list[Member] = []
    try:
        for line in lines[:-1]:
            words = line.split(" ")
            for extension, offset, length, name in zip(*[iter(words)] * 4, strict=True):
                name, extension = (
                    (unquote(name, errors="surrogateescape"), unquote(extension)) if quoted else (name, extension)
                )
                member = Member(name, int(offset), int(length))
                inside = member.offset >= BLOCK and member.size >= 0 and member.offset + member.size <= size
                if not inside or member.offset % BLOCK or not name.endswith(f".{extension}"):
                    return None
                members.append(member)
        samples = group(members, "")
    except ValueError:
        return None
    return samples if len(samples) == len(lines) - 1 else None


def is_fresh(samples: Sequence[Sample], read: Callable[[int, int], bytes]) -> bool:
    """Returns whether members of an index, evenly spaced, are in the shard where it says."""
    members = [member for sample in samples for member in sample.components.values()]
    step = max(1, (len(members) - 1) // (_CHECKED - 1))
    return all(
        is_header(read(member.offset - BLOCK, BLOCK), member.size) for member in {*members[::step], *members[-1:]}
    )
