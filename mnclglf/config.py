"""Settings of runs and evaluations: typed, frozen, checked when they are made.

It imports only plugins.py of this package. A RunConfig comes from a recipe (recipes.py) and the settings that were
given: options of the command line, a file, keywords (settings.py). `to_dict` and `from_dict` convert it to JSON types
and back. An invalid value raises ValueError, which names the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import cattrs
import tyro

from mnclglf.plugins import METHODS_GROUP, is_class_name, plugin_names

NO_METHODS = {"__init__", "base"}  # files of methods/ that hold no method
# Each method's file has the method's name, so the names are known without importing the methods, and with them torch.
METHOD_NAMES = tuple(
    sorted(path.stem for path in (Path(__file__).parent / "methods").glob("*.py") if path.stem not in NO_METHODS)
)
# A built-in method hides an entry point of its name.
OTHER_METHODS = tuple(name for name in plugin_names(METHODS_GROUP) if name not in METHOD_NAMES)
"""Names of the methods that other packages give as entry points."""
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[METHOD_NAMES + OTHER_METHODS]  # so that --help lists them, and another name is refused
RecipeName = Literal["paper", "tuned", "quick"]
LoaderName = Literal["auto", "dali", "resident", "reference"]
Interpolation = Literal["bilinear", "bicubic"]
Stem = Literal["cifar", "imagenet"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Switch = Literal["auto", "on", "off"]
Graphs = Literal["auto", "on", "off", "step"]
Device = Literal["auto", "cuda", "cpu"]
KernelPolicy = Literal["auto", "require", "off"]
Lookup = Literal["auto", "faiss"]
Choices = Literal["auto", "safe", "all"]
LoggerName = Literal["auto", "tensorboard", "wandb", "mlflow"]
HalfSums = Literal["off", "forward", "input-gradient", "both"]
ReduceDtype = Literal["fp32", "bf16"]

MOST_COUNT = 2**32 - 1
MOST_FLOAT = (2 - 2**-23) * 2.0**127  # of fp32, in which a run computes
MOST_PIXELS = 8192  # side of a view
MOST_THREADS = 1024
MOST_WIDTH = 2**16  # channels, units and classes: a layer of so many has 17 GB
MOST_SECONDS = 2_000_000  # 23 days: in milliseconds, torch's clocks have 31 bits
MOST_RANKS = 4096  # of one machine
WORDS: dict[Any, str] = {bool: "true or false", str: "text; put it in quotes", Path: "a path; put it in quotes"}

TIMM = "timm:"
"""Prefix of an encoder's name that stands for a model of timm: timm:NAME."""
RESNETS = ("resnet18", "resnet34", "resnet50")
"""Names of our own encoders."""
TORCHVISION = "torchvision"
"""Value of --init that stands for torchvision's pretrained weights."""
FOLDER = "folder:"
"""Prefix of a data set's name that stands for a folder of image files: folder:PATH."""
SHARDS = "shards:"
"""Prefix of a data set's name that stands for tar files of images, as WebDataset writes them: shards:PATTERN."""
PARQUET = "parquet:"
"""Prefix of a data set's name that stands for Parquet files of images, as the Hugging Face hub stores them."""
PATTERN_ENDS = (".tar", ".parquet")
"""Ends of the patterns of files; another place is a folder."""
PLACED = (FOLDER, SHARDS, PARQUET)
"""Prefixes of the data sets that are a place."""
OBJECT = "object:"
"""Prefix of a data set's name that stands for a Dataset object of a Python program: object:CLASS."""


class UsageError(ValueError):
    """A setting does not work as it was given, by itself or for this run; the command line exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raises UsageError with `message`, which names the value and the remedy, unless the condition holds."""
    if not condition:
        raise UsageError(message)


def require_types(settings: Any, but: Collection[str] = ()) -> None:
    """Raises UsageError unless each field of a dataclass, but the named ones, has a value of its type.

    Numbers have to be finite, and counts whole and bounded.
    """
    for name, hint in _hints(type(settings)).items():
        value: Any = getattr(settings, name)
        if name in but:
            continue
        if value is None and type(None) in get_args(hint):
            continue
        _require_type(name.rstrip("_"), value, hint)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _require_type(name: str, value: Any, hint: Any, whole: object = None) -> None:
    given = value if whole is None else whole  # a list is shown whole
    shown = f"{name} {text_of(given)}"
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        require(value in inner, f"{shown} is none of {', '.join(map(str, inner))}")
    elif origin is tuple and inner[-1] is Ellipsis:
        require(isinstance(value, tuple), f"{shown} must be a list")
        for item in cast("tuple[Any, ...]", value):
            _require_type(name, item, inner[0], value)
    elif origin is tuple:
        right = isinstance(value, tuple) and len(cast("tuple[Any, ...]", value)) == len(inner)
        require(right, f"{shown} must be {len(inner)} values, as in {name} 0.5 1.0")
        for number, kind in zip(value, inner, strict=True):
            _require_type(name, number, kind, value)
    elif inner and type(None) in inner:
        _require_type(name, value, next(kind for kind in inner if kind is not type(None)))
    elif hint in (int, float):
        kind, most, wanted = (int, MOST_COUNT, "whole") if hint is int else (int | float, MOST_FLOAT, "finite")
        right = isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= most
        require(right, f"{shown} must be a {wanted} number, at most {most:.10g}")
    elif hint in WORDS:
        require(isinstance(value, hint), f"{shown} must be {WORDS[hint]}")


def text_of(value: object) -> str:
    """Returns the beginning of a value as Python writes it, for a message."""
    try:
        return f"{value!r:.40}"
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; lists nested thousands deep
        return f"a value of type {type(value).__name__}"


def _require_probability(name: str, value: float) -> None:
    require(0.0 <= value <= 1.0, f"{name} {value} is not a probability; give a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Settings of one random view of an image.

    The operations, in this order: rotation, random resized crop, jitter, gray, flip, blur, solarize.

    A value of 0 for a probability, a strength or the rotation switches that operation off. data/views.py draws the
    numbers of each image.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Fraction of the image's area that a crop keeps: least and most."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop: least and most."""
    interpolation: Interpolation = "bicubic"
    """Resampling of the crop (antialiased)."""
    rotation_degrees: float = 0.0
    """Largest rotation either way, in degrees; for digits."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip; 0 for digits and letters."""
    jitter_probability: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed (in that order)."""
    brightness: float = 0.4
    """Largest change of the brightness factor, which is drawn from 1 - this to 1 + this."""
    contrast: float = 0.4
    """Largest change of the contrast factor, which is drawn from 1 - this to 1 + this."""
    saturation: float = 0.4
    """Largest change of the saturation factor, which is drawn from 1 - this to 1 + this."""
    hue: float = 0.1
    """Largest hue shift either way, in turns of the color wheel."""
    gray_probability: float = 0.2
    """Probability that the colors are dropped."""
    blur_probability: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels: least and most."""
    blur_kernel: int | None = None
    """Width of the blur's window in pixels (odd); None is the odd number nearest a tenth of the side, at least 5."""
    solarize_probability: float = 0.0
    """Probability that pixels of at least 0.5, of 0 to 1, are inverted (BYOL)."""

    def __post_init__(self) -> None:
        require_types(self)
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"crop_scale {self.crop_scale} must rise within (0, 1], as in 0.2 1.0")
        low, high = self.crop_ratio
        require(0 < low <= high, f"crop_ratio {self.crop_ratio} must be positive and rise, as in 0.75 1.3333")
        low, high = self.blur_sigma
        require(0 < low <= high, f"blur_sigma {self.blur_sigma} must be positive and rise, as in 0.1 2.0")
        require(0 <= self.rotation_degrees <= 180, f"rotation_degrees {self.rotation_degrees} must lie in 0..180")
        for setting in dataclasses.fields(self):
            if setting.name.endswith("_probability"):
                _require_probability(setting.name, getattr(self, setting.name))
        for name in ("brightness", "contrast", "saturation"):
            _require_probability(name, getattr(self, name))
        require(0 <= self.hue <= 0.5, f"hue {self.hue} must lie in 0..0.5 turns")
        kernel = self.blur_kernel
        require(kernel is None or (kernel >= 1 and kernel % 2 == 1), f"blur_kernel {kernel} must be odd, as in 5")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their size and their loader."""

    data_dir: Path | None = None
    """Folder of the data set's files; None looks in the data set's usual places."""
    download: bool = False
    """Fetch the data set into data_dir if it is missing."""
    skip_corrupt: bool = False
    """Skip image files that cannot be read, with a warning; otherwise they are an error."""
    image_size: int | None = None
    """Side of a view in pixels (even); None is the data set's own side, made even."""
    train_images: int | None = None
    """Pre-train on this many images, a fixed random choice; None takes all."""
    validation_images: int = 0
    """Hold out this many training images (a fixed random choice) for choosing settings."""
    shuffle_block: int | None = None
    """Shuffle in blocks of this many consecutive images, four blocks together, for images that are far away; None
    shuffles all images together."""
    loader: LoaderName = "auto"
    """dali: NVIDIA DALI. resident: all images on the device and one fused kernel, up to 64 x 64. reference:
    torchvision, slow. auto: on a CPU, resident up to 32 x 32 and dali above; on a GPU, the faster of the two."""
    loader_threads: int = 2
    """CPU threads of the loader; of dali at most four per core."""

    def __post_init__(self) -> None:
        require_types(self)
        side = self.image_size
        require(
            side is None or (8 <= side <= MOST_PIXELS and side % 2 == 0),
            f"image_size {side} must be even, at least 8 and at most {MOST_PIXELS}: the 2 x 2 division needs an even "
            "side",
        )
        require(
            self.train_images is None or self.train_images > 0,
            f"train_images {self.train_images} must be positive; leave it out to take all",
        )
        require(self.validation_images >= 0, f"validation_images {self.validation_images} must be 0 or more")
        block = self.shuffle_block
        require(
            block is None or block >= 1,
            f"shuffle_block {block} must be positive, as in 1000; leave it out to shuffle all images together",
        )
        threads = self.loader_threads
        require(1 <= threads <= MOST_THREADS, f"loader_threads {threads} must lie in 1..{MOST_THREADS}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and the two heads."""

    encoder: str = "resnet18"
    """resnet18, resnet34, resnet50, or timm:NAME for a model of timm that gives pooled features, as
    timm:convnext_tiny."""
    init: str | None = None
    """Weights that the encoder starts from: a run directory, a .safetensors or .pt file with torchvision's or timm's
    names, or torchvision for its pretrained weights. None takes random weights."""
    stem: Stem = "cifar"
    """cifar: 3 x 3, stride 1, no max-pool. imagenet: 7 x 7, stride 2, max-pool. Of a ResNet, not of timm's models."""
    width: int = 64
    """Channels of a ResNet's first stage; the features are 8 times as wide (F), of resnet50 32 times."""
    projector_width: int = 2048
    """Width of the projector's three layers: D of the embeddings."""
    predictor_width: int = 512
    """Width of the predictor's hidden layer."""
    classes: int | None = None
    """Outputs of the supervised classifier; None takes the number of the data set's classes."""
    sync_batch_norm: Literal["on", "off"] = "on"
    """Batch statistics of the whole batch, over all ranks of a run. off: each rank takes those of its own images, which
    saves messages and gives other results for each number of ranks; running statistics are means over ranks."""

    def __post_init__(self) -> None:
        require_types(self)
        name = self.encoder.removeprefix(TIMM)
        require(
            self.encoder in RESNETS or (self.encoder != name and not {*name} & {":", "/", " "} and name != ""),
            f"encoder {self.encoder!r} is none of {', '.join(RESNETS)} and timm:NAME, as in timm:convnext_tiny",
        )
        require(
            self.init != TORCHVISION or (self.stem, self.width) == ("imagenet", 64),
            f"init torchvision is for stem imagenet and width 64, and here they are {self.stem} and {self.width}; give "
            "--stem imagenet --width 64",
        )
        require(self.init != "", "init '' names nothing; give a run, a file or torchvision, or leave it out")
        for name in ("width", "projector_width", "predictor_width"):
            value = getattr(self, name)
            require(1 <= value <= MOST_WIDTH, f"{name} {value} must lie in 1..{MOST_WIDTH}")
        classes = self.classes
        require(classes is None or 2 <= classes <= MOST_WIDTH, f"classes {classes} must lie in 2..{MOST_WIDTH}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Settings of the losses, the momentum network and the queue (paper, section 3 and Table 2)."""

    temperature: float = 1.0
    """tau, by which the contrastive loss divides cosine similarities."""
    ema_momentum: float = 0.99
    """m of the momentum network's moving average: theta_m <- m theta_m + (1 - m) theta_o."""
    ema_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: m rises to 1 over the run as 1 - (1 - m) (cos(pi k / K) + 1) / 2, for step k of K (BYOL)."""
    queue_size: int = 16384
    """K, the number of rows of the feature queue."""
    queue_dtype: Literal["autocast", "float32"] = "autocast"
    """Storage of the queue's unit-norm rows; float32 for exact comparisons."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 6.0
    """lambda, the weight of loss_m beside loss_s (equation 7, Table 4)."""
    k: int = 2
    """k, patches per combination, 1 to 4 (Table 6)."""
    one_embedding: bool = False
    """Contrast one random combination per step instead of all C(4, k) (Table 5)."""

    def __post_init__(self) -> None:
        require_types(self)
        require(self.temperature > 0, f"temperature {self.temperature} must be positive; the paper uses 1.0")
        require(0 <= self.ema_momentum <= 1, f"ema_momentum {self.ema_momentum} must lie in 0..1; the paper uses 0.99")
        require(self.queue_size >= 1, f"queue_size {self.queue_size} must be at least 1")
        require(self.lambda_ >= 0, f"lambda {self.lambda_} must be 0 or more; the paper uses 6")
        require(self.k in (1, 2, 3, 4), f"k {self.k} must be 1, 2, 3 or 4: an image has four patches")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule: linear warm-up, then a cosine to 0 (Table 2)."""

    optimizer: str = "sgd"
    """sgd: SGD with momentum. lars: LARS, for large batches; biases and norms are neither adapted nor decayed."""

    epochs: int = 200
    """Passes over the training images."""
    extended_from: tyro.conf.Suppress[tuple[int, ...]] = ()
    """Epochs at which the run was finished before train --extend; written by the run, not given."""
    batch_size: int = 256
    """N, images per step; an epoch's last incomplete batch is dropped."""
    lr: float = 0.1
    """Learning rate at the top of the schedule, which falls to 0 as a cosine."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine; the paper has none."""
    sgd_momentum: float = 0.9
    """Momentum of the optimizer."""
    weight_decay: float = 1e-4
    """Weight decay of every parameter."""
    constant_predictor_lr: bool = False
    """Train the predictor at --lr throughout, without warm-up and cosine (SimSiam)."""
    clip_norm: float | None = None
    """Largest L2 norm of all gradients together; larger ones are scaled down to it. None does not clip."""

    def __post_init__(self) -> None:
        require_types(self)
        require(self.epochs >= 1, f"epochs {self.epochs} must be at least 1")
        ends = (0, *self.extended_from, self.epochs)
        require(
            all(a < b for a, b in pairwise(ends)),
            f"extended_from {self.extended_from} must rise from 1 to less than epochs {self.epochs}",
        )
        require(self.batch_size >= 2, f"batch_size {self.batch_size} must be at least 2: batch norm needs two images")
        require(self.lr > 0, f"lr {self.lr} must be positive and finite; the paper uses 0.1")
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}",
        )
        require(0 <= self.sgd_momentum < 1, f"sgd_momentum {self.sgd_momentum} must lie in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay {self.weight_decay} must be 0 or more")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm {self.clip_norm} must be positive and finite; leave it out to clip nothing",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Execution of the run: no setting here changes the results, up to rounding."""

    device: Device = "auto"
    """auto is cuda if torch sees a GPU."""
    precision: Precision = "auto"
    """auto is bf16 autocast if the device multiplies bf16 in hardware, else fp32. fp16 uses loss scaling, for GPUs
    without bf16."""
    channels_last: bool = True
    """Store weights and images with channels innermost, the layout that tensor cores read."""
    tf32: bool = True
    """Multiply in TF32 in an fp32 run on a GPU (cuDNN and cuBLAS)."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its algorithms for each convolution and take the fastest, on a GPU."""
    deterministic: bool = False
    """Compute the same bits in every run on the same machine, on a GPU too: deterministic algorithms, nothing chosen
    by timing (--choices auto then means safe). The start prints what it costs. On a CPU runs have the same bits
    anyway."""
    keep_memory: bool = True
    """Keep the memory that a step freed for the next step, on a CPU (Linux)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the encoder's residual blocks and recompute the rest in backward: a third more forward
    work, for a larger batch."""
    kernels: KernelPolicy = "auto"
    """auto: Triton kernels that pass the self-check. require: error if one fails. off: PyTorch only."""
    lookup: Lookup = "auto"
    """Nearest-neighbor lookup. auto: our operator. faiss: FAISS."""
    compile: Switch = "auto"
    """Compile the forward as one graph of torch.compile, which takes minutes before the first step. auto: on a GPU."""
    graphs: Graphs = "auto"
    """Replay CUDA graphs: of the compiled forward and backward, or of the whole step, augmentation included, with the
    loader resident. auto: as --choices decides, if replays of the first batch are bit-equal to the compiled step. on:
    of forward and backward. step: of the whole step. Both: error if replays are not equal."""
    combo_kernels: Switch = "auto"
    """Merge kernels of a compiled step that do not depend on each other into one launch, on a GPU. auto: as --choices
    decides."""
    half_sums: Switch = "auto"
    """Compute forwards without gradient in fp16, with convolutions that sum in fp16, which a GeForce does at twice the
    rate (needs nvidia-cudnn-frontend). auto: as --choices decides."""
    half_sums_online: HalfSums = "off"
    """Sum in fp16 in the online network of a run in fp16 too: its forward, the gradient of a convolution's input, or
    both. The gradient of the weights is always summed in fp32."""
    choices: Choices = "auto"
    """Parts of a compiled step on a GPU: our batch norm, combo kernels, fused convolutions without gradient, CUDA
    graphs. safe: none of them. all: each that can run here. auto: the first start on a machine times both and compares
    their errors, which takes minutes, and later ones take what it found. An option that names a part overrides this."""
    reduce_dtype: ReduceDtype = "fp32"
    """Dtype in which ranks send each other the gradients of the weights; bf16 halves the bytes and rounds each sum."""
    rank_timeout: float = 600.0
    """Seconds that a rank waits for the others before the run ends and names the one that does not answer."""
    log_every: int = 10
    """Steps between two records of metrics."""
    loggers: tuple[LoggerName, ...] = ("auto",)
    """Programs that show the run, beside its metrics.jsonl: tensorboard, wandb (offline), mlflow (SQLite), each an
    extra to install. auto: TensorBoard if it is installed. No name after --loggers: none."""
    save_every: float = 1.0
    """Epochs between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep besides the milestones."""
    keep_every: int | None = None
    """Epochs between two milestones, checkpoints that are never deleted (Table 5: 50)."""
    knn_every: int | None = None
    """Epochs between two k-NN evaluations during training, and one at its end; of the validation images, else the test
    images. It needs labels, and changes no number of the training. None makes none."""

    def __post_init__(self) -> None:
        require_types(self)
        require(
            self.graphs not in ("on", "step") or self.compile != "off",
            f"graphs {self.graphs} replays what compile made, and compile is off; take --compile auto, or --graphs off",
        )
        require(
            self.combo_kernels != "on" or self.compile != "off",
            "combo_kernels on merges kernels of what compile made, and compile is off; take --compile auto, or "
            "--combo-kernels auto",
        )
        require(
            self.half_sums != "on" or self.compile != "off",
            "half_sums on is a part of a compiled step, and compile is off; take --compile auto, or --half-sums auto",
        )
        require(
            self.half_sums_online == "off" or self.precision == "fp16",
            f"half_sums_online {self.half_sums_online} is for runs in fp16, and precision is {self.precision}; take "
            "--precision fp16, or --half-sums-online off",
        )
        require(
            self.lookup == "auto" or self.graphs not in ("on", "step"),
            f"lookup {self.lookup} cannot be in a CUDA graph; give --lookup auto, or --graphs off",
        )
        require(
            not self.activation_checkpointing or (self.compile != "on" and self.graphs in ("auto", "off")),
            "activation_checkpointing and what is compiled exclude each other; leave --compile on and --graphs "
            f"{'step' if self.graphs == 'step' else 'on'} out",
        )
        require(
            0 < self.rank_timeout <= MOST_SECONDS,
            f"rank_timeout {self.rank_timeout} must be positive and at most {MOST_SECONDS} (23 days), as in 600",
        )
        require(self.log_every >= 1, f"log_every {self.log_every} must be at least 1")
        require(self.save_every > 0, f"save_every {self.save_every} must be positive")
        require(self.keep_last >= 1, f"keep_last {self.keep_last} must be at least 1: resuming needs one")
        require(self.keep_every is None or self.keep_every >= 1, f"keep_every {self.keep_every} must be at least 1")
        require(self.knn_every is None or self.knn_every >= 1, f"knn_every {self.knn_every} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one pre-training run."""

    method: MethodName = "mnclglf"
    """Pre-training method: mnclglf is Algorithm 1 of the paper. Methods of other packages that are installed are
    listed too."""
    dataset: str = "cifar10"
    """Name of a data set (see above), or folder:PATH for image files of any size; shards:PATTERN for tar files of
    them, parquet:PATTERN for Parquet files."""
    recipe: RecipeName = "paper"
    """Named settings that the others start from. paper: Table 2. tuned: a method's own. quick: minutes on a CPU."""
    seed: int = 0
    """Seed of the weights, the views and the order of the images: the same seed gives the same run. (Two loaders differ
    by a few of 255 levels in some pixels, and on a GPU --loader auto takes the faster one.)"""
    data: DataConfig = field(default_factory=DataConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        require_types(self, but=("method",))
        require(
            self.method in (*METHOD_NAMES, *OTHER_METHODS) or is_class_name(str(self.method)),
            f"method {self.method!r} is none of {', '.join((*METHOD_NAMES, *OTHER_METHODS))}; if it is of a package of "
            f"its own, an entry point of {METHODS_GROUP}, install that package here",
        )
        require(0 <= self.seed < 2**32, f"seed {self.seed} must lie in 0..2**32 - 1")
        if self.model.encoder.startswith(TIMM):
            self._check_timm()
        milestones = self.engine.keep_every
        require(
            milestones is None or milestones <= self.optim.epochs,
            f"keep_every {milestones} is more than the run's {self.optim.epochs} epochs: no milestone would be kept",
        )

    def _check_timm(self) -> None:
        """Raises UsageError for what only our ResNets can do."""
        name, engine = self.model.encoder, self.engine
        require(self.model.init != TORCHVISION, f"init torchvision has no weights of {name}; give a file as --init")
        for option, asked in (
            ("--activation-checkpointing", engine.activation_checkpointing),
            ("--half-sums on", engine.half_sums == "on"),
            (f"--half-sums-online {engine.half_sums_online}", engine.half_sums_online != "off"),
        ):
            require(not asked, f"{option} is for our ResNets, and encoder is {name}; leave it out")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Settings common to everything that is measured on a run: its checkpoint and the images."""

    dataset: str | None = None
    """Data set to measure on, or folder:PATH, shards:PATTERN, parquet:PATTERN; None is the run's own. Its images are
    brought to the run's side and normalized as in the run's training."""
    checkpoint: Path | None = None
    """Checkpoint to take; None is the newest."""
    data_dir: Path | None = None
    """Folder of the data set's files; None is the run's own, or the usual places of --dataset."""
    skip_corrupt: bool = False
    """Skip image files that cannot be read, with a warning; otherwise they are an error."""
    device: Device = "auto"
    """auto is cuda where torch sees a GPU."""

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ImagesConfig):
    """Settings common to all evaluations of a run. Where --dataset has no test images, a fifth of each class is drawn
    for them, always the same."""

    split: Literal["test", "validation"] = "test"
    """Images to classify; validation: those that --validation-images held out."""
    milestones: bool = False
    """Evaluate each milestone (see --keep-every), only the pretrained encoder (Table 5)."""
    label_share: float = 1.0
    """Fraction of labels per class, e.g. 0.01; the run's seed chooses the subset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.dataset is None or self.split != "validation",
            f"split validation is of the run's own images, and dataset {self.dataset} names others; leave out --split "
            "or --dataset",
        )
        require(
            self.checkpoint is None or not self.milestones,
            f"milestones takes every checkpoint that was kept, and checkpoint {self.checkpoint} names one; give either",
        )
        require(0 < self.label_share <= 1, f"label_share {self.label_share} must lie in (0, 1], as in 0.1")


@dataclass(frozen=True, kw_only=True)
class QualityConfig(ImagesConfig):
    """Alignment, uniformity, effective rank and nearest neighbors of features, which need no labels."""

    images: int = 25600
    """Most images to measure, a fixed random choice of the test images; of a data set without, of those that
    --validation-images held out, else of the training images."""
    queries: int = 12
    """Rows of the page of nearest neighbors."""
    neighbors: int = 8
    """Neighbors of each query on the page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.images >= 2, f"images {self.images} must be at least 2: features are compared in pairs")
        for name in ("queries", "neighbors"):
            value = getattr(self, name)
            require(1 <= value <= 100, f"{name} {value} must lie in 1..100: each is a picture on the page")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluationConfig):
    """Weighted k-nearest-neighbor classification of frozen features."""

    neighbors: Annotated[int, tyro.conf.arg(aliases=("--k",))] = 20
    """Neighbors that vote."""
    vote_temperature: float = 0.07
    """Temperature of the votes."""
    raw_pixels: bool = True
    """Evaluate raw pixels too: 4 bytes per value in memory, 600 KB per image of 224 x 224."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.neighbors >= 1, f"neighbors {self.neighbors} must be at least 1, as 20")
        temperature = self.vote_temperature
        require(temperature > 0, f"vote_temperature {temperature} must be positive and finite, as in 0.07")


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(EvaluationConfig):
    """Logistic regression on frozen features computed once, on all labels and on 10 labels per class (if each class has
    that many); also of the untrained encoder and raw pixels."""

    raw_pixels: bool = True
    """Evaluate raw pixels too: 4 bytes per value in memory, 600 KB per image of 224 x 224."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(EvaluationConfig):
    """The paper's linear evaluation (section 4.1): one linear layer on frozen features, trained by LARS."""

    untrained: bool = False
    """Train a classifier on the untrained encoder's features too."""
    epochs: int = 90
    """Passes over the training images."""
    steps: int | None = None
    """Steps in place of --epochs, at least 5000 for few images; the paper's 90 epochs of 50,000 images are 17550."""
    batch_size: int = 256
    """Images per step; the default is lowered to the number of labeled images where there are fewer."""
    lr: float = 0.8
    """Learning rate of LARS at the start, which falls to 0 as a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.milestones and self.untrained),
            "milestones are of the pretrained encoder alone; leave out untrained",
        )
        require(self.epochs >= 1, f"epochs {self.epochs} must be at least 1; the paper uses 90")
        require(self.steps is None or self.steps >= 1, f"steps {self.steps} must be at least 1, as in 5000")
        require(
            self.steps is None or self.epochs == LinearConfig.epochs,
            f"epochs {self.epochs} and steps {self.steps} are both given; leave out --epochs or --steps",
        )
        require(self.batch_size >= 1, f"batch_size {self.batch_size} must be at least 1; the paper uses 256")
        require(self.lr > 0, f"lr {self.lr} must be positive and finite; the paper uses 0.8")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(EvaluationConfig):
    """Fine-tuning of the whole network, encoder and a linear classifier, by SGD with Nesterov momentum."""

    untrained: bool = False
    """Train the untrained encoder in the same way too: training from scratch, the baseline."""
    epochs: int = 30
    """Passes over the training images; with --label-share there are as many steps as with all labels."""
    steps: int | None = None
    """Steps in place of --epochs."""
    batch_size: int = 256
    """Images per step; the default is lowered to the number of labeled images where there are fewer."""
    lr: float = 0.05
    """Learning rate at the start, which falls to 0 as a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.milestones and self.untrained),
            "milestones are of the pretrained encoder alone; leave out untrained",
        )
        require(self.epochs >= 1, f"epochs {self.epochs} must be at least 1, as in 30")
        require(self.steps is None or self.steps >= 1, f"steps {self.steps} must be at least 1, as in 1000")
        require(
            self.steps is None or self.epochs == FinetuneConfig.epochs,
            f"epochs {self.epochs} and steps {self.steps} are both given; leave out --epochs or --steps",
        )
        require(self.batch_size >= 2, f"batch_size {self.batch_size} must be at least 2: batch norm needs two images")
        require(self.lr > 0, f"lr {self.lr} must be positive and finite, as in 0.05")


WRITTEN = {"extended_from"}
"""Settings that a run writes by itself, and that no option sets."""

SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "view": ViewConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "optim": OptimConfig,
    "engine": EngineConfig,
}
"""Fields of RunConfig that hold further settings, and their types."""


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Returns the run with paths of images and weights that hold in any directory, as `kept_path` makes them."""
    init = config.model.init
    if init not in (None, TORCHVISION):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=kept_path(init)))
    if config.data.data_dir is not None:
        data_dir = Path(kept_path(config.data.data_dir))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir))
    return dataclasses.replace(config, dataset=kept_name(config.dataset))


def kept_path(given: str | Path) -> str:
    """Returns a path that holds in any directory, without the home's name unless that was given.

    An absolute path is given as it is, less links and dots; another one in the home begins with ~.
    """
    if os.path.isabs(given):
        return os.path.realpath(given)
    whole, home = Path(given).expanduser().resolve(), Path(os.path.expanduser("~"))
    inside = home.is_absolute() and whole.is_relative_to(home.resolve())
    return str(Path("~") / whole.relative_to(home.resolve())) if inside else str(whole)


def kept_name(dataset: str) -> str:
    """Returns the name of a data set, of one that is a place with the path that is kept of it."""
    prefix, place = split_name(dataset)
    if not prefix or is_remote(place):
        return dataset
    if prefix == FOLDER:
        return prefix + kept_path(place)
    # The last part of a pattern is no file, and its folder may be a link that is to stay.
    return prefix + (os.path.abspath(place) if os.path.isabs(place) else kept_path(place))


def is_remote(place: str) -> bool:
    """Returns whether a place is an address, such as s3://bucket/train.tar, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def shown(text: str) -> str:
    """Returns a text, up to an address in it, without what is secret in that: user, password and query."""
    address = re.search(r"[A-Za-z][A-Za-z0-9+.-]+://", text)
    if address is None:
        return text
    host, slash, path = text[address.end() :].partition("?")[0].partition("/")
    return f"{text[: address.end()]}{host.rpartition('@')[2]}{slash}{path}"


def shown_in(text: str) -> str:
    """Returns a text, such as a message of a library, without what is secret in the addresses in it."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]+", lambda address: shown(address[0]), text)


def whole_name(dataset: str) -> str:
    """Returns the name of a data set, of one that is a place with its absolute path."""
    prefix, place = split_name(dataset)
    if not prefix or is_remote(place):
        return dataset
    path = Path(place).expanduser()
    return f"{prefix}{path.resolve() if prefix == FOLDER else os.path.abspath(path)}"


def split_name(dataset: str) -> tuple[str, str]:
    """Returns prefix and place of a data set that is a place, as ("folder:", "photos"); ("", name) of another."""
    prefix = next((prefix for prefix in PLACED if dataset.startswith(prefix)), "")
    return prefix, dataset.removeprefix(prefix)


def moved(dataset: str, place: Path) -> str:
    """Returns the name of a data set that is a place after its files were moved into the folder `place`.

    A pattern keeps its last part: shards:/old/train-*.tar becomes shards:/new/train-*.tar.
    """
    prefix, old = split_name(dataset)
    last = old.rstrip("/").rpartition("/")[2]
    return f"{prefix}{place / last if last.endswith(PATTERN_ENDS) else place}"


def short_name(dataset: str) -> str:
    """Returns the name of a data set or a method for use in file names; for folder:PATH the last part of the path."""
    prefix, place = split_name(dataset)
    if prefix == FOLDER:
        return f"folder-{Path(place).resolve().name}"
    if prefix:
        last = place.partition("?")[0].rstrip("/").rpartition("/")[2]
        last = Path(place).resolve().name if last in ("", ".", "..") else last
        last = next((last.removesuffix(end) for end in PATTERN_ENDS if last.endswith(end)), last)
        plain = re.sub(r"[^\w.-]+", "-", last).strip("-.")
        return f"{prefix[:-1]}-{plain}"
    return dataset.rpartition(":")[2]  # of object:CLASS and MODULE:CLASS the class


def default_folder(config: RunConfig) -> Path:
    """Returns the default run directory of a run."""
    return Path("runs") / f"{short_name(config.method)}-{short_name(config.dataset)}-{config.recipe}-seed{config.seed}"


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as plain JSON types, to be written: the address of images without what is secret."""
    values = converter().unstructure(config)
    if is_remote(split_name(config.dataset)[1]):
        values["dataset"] = shown(config.dataset)
    return values


def from_dict(values: object) -> RunConfig:
    """Returns the configuration from the values of `to_dict`, of this or an earlier version.

    Raises:
        UsageError: a section is missing, a setting does not exist, or a value cannot work.
    """
    given = require_mapping(values, "a run")
    check_names(given, [made.name for made in dataclasses.fields(RunConfig)], "a run")
    for name, section in SECTIONS.items():
        require(name in given, f"the section {name} of a run is missing; give all of {', '.join(SECTIONS)}")
        settings = require_mapping(given[name], f"the section {name}")
        check_names(settings, [made.name for made in dataclasses.fields(section)], f"the section {name}")
    return made_of(RunConfig, given)


Settings = TypeVar("Settings")


def made_of(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Returns settings from plain values: lists become tuples, text a path, NumPy's numbers Python's.

    Raises:
        UsageError: a value cannot work.
    """
    return converter().structure(values, kind)


@cache
def converter() -> cattrs.Converter:
    """Returns what converts settings to plain values and back; a value of a wrong type is left to `require_types`."""
    made = cattrs.Converter(detailed_validation=False)

    def as_given(value: Any, _: Any) -> Any:
        return value.item() if hasattr(value, "item") else value  # a number of NumPy

    def one_of(value: Any, hint: Any) -> Any:
        # True and False are a switch's on and off in JSON, in YAML 1.1, and in the config.json of earlier versions.
        return {True: "on", False: "off"}[value] if hint is Switch and isinstance(value, bool) else value

    for kind in (bool, int, float, str):
        made.register_structure_hook(kind, as_given)
    made.register_structure_hook_func(lambda hint: get_origin(hint) is Literal, one_of)
    made.register_structure_hook_func(
        lambda hint: get_origin(hint) is tuple,
        lambda value, _: tuple(cast("list[Any]", value)) if isinstance(value, list) else value,
    )
    made.register_structure_hook(Path, lambda value, _: Path(value) if isinstance(value, str | os.PathLike) else value)
    made.register_unstructure_hook(Path, str)
    return made


def require_mapping(values: object, owner: str) -> Mapping[str, Any]:
    """Returns `values` if they are settings by name.

    Raises:
        UsageError: they are something else.
    """
    require(isinstance(values, Mapping), f"{text_of(values)} is no set of settings of {owner}; give names and values")
    return cast("Mapping[str, Any]", values)


def check_names(settings: Collection[str], known: Collection[str], owner: str) -> None:
    """Raises UsageError, with near matches, unless all settings are known."""
    for name in settings:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        require(name in known, f"{name!r} is no setting of {owner}; {hint}")
