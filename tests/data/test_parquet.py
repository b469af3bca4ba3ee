"""parquet:PATTERN: the batches of a folder with the same images, columns, labels, corrupt rows, the unpacked copy."""

from __future__ import annotations

import builtins
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hub_parquet import IMAGE, hub_metadata, load_parquet, write_parquet, write_table
from image_folder import load as load_folder
from image_folder import pixels
from shards import encoded, load_shards

from mnclglf.cli import main
from mnclglf.config import ViewConfig, moved, short_name
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageSet
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import make_loader
from mnclglf.data.sources import cache_dir
from mnclglf.data.sources import parquet as source
from mnclglf.runs.locks import held

BACKENDS = ["reference", "dali"]
COUNT = 23
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "jpg", {"quality": 90}),
    ("PNG", "png", {}),
    ("WEBP", "webp", {}),
    ("TIFF", "tif", {}),  # decoded by Pillow, beside files that DALI decodes
    ("GIF", "gif", {}),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loader_of(images: ImageSet, backend: str, **changes: Any) -> Loader:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    arguments: dict[str, Any] = dict(
        view=ViewConfig(rotation_degrees=10), views=2, side=12, batch_size=4, seed=5, dtype=torch.float32,
        device=torch.device("cpu"), backend=backend, threads=2,
    )  # fmt: skip
    return make_loader(images, **(arguments | changes))


def some(count: int, first: int = 0) -> list[bytes]:
    return [encoded(pixels(seed=first + n)) for n in range(count)]


@pytest.fixture
def both(photos: Callable[..., np.ndarray], tmp_path: Path) -> tuple[Path, Path]:
    """Makes a folder of two classes and Parquet files of the same images in the same order, of many kinds and sizes."""
    folder, data, labels = tmp_path / "photos", list[bytes](), list[int]()
    for row, image in enumerate(photos(COUNT, 40)):
        kind, suffix, how = KINDS[row % len(KINDS)]
        data.append(encoded(image[: 14 + row % 5, : 12 + 2 * (row % 7)], kind, **how))
        labels.append(int(row >= 11))
        path = folder / "ab"[labels[-1]] / f"{row:03}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[-1])
    for part in range(3):
        rows = slice(part * 8, part * 8 + 8)
        name = f"train-{part:05}-of-00003.parquet"
        write_parquet(tmp_path / "hub/data" / name, data[rows], labels[rows], classes=["a", "b"])
    return folder, tmp_path / "hub"


@pytest.mark.parametrize("block", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_those_of_a_folder_with_the_same_images(
    both: tuple[Path, Path], backend: str, block: int | None
) -> None:
    files, (rows, _) = load_folder(both[0])[0], load_parquet(both[1])
    assert rows.labels.tolist() == files.labels.tolist()
    assert rows.classes == files.classes == ("a", "b")
    assert rows.digests == files.digests
    assert all(np.array_equal(a, b) for a, b in zip(rows.statistics(), files.statistics(), strict=True))
    ours, theirs = (list(loader_of(images, backend, shuffle_block=block).batches(2, 9)) for images in (rows, files))
    assert len(ours) == 7
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.views, two.views)
    resumed = list(loader_of(rows, backend, shuffle_block=block).batches(5, 9))
    assert all(torch.equal(a.views, b.views) for a, b in zip(resumed, ours[3:], strict=True))


def test_names_are_those_of_files_and_rows(both: tuple[Path, Path]) -> None:
    images, _ = load_parquet(both[1])
    part = images.subset([9, 2])
    assert part.names(np.array([0, 1])) == ["train-00001-of-00003.parquet/1", "train-00000-of-00003.parquet/2"]
    assert images.place(9) == f"{both[1]}/data/train-00001-of-00003.parquet/1"
    np.testing.assert_array_equal(part.pixels(0), images.pixels(9))


@pytest.mark.parametrize("how", [{"compression": "none"}, {"compression": "zstd", "rows": 100}, {"version": "1.0"}])
def test_contents_are_the_same_however_the_file_is_written(tmp_path: Path, how: dict[str, Any]) -> None:
    data = [*some(5), *some(5)]  # equal images become entries of a dictionary
    write_parquet(tmp_path / "a.parquet", data, **how)
    images, _ = load_parquet(tmp_path / "a.parquet")
    assert [images.contents(row) for row in range(10)] == data
    assert not images.labeled


def test_a_split_of_the_hub_and_patterns(tmp_path: Path) -> None:
    for name, labels in (("train-00000-of-00002", [0, 1]), ("train-00001-of-00002", [2, 0]), ("validation", [2, 1])):
        write_parquet(tmp_path / f"d/data/{name}.parquet", some(2), labels, classes=["x", "y", "z"])
    train, test = load_parquet(tmp_path / "d")
    assert test is not None
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, 0], [2, 1])
    assert train.classes == test.classes == ("x", "y", "z")
    for pattern in ("train-*.parquet", "train-{00000..00001}-of-00002.parquet"):
        images, test = load_parquet(tmp_path / "d/data" / pattern)
        assert (images.fingerprint(), test) == (train.fingerprint(), None)
    assert short_name("parquet:/a/train-*.parquet") == "parquet-train"
    assert moved("parquet:/a/train-*.parquet", Path("/b")) == "parquet:/b/train-*.parquet"


def test_images_to_test_on_without_labels_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "d/train.parquet", some(2), [0, 1], classes=["x", "y"])
    write_parquet(tmp_path / "d/test.parquet", some(2), [-1, -1], classes=["x", "y"])  # as datasets writes them
    with caplog.at_level(logging.WARNING):
        assert load_parquet(tmp_path / "d")[1] is None
    assert "no labels" in caplog.text


def test_labels_are_matched_by_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d/train-0.parquet", some(3), ["dog", "cat", "dog"])
    write_parquet(tmp_path / "d/train-1.parquet", some(2, 3), ["ant", "dog"])
    write_parquet(tmp_path / "d/test.parquet", some(2, 5), pa.array(["dog", "ant"]).dictionary_encode())
    for _ in range(2):  # the second time by the findings that were kept
        train, test = load_parquet(tmp_path / "d")
        assert test is not None
        assert train.classes == test.classes == ("ant", "cat", "dog")
        assert (train.labels.tolist(), test.labels.tolist()) == ([2, 1, 2, 0, 2], [2, 0])
    write_parquet(tmp_path / "d/train-2.parquet", some(1, 8), ["bee"])  # moves the numbers of the others
    train, test = load_parquet(tmp_path / "d")
    assert test is not None
    assert train.classes == ("ant", "bee", "cat", "dog")
    assert (train.labels.tolist(), test.labels.tolist()) == ([3, 2, 3, 0, 3, 1], [3, 0])
    write_parquet(tmp_path / "d/test.parquet", some(1), ["emu"])
    with pytest.raises(DataError, match=r"test\.parquet/0 has the label 'emu', which no training image has"):
        load_parquet(tmp_path / "d")
    write_parquet(tmp_path / "e/train.parquet", some(2), [0, 1], classes=["cat", "dog"])
    write_parquet(tmp_path / "e/test.parquet", some(2), [0, 1], classes=["dog", "cat"])  # another order
    train, test = load_parquet(tmp_path / "e")
    assert test is not None
    assert (train.classes, test.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_whole_numbers_without_names_are_labels(tmp_path: Path) -> None:
    table = pa.table({"picture": pa.array(some(3), pa.large_binary()), "labels": pa.array([2, 0, 1], pa.uint8())})
    write_table(tmp_path / "a.parquet", table)
    images, _ = load_parquet(tmp_path / "a.parquet")
    assert (images.classes, images.labels.tolist()) == (("0", "1", "2"), [2, 0, 1])


def test_metadata_says_which_columns_count(tmp_path: Path) -> None:
    data = some(2)
    table = pa.table(
        {
            "mask": pa.array([b"0", b"1"]),
            "img": pa.array([{"bytes": x, "path": None} for x in data], IMAGE),
            "id": [7, 8],
            "fine": [1, 0],
        }
    ).replace_schema_metadata(hub_metadata("img", "fine", ["x", "y"]))
    write_table(tmp_path / "a.parquet", table)
    images, _ = load_parquet(tmp_path / "a.parquet")
    assert [images.contents(row) for row in range(2)] == data
    assert (images.classes, images.labels.tolist()) == (("x", "y"), [1, 0])
    for spoiled in ("{", "[]", '{"info": {"features": 3}}', '{"info": {"features": {"img": 1, "fine": {"names": 3}}}}'):
        write_table(tmp_path / "b.parquet", table.replace_schema_metadata({"huggingface": spoiled}))
        assert load_parquet(tmp_path / "b.parquet")[0].classes == ()


def columns(**arrays: Any) -> pa.Table:
    return pa.table({name: array if isinstance(array, pa.Array) else pa.array(array) for name, array in arrays.items()})


def images_of(data: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": x, "path": None} for x in data], IMAGE)


BAD_TABLES: list[tuple[str, Callable[[], pa.Table], str]] = [
    ("none", lambda: columns(text=["a"], label=[1]), r"has no column of images among text: string, label: int64"),
    ("two", lambda: columns(a=images_of(some(1)), b=images_of(some(1))), r"several columns of images, 'a', 'b'"),
    ("binary", lambda: columns(a=some(1), b=some(1)), r"several columns of images, 'a', 'b'; keep one"),
    ("list", lambda: columns(a=pa.array([[{"bytes": b"", "path": ""}]], pa.list_(IMAGE))), "'a' has lists of images"),
    (
        "labels",
        lambda: columns(a=some(1), label=[[1, 2]]),
        r"'label' has list<.*one whole number or one text per image",
    ),
    ("float", lambda: columns(a=some(1), label=[1.0]), r"'label' has double"),
    (
        "paths",
        lambda: columns(a=pa.array([{"bytes": None, "path": "x/y.jpg"}] * 2, IMAGE)),
        r"'a' has paths of images, as 'x/y\.jpg', and no bytes; .*folder:PATH",
    ),
    ("zero rows", lambda: columns(image=pa.array([], IMAGE)), "holds no image"),
    (
        "two labels",
        lambda: columns(image=images_of(some(1)), fine=[0], coarse=[0]).replace_schema_metadata(
            {
                "huggingface": json.dumps(
                    {"info": {"features": {x: {"_type": "ClassLabel", "names": ["q"]} for x in ("fine", "coarse")}}}
                )
            }
        ),
        r"several columns of labels, 'fine', 'coarse'; rename the one to use to 'label'",
    ),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in BAD_TABLES], ids=[case[0] for case in BAD_TABLES])
def test_a_table_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, make: Callable[[], pa.Table], message: str
) -> None:
    write_table(tmp_path / "a.parquet", make())
    with pytest.raises(DataError, match=rf"a\.parquet.*{message}"):
        load_parquet(tmp_path / "a.parquet", skip_corrupt=True)


def test_many_different_texts_are_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnclglf.data.sources.packed.MOST_CLASSES", 3)
    write_parquet(tmp_path / "a.parquet", some(4), [f"caption {n}" for n in range(4)])
    with pytest.raises(DataError, match="has 4 different labels, as 'caption 0', which are no classes"):
        load_parquet(tmp_path / "a.parquet")


BAD_FILES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    (
        "pointer",
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pointer of Git LFS.*lfs pull",
    ),
    ("cut", lambda whole: whole[:-30], "is cut: it does not end as Parquet does"),
    ("short", lambda whole: whole[:6], "is cut"),
    ("empty", lambda _: b"", "is no Parquet file: it begins with b''"),
    ("page", lambda _: b"<html>404</html>", "is no Parquet file: it begins with b'<html>404</h'"),
    ("encrypted", lambda whole: b"PARE" + whole[4:-4] + b"PARE", "is encrypted"),
    ("footer", lambda whole: whole[:-60] + bytes(52) + whole[-8:], "cannot be read as Parquet"),
    ("pages", lambda whole: whole[:4] + b"\xff" * 400 + whole[404:], r"cannot be read as Parquet \(.*fetch it again"),
]


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_a_damaged_file_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", some(4), [0, 1, 0, 1])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=rf"a\.parquet.*{message}"):
        load_parquet(path, skip_corrupt=True)
    assert unpacked() == []


def test_encrypted_columns_are_refused(tmp_path: Path) -> None:
    """Asking pyarrow 26 for the metadata of such a column would abort the process."""
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):
        def __init__(self, _: object) -> None:
            super().__init__()

        def wrap_key(self, key: bytes, _: str) -> bytes:
            return key.hex().encode()

    factory = encryption.CryptoFactory(lambda _: Keys(_))
    properties = factory.file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"c": ["image.bytes", "image.path"]}, plaintext_footer=True
        ),
    )
    write_parquet(tmp_path / "a.parquet", some(4), encryption_properties=properties)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet \(.*give a file that is not encrypted"):
        load_parquet(tmp_path / "a.parquet")


CORRUPT: dict[str, tuple[Any, Any, str]] = {
    "null image": (None, 1, "is null: the row has no image"),
    "only a path": ({"bytes": None, "path": "x.jpg"}, 1, "has the path of an image and no bytes"),
    "null label": (some(1)[0], None, "has the label null, and others have one"),
    "label out of range": (some(1)[0], 2, "has the label 2, and the classes are 0 to 1"),
    "negative label": (some(1)[0], -7, "has the label -7, and the classes are 0 to 1"),
    "cut": (some(1)[0][:60], 1, "cannot be"),
    "empty": (b"", 1, "cannot be"),
    "text": (b"<html>404</html>", 1, "cannot be"),
    "small": (encoded(pixels(4, 4)), 1, "is 4 x 4 pixels"),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_a_corrupt_row_among_good_ones_is_named_or_left_out(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    image, label, message = CORRUPT[how]
    data: list[Any] = [{"bytes": x, "path": None} for x in some(3)]
    data.insert(1, image if image is None or isinstance(image, dict) else {"bytes": image, "path": "x.png"})
    table = columns(image=pa.array(data, IMAGE), label=[0, label, 1, 0])
    write_table(tmp_path / "a.parquet", table.replace_schema_metadata(hub_metadata(classes=["x", "y"])))
    with pytest.raises(
        DataError, match=rf"1 of 4 image files of .* cannot be used: a\.parquet/1 .*{message}.*--skip-corrupt"
    ):
        load_parquet(tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING):
        images, _ = load_parquet(tmp_path / "a.parquet", skip_corrupt=True)
    assert images.paths == ("a.parquet/0", "a.parquet/2", "a.parquet/3")
    assert images.labels.tolist() == [0, 1, 0]
    assert len(images.corrupt) == 1
    for row in range(3):
        np.testing.assert_array_equal(images.pixels(row), pixels(seed=row))


def unpacked() -> list[Path]:
    return sorted((cache_dir("parquet") / "images").glob("[!.]*"))


def test_files_are_unpacked_once_and_again_where_one_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []
    real = source.unpack
    monkeypatch.setattr(source, "unpack", lambda file, out: (done.append(Path(file.name).name), real(file, out))[1])
    for part in range(2):
        write_parquet(tmp_path / f"d/train-{part}.parquet", some(3, 3 * part))
    with caplog.at_level(logging.WARNING):
        before, _ = load_parquet(tmp_path / "d")
    assert "unpacking 2 files into" in caplog.text
    again, _ = load_parquet(tmp_path / "d/train-{0..1}.parquet")
    assert again.fingerprint() == before.fingerprint()
    assert done == ["train-0.parquet", "train-1.parquet"]
    write_parquet(tmp_path / "d/train-1.parquet", some(2, 9))
    assert len(load_parquet(tmp_path / "d")[0]) == 5
    assert done[2:] == ["train-1.parquet"]
    assert len(unpacked()) == 4  # the old ones are gone
    for spoiled, how in ((".images", b"short"), (".npz", b"?")):
        next(path for path in unpacked() if path.suffix == spoiled).write_bytes(how)
        assert len(load_parquet(tmp_path / "d")[0]) == 5
    assert len(done) == 5


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", some(9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"takes about [\d,]+ bytes, and 1,000 are free there; .*XDG_CACHE_HOME"):
        load_parquet(tmp_path / "a.parquet")
    assert unpacked() == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", some(2))
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(DataError, match=r"cannot be unpacked into .*cache.*XDG_CACHE_HOME"):
        load_parquet(tmp_path / "a.parquet")


def test_what_helps_depends_on_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", some(2))

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x.images")

    monkeypatch.setattr(source, "unpack", fails)
    with pytest.raises(DataError, match=r"x\.images'; the disk or the connection to it fails .*XDG_CACHE_HOME"):
        load_parquet(tmp_path / "a.parquet")


def _unpack_slowly(place: str) -> None:
    real = source.unpack

    def slow(file: Any, out: Path) -> Any:
        if "train-1" in file.name:
            (out.parent / f".{out.name}.{os.getpid()}-00000000.tmp").write_bytes(b"half")
            (out.parent / "begun").touch()
            time.sleep(60)
        return real(file, out)

    source.unpack = slow
    load_parquet(place)


def test_after_a_kill_the_rest_is_unpacked_and_nothing_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for part in range(2):
        write_parquet(tmp_path / f"d/train-{part}.parquet", some(3, 3 * part))
    process = multiprocessing.get_context("fork").Process(target=_unpack_slowly, args=(str(tmp_path / "d"),))
    process.start()
    folder = cache_dir("parquet") / "images"
    while not (folder / "begun").exists():
        assert process.is_alive()
        time.sleep(0.01)
    with held(folder / ".unpacking.lock") as mine:
        assert not mine  # others wait meanwhile
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder / "begun").unlink()
    done: list[str] = []
    real = source.unpack
    monkeypatch.setattr(source, "unpack", lambda file, out: (done.append(Path(file.name).name), real(file, out))[1])
    images, _ = load_parquet(tmp_path / "d")
    assert [images.contents(row) for row in range(6)] == some(6)
    assert done == ["train-1.parquet"]
    assert len(unpacked()) == 4
    assert list(folder.glob(".*.tmp")) == []


def test_pyarrow_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", some(2))
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"a\.parquet needs the package pyarrow.*pip install 'mnclglf\[parquet\]'"):
        load_parquet(tmp_path / "a.parquet")
    monkeypatch.undo()


def test_inspect_and_pack_take_them(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"parquet:{both[1]}"
    assert main(["data", "inspect", name]) == 0
    assert "23" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.png")] == ["parquet-hub-images.png"]
    assert main(["data", "pack", name, "packed"]) == 0
    packed, rows = load_shards(tmp_path / "packed")[0], load_parquet(both[1])[0]
    assert (packed.digests, packed.classes) == (rows.digests, rows.classes)
    assert packed.labels.tolist() == rows.labels.tolist()


@pytest.mark.slow
def test_views_are_drawn_of_them(both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "views", f"parquet:{both[1]}", "--side", "12", "--images", "2"]) == 0
    assert (tmp_path / "parquet-hub-views.png").is_file()
