"""Decides what runs on this machine, for training, evaluation, reproduce and bench alike.

The order: device and precision, fast math or kept memory, the images, the method, the backend of each operator (after
its self-check), the loader, and whether the forward is compiled. Each is decided once and printed once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console

from mnclglf.config import (
    PLACED,
    Device,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    UsageError,
    ViewConfig,
    moved,
    require,
    shown,
)
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet, Statistics, view_side
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import make_loader
from mnclglf.data.sources import source_of
from mnclglf.data.splits import split_train
from mnclglf.methods import Method, method_of
from mnclglf.models.encoder import check_sides, features_of
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.checkpoint import load_method, load_state
from mnclglf.runs.console import say
from mnclglf.runs.files import cache_folder, nearest_folder
from mnclglf.runs.locks import one_at_a_time
from mnclglf.training.deterministic import use_deterministic
from mnclglf.training.graphs import ruled_out
from mnclglf.training.initial_weights import describe_initial_weights, load_initial_weights
from mnclglf.training.optim import check_optimizer, parameter_groups
from mnclglf.training.ranks import ALONE, Ranks
from mnclglf.training.speedups import keep_freed_memory, use_fast_math
from mnclglf_kernels import Backends, resolve, self_check
from mnclglf_kernels.backend import CPU_MULTIPLIES_BF16, HAS_TRITON, triton_problem
from mnclglf_kernels.operators import OperatorName
from mnclglf_kernels.sizes import Sizes

Compile = Literal["off", "on", "graphs", "step"]


@dataclass(frozen=True)
class Machine:
    """The device of a run and the dtype of its autocast (float32 for none)."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The images of a run."""

    train: ImageSet
    """Images to pre-train on."""
    validation: ImageSet
    """Images that --validation-images holds out of them; may be empty."""
    test: ImageSet | None
    """Test images of the data set; None if it has none."""
    side: int
    """Side of a view in pixels."""


@dataclass(kw_only=True)
class Start:
    """Everything that a training run consists of, decided and ready."""

    config: RunConfig
    """The run, with the number of classes filled in for a method that needs it."""
    machine: Machine
    data: RunData
    method: Method
    """The method, on the device, in train mode, with its operators' backends."""
    loader: Loader
    compile: Compile
    initial_weights: dict[str, Any] | None
    """Where the encoder's weights come from and their names; None for random ones, or in a run that is resumed."""
    ranks: Ranks = ALONE

    def describe(self) -> str:
        """Returns one line with the decisions."""
        config, data, steps = self.config, self.data, self.loader.steps_per_epoch
        return (
            f"{config.method} on {shown(config.dataset)}: {len(data.train):,} images of side {data.side}, "
            f"{config.optim.epochs} epoch{'s' * (config.optim.epochs != 1)} of {steps} step{'s' * (steps != 1)}, "
            f"device {self.machine.device}, {name_of(self.machine.dtype)}, loader {self.loader.name}, "
            f"kernels {describe_backends(self.method.backends)}" + ("" if self.compile == "off" else ", compiled")
        )

    def describe_ranks(self) -> list[str]:
        """Returns lines about the ranks of a run that has several."""
        count, batch, own = self.ranks.count, self.config.optim.batch_size, self.own.optim.batch_size
        if count == 1:
            return []
        lines = [f"{count} ranks: batch size {batch} is that of all together, {own} images on each"]
        if self.config.model.sync_batch_norm == "off":
            lines.append(
                f"batch norm takes statistics of each rank's {own} images (--sync-batch-norm off): results depend on "
                "the number of ranks"
            )
        return lines

    @property
    def own(self) -> RunConfig:
        """Returns the run as one rank's machine sees it: with the batch of one rank."""
        optim = self.config.optim
        return replace(self.config, optim=replace(optim, batch_size=self.ranks.share(optim.batch_size)))

    def describe_encoder(self) -> list[str]:
        """Returns lines about an encoder that is not the paper's, or does not start from random weights."""
        lines: list[str] = []
        encoder, name = self.method.encoder, self.config.model.encoder
        if name != ModelConfig.encoder:
            lines.append(f"encoder {name}: {encoder.features:,} features")
        if encoder.interpolates:
            sizes = sides_of(type(self.method), self.data.side)
            lines.append(f"{name}: position embeddings of another size are interpolated to {in_words(sizes)}")
        if self.initial_weights is not None:
            lines.append(describe_initial_weights(self.initial_weights))
        return lines


def start_training(
    config: RunConfig,
    console: Console,
    *,
    resumed: bool = False,
    loader: str | None = None,
    statistics: Statistics | None = None,
    ranks: Ranks = ALONE,
) -> Start:
    """Decides everything about a training run, before any work is done.

    Args:
        config: the run.
        console: console for fallbacks.
        resumed: True for a run that goes on from a checkpoint.
        loader: loader of the run before it was resumed; "auto" takes it again, so that the views are bit-identical.
        statistics: mean and deviation of the run before it was resumed; None takes those of the images.
        ranks: the place of this process among those of the run, which has joined them.

    Raises:
        ValueError: settings that do not fit the images, the machine or each other.
        RuntimeError: kernels are required and cannot run, or one fails its self-check.
    """
    check_queue(config)
    check_optimizer(config.optim.optimizer)
    check_predictor(config)
    ranks.share(config.optim.batch_size)
    require(
        ranks.count == 1 or config.engine.graphs != "step",
        f"graphs step records the step of one process, and this run has {ranks.count} ranks; take --graphs on or auto",
    )
    config = in_its_place(config, resumed=resumed)
    if config.engine.deterministic and config.engine.choices == "auto":  # which times, and may choose otherwise
        config = replace(config, engine=replace(config.engine, choices="safe"))
    machine = start_machine(config.engine)
    data = load_run_data(config) if ranks.count == 1 else load_in_turn(config, console)
    config = with_classes(config, data.train)
    from mnclglf.training.out_of_memory import check_memory, explained  # which import this module

    check_encoder(config, data.side)  # before the estimate of the memory, which runs the encoder on these sides
    check_memory(config, data.side, machine, ranks.count)
    with explained(config, data.side, machine):
        method = build_method(config, machine.dtype).train()
        initial_weights = None if resumed else load_initial_weights(method, config.model)
        method = method.to(machine.device)
        method.distribute(ranks.rank, ranks.count, sync_batch_norm=config.model.sync_batch_norm == "on")
        method.backends = choose_backends(config, longest_side(data.train), data.side, machine, console, ranks=ranks)
        if loader is not None and config.data.loader == "auto":
            data_config = replace(config.data, loader=cast(Any, loader))
        else:
            data_config = config.data
        views = make_views(
            replace(config, data=data_config),
            data.train,
            config.view,
            machine,
            views=method.views,
            side=data.side,
            batch_size=config.optim.batch_size,
            augment_backend=method.backends.augment,
            statistics=statistics,
            rank=ranks.rank,
            ranks=ranks.count,
        )
    compiling = choose_compile(config.engine, machine.device, lambda text: say(console, text), ranks.count)
    return Start(
        config=config,
        machine=machine,
        data=data,
        method=method,
        loader=views,
        compile=compiling,
        initial_weights=initial_weights,
        ranks=ranks,
    )


def start_machine(engine: EngineConfig) -> Machine:
    """Chooses device and precision, and sets fast math (on a GPU) or kept memory (on a CPU) for this process."""
    machine = choose_machine(engine)
    if machine.device.type == "cuda":
        use_fast_math(engine, machine.dtype)
        if engine.deterministic:
            use_deterministic()
        keep_kernels_in_cache()
    elif engine.keep_memory:
        keep_freed_memory()
    return machine


def keep_kernels_in_cache() -> None:
    """Gives Triton a folder for its compiled kernels if there is no home: it would make one of the name ~ here."""
    if os.path.expanduser("~") == "~" or not os.access(nearest_folder(Path.home()), os.W_OK | os.X_OK):
        os.environ.setdefault("TRITON_HOME", str(cache_folder()))


def choose_machine(engine: EngineConfig) -> Machine:
    """Chooses device and precision without changing anything in this process."""
    device = choose_device(engine)
    return Machine(device, autocast_dtype(engine, device))


def elsewhere(engine: EngineConfig, device: Device) -> EngineConfig:
    """Returns a run's engine settings for an evaluation, whose machine may lack what the training had."""
    kernels = "off" if engine.kernels == "off" else "auto"
    return replace(engine, device=device, graphs="auto", lookup="auto", kernels=kernels)


def load_run_data(config: RunConfig, data_dir: Path | None = None) -> RunData:
    """Loads the images of a run, from `data_dir` if given; of a place, as folder:PATH, that is its new one."""
    name, place = config.dataset, data_dir or config.data.data_dir
    if name.startswith(PLACED):
        name, place = (name if data_dir is None else moved(name, data_dir)), None
    elif data_dir is None and not source_of(name).needs_files:
        place = None  # of a run of an earlier version, which ignored it
    train, test = load_dataset(
        name,
        place,
        download=config.data.download,
        skip_corrupt=config.data.skip_corrupt,
    )
    train, validation = split_train(train, config.data)
    return RunData(train=train, validation=validation, test=test, side=view_side(train, config.data.image_size))


def load_in_turn(config: RunConfig, console: Console) -> RunData:
    """Loads the images of a run while no other rank with the same cache does: the first one fills it for the others."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    place = f"{config.dataset} {config.data.data_dir or ''}"
    lock = folder / f".images-{hashlib.sha256(place.encode()).hexdigest()[:16]}.lock"
    with one_at_a_time(
        lock, lambda: say(console, f"waiting for another rank, which reads {shown(config.dataset)} ...")
    ):
        return load_run_data(config)


def in_its_place(config: RunConfig, *, resumed: bool) -> RunConfig:
    """Returns the run with the place of its images as it is read: of a resumed one, --data-dir is the new one.

    Raises:
        ValueError: a run starts on a place, as folder:PATH, with another one as --data-dir, or its data set has none.
    """
    place = config.data.data_dir
    source_of(config.dataset).check_folder(place)
    if place is None or not config.dataset.startswith(PLACED):
        return config
    dataset = moved(config.dataset, place)
    require(
        resumed,
        f"data_dir {place} names a second folder beside {shown(config.dataset)}; leave out --data-dir, or give "
        f"--dataset {dataset}",
    )
    return replace(config, dataset=dataset, data=replace(config.data, data_dir=None))


def changed_images(data: RunData, state: Mapping[str, Any]) -> list[str]:
    """Returns the parts of the images that are gone or not those of a checkpoint's run: train, validation, test."""
    saved: dict[str, str] = {"train": state["images"]} if "images" in state else {}
    saved |= state.get("other_images", {})
    return [
        name
        for name, images in (("train", data.train), ("validation", data.validation), ("test", data.test))
        if name in saved and (images is None or not images.matches(saved[name]))
    ]


def saved_statistics(run: Path, state: Mapping[str, Any]) -> Statistics | None:
    """Returns the mean and the deviation that a checkpoint's run normalizes views with.

    Earlier versions kept them in RUN/views.npz alone.

    Returns:
        Mean [3] and standard deviation [3]; None if neither the checkpoint nor the run directory has them.

    Raises:
        ValueError: views.npz is damaged.
    """
    if "mean" in state:
        return state["mean"].numpy(), state["std"].numpy()
    path = run / "views.npz"
    if not path.exists():
        return None
    try:
        with open_arrays(path) as arrays:
            return arrays["mean"].astype(np.float32), arrays["std"].astype(np.float32)
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"{path} is damaged ({error}); put back a copy of it, or remove it") from error


def longest_side(images: ImageSet) -> int:
    """Returns the longest side of all the images, in pixels."""
    return int(max(sides.max() for sides in images.sizes(np.arange(len(images)))))


def make_views(config: RunConfig, images: ImageSet, view: ViewConfig, machine: Machine, **settings: Any) -> Loader:
    """Makes a loader of the images with the run's seed, loader and threads; `settings` are those of make_loader."""
    return make_loader(
        images,
        view,
        seed=config.seed,
        dtype=machine.dtype,
        device=machine.device,
        backend=config.data.loader,
        threads=config.data.loader_threads,
        shuffle_block=config.data.shuffle_block,
        **settings,
    )


def choose_device(config: EngineConfig) -> torch.device:
    """Returns the device of the run; raises ValueError if cuda is asked for and torch sees no GPU."""
    available = torch.cuda.is_available()
    require(
        config.device != "cuda" or available,
        "device cuda was asked for, but torch sees no GPU; check nvidia-smi and the driver, or take --device cpu",
    )
    require(
        config.graphs not in ("on", "step") or (available and config.device != "cpu"),
        f"graphs {config.graphs} asks for CUDA graphs, and this run is on the CPU; take --graphs auto",
    )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def autocast_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """Returns bfloat16, float16 or float32; "auto" is bfloat16 if the device multiplies it in hardware."""
    if config.precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if CPU_MULTIPLIES_BF16 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Returns "bfloat16", "float16" or "float32"."""
    return str(dtype).removeprefix("torch.")


def build_method(config: RunConfig, dtype: torch.dtype) -> Method:
    """Makes the method of a run on the CPU, with initial weights from its seed, in the memory format of `engine`."""
    torch.manual_seed(config.seed)
    queue_dtype = torch.float32 if config.objective.queue_dtype == "float32" else dtype
    method = method_of(config.method)(config.model, config.objective, queue_dtype=queue_dtype)
    memory_format = torch.channels_last if config.engine.channels_last else torch.contiguous_format
    return method.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]  # torch's stub lacks it


def check_encoder(config: RunConfig, side: int) -> None:
    """Raises UsageError unless the encoder takes all images that it sees in a step; names them all.

    Args:
        config: the run.
        side: side of a view in pixels.
    """
    sides = sides_of(method_of(config.method), side)
    try:
        check_sides(config.model, sides)
    except UsageError as error:
        raise UsageError(f"{error}. {config.method} shows it {in_words(sides)}") from error


def sides_of(method: type[Method], side: int) -> dict[str, int]:
    """Returns the sides of the images that encoders see in a step, in pixels, by what the images are."""
    return {"views": side} | ({"patches": side // 2} if method.divided_views else {})


def in_words(sides: Mapping[str, int]) -> str:
    """Returns, for example, "views of side 32 and patches of side 16"."""
    return " and ".join(f"{what} of side {side}" for what, side in sides.items())


def check_queue(config: RunConfig) -> None:
    """Raises ValueError if a batch does not fit into the queue of a method that has one."""
    batch, size = config.optim.batch_size, config.objective.queue_size
    require(
        batch <= size or "enqueue" not in method_of(config.method).operators,
        f"batch_size {batch} is more than queue_size {size}: a step would overwrite its own rows; raise --queue-size "
        "or lower --batch-size",
    )


def check_predictor(config: RunConfig) -> None:
    """Raises ValueError if the predictor's rate is to be constant and the method has no predictor."""
    if not config.optim.constant_predictor_lr:
        return
    with torch.device("meta"):  # only the names count
        method = method_of(config.method)(ModelConfig(classes=2), ObjectiveConfig())
    parameter_groups(method, constant_predictor_lr=True)


def with_classes(config: RunConfig, images: ImageSet) -> RunConfig:
    """Returns the run with the number of classes filled in for a method that trains on labels.

    Raises:
        ValueError: the images have no labels, or more classes than the run's setting.
    """
    if not method_of(config.method).needs_labels:
        return config
    require(
        images.labeled,
        f"{config.method} trains on labels, and {images.name} has none; give each class a subfolder of its own, or "
        "take another --method",
    )
    count, given = len(images.classes), config.model.classes
    require(given is None or given >= count, f"classes {given} are fewer than the {count} of {images.name}")
    return replace(config, model=replace(config.model, classes=given or count))


def load_trained(run: Path, checkpoint: Path | None = None) -> tuple[RunConfig, Method, int]:
    """Returns configuration, method and step of a run's newest (or given) checkpoint.

    Raises:
        CheckpointError: the run has no checkpoint, it is damaged, or the given one is missing or from another run.
    """
    config, state = load_state(run, checkpoint)
    method = build_method(config, torch.float32)
    load_method(method, state, run)
    return config, method, state["step"]


def choose_backends(
    config: RunConfig,
    source: int,
    side: int,
    machine: Machine,
    console: Console,
    *,
    operators: Sequence[OperatorName] | None = None,
    ranks: Ranks = ALONE,
) -> Backends:
    """Chooses each operator's backend: Triton if it runs and passes its self-check at the run's sizes, else PyTorch.

    Args:
        config: the run; `engine.kernels` and `engine.lookup` set the policy.
        source: longest side of the images that views are made from, in pixels.
        side: side of a view in pixels.
        machine: device and autocast dtype of the run.
        console: console for kernels that fail their self-check.
        operators: operators needed; None for those of the method and of the loader.
        ranks: the place of this process, whose part of a batch is what they are checked on.

    Raises:
        RuntimeError: kernels are required and cannot run, or one fails; or FAISS cannot run here.
    """
    device, dtype = machine.device, machine.dtype
    policy = config.engine.kernels
    probe = torch.empty(0, dtype=dtype, device=device)
    problem = triton_problem((probe,), "matmul")
    if policy == "require" and problem is not None:
        raise RuntimeError(f"kernels are required, but {problem}; take --kernels auto to go on without them")
    if policy == "auto" and problem is not None and device.type == "cuda":
        console.print(f"falling back to PyTorch operators: {problem}", highlight=False, markup=False, soft_wrap=True)
    backends = Backends.all("torch")
    if policy == "require" or (policy == "auto" and resolve("auto", probe, kind="matmul") == "triton"):
        backends = Backends.all("triton")
        sizes = sizes_of(config, side, source)._replace(images=ranks.share(config.optim.batch_size))
        queue_dtype = torch.float32 if config.objective.queue_dtype == "float32" else dtype
        one = config.objective.one_embedding
        needed: Sequence[OperatorName] = (
            (*method_of(config.method).operators, "batch_norm", "augment") if operators is None else operators
        )
        if operators is None and method_of(config.method).without_gradient and dtype != torch.float32:
            needed = (*needed, "convolution")  # that choices.py may take
        used: list[OperatorName] = [
            op for op in needed if op != "augment" or config.data.loader in ("auto", "resident")
        ]
        how: dict[str, Any] = dict(one_embedding=one, operators=used, rank=ranks.rank, ranks=ranks.count)
        problems = self_check.failures(sizes, dtype, queue_dtype, device, **how)
        if problems and policy == "require":
            found = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise RuntimeError(f"kernels are required, and {found}; take --kernels auto to go on without what is wrong")
        for name, problem in problems.items():
            console.print(
                f"WARNING: the Triton kernel of {name} fails its self-check on this machine ({problem}); "
                "falling back to PyTorch. "
                "Please report it; in a checkout, `make gpu-day` writes a file to attach.",
                style="bold red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            backends = backends._replace(**{name: "torch"})
    if config.engine.lookup == "faiss":
        resolve("faiss", probe, kind="lookup")
        backends = backends._replace(nearest_neighbor="faiss")
    return backends


def sizes_of(config: RunConfig, side: int, source: int) -> Sizes:
    """Returns the sizes that the operators of a run see, for views of `side` made from images of side `source`."""
    return Sizes(
        images=config.optim.batch_size,
        side=side,
        features=features_of(config.model),
        k=config.objective.k,
        width=config.model.projector_width,
        queue=config.objective.queue_size,
        source=source,
        views=method_of(config.method).views,
    )


def describe_backends(backends: Backends) -> str:
    """Returns the most used backend and the exceptions, e.g. "triton, nearest_neighbor faiss"."""
    (most, _), *_ = Counter(backends).most_common(1)
    return ", ".join([most, *(f"{name} {used}" for name, used in backends._asdict().items() if used != most)])


def choose_compile(engine: EngineConfig, device: torch.device, say: Callable[[str], object], ranks: int = 1) -> Compile:
    """Decides whether a run's forward is eager, compiled, or compiled and, once its first batch has shown
    that they give the same results, replayed as CUDA graphs (graphs.py).

    Args:
        engine: the settings `compile` and `graphs`.
        device: device of the run.
        say: receives the reason if nothing is compiled although it was asked for.
        ranks: number of processes of the run.
    """
    if engine.compile == "off" or (engine.compile == "auto" and not compiles_by_itself(engine, device)):
        return "off"
    problem = compiler_problem(device)
    if problem is not None:
        say(f"not compiling, the step stays eager: {problem}")
        return "off"
    return "on" if ruled_out(engine, device, ranks) else "graphs"


def compiles_by_itself(engine: EngineConfig, device: torch.device) -> bool:
    """Returns whether "auto" compiles: on a GPU only. On a CPU it gains nothing: convolutions are 87% of a step."""
    return device.type == "cuda" and not engine.activation_checkpointing


def compiler_problem(device: torch.device) -> str | None:
    """Returns what torch.compile lacks here, or None. It needs a C compiler on a GPU and a C++ compiler on a CPU."""
    if device.type == "cuda" and not HAS_TRITON:
        return "the package triton is not installed"
    names = (os.environ.get("CC"), "gcc", "clang") if device.type == "cuda" else (os.environ.get("CXX", "g++"),)
    if not any(shutil.which(name) for name in names if name):
        wanted = "a C compiler (apt install gcc)" if device.type == "cuda" else "a C++ compiler (apt install g++)"
        return f"torch.compile needs {wanted}, and there is none on the PATH"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "torch.compile needs Python's headers (apt install python3-dev), and there is no Python.h"
    return None
