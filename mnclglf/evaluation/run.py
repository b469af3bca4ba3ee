"""Evaluation of runs, for the command line, for Python and for the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mnclglf.config import EvaluationConfig, KnnConfig, LinearConfig, LogisticConfig, RunConfig, require
from mnclglf.data.images import ImageSet, Statistics
from mnclglf.data.loader import Loader
from mnclglf.data.splits import with_labels
from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.features import extract_features, raw_pixels
from mnclglf.evaluation.linear import OPTIMIZER, total_steps, train_linear
from mnclglf.evaluation.logistic import FEW_LABELS_C
from mnclglf.evaluation.protocols import FEW_LABELS, evaluate_features
from mnclglf.models.encoder import ResNet18
from mnclglf.recipes import view_of
from mnclglf.runs.checkpoint import list_checkpoints, list_milestones, load_state
from mnclglf.runs.console import LastingConsole, say
from mnclglf.runs.files import check_writable, differences, read_config
from mnclglf.runs.metrics import read_records
from mnclglf.runs.results import Protocol, Result, load_results, save_results
from mnclglf.training.start import (
    Machine,
    RunData,
    build_method,
    changed_images,
    choose_backends,
    elsewhere,
    load_run_data,
    load_trained,
    longest_side,
    make_views,
    saved_statistics,
    start_machine,
)

LINEAR_VIEW = "linear_train"
# The paper's protocol takes 17,550 steps on CIFAR. On features of 4,000 digits logistic regression has 96.7, and the
# protocol 87.3 after 1,350 steps and 95.1 after 5,000.
FEW_STEPS = 5000
Evaluation = KnnConfig | LinearConfig | LogisticConfig


def evaluate_run(
    run: Path,
    evaluation: Evaluation,
    console: Console | None = None,
    *,
    config: RunConfig | None = None,
    representations: Sequence[str] | None = None,
    file: Path | None = None,
) -> list[Result]:
    """Evaluates a run's encoder and merges the results into RUN/evaluation.json.

    The results of a checkpoint are written together, so an interruption does not change the file.

    Args:
        run: run directory.
        evaluation: the protocol, its checkpoints and its images. `KnnConfig()` is weighted k-NN, `LinearConfig()` the
            paper's linear evaluation, `LogisticConfig()` logistic regression.
        console: console for progress.
        config: the run's settings with the current folder of its data set; None reads RUN/config.json.
        representations: some of "pretrained", "untrained" and "raw pixels"; None takes the protocol's default.
        file: file of the results; None is RUN/evaluation.json.

    Returns:
        The new results, checkpoint by checkpoint.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image set or checkpoint is missing or unusable; the
            message names the remedy.
    """
    config, file = config or read_config(run), file or run / "evaluation.json"
    load_results(file)  # raises for a damaged file before any work is done
    check_writable(file.parent, "make it writable, or copy the run to where you can write")
    context = prepare(run, config, evaluation, console or LastingConsole())
    chosen = checkpoints(run, config, evaluation, context.steps_per_epoch)
    names = representations or default_representations(evaluation)
    if isinstance(evaluation, LinearConfig):
        measure = partial(by_lars, context, evaluation, linear_loader(context, evaluation), names)
        warn_of_few_steps(context, evaluation)
    else:
        measure = partial(by_stored_features, context, evaluation, feature_protocols(context, evaluation), names)
    found: list[Result] = []
    for checkpoint in chosen:
        _, method, step = load_trained(run, checkpoint)
        epoch = None if checkpoint is None else step / context.steps_per_epoch
        results = [
            replace(result, label_share=evaluation.label_share, epoch=epoch) for result in measure(method.encoder, step)
        ]
        try:
            save_results(file, results)
        except OSError:  # a disk that is full by now: what took minutes to measure is at least printed
            for r in results:
                context.say(f"{r.protocol}, {r.representation}, {r.split}: top-1 {r.top1:.2%}, top-5 {r.top5:.2%}")
            raise
        found += results
    return found


def default_representations(evaluation: Evaluation) -> tuple[str, ...]:
    """Returns the representations to evaluate if none are named; for milestones only the pretrained encoder."""
    if evaluation.milestones:
        return ("pretrained",)
    if isinstance(evaluation, LinearConfig):  # takes minutes each, so the untrained encoder only on request
        return ("pretrained", "untrained") if evaluation.untrained else ("pretrained",)
    return ("pretrained", "untrained", "raw pixels") if evaluation.raw_pixels else ("pretrained", "untrained")


def check_comparable(runs: Sequence[Path], evaluation: EvaluationConfig) -> None:
    """Raises ValueError unless the runs are distinct, at the same step, and differ only in their seeds."""
    require(
        evaluation.checkpoint is None or len(runs) == 1,
        f"checkpoint {evaluation.checkpoint} is of one run, and {len(runs)} are named; give --milestones to compare "
        "them along training",
    )
    require(len({run.resolve() for run in runs}) == len(runs), "one run is named twice; name each once")
    first, *others = map(read_config, runs)
    for run, config in zip(runs[1:], others, strict=True):
        changed = differences(replace(first, seed=config.seed), config)
        require(
            not changed,
            f"{run} differs from {runs[0]} in more than its seed ({'; '.join(changed)}): a mean would say nothing; "
            "evaluate it by itself",
        )
    steps = [max((step for step, _ in list_checkpoints(run / "checkpoints")), default=0) for run in runs]
    require(
        evaluation.milestones or len(set(steps)) == 1,
        "the newest checkpoints are of different steps "
        f"({', '.join(f'{run} {step}' for run, step in zip(runs, steps, strict=True))}): train each run to its end, or "
        "give --milestones to compare them along training",
    )


def checkpoints(run: Path, config: RunConfig, evaluation: Evaluation, steps_per_epoch: int) -> Sequence[Path | None]:
    """Returns the checkpoints to evaluate; None is the run's newest."""
    if not evaluation.milestones:
        return [evaluation.checkpoint]
    every = config.engine.keep_every
    kept = list_milestones(run / "checkpoints", every and every * steps_per_epoch)
    require(bool(kept), f"{run} has kept no milestone; train with --keep-every N, which is {every} there, to have some")
    return kept


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """Images and settings for evaluating the checkpoints of a run. n training images, m test images."""

    config: RunConfig
    console: Console
    train: ImageSet
    """All images that the run trains on."""
    labeled: ImageSet
    """The n training images whose labels are used."""
    test: ImageSet
    """The m images to classify."""
    statistics: Statistics
    """Mean [3] and deviation [3] that the run normalizes views with."""
    side: int
    """Side of a view in pixels."""
    machine: Machine
    steps_per_epoch: int
    """Steps per epoch of the run's training."""

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the autocast dtype."""
        return self.machine.dtype

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    def say(self, line: str) -> None:
        say(self.console, line)

    def untrained(self) -> ResNet18:
        """Returns the encoder with the run's initial weights."""
        return build_method(self.config, self.dtype).encoder

    def features(self, encoder: ResNet18, images: ImageSet) -> Tensor:
        """Returns features [len(images), F] of whole images, on the CPU."""
        mean, std = self.statistics
        return extract_features(
            encoder.to(self.device),
            images,
            side=self.side,
            mean=mean,
            std=std,
            dtype=self.dtype,
            device=self.device,
        )


def prepare(run: Path, config: RunConfig, evaluation: Evaluation, console: Console) -> EvalContext:
    """Loads the images and chooses those to evaluate on.

    Raises:
        ValueError: the images have no labels, or there are no images to classify.
    """
    engine = elsewhere(config.engine, evaluation.device)
    machine = start_machine(engine)
    data = load_run_data(config, evaluation.data_dir)
    _, state = load_state(run, evaluation.checkpoint)
    check_images(run, data, state, evaluation, console)
    train, test = data.train, data.test
    if not train.labeled:
        raise ValueError(f"{train.name} has no labels to evaluate on; give each class a subfolder of its own")
    if len(train.classes) == 1:
        raise ValueError(
            f"{train.name} has one class, {train.classes[0]}, and so nothing to tell apart; give each class a subfolder"
        )
    if evaluation.split == "validation":
        require(len(data.validation) > 0, f"{run} held no images out; train with --validation-images N to have some")
        test = data.validation
    if test is None:
        raise ValueError(
            f"{train.name} has no test images; give the folder subfolders train and val, or train with "
            "--validation-images N and evaluate with --split validation"
        )
    return EvalContext(
        config=replace(config, engine=engine),
        console=console,
        train=train,
        labeled=with_labels(train, evaluation.label_share, seed=config.seed),
        test=test,
        statistics=saved_statistics(run, state) or train.statistics(),
        side=state.get("side", data.side),
        machine=machine,
        steps_per_epoch=steps_per_epoch(run, state, len(train) // config.optim.batch_size),
    )


def check_images(run: Path, data: RunData, state: Mapping[str, Any], evaluation: Evaluation, console: Console) -> None:
    """Says which of the images are not those of the run's training.

    Raises:
        ValueError: --data-dir, the new place of the same images, holds other ones; or validation images are asked for,
            which cannot be told from the training images any more.
    """
    changed = changed_images(data, state)
    if not changed:
        return
    what = f"the {' and '.join(changed)} images of {data.train.name} are not those that {run} was trained with"
    require(
        evaluation.data_dir is None,
        f"{what}; give the folder that now holds the same images as --data-dir, which is {evaluation.data_dir}",
    )
    require(
        evaluation.split != "validation" or changed == ["test"],
        f"{what}: those that were held out cannot be told from them; put the old ones back, or take --split test",
    )
    say(console, f"WARNING: {what}; evaluating on them as they are now, normalized as in training", style="bold red")


def steps_per_epoch(run: Path, state: Mapping[str, Any], current: int) -> int:
    """Returns the steps per epoch of the run's training: of a checkpoint, else of metrics.jsonl, else `current`.

    Earlier versions kept no count in the checkpoint. `current`, of the images as they are now, may differ.
    """
    if "steps_per_epoch" in state:
        return state["steps_per_epoch"]
    records, _ = read_records(run / "metrics.jsonl")
    epochs = [(record["step"], record["epoch"]) for record in records if record.get("epoch")]
    return round(epochs[-1][0] / epochs[-1][1]) if epochs else current


def feature_protocols(context: EvalContext, evaluation: KnnConfig | LogisticConfig) -> list[Protocol]:
    """Returns the protocols to run on stored features; few-label regression only if every class has enough images.

    Raises:
        ValueError: there are fewer images than neighbors that vote.
    """
    count = len(context.labeled)
    if isinstance(evaluation, KnnConfig):
        require(
            evaluation.neighbors <= count,
            f"neighbors {evaluation.neighbors} is more than the {count} training images whose labels are used; lower "
            "--neighbors",
        )
        return ["knn"]
    if evaluation.label_share < 1:
        return ["logistic"]
    counts, needed = np.bincount(context.labeled.labels, minlength=context.classes), FEW_LABELS["per_class"]
    if counts.min() >= needed:
        return ["logistic", "logistic_10_labels"]
    context.say(
        f"logistic_10_labels is left out: class {context.train.classes[counts.argmin()]} has {counts.min()} training "
        f"images, fewer than {needed}"
    )
    return ["logistic"]


def by_stored_features(
    context: EvalContext,
    evaluation: KnnConfig | LogisticConfig,
    protocols: Sequence[Protocol],
    names: Sequence[str],
    encoder: ResNet18,
    step: int,
) -> list[Result]:
    """Evaluates one checkpoint's encoder, and the other representations, by k-NN or logistic regression."""

    def features(name: str) -> tuple[Tensor, Tensor]:
        sets = context.labeled, context.test
        if name == "raw pixels":
            return raw_pixels(sets[0], side=context.side), raw_pixels(sets[1], side=context.side)
        network = encoder if name == "pretrained" else context.untrained()
        return context.features(network, sets[0]), context.features(network, sets[1])

    evaluate = partial(
        evaluate_features,
        {name: features(name) for name in names},
        torch.from_numpy(context.labeled.labels),
        torch.from_numpy(context.test.labels),
        context.classes,
        protocols,
        split=evaluation.split,
        settings={"step": step},
    )
    if isinstance(evaluation, KnnConfig):
        return evaluate(neighbors=evaluation.neighbors, temperature=evaluation.vote_temperature)
    # With few labels none can be held out to choose C on.
    return evaluate(c=FEW_LABELS_C if evaluation.label_share < 1 else None)


def by_lars(
    context: EvalContext,
    evaluation: LinearConfig,
    loader: Loader,
    names: Sequence[str],
    encoder: ResNet18,
    step: int,
) -> list[Result]:
    """Evaluates one checkpoint's encoder by the paper's protocol, and the untrained one if `names` has it."""
    encoders = {name: encoder if name == "pretrained" else context.untrained() for name in names}
    steps = total_steps(evaluation, linear_steps_per_epoch(context, evaluation))
    settings: dict[str, Any] = {
        "optimizer": "LARS",
        **({"epochs": evaluation.epochs} if evaluation.steps is None else {"steps": evaluation.steps}),
        "batch_size": batch_size(context, evaluation),
        "lr": evaluation.lr,
        **OPTIMIZER,
        "view": LINEAR_VIEW,
        "loader": loader.name,
        "precision": str(context.dtype).removeprefix("torch."),
        "seed": context.config.seed,
        "train_images": len(context.labeled),
        "test_images": len(context.test),
        "classes": context.classes,
        "step": step,
    }
    few_labels = len(context.labeled) < len(context.train)
    if few_labels and evaluation.steps is None and evaluation.batch_size != LinearConfig.batch_size:
        settings["asked_batch_size"] = evaluation.batch_size  # the number of steps follows from it
    if steps < FEW_STEPS:
        settings["note"] = f"{steps:,} steps, fewer than {FEW_STEPS:,}"
    results: list[Result] = []
    for name, network in encoders.items():
        title = f"{name}, step {step}" if network is encoder else name
        accuracy = lars_accuracy(context, evaluation, loader, network, title)
        results.append(
            Result(
                protocol="linear",
                representation=name,
                split=evaluation.split,
                top1=accuracy.top1,
                top5=accuracy.top5,
                settings=settings,
            )
        )
    return results


def lars_accuracy(
    context: EvalContext, evaluation: LinearConfig, loader: Loader, encoder: ResNet18, title: str
) -> Accuracy:
    """Trains a classifier and returns its test accuracy; `title` begins each line of progress."""
    test = context.features(encoder, context.test).to(context.device)
    classifier = train_linear(
        encoder,
        loader,
        torch.from_numpy(context.labeled.labels).to(context.device),
        evaluation,
        classes=context.classes,
        # As many steps with few labels as with all: 90 epochs of 1% of the images would hardly move the weights.
        steps_per_epoch=linear_steps_per_epoch(context, evaluation),
        dtype=context.dtype,
        seed=context.config.seed,
        say=lambda line: context.say(f"linear, {title}: {line}"),
    )
    with torch.inference_mode():
        scores = classifier(test)
    return accuracy_of_scores(scores.cpu(), torch.from_numpy(context.test.labels))


def linear_loader(context: EvalContext, evaluation: LinearConfig) -> Loader:
    """Returns a loader of the labeled images, with one augmented view per image, normalized as in the run.

    Raises:
        ValueError: a batch size was chosen, not the default, and there are fewer training images.
    """
    config = context.config
    require(
        evaluation.batch_size <= len(context.train) or evaluation.batch_size == LinearConfig.batch_size,
        f"batch_size {evaluation.batch_size} is more than the {len(context.train)} training images; lower --batch-size",
    )
    try:
        return _linear_loader(context, evaluation, config)
    except ImportError as error:  # the run was trained with DALI, which this machine lacks
        context.say(f"the run's loader cannot be made here; falling back to --loader auto: {error}")
        return _linear_loader(context, evaluation, replace(config, data=replace(config.data, loader="auto")))


def _linear_loader(context: EvalContext, evaluation: LinearConfig, config: RunConfig) -> Loader:
    labeled = context.labeled
    backends = choose_backends(
        config, longest_side(labeled), context.side, context.machine, context.console, operators=["augment"]
    )
    return make_views(
        config,
        labeled,
        view_of(LINEAR_VIEW, config.dataset),
        context.machine,
        views=1,
        side=context.side,
        batch_size=batch_size(context, evaluation),
        augment_backend=backends.augment,
        statistics=context.statistics,
    )


def warn_of_few_steps(context: EvalContext, evaluation: LinearConfig) -> None:
    """Warns if the classifier is trained for so few steps that its accuracy says little of the features."""
    steps = total_steps(evaluation, linear_steps_per_epoch(context, evaluation))
    if steps < FEW_STEPS:
        context.say(
            f"WARNING: linear trains for {steps:,} steps, and the paper's learning rate is meant for 17,550: below "
            f"{FEW_STEPS:,} the accuracy comes out too low; give --steps {FEW_STEPS}, or take mnclglf logistic"
        )


def linear_steps_per_epoch(context: EvalContext, evaluation: LinearConfig) -> int:
    """Returns the steps that count as an epoch of the paper's protocol, with few labels as with all."""
    return len(context.train) // min(evaluation.batch_size, len(context.train))


def batch_size(context: EvalContext, evaluation: LinearConfig) -> int:
    """Returns the images per step of the paper's protocol, at most the number of labeled images."""
    return min(evaluation.batch_size, len(context.labeled))
