"""folder:PATH: which folders are a split, which are classes, what counts as an image, and what is refused."""

from __future__ import annotations

import cProfile
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folder import lay_out, load, pixels, write
from PIL import Image
from rich.console import Console

from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageFiles
from mnclglf.data.sources import layout
from mnclglf.data.sources.layout import check_picture, find_images
from mnclglf.reports.sources import inspect_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_subfolders_are_classes(root: Path) -> None:
    train, test = load(root)
    assert test is None
    assert train.classes == ("cats", "dogs")
    assert train.paths == ("cats/2019/y.Png", "cats/x.jpeg", "dogs/a.JPG", "dogs/b.png", "dogs/c.webp")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert (train.name, train.split, train.labeled, len(train)) == (f"folder:{root}", "train", True, 5)
    np.testing.assert_array_equal(train.pixels(3), read_image(root / "dogs/b.png"))
    assert train.names(np.array([4, 0])) == ["dogs/c.webp", "cats/2019/y.Png"]


def test_without_subfolders_there_are_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        write(tmp_path / "flat" / name)
    train, test = load(tmp_path / "flat")
    assert (train.paths, train.labels.tolist(), train.classes, train.labeled) == (
        ("a.png", "b.png"),
        [-1, -1],
        (),
        False,
    )
    assert test is None


def test_train_and_val_are_a_split(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("cats", "dogs"):
            for number in range(count):
                write(tmp_path / "split" / part / name / f"{number}.png")
    train, test = load(tmp_path / "split")
    assert test is not None
    assert (len(train), len(test), train.split, test.split) == (6, 4, "train", "test")
    assert train.classes == test.classes == ("cats", "dogs")
    assert "evaluating on val" in caplog.text
    write(tmp_path / "split/val/birds/0.png")
    with pytest.raises(DataError, match=r"train and val have other classes, birds; give both"):
        load(tmp_path / "split")


def test_links_are_followed_and_circles_end(root: Path) -> None:
    (root / "dogs" / "again").symlink_to(root / "dogs")
    (root / "dogs" / "up").symlink_to(root)
    (root / "dogs" / "cats").symlink_to(root / "cats")  # another class's stay that class's
    (root / "cats" / "linked.png").symlink_to(root / "dogs" / "b.png")
    train, _ = load(root)
    assert train.paths == (
        "cats/2019/y.Png", "cats/linked.png", "cats/x.jpeg", "dogs/a.JPG", "dogs/b.png", "dogs/c.webp",
    )  # fmt: skip
    (root / "cats" / "broken.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"cats/broken\.png.*No such file"):
        load(root)


def test_train_alone_is_the_folder_of_the_classes(root: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    root.rename(tmp_path / "whole" / "train")
    train, test = load(tmp_path / "whole")
    assert (train.classes, len(train), test) == (("cats", "dogs"), 5, None)


@pytest.mark.parametrize(
    ("train", "tested"),
    [
        ("train", "valid"), ("Train", "Val"), ("TRAIN", "TEST"), ("training", "validation"),
        ("training_set", "test_set"),
        ("train", "dev"), ("train2017", "val2017"), ("trainset", "testset"), ("seg_train", "seg_test"),
        ("train-images", "test images"), ("TrainImages", "ValImages"), ("traindata", "testdata"), ("_train", "val "),
        ("train-2017", "val-2017"), ("\uff34\uff32\uff21\uff29\uff2e", "\uff36\uff21\uff2c"),  # full width
    ],
)  # fmt: skip
def test_every_usual_spelling_of_a_split_is_one(tmp_path: Path, train: str, tested: str) -> None:
    root = lay_out(tmp_path / "x", f"{train}/a/0.png", f"{train}/b/1.png", f"{tested}/a/2.png", f"{tested}/b/3.png")
    images, test = load(root)
    assert isinstance(test, ImageFiles)
    assert images.classes == test.classes == ("a", "b")
    assert (images.paths, test.paths) == (("a/0.png", "b/1.png"), ("a/2.png", "b/3.png"))


def test_valid_is_not_dropped_where_there_is_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, test = load(lay_out(tmp_path / "x", "train/a/0.png", "valid/a/1.png", "test/a/2.png"))
    assert isinstance(test, ImageFiles)
    assert test.paths == ("a/1.png",)
    assert "evaluating on valid" in caplog.text


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("plane/0.png", "train/1.png", "test/2.png"), r"plane beside test, train: .*folder named train"),
        (("train/a/0.png", "val/a/1.png", "loose.png"), r"loose\.png beside train, val"),
        (("train/a/0.png", "holdout/a/1.png"), r"holdout and train|train and holdout.*rename them to train and val"),
        (("train/a/0.png", "Training/a/1.png", "val/a/2.png"), r"Training, train.*rename one"),
        (("val/a/0.png", "test/a/1.png"), r"test, val and no train; rename"),
        (("test/a/0.png",), r"test and no train; rename"),
        (("train256/a/0.png", "val256/a/1.png"), r"train256 and val256.*rename them to train and val"),
        (("trains/a/0.png", "tests/a/1.png"), r"tests and trains.*rename them to train and val"),
        (("minitrain/a/0.png", "minival/a/1.png"), r"minitrain and minival.*rename them to train and val"),
        (("train_jpg/0.png", "val_jpg/1.png"), r"train_jpg, val_jpg.*rename them to train and val"),
        (("train1/0.png", "test1/1.png", "test2/2.png"), r"test1, test2, train1.*rename them to train and val"),
        (("train/0.png", "hold-out/1.png"), r"hold-out, train.*rename them to train and val"),
        (("train/0.png", "unlabeled/1.png"), r"train, unlabeled.*rename them to train and val"),
        (("tr/a/0.png", "te/a/1.png"), r"te, tr.*rename them to train and val"),
        (("images/train/a/0.png", "images/val/a/1.png"), r"images holds train, val.*folder:\S*images"),
        (("a/Train/0.png", "a/test/1.png", "b/Train/2.png", "b/test/3.png"), r"a holds Train, test.*Train/a"),
        (("train/a/train/0.png", "train/a/val/1.png", "val/a/2.png"), r"a holds train, val.*rename"),
    ],
)
def test_what_may_be_a_split_is_refused_with_what_to_rename(tmp_path: Path, names: tuple[str, ...], named: str) -> None:
    with pytest.raises(DataError, match=named):
        load(lay_out(tmp_path / "x", *names))


def test_classes_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    assert load(lay_out(tmp_path / "x", "train/0.png", "plane/1.png"))[0].classes == ("plane", "train")
    assert load(lay_out(tmp_path / "y", "valid/0.png", "invalid/1.png"))[0].classes == ("invalid", "valid")
    train, test = load(lay_out(tmp_path / "z", "train/test/0.png", "train/plane/1.png", "train/train/2.png"))
    assert (train.classes, test) == (("plane", "test", "train"), None)
    for name, classes in (
        ("trains", ("contest", "train_station")), ("words", ("invalid", "train")), ("numbers", ("test1", "test2")),
        ("countries", ("de", "te", "tr")), ("letters", ("cat_rain", "test\u00e9")),
        ("mixed", ("Train", "car", "plane")),
    ):  # fmt: skip
        lay_out(tmp_path / name, *(f"{folder}/0.png" for folder in classes))
        assert load(tmp_path / name)[0].classes == classes
    root = lay_out(tmp_path / "years", "cats/2019/0.png", "dogs/2019/1.png", "tr/2019/2.png")
    assert load(root)[0].classes == ("cats", "dogs", "tr")


def test_one_folder_is_not_both_parts(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "x", "train/a/0.png")
    (root / "val").symlink_to(root / "train")
    with pytest.raises(DataError, match=r"val is the same folder as .*train; .*--validation-images"):
        load(root)


@pytest.mark.parametrize("empty", [False, True])
def test_a_class_without_test_images_is_said(tmp_path: Path, empty: bool, caplog: pytest.LogCaptureFixture) -> None:
    root = lay_out(tmp_path / "x", "train/a/0.png", "train/b/1.png", "train/c/2.png", "val/a/3.png", "val/c/4.png")
    if empty:
        (root / "val/b").mkdir()
    train, test = load(root)
    assert isinstance(test, ImageFiles)
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.labels.tolist() == [0, 2]
    assert "no image of b" in caplog.text
    (root / "train/d").mkdir()
    with pytest.raises(DataError, match=r"train/d holds no image.*fill it or remove it"):
        load(root)


def test_a_picture_may_not_become_an_image(tmp_path: Path) -> None:
    check_picture(tmp_path / "x/a-views.png", f"folder:{tmp_path / 'x'}")
    check_picture(tmp_path / "a.png", f"folder:{tmp_path / 'x'}")
    check_picture(tmp_path / "x/a.png", "digits")
    with pytest.raises(DataError, match=r"--out \S*a\.png lies in .*outside"):
        check_picture(tmp_path / "x/b/a.png", f"folder:{tmp_path / 'x'}")


@pytest.mark.parametrize("flat", [False, True])
def test_own_outputs_are_no_images(tmp_path: Path, flat: bool, caplog: pytest.LogCaptureFixture) -> None:
    names = ("0.png", "1.png") if flat else ("a/0.png", "b/1.png")
    root = lay_out(tmp_path / "x", *names)
    before, _ = load(root)
    for run in (root / "runs" / "one", root / "two", *(() if flat else (root / "a" / "three",))):
        write(run / "shown.png")
        (run / "config.json").write_text(json.dumps({"method": "byol", "dataset": "x", "recipe": "quick"}))
    inspect_source((before, None), root / "folder-x-images.png", Console(file=io.StringIO()))
    after, _ = load(root)
    assert (after.paths, after.classes) == (before.paths, before.classes)
    assert "folder-x-images.png" in caplog.text
    drawn = root / "x" / "y-images.png"
    drawn.parent.mkdir()
    inspect_source((before, None), drawn, Console(file=io.StringIO()))
    assert layout._is_picture(drawn)
    shutil.rmtree(drawn.parent)
    write(root / names[0].replace("0.png", "own-images.png"))  # of this name, but no picture of ours
    assert len(load(root)[0]) == 3


def test_formats_that_are_not_read_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = lay_out(tmp_path / "x", "a/0.png", "a/1.jpg", "a/2.webp", "b/3.bmp")
    Image.fromarray(pixels()).save(root / "b/4.jfif", "JPEG")
    for name in ("a/5.heic", "b/6.HEIC", "b/7.tga", "b/8.txt"):
        (root / name).write_bytes(b"")
    assert load(root)[0].paths == ("a/0.png", "a/1.jpg", "a/2.webp", "b/3.bmp", "b/4.jfif")
    assert "2 .heic, 1 .tga" in caplog.text
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.tga").write_bytes(b"")
    with pytest.raises(DataError, match=r"only holds no image; .*1 \.tga"):
        load(only)


@pytest.mark.parametrize(("link", "to"), [("kitten", "cats"), ("Aaa", "cats"), ("round", "."), ("up", "..")])
def test_a_class_folder_that_is_a_link_is_blamed(root: Path, link: str, to: str) -> None:
    (root / link).symlink_to(root / to)
    with pytest.raises(DataError, match=rf"{link} is a link to .*; remove the link"):
        load(root)


def test_a_class_whose_images_are_another_s_says_so(root: Path) -> None:
    (root / "new").symlink_to(root / "cats" / "2019")
    (root / "cats" / "x.jpeg").unlink()
    with pytest.raises(DataError, match=r"cats holds no image .*class new.*; fill it or remove it"):
        load(root)


def test_folders_of_systems_are_no_classes(root: Path) -> None:
    for name in (
        "__MACOSX/cats/._x.png",
        "@eaDir/thumb.jpg",
        ".ipynb_checkpoints/a.png",
        "cats/@eaDir/x.png",
        "#recycle/x.png",
        "__pycache__/x.png",
    ):
        write(root / name)
    assert len(load(root)[0]) == 5


def test_a_picture_of_ours_is_no_image_whatever_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = lay_out(tmp_path / "x", "a/0.png", "b/1.png", "b/folder-2-images.png")  # the last is a user's own
    before, _ = load(root)
    assert before.paths == ("a/0.png", "b/1.png", "b/folder-2-images.png")
    inspect_source((before, None), root / "a" / "of digits.png", Console(file=io.StringIO()))
    for _ in range(2):  # the second time from the index
        caplog.clear()
        after, _ = load(root)
        assert (after.paths, after.fingerprint()) == (before.paths, before.fingerprint())
        assert "of digits.png" in caplog.text
    shutil.move(root / "a" / "of digits.png", root / "a" / "0.png")
    with pytest.raises(DataError, match=r"no image of class a .*repair them, or remove"):
        load(root)


def test_the_work_grows_as_the_number_of_classes_does(tmp_path: Path) -> None:
    def calls(classes: int) -> int:
        root = tmp_path / str(classes)
        for number in range(classes):
            (root / f"{number:03}").mkdir(parents=True)
            (root / f"{number:03}" / "a.png").write_bytes(b"x")
        profile = cProfile.Profile()
        paths, _, names = profile.runcall(find_images, root)
        assert len(paths) == len(names) == classes
        return sum(entry.callcount for entry in profile.getstats())

    few, many = calls(50), calls(400)
    assert many < 12 * few  # 8 times as many; with all pairs of classes, 34 times
