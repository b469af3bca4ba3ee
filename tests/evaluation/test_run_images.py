"""Tests of the images of a run at its evaluation and when it resumes: changed ones, former ones, a moved folder."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mnclglf.config import (
    DataConfig,
    EngineConfig,
    KnnConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    ViewConfig,
    whole_name,
    with_whole_paths,
)
from mnclglf.data.images import ImageFiles
from mnclglf.evaluation import run as module
from mnclglf.evaluation.run import evaluate_run
from mnclglf.runs.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from mnclglf.training.loop import Trainer

KNN = KnnConfig(neighbors=3, device="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, seed: int, low: int = 0, high: int = 60) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(low, high, (10, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def photos(root: Path) -> Path:
    """Writes two classes of dark images: 10 each to train on, 3 each to test on."""
    for part, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("cats", "dogs")):
            for number in range(count):
                write(root / part / name / f"{number}.png", seed=100 * label + number + 1000 * (part == "val"))
    return root


def config_of(folder: Path, **data: object) -> RunConfig:
    return RunConfig(
        method="simclr",
        dataset=f"folder:{folder}",
        view=ViewConfig(blur_probability=0.0),
        data=DataConfig(**{"image_size": 8, "loader": "reference", **data}),  # type: ignore[arg-type]
        model=ModelConfig(width=2, projector_width=8, predictor_width=8),
        objective=ObjectiveConfig(queue_size=64),
        optim=OptimConfig(epochs=2, batch_size=10),
        engine=EngineConfig(device="cpu", precision="fp32", keep_every=1, keep_last=1),
    )


def silent() -> Console:
    return Console(file=io.StringIO(), width=1000)


def train(config: RunConfig, out: Path) -> Trainer:
    trainer = Trainer(config, out, console=silent())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains on a folder beside the run: two epochs of two steps."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        train(config_of(photos(place / "photos")), place / "run")
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """Copies the run and its folder, and writes the copy's place into the run."""
    made = Path(shutil.copytree(trained, tmp_path / "place"))
    for path in (made / "run" / "config.json", *(made / "run" / "checkpoints").glob("*.pt")):
        if path.suffix == ".json":
            path.write_text(path.read_text().replace(str(trained), str(made)))
        else:
            state = torch.load(path, weights_only=True)
            torch.save(state | {"config": state["config"].replace(str(trained), str(made))}, path)
    return made


def state_of(run: Path) -> dict[str, object]:
    path = find_checkpoint(run, "auto")
    assert path is not None
    return load_checkpoint(path)


def change_state(run: Path, *, without: tuple[str, ...] = (), **changes: object) -> None:
    """Rewrites every checkpoint, e.g. as an earlier version wrote it."""
    for path in (run / "checkpoints").glob("*.pt"):
        state = {key: value for key, value in torch.load(path, weights_only=True).items() if key not in without}
        torch.save(state | changes, path)


def normalized_with(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Records the means that evaluations normalize with."""
    means: list[list[float]] = []
    extract = module.extract_features

    def recorded(*args, mean, **settings):
        means.append(mean.tolist())
        return extract(*args, mean=mean, **settings)

    monkeypatch.setattr(module, "extract_features", recorded)
    return means


def turn(path: Path) -> None:
    with Image.open(path) as image:
        image.rotate(180).save(path, compress_level=0)


def test_a_run_does_not_resume_on_other_pixels(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = sorted((place / "photos").rglob("*.png"))
    for path in images:
        with Image.open(path) as image:
            image.save(path, compress_level=0)
    out = place / "new"
    config = config_of(place / "photos")
    train(config, out)
    former = ImageFiles._hash
    for path in images:
        turn(path)
    with pytest.raises(CheckpointError, match=r"other images.*photos.*--out"):
        Trainer(config, out, console=silent())
    images_now = Trainer(config, place / "other", console=silent()).images
    assert isinstance(images_now, ImageFiles)
    change_state(out, images=former(images_now, images_now.file_sizes.tobytes()))
    assert Trainer(config, out, console=silent()).start == 4  # a run of before: names and sizes are the same
    assert "pixels" in caplog.text


@pytest.mark.parametrize("former", [False, True])
def test_an_evaluation_normalizes_as_the_run_did(place: Path, former: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = place / "run"
    expected = state_of(run)["mean"].tolist()  # type: ignore[attr-defined]
    if former:
        change_state(run, without=("mean", "std", "side", "steps_per_epoch", "images", "other_images"))
    for number in range(20):  # twice the images, bright ones: today's mean is 0.5, an epoch today has 4 steps
        write(place / "photos/train/cats" / f"bright{number}.png", number, 200, 250)
    means = normalized_with(monkeypatch)
    evaluate_run(run, KNN, silent())
    assert max(expected) < 0.15
    assert means == [expected] * 4
    milestones = evaluate_run(run, dataclasses.replace(KNN, milestones=True), silent())
    assert [(result.settings["step"], result.epoch) for result in milestones] == [(2, 1.0), (4, 2.0)]


def test_a_run_without_any_statistics_takes_those_of_its_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = state_of(place / "run")["mean"].tolist()  # type: ignore[attr-defined]
    change_state(place / "run", without=("mean", "std", "side"))
    (place / "run/views.npz").unlink()
    means = normalized_with(monkeypatch)
    evaluate_run(place / "run", KNN, silent())
    assert means == [expected] * 4
    (place / "run/views.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"views\.npz is damaged.*remove"):
        evaluate_run(place / "run", KNN, silent())


def test_a_run_resumes_with_its_own_statistics(place: Path) -> None:
    other = torch.tensor([0.1, 0.2, 0.3])
    change_state(place / "run", mean=other, std=other)
    resumed = Trainer(config_of(place / "photos"), place / "run", console=silent())
    assert resumed.start == 4
    assert (resumed.loader.mean.tolist(), resumed.loader.std.tolist()) == (other.tolist(), other.tolist())


def test_the_images_of_a_moved_folder_are_the_same(place: Path) -> None:
    run, moved = place / "run", place / "moved"
    expected = [result.top1 for result in evaluate_run(run, KNN, silent())]
    (place / "photos").rename(moved)
    with pytest.raises(ValueError, match=r"photos is not a folder.*--data-dir"):
        evaluate_run(run, KNN, silent())
    at_new = dataclasses.replace(KNN, data_dir=moved)
    assert [result.top1 for result in evaluate_run(run, at_new, silent())] == expected
    former = config_of(place / "photos")
    resumed = Trainer(config_of(place / "photos", data_dir=moved), run, console=silent())
    assert resumed.start == 4
    assert resumed.config == dataclasses.replace(former, dataset=f"folder:{moved}")
    resumed.train()
    assert [result.top1 for result in evaluate_run(run, KNN, silent())] == expected  # the run knows the new place
    assert Trainer(config_of(moved), run, console=silent()).start == 4


def test_another_folder_is_not_the_new_place(place: Path) -> None:
    other = Path(shutil.copytree(place / "photos", place / "other"))
    for part in ("train", "val"):
        (other / part / "cats").rename(other / part / "kept")
        (other / part / "dogs").rename(other / part / "cats")
        (other / part / "kept").rename(other / part / "dogs")
    with pytest.raises(ValueError, match=r"train and test images of folder:\S*other .*--data-dir.*other"):
        evaluate_run(place / "run", dataclasses.replace(KNN, data_dir=other), silent())
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        evaluate_run(place / "run", dataclasses.replace(KNN, data_dir=place / "nowhere"), silent())
    with pytest.raises(CheckpointError, match=r"other images.*folder:\S*other"):
        Trainer(config_of(place / "photos", data_dir=other), place / "run", console=silent())
    with pytest.raises(CheckpointError, match=r"other images.*folder:\S*other"):
        Trainer(config_of(other), place / "run", console=silent())
    with pytest.raises(ValueError, match=r"data_dir \S*other .*leave out --data-dir"):
        Trainer(config_of(place / "photos", data_dir=other), place / "new", console=silent())
    assert not (place / "new").exists()


def test_changed_images_are_said_and_no_validation_image_is_told_from_them(place: Path) -> None:
    out, config = place / "held out", config_of(place / "photos", validation_images=5)
    train(config, out)
    validation = dataclasses.replace(KNN, split="validation")
    evaluate_run(out, validation, silent())
    write(place / "photos/val/cats/0.png", 77)
    console = silent()
    evaluate_run(out, KNN, console)
    evaluate_run(out, validation, console)  # the training images are the same
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("WARNING: the test images of folder:") == 2
    write(place / "photos/train/cats/new.png", 78)
    with pytest.raises(ValueError, match=r"train and validation and test images.*--split test"):
        evaluate_run(out, validation, silent())


def test_a_former_run_whose_data_dir_was_ignored_is_evaluated(place: Path) -> None:
    path = place / "run" / "config.json"
    values = json.loads(path.read_text())
    values["data"]["data_dir"] = "/nowhere"
    path.write_text(json.dumps(values))
    assert evaluate_run(place / "run", KNN, silent())


def test_a_part_of_the_images_is_another_set_of_images(place: Path) -> None:
    part = shutil.copytree(place / "photos" / "train", place / "Trn")
    with pytest.raises(ValueError, match=r"test images of folder:\S*Trn .*--data-dir, which is \S*Trn"):
        evaluate_run(place / "run", dataclasses.replace(KNN, data_dir=part), silent())
    with pytest.raises(CheckpointError, match=r"other images than folder:\S*Trn .*test images.*put the old ones back"):
        Trainer(config_of(place / "photos", data_dir=part), place / "run", console=silent())
    shutil.rmtree(place / "photos" / "val")  # in its own place it is still the run's folder
    assert Trainer(config_of(place / "photos"), place / "run", console=silent()).start == 4
    console = silent()
    with pytest.raises(ValueError, match=r"no test images"):
        evaluate_run(place / "run", KNN, console)


@pytest.mark.parametrize("how", ["relative", "dots", "slash", "link", "home"])
def test_the_new_place_in_any_spelling(place: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, moved = place / "run", (place / "photos").rename(place / "moved")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    (place / "link").symlink_to(moved)
    spelled = {
        "relative": "moved", "dots": "run/../moved/train/..", "slash": f"{moved}/", "link": "link", "home": "~/moved"
    }[how]  # fmt: skip
    assert evaluate_run(run, dataclasses.replace(KNN, data_dir=Path(spelled)), silent())
    resumed = Trainer(with_whole_paths(config_of(place / "photos", data_dir=Path(spelled))), run, console=silent())
    assert (resumed.start, whole_name(resumed.config.dataset)) == (4, f"folder:{moved}")


def test_one_class_is_nothing_to_tell_apart(place: Path) -> None:
    for part in ("train", "val"):
        shutil.rmtree(place / "photos" / part / "dogs")
    train(config_of(place / "photos"), place / "one")
    with pytest.raises(ValueError, match=r"one class, cats.*subfolder"):
        evaluate_run(place / "one", KNN, silent())


def test_digits_take_no_folder_and_a_former_run_with_one_is_evaluated(place: Path) -> None:
    config = dataclasses.replace(config_of(place), dataset="digits", optim=OptimConfig(epochs=1, batch_size=700))
    with_folder = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=place))
    with pytest.raises(ValueError, match=r"data_dir .*digits.*leave out --data-dir"):
        Trainer(with_folder, place / "refused", console=silent())
    assert not (place / "refused").exists()
    run = place / "digits"
    train(config, run)
    path = run / "config.json"
    values = json.loads(path.read_text())
    values["data"]["data_dir"] = "/nowhere"  # earlier versions ignored it
    path.write_text(json.dumps(values))
    assert evaluate_run(run, KNN, silent())
    with pytest.raises(ValueError, match=r"data_dir .*digits.*leave out --data-dir"):
        evaluate_run(run, dataclasses.replace(KNN, data_dir=place), silent())
