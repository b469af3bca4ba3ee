"""Evaluation of runs, for the command line, for Python and for the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mnclglf.config import (
    EvaluationConfig,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    RunConfig,
    require,
)
from mnclglf.data.images import ImageSet, Statistics
from mnclglf.data.loader import Loader
from mnclglf.data.splits import with_labels
from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.features import extract_features, raw_pixels
from mnclglf.evaluation.finetune import SGD, finetune
from mnclglf.evaluation.gallery import save_gallery
from mnclglf.evaluation.images import load_images, with_test_images
from mnclglf.evaluation.linear import OPTIMIZER, total_steps, train_linear
from mnclglf.evaluation.logistic import FEW_LABELS_C
from mnclglf.evaluation.protocols import FEW_LABELS, evaluate_features
from mnclglf.models.batch_norm import batch_norms
from mnclglf.models.encoder import Encoder
from mnclglf.recipes import view_of
from mnclglf.runs.checkpoint import list_checkpoints, list_milestones
from mnclglf.runs.console import LastingConsole, say
from mnclglf.runs.files import check_writable, differences, read_config
from mnclglf.runs.loggers import log_results
from mnclglf.runs.results import Protocol, Result, load_results, save_results
from mnclglf.training.ranks import ALONE, Ranks
from mnclglf.training.start import (
    Machine,
    build_method,
    choose_backends,
    elsewhere,
    load_trained,
    longest_side,
    make_views,
    start_machine,
)

LINEAR_VIEW = "linear_train"
# The paper's protocol takes 17,550 steps on CIFAR. On features of 4,000 digits logistic regression has 96.7, and the
# protocol 87.3 after 1,350 steps and 95.1 after 5,000.
FEW_STEPS = 5000
TrainingEvaluation = LinearConfig | FinetuneConfig
Evaluation = KnnConfig | LogisticConfig | TrainingEvaluation


def evaluate_run(
    run: Path,
    evaluation: Evaluation,
    console: Console | None = None,
    *,
    config: RunConfig | None = None,
    representations: Sequence[str] | None = None,
    file: Path | None = None,
    ranks: Ranks = ALONE,
) -> list[Result]:
    """Evaluates a run's encoder and merges the results into RUN/evaluation.json.

    The results of a checkpoint are written together, so an interruption does not change the file. Those of fine-tuning
    are written one by one. Ranks share the work of the encoder; rank 0 classifies and writes.

    Args:
        run: run directory.
        evaluation: the protocol, its checkpoints and its images. `KnnConfig()` is weighted k-NN, `LinearConfig()` the
            paper's linear evaluation, `LogisticConfig()` logistic regression, `FinetuneConfig()` fine-tuning.
        console: console for progress.
        config: the run's settings with the current folder of its data set; None reads RUN/config.json.
        representations: some of "pretrained", "untrained" and "raw pixels"; None takes the protocol's default.
        file: file of the results; None is RUN/evaluation.json.
        ranks: the processes that share the work, which all see the run directory.

    Returns:
        The new results, checkpoint by checkpoint; on other ranks than 0 none.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image set or checkpoint is missing or unusable; the
            message names the remedy.
    """
    config, file = config or read_config(run), file or run / "evaluation.json"
    load_results(file)  # raises for a damaged file before any work is done
    check_writable(file.parent, "make it writable, or copy the run to where you can write")
    context = prepare(run, config, evaluation, console or LastingConsole(), ranks)
    chosen = checkpoints(run, config, evaluation, context.steps_per_epoch)
    names = representations or default_representations(evaluation)
    groups = [names]  # representations whose results are saved together
    if isinstance(evaluation, LinearConfig | FinetuneConfig):
        measure = partial(by_training, context, evaluation, training_loader(context, evaluation))
    else:
        gallery = run / "gallery.npz" if file == run / "evaluation.json" and is_whole(context, evaluation) else None
        protocols = feature_protocols(context, evaluation)
        measure = partial(by_stored_features, context, evaluation, protocols, gallery=gallery)
    if isinstance(evaluation, LinearConfig):
        warn_of_few_steps(context, evaluation)
    if isinstance(evaluation, FinetuneConfig):
        groups = [[name] for name in names]  # an interruption of the baseline keeps the result before it
    found: list[Result] = []
    for checkpoint in chosen:
        _, method, step = load_trained(run, checkpoint)
        ranks.require_equal("newest checkpoint", f"step {step}", "wait until the run is trained, or give --checkpoint")
        epoch = None if checkpoint is None else step / context.steps_per_epoch
        for group in groups:
            results = [
                replace(
                    result,
                    dataset=context.dataset,
                    label_share=evaluation.label_share,
                    epoch=epoch,
                    settings={**result.settings, **context.split_settings},
                )
                for result in measure(group, method.encoder, step)
            ]
            if ranks.writes:
                save_or_print(file, results, context)
            found += results
    if file.parent == run and ranks.writes:
        log_results(run, config, found, context.say)
    return found


def save_or_print(file: Path, results: Sequence[Result], context: EvalContext) -> None:
    """Saves results; where the disk is full by now, what took minutes to measure is at least printed."""
    try:
        save_results(file, results)
    except OSError:
        for r in results:
            context.say(f"{r.protocol}, {r.representation}, {r.split}: top-1 {r.top1:.2%}, top-5 {r.top5:.2%}")
        raise


def default_representations(evaluation: Evaluation) -> tuple[str, ...]:
    """Returns the representations to evaluate if none are named; for milestones only the pretrained encoder."""
    if evaluation.milestones:
        return ("pretrained",)
    if isinstance(
        evaluation, LinearConfig | FinetuneConfig
    ):  # takes minutes each, so the untrained encoder only on request
        return ("pretrained", "untrained") if evaluation.untrained else ("pretrained",)
    return ("pretrained", "untrained", "raw pixels") if evaluation.raw_pixels else ("pretrained", "untrained")


def is_whole(context: EvalContext, evaluation: Evaluation) -> bool:
    """Returns whether the newest checkpoint is evaluated on the run's test images with all labels."""
    plain = evaluation.checkpoint is None and not evaluation.milestones and context.dataset is None
    return plain and evaluation.split == "test" and evaluation.label_share == 1


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
    dataset: str | None = None
    """Name of the data set if it is not the run's own."""
    split_settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings of a split that was drawn; empty for one that the data set comes with."""
    train: ImageSet
    """All training images: those that the run trains on, or those of `dataset`."""
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
    ranks: Ranks = ALONE
    """The processes that share the work."""

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

    def untrained(self) -> Encoder:
        """Returns the encoder with random weights of the run's seed, whatever weights the run started from."""
        return build_method(self.config, self.dtype).encoder

    def features(self, encoder: Encoder, images: ImageSet) -> Tensor:
        """Returns features [len(images), F] of whole images, on the CPU; an empty tensor on other ranks than 0."""
        mean, std = self.statistics
        return extract_features(
            encoder.to(self.device),
            images,
            side=self.side,
            mean=mean,
            std=std,
            dtype=self.dtype,
            device=self.device,
            ranks=self.ranks,
        )


def prepare(run: Path, config: RunConfig, evaluation: Evaluation, console: Console, ranks: Ranks) -> EvalContext:
    """Loads the images and chooses those to evaluate on.

    Raises:
        ValueError: the images have no labels, or there are no images to classify.
    """
    engine = elsewhere(config.engine, evaluation.device)
    machine = start_machine(engine)
    images = with_test_images(load_images(run, config, evaluation, console), evaluation, run, console)
    assert images.test is not None
    if ranks.count > 1:
        both = f"{images.train.fingerprint()} {images.test.fingerprint()}"
        ranks.require_equal("set of images", both, "give every rank the same images (--data-dir)")
    return EvalContext(
        config=replace(config, engine=engine),
        console=console,
        dataset=images.dataset,
        split_settings=images.split_settings,
        train=images.train,
        labeled=with_labels(images.train, evaluation.label_share, seed=config.seed),
        test=images.test,
        statistics=images.statistics,
        side=images.side,
        machine=machine,
        steps_per_epoch=images.steps_per_epoch,
        ranks=ranks,
    )


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
    encoder: Encoder,
    step: int,
    *,
    gallery: Path | None = None,
) -> list[Result]:
    """Evaluates one checkpoint's encoder, and the other representations, by k-NN or logistic regression.

    Of k-NN it writes the report's pictures into the file `gallery`, if there is one.
    """

    def features(name: str) -> tuple[Tensor, Tensor]:
        sets = context.labeled, context.test
        if name == "raw pixels" and not context.ranks.writes:
            return torch.empty(0), torch.empty(0)
        if name == "raw pixels":
            return raw_pixels(sets[0], side=context.side), raw_pixels(sets[1], side=context.side)
        network = encoder if name == "pretrained" else context.untrained()
        return context.features(network, sets[0]), context.features(network, sets[1])

    representations = {name: features(name) for name in names}
    if not context.ranks.writes:
        return []
    evaluate = partial(
        evaluate_features,
        representations,
        torch.from_numpy(context.labeled.labels),
        torch.from_numpy(context.test.labels),
        context.classes,
        protocols,
        split=evaluation.split,
        settings={"step": step},
    )
    if isinstance(evaluation, KnnConfig):
        results = evaluate(neighbors=evaluation.neighbors, temperature=evaluation.vote_temperature)
        if gallery is not None:
            save_gallery(gallery, representations, context.labeled, context.test, evaluation)
        return results
    # With few labels none can be held out to choose C on.
    return evaluate(c=FEW_LABELS_C if evaluation.label_share < 1 else None)


def by_training(
    context: EvalContext,
    evaluation: TrainingEvaluation,
    loader: Loader,
    names: Sequence[str],
    encoder: Encoder,
    step: int,
) -> list[Result]:
    """Evaluates one checkpoint's encoder by the paper's protocol or by fine-tuning, and the untrained one if `names`
    has it."""
    encoders = {name: encoder if name == "pretrained" else context.untrained() for name in names}
    results: list[Result] = []
    for name, network in encoders.items():
        title = f"{name}, step {step}" if network is encoder else name
        accuracy = trained_accuracy(context, evaluation, loader, network, title)
        if accuracy is None:
            continue
        results.append(
            Result(
                protocol=protocol_of(evaluation),
                representation=name,
                split=evaluation.split,
                top1=accuracy.top1,
                top5=accuracy.top5,
                settings={**training_settings(context, evaluation, loader), "step": step},
            )
        )
    return results


def protocol_of(evaluation: TrainingEvaluation) -> Protocol:
    """Returns "linear" or "finetune"."""
    return "finetune" if isinstance(evaluation, FinetuneConfig) else "linear"


def training_settings(context: EvalContext, evaluation: TrainingEvaluation, loader: Loader) -> dict[str, Any]:
    """Returns the settings to save with a result of a trained classifier."""
    linear = isinstance(evaluation, LinearConfig)
    steps = total_steps(evaluation, epoch_steps(context, evaluation))
    settings: dict[str, Any] = {
        "optimizer": "LARS" if linear else "SGD",
        **({"epochs": evaluation.epochs} if evaluation.steps is None else {"steps": evaluation.steps}),
        "batch_size": batch_size(context, evaluation),
        "lr": evaluation.lr,
        **(OPTIMIZER if linear else SGD),
        "view": LINEAR_VIEW,
        "loader": loader.name,
        "precision": str(context.dtype).removeprefix("torch."),
        "seed": context.config.seed,
        "train_images": len(context.labeled),
        "test_images": len(context.test),
        "classes": context.classes,
    }
    few_labels = len(context.labeled) < len(context.train)
    if few_labels and evaluation.steps is None and evaluation.batch_size != type(evaluation).batch_size:
        settings["asked_batch_size"] = evaluation.batch_size  # the number of steps follows from it
    if linear and steps < FEW_STEPS:
        settings["note"] = f"{steps:,} steps, fewer than {FEW_STEPS:,}"
    return settings


def trained_accuracy(
    context: EvalContext, evaluation: TrainingEvaluation, loader: Loader, encoder: Encoder, title: str
) -> Accuracy | None:
    """Trains a classifier, with the encoder or on it, and returns its test accuracy, on other ranks than 0 None;
    `title` begins each line of progress."""
    encoder = encoder.to(context.device)
    common: dict[str, Any] = {
        "classes": context.classes,
        # As many steps with few labels as with all: 90 epochs of 1% of the images would hardly move the weights.
        "steps_per_epoch": epoch_steps(context, evaluation),
        "dtype": context.dtype,
        "seed": context.config.seed,
        "say": lambda line: context.say(f"{protocol_of(evaluation)}, {title}: {line}"),  # pyright: ignore
    }
    labels = torch.from_numpy(context.labeled.labels).to(context.device)
    if isinstance(evaluation, FinetuneConfig):
        set_batch_norm_backend(context, encoder)
        classifier = finetune(encoder, loader, labels, evaluation, **common)
    else:
        classifier = train_linear(encoder, loader, labels, evaluation, **common, ranks=context.ranks)
    features = context.features(encoder, context.test)
    if not context.ranks.writes:
        return None
    with torch.inference_mode():
        scores = classifier(features.to(context.device))
    return accuracy_of_scores(scores.cpu(), torch.from_numpy(context.test.labels))


def set_batch_norm_backend(context: EvalContext, encoder: Encoder) -> None:
    """Lets the encoder's batch norms train by the kernel, where it runs and passes its self-check, else by PyTorch."""
    chosen = choose_backends(
        context.config,
        longest_side(context.labeled),
        context.side,
        context.machine,
        context.console,
        operators=["batch_norm"],
    )
    for layer in batch_norms(encoder):
        layer.backend = chosen.batch_norm  # pyright: ignore[reportAttributeAccessIssue]  # a BatchNorm


def training_loader(context: EvalContext, evaluation: TrainingEvaluation) -> Loader:
    """Returns a loader of the labeled images, with one augmented view per image, normalized as in the run.

    Raises:
        ValueError: a batch size was chosen, not the default, and there are fewer training images; or ranks cannot
            divide a batch evenly.
    """
    config = context.config
    require(
        evaluation.batch_size <= len(context.train) or evaluation.batch_size == type(evaluation).batch_size,
        f"batch_size {evaluation.batch_size} is more than the {len(context.train)} training images; lower --batch-size",
    )
    context.ranks.share(batch_size(context, evaluation))
    try:
        return _make_training_loader(context, evaluation, config)
    except ImportError as error:  # the run was trained with DALI, which this machine lacks
        context.say(f"the run's loader cannot be made here; falling back to --loader auto: {error}")
        return _make_training_loader(context, evaluation, replace(config, data=replace(config.data, loader="auto")))


def _make_training_loader(context: EvalContext, evaluation: TrainingEvaluation, config: RunConfig) -> Loader:
    labeled = context.labeled
    backends = choose_backends(
        config, longest_side(labeled), context.side, context.machine, context.console, operators=["augment"]
    )
    return make_views(
        config,
        labeled,
        view_of(LINEAR_VIEW, context.dataset or config.dataset),
        context.machine,
        views=1,
        side=context.side,
        batch_size=batch_size(context, evaluation),
        augment_backend=backends.augment,
        statistics=context.statistics,
        rank=context.ranks.rank,
        ranks=context.ranks.count,
    )


def warn_of_few_steps(context: EvalContext, evaluation: LinearConfig) -> None:
    """Warns if the classifier is trained for so few steps that its accuracy says little of the features."""
    steps = total_steps(evaluation, epoch_steps(context, evaluation))
    if steps < FEW_STEPS:
        context.say(
            f"WARNING: linear trains for {steps:,} steps, and the paper's learning rate is meant for 17,550: below "
            f"{FEW_STEPS:,} the accuracy comes out too low; give --steps {FEW_STEPS}, or take mnclglf logistic"
        )


def epoch_steps(context: EvalContext, evaluation: TrainingEvaluation) -> int:
    """Returns the steps that count as an epoch, with few labels as with all."""
    return len(context.train) // min(evaluation.batch_size, len(context.train))


def batch_size(context: EvalContext, evaluation: TrainingEvaluation) -> int:
    """Returns the images per step, at most the number of labeled images."""
    return min(evaluation.batch_size, len(context.labeled))
