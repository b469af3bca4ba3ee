"""mnclglf data pack: shards with the same images and labels, whole or not at all, however the packing was stopped."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from image_folder import load as load_folder
from image_folder import pixels, write
from shards import load_shards

from mnclglf.cli import main
from mnclglf.data import pack as pack_module
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray
from mnclglf.data.pack import Limit, pack
from mnclglf.data.sources import shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("val", 2)):
        for name in ("cats", "dogs"):
            for number in range(count):
                suffix = ("png", "jpg", "webp")[number % 3]
                write(tmp_path / "photos" / part / name / f"{number}.{suffix}", pixels(seed=number + 9 * count))
    return tmp_path / "photos"


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_each_shard_is_told_with_its_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pack", f"folder:{folder}", str(tmp_path / "out"), "--images-per-shard", "3"]) == 0
    told = capsys.readouterr().out
    for line in (
        "train-000000.tar: images 0 to 2 of 10",
        "train-000001.tar: images 3 to 5 of 10",
        "train-000003.tar: image 9 of 10",
    ):
        assert f"{line}\n" in told


def test_a_folder_keeps_its_bytes_labels_and_classes(folder: Path, tmp_path: Path) -> None:
    assert main(["data", "pack", f"folder:{folder}", str(tmp_path / "out"), "--images-per-shard", "4"]) == 0
    made = shards_of(tmp_path / "out")
    assert list(made) == ["test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert all((tmp_path / "out" / name).with_suffix(".idx").exists() for name in made)
    (train, test), (packed, packed_test) = load_folder(folder), load_shards(tmp_path / "out")
    assert test is not None
    assert packed_test is not None
    for one, two in ((train, packed), (test, packed_test)):
        assert two.labels.tolist() == one.labels.tolist()
        assert two.classes == one.classes == ("cats", "dogs")
        for row in range(len(one)):
            np.testing.assert_array_equal(two.pixels(row), one.pixels(row))
    assert packed.digests == train.digests
    assert packed.paths[5] == "train-000001.tar/000000005.png"
    with tarfile.open(tmp_path / "out/train-000001.tar") as tar:
        assert tar.getnames()[:4] == ["000000004.jpg", "000000004.cls", "000000005.png", "000000005.cls"]
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o644)}


def test_images_in_memory_become_png(tmp_path: Path) -> None:
    assert main(["data", "pack", "digits", str(tmp_path / "out")]) == 0
    train, test = load_dataset("digits")
    assert isinstance(train, ImageArray)
    assert test is not None
    packed, packed_test = load_shards(tmp_path / "out")
    assert packed_test is not None
    np.testing.assert_array_equal(np.stack(packed.read(np.arange(len(packed)))), train.images)
    assert packed.labels.tolist() == train.labels.tolist()
    assert packed_test.labels.tolist() == test.labels.tolist()


def test_images_without_labels_and_shards_themselves_are_packed(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "flat" / f"{number}.png", pixels(seed=number))
    pack(load_dataset(f"folder:{tmp_path / 'flat'}"), tmp_path / "a", Limit(images=2))
    pack(load_dataset(f"shards:{tmp_path / 'a'}"), tmp_path / "b", Limit(images=4))
    a, b = load_shards(tmp_path / "a")[0], load_shards(tmp_path / "b")[0]
    assert a.digests == b.digests
    assert not b.labeled
    assert list(shards_of(tmp_path / "b")) == ["train-000000.tar", "train-000001.tar"]


@pytest.mark.parametrize("most", [1, 11_000, 30_720, 10**9])
def test_a_shard_has_at_most_so_many_bytes_or_one_image(folder: Path, tmp_path: Path, most: int) -> None:
    pack(load_dataset(f"folder:{folder}"), tmp_path / "out", Limit(file_bytes=most))
    counts = []
    for name, data in shards_of(tmp_path / "out").items():
        with tarfile.open(tmp_path / "out" / name) as tar:
            counts.append(sum(not member.name.endswith(".cls") for member in tar))
        assert len(data) <= most or counts[-1] == 1
    assert sum(counts) == 14
    if most == 1:
        assert counts == [1] * 14
    if most == 10**9:
        assert counts == [4, 10]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("lines", [1, 2, 3])
@pytest.mark.parametrize("limit", [Limit(images=3), Limit(file_bytes=20_480)])
def test_a_pack_that_was_stopped_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, lines: int, limit: Limit
) -> None:
    images = load_dataset(f"folder:{folder}")
    pack(images, tmp_path / "whole", limit)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == lines:
            raise Stopped

    with pytest.raises(Stopped):
        pack(images, tmp_path / "out", limit, stop)
    first = next((tmp_path / "out").glob("train-000000.tar"))
    before = first.stat().st_ino
    with pytest.raises(DataError, match="not packed to its end"):
        load_shards(tmp_path / "out")
    pack(images, tmp_path / "out", limit, said.append)
    assert first.stat().st_ino == before  # it was not made anew
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    said.clear()
    pack(images, tmp_path / "out", limit, said.append)
    assert len(said) == 1  # nothing was left to do
    load_shards(tmp_path / "out")


SLOW = """
import sys, time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from mnclglf.data import pack as module
from mnclglf.data.datasets import load_dataset
real = module._members
def slow(images, row):
    if row == 4:
        print("in the second shard", flush=True)
        time.sleep(60)
    return real(images, row)
if sys.argv[3] == "slow":
    module._members = slow
module.pack(load_dataset(sys.argv[1]), Path(sys.argv[2]), module.Limit(images=3))
"""


def test_a_pack_that_is_killed_leaves_no_half_shard(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, f"folder:{folder}", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    with subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in the second shard\n"
        with pytest.raises(DataError, match=r"is being packed by process \d+"):
            pack(load_dataset(f"folder:{folder}"), tmp_path / "out", Limit(images=3))
        process.send_signal(signal.SIGKILL)
    assert list(shards_of(tmp_path / "out")) == ["train-000000.tar"]
    assert len(list((tmp_path / "out").glob(".*.tmp"))) == 1
    pack(load_dataset(f"folder:{folder}"), tmp_path / "out", Limit(images=3))
    assert list((tmp_path / "out").glob(".*.tmp")) == []
    assert len(load_shards(tmp_path / "out")[0]) == 10


def test_another_out_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    images, out = load_dataset(f"folder:{folder}"), tmp_path / "out"
    pack(images, out, Limit(images=3))
    before = shards_of(out)
    with pytest.raises(
        DataError, match=r"out holds another pack, of folder:\S*photos: images_per_shard differs; choose"
    ):
        pack(images, out, Limit(images=4))
    write(folder / "train/cats/0.png", pixels(seed=77))
    with pytest.raises(DataError, match=r"out holds another pack.*images differs"):
        pack(load_dataset(f"folder:{folder}"), out, Limit(images=3))
    (out / "pack.json").write_text("{")
    with pytest.raises(DataError, match=r"pack\.json is damaged.*choose another OUT"):
        pack(images, out, Limit(images=3))
    (out / "pack.json").unlink()
    with pytest.raises(DataError, match=r"out holds classes\.txt and is no pack of ours"):
        pack(images, out, Limit(images=3))
    with pytest.raises(DataError, match="is a file"):
        pack(images, out / "classes.txt", Limit(images=3))
    assert shards_of(out) == before


def test_a_pack_that_another_process_made_meanwhile_is_not_relabeled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = load_dataset(f"folder:{folder}"), tmp_path / "out"
    lock = pack_module.held

    @contextlib.contextmanager
    def held_after_another(path: Path) -> Generator[bool]:
        monkeypatch.setattr(pack_module, "held", lock)
        pack(images, out, Limit(images=3))
        with lock(path) as mine:
            yield mine

    monkeypatch.setattr(pack_module, "held", held_after_another)
    with pytest.raises(DataError, match=r"out holds another pack.*images_per_shard differs"):
        pack(images, out, Limit(images=4))
    assert json.loads((out / "pack.json").read_text())["images_per_shard"] == 3


def test_the_same_images_at_another_place_are_the_same_pack(folder: Path, tmp_path: Path) -> None:
    pack(load_dataset(f"folder:{folder}"), tmp_path / "out", Limit(images=3))
    folder.rename(tmp_path / "moved")
    pack(load_dataset(f"folder:{tmp_path / 'moved'}"), tmp_path / "out", Limit(images=3))
    assert json.loads((tmp_path / "out/pack.json").read_text())["whole"] is True


@pytest.mark.parametrize("option", [["--images-per-shard", "0"], ["--shard-bytes", "-1"]])
def test_a_limit_of_nothing_is_refused(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "pack", "digits", str(tmp_path / "out"), *option])
    assert "must be at least 1" in capsys.readouterr().err


def test_an_index_that_cannot_be_written_ends_the_pack_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "pack", f"folder:{folder}", str(tmp_path / "out"), "--images-per-shard", "4"]
    write_whole = shards.write_atomically

    def full(path: Path, write_file: Callable[[BinaryIO], object]) -> None:
        if path.name == "train-000001.idx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_whole(path, write_file)

    with monkeypatch.context() as broken:
        broken.setattr(shards, "write_atomically", full)
        assert main(command) == 1
    assert "train-000001.idx'; free space" in " ".join(capsys.readouterr().err.split())
    assert main(command) == 0
    assert all((tmp_path / "out" / name).with_suffix(".idx").exists() for name in shards_of(tmp_path / "out"))
