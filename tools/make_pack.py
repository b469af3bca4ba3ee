"""Makes a pack for `make gpu-day`: Python packages in one file, to carry to a machine that has no network.

    python tools/make_pack.py dali.tar.xz --arch 90 nvidia-dali-cuda130==2.4.0 optree gast makefun astunparse
    python tools/make_pack.py lightly.tar lightly

pip takes the packages without their dependencies. With --arch, the libraries keep the machine code of one GPU
architecture (90 for H100 and H200, 86 for an RTX 3090): that of the others is overwritten with zeros, which compress to
nothing. Take the Python version of the machine that the pack is for.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)  # begins a fat binary: magic, version 1, size of the header 16, size of the rest
PTX, MACHINE_CODE = 1, 2  # kinds of an entry, each of which has a header of its own
UNNEEDED = {".a", ".h", ".hpp", ".pyc"}
SUFFIXES = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}


def keep_architecture(library: Path, arch: int) -> int:
    """Zeroes the entries of a library's fat binaries that are no machine code for `arch`; returns the bytes zeroed.

    A library without machine code for `arch` is left as it is.
    """
    data = bytearray(library.read_bytes())
    kept, zeroed, position = 0, 0, data.find(MAGIC)
    while position >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data.ljust(position + 16, b"\0"), position)
        end = position + header + size
        if version != 1 or header != 16 or end > len(data):  # four bytes that look like the magic number
            position = data.find(MAGIC, position + 4)
            continue
        entry = position + header
        while entry + 32 <= end:
            kind, _, entry_header, payload, entry_arch = struct.unpack_from("<HHIQ12xI", data, entry)
            if kind not in (PTX, MACHINE_CODE) or entry_header < 32 or entry + entry_header + payload > end:
                break
            if kind == MACHINE_CODE and entry_arch == arch:
                kept += payload
            else:
                data[entry + entry_header : entry + entry_header + payload] = bytes(payload)
                zeroed += payload
            entry += entry_header + payload
        position = data.find(MAGIC, end)
    if not kept:
        return 0
    library.write_bytes(data)
    return zeroed


def write_pack(folder: Path, out: Path, arch: int | None) -> None:
    """Writes the packages in a folder into a tar file, whose folder is `pack`."""
    for path in [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]:
        if path.suffix in UNNEEDED:
            path.unlink()
        elif arch is not None and ".so" in path.suffixes:
            zeroed = keep_architecture(path, arch)
            if zeroed:
                print(f"{path.name}: {zeroed / 1e6:.1f} MB zeroed")
    with tarfile.open(out, SUFFIXES[out.suffix]) as archive:
        archive.add(folder, "pack")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/make_pack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="file to write: .tar, .tar.gz or .tar.xz")
    parser.add_argument("packages", nargs="+", help="requirements for pip")
    parser.add_argument("--arch", type=int, help="GPU architecture to keep, 90 for sm_90; default: all")
    parser.add_argument("--python-version", help="of the other machine, as 3.12; default: this interpreter's")
    options = parser.parse_args(arguments)
    if options.out.suffix not in SUFFIXES:
        parser.error(f"{options.out} must end in {', '.join(SUFFIXES)}")
    version = ["--python-version", options.python_version] if options.python_version else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pack"
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--target", str(folder)]
        if subprocess.run([*pip, *version, *options.packages], check=False).returncode:
            return 1  # pip has said why
        write_pack(folder, options.out, options.arch)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
