"""The Python API: train, evaluate, load_encoder. Import them from mnclglf."""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from mnclglf.config import (
    SECTIONS,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    RunConfig,
    default_folder,
    require,
    with_whole_paths,
)
from mnclglf.evaluation.run import evaluate_run
from mnclglf.models.batch_norm import batch_norms
from mnclglf.models.encoder import ResNet18
from mnclglf.recipes import RECIPES
from mnclglf.reports.page import write_report
from mnclglf.reports.run_files import read_views
from mnclglf.runs.checkpoint import load_state
from mnclglf.runs.files import read_object
from mnclglf.runs.results import Result
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method
from mnclglf.training.unread import unread_settings

CHOSEN_FIRST = ("method", "dataset", "recipe")  # the recipe's settings depend on these
EVALUATIONS = {"knn": KnnConfig, "linear": LinearConfig, "logistic": LogisticConfig}


@dataclass(frozen=True)
class Run:
    """A run directory, as `train` returns it; every function that takes a run takes a path too."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


RunPath = str | os.PathLike[str]


def train(config: RunConfig | None = None, *, out: RunPath | None = None, resume: str = "auto", **settings: Any) -> Run:
    """Pre-trains an encoder and writes the run directory with its checkpoints and report.

    Args:
        config: configuration of the run; None to give `settings` instead.
        out: run directory; None is runs/METHOD-DATASET-RECIPE-seedSEED.
        resume: "auto" resumes from the newest checkpoint in `out`; "never" raises if `out` holds a run; a path names
            the checkpoint to resume from.
        settings: settings by their names on the command line, e.g. method="simsiam", dataset="digits", recipe="quick",
            epochs=2, batch_size=64, lambda_=4; all others have the recipe's values.

    Raises:
        ValueError: a setting does not exist or is invalid; the message names the remedy.
        TrainingError: a loss, gradient or embedding was not finite.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP arrived; the run is saved, and the same call resumes it. In another
            thread than the main one, no signal is caught.
    """
    require(
        config is None or not settings,
        f"config and the settings {', '.join(settings)} are both given; give the settings alone, or change the config "
        "with dataclasses.replace",
    )
    config = with_whole_paths(config or run_config(settings))
    given = {"lambda_" if name == "lambda" else name for name in settings}
    for name, why in unread_settings(config, given).items():
        warnings.warn(f"{name} has no effect with {why}; leave it out", stacklevel=2)
    folder = default_folder(config) if out is None else Path(out)
    stopped = Trainer(config, folder, resume=resume).train()
    write_report(folder)
    if stopped:
        raise KeyboardInterrupt(f"stopped by signal {stopped} and saved in {folder}; the same call resumes it")
    return Run(folder)


def evaluate(run: RunPath, protocol: Literal["knn", "linear", "logistic"] = "knn", **settings: Any) -> list[Result]:
    """Evaluates a run's encoder and merges the results into RUN/evaluation.json.

    Args:
        run: run directory, or the result of `train`.
        protocol: "knn" is weighted k-NN, "linear" the paper's linear evaluation, "logistic" logistic regression.
        settings: settings of KnnConfig, LinearConfig or LogisticConfig, e.g. neighbors=5 or label_share=0.1.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image set or checkpoint is missing or unusable; the
            message names the remedy.
    """
    require(protocol in EVALUATIONS, f"protocol {protocol!r} is none of {', '.join(EVALUATIONS)}")
    config = EVALUATIONS[protocol]
    check_names(settings, [field.name for field in dataclasses.fields(config)], f"protocol {protocol}")
    results = evaluate_run(Path(run), config(**checked(config, settings)))
    write_report(Path(run))
    return results


def load_encoder(run: RunPath, checkpoint: RunPath | None = None) -> ResNet18:
    """Loads the pretrained encoder of a run, on the CPU in evaluation mode.

    It maps images [n, 3, side, side], normalized with `mean` and `std`, to [n, features]. Its parameters have
    torchvision's names: `torchvision.models.resnet18().load_state_dict(encoder.state_dict(), strict=False)` loads those
    of stem imagenet and width 64.

    Args:
        run: run directory, or the result of `train`.
        checkpoint: file in RUN/checkpoints; None is the newest.

    Returns:
        A plain nn.Module, with `features` (width F of the output), `mean` and `std` (fp32 [3, 1, 1], for images in
        [0, 1]; buffers that are not in state_dict) and `side` (side in pixels of the views that it was trained on).

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the run or the checkpoint is missing or damaged.
    """
    folder = Path(run)
    config, state = load_state(folder, None if checkpoint is None else Path(checkpoint))
    with torch.random.fork_rng(devices=[]):  # does not change the caller's random numbers
        method = build_method(config, torch.float32)
    method.load_state_dict(state["method"])
    encoder = method.encoder.eval()
    for layer in batch_norms(encoder):  # training counts no batches here, and torchvision's state has the count
        layer.num_batches_tracked = torch.tensor(0)
    mean, std, side = normalization(folder, state)
    encoder.register_buffer("mean", mean[:, None, None], persistent=False)
    encoder.register_buffer("std", std[:, None, None], persistent=False)
    setattr(encoder, "side", side)  # noqa: B010  # the type of a module's attributes is Tensor or Module
    return encoder


def normalization(run: Path, state: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Returns mean [3], standard deviation [3] and side of the images that a checkpoint's run trained on.

    Raises:
        ValueError: neither the checkpoint nor the run directory has them.
    """
    if "mean" in state:
        return state["mean"], state["std"], state["side"]
    views, environment = read_views(run / "views.npz"), read_object(run / "environment.json") or {}
    if views is None:
        raise ValueError(
            f"the checkpoint in {run} has no normalization, and {run / 'views.npz'} is missing; put it back, or train "
            "again"
        )
    warnings.warn(f"the checkpoint in {run} has no normalization: taking that of views.npz", stacklevel=3)
    side = environment.get("image_side", views.views.shape[-1])
    return torch.from_numpy(views.mean), torch.from_numpy(views.std), side


def run_config(settings: Mapping[str, Any]) -> RunConfig:
    """Returns the recipe's run with these settings, by their names on the command line.

    Raises:
        ValueError: there is no setting of a name, or a value cannot work.
    """
    settings = {"lambda_" if name == "lambda" else name: value for name, value in settings.items()}
    sections = {field.name: name for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
    own = [field.name for field in dataclasses.fields(RunConfig) if field.name not in SECTIONS]
    check_names(settings, [*own, *sections], "a run")
    top = checked(RunConfig, {name: value for name, value in settings.items() if name in own})
    method, dataset, recipe = (top.get(name, getattr(RunConfig, name)) for name in CHOSEN_FIRST)
    config = RECIPES[recipe](method, dataset)
    changed: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        given = {key: value for key, value in settings.items() if sections.get(key) == name}
        if given:
            changed[name] = dataclasses.replace(getattr(config, name), **checked(section, given))
    return dataclasses.replace(config, **{**top, **changed})


def check_names(settings: Mapping[str, Any], known: list[str], owner: str) -> None:
    """Raises ValueError, with near matches, unless all settings are known."""
    for name in settings:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        require(name in known, f"{name!r} is no setting of {owner}; {hint}")


def checked(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with paths as Path, lists as tuples and numpy's numbers as Python's.

    Raises:
        ValueError: a value is none of its setting's choices.
    """
    hints, made = get_type_hints(config), dict(settings)
    for name, value in settings.items():
        hint = hints[name]
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            require(value in choices, f"{name} {value!r} is none of {', '.join(map(str, choices))}")
        if Path in get_args(hint) and isinstance(value, str | os.PathLike):
            made[name] = Path(cast(RunPath, value))
        if isinstance(value, list):
            made[name] = tuple(cast("list[Any]", value))
        if isinstance(value, np.generic):
            made[name] = value.item()
    return made
