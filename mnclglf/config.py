"""Settings of runs and evaluations: typed, frozen, checked when they are made. Imports nothing of ours.

A RunConfig comes from a recipe (recipes.py) and the options of the command line. `to_dict` and `from_dict` convert it
to JSON types and back. An invalid value raises ValueError, which names the value and the remedy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_type_hints

import tyro

NO_METHODS = {"__init__", "base"}  # files of methods/ that hold no method
# Each method's file has the method's name, so the names are known without importing the methods, and with them torch.
METHOD_NAMES = tuple(
    sorted(path.stem for path in (Path(__file__).parent / "methods").glob("*.py") if path.stem not in NO_METHODS)
)
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[METHOD_NAMES]  # so that --help lists them, and another name is refused
RecipeName = Literal["paper", "tuned", "quick"]
LoaderName = Literal["auto", "dali", "resident", "reference"]
Interpolation = Literal["bilinear", "bicubic"]
Stem = Literal["cifar", "imagenet"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Switch = Literal["auto", "on", "off"]
Device = Literal["auto", "cuda", "cpu"]
KernelPolicy = Literal["auto", "require", "off"]
Lookup = Literal["auto", "faiss"]
Choices = Literal["auto", "safe", "all"]
HalfSums = Literal["off", "forward", "input-gradient", "both"]

MOST_COUNT = 2**32 - 1
MOST_FLOAT = (2 - 2**-23) * 2.0**127  # of fp32, in which a run computes
MOST_PIXELS = 8192  # side of a view
MOST_THREADS = 1024

FOLDER = "folder:"
"""Prefix of a data set's name that stands for a folder of image files: folder:PATH."""


class UsageError(ValueError):
    """A setting does not work as it was given, by itself or for this run; the command line exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raises UsageError with `message`, which names the value and the remedy, unless the condition holds."""
    if not condition:
        raise UsageError(message)


def require_numbers(settings: Any) -> None:
    """Raises ValueError unless every number among a dataclass's fields is finite, and every count whole and bounded."""
    for name, hint in get_type_hints(type(settings)).items():
        kinds = {hint, *get_args(hint)}
        value: Any = getattr(settings, name)
        if not kinds & {int, float} or (value is None and type(None) in kinds):
            continue
        kind, most, wanted = (int, MOST_COUNT, "whole") if int in kinds else (int | float, MOST_FLOAT, "finite")
        numbers = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
        for number in numbers:
            right = isinstance(number, kind) and not isinstance(number, bool) and abs(number) <= most
            require(right, f"{name.rstrip('_')} {value!s:.40} must be a {wanted} number, at most {most:.10g}")


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
        require_numbers(self)
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
    loader: LoaderName = "auto"
    """dali: NVIDIA DALI. resident: all images on the device and one fused kernel, up to 64 x 64. reference:
    torchvision, slow. auto: on a CPU, resident up to 32 x 32 and dali above; on a GPU, the faster of the two."""
    loader_threads: int = 2
    """CPU threads of the loader."""

    def __post_init__(self) -> None:
        require_numbers(self)
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
        threads = self.loader_threads
        require(1 <= threads <= MOST_THREADS, f"loader_threads {threads} must lie in 1..{MOST_THREADS}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder (ResNet-18) and the two heads."""

    stem: Stem = "cifar"
    """cifar: 3 x 3, stride 1, no max-pool. imagenet: 7 x 7, stride 2, max-pool."""
    width: int = 64
    """Channels of the first stage; the features are 8 times as wide (F)."""
    projector_width: int = 2048
    """Width of the projector's three layers: D of the embeddings."""
    predictor_width: int = 512
    """Width of the predictor's hidden layer."""
    classes: int | None = None
    """Outputs of the supervised classifier; None takes the number of the data set's classes."""

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("width", "projector_width", "predictor_width"):
            value = getattr(self, name)
            require(value >= 1, f"{name} {value} must be at least 1")
        require(self.classes is None or self.classes >= 2, f"classes {self.classes} must be at least 2")


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
        require_numbers(self)
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
        require_numbers(self)
        require(self.epochs >= 1, f"epochs {self.epochs} must be at least 1")
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
    graphs: Switch = "auto"
    """Replay CUDA graphs of the compiled forward. auto: if replays of the first batch are bit-equal to the
    compiled step. on: error if they are not."""
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
    their errors, which takes minutes, and later ones take what it found. Where an option names a part, that holds."""
    log_every: int = 10
    """Steps between two records of metrics."""
    save_every: float = 1.0
    """Epochs between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep besides the milestones."""
    keep_every: int | None = None
    """Epochs between two milestones, checkpoints that are never deleted (Table 5: 50)."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(
            self.graphs != "on" or self.compile != "off",
            "graphs on replays what compile made, and compile is off; take --compile auto, or --graphs off",
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
            self.lookup == "auto" or self.graphs != "on",
            f"lookup {self.lookup} cannot be in a CUDA graph; give --lookup auto, or --graphs off",
        )
        require(
            not self.activation_checkpointing or "on" not in (self.compile, self.graphs),
            "activation_checkpointing and what is compiled exclude each other; leave --compile on and --graphs on out",
        )
        require(self.log_every >= 1, f"log_every {self.log_every} must be at least 1")
        require(self.save_every > 0, f"save_every {self.save_every} must be positive")
        require(self.keep_last >= 1, f"keep_last {self.keep_last} must be at least 1: resuming needs one")
        require(self.keep_every is None or self.keep_every >= 1, f"keep_every {self.keep_every} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one pre-training run."""

    method: MethodName = "mnclglf"
    """Pre-training method: mnclglf is Algorithm 1 of the paper."""
    dataset: str = "cifar10"
    """Name of a data set (see above), or folder:PATH for image files of any size."""
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
        require_numbers(self)
        require(self.method in METHOD_NAMES, f"method {self.method!r} is none of {', '.join(METHOD_NAMES)}")
        require(0 <= self.seed < 2**32, f"seed {self.seed} must lie in 0..2**32 - 1")
        milestones = self.engine.keep_every
        require(
            milestones is None or milestones <= self.optim.epochs,
            f"keep_every {milestones} is more than the run's {self.optim.epochs} epochs: no milestone would be kept",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings common to all evaluations of a run."""

    split: Literal["test", "validation"] = "test"
    """Images to classify; validation: those that --validation-images held out."""
    checkpoint: Path | None = None
    """Checkpoint to evaluate; None is the newest."""
    milestones: bool = False
    """Evaluate each milestone (see --keep-every), only the pretrained encoder (Table 5)."""
    label_share: float = 1.0
    """Fraction of labels per class, e.g. 0.01; the run's seed chooses the subset."""
    data_dir: Path | None = None
    """Folder of the data set's files; None is the run's own."""
    device: Device = "auto"
    """auto is cuda where torch sees a GPU."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(
            self.checkpoint is None or not self.milestones,
            f"milestones takes every checkpoint that was kept, and checkpoint {self.checkpoint} names one; give either",
        )
        require(0 < self.label_share <= 1, f"label_share {self.label_share} must lie in (0, 1], as in 0.1")


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
    """Returns the run with absolute paths of its images, so that it can be evaluated from any directory."""
    if config.data.data_dir is not None:
        data_dir = config.data.data_dir.expanduser().resolve()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir))
    if not config.dataset.startswith(FOLDER):
        return config
    path = Path(config.dataset.removeprefix(FOLDER)).expanduser().resolve()
    return dataclasses.replace(config, dataset=f"{FOLDER}{path}")


def short_name(dataset: str) -> str:
    """Returns the name of a data set for use in file names; for folder:PATH the last part of the path."""
    return f"folder-{Path(dataset.removeprefix(FOLDER)).resolve().name}" if dataset.startswith(FOLDER) else dataset


def default_folder(config: RunConfig) -> Path:
    """Returns the default run directory of a run."""
    return Path("runs") / f"{config.method}-{short_name(config.dataset)}-{config.recipe}-seed{config.seed}"


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as plain JSON types."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items}
    )


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Returns the configuration from the values of `to_dict`; unknown names raise TypeError.

    JSON has no tuples and no paths: lists become tuples and data_dir a Path again.
    """
    made = dict(values)
    for name, section in SECTIONS.items():
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()}
        if isinstance(combo := settings.get("combo_kernels"), bool):  # of an earlier version
            settings["combo_kernels"] = "on" if combo else "off"
        if settings.get("data_dir") is not None:
            settings["data_dir"] = Path(settings["data_dir"])
        made[name] = section(**settings)
    return RunConfig(**made)
