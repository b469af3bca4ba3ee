"""The Python API: train, evaluate, quality, load_encoder, embed, export. Import them from mnclglf."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mnclglf.config import (
    DataConfig,
    Device,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    QualityConfig,
    RunConfig,
    check_names,
    default_folder,
    made_of,
    require,
    with_whole_paths,
)
from mnclglf.data.listing import list_source
from mnclglf.data.sources import Source, named_or_folder, source_of
from mnclglf.data.sources.objects import give_object
from mnclglf.evaluation import embedding_file
from mnclglf.evaluation.embed import Embedder, embed_source
from mnclglf.evaluation.monitor import KnnMonitor
from mnclglf.evaluation.quality import measure_quality
from mnclglf.evaluation.run import evaluate_run
from mnclglf.exporting.folder import check_place
from mnclglf.exporting.formats import NetworkName, choose_formats
from mnclglf.exporting.networks import networks_of
from mnclglf.exporting.write import write_export
from mnclglf.methods import Method, method_of
from mnclglf.models.batch_norm import batch_norms
from mnclglf.models.encoder import Encoder
from mnclglf.plugins import class_name
from mnclglf.reports.page import write_report
from mnclglf.reports.quality_page import page_name, write_neighbors
from mnclglf.reports.run_files import read_views
from mnclglf.runs.checkpoint import load_method, load_state
from mnclglf.runs.console import LastingConsole
from mnclglf.runs.files import read_config, read_object
from mnclglf.runs.quality import FeatureQuality
from mnclglf.runs.results import Result, load_results
from mnclglf.settings import by_name, run_config
from mnclglf.training.loop import Trainer
from mnclglf.training.ranks import ALONE, Ranks
from mnclglf.training.start import build_method, elsewhere, start_machine
from mnclglf.training.unread import unread_settings

EVALUATIONS = {"knn": KnnConfig, "linear": LinearConfig, "logistic": LogisticConfig, "finetune": FinetuneConfig}


@dataclass(frozen=True)
class Run:
    """A run directory, as `train` returns it; every function that takes a run takes a path too."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


RunPath = str | os.PathLike[str]


def train(
    config: RunConfig | RunPath | None = None,
    *,
    out: RunPath | None = None,
    resume: str = "auto",
    extend: bool = False,
    **settings: Any,
) -> Run:
    """Pre-trains an encoder and writes the run directory with its checkpoints and report.

    Args:
        config: configuration of the run, or the path of a file with settings (YAML or JSON, such as the config.json of
            a run), which `settings` override; None to give `settings` alone.
        out: run directory; None is runs/METHOD-DATASET-RECIPE-seedSEED.
        resume: "auto" resumes from the newest checkpoint in `out`; "never" raises if `out` holds a run; a path names
            the checkpoint to resume from.
        extend: let a finished run go on to more epochs, by the learning rate of the longer run.
        settings: settings by their names on the command line, e.g. method="simsiam", dataset="digits", recipe="quick",
            epochs=2, batch_size=64, lambda_=4; all others have the recipe's values. `method` may also be a subclass of
            Method; `dataset` a subclass of Source, or a map-style torch Dataset of images or (image, label), and
            `test_dataset` one to evaluate on.

    Raises:
        ValueError: a setting does not exist or is invalid; the message names the remedy.
        TrainingError: a loss, gradient or embedding was not finite.
        KeyboardInterrupt: SIGINT, SIGTERM, SIGHUP or SIGUSR1 arrived; the run is saved, and the same call resumes it.
            In another thread than the main one, no signal is caught.
    """
    require(
        not (isinstance(config, RunConfig) and settings),
        f"config and the settings {', '.join(settings)} are both given; give the settings alone, or change the config "
        "with dataclasses.replace",
    )
    settings = named(settings)
    if not isinstance(config, RunConfig):
        config = run_config(settings, None if config is None else Path(config))
    config = with_whole_paths(config)
    for name, why in unread_settings(config, set(by_name(settings))).items():
        warnings.warn(f"{name} has no effect with {why}; leave it out", stacklevel=2)
    folder = default_folder(config) if out is None else Path(out)
    stopped = Trainer(config, folder, resume=resume, extend=extend, monitor=KnnMonitor).train()
    write_report(folder)
    if stopped:
        raise KeyboardInterrupt(f"stopped by signal {stopped} and saved in {folder}; the same call resumes it")
    return Run(folder)


def evaluate(
    run: RunPath, protocol: Literal["knn", "linear", "logistic", "finetune"] = "knn", **settings: Any
) -> list[Result]:
    """Evaluates a run's encoder and merges the results into RUN/evaluation.json.

    Args:
        run: run directory, or the result of `train`.
        protocol: "knn" is weighted k-NN, "linear" the paper's linear evaluation, "logistic" logistic regression,
            "finetune" fine-tuning of the whole network.
        settings: settings of KnnConfig, LinearConfig, LogisticConfig or FinetuneConfig, e.g. neighbors=5,
            label_share=0.1 or dataset="folder:photos". `dataset` and `test_dataset` may also be Dataset objects:
            others, or those of the run in a program that has not given them to `train`.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image set or checkpoint is missing or unusable; the
            message names the remedy.
    """
    require(protocol in EVALUATIONS, f"protocol {protocol!r} is none of {', '.join(EVALUATIONS)}")
    config = EVALUATIONS[protocol]
    settings = dict(named(settings))
    check_names(settings, [field.name for field in dataclasses.fields(config)], f"protocol {protocol}")
    results = evaluate_run(Path(run), made_of(config, settings))
    write_report(Path(run))
    return results


def quality(run: RunPath, **settings: Any) -> list[FeatureQuality]:
    """Judges a run's encoder without labels, and merges the figures into RUN/quality.json.

    Also writes the page of nearest neighbors, RUN/neighbors.html, or for another data set RUN/neighbors-NAME.html.

    Args:
        run: run directory, or the result of `train`.
        settings: settings of QualityConfig, e.g. dataset="folder:photos" or images=5000.

    Returns:
        Alignment, uniformity and effective rank of the pretrained and of the untrained encoder.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image set or checkpoint is missing or unusable; the
            message names the remedy.
    """
    settings = dict(named(settings))
    check_names(settings, [field.name for field in dataclasses.fields(QualityConfig)], "quality")
    results, _ = judge(Path(run), made_of(QualityConfig, settings))
    return results


def judge(
    run: Path, config: QualityConfig, console: Console | None = None, ranks: Ranks = ALONE
) -> tuple[list[FeatureQuality], Path]:
    """Does what `quality` says; returns the figures and the path of the page of nearest neighbors.

    Ranks share the work; rank 0 alone has the figures and writes the page.
    """
    judged = measure_quality(run, config, console, ranks)
    page = run / page_name(judged.dataset, judged.other)
    if ranks.writes:
        write_neighbors(page, judged.tiles, [dataclasses.asdict(result) for result in judged.results], str(run))
        write_report(run)
    return judged.results, page


def load_encoder(run: RunPath, checkpoint: RunPath | None = None) -> Encoder:
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
    encoder = trained_method(config, state, folder).encoder.eval()
    for layer in batch_norms(encoder):  # training counts no batches here, and torchvision's state has the count
        layer.num_batches_tracked = torch.tensor(0)
    mean, std, side = normalization(folder, state)
    encoder.register_buffer("mean", mean[:, None, None], persistent=False)
    encoder.register_buffer("std", std[:, None, None], persistent=False)
    setattr(encoder, "side", side)  # noqa: B010  # the type of a module's attributes is Tensor or Module
    return encoder


def export(
    run: RunPath,
    out: RunPath | None = None,
    *,
    formats: Sequence[str] | None = None,
    head: bool = False,
    network: NetworkName = "online",
    checkpoint: RunPath | None = None,
) -> Path:
    """Writes the pretrained encoder as other programs load it: weights, graphs, and a model card that shows how.

    The folder gets `encoder.safetensors` (the names of torchvision or timm), `encoder.pt2` (a torch.export program),
    `encoder.onnx`, `README.md` and `export.json`. Every file carries mean, std, side and the preprocessing. Each graph
    is compared with the encoder; none holds a pickle.

    Args:
        run: run directory, or the result of `train`.
        out: folder to make; None is RUN/export. An earlier export there is replaced, anything else is not.
        formats: some of "safetensors", "onnx" and "pt2"; None takes all. onnx needs the extra `export`: None leaves it
            out with a warning if that is not installed.
        head: export projector and predictor too (of supervised training the classifier), as heads.* files.
        network: "online" is the encoder that is evaluated; "momentum" the momentum network's.
        checkpoint: file in RUN/checkpoints; None is the newest.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the run or the checkpoint is missing or damaged, a format or
            network does not exist or cannot be had here, or `out` holds something else; the message names the remedy.
        ExportError: what was written does not give the encoder's features; nothing is left in `out`.
    """
    chosen, left_out = choose_formats(formats)
    if left_out:
        warnings.warn(left_out, stacklevel=2)
    source = Path(run)
    read_config(source)  # raises before anything is looked at in a folder that is no run
    folder = (source / "export" if out is None else Path(out)).resolve()
    check_place(folder)
    evaluations = load_results(source / "evaluation.json")
    config, state = load_state(source, None if checkpoint is None else Path(checkpoint))
    mean, std, side = normalization(source, state)
    exported = networks_of(trained_method(config, state, source), network, side, head=head)
    write_export(folder, chosen, exported, config, {**state, "mean": mean, "std": std}, network, evaluations)
    return folder


def trained_method(config: RunConfig, state: dict[str, Any], run: Path) -> Method:
    """Returns the method of a checkpoint, on the CPU; the caller's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        method = build_method(config, torch.float32)
    load_method(method, state, run)
    return method


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


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of n images, as `embed` returns them."""

    array: NDArray[np.float32]
    """[n, F]; where `out` is a .npy, mapped into memory."""
    names: list[str]
    """[n]: paths relative to the source's folder, else the split and the number, as train/17."""
    splits: list[str]
    """[n]: train or test."""
    labels: NDArray[np.int64]
    """[n]: number of the class in `classes`; -1 for images without labels."""
    classes: tuple[str, ...]
    """Names of the classes; empty for images without labels."""


def embed(
    run: RunPath,
    source: RunPath,
    *,
    out: RunPath | None = None,
    checkpoint: RunPath | None = None,
    data_dir: RunPath | None = None,
    download: bool = False,
    skip_corrupt: bool = False,
    device: Device = "auto",
) -> Embeddings:
    """Embeds every image of a source, without augmentation, as the evaluations do.

    Args:
        run: run directory, or the result of `train`.
        source: a folder of image files, folder:PATH, or the name of a data set.
        out: file to write, .npy, .parquet or .npz; an interrupted call is continued by the same call. None keeps
            nothing, for what fits into memory.
        checkpoint: file in RUN/checkpoints; None is the newest.
        data_dir: folder of the data set's files; None looks in its usual places.
        download: fetch the data set if it is missing.
        skip_corrupt: leave out image files that cannot be used; they have no row.
        device: "cuda", "cpu", or "auto", which is cuda where torch sees a GPU.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image or checkpoint is missing or unusable; the message
            names the remedy.
        KeyboardInterrupt: SIGINT, SIGTERM, SIGHUP or SIGUSR1 arrived.
    """
    require(
        isinstance(source, str | os.PathLike),  # pyright: ignore[reportUnnecessaryIsInstance]
        f"source is a {type(source).__name__}: give a folder or a data set's name; batches of your own go through "
        "mnclglf.load_encoder",
    )
    name = named_or_folder(os.fspath(source))
    embedder = make_embedder(run, None if checkpoint is None else Path(checkpoint), device)
    listing = list_source(
        name, None if data_dir is None else Path(data_dir), download=download, skip_corrupt=skip_corrupt
    )
    with tempfile.TemporaryDirectory(prefix="mnclglf-") as folder:
        path = Path(folder) / "embeddings.npy" if out is None else Path(out)
        console = LastingConsole(quiet=True)
        stopped = embed_source(embedder, listing, name, path, skip_corrupt=skip_corrupt, console=console)
        if stopped:
            raise KeyboardInterrupt(f"stopped by signal {stopped}" + ("; the same call goes on" if out else ""))
        rows = list(embedding_file.made_of(path).kept())
        array = embedding_file.read_embeddings(path)
        array = np.array(array) if out is None else array  # the temporary file goes
    return Embeddings(
        array=array,
        names=[listing.names[row] for row in rows],
        splits=[listing.split(row) for row in rows],
        labels=listing.labels[rows].astype(np.int64),
        classes=listing.classes,
    )


def make_embedder(run: RunPath, checkpoint: Path | None, device: Device) -> Embedder:
    """Returns the encoder of a run on a device, ready to embed images as the run's evaluations do.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the run or the checkpoint is missing or damaged.
    """
    encoder = load_encoder(run, checkpoint)
    # cuDNN's timing may choose other algorithms in the next process: what is resumed would have other last bits.
    engine = dataclasses.replace(elsewhere(read_config(Path(run)).engine, device), cudnn_benchmark=False)
    machine = start_machine(engine)
    return Embedder(
        encoder=encoder.to(machine.device),
        run=Path(run),
        mean=encoder.get_buffer("mean").flatten().cpu().numpy(),
        std=encoder.get_buffer("std").flatten().cpu().numpy(),
        side=int(getattr(encoder, "side")),  # noqa: B009  # the type of a module's attributes is Tensor or Module
        dtype=machine.dtype,
        device=machine.device,
    )


def named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with the names of a method's or a source's class, and of a Dataset and one to test on.

    Raises:
        ValueError: the method is no Method, or the Dataset cannot be used.
    """
    made = dict(settings)
    test = made.pop("test_dataset", None)
    if isinstance(method := made.get("method"), type):
        made["method"] = class_name(method)
        method_of(made["method"])  # raises if it is no Method, or cannot be found again
    dataset = made.get("dataset")
    if isinstance(dataset, type) and issubclass(dataset, Source):
        made["dataset"] = class_name(dataset)
        source_of(made["dataset"])
    elif dataset is not None and not isinstance(dataset, str):
        workers = made.get("loader_threads", DataConfig.loader_threads)
        made["dataset"] = give_object(dataset, test, workers=workers)
        return made
    require(
        test is None,
        f"test_dataset is for a Dataset object as dataset, which is {dataset!r}; leave it out, or give both as objects",
    )
    return made
