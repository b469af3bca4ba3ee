"""Tests of a run's whole evaluation: its checkpoints, images and labels, and the resulting evaluation.json."""

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mnclglf.config import (
    DataConfig,
    EngineConfig,
    KnnConfig,
    LinearConfig,
    LoaderName,
    LogisticConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageArray
from mnclglf.data.loader import Loader
from mnclglf.data.splits import split_train
from mnclglf.data.views import whole_views
from mnclglf.evaluation import images
from mnclglf.evaluation import run as module
from mnclglf.evaluation.run import evaluate_run
from mnclglf.models.encoder import ResNet
from mnclglf.recipes import view_of
from mnclglf.runs import files
from mnclglf.runs.results import Result, load_results
from mnclglf.training import start
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method, load_trained

CONFIG = RunConfig(
    method="simclr",
    dataset="digits",
    seed=1,
    view=view_of("quick", "digits"),
    data=DataConfig(image_size=8, train_images=320, validation_images=64),
    model=ModelConfig(width=2, projector_width=8, predictor_width=8),
    objective=ObjectiveConfig(queue_size=64),
    optim=OptimConfig(epochs=2, batch_size=64),
    engine=EngineConfig(device="cpu", precision="fp32", keep_every=1, keep_last=1),
)
TINY = LinearConfig(epochs=2, batch_size=64, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run of two epochs of five steps, with one milestone per epoch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(CONFIG, folder).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def tiny(**changes: object) -> LinearConfig:
    return LinearConfig(**{"epochs": 2, "batch_size": 64, "device": "cpu", **changes})


def test_the_test_images_are_classified_whole_by_the_classifier(run: Path, monkeypatch: pytest.MonkeyPatch):
    classifier = nn.Linear(16, 10)
    monkeypatch.setattr(module, "train_linear", lambda *_, **__: classifier)
    (result,) = evaluate_run(run, TINY)
    train, test = load_dataset("digits")
    assert isinstance(test, ImageArray)
    mean, std = split_train(train, CONFIG.data)[0].statistics()
    encoder = load_trained(run)[1].encoder.eval()
    with torch.no_grad():
        scores = classifier(encoder(whole_views(test.images, 8, mean, std, torch.float32)))
    hits = scores.argsort(dim=1, descending=True).numpy() == test.labels[:, None]
    assert 0 < hits[:, 0].mean() < 1
    # one image of 350 may lie on the border: other batches, other order of sums
    assert result.top1 == pytest.approx(hits[:, 0].mean(), abs=1.1 / 350)
    assert result.top5 == pytest.approx(hits[:, :5].any(axis=1).mean(), abs=1.1 / 350)


def test_the_papers_protocol_is_of_the_pretrained_encoder(run: Path, capsys: pytest.CaptureFixture[str]):
    found = evaluate_run(run, TINY)
    assert [(r.protocol, r.representation, r.split, r.label_share, r.epoch) for r in found] == [
        ("linear", "pretrained", "test", 1.0, None)
    ]
    assert load_results(run / "evaluation.json") == found
    expected = {"optimizer": "LARS", "epochs": 2, "batch_size": 64, "lr": 0.8, "momentum": 0.9, "weight_decay": 0.0,
                "trust_coefficient": 0.001, "train_images": 320, "test_images": 350, "classes": 10, "step": 10,
                "seed": 1, "view": "linear_train", "precision": "float32"}  # fmt: skip
    assert found[0].settings | expected == found[0].settings
    printed = capsys.readouterr().out
    assert "linear, pretrained, step 10: epoch 1/2" in printed
    assert "left" in printed


def test_the_untrained_encoder_is_another_when_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []

    def train_linear(encoder: ResNet, *_: object, **__: object) -> nn.Linear:
        seen.append(encoder.conv1.weight.detach().clone())
        return nn.Linear(16, 10)

    monkeypatch.setattr(module, "train_linear", train_linear)
    found = evaluate_run(run, tiny(untrained=True))
    assert [r.representation for r in found] == ["pretrained", "untrained"]
    assert torch.equal(seen[0], load_trained(run)[1].get_parameter("encoder.conv1.weight"))
    assert torch.equal(seen[1], build_method(CONFIG, torch.float32).get_parameter("encoder.conv1.weight"))
    assert not torch.equal(*seen)


class Trained:
    """Recorder of train_linear's arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "train_linear", self)

    def __call__(self, encoder, loader, labels, config, *, steps_per_epoch, seed, **_) -> nn.Linear:
        self.loader, self.labels, self.seed, self.steps_per_epoch = loader, labels, seed, steps_per_epoch
        return nn.Linear(16, 10)


def test_few_labels_are_a_share_of_each_class_for_as_many_steps(run: Path, monkeypatch: pytest.MonkeyPatch):
    train, _ = split_train(load_dataset("digits")[0], CONFIG.data)
    given = Trained(monkeypatch)
    all_labels, few = evaluate_run(run, TINY)[0], evaluate_run(run, tiny(label_share=0.1))[0]
    counts = np.bincount(train.labels)
    np.testing.assert_array_equal(np.bincount(given.labels), np.maximum(1, np.rint(counts / 10)))
    (batch,) = given.loader.batches(0, 1)
    assert len(batch.indices) == few.settings["batch_size"] == few.settings["train_images"] == len(given.labels) < 64
    assert (given.steps_per_epoch, given.seed) == (320 // 64, 1)
    np.testing.assert_array_equal(given.loader.mean, train.statistics()[0])  # as the encoder was trained
    assert load_results(run / "evaluation.json") == [all_labels, few]
    assert (all_labels.label_share, few.label_share) == (1.0, 0.1)


def test_evaluations_of_other_settings_are_kept_beside_one_another(run: Path, monkeypatch: pytest.MonkeyPatch):
    found = [evaluate_run(run, KnnConfig(device="cpu", neighbors=k))[0] for k in (20, 5)]
    Trained(monkeypatch)
    changes = [{}, {"epochs": 3}, {"lr": 0.4}, {"batch_size": 32}]
    changes += [{"label_share": 0.05}, {"label_share": 0.05, "batch_size": 32}]  # both in batches of 16 images
    found += [evaluate_run(run, tiny(**change))[0] for change in changes]
    saved = load_results(run / "evaluation.json")
    assert [r for r in saved if r.representation == "pretrained"] == found


@pytest.mark.parametrize(
    ("asked", "steps"),
    [({"epochs": 999}, 4995), ({"epochs": 1000}, 5000), ({"steps": 7}, 7), ({"steps": 5000}, 5000)],
)
def test_few_steps_are_warned_of_with_their_number(
    run: Path, asked: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Trained(monkeypatch)
    (found,) = evaluate_run(run, LinearConfig(**asked, batch_size=64, device="cpu"))  # 320 // 64 steps per epoch
    printed = capsys.readouterr().out
    few = steps < 5000
    assert (f"WARNING: linear trains for {steps:,} steps" in printed) == ("--steps 5000" in printed) == few
    assert found.settings.get("note") == (f"{steps:,} steps, fewer than 5,000" if few else None)
    assert {name: value for name, value in found.settings.items() if name in ("epochs", "steps")} == asked


def test_fewer_images_than_the_default_batch_are_one_batch(run: Path, monkeypatch: pytest.MonkeyPatch):
    real = images.load_run_data

    def load_run_data(config: RunConfig, data_dir: Path | None) -> start.RunData:
        data = real(config, data_dir)
        return replace(data, train=data.train.subset(np.arange(120)))

    monkeypatch.setattr(images, "load_run_data", load_run_data)
    given = Trained(monkeypatch)
    (found,) = evaluate_run(run, LinearConfig(epochs=2, device="cpu"))
    (batch,) = given.loader.batches(0, 1)
    assert len(batch.indices) == found.settings["batch_size"] == found.settings["train_images"] == 120
    assert given.steps_per_epoch == 1
    evaluate_run(run, LinearConfig(epochs=2, device="cpu", label_share=0.1))
    assert given.steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"257 .* 120 .*--batch-size"):
        evaluate_run(run, LinearConfig(batch_size=257, device="cpu"))


def test_digits_are_not_flipped(run: Path, monkeypatch: pytest.MonkeyPatch):
    given = Trained(monkeypatch)
    evaluate_run(run, TINY)
    view = given.loader._config
    assert (view.flip_probability, view.crop_scale, view.jitter_probability) == (0.0, (0.08, 1.0), 0.0)


def test_logistic_regression_takes_few_labels_too(run: Path):
    found = evaluate_run(run, LogisticConfig(label_share=0.1, device="cpu"))
    assert [(r.protocol, r.representation) for r in found] == [
        ("logistic", name) for name in ("pretrained", "untrained", "raw pixels")
    ]
    assert {r.label_share for r in found} == {0.1}
    assert all(r.settings["train_images"] < 64 for r in found)


@pytest.mark.parametrize(("least", "protocols"), [(9, ["logistic"]), (10, ["logistic", "logistic_10_labels"])])
def test_ten_labels_a_class_are_left_out_where_a_class_has_fewer(
    run: Path, least: int, protocols: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        module, "with_labels", lambda train, *_, **__: train.subset(first_of_class(train.labels, 7, least))
    )
    found = evaluate_run(run, LogisticConfig(device="cpu", milestones=True))
    assert [r.protocol for r in found] == 2 * protocols
    assert {r.settings["train_images"] for r in found} == {320 - (32 - least)}
    told = "logistic_10_labels is left out: class 7 has 9 training images, fewer than 10"
    assert capsys.readouterr().out.count(told) == (least < 10)
    assert load_results(run / "evaluation.json") == found


def first_of_class(labels: np.ndarray, label: int, count: int) -> np.ndarray:
    """Returns the rows of all other classes, and the first `count` of this class."""
    return np.sort(np.concatenate([np.flatnonzero(labels != label), np.flatnonzero(labels == label)[:count]]))


def test_milestones_are_results_of_their_own(run: Path):
    newest = evaluate_run(run, KnnConfig(device="cpu"))
    found = evaluate_run(run, KnnConfig(device="cpu", milestones=True))
    assert [(r.representation, r.epoch, r.settings["step"]) for r in found] == [
        ("pretrained", 1.0, 5), ("pretrained", 2.0, 10)
    ]  # fmt: skip
    assert found[1].top1 == newest[0].top1
    assert load_results(run / "evaluation.json") == [*newest, *found]
    first = run / "checkpoints" / "step-00000005.pt"
    assert evaluate_run(run, KnnConfig(device="cpu", checkpoint=first))[0] == found[0]


def test_raw_pixels_can_be_left_out(run: Path, monkeypatch: pytest.MonkeyPatch):
    def raw_pixels(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(module, "raw_pixels", raw_pixels)
    for evaluation in (
        KnnConfig(device="cpu", raw_pixels=False),
        LogisticConfig(device="cpu", raw_pixels=False, label_share=0.1),
    ):
        assert [r.representation for r in evaluate_run(run, evaluation)] == ["pretrained", "untrained"]


def test_an_interruption_leaves_what_was_finished(run: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate_run(run, KnnConfig(device="cpu"))
    before = (run / "evaluation.json").read_bytes()
    classifiers = iter([nn.Linear(16, 10)])

    def train_linear(*_: object, **__: object) -> nn.Linear:
        try:
            return next(classifiers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module, "train_linear", train_linear)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, tiny(untrained=True))  # after the first of its two
    assert (run / "evaluation.json").read_bytes() == before
    classifiers = iter([nn.Linear(16, 10)])
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, tiny(milestones=True))
    assert [r.epoch for r in load_results(run / "evaluation.json")] == [None, None, None, 1.0]
    assert not list(run.glob(".*"))


def test_what_is_wrong_shows_before_any_work(run: Path, monkeypatch: pytest.MonkeyPatch):
    def train_linear(*_: object, **__: object) -> nn.Linear:
        raise AssertionError("began")

    monkeypatch.setattr(module, "train_linear", train_linear)
    with pytest.raises(ValueError, match=r"321 .* 320 .*--batch-size"):
        evaluate_run(run, tiny(batch_size=321))
    monkeypatch.setattr(module, "load_trained", train_linear)
    with pytest.raises(ValueError, match=r"99 .* \d\d .*--neighbors"):
        evaluate_run(run, KnnConfig(neighbors=99, label_share=0.1, device="cpu"))
    (run / "evaluation.json").write_text("[{")
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
        evaluate_run(run, TINY)
    config = json.loads((run / "config.json").read_text())
    config["engine"]["keep_every"] = None
    (run / "config.json").write_text(json.dumps(config))
    (run / "evaluation.json").unlink()
    (run / "checkpoints" / "milestones.json").unlink()
    with pytest.raises(ValueError, match=r"milestone.*--keep-every.*None"):
        evaluate_run(run, tiny(milestones=True))
    with pytest.raises(ValueError, match="milestones are of the pretrained encoder alone"):
        tiny(milestones=True, untrained=True)


def test_milestones_are_those_recorded_whatever_the_settings_say_now(run: Path):
    config = json.loads((run / "config.json").read_text())
    config["engine"]["keep_every"] = None  # as after a resumption without --keep-every
    (run / "config.json").write_text(json.dumps(config))
    found = evaluate_run(run, KnnConfig(device="cpu", milestones=True))
    assert [r.epoch for r in found] == [1.0, 2.0]


def test_a_run_directory_that_cannot_be_written_is_named_before_any_work(run: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir / "x"))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)  # root may write where chmod says that none may
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("began"))
    with pytest.raises(OSError, match=rf"Read-only file system.*copy the run.*{run}") as raised:
        evaluate_run(run, KnnConfig(device="cpu"))
    assert raised.value.errno == errno.EROFS


def test_results_that_cannot_be_saved_are_printed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = evaluate_run(run, KnnConfig(device="cpu"))
    capsys.readouterr()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_results", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate_run(run, KnnConfig(device="cpu"))
    printed = capsys.readouterr().out
    for result in found:
        assert f"knn, {result.representation}, test: top-1 {result.top1:.2%}" in printed


def test_a_run_that_needed_its_gpu_is_evaluated_without_one(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mnclglf_kernels.backend.INTERPRETED", False)
    config = json.loads((run / "config.json").read_text())
    config["engine"] |= {"device": "cuda", "graphs": "on", "compile": "on", "kernels": "require"}
    (run / "config.json").write_text(json.dumps(config))
    assert isinstance(evaluate_run(run, TINY)[0], Result)


@pytest.mark.parametrize("installed", [False, True])
def test_a_run_trained_by_dali_is_evaluated_without_it(
    run: Path, installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = json.loads((run / "config.json").read_text())
    config["data"]["loader"] = "dali"
    (run / "config.json").write_text(json.dumps(config))
    real, asked = start.make_loader, []

    def make_loader(*args: Any, backend: LoaderName, **settings: Any) -> Loader:
        asked.append(backend)
        return real(*args, backend="reference" if installed else backend, **settings)

    monkeypatch.setattr(start, "make_loader", make_loader)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # importing it fails
    Trained(monkeypatch)
    (found,) = evaluate_run(run, TINY)
    assert asked == (["dali"] if installed else ["dali", "auto"])
    assert found.settings["loader"] == ("reference" if installed else "resident")
    told = "the run's loader cannot be made here; falling back to --loader auto: loader dali needs DALI ("
    assert (told in capsys.readouterr().out) != installed
