"""The images that a run is evaluated on: its own, or those of another data set."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mnclglf.config import OBJECT, EvaluationConfig, ImagesConfig, RunConfig, kept_name, require, shown, whole_name
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet, Statistics
from mnclglf.data.splits import SPLIT_SEED, TEST_SHARE, draw_test
from mnclglf.runs.checkpoint import load_state
from mnclglf.runs.console import say
from mnclglf.runs.metrics import last_record
from mnclglf.training.start import RunData, changed_images, load_run_data, saved_statistics

SAVED = {"mean", "side", "steps_per_epoch"}  # of a checkpoint; without them the run's own images are needed


@dataclass(frozen=True, kw_only=True)
class EvalImages:
    """Images to evaluate on, and how they are brought to the encoder's input."""

    dataset: str | None
    """Name of another data set than the run's own; None for that."""
    train: ImageSet
    validation: ImageSet | None
    """Images that the run held out; None of another data set."""
    test: ImageSet | None
    """Test images of the data set; None if it has none."""
    drawn: bool = False
    """True if the test images were drawn from the training images, see `draw_test`."""
    statistics: Statistics
    """Mean [3] and deviation [3] that the run normalizes views with."""
    side: int
    """Side of the run's views in pixels."""
    steps_per_epoch: int
    """Steps per epoch of the run's training."""

    @property
    def split_settings(self) -> dict[str, Any]:
        """Returns the settings of a drawn split, to save with a result."""
        return {"test_share": TEST_SHARE, "split_seed": SPLIT_SEED} if self.drawn else {}


def load_images(run: Path, config: RunConfig, evaluation: ImagesConfig, console: Console) -> EvalImages:
    """Loads the images that an evaluation names, and says how those of another data set are read.

    Raises:
        ValueError: images are missing or unreadable, or the run's own have changed; the message names the remedy.
    """
    _, state = load_state(run, evaluation.checkpoint)
    other = other_dataset(config, evaluation.dataset)
    own: RunData | None = None
    if other is None or not state.keys() >= SAVED:
        skip = config.data.skip_corrupt or evaluation.skip_corrupt
        if other is None and evaluation.dataset is not None:  # a signed address, whose signature is not kept
            config = replace(config, dataset=kept_name(evaluation.dataset))
        own = load_run_data(
            replace(config, data=replace(config.data, skip_corrupt=skip)),
            evaluation.data_dir if other is None else None,
        )
    if own is not None and other is None:
        check_images(run, own, state, evaluation, console)
    statistics, side, steps = saved_statistics(run, state), state.get("side"), state.get("steps_per_epoch")
    if own is not None:  # None for a checkpoint that has all of these
        statistics, side = statistics or own.train.statistics(), side or own.side
        steps = steps_per_epoch(run, state, len(own.train) // config.optim.batch_size)
    assert statistics is not None
    assert side is not None
    assert steps is not None
    brought: dict[str, Any] = {"statistics": statistics, "side": side, "steps_per_epoch": steps}
    if own is not None and other is None:
        return EvalImages(dataset=None, train=own.train, validation=own.validation, test=own.test, **brought)
    assert other is not None
    train, test = load_dataset(other, evaluation.data_dir, skip_corrupt=evaluation.skip_corrupt)
    say(console, how_read(train if test is None else test, run, side))
    return EvalImages(dataset=shown(other), train=train, validation=None, test=test, **brought)


def other_dataset(config: RunConfig, dataset: str | None) -> str | None:
    """Returns the data set's name, of a place as it is kept; None if it is the run's own."""
    if dataset is None:
        return None
    same = shown(whole_name(dataset)) == shown(whole_name(config.dataset))
    return None if same else kept_name(dataset)


def how_read(images: ImageSet, run: Path, side: int) -> str:
    """Returns one line that says how images of another data set become the encoder's input."""
    heights, widths = images.sizes(np.arange(len(images)))
    least, most = (f"{f(heights)} x {f(widths)}" for f in (np.min, np.max))
    sizes = least if least == most else f"{least} to {most}"
    return (
        f"{images.name}: images of {sizes} pixels are resized to the {side} x {side} of {run} (the shorter side, "
        "bicubic; the longer one is cropped at its center) and normalized with the mean and deviation of its training "
        "images; gray ones have three equal channels"
    )


def with_test_images(images: EvalImages, evaluation: EvaluationConfig, run: Path, console: Console) -> EvalImages:
    """Returns images with labels, of two or more classes, that have test images to classify: those of `split`.

    Raises:
        ValueError: the images have no labels or one class, or there are none to classify.
    """
    train, test, drawn = images.train, images.test, False
    if not train.labeled:
        raise ValueError(
            f"{train.name} has no labels to evaluate on; give each class a subfolder of its own, or judge it without "
            f"labels: {quality_command(run, images.dataset)}"
        )
    if len(train.classes) == 1:
        raise ValueError(
            f"{train.name} has one class, {train.classes[0]}, and so nothing to tell apart; give each class a subfolder"
        )
    if evaluation.split == "validation":
        test = images.validation
        require(
            test is not None and len(test) > 0,
            f"{run} held no images out; train with --validation-images N to have some",
        )
    if test is None and images.dataset is not None:
        (train, test), drawn = draw_test(train), True
        say(
            console,
            f"{train.name} has no test images of its own: {len(test):,} of its {len(train) + len(test):,} images were "
            f"drawn for them, {TEST_SHARE:.0%} of each class, by seed {SPLIT_SEED}",
        )
    if test is None:
        held_out = 0 if images.validation is None else len(images.validation)
        validation = (
            f"evaluate with --split validation on the {held_out:,} images that were held out of training"
            if held_out
            else "train with --validation-images N and evaluate with --split validation"
        )
        raise ValueError(
            f"{train.name} has no test images; give the folder subfolders train and val, or {validation}; or "
            "judge the features without labels: "
            f"{quality_command(run, images.dataset)}"
        )
    return replace(images, train=train, test=test, drawn=drawn)


def quality_command(run: Path, dataset: str | None) -> str:
    """Returns the command that judges the run on a data set without labels."""
    return shlex.join(["mnclglf", "quality", str(run), *([] if dataset is None else ["--dataset", dataset])])


def check_images(
    run: Path, data: RunData, state: Mapping[str, Any], evaluation: ImagesConfig, console: Console
) -> None:
    """Says which of the images are not those of the run's training.

    Raises:
        ValueError: --data-dir, the new place of the same images, holds other ones; or validation images are asked for,
            which cannot be told from the training images any more.
    """
    changed = changed_images(data, state)
    if not changed:
        return
    what = f"the {' and '.join(changed)} images of {data.train.name} are not those that {run} was trained with"
    # Two Datasets of one class have one name, so others were probably given by mistake.
    require(
        not data.train.name.startswith(OBJECT), f"{what}; give those again, as dataset and test_dataset of evaluate"
    )
    require(
        evaluation.data_dir is None,
        f"{what}; give the folder that now holds the same images as --data-dir, which is {evaluation.data_dir}",
    )
    validation = isinstance(evaluation, EvaluationConfig) and evaluation.split == "validation"
    require(
        not validation or changed == ["test"],
        f"{what}: those that were held out cannot be told from them; put the old ones back, or take --split test",
    )
    say(console, f"WARNING: {what}; evaluating on them as they are now, normalized as in training", style="bold red")


def steps_per_epoch(run: Path, state: Mapping[str, Any], current: int) -> int:
    """Returns the steps per epoch of the run's training: of a checkpoint, else of metrics.jsonl, else `current`.

    Earlier versions kept no count in the checkpoint. `current`, of the images as they are now, may differ.
    """
    if "steps_per_epoch" in state:
        return state["steps_per_epoch"]
    last = last_record(run / "metrics.jsonl", "epoch")
    return round(last["step"] / last["epoch"]) if last is not None and last["epoch"] > 0 else current
