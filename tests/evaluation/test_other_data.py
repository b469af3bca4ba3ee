"""Tests of evaluations on another data set than the run's own: its images, its split, its labels, its results."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mnclglf.config import (
    DataConfig,
    EngineConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewConfig,
)
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.splits import draw_test
from mnclglf.data.views import whole_views
from mnclglf.evaluation import images as module
from mnclglf.evaluation.run import evaluate_run
from mnclglf.reports.page import write_report
from mnclglf.runs.results import Result, load_results
from mnclglf.training.loop import Trainer
from mnclglf.training.start import load_trained

CONFIG = RunConfig(
    method="simclr",
    dataset="digits",
    view=ViewConfig(blur_probability=0.0, flip_probability=0.0),
    data=DataConfig(image_size=8, train_images=200, loader="reference"),
    model=ModelConfig(width=2, projector_width=8, predictor_width=8),
    optim=OptimConfig(epochs=1, batch_size=50),
    engine=EngineConfig(device="cpu", precision="fp32"),
)
KNN = KnnConfig(neighbors=3, device="cpu", raw_pixels=False)
NAMES = ("käse [1]", "d o g", "$x|y")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def silent() -> Console:
    return Console(file=io.StringIO(), width=1000)


def photos(root: Path, counts: tuple[int, ...] = (14, 9, 6), parts: tuple[str, ...] = ("",)) -> Path:
    """Writes images of several sizes and of colors that tell their classes apart, gray, RGBA and RGB."""
    draw = np.random.default_rng(0)
    for part in parts:
        for label, (name, count) in enumerate(zip(NAMES, counts, strict=False)):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = draw.integers(0, 60, (12 + number, 17, 3)) + 80 * label
                image = Image.fromarray(pixels.astype(np.uint8))
                image.convert(("RGB", "L", "RGBA")[number % 3]).save(folder / f"{number}.png")
    return root


def features(run: Path, images: ImageSet) -> np.ndarray:
    """Returns the run's features, computed by hand with the statistics of the images that it trained on."""
    state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
    encoder = load_trained(run)[1].encoder.eval()
    pixels = [images.pixels(row) for row in range(len(images))]
    with torch.no_grad():
        views = whole_views(pixels, 8, state["mean"].numpy(), state["std"].numpy(), torch.float32)
        return encoder(views).numpy()


@pytest.mark.parametrize("name", ["mnist5k", "folder"])
def test_knn_and_logistic_regression_are_those_of_scikit_learn(
    run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = name if name == "mnist5k" else f"folder:{photos(tmp_path / 'my [photos]', parts=('train', 'val'))}"
    train, test = load_dataset(dataset)
    assert test is not None
    if name == "mnist5k":  # fewer, for the time
        assert isinstance(train, ImageArray)
        assert train.images.shape[1] == 28
        train, test = train.subset(range(0, 4000, 10)), test.subset(range(0, 1000, 5))
        monkeypatch.setattr(module, "load_dataset", lambda *_, **__: (train, test))
    first, second = features(run, train), features(run, test)
    nearest = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(first, train.labels)
    knn = evaluate_run(run, dataclasses.replace(KNN, neighbors=1, dataset=dataset), silent())[0]
    # one image may have two neighbors at the same distance up to rounding, and other batches round otherwise
    assert knn.top1 == pytest.approx(nearest.score(second, test.labels), abs=1.1 / len(test))
    assert (knn.dataset, knn.settings["classes"], knn.settings["test_images"]) == (
        dataset, len(train.classes), len(test)
    )  # fmt: skip
    assert "test_share" not in knn.settings  # the data set's own split
    if name == "mnist5k":
        return
    scale = StandardScaler().fit(first)
    fitted = evaluate_run(run, LogisticConfig(dataset=dataset, device="cpu", raw_pixels=False), silent())[0]
    model = LogisticRegression(C=fitted.settings["C"], max_iter=1000).fit(scale.transform(first), train.labels)
    assert fitted.top1 == pytest.approx(model.score(scale.transform(second), test.labels), abs=1.1 / len(test))
    assert fitted.settings["classes"] == 3


def test_the_runs_own_data_set_is_the_same_as_none(run: Path, tmp_path: Path) -> None:
    without = evaluate_run(run, KNN, silent())
    assert evaluate_run(run, dataclasses.replace(KNN, dataset="digits"), silent()) == without
    assert load_results(run / "evaluation.json") == without
    assert without[0].settings["train_images"] == 200  # the run's own choice, not the whole data set


def test_the_runs_own_folder_in_another_spelling_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path / "photos", parts=("train", "val"))
    config = dataclasses.replace(CONFIG, dataset=f"folder:{folder}", data=DataConfig(image_size=8, loader="reference"))
    run = tmp_path / "run"
    Trainer(dataclasses.replace(config, optim=OptimConfig(epochs=1, batch_size=10)), run, console=silent()).train()
    monkeypatch.chdir(tmp_path)
    without = evaluate_run(run, KNN, silent())
    assert evaluate_run(run, dataclasses.replace(KNN, dataset="folder:run/../photos/"), silent()) == without
    assert without[0].dataset is None


def test_results_of_other_data_stand_beside_the_runs_own(run: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    own = evaluate_run(run, KNN, silent())
    other = evaluate_run(run, dataclasses.replace(KNN, dataset=f"folder:{tmp_path}/photos"), silent())
    again = evaluate_run(run, dataclasses.replace(KNN, dataset=f"folder:{tmp_path}/photos/"), silent())
    assert other == again  # in another spelling it is the same folder, and replaces
    assert load_results(run / "evaluation.json") == [*own, *other]
    page = write_report(run).read_text()
    assert "On other data" in page
    assert f"on folder:{tmp_path}/photos" in page
    assert "Guessing among 10 classes" in page  # those of the run's own


def test_images_without_a_split_are_split_by_hand_and_it_is_said(run: Path, tmp_path: Path) -> None:
    dataset, console = f"folder:{photos(tmp_path / 'photos', counts=(14, 9, 1))}", silent()
    result = evaluate_run(run, dataclasses.replace(KNN, dataset=dataset), console)[0]
    assert (result.settings["train_images"], result.settings["test_images"]) == (24 - 5, 5)  # 3 of 14, 2 of 9, 0 of 1
    assert (result.settings["test_share"], result.settings["split_seed"]) == (0.2, 0)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "5 of its 24 images were drawn" in printed
    assert "12 x 17 to 25 x 17 pixels are resized to the 8 x 8" in printed


def test_a_drawn_split_is_a_fifth_of_each_class_and_depends_on_the_labels_alone() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    images = ImageArray(
        name="x", split="train", labels=labels, classes=("a", "b", "c", "d"),
        images=np.arange(63, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8),
    )  # fmt: skip
    train, test = draw_test(images)
    np.testing.assert_array_equal(np.bincount(test.labels, minlength=4), [10, 2, 1, 0])
    np.testing.assert_array_equal(np.bincount(train.labels), [40, 8, 1, 1])
    both = np.concatenate([train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]])
    assert sorted(both.tolist()) == list(range(63))  # each once
    assert (train.split, test.split) == ("train", "test")
    np.testing.assert_array_equal(draw_test(images)[1].images, test.images)
    assert test.images[:10, 0, 0, 0].tolist() != list(range(10))  # not merely the first ones
    with pytest.raises(DataError, match=r"x has no test images, and no class of two.*train and val"):
        draw_test(images.subset([0, 50, 60]))


def test_few_labels_of_other_data_are_a_share_of_each_class(run: Path, tmp_path: Path) -> None:
    dataset = f"folder:{photos(tmp_path / 'photos', counts=(20, 10, 5))}"
    found = evaluate_run(
        run, LogisticConfig(dataset=dataset, label_share=0.5, device="cpu", raw_pixels=False), silent()
    )
    assert found[0].label_share == 0.5
    assert found[0].settings["train_images"] == 8 + 4 + 2  # of 16, 8 and 4 that are left to train on


def test_linear_trains_on_the_other_images(run: Path, tmp_path: Path) -> None:
    dataset = f"folder:{photos(tmp_path / 'photos')}"
    (result,) = evaluate_run(run, LinearConfig(dataset=dataset, steps=3, device="cpu"), silent())
    assert (result.protocol, result.dataset, result.settings["classes"]) == ("linear", dataset, 3)
    assert result.settings["train_images"] == 11 + 7 + 5


def test_the_runs_own_images_need_not_be_there(run: Path, tmp_path: Path) -> None:
    path = run / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"dataset": "folder:/nowhere"}))
    for checkpoint in (run / "checkpoints").glob("*.pt"):
        state = torch.load(checkpoint, weights_only=True)
        torch.save(state | {"config": path.read_text()}, checkpoint)
    assert evaluate_run(run, dataclasses.replace(KNN, dataset="digits"), silent())
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        evaluate_run(run, KNN, silent())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((), r"has no labels.*mnclglf quality '?\S*run'? --dataset 'folder:\S*my photos'"),
        ((4,), r"one class, käse \[1\].*subfolder"),
        ((1, 1), r"no class of two images.*train and val"),
    ],
)
def test_images_that_cannot_be_classified_are_refused_with_what_works(
    run: Path, tmp_path: Path, counts: tuple[int, ...], message: str
) -> None:
    folder = photos(tmp_path / "my photos", counts=counts)
    if not counts:
        folder.mkdir()
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "one.png")
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, dataclasses.replace(KNN, dataset=f"folder:{folder}"), silent())
    assert not (run / "evaluation.json").exists()


def test_damaged_files_are_skipped_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    (folder / NAMES[0] / "broken.png").write_bytes(b"\x89PNG\r\n")
    asked = dataclasses.replace(KNN, dataset=f"folder:{folder}")
    with pytest.raises(ValueError, match=r"broken.png.*--skip-corrupt"):
        evaluate_run(run, asked, silent())
    assert evaluate_run(run, dataclasses.replace(asked, skip_corrupt=True), silent())


def test_a_validation_split_is_of_the_runs_own_images() -> None:
    with pytest.raises(ValueError, match=r"split validation.*dataset mnist5k.*leave out"):
        KnnConfig(dataset="mnist5k", split="validation")


def test_a_result_of_other_data_is_no_row_of_a_table_of_the_paper() -> None:
    from mnclglf.reproduce.results import _find  # pyright: ignore[reportPrivateUsage]

    other = Result(protocol="knn", representation="pretrained", dataset="mnist5k", top1=0.1, top5=0.2)
    own = dataclasses.replace(other, dataset=None, top1=0.2)
    assert _find([other, own], "knn", "pretrained", {}) == own
