"""Tests of the configuration: every invalid value is named, and JSON round trips."""

import dataclasses
import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from mnclglf.config import (
    SECTIONS,
    DataConfig,
    EngineConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    UsageError,
    ViewConfig,
    from_dict,
    kept_name,
    kept_path,
    shown,
    to_dict,
    with_whole_paths,
)
from mnclglf.recipes import RECIPES
from mnclglf.runs.files import differences


def test_there_and_back_through_json() -> None:
    for recipe in RECIPES.values():
        config = dataclasses.replace(recipe("byol", "cifar10"), data=DataConfig(data_dir=Path("/data")))
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_an_unknown_setting_in_a_file_is_refused() -> None:
    values = to_dict(RunConfig())
    values["optim"]["epoch"] = 1
    with pytest.raises(UsageError, match=r"'epoch' .*did you mean epochs"):
        from_dict(values)


@pytest.mark.parametrize("values", [[], None, "{}", 3, {}, {"method": "byol"}, {**to_dict(RunConfig()), "view": [1]}])
def test_what_is_no_configuration_is_refused(values: object) -> None:
    with pytest.raises(UsageError, match=r"no set of settings|section data .*missing"):
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
        (DataConfig, {"loader_threads": 5000}, r"loader_threads 5000 .*1\.\.1024"),
        (DataConfig, {"image_size": 10**6}, "image_size 1000000 .*at most 8192"),
        (ModelConfig, {"width": 0}, "width 0"),
        (ModelConfig, {"width": 10**9}, r"width 1000000000 must lie in 1\.\.65536"),
        (ModelConfig, {"projector_width": 10**9}, "projector_width 1000000000"),
        (ModelConfig, {"classes": 1}, r"classes 1 must lie in 2\.\.65536"),
        (ModelConfig, {"classes": 10**9}, "classes 1000000000"),
        (EngineConfig, {"rank_timeout": 1e38}, "rank_timeout 1e.38 must be positive and at most 2000000"),
        (EngineConfig, {"log_every": 10**5000}, "log_every a value of type int must be a whole number"),
        (ObjectiveConfig, {"temperature": 0.0}, "temperature 0.0 must be positive"),
        (ObjectiveConfig, {"ema_momentum": 1.1}, "ema_momentum 1.1"),
        (ObjectiveConfig, {"queue_size": 0}, "queue_size 0"),
        (ObjectiveConfig, {"lambda_": -1.0}, "lambda -1.0"),
        (ObjectiveConfig, {"k": 5}, "k 5 must be 1, 2, 3 or 4"),
        (OptimConfig, {"epochs": 0}, "epochs 0"),
        (OptimConfig, {"batch_size": 1}, "batch_size 1"),
        (OptimConfig, {"lr": 0.0}, "lr 0.0"),
        (OptimConfig, {"lr": float("inf")}, "lr inf must be a finite number"),
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
        (EngineConfig, {"half_sums": "on", "compile": "off"}, "half_sums on .* compile is off"),
        (EngineConfig, {"half_sums_online": "both", "precision": "bf16"}, "half_sums_online both .*bf16.*fp16"),
        (EngineConfig, {"combo_kernels": "on", "compile": "off"}, "combo_kernels on .* compile is off"),
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


SETTINGS = [*SECTIONS.values(), RunConfig, KnnConfig, LinearConfig, LogisticConfig]
NUMBERS = [
    (section, name, kinds)
    for section in SETTINGS
    for name, hint in get_type_hints(section).items()
    if (kinds := {hint, *get_args(hint)}) & {int, float}
]


@pytest.mark.parametrize(
    ("section", "name", "kinds"), NUMBERS, ids=[f"{section.__name__}-{name}" for section, name, _ in NUMBERS]
)
def test_every_float_is_finite_and_every_count_whole_and_bounded(section: type, name: str, kinds: set[type]) -> None:
    float_values = [math.inf, -math.inf, math.nan, 1e39, 10**400, "0.5", True]
    wrong = [2.5, 3.0, math.inf, 2**40, 10**400, "2", True] if int in kinds else float_values
    for value in wrong:
        given = (0.5, value) if isinstance(getattr(section(), name), tuple) else value
        with pytest.raises(ValueError, match=f"{name.rstrip('_')} .*(whole|finite) number"):
            section(**{name: given})


def test_every_default_of_a_recipe_is_a_number_that_is_taken() -> None:
    assert len(NUMBERS) > 40
    assert OptimConfig(lr=1, warmup_epochs=0) == OptimConfig(lr=1.0, warmup_epochs=0.0)  # JSON may hold 1 for 1.0


@pytest.mark.parametrize("text", ["inf", "nan", "1e999"])
def test_a_file_with_a_setting_that_is_not_finite_names_it(text: str) -> None:
    values = to_dict(RunConfig())
    values["optim"]["lr"] = float(text)
    with pytest.raises(ValueError, match=r"lr (inf|nan) .*finite"):
        from_dict(values)


@pytest.mark.parametrize(
    ("section", "setting", "named"),
    [
        (DataConfig, {"download": "no"}, "download 'no' must be true or false"),
        (DataConfig, {"download": 1}, "download 1 must be true or false"),
        (DataConfig, {"data_dir": 2024}, "data_dir 2024 must be a path; .*quotes"),
        (DataConfig, {"loader": None}, "loader None is none of auto, dali"),
        (EngineConfig, {"compile": False}, "compile False is none of auto, on, off"),
        (OptimConfig, {"optimizer": 3}, "optimizer 3 must be text; .*quotes"),
        (RunConfig, {"method": ["byol"]}, r"method \['byol'\] is none of byol"),
        (ViewConfig, {"crop_scale": 0.5}, "crop_scale 0.5 must be 2 values"),
        (ViewConfig, {"crop_scale": (0.5,)}, "crop_scale .*must be 2 values"),
        (ViewConfig, {"crop_scale": (0.2, 0.5, 1.0)}, "crop_scale .*must be 2 values"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(section: type, setting: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        section(**setting)


@pytest.mark.parametrize(("saved", "read"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_settings_of_an_earlier_version_are_read_and_hold_at_resume(saved: object, read: str) -> None:
    """Checks configs of before --combo-kernels took a word and --choices was there."""
    values = to_dict(RunConfig())
    values["engine"]["combo_kernels"] = saved
    del values["engine"]["choices"]
    config = from_dict(values)
    assert (config.engine.combo_kernels, config.engine.choices) == (read, "auto")
    assert differences(config, RunConfig()) == []


SIGNED = "https://user:word@host/a/train-{0..3}.tar?X-Amz-Signature=abc/d"


def test_what_is_secret_in_an_address_is_not_written() -> None:
    config = RunConfig(dataset=f"shards:{SIGNED}")
    written = to_dict(config)
    assert written["dataset"] == "shards:https://host/a/train-{0..3}.tar"
    assert differences(from_dict(written), config) == []  # so that the run resumes with another signature
    assert with_whole_paths(config).dataset == config.dataset  # and reads with this one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SIGNED, "https://host/a/train-{0..3}.tar"),
        (f"--dataset=shards:{SIGNED}", "--dataset=shards:https://host/a/train-{0..3}.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("https://host?token=x", "https://host"),
        ("folder:/a?b", "folder:/a?b"),
    ],
)
def test_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_the_home_is_not_named_unless_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    assert kept_path("photos") == "~/work/photos"
    assert kept_path("../photos") == "~/photos"
    assert kept_path("~/photos") == "~/photos"
    assert kept_path(home / "photos") == str(home / "photos")
    assert kept_name("shards:a/train-*.tar") == "shards:~/work/a/train-*.tar"
    assert kept_name("cifar10") == "cifar10"
    config = with_whole_paths(RunConfig(dataset="folder:photos", data=DataConfig(data_dir=Path("."))))
    assert (config.dataset, config.data.data_dir) == ("folder:~/work/photos", Path("~/work"))
    assert with_whole_paths(config) == config
    monkeypatch.chdir(tmp_path)
    assert kept_path("photos") == str(tmp_path / "photos")
