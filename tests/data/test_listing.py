"""Tests of the listing of a source: names, labels, splits, and what tells images apart."""

from __future__ import annotations

import logging
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hub_parquet import write_parquet
from image_folder import lay_out, pixels, write
from shards import encoded
from sklearn.datasets import load_digits

from mnclglf.config import UsageError
from mnclglf.data import sources
from mnclglf.data.errors import DataError
from mnclglf.data.listing import list_folder, list_source
from mnclglf.data.sources import named_or_folder


def test_classes_and_splits_are_those_of_folder(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "x", "train/cats/1.png", "train/dogs/sub/2.png", "valid/cats/3.png", "valid/dogs/4.png")
    found = list_source(f"folder:{root}")
    assert list(found.names) == ["train/cats/1.png", "train/dogs/sub/2.png", "valid/cats/3.png", "valid/dogs/4.png"]
    assert [found.class_of(row) for row in range(4)] == ["cats", "dogs", "cats", "dogs"]
    assert [found.split(row) for row in range(4)] == ["train", "train", "test", "test"]
    assert found.classes == ("cats", "dogs")


def test_one_image_without_a_folder_has_no_label(tmp_path: Path) -> None:
    found = list_folder(lay_out(tmp_path / "x", "1.png"))
    assert (list(found.names), found.labels.tolist(), found.classes, found.class_of(0)) == (["1.png"], [-1], (), None)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("a.png", "cats/1.png"), "a.png beside the folder cats"),
        (("test/1.png",), "no train"),
        (("train_256/a/1.png", "val_256/a/1.png"), "rename them"),
    ],
)
def test_a_layout_that_cannot_be_trained_on_is_listed_without_labels(
    tmp_path: Path, names: tuple[str, ...], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = lay_out(tmp_path / "x", *names)
    with caplog.at_level(logging.WARNING):
        found = list_folder(root)
    assert list(found.names) == sorted(names)
    assert (set(found.labels.tolist()), found.classes) == ({-1}, ())
    assert "no labels" in caplog.text
    assert why in caplog.text


def test_a_folder_without_images_or_without_leave_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image"):
        list_source(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match=r"missing is not a folder"):
        list_source(f"folder:{tmp_path / 'missing'}")
    with pytest.raises(DataError, match=r"second folder .*leave out --data-dir"):
        list_source(f"folder:{tmp_path / 'empty'}", tmp_path)


def test_a_data_set_is_listed_with_its_parts() -> None:
    found = list_source("digits")
    assert len(found) == 1797  # scikit-learn's
    assert found.names[0] == "train/0"
    assert found.names[found.train_images] == "test/0"
    assert found.split(found.train_images - 1) == "train"
    assert found.class_of(found.train_images) == str(found.labels[found.train_images])
    ours = np.stack([found.pixels(row)[..., 0] for row in range(1797)]).reshape(1797, -1)
    truth, _ = load_digits(return_X_y=True)  # 0 to 16, in another order
    assert sorted(map(tuple, (ours / 255 * 16).round())) == sorted(map(tuple, truth))


def test_the_digest_knows_each_change(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "x", "cats/1.png", "dogs/2.png")

    def digest() -> str:
        found = list_folder(root)
        return found.digest(range(len(found))).hexdigest()

    seen = [digest()]
    assert digest() == seen[0]
    write(root / "dogs" / "2.png")
    seen.append(digest())
    os.utime(root / "dogs" / "2.png", ns=(1, 1))
    seen.append(digest())
    (root / "dogs").rename(root / "wolves")
    seen.append(digest())
    write(root / "wolves" / "3.png")
    seen.append(digest())
    assert len(set(seen)) == 5


def test_listing_keeps_little_per_file(tmp_path: Path) -> None:
    """A million files are to fit: a name of 20 letters is 69 bytes of str, its place in the list 8, its label 4."""
    (tmp_path / "x").mkdir()
    for number in range(4000):
        os.close(os.open(tmp_path / "x" / f"{number:016}.png", os.O_CREAT))
    tracemalloc.start()
    found = list_folder(tmp_path / "x")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 4000
    assert kept / 4000 < 130
    assert peak / 4000 < 1000  # while names are sorted


@pytest.mark.parametrize("text", ["photos", "./photos", "folder:photos", "photos/"])
def test_a_plain_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_or_folder(text) == f"folder:{tmp_path / 'photos'}"


def test_a_data_sets_name_is_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_or_folder("digits") == "digits"
    assert named_or_folder("./digits") == f"folder:{tmp_path / 'digits'}"


def test_a_name_of_another_package_is_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "OTHER_SOURCES", ("stripes",))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stripes").mkdir()
    assert named_or_folder("stripes") == "stripes"
    assert named_or_folder("mypkg.parts:Stripes") == "mypkg.parts:Stripes"
    (tmp_path / "mypkg.parts:Stripes").mkdir()
    assert named_or_folder("mypkg.parts:Stripes") == f"folder:{tmp_path / 'mypkg.parts:Stripes'}"


@pytest.mark.parametrize("text", ["", "folder:", "fotos", "photo.png"])
def test_what_is_neither_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photo.png")
    with pytest.raises(UsageError, match=rf"source '{text}' .*folder"):
        named_or_folder(text)


def test_images_in_large_files_have_the_names_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = [encoded(pixels(seed=row)) for row in range(3)]
    write_parquet(tmp_path / "d/train-0.parquet", data, [0, 1, 1], classes=["a", "b"])
    write_parquet(tmp_path / "d/test.parquet", [data[0], None], [1, 0], classes=["a", "b"])
    with pytest.raises(DataError, match=r"test\.parquet/1 is null"):
        list_source(f"parquet:{tmp_path / 'd'}")
    found = list_source(f"parquet:{tmp_path / 'd'}", skip_corrupt=True)
    train = [f"train/train-0.parquet/{row}" for row in range(3)]
    assert list(found.names) == [*train, "test/test.parquet/0"]
    assert [found.class_of(row) for row in range(4)] == ["a", "b", "b", "b"]
    np.testing.assert_array_equal(found.pixels(3), pixels(seed=0))
