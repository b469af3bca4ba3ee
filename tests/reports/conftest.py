"""Run directory with made-up figures, for the tests of the report and for looking at it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnclglf.config import DataConfig, OptimConfig, RecipeName, RunConfig, to_dict

STEPS_PER_EPOCH, EPOCHS, BATCH = 39, 12, 128


def records(steps: int, every: int = 2) -> list[dict]:
    """Returns a made-up metrics.jsonl up to `steps` of a run that learns."""
    noise = np.random.default_rng(0)
    made = []
    for step in range(every, steps + 1, every):
        t = step / (EPOCHS * STEPS_PER_EPOCH)
        loss_s, loss_m = (4.85 - a * (1 - math.exp(-4 * t)) + noise.normal(0, 0.02) for a in (1.1, 1.4))
        made.append(
            {
                "step": step,
                "epoch": step / STEPS_PER_EPOCH,
                "loss": loss_s + 6 * loss_m,
                "loss_s": loss_s,
                "loss_m": loss_m,
                "lr": 0.05 * (1 + math.cos(math.pi * t)) / 2,
                "ema_momentum": 0.95,
                "gradient_norm": math.exp(1.5 - 3 * t + noise.normal(0, 0.2)),
                "feature_std": 0.9 * (1 - math.exp(-8 * t)) + noise.normal(0, 0.01),
                "effective_rank": 12 + 40 * t + noise.normal(0, 1),
                "neighbor_agreement": None if step < 4 else 0.1 + 0.6 * t + noise.normal(0, 0.03),
                "queue_fill": min(1.0, step * BATCH / 1024),
                "images_per_second": 900 + noise.normal(0, 30),
                "data_wait_seconds": 0.004,
                "elapsed_seconds": step * 0.15,
            }
        )
    return made


def results() -> list[dict]:
    """Returns a made-up evaluation.json: three protocols of three representations."""
    made = []
    for protocol, base in (("knn", 0.80), ("logistic", 0.86), ("logistic_10_labels", 0.62)):
        own = {"k": 20, "temperature": 0.07} if protocol == "knn" else {"solver": "logistic regression", "C": 0.01}
        if protocol == "logistic_10_labels":
            own |= {"C": 0.1, "per_class": 10, "draws": 5, "seed": 0}
        for representation, lead in (("pretrained", 0.123), ("untrained", -0.08), ("raw pixels", 0.03)):
            top1 = base + lead
            made.append(
                {
                    "protocol": protocol,
                    "representation": representation,
                    "split": "test",
                    "top1": top1,
                    "top5": 1 - (1 - top1) / 8,
                    "deviation": 0.021 if protocol == "logistic_10_labels" else None,
                    "settings": {**own, "train_images": 4000, "test_images": 1000, "classes": 10, "step": 468},
                }
            )
    return made


def views(n: int = 6, side: int = 16) -> dict[str, np.ndarray]:
    """Returns a made-up views.npz: colored discs, and three views that shift and fade them."""
    rows, columns = np.mgrid[:side, :side] / (side - 1)
    images = []
    for i in range(n):
        disc = (rows - 0.3 - 0.07 * i) ** 2 + (columns - 0.5) ** 2 < 0.09
        color = np.array([math.sin(i) ** 2, math.cos(i) ** 2, 0.2 + 0.1 * i])
        images.append(np.where(disc[..., None], color, 0.5 * rows[..., None]))
    pixels = np.clip(np.stack(images), 0, 1)
    mean, std = np.full(3, 0.4, np.float32), np.full(3, 0.25, np.float32)
    shifted = [np.roll(pixels, shift, axis=2) * fade for shift, fade in ((0, 1.0), (3, 0.7), (-4, 0.9))]
    normalised = ((np.stack(shifted) - mean) / std).transpose(0, 1, 4, 2, 3).astype(np.float32)
    return {"images": (255 * pixels).astype(np.uint8), "views": normalised, "mean": mean, "std": std}


def write_run(folder: Path, *, steps: int = EPOCHS * STEPS_PER_EPOCH, recipe: RecipeName = "quick") -> Path:
    """Writes a whole run directory of `steps` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        dataset="mnist5k",
        recipe=recipe,
        data=DataConfig(image_size=16),
        optim=OptimConfig(epochs=EPOCHS, batch_size=BATCH, lr=0.05),
    )
    environment = {
        "command": "mnclglf train --dataset mnist5k --recipe quick",
        "python": "3.11.2",
        "packages": {"torch": "2.14.1", "numpy": "2.4.6"},
        "device": "CPU, 2 cores",
        "torch_threads": 2,
        "commit": None,
    }
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(steps)))
    (folder / "evaluation.json").write_text(json.dumps({"version": 2, "results": results()}))
    arrays: dict[str, Any] = views()
    np.savez(folder / "views.npz", **arrays)
    return folder


def write_pictures(run: Path, classes: int = 3) -> None:
    """Writes a gallery.npz and a queue.npz of random pictures."""
    random = np.random.default_rng(0)

    def pictures(*shape: int) -> np.ndarray:
        return random.integers(0, 256, (*shape, 8, 8, 3), dtype=np.uint8)

    names = np.array(["cat", "<b>dog</b>", "</script>", *(f"class {i}" for i in range(3, classes))])
    labels = np.arange(20) % classes
    np.savez(
        run / "gallery.npz", images=pictures(20), labels=labels, map=random.random((20, 2)).astype(np.float32),
        classes=names, queries=pictures(2), query_labels=np.array([0, 1]),
        representations=np.array(["pretrained", "raw pixels"]), neighbors=pictures(2, 2, 3),
        neighbor_labels=np.array([[[0, 0, 1], [1, 1, 1]], [[2, 0, 0], [0, 0, 0]]]),
        confusion=np.eye(classes, dtype=np.int64) * 5 + np.eye(classes, k=1, dtype=np.int64),
    )  # fmt: skip
    np.savez(
        run / "queue.npz", steps=np.array([10, 400]), queries=pictures(2, 6), neighbors=pictures(2, 6),
        query_labels=np.zeros((2, 6), int), neighbor_labels=np.eye(2, 6, dtype=int),
    )  # fmt: skip


@pytest.fixture(scope="session")
def add_pictures() -> Callable[..., None]:
    return write_pictures


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns `write_run` for a temporary folder; it takes the same keywords."""
    return lambda **keywords: write_run(tmp_path / "run", **keywords)


@pytest.fixture(scope="session")
def metrics() -> Callable[..., list[dict]]:
    return records


@pytest.fixture(scope="session")
def evaluation() -> Callable[[], list[dict]]:
    return results


@pytest.fixture(scope="session")
def made_views() -> Callable[..., dict[str, np.ndarray]]:
    return views


@pytest.fixture
def make_named_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns `write_run` for a folder of a temporary one, by its name."""
    return lambda name, **keywords: write_run(tmp_path / name, **keywords)
