"""Tests of the k-NN evaluations during training: they change nothing of it, and are those of `mnclglf knn`."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from made_metrics import metrics_of
from PIL import Image
from rich.console import Console
from torch import nn
from training.test_step import make_batch, make_method

from mnclglf.config import (
    DataConfig,
    EngineConfig,
    KnnConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    ViewConfig,
)
from mnclglf.data.images import ImageArray
from mnclglf.evaluation.features import extract_features
from mnclglf.evaluation.monitor import KnnMonitor
from mnclglf.evaluation.run import evaluate_run
from mnclglf.reports.figures import health_curves
from mnclglf.runs.checkpoint import list_checkpoints, load_checkpoint
from mnclglf.runs.metrics import read_records
from mnclglf.training.loop import Trainer
from mnclglf.training.step import TrainStep

CONFIG = RunConfig(
    method="mnclglf",
    dataset="digits",
    view=ViewConfig(blur_probability=0.0, flip_probability=0.0),
    data=DataConfig(image_size=8, train_images=96, loader="reference"),
    model=ModelConfig(width=2, projector_width=8, predictor_width=8),
    objective=ObjectiveConfig(queue_size=64, one_embedding=True),
    optim=OptimConfig(epochs=3, batch_size=32),
    engine=EngineConfig(device="cpu", precision="fp32", log_every=2, save_every=1.0, keep_last=3, keep_every=1),
)
STEPS_PER_EPOCH = 3
OF_TIME = ("seconds", "images_per_second", "roofline", "peak_memory")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def silent() -> Console:
    return Console(file=io.StringIO(), width=1000)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def watched(every: int | None, **engine: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, knn_every=every, **engine))


def train(config: RunConfig, out: Path, console: Console | None = None) -> Trainer:
    trainer = Trainer(config, out, console=console or silent(), monitor=KnnMonitor)
    trainer.train()
    return trainer


def figures(out: Path) -> dict[int, dict[str, Any]]:
    """Returns the records by step, without figures of time."""
    return {
        record["step"]: {k: v for k, v in record.items() if not any(word in k for word in OF_TIME)}
        for record in read_records(out / "metrics.jsonl")[0]
    }


@pytest.fixture(scope="module")
def with_and_without(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("runs")
    train(watched(None), place / "without")
    train(watched(2), place / "with")
    return place / "with", place / "without"


def assert_identical(first: object, second: Any, name: str = "state") -> None:
    """Asserts equality to the bit, through nested dicts and lists."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), name
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first:
            assert_identical(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, list):
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_identical(a, b, f"{name}.{index}")
    elif name != "state.config":  # which says --knn-every
        assert first == second, name


def test_the_training_is_the_same_to_the_bit(with_and_without: tuple[Path, Path]) -> None:
    """Weights, momentum network, queue, running statistics, optimizer and generator state, at every epoch."""
    some, none = ([load_checkpoint(p) for _, p in list_checkpoints(r / "checkpoints")] for r in with_and_without)
    assert len(some) == len(none) == 3
    for first, second in zip(some, none, strict=True):
        assert_identical(first, second)
    watched_figures, plain = map(figures, with_and_without)
    for step, record in plain.items():
        kept = {k: v for k, v in watched_figures[step].items() if not k.startswith("knn")}
        assert kept == record
    # log_every 2: steps 2, 4, 6, 8 and 9; epoch 2 ends with step 6
    assert sorted(watched_figures) == sorted(plain) == [2, 4, 6, 8, 9]
    assert [step for step, record in watched_figures.items() if "knn_top1" in record] == [6, 9]


def test_the_figures_are_those_of_the_command(with_and_without: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(with_and_without[0], tmp_path / "run"))
    logged = figures(run)
    (knn, *_) = evaluate_run(run, KnnConfig(device="cpu", raw_pixels=False), silent())
    assert logged[9]["knn_top1"] == pytest.approx(knn.top1, abs=1e-6)  # rounded to six places
    second = run / "checkpoints" / "step-00000006.pt"
    (knn, *_) = evaluate_run(run, KnnConfig(device="cpu", raw_pixels=False, checkpoint=second), silent())
    assert logged[6]["knn_top1"] == pytest.approx(knn.top1, abs=1e-6)


def test_a_resumed_run_evaluates_at_the_same_steps(with_and_without: tuple[Path, Path], tmp_path: Path) -> None:
    straight = with_and_without[0]
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (run / "checkpoints" / "step-00000009.pt").unlink()
    console = silent()
    train(watched(2), run, console)
    assert "resuming after step 6" in printed(console)
    assert figures(run) == figures(straight)
    shutil.copytree(straight, tmp_path / "other")
    (tmp_path / "other" / "checkpoints" / "step-00000009.pt").unlink()
    train(watched(1), tmp_path / "other")  # another interval is no other run
    assert figures(tmp_path / "other") == figures(straight)


def test_cost_and_images_are_printed_and_kept(tmp_path: Path) -> None:
    console = silent()
    config = dataclasses.replace(watched(1), data=dataclasses.replace(CONFIG.data, validation_images=20))
    trainer = train(config, tmp_path / "run", console)
    assert printed(console).count("k-NN after epoch") == 3
    assert "k-NN during training: 3 evaluations" in printed(console)
    assert "% of the training time" in printed(console)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["knn_every"] == "20 validation images by 20 of 96 training images, vote temperature 0.07"
    assert isinstance(trainer.monitor, KnnMonitor)
    assert trainer.monitor.evaluations == 3
    assert trainer.monitor.seconds == pytest.approx(
        sum(r.get("knn_seconds", 0) for r in read_records(tmp_path / "run" / "metrics.jsonl")[0]),
        abs=0.01,  # rounded to milliseconds
    )
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_an_evaluation_between_two_log_steps_is_a_record_of_its_own(tmp_path: Path) -> None:
    train(watched(1, log_every=100), tmp_path / "run")
    assert sorted(figures(tmp_path / "run")) == [3, 6, 9]


def test_an_evaluation_leaves_modes_statistics_and_generators_alone(tmp_path: Path) -> None:
    trainer = Trainer(watched(1), tmp_path / "run", console=silent(), monitor=KnnMonitor)
    encoder = trainer.method.encoder
    cast(nn.Module, encoder.layer1).eval()  # a part that is not in train mode stays so
    modes = [module.training for module in trainer.method.modules()]
    state = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    assert trainer.monitor is not None
    trainer.monitor(encoder)
    assert [module.training for module in trainer.method.modules()] == modes
    assert_identical(state, dict(trainer.method.state_dict()))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.slow
def test_an_evaluation_does_not_make_a_step_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr("torch.compile", lambda m, **_: compiler(m, fullgraph=True, dynamic=False, backend="aot_eager"))
    torch._dynamo.reset()
    step = TrainStep(make_method(), OptimConfig(), EngineConfig(), torch.float32, compile="on")
    some = ImageArray(
        name="x", split="test", labels=np.zeros(3, np.int64), classes=("a",), images=np.zeros((3, 8, 8, 3), np.uint8)
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(4):
            step(number, make_batch(), lr=0.1, momentum=0.9)
            extract_features(
                step.method.encoder, some, side=8, mean=np.zeros(3, np.float32), std=np.ones(3, np.float32),
                dtype=torch.float32, device=torch.device("cpu"),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "data", "message"),
    [
        ((), {}, r"--knn-every 1 .*no labels.*leave out --knn-every.*mnclglf quality"),
        (("a",), {}, r"--knn-every 1 .*one class.*subfolder"),
        (("a", "b"), {}, r"--knn-every 1 .*holds no images out.*--validation-images"),
        (("a", "b"), {"validation_images": 2}, None),
    ],
)
def test_images_without_labels_are_refused_before_any_work(
    tmp_path: Path, classes: tuple[str, ...], data: dict[str, Any], message: str | None
) -> None:
    for name in classes or ("",):
        for number in range(8):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), 9 * number, np.uint8)).save(path)
    config = dataclasses.replace(
        watched(1),
        method="simclr",
        dataset=f"folder:{tmp_path}/photos",
        data=DataConfig(image_size=8, loader="reference", **data),
        optim=OptimConfig(epochs=1, batch_size=4),
    )

    def start() -> Trainer:
        return Trainer(config, tmp_path / "run", console=silent(), monitor=KnnMonitor)

    if message is None:
        assert start().train() is None
        return
    with pytest.raises(ValueError, match=message):
        start()
    assert not (tmp_path / "run").exists()


def test_a_trainer_without_its_monitor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"knn_every needs .*monitor"):
        Trainer(watched(1), tmp_path / "run", console=silent())


def test_the_report_draws_the_accuracy_only_where_it_was_measured() -> None:
    records = [{"step": 1, "feature_std": 0.5}, {"step": 2, "feature_std": 0.5}]
    assert [drawing.title for drawing in health_curves(metrics_of(records))] == ["Feature spread"]
    records.append({"step": 3, "feature_std": 0.5, "knn_top1": 0.7})
    assert [drawing.title for drawing in health_curves(metrics_of(records))] == ["Feature spread", "k-NN accuracy"]


def test_activation_checkpointing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    train(watched(1, activation_checkpointing=True), tmp_path / "run")
    train(watched(1), tmp_path / "plain")
    assert figures(tmp_path / "run") == figures(tmp_path / "plain")
