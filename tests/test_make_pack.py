"""tools/make_pack.py: a pack holds what was asked for, with the machine code of one GPU architecture."""

import struct
import tarfile

import pytest

from tools import make_pack

PTX, MACHINE_CODE = 1, 2


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Returns a fat binary with entries of (kind, architecture, payload), by the format that NVIDIA's tools write."""
    body = b""
    for kind, arch, payload in entries:
        header = struct.pack("<HHIQQII", kind, 0x101, 64, len(payload), 0, 0, arch)  # the architecture at byte 28
        body += header.ljust(64, b"\0") + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_one_architecture_is_kept(tmp_path):
    library = tmp_path / "library.so.1"
    code = fat_binary((MACHINE_CODE, 80, b"a" * 40), (MACHINE_CODE, 90, b"b" * 24), (PTX, 90, b"c" * 16))
    looks_like_one = struct.pack("<IHH", 0xBA55ED50, 9, 16)
    library.write_bytes(b"before" + code + looks_like_one + b"between" + code + b"after" + b"\x50\xed\x55\xba")
    size = library.stat().st_size
    assert make_pack.keep_architecture(library, 90) == 2 * (40 + 16)
    data = library.read_bytes()
    assert len(data) == size
    assert data.count(b"b" * 24) == 2
    assert b"aa" not in data
    assert b"cc" not in data
    assert all(word in data for word in (b"before", b"between", b"after"))


def test_a_library_without_the_architecture_is_left_whole(tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(fat_binary((MACHINE_CODE, 80, b"a" * 40)))
    before = library.read_bytes()
    assert make_pack.keep_architecture(library, 86) == 0
    assert library.read_bytes() == before


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_a_pack_is_one_folder_without_what_nobody_imports(suffix, tmp_path):
    folder = tmp_path / "packages"
    (folder / "one").mkdir(parents=True)
    for name in ("__init__.py", "header.h", "library.a", "library.so"):
        (folder / "one" / name).write_text(name)
    make_pack.write_pack(folder, tmp_path / f"made{suffix}", 90)
    with tarfile.open(tmp_path / f"made{suffix}") as archive:
        found = {name for name in archive.getnames() if "." in name}
    assert found == {"pack/one/__init__.py", "pack/one/library.so"}


def test_another_kind_of_file_is_refused_before_pip_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_pack.main([str(tmp_path / "made.zip"), "lightly"])
    assert "made.zip" in capsys.readouterr().err
