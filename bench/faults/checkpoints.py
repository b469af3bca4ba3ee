"""Attacks on the file of a checkpoint: flipped bits, lost ends, archives that lie, and pickles that want to run.

    python -m bench.faults.checkpoints --flips 500 --truncations 50 --seed 0

A file that was changed must be refused, or hold the numbers that were saved. No attack runs code of the file, raises
anything but CheckpointError, or reserves more memory than a reader of the whole file would.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.faults.outcome import Row
from mnclglf.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

RESERVE = 2**27  # bytes that a load of these small files may reserve: threads and libraries are loaded meanwhile
BOMB = 2**33
# What torch.load(weights_only=True) would call with the arguments of the file, and some that it would not.
CALLED = (
    "builtins bytearray",
    "__builtin__ bytearray",
    "builtins set",
    "collections Counter",
    "torch FloatStorage",
    "torch FloatTensor",
    "torch Size",
    "torch Tensor",
    "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch.nn.parameter Parameter",
    "torch.storage UntypedStorage",
)
STEP = 7


class Outcomes(NamedTuple):
    """What one kind of attack did."""

    attack: str
    tried: int
    refused: int
    harmless: int
    lost: list[str]


def run(flips: int, truncations: int, seed: int) -> list[Outcomes]:
    """Returns a row per kind of attack."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = make_checkpoint(place).read_bytes()
        older = data_of_torch(data)
        generator = np.random.default_rng(seed)
        rows = [
            _row("flipped bit", place, flipped(data, flips, generator)),
            _row("flipped bit, no checksum in the file", place, flipped(older, flips, generator)),
            _row("lost end", place, cut(data, truncations, generator)),
            _row("lost end, no checksum in the file", place, cut(older, truncations, generator)),
        ]
        ran = place / "ran"
        for name, forged in (*harmful(data, ran), *lying(data)):
            files = [(name, forged)]
            if forged.startswith(b"PK"):
                files.append((f"{name}, with a checksum", signed(forged)))
            rows.append(_row(name, place, iter(files)))
            if ran.exists():
                rows[-1].lost.append("it ran")
                ran.unlink()
        return rows


def state() -> dict[str, Any]:
    """Returns a state of many small tensors, as those of a run."""
    generator = torch.Generator().manual_seed(0)
    method = OrderedDict((f"layer{i}.weight", torch.randn(8, 3, i % 5 + 1, generator=generator)) for i in range(40))
    method["queue"] = torch.randn(64, 8, generator=generator).to(torch.bfloat16)
    method["filled"] = torch.tensor(64)
    buffers = {i: {"momentum_buffer": torch.randn(8, 3, generator=generator)} for i in range(10)}
    optimizer = {"state": buffers, "param_groups": [{"lr": 0.1, "params": list(range(10))}]}
    return {"config": "{}", "method": method, "optimizer": optimizer, "rng": torch.get_rng_state(), "cuda_rng": None}


def make_checkpoint(folder: Path) -> Path:
    """Writes a checkpoint of `state`."""
    return save_checkpoint(folder, STEP, state())


def data_of_torch(data: bytes) -> bytes:
    """Returns the archive as torch.save wrote it, as files of earlier versions are."""
    end = data.rindex(b"PK\x05\x06") + 22
    return data[: end - 2] + b"\0\0"


def signed(archive: bytes) -> bytes:
    """Returns an archive with the checksum of its content, which anyone can compute."""
    comment = b"mnclglf checkpoint, format 2, sha256 "
    comment += hashlib.sha256(archive + comment).hexdigest().encode()
    return archive[:-2] + struct.pack("<H", len(comment)) + comment


def regions(data: bytes) -> dict[str, list[int]]:
    """Returns the places of the bytes of an archive: pickle, tensors, headers with padding, directory, end."""
    parts: dict[str, list[int]] = {"pickle": [], "tensors": [], "headers": []}
    after = 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.start_dir
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<2H", data, entry.header_offset + 26)
            content = entry.header_offset + 30 + name + extra
            parts["headers"] += range(after, content)
            after = content + entry.file_size
            parts["pickle" if entry.filename.endswith("data.pkl") else "tensors"] += range(content, after)
    end = data.rindex(b"PK\x05\x06")
    parts["headers"] += range(after, start)
    return {**parts, "directory": [*range(start, end)], "end": [*range(end, len(data))]}


def flipped(data: bytes, count: int, generator: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yields copies with one bit flipped, as many in each region of the file."""
    parts = regions(data)
    for number in range(count):
        name = [*parts][number % len(parts)]
        place, bit = int(generator.choice(parts[name])), int(generator.integers(8))
        yield f"bit {bit} of byte {place} ({name})", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def cut(data: bytes, count: int, generator: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yields the beginnings of a file; half of them lack a few bytes only."""
    for number in range(count):
        lost = int(generator.integers(1, 300 if number % 2 else len(data) + 1))
        yield f"{lost} bytes lost", data[: len(data) - lost]


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def harmful(data: bytes, ran: Path) -> Iterator[tuple[str, bytes]]:
    """Yields files in every form that torch.load accepts, which make the file `ran` if their code is run."""
    evil = {"format": 1, "step": Touches(ran)}
    pickled = pickle.dumps(evil, 2)
    buffer = io.BytesIO()
    torch.save(evil, buffer)
    yield "pickle in an archive", buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(evil, buffer, _use_new_zipfile_serialization=False)
    yield "pickle in a stream (before torch 1.6)", buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            tar.addfile(info, io.BytesIO(pickled))
    yield "pickle in a tar file (before torch 0.2)", buffer.getvalue()
    for protocol in range(6):
        yield f"bare pickle, protocol {protocol}", pickle.dumps(evil, protocol)
        yield f"pickle in an archive, protocol {protocol}", changed(data, {"data.pkl": pickle.dumps(evil, protocol)})
    yield (
        "TorchScript",
        changed(data, {"constants.pkl": pickled, "code/__torch__.py": b"import os", "data.pkl": pickled}),
    )
    package = {".data/extern_modules": b"os\n", ".data/version": b"6", "model/model.pkl": pickled, "evil.py": b"1/0"}
    yield "torch.package", changed(data, package)
    for name in ("byteorder", ".data/serialization_id", "version", ".format_version", ".storage_alignment", "evil.pkl"):
        yield f"pickle as {name}", changed(data, {name: pickled})


def lying(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields archives that promise more than they have, name what torch would call, or are marked as folders."""
    number = struct.pack("<i", 2**31 - 1)
    for name in CALLED:
        module, function = name.encode().split()
        called = b"\x80\x02c%b\n%b\nJ%b\x85R." % (module, function, number)
        yield f"{name.replace(' ', '.')}(2147483647)", changed(data, {"data.pkl": called})
        made = b"\x80\x02c%b\n%b\nJ%b\x85\x81." % (module, function, number)
        yield f"new {name.replace(' ', '.')}(2147483647)", changed(data, {"data.pkl": made})
    codec = b"\x80\x02c_codecs\nencode\nX\x08\0\0\0AAAAAAAAX\x04\0\0\0idna\x86R."
    yield "_codecs.encode", changed(data, {"data.pkl": codec})
    yield "a storage of 8 GiB", changed(data, {"data.pkl": tensor_pickle(BOMB // 4, (2,))})
    yield "a tensor of 8 GiB", changed(data, {"data.pkl": tensor_pickle(8, (BOMB // 4,))})
    yield "lists in lists", changed(data, {"data.pkl": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."})
    yield "lists without end", changed(data, {"data.pkl": b"\x80\x02(" + b"]" * 5_000_000 + b"l."})
    for name, value in (
        ("step", torch.tensor(3)),
        ("step", -1),
        ("step", True),
        ("config", 3),
        ("method", []),
        ("mean", 1),
    ):
        buffer = io.BytesIO()
        torch.save({"step": STEP, **state(), "format": 1, name: value}, buffer)
        yield f"{name} is {value!r}", buffer.getvalue()
    yield "deflated", changed(data, {}, compression=zipfile.ZIP_DEFLATED)
    yield "deflated 256 MiB", changed(data, {"data/0": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED)
    older = data_of_torch(data)
    for name, field, size in (("size", 24, "<I"), ("packed size", 20, "<I"), ("place", 42, "<I")):
        yield f"{name} of 4 GiB in the directory", in_directory(older, field, struct.pack(size, 2**32 - 2))
    yield "tensors marked as folders", in_directory(older, 38, b"\x10", only=b"/data/")
    yield "one tensor marked as a folder", in_directory(older, 38, b"\x10", only=b"/data/17")
    yield "all marked as folders", in_directory(older, 38, b"\x10")
    yield (
        "marked as folders, and of 4 GiB",
        in_directory(in_directory(older, 38, b"\x10"), 24, struct.pack("<I", 2**32 - 2)),
    )
    yield "the same bytes in 1,000 entries", overlapping(older, 1000)
    for name, place in (("size", 12), ("place", 16)):
        end = older.rindex(b"PK\x05\x06")
        yield (
            f"{name} of the directory of 4 GiB",
            older[: end + place] + struct.pack("<I", 2**32 - 2) + older[end + place + 4 :],
        )
    yield "zip64 directory of 8 GiB", zip64(older, BOMB, 0)
    yield "zip64 directory elsewhere", zip64(older, 0, 64)


def changed(data: bytes, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns an archive with other content of some entries, or further entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        kept = {entry.filename: old.read(entry) for entry in old.infolist()}
        root = next(iter(kept)).partition("/")[0]
        for name, data_of_entry in (kept | {f"{root}/{name}": value for name, value in content.items()}).items():
            new.writestr(name, data_of_entry)
    return buffer.getvalue()


def tensor_pickle(count: int, shape: tuple[int]) -> bytes:
    """Returns the pickle of a state with a tensor whose storage is said to have `count` elements."""
    buffer = io.BytesIO()
    torch.save({"format": 1, "step": STEP, "weight": torch.arange(2**20)[:77_777]}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read("archive/data.pkl")

    def long(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    pickled = pickled.replace(b"J" + struct.pack("<i", 2**20), long(count)).replace(
        b"J" + struct.pack("<i", 77_777), long(shape[0])
    )
    assert pickled.count(b"\x8a\x08") == 2
    return pickled


def in_directory(data: bytes, field: int, value: bytes, only: bytes = b"") -> bytes:
    """Returns an archive with another value in a field of every entry of its directory whose name holds `only`."""
    end, changing = data.rindex(b"PK\x05\x06"), bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        place = archive.start_dir
    while place < end:
        after = place + 46 + sum(struct.unpack_from("<3H", data, place + 28))
        if only in data[place + 46 : after]:
            changing[place + field : place + field + len(value)] = value
        place = after
    return bytes(changing)


def overlapping(data: bytes, times: int) -> bytes:
    """Returns an archive whose directory has its largest tensor many times, under as many names."""
    end = data.rindex(b"PK\x05\x06")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start, entries = archive.start_dir, archive.infolist()
    largest = max(entries, key=lambda entry: entry.file_size)
    local = data[largest.header_offset + 30 :][: len(largest.filename)]
    found = re.search(re.escape(b"PK\x01\x02") + b".{42}" + re.escape(local), data[start:end], re.DOTALL)
    assert found is not None
    name = len(local)
    more = b"".join(found[0][:46] + local[: name - 4] + b"%04d" % number for number in range(times))
    directory = data[start:end] + more
    tail = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, len(entries) + times, len(entries) + times, len(directory), start, 0
    )
    return data[:start] + directory + tail


def zip64(data: bytes, size: int, shift: int) -> bytes:
    """Returns an archive with a zip64 directory record of another size, or in another place than is said."""
    end = data.rindex(b"PK\x05\x06")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size or end - start, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end - shift, 1)
    return data[:end] + record + locator + data[end:]


def outcome(path: Path) -> str:
    """Returns "refused", "harmless", or what was lost by loading a file."""
    before = reserved_bytes()
    try:
        found = load_checkpoint(path)
    except CheckpointError:
        found = None
    except BaseException as error:  # whatever it is, it is the finding
        return f"{type(error).__name__}: {error}"
    more = reserved_bytes() - before
    if more > RESERVE:
        return f"{more >> 20} MiB were reserved"
    if found is None:
        return "refused"
    wanted = {"step": STEP, **state()}
    same = all(equal(found.get(name), value) for name, value in wanted.items() if name != "rng")
    return "harmless" if same else "other numbers were loaded"


def equal(first: object, second: object) -> bool:
    """Returns whether two nested values are equal, tensors to the bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


def reserved_bytes() -> int:
    """Returns the most address space that this process ever had."""
    found = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _row(attack: str, folder: Path, files: Iterator[tuple[str, bytes]]) -> Outcomes:
    """Tries all files of an attack."""
    path = folder / f"step-{STEP:08d}.pt"
    outcomes: list[str] = []
    lost: list[str] = []
    for name, data in files:
        path.write_bytes(data)
        outcomes.append(outcome(path))
        if outcomes[-1] not in ("refused", "harmless"):
            lost.append(f"{name}: {outcomes[-1]}")
    return Outcomes(attack, len(outcomes), outcomes.count("refused"), outcomes.count("harmless"), lost)


def attack(count: int, seed: int, folder: Path) -> Iterator[Row]:
    """Does what `run` says, with a tenth as many lost ends as flipped bits."""
    forged = Row("checkpoint: forged archives and pickles")
    for found in run(count, max(1, count // 10), seed):
        if found.attack.startswith(("flipped", "lost")):
            yield Row(f"checkpoint: {found.attack}", found.tried, found.lost)
        else:
            forged.tried += found.tried
            forged.lost += found.lost
    yield forged


def main() -> int:
    """Prints a table of the attacks; returns 1 if one of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--truncations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = run(arguments.flips, arguments.truncations, arguments.seed)
    print("| attack | tried | refused | harmless | lost |\n|---|--:|--:|--:|---|")
    for row in rows:
        print(f"| {row.attack} | {row.tried} | {row.refused} | {row.harmless} | {'; '.join(row.lost) or 'nothing'} |")
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
