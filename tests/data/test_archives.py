from __future__ import annotations

import codecs
import errno
import gzip
import io
import math
import os
import pickle
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mnclglf.data import archives
from mnclglf.data.archives import (
    DataError,
    extract,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_pickle,
)
from mnclglf.data.datasets import load_dataset
from mnclglf.data.decoding import read_image
from mnclglf.data.sources.source import check_md5


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["images-idx3-ubyte", "images-idx3-ubyte.gz"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (7,)])
def test_idx_gives_the_array_back(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(read_idx(write(tmp_path / name, idx_bytes(array))), array)


IDX = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (IDX[:-1], "promises 24 bytes and it holds 23"),
        (IDX + b"x", "promises 24 bytes and it holds more"),
        (IDX[:10], "ends within its header"),
        (b"", "not an IDX file"),
        (b"\0\0\x0d" + IDX[3:], "not an IDX file of bytes"),  # floats
        (b"\x89PNG" + IDX, "not an IDX file"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 2), "more than"),
    ],
)
@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_idx_of_another_length_or_format_is_refused(tmp_path: Path, data: bytes, problem: str, name: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=problem) as raised:
        read_idx(path)
    assert str(path) in str(raised.value)
    assert "--download" in str(raised.value)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(IDX * 100)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # its checksum
    for number, data in enumerate([whole[:-12], bytes(flipped), b"not gzip at all", b""]):
        path = tmp_path / f"{number}.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"\.gz: "):
            read_idx(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "absent.gz")


# CIFAR-10: the same images in both published forms


def cifar_records(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels [count, 3, 32, 32] and labels [count]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, count)


class _Python2Pickler(pickle._Pickler):
    """Pickler that writes strings and bytes as Python 2's str, as in the published files."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_str2(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        pickler: Any = self  # the stubs leave out the methods that _Pickler calls
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        pickler.memoize(value)

    dispatch[str] = dispatch[bytes] = save_str2


def cifar_pickle(count: int, *, python2: bool, core: bytes = b"numpy.core.multiarray") -> bytes:
    pixels, labels = cifar_records(count)
    batch = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": labels.tolist(),
        b"data": pixels.reshape(count, 3072),
        b"filenames": [b"leptodactylus_pentadactylus_s_%06d.png" % number for number in range(count)],
    }
    stream = io.BytesIO()
    (_Python2Pickler if python2 else pickle.Pickler)(stream, protocol=2).dump(batch)
    return stream.getvalue().replace(b"numpy._core.multiarray", core)


@pytest.mark.parametrize("form", ["binary", "python2", "python3", "numpy2"])
def test_cifar10_images_come_back_in_either_form(tmp_path: Path, form: str) -> None:
    pixels, labels = cifar_records(6)
    path = tmp_path / "data_batch_1"
    if form == "binary":
        path.write_bytes(
            b"".join(bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True))
        )
        images, found = read_cifar_binary(path, 6)
    else:
        core = b"numpy._core.multiarray" if form == "numpy2" else b"numpy.core.multiarray"
        path.write_bytes(cifar_pickle(6, python2=form == "python2", core=core))
        images, found = read_cifar_pickle(path, 6)
    assert images.shape == (6, 32, 32, 3)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, labels)
    for number, row, column, channel in ((0, 0, 0, 0), (5, 31, 0, 2), (3, 2, 17, 1)):
        assert images[number, row, column, channel] == pixels[number, channel, row, column]


@pytest.mark.parametrize("size", [0, 3073 * 6 - 1, 3073 * 6 + 1, 3073 * 5])
def test_cifar10_binary_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "data_batch_1.bin", bytes(size))
    with pytest.raises(DataError, match=f"data_batch_1.bin.*{size:,}.*18,438"):
        read_cifar_binary(path, 6)


def test_cifar10_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels from 10 to 10, outside 0\.\.9"):
        read_cifar_binary(write(tmp_path / "batch", bytes([10]) + bytes(3072)), 1)


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ([1, 2], "holds a list"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "b'labels' is not a list of 2"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "b'labels' is not a list of 2"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, b"2"]}, "b'labels' is not a list of 2"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]}, "b'data' is not a uint8 array"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, r"of shape \(2, 3072\)"),
        ({b"data": [0] * 3072, b"labels": [1]}, "b'data' is not a uint8 array"),
    ],
)
def test_cifar10_pickle_of_other_contents_is_refused(tmp_path: Path, batch: object, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_cifar_pickle(write(tmp_path / "data_batch_1", pickle.dumps(batch, protocol=2)), 2)


class _Calls:
    """Object that pickles as a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    attacks = [
        _Calls(os.mkdir, str(marker)),
        _Calls(eval, f"__import__('os').mkdir({str(marker)!r})"),
        _Calls(getattr, "x", "upper"),
        _Calls(np.load, "x"),
        _Calls(np.ndarray, (2**20,)),
        np.array([_Calls(os.mkdir, str(marker))], dtype=object),
        np.array(["text"]),
        np.zeros(1, dtype=[("field", "u1")]),
        _Calls(bytearray, 2**40),
        _Calls(codecs.encode, "text", "rot13"),  # the maker of bytes, as another codec
    ]
    for number, attack in enumerate(attacks):
        path = write(tmp_path / f"{number}.pkl", pickle.dumps({b"data": attack}, protocol=2))
        with pytest.raises(DataError, match=f"{number}.pkl: is not a pickle of plain arrays"):
            read_pickle(path)
    assert not marker.exists()


def test_plain_arrays_and_scalars_are_admitted(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=code).reshape(2, 3) for code in ("<i4", ">i4", "u1", "<f8")]
    value = {b"a": arrays, b"b": np.float64(2.5), b"c": [1, (2.0, None, True)]}
    read = read_pickle(write(tmp_path / "file", pickle.dumps(value, protocol=2)))
    for found, array in zip(read[b"a"], arrays, strict=True):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=")  # numpy swaps the bytes as it reads
    assert read[b"b"] == 2.5
    assert read[b"c"] == value[b"c"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # keeps an object at place 2**31: 16 GB of places before it
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",  # a bytearray of 2**40 bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # and bytes
        b"\x80\x02\x8a\xff" + b"x.",
    ],
    ids=["memo", "bytearray", "bytes", "long"],
)
def test_a_pickle_takes_no_memory_that_it_only_promises(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "promise.pkl", data)
    tracemalloc.start()
    try:
        with suppress(DataError):
            read_pickle(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**24


def test_a_short_or_oversize_pickle_is_refused(tmp_path: Path) -> None:
    whole = cifar_pickle(2, python2=True)
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path = write(tmp_path / "short", whole[:length])
        with pytest.raises(DataError, match="short: is not a pickle"):
            read_pickle(path)
    with pytest.raises(DataError, match="more than 100"):
        read_pickle(write(tmp_path / "long", whole), largest=100)


def tar_with(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def test_tar_is_extracted_whole(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", ("batches/one", b"1"), ("batches/two", b"22"))
    made = extract(archive, tmp_path, "batches", ["one"])
    assert made == tmp_path / "batches"
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {"one": b"1", "two": b"22"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "batches"]  # no leftovers


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", b"x"),
        ("batches/../../evil", b"x"),
        link("batches/evil", "/etc/passwd", tarfile.SYMTYPE),
        link("batches/evil", "one", tarfile.SYMTYPE),
        link("batches/evil", "../../evil", tarfile.LNKTYPE),
        link("batches/evil", "", tarfile.FIFOTYPE),
    ],
)
def test_no_member_of_a_tar_may_leave_the_folder(tmp_path: Path, member: tuple[str, Any]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    archive = tar_with(folder / "a.tar.gz", ("batches/one", b"1"), member)
    with pytest.raises(DataError, match=r"a\.tar\.gz"):
        extract(archive, folder, "batches", ["one"])
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "a.tar.gz"]


def test_an_absolute_member_stays_in_the_folder_too(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    folder = tmp_path / "data"
    folder.mkdir()
    archive = tar_with(folder / "a.tar.gz", ("batches/one", b"1"), (str(outside), b"x"))
    extract(archive, folder, "batches", ["one"])  # the data filter makes such a name relative
    assert not outside.exists()


def test_a_tar_takes_no_memory_that_it_only_promises(tmp_path: Path) -> None:
    """Checks a name of 8 GB, and the first bytes of an xz file with a dictionary of 4 GB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**30
    header = info.tobuf(tarfile.GNU_FORMAT)
    for name, data in (("a.tar", header + bytes(512)), ("b.tar", b"\x5d\0\0" + b"\xff" * 10 + bytes(100))):
        (tmp_path / name).write_bytes(data)
        tracemalloc.start()
        with pytest.raises(DataError, match=name):
            extract(tmp_path / name, tmp_path, "made", ["one"])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24


def test_a_damaged_or_other_tar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tar_with(tmp_path / "whole.tar.gz", ("batches/one", np.random.default_rng(0).bytes(20_000)))
    for data in (whole.read_bytes()[:-9000], b"not a tar", b""):
        path = tmp_path / "damaged.tar.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"damaged\.tar\.gz"):
            extract(path, tmp_path, "batches", ["one"])
    with pytest.raises(DataError, match="holds no folder other"):
        extract(whole, tmp_path, "other", ["one"])
    monkeypatch.setattr(archives, "LARGEST_BYTES", 10_000)
    with pytest.raises(DataError, match="unpacks to 20,000 bytes, more than 10,000"):
        extract(whole, tmp_path, "batches", ["one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.tar.gz", "whole.tar.gz"]


# zip


def zip_with(path: Path, *members: tuple[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, "/etc/passwd")
    return path


def test_zip_is_extracted_whole(tmp_path: Path) -> None:
    archive = zip_with(tmp_path / "a.zip", ("made/one", b"1"), ("made/in/two", b"22"), ("beside", b"x"))
    made = extract(archive, tmp_path, "made", ["one"])
    assert made == tmp_path / "made"
    assert {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*") if path.is_file()} == {
        "one": b"1",
        "in/two": b"22",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "made"]


@pytest.mark.parametrize("name", ["../outside", "made/../../outside", "/tmp/outside", "made\\..\\outside"])
def test_no_member_of_a_zip_may_point_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    archive = zip_with(folder / "a.zip", ("made/one", b"1"), (name, b"x"))
    with pytest.raises(DataError, match=r"a\.zip: holds .*outside, which points outside"):
        extract(archive, folder, "made", ["one"])
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "a.zip"]


def test_a_zip_with_a_link_or_a_bomb_or_a_password_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = zip_with(tmp_path / "link.zip", ("made/one", b"1"), links=("made/link",))
    with pytest.raises(DataError, match="made/link, which is neither a file nor a folder"):
        extract(linked, tmp_path, "made", ["one"])
    bomb = zip_with(tmp_path / "bomb.zip", ("made/one", bytes(50_000)))
    monkeypatch.setattr(archives, "LARGEST_BYTES", 10_000)
    with pytest.raises(DataError, match="unpacks to 50,000 bytes, more than 10,000"):
        extract(bomb, tmp_path, "made", ["one"])
    data = bytearray(zip_with(tmp_path / "locked.zip", ("made/one", b"1")).read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1  # the flag of encryption
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"locked\.zip: cannot be extracted .*(?i:password|encrypt)"):
        extract(tmp_path / "locked.zip", tmp_path, "made", ["one"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.zip", "link.zip", "locked.zip"]


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks a file whose list promises one byte of many: only one byte is read, and the checksum differs."""
    path = zip_with(tmp_path / "lies.zip", ("made/one", bytes(50_000)))
    data = path.read_bytes().replace(struct.pack("<I", 50_000), struct.pack("<I", 1))
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"lies\.zip: cannot be extracted"):
        extract(path, tmp_path, "made", ["one"])
    assert [path.name for path in tmp_path.iterdir()] == ["lies.zip"]


def test_a_folder_that_is_there_is_not_unpacked_over(tmp_path: Path) -> None:
    archive = zip_with(tmp_path / "a.zip", ("made/one", b"1"))
    (tmp_path / "made").mkdir()
    with pytest.raises(DataError, match=r"made.*remove.*a\.zip"):
        extract(archive, tmp_path, "made", ["one"])
    assert list((tmp_path / "made").iterdir()) == []


def test_a_folder_that_is_there_and_whole_is_taken(tmp_path: Path) -> None:
    archive = zip_with(tmp_path / "a.zip", ("made/one", b"1"), ("made/two", b"2"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "one").write_bytes(b"another process's")
    with pytest.raises(DataError, match="made is there and not whole"):
        extract(archive, tmp_path, "made", ["one", "two"])
    (tmp_path / "made" / "two").touch()
    assert extract(archive, tmp_path, "made", ["one", "two"]) == tmp_path / "made"
    assert (tmp_path / "made" / "one").read_bytes() == b"another process's"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zip_with(tmp_path / "a.zip", ("made/one", b"1"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives, "_unpack_zip", full)
    with pytest.raises(DataError, match=r"a\.zip.*No space left.*room"):
        extract(archive, tmp_path, "made", ["one"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("sizes", [(0, 2**32 - 1, 2**32 - 1, 2**32 - 1), (1,) * 70])
def test_an_idx_of_impossible_axes_is_named(sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "images-idx3-ubyte"
    data = bytes(math.prod(sizes))
    path.write_bytes(struct.pack(f">4B{len(sizes)}I", 0, 0, 8, len(sizes), *sizes) + data)
    with pytest.raises(DataError, match=r"images-idx3-ubyte.*axes"):
        read_idx(path)


@pytest.mark.parametrize(
    "read",
    [
        read_idx,
        lambda path: read_cifar_binary(path, 1),
        read_pickle,
        lambda path: check_md5(path, "0"),
        lambda path: extract(path, path.parent, "made", ["one"]),
        read_image,
    ],
    ids=["idx", "cifar", "pickle", "md5", "archive", "image"],
)
def test_what_may_not_be_read_is_not_to_be_deleted(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.open

    def refused(path: Path, *arguments: Any, **options: Any) -> int:
        if Path(path).name == "a.tar":
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, *arguments, **options)

    (tmp_path / "a.tar").touch()
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(DataError, match=r"a\.tar.*make it readable") as raised:
        read(tmp_path / "a.tar")
    assert "delete" not in str(raised.value)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(DataError, match=r"Permission denied.*make it readable"):
        load_dataset("cifar10", tmp_path)
