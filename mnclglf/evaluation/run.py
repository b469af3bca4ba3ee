"""Evaluates runs: the encoder of each, by k-NN or a linear classifier, into its evaluation.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mnclglf.config import EvaluationConfig, KnnConfig, LinearConfig, RunConfig, require
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet, view_side
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import make_loader
from mnclglf.data.splits import split_train, with_labels
from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.features import extract_features, raw_pixels
from mnclglf.evaluation.linear import OPTIMIZER, train_linear
from mnclglf.evaluation.logistic import FEW_LABELS_C
from mnclglf.evaluation.protocols import FEW_LABELS, evaluate
from mnclglf.evaluation.results import Protocol, Result, load_results, save_results
from mnclglf.models.encoder import ResNet18
from mnclglf.recipes import view_of
from mnclglf.runs.checkpoint import list_checkpoints, list_milestones
from mnclglf.training.backends import choose_backends
from mnclglf.training.device import autocast_dtype, choose_device
from mnclglf.training.run_directory import build_method, differences, load_trained, read_config
from mnclglf.training.step import keep_freed_memory, use_fast_math

LINEAR_VIEW = "linear_train"


def evaluate_run(run: Path, evaluation: KnnConfig | LinearConfig, console: Console | None = None) -> list[Result]:
    """Evaluates a run's encoder and merges what it finds into RUN/evaluation.json.

    A checkpoint's results are written when all of them are there, so what is interrupted leaves the file as it was.

    Args:
        run: run directory.
        evaluation: by which protocol, on which checkpoints and images. `KnnConfig()` is weighted k-NN, `LinearConfig()`
            the paper's linear evaluation, `LinearConfig(fast=True)` logistic regression.
        console: where progress goes.

    Returns:
        What was found now, checkpoint by checkpoint.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: what is asked for is not there; the message says what to do.
    """
    config, saved = read_config(run), run / "evaluation.json"
    load_results(saved)  # one that is damaged shows before any work is done
    subject = prepare(run, config, evaluation, console or Console())
    chosen = checkpoints(run, config, evaluation, subject.steps_per_epoch)
    if isinstance(evaluation, LinearConfig) and not evaluation.fast:
        measure = partial(by_lars, subject, evaluation, linear_loader(subject, evaluation))
    else:
        measure = partial(by_stored_features, subject, evaluation, fast_protocols(subject, evaluation))
    found: list[Result] = []
    for checkpoint in chosen:
        _, method, step = load_trained(run, checkpoint)
        epoch = None if checkpoint is None else step / subject.steps_per_epoch
        results = [
            replace(result, label_share=evaluation.label_share, epoch=epoch) for result in measure(method.encoder, step)
        ]
        save_results(saved, results)
        found += results
    return found


def check_comparable(runs: Sequence[Path], evaluation: EvaluationConfig) -> None:
    """Raises ValueError unless the runs are different ones, at one step, whose settings differ in the seed alone."""
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


def checkpoints(
    run: Path, config: RunConfig, evaluation: KnnConfig | LinearConfig, steps_per_epoch: int
) -> Sequence[Path | None]:
    """Those to evaluate; None is the run's newest."""
    if not evaluation.milestones:
        return [evaluation.checkpoint]
    every = config.engine.keep_every
    kept = [] if every is None else list_milestones(run / "checkpoints", every * steps_per_epoch)
    require(bool(kept), f"{run} has kept no milestone; train with --keep-every N, which is {every} there, to have some")
    return kept


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the checkpoints of a run are evaluated with. n training images, m test images."""

    config: RunConfig
    console: Console
    train: ImageSet
    """All that the run trains on."""
    labelled: ImageSet
    """Those of them whose labels are used, n."""
    test: ImageSet
    """What is classified, m."""
    statistics: tuple[NDArray[np.float32], NDArray[np.float32]]
    """Mean [3] and deviation [3] that the run normalises views with."""
    side: int
    """Of a view in pixels."""
    device: torch.device
    dtype: torch.dtype
    """Of the autocast."""

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    @property
    def steps_per_epoch(self) -> int:
        """Of the run."""
        return len(self.train) // self.config.optim.batch_size

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def untrained(self) -> ResNet18:
        """The encoder with the run's initial weights."""
        return build_method(self.config, self.dtype).encoder

    def features(self, encoder: ResNet18, images: ImageSet) -> Tensor:
        """[len(images), F] of whole images, on the CPU."""
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


def prepare(run: Path, config: RunConfig, evaluation: KnnConfig | LinearConfig, console: Console) -> Subject:
    """Loads and chooses the images.

    Raises:
        ValueError: they have no labels, or there are none to classify.
    """
    # What the training was asked to do on its machine need not be possible on this one.
    kernels = "off" if config.engine.kernels == "off" else "auto"
    engine = replace(config.engine, device=evaluation.device, graphs="auto", lookup="auto", kernels=kernels)
    device = choose_device(engine)
    dtype = autocast_dtype(engine, device)
    if device.type == "cuda":
        use_fast_math(engine, dtype)
    elif engine.keep_memory:
        keep_freed_memory()
    train, test = load_dataset(
        config.dataset,
        evaluation.data_dir or config.data.data_dir,
        download=config.data.download,
        skip_corrupt=config.data.skip_corrupt,
    )
    require(train.labeled, f"{train.name} has no labels to evaluate on; give each class a subfolder of its own")
    train, held_out = split_train(train, config.data)
    if evaluation.split == "validation":
        require(len(held_out) > 0, f"{run} held no images out; train with --validation-images N to have some")
        test = held_out
    if test is None:
        raise ValueError(
            f"{train.name} has no test images; give the folder subfolders train and val, or train with "
            "--validation-images N and evaluate with --split validation"
        )
    return Subject(
        config=replace(config, engine=engine),
        console=console,
        train=train,
        labelled=with_labels(train, evaluation.label_share, seed=config.seed),
        test=test,
        statistics=train.statistics(),
        side=view_side(train, config.data.image_size),
        device=device,
        dtype=dtype,
    )


def fast_protocols(subject: Subject, evaluation: KnnConfig | LinearConfig) -> list[Protocol]:
    """Those that are asked for and need stored features alone, less the one that a class has too few images for.

    Raises:
        ValueError: there are fewer images than neighbors that vote.
    """
    count = len(subject.labelled)
    if isinstance(evaluation, KnnConfig):
        require(
            evaluation.k <= count,
            f"k {evaluation.k} is more than the {count} training images whose labels are used; lower --k",
        )
        return ["knn"]
    if evaluation.label_share < 1:
        return ["linear"]
    counts, needed = np.bincount(subject.labelled.labels, minlength=subject.classes), FEW_LABELS["per_class"]
    if counts.min() >= needed:
        return ["linear", "linear_10_labels"]
    subject.say(
        f"linear_10_labels is left out: class {subject.train.classes[counts.argmin()]} has {counts.min()} training "
        f"images, fewer than {needed}"
    )
    return ["linear"]


def by_stored_features(
    subject: Subject,
    evaluation: KnnConfig | LinearConfig,
    protocols: Sequence[Protocol],
    encoder: ResNet18,
    step: int,
) -> list[Result]:
    """k-NN or logistic regression, of one checkpoint among the untrained encoder and raw pixels."""

    def both(of: ResNet18) -> tuple[Tensor, Tensor]:
        return subject.features(of, subject.labelled), subject.features(of, subject.test)

    representations = {"pretrained": both(encoder)}
    if not evaluation.milestones:
        pixels = partial(raw_pixels, side=subject.side)
        representations["untrained"] = both(subject.untrained())
        representations["raw pixels"] = pixels(subject.labelled), pixels(subject.test)
    run_protocols = partial(
        evaluate,
        representations,
        torch.from_numpy(subject.labelled.labels),
        torch.from_numpy(subject.test.labels),
        subject.classes,
        protocols,
        split=evaluation.split,
        settings={"step": step},
    )
    if isinstance(evaluation, KnnConfig):
        return run_protocols(k=evaluation.k, temperature=evaluation.vote_temperature)
    # Of few labels none is held out to choose C by.
    return run_protocols(c=FEW_LABELS_C if evaluation.label_share < 1 else None)


def by_lars(subject: Subject, evaluation: LinearConfig, loader: Loader, encoder: ResNet18, step: int) -> list[Result]:
    """The paper's linear evaluation of one checkpoint, and where that is asked for of the untrained encoder."""
    encoders = {"pretrained": encoder}
    if evaluation.untrained:
        encoders["untrained"] = subject.untrained()
    settings: dict[str, Any] = {
        "optimizer": "LARS",
        "epochs": evaluation.epochs,
        "batch_size": batch_size(subject, evaluation),
        "lr": evaluation.lr,
        **OPTIMIZER,
        "view": LINEAR_VIEW,
        "loader": loader.name,
        "precision": str(subject.dtype).removeprefix("torch."),
        "seed": subject.config.seed,
        "train_images": len(subject.labelled),
        "test_images": len(subject.test),
        "classes": subject.classes,
        "step": step,
    }
    results: list[Result] = []
    for name, network in encoders.items():
        title = f"{name}, step {step}" if network is encoder else name
        accuracy = lars_accuracy(subject, evaluation, loader, network, title)
        results.append(
            Result(
                protocol="linear_lars",
                representation=name,
                split=evaluation.split,
                top1=accuracy.top1,
                top5=accuracy.top5,
                settings=settings,
            )
        )
    return results


def lars_accuracy(
    subject: Subject, evaluation: LinearConfig, loader: Loader, encoder: ResNet18, title: str
) -> Accuracy:
    """Test accuracy of a classifier that is trained for it; `title` stands before each line of progress."""

    test = subject.features(encoder, subject.test).to(subject.device)
    classifier = train_linear(
        encoder,
        loader,
        torch.from_numpy(subject.labelled.labels).to(subject.device),
        evaluation,
        classes=subject.classes,
        # With few labels as many steps as with all: 90 epochs of 1% of the images would hardly move the weights.
        steps_per_epoch=len(subject.train) // evaluation.batch_size,
        dtype=subject.dtype,
        seed=subject.config.seed,
        say=lambda line: subject.say(f"linear, {title}: {line}"),
    )
    with torch.inference_mode():
        scores = classifier(test)
    return accuracy_of_scores(scores.cpu(), torch.from_numpy(subject.test.labels))


def linear_loader(subject: Subject, evaluation: LinearConfig) -> Loader:
    """Batches of the labelled images, one augmented view of each, normalised as in the run."""
    config = subject.config
    require(
        evaluation.batch_size <= len(subject.train),
        f"batch_size {evaluation.batch_size} is more than the {len(subject.train)} training images; lower --batch-size",
    )
    try:
        return _linear_loader(subject, evaluation, config)
    except ImportError as error:  # the training's machine had DALI
        subject.say(f"the run's loader cannot be made here, and auto chooses one: {error}")
        return _linear_loader(subject, evaluation, replace(config, data=replace(config.data, loader="auto")))


def _linear_loader(subject: Subject, evaluation: LinearConfig, config: RunConfig) -> Loader:
    labelled = subject.labelled
    source = int(max(sides.max() for sides in labelled.sizes(np.arange(len(labelled)))))
    backends = choose_backends(
        config, source, subject.side, subject.dtype, subject.device, subject.console, operators=["augment"]
    )
    return make_loader(
        labelled,
        view_of(LINEAR_VIEW, config.dataset),
        views=1,
        side=subject.side,
        batch_size=batch_size(subject, evaluation),
        seed=config.seed,
        dtype=subject.dtype,
        device=subject.device,
        backend=config.data.loader,
        augment_backend=backends.augment,
        threads=config.data.loader_threads,
        statistics=subject.statistics,
    )


def batch_size(subject: Subject, evaluation: LinearConfig) -> int:
    """Images a step of the paper's protocol: no more than have labels."""
    return min(evaluation.batch_size, len(subject.labelled))
