"""mnclglf.train on Dataset objects: the same run as on the same images in a folder or in a data set of ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import mnclglf
from mnclglf.cli import main
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError
from mnclglf.runs.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from mnclglf.runs.files import read_config
from tests.helpers.image_folder import pixels

SMALL: dict[str, Any] = dict(
    method="simsiam", recipe="quick", epochs=1, batch_size=16, width=2, projector_width=8, predictor_width=4,
    device="cpu", seed=3,
)  # fmt: skip


def changed(**settings: Any) -> dict[str, Any]:
    """Returns the settings of SMALL with others among them."""
    return SMALL | settings


class Pictures(Dataset[Any]):
    """Images of several sizes, of two classes."""

    classes = ("cats", "dogs")

    def __init__(self, count: int = 48, first: int = 0) -> None:
        self.images = [pixels(20 + n % 5, 31 - n % 4, n) for n in range(first, first + count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return Image.fromarray(self.images[index]), index * 2 // len(self)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(run: Any) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(Path(run) / "checkpoints")[-1][1])["method"]


def assert_same(first: Any, second: Any) -> None:
    """Asserts weights that are equal bit for bit."""
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("loader", "threads"), [("reference", 1), *([("dali", 1), ("dali", 2)] if find_spec("nvidia.dali") else [])]
)
def test_a_run_is_bit_equal_to_that_on_the_same_images_in_a_folder(loader: str, threads: int, tmp_path: Path) -> None:
    data = Pictures()
    for index, image in enumerate(data.images):
        path = tmp_path / "photos" / data.classes[data[index][1]] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    settings = changed(loader=loader, image_size=16, loader_threads=threads)
    ours = mnclglf.train(dataset=data, out=tmp_path / "object", **settings)
    assert_same(ours, mnclglf.train(dataset=f"folder:{tmp_path / 'photos'}", out=tmp_path / "folder", **settings))


def test_a_run_and_its_evaluation_are_equal_to_those_on_the_same_array(tmp_path: Path) -> None:
    train, test = load_dataset("digits")
    assert test is not None
    given = ([(images.pixels(row), images.labels[row]) for row in range(len(images))] for images in (train, test))
    # What recipe quick knows of digits, as of a Dataset it knows nothing.
    known: dict[str, Any] = dict(
        flip_probability=0.0, rotation_degrees=15.0, gray_probability=0.0, saturation=0.0, image_size=16
    )
    settings = changed(batch_size=256, epochs=1)
    data, tests = given
    ours = mnclglf.train(dataset=data, test_dataset=tests, out=tmp_path / "object", **settings, **known)
    truth = mnclglf.train(dataset="digits", out=tmp_path / "digits", **settings)
    assert_same(ours, truth)
    knn: dict[str, Any] = dict(raw_pixels=False, device="cpu")
    found = ([result.top1 for result in mnclglf.evaluate(run, "knn", **knn)] for run in (ours, truth))
    assert next(found) == next(found)


class Interrupted(Exception):
    pass


def test_a_run_that_was_interrupted_resumes_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = changed(image_size=16, epochs=2)
    straight = mnclglf.train(dataset=Pictures(), out=tmp_path / "straight", **settings)
    from mnclglf.training.loop import Trainer

    save = Trainer._save  # pyright: ignore[reportPrivateUsage]

    def stops(self: Trainer, done: int) -> None:
        save(self, done)
        raise Interrupted

    monkeypatch.setattr(Trainer, "_save", stops)
    with pytest.raises(Interrupted):
        mnclglf.train(dataset=Pictures(), out=tmp_path / "run", **settings)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert_same(mnclglf.train(dataset=Pictures(), out=tmp_path / "run", **settings), straight)
    with pytest.raises(CheckpointError, match="object:Pictures now holds"):
        mnclglf.train(dataset=Pictures(first=5), out=tmp_path / "run", **settings)


def test_an_evaluation_takes_the_objects_and_refuses_others(tmp_path: Path) -> None:
    run = mnclglf.train(dataset=Pictures(), test_dataset=Pictures(20, 100), out=tmp_path / "r", image_size=16, **SMALL)
    assert read_config(tmp_path / "r").dataset == "object:Pictures"
    knn: dict[str, Any] = dict(neighbors=5, raw_pixels=False, device="cpu")
    first = mnclglf.evaluate(run, "knn", **knn)
    again = mnclglf.evaluate(run, "knn", dataset=Pictures(), test_dataset=Pictures(20, 100), **knn)
    assert [result.top1 for result in again] == [result.top1 for result in first]
    with pytest.raises(ValueError, match=r"the test images of object:Pictures are not those.*give those again"):
        mnclglf.evaluate(run, "knn", dataset=Pictures(), test_dataset=Pictures(20, 200), **knn)
    with pytest.raises(ValueError, match="the test images of"):
        mnclglf.evaluate(run, "knn", dataset=Pictures(), **knn)
    (elsewhere,) = {result.dataset for result in mnclglf.evaluate(run, "knn", dataset="digits", **knn)}
    assert elsewhere == "digits"
    assert mnclglf.load_encoder(run)(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_without_the_object_the_command_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mnclglf.train(dataset=Pictures(), out=tmp_path / "r", image_size=16, **SMALL)
    monkeypatch.setattr("mnclglf.data.sources.objects._GIVEN", {})  # as in another program
    assert main(["knn", str(tmp_path / "r")]) == 1
    assert main(["train", "--dataset", "object:Pictures", "--out", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("object:Pictures is a Dataset object of a Python program, and is not here") == 2
    assert "any-dataset.md" in printed


def test_a_test_set_needs_an_object_and_floats_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_dataset is for a Dataset object.*'digits'"):
        mnclglf.train(dataset="digits", test_dataset=Pictures(), out=tmp_path / "r")
    with pytest.raises(DataError, match=r"item 0 is float32.*ToTensor"):
        mnclglf.train(dataset=[torch.rand(3, 9, 9)], out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_labels_of_an_object_train_the_supervised_method(tmp_path: Path) -> None:
    settings = changed(method="supervised", image_size=16, epochs=1)
    del settings["projector_width"], settings["predictor_width"]
    run = mnclglf.train(dataset=Pictures(), out=tmp_path / "r", **settings)
    assert weights(run)["classifier.weight"].shape[0] == 2
    with pytest.raises(ValueError, match="trains on labels"):
        mnclglf.train(dataset=[np.zeros((16, 16), np.uint8)] * 20, out=tmp_path / "s", **settings)
