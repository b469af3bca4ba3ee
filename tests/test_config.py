"""Tests of the configuration: every invalid value is named, and JSON round trips."""

import dataclasses
import json
from pathlib import Path

import pytest

from mnclglf.config import (
    DataConfig,
    EngineConfig,
    KnnConfig,
    LinearConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    ViewConfig,
    from_dict,
    to_dict,
)
from mnclglf.recipes import RECIPES


def test_there_and_back_through_json() -> None:
    for recipe in RECIPES.values():
        config = dataclasses.replace(recipe("byol", "cifar10"), data=DataConfig(data_dir=Path("/data")))
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_an_unknown_setting_in_a_file_is_refused() -> None:
    values = to_dict(RunConfig())
    values["optim"]["learning_rate"] = 1
    with pytest.raises(TypeError, match="learning_rate"):
        from_dict(values)


@pytest.mark.parametrize(
    ("section", "setting", "named"),
    [
        (ViewConfig, {"crop_scale": (0.0, 1.0)}, r"crop_scale \(0.0, 1.0\)"),
        (ViewConfig, {"crop_scale": (0.9, 0.5)}, "crop_scale"),
        (ViewConfig, {"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        (ViewConfig, {"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        (ViewConfig, {"flip_probability": 1.5}, "flip_probability 1.5 is not a probability"),
        (ViewConfig, {"hue": 0.6}, "hue 0.6"),
        (ViewConfig, {"brightness": -0.1}, "brightness -0.1"),
        (ViewConfig, {"rotation_degrees": 200.0}, "rotation_degrees 200.0"),
        (DataConfig, {"image_size": 31}, "image_size 31 must be even"),
        (DataConfig, {"image_size": 4}, "image_size 4"),
        (DataConfig, {"train_images": 0}, "train_images 0"),
        (DataConfig, {"validation_images": -1}, "validation_images -1"),
        (DataConfig, {"loader_threads": 0}, "loader_threads 0"),
        (ModelConfig, {"width": 0}, "width 0"),
        (ModelConfig, {"classes": 1}, "classes 1 must be at least 2"),
        (ObjectiveConfig, {"temperature": 0.0}, "temperature 0.0 must be positive"),
        (ObjectiveConfig, {"ema_momentum": 1.1}, "ema_momentum 1.1"),
        (ObjectiveConfig, {"queue_size": 0}, "queue_size 0"),
        (ObjectiveConfig, {"lambda_": -1.0}, "lambda -1.0"),
        (ObjectiveConfig, {"k": 5}, "k 5 must be 1, 2, 3 or 4"),
        (OptimConfig, {"epochs": 0}, "epochs 0"),
        (OptimConfig, {"batch_size": 1}, "batch_size 1"),
        (OptimConfig, {"lr": 0.0}, "lr 0.0"),
        (OptimConfig, {"lr": float("inf")}, "lr inf must be positive and finite"),
        (OptimConfig, {"weight_decay": float("nan")}, "weight_decay nan"),
        (ObjectiveConfig, {"lambda_": float("inf")}, "lambda inf"),
        (OptimConfig, {"epochs": 3, "warmup_epochs": 3.0}, "warmup_epochs 3.0 must be less than epochs 3"),
        (OptimConfig, {"sgd_momentum": 1.0}, "sgd_momentum 1.0"),
        (OptimConfig, {"weight_decay": -1e-4}, "weight_decay -0.0001"),
        (OptimConfig, {"clip_norm": 0.0}, "clip_norm 0.0 must be positive and finite; leave it out"),
        (EngineConfig, {"log_every": 0}, "log_every 0"),
        (EngineConfig, {"save_every": 0.0}, "save_every 0.0"),
        (EngineConfig, {"keep_last": 0}, "keep_last 0"),
        (EngineConfig, {"keep_every": 0}, "keep_every 0"),
        (EngineConfig, {"graphs": "on", "compile": "off"}, "graphs on replays what compile made, and compile is off"),
        (EngineConfig, {"graphs": "on", "lookup": "faiss"}, "lookup faiss cannot be in a CUDA graph"),
        (EngineConfig, {"activation_checkpointing": True, "compile": "on"}, "exclude each other; leave --compile on"),
        (RunConfig, {"seed": -1}, "seed -1"),
        (RunConfig, {"engine": EngineConfig(keep_every=201)}, "keep_every 201 is more than the run's 200 epochs"),
        (KnnConfig, {"neighbors": 0}, "neighbors 0 must be at least 1"),
        (KnnConfig, {"vote_temperature": 0.0}, "vote_temperature 0.0 must be positive and finite"),
        (KnnConfig, {"vote_temperature": float("inf")}, "vote_temperature inf"),
        (KnnConfig, {"vote_temperature": float("nan")}, "vote_temperature nan"),
        (KnnConfig, {"label_share": 0.0}, "label_share 0.0"),
        (LinearConfig, {"steps": 0}, "steps 0 must be at least 1"),
        (LinearConfig, {"steps": 500, "epochs": 9}, r"epochs 9 .* steps 500 .*leave out"),
    ],
)
def test_a_bad_value_is_named(section: type, setting: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        section(**setting)
