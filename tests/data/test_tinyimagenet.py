"""Tests of TinyImageNet's format on a small copy: reading, decoding once, and damaged copies."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnclglf.cli import main
from mnclglf.data.datasets import load_dataset
from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray
from mnclglf.data.sources import cache_dir, tinyimagenet

WNIDS = ("n01443537", "n01629819", "n01641577")
PER_CLASS, VALIDATION = 4, 5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_image(path: Path, seed: int, *, gray: bool = False, side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))
    (image.convert("L") if gray else image).save(path, quality=95)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Makes a folder that holds tiny-imagenet-200/."""
    root = tmp_path / "data" / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        for number in range(PER_CLASS):
            write_image(
                root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 10 * label + number, gray=number == 2
            )
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t63\t63\n")
    lines = []
    for number in range(VALIDATION):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", 100 + number)
        lines.append(f"val_{number}.JPEG\t{WNIDS[(number + 1) % 3]}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text(f"{WNIDS[0]}\tgoldfish, Carassius auratus\n{WNIDS[1]}\tsalamander\nn0\tother\n")
    return tmp_path / "data"


def load(folder: Path) -> tuple[ImageArray, ImageArray]:
    train, test = load_dataset("tinyimagenet", folder)
    assert isinstance(train, ImageArray)
    assert isinstance(test, ImageArray)
    return train, test


@pytest.mark.parametrize("inside", [False, True])
def test_images_labels_and_names(data: Path, inside: bool) -> None:
    root = data / "tiny-imagenet-200"
    train, test = load(root if inside else data)
    assert (len(train), len(test), train.split, test.split) == (12, 5, "train", "test")
    assert train.classes == test.classes == ("goldfish", "salamander", WNIDS[2])
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [1, 2, 0, 1, 2]
    for row, path in (
        (0, f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"),
        (6, f"train/{WNIDS[1]}/images/{WNIDS[1]}_2.JPEG"),
    ):
        np.testing.assert_array_equal(train.images[row], read_image(root / path))
    np.testing.assert_array_equal(test.images[3], read_image(root / "val/images/val_3.JPEG"))
    assert isinstance(train.images, np.memmap)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    read = tinyimagenet.read_image
    monkeypatch.setattr(tinyimagenet, "read_image", lambda path: (reads.append(path.name), read(path))[1])
    return reads


def test_images_are_decoded_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    before, _ = load(data)
    assert len(reads) == 17
    reads.clear()
    again, _ = load(data)
    assert reads == []
    np.testing.assert_array_equal(again.images, before.images)
    write_image(data / "tiny-imagenet-200" / "train" / WNIDS[0] / "images" / "new.JPEG", 7)
    assert len(load(data)[0]) == 13
    assert len(reads) == 13  # of train alone


def test_an_image_replaced_at_the_same_size_and_time_is_decoded_again(data: Path) -> None:
    before = np.array(load(data)[0].images)
    first, second = (data / "tiny-imagenet-200/train" / WNIDS[0] / f"images/{WNIDS[0]}_{n}.JPEG" for n in (0, 1))
    longest = max(first.stat().st_size, second.stat().st_size)
    for path in (first, second):
        path.write_bytes(path.read_bytes().ljust(longest, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    load(data)
    first.rename(first.with_name("kept"))
    second.rename(first)
    first.with_name("kept").rename(second)
    np.testing.assert_array_equal(load(data)[0].images, before[[1, 0, *range(2, 12)]])


def test_hidden_files_and_folders_are_left_alone(data: Path) -> None:
    root, (before, _) = data / "tiny-imagenet-200", load(data)
    for part in (f"train/{WNIDS[0]}/images", "val/images"):
        (root / part / f"._{WNIDS[0]}_0.JPEG").write_bytes(b"\0\x05\x16\x07")
    write_image(root / "train/.ipynb_checkpoints/images/a.JPEG", 1)
    write_image(root / "train/__MACOSX/images/a.JPEG", 1)
    (root / "train/@eaDir").mkdir()
    write_image(root / "train" / WNIDS[1] / "images/.ipynb_checkpoints/b.JPEG", 1)
    train, test = load(data)
    assert (train.classes, len(train), len(test)) == (before.classes, 12, 5)


@pytest.mark.parametrize("how", ["cut", "flipped", "no note", "another note", "not json"])
def test_a_damaged_or_stale_array_is_made_anew(data: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = np.array(load(data)[0].images)
    array, note = (data / "tiny-imagenet-200" / f"decoded-train.{kind}" for kind in ("npy", "json"))
    whole = array.read_bytes()
    if how == "cut":
        array.write_bytes(whole[:-1])
    elif how == "flipped":
        array.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif how == "no note":
        note.unlink()
    elif how == "another note":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"made_of": "others"}))
    else:
        note.write_text("{")
    reads = count_reads(monkeypatch)
    np.testing.assert_array_equal(load(data)[0].images, before)
    assert len(reads) == 12


def test_an_array_is_whole_or_absent(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks a full disk, and a decoder that fails half way."""
    root = data / "tiny-imagenet-200"

    def full(path: Path, count: list[int] = [0]) -> np.ndarray:  # noqa: B006  # counts over calls
        count[0] += 1
        if count[0] > 6:
            raise OSError(28, "No space left on device")
        return read_image(path)

    monkeypatch.setattr(tinyimagenet, "read_image", full)
    with pytest.raises(DataError, match=r"decoded-train\.npy.*No space left.*147,456 bytes"):
        load(data)
    assert not [path.name for path in root.iterdir() if "decoded" in path.name]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    assert len(load(data)[0]) == 12


def test_a_folder_that_cannot_be_written_to_keeps_the_array_in_the_cache(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinyimagenet.os, "access", lambda path, mode: False)
    load(data)
    assert not list((data / "tiny-imagenet-200").glob("decoded*"))
    assert len(list(cache_dir("tinyimagenet").glob("*/decoded-train.npy"))) == 1


def test_an_archive_of_the_published_checksum_is_unpacked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = data.parent / "zipped" / tinyimagenet.ARCHIVE
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((data / "tiny-imagenet-200").rglob("*")):
            file.write(path, path.relative_to(data))
    with pytest.raises(DataError, match=r"tiny-imagenet-200\.zip: has MD5 .* where 90528d7ca1a48142e341f4ef8d21d0de"):
        load(archive.parent)
    monkeypatch.setattr(tinyimagenet, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    train, test = load(archive.parent)
    assert (len(train), len(test)) == (12, 5)
    archive.unlink()
    assert len(load(archive.parent)[0]) == 12


def test_what_another_process_unpacks_meanwhile_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / tinyimagenet.ARCHIVE).touch()
    root = (data / "tiny-imagenet-200").rename(data / "elsewhere")
    monkeypatch.setattr(tinyimagenet, "check_md5", lambda *_: root.rename(data / "tiny-imagenet-200"))
    train, test = load(data)
    assert (len(train), len(test)) == (12, 5)


def test_missing_files_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.*tiny-imagenet-200\.zip .*--download"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "content", "problem"),
    [
        ("val/val_annotations.txt", None, r"val_annotations\.txt: cannot be read"),
        ("val/val_annotations.txt", b"\xff\xfe", r"val_annotations\.txt: cannot be read"),
        ("val/val_annotations.txt", b"\n", "names no image"),
        ("val/val_annotations.txt", b"val_0.JPEG n01443537\n", "line 1, .* does not name a file and a class"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn99999999\t0\n", "line 1, .* does not name a file and a class"),
        ("val/val_annotations.txt", b"../../secret.JPEG\tn01443537\t0\n", "which is not one of val/images"),
        ("val/val_annotations.txt", b"val_77.JPEG\tn01443537\t0\n", "lacks an image that it lists .*val_77"),
        (f"train/{WNIDS[1]}/images/{WNIDS[1]}_1.JPEG", b"\xff\xd8\xff half", "cannot be read as an image"),
        ("val/images/val_2.JPEG", b"", "val_2.JPEG cannot be read as an image"),
        ("val/images/val_2.JPEG", None, "lacks an image that it lists .*val_2"),
    ],
)
def test_what_is_wrong_is_named(data: Path, path: str, content: bytes | None, problem: str) -> None:
    file = data / "tiny-imagenet-200" / path
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load(data)


def test_images_of_another_size_and_empty_classes_are_refused(data: Path) -> None:
    root = data / "tiny-imagenet-200"
    write_image(root / "val/images/val_1.JPEG", 0, side=32)
    with pytest.raises(DataError, match=r"val_1\.JPEG.*32 x 32.*64 x 64"):
        load(data)
    (root / "train" / "n09999999").mkdir()
    with pytest.raises(DataError, match=r"n09999999/images: holds no \*\.JPEG"):
        load(data)


def test_it_is_trained_on_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--recipe quick --train-images 12 --batch-size 6 --epochs 1 --warmup-epochs 0 --width 2 --projector-width 16"
    )
    small = f"{options} --predictor-width 8 --queue-size 24 --device cpu --precision fp32 --out {tmp_path / 'run'}"
    assert main(["train", "--dataset", "tinyimagenet", "--data-dir", str(data), *small.split()]) == 0
    assert main(["knn", str(tmp_path / "run"), "--k", "3"]) == 0
    printed = capsys.readouterr().out
    assert "mnclglf on tinyimagenet: 12 images of side 32, 1 epoch of 2 steps" in printed
    assert "12 training images, 5 images classified" in printed
