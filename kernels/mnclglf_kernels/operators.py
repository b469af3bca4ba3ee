"""The table of operators: everything that is done for each operator iterates over it.

An operator has four files: `ops/<name>.py` (contract, PyTorch form, choice of a backend), `_triton/<name>.py` (kernels,
launches, their traffic and tiles), its test, and its row here. The row is all that exports, `Backends`, the self-check
before a run, the ahead-of-time compiler, tuning, the traffic counts and the tests' parametrization need. The how-to
guide is docs/howto/add-an-operator.md.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import comb
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mnclglf_kernels.backend import Backend, Kind
from mnclglf_kernels.ops.augment import LARGEST_SIDE, PARAMETERS, ViewFormat, augment
from mnclglf_kernels.ops.batch_norm import batch_norm
from mnclglf_kernels.ops.combine import combine
from mnclglf_kernels.ops.contrastive_losses import contrastive_loss, contrastive_losses
from mnclglf_kernels.ops.convolution import Convolved, conv2d, convolution, normalized
from mnclglf_kernels.ops.divide import divide
from mnclglf_kernels.ops.enqueue import enqueue
from mnclglf_kernels.ops.nearest_neighbor import nearest_neighbor
from mnclglf_kernels.ops.nt_xent import nt_xent
from mnclglf_kernels.ops.queue_contrastive_loss import queue_contrastive_loss
from mnclglf_kernels.sizes import PAPER, Sizes

if TYPE_CHECKING:
    from mnclglf_kernels._triton.launch import Launch
    from mnclglf_kernels._triton.tiles import Tuning

OperatorName = str  # a key of OPERATORS
Arguments = dict[str, Any]  # arguments of an operator by name, without the backend
TEMPERATURE = 0.1
META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Example:
    """Sizes, dtypes and device of an example call, from which a row makes its operator's arguments.

    Attributes:
        sizes: sizes of the training step.
        dtype: dtype of images, features and embeddings.
        queue_dtype: dtype of the queue's rows; None for `dtype`.
        device: device of the arguments; on the meta device they have shapes but no values.
        generator: CPU generator of the random numbers; None for PyTorch's default.
        one_embedding: true to contrast one of the S combinations instead of all.
        splits: S of each pair for contrastive_losses; None for those of MNCLGLF.
        rank, ranks: process of the run and their number, each with the images of `sizes`.
    """

    sizes: Sizes = PAPER
    dtype: torch.dtype = torch.bfloat16
    queue_dtype: torch.dtype | None = None
    device: torch.device = META
    generator: torch.Generator | None = None
    one_embedding: bool = False
    splits: Sequence[int] | None = None
    rank: int = 0
    ranks: int = 1

    @property
    def part(self) -> Arguments:
        """The keywords of a loss whose candidates come from several ranks."""
        return dict(rank=self.rank, ranks=self.ranks) if self.ranks > 1 else {}

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns normally distributed numbers; on the meta device none are drawn."""
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Returns uniform fp32 numbers from 0 to 1; on the meta device none are drawn."""
        if self.device.type == "meta":
            return torch.empty(shape, device=self.device)
        return torch.rand(shape, generator=self.generator).to(self.device)

    def queue(self, common: Tensor | float = 0.0) -> Tensor:
        """Returns [K, D] unit rows. With a tensor `common`, all of them resemble it and each other."""
        rows = self.random(self.sizes.queue, self.sizes.width, dtype=torch.float32)
        rows = common + (rows / 2 if isinstance(common, Tensor) else rows)
        return F.normalize(rows).to(self.queue_dtype or self.dtype)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limit of the error against fp64: max(roundings * eps of the dtype, floor) times the greatest true value."""

    roundings: float
    floor: float

    def excess(self, name: str, actual: Tensor, truth: Tensor) -> str | None:
        """Returns a description of the error if it exceeds the limit, else None."""
        kind = torch.finfo(actual.dtype)
        relative = max(self.roundings * kind.eps, self.floor)
        limit = relative * truth.abs().max().item() + kind.smallest_normal * kind.eps
        error = (actual.double() - truth).abs().max().item()
        if error <= limit:  # False for NaN
            return None
        return f"{name} is off by {error:.3g}, more than {limit:.3g}"


EXACT = Tolerance(roundings=0, floor=0)
# 4 roundings: one each for the product of operands, the sum, the norm and the result. 1e-4: at the paper's sizes fp32
# sums of up to 16,384 terms stay below it (tests/kernels/test_self_check.py); a wrong sign, mask or factor exceeds it.
SUMS = Tolerance(roundings=4, floor=1e-4)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One row of the table.

    Attributes:
        function: public operator, with the keyword `backend`.
        kind: kind of operator, which decides the possible backends; see `resolve`.
        inputs: makes the arguments of a call. The self-check differentiates those that require a gradient.
        tolerance: tolerance of the self-check.
        variants: changes of the example's arguments for each call of the self-check, where a run makes several kinds.
        check: custom self-check, for results that cannot be compared element by element. It returns None for a pass.
        exports: further public functions of the same file.
    """

    function: Callable[..., Any]
    kind: Kind
    inputs: Callable[[Example], Arguments]
    tolerance: Tolerance = SUMS
    variants: tuple[Arguments, ...] = ({},)
    check: Callable[[Example, Arguments], str | None] | None = None
    exports: tuple[Callable[..., Any], ...] = ()

    @property
    def name(self) -> OperatorName:
        return self.function.__name__

    def launches(self, example: Example, arch: int = 86) -> list[Launch]:
        """Returns the launches of a call and of its backward pass for sm_`arch`; on the meta device they cannot run."""
        return self._triton().launches(**_detached(self.inputs(example)), arch=arch)

    def tunings(self, example: Example) -> Iterator[Tuning]:
        """Yields the kernel families of this operator with a tile to measure, ready to run on a GPU."""
        if hasattr(self._triton(), "tunings"):
            yield from self._triton().tunings(**_detached(self.inputs(example)))

    def _triton(self) -> Any:
        return import_module(f"mnclglf_kernels._triton.{self.name}")  # imported late: it needs triton


def _detached(arguments: Arguments) -> Arguments:
    return tree_map_only(Tensor, Tensor.detach, arguments)


def _divide(example: Example) -> Arguments:
    side = example.sizes.side
    images = example.random(example.sizes.images, 3, side, side)
    return dict(images=images.contiguous(memory_format=torch.channels_last).requires_grad_())


def _combine(example: Example) -> Arguments:
    features = example.random(4 * example.sizes.images, example.sizes.features)
    return dict(features=features.requires_grad_(), k=example.sizes.k)


def _contrastive_losses(example: Example) -> Arguments:
    """Makes rows that resemble each other, and their positives even more, so that every part of the gradient shows.

    On random rows a backward without its radial part is off by 3%, on these by half.
    """
    n, width, queue_dtype = example.sizes.images, example.sizes.width, example.queue_dtype or example.dtype
    subsets = 1 if example.one_embedding else comb(4, example.sizes.k)
    combined, looked_up = (subsets, example.dtype), (1, queue_dtype)
    kinds = [combined, combined, looked_up, looked_up]
    if example.splits:
        kinds = [(split, example.dtype) for split in example.splits]
    common = example.random(1, width)
    pairs: list[tuple[Tensor, Tensor]] = []
    for split, dtype in kinds:
        predictions = common + example.random(example.ranks * n, width) / 2
        positives = predictions[example.rank * n : (example.rank + 1) * n]
        targets = positives.repeat(split, 1) + example.random(split * n, width) / 2
        pairs.append((targets.to(dtype).requires_grad_(), predictions.requires_grad_()))
    return dict(pairs=pairs, temperature=TEMPERATURE, **example.part)


def _nearest_neighbor(example: Example) -> Arguments:
    return dict(queries=example.random(2 * example.sizes.images, example.sizes.width), queue=example.queue())


def _check_nearest_neighbor(example: Example, arguments: Arguments) -> str | None:
    """Compares the scores at the indices, since two rows may be equally near to within rounding."""
    queries, queue = arguments["queries"], arguments["queue"]
    nearest = nearest_neighbor(queries, queue, backend="triton")
    if not ((nearest >= 0) & (nearest < len(queue))).all():
        return "a row is outside the queue"
    truth = nearest_neighbor(queries.double(), queue.double(), backend="torch")
    score, best = (torch.linalg.vecdot(queries.double(), queue[rows].double()) for rows in (nearest, truth))
    return SUMS.excess("the score", score.float(), best)


def _enqueue(example: Example) -> Arguments:
    n, size = example.ranks * example.sizes.images, example.sizes.queue
    return dict(
        queue=torch.zeros(size, example.sizes.width, dtype=example.queue_dtype or example.dtype, device=example.device),
        pointer=torch.tensor(size - n // 2 - 1, device=example.device),  # half of the rows wrap past the ring's end
        rows=example.random(n, example.sizes.width),
        should_update=torch.tensor(True, device=example.device),
    )


def _check_enqueue(example: Example, arguments: Arguments) -> str | None:
    """Compares queue and pointer after a call with the gate open and one with the gate closed."""
    queue, pointer, rows, gate = arguments.values()
    expected, expected_pointer = queue.double(), pointer.clone()
    for should_update in (gate, ~gate):
        enqueue(queue, pointer, rows, should_update=should_update, backend="triton")
        enqueue(expected, expected_pointer, rows.double(), should_update=should_update, backend="torch")
    if pointer != expected_pointer:
        return f"the pointer is {pointer.item()}, not {expected_pointer.item()}"
    return SUMS.excess("a row", queue, expected)


def _nt_xent(example: Example) -> Arguments:
    n, width = example.ranks * example.sizes.images, example.sizes.width
    first = example.random(1, width) + example.random(n, width) / 2  # as in _contrastive_losses
    second = first + example.random(n, width) / 2
    sides = dict(first=first.requires_grad_(), second=second.requires_grad_())
    return dict(**sides, temperature=TEMPERATURE, **example.part)


def _queue_contrastive_loss(example: Example) -> Arguments:
    n, width = example.sizes.images, example.sizes.width
    common = example.random(1, width)
    queries = common + example.random(n, width) / 2
    keys = queries + example.random(n, width) / 2
    queue = example.queue(common.float())
    return dict(queries=queries.requires_grad_(), keys=keys, queue=queue, temperature=TEMPERATURE)


def _augment(example: Example) -> Arguments:
    (n, side, *_), source = example.sizes, example.sizes.source
    images, rows = torch.empty(n, 3, source, source, dtype=torch.uint8), torch.arange(n)
    if example.device.type != "meta":
        images = torch.randint(256, images.shape, generator=example.generator, dtype=torch.uint8)
        rows = torch.randperm(n, generator=example.generator)
    u = example.uniform(example.sizes.views * n, len(PARAMETERS))
    uniform = dict(zip(PARAMETERS, u.unbind(1), strict=True))
    columns = {name: (column > 0.5).float() for name, column in uniform.items()}  # on-off columns; the others follow
    columns["angle"] = 360 * uniform["angle"] - 180
    for name in ("top", "left"):
        columns[name] = (uniform[name] * source / 2).floor()
    for name in ("crop_height", "crop_width"):
        columns[name] = (uniform[name] * source / 2).floor() + 1
    for name in ("brightness", "contrast", "saturation"):
        columns[name] = 0.5 + uniform[name]
    columns["hue"] = uniform["hue"] - 0.5
    columns["sigma"] = 2 * uniform["sigma"].where(uniform["angle"] > 0.3, 0.0)
    return dict(
        images=images.to(example.device),
        rows=rows.to(example.device),
        parameters=torch.stack([columns[name] for name in PARAMETERS], 1),
        mean=u[0, :3].contiguous(),
        std=0.5 + u[1, :3],
        view_format=ViewFormat(side),
        dtype=example.dtype,
    )


def _check_augment(example: Example, arguments: Arguments) -> str | None:
    """Compares levels. A sum within rounding of a half may become another whole level, up to 8 after the jitter."""
    if max(example.sizes.side, example.sizes.source) > LARGEST_SIDE:
        return None  # the kernel is not used above LARGEST_SIDE
    std = arguments["std"].double()
    doubles: Arguments = {name: arguments[name].double() for name in ("parameters", "mean", "std")}
    doubles["dtype"] = torch.float64
    for view_format in (arguments["view_format"], ViewFormat(example.sizes.side, cubic=False, rotates=True)):
        given: Arguments = {**arguments, "view_format": view_format}
        views, truth = augment(**given, backend="triton"), augment(**{**given, **doubles}, backend="torch")
        error = (views.double() - truth).abs() - torch.finfo(example.dtype).eps * truth.abs()
        levels = (255 * std.view(3, 1, 1) * error).nan_to_num(torch.inf)
        off = (levels > 0.1).double().mean().item()
        if levels.max() > 8 or off > 0.02:
            greatest = levels.max().item()
            return f"a view is off by {greatest:.3g} levels at most, {off:.2%} of its pixels by more than 0.1"
    return None


def _batch_norm(example: Example) -> Arguments:
    """Makes a first stage of the online network: images, residual and ReLU.

    No result is within rounding of 0, where a ReLU passes all of a gradient or nothing.
    """
    sizes, channels = example.sizes, -(-example.sizes.features // 8)
    images, side = (
        min(sizes.images, PAPER.images),
        min(sizes.side, PAPER.side),
    )  # fp64 copies have to fit where a run does

    def signed(least: float) -> Tensor:
        shape = sizes.views * images, channels, side, side
        x = (least + example.uniform(*shape) / 2).copysign(example.random(*shape, dtype=torch.float32))
        return x.to(example.dtype, memory_format=torch.channels_last).requires_grad_()

    return dict(
        x=signed(0.5),
        weight=(0.5 + example.uniform(channels)).requires_grad_(),
        bias=(example.uniform(channels) / 10).requires_grad_(),
        running_mean=example.uniform(channels),
        running_var=example.uniform(channels),
        views=sizes.views,
        residual=signed(3),
        relu=True,
    )


_NO_RUNNING: Arguments = dict(running_mean=None, running_var=None)
_BATCH_NORMS: tuple[Arguments, ...] = (  # residual and ReLU; ReLU alone; neither; and more
    {},
    dict(residual=None),
    dict(residual=None, relu=False),
    dict(fork=True),  # the result is used twice
    dict(residual=None, fork=True),
    _NO_RUNNING | dict(residual=None),
)


def _convolution(example: Example) -> Arguments:
    """Makes the second convolution of a block of the first stage, in both views of a network without gradient."""
    sizes, channels = example.sizes, 16 * -(-example.sizes.features // 128)
    images, side = min(sizes.images, PAPER.images), min(sizes.side, PAPER.side)
    weight = example.random(channels, channels, 3, 3, dtype=torch.float32) / (9 * channels) ** 0.5
    return dict(
        x=example.random(2 * images, channels, side, side).contiguous(memory_format=torch.channels_last),
        weight=weight.to(example.dtype, memory_format=torch.channels_last),
        padding=1,
        views=2,
        scale=0.5 + example.uniform(2, channels),
        shift=example.uniform(2, channels),
    )


def _check_convolution(example: Example, arguments: Arguments) -> str | None:
    """Compares a call with scale and shift and one without. The truth reads what the first one rounds."""
    read = normalized(arguments["x"], arguments["scale"], arguments["shift"])
    plain: Arguments = {**arguments, "scale": None, "shift": None}
    for given, what in ((arguments, read), (plain, arguments["x"])):
        found = convolution(**given, backend="triton")
        doubles: Arguments = {**plain, "x": what.double(), "weight": given["weight"].double()}
        truth = convolution(**doubles, backend="torch")
        pairs = zip(Convolved._fields, found, truth, strict=True)
        problem = next((excess for pair in pairs if (excess := SUMS.excess(*pair)) is not None), None)
        if problem is not None:
            return problem
    return None


_ROWS = (
    Operator(function=divide, kind="elementwise", inputs=_divide, tolerance=EXACT),  # copies
    Operator(function=combine, kind="elementwise", inputs=_combine),
    Operator(function=contrastive_losses, kind="matmul", inputs=_contrastive_losses, exports=(contrastive_loss,)),
    Operator(function=nearest_neighbor, kind="lookup", inputs=_nearest_neighbor, check=_check_nearest_neighbor),
    Operator(function=enqueue, kind="elementwise", inputs=_enqueue, check=_check_enqueue),
    Operator(function=nt_xent, kind="matmul", inputs=_nt_xent),
    Operator(function=queue_contrastive_loss, kind="matmul", inputs=_queue_contrastive_loss),
    Operator(function=batch_norm, kind="elementwise", inputs=_batch_norm, variants=_BATCH_NORMS),
    Operator(
        function=convolution,
        kind="convolution",
        inputs=_convolution,
        check=_check_convolution,
        exports=(conv2d,),
    ),
    Operator(function=augment, kind="elementwise", inputs=_augment, check=_check_augment),
)
OPERATORS: dict[OperatorName, Operator] = {row.name: row for row in _ROWS}


# The fields are the names of the table. Type checkers cannot see them: for them `backends.divide` is Any.
class Backends(
    namedtuple("Backends", tuple(OPERATORS), defaults=["auto"] * len(OPERATORS))  # pyright: ignore[reportUntypedNamedTuple]
):
    """Backend of each operator by name, so that operators can fall back one by one."""

    __slots__ = ()

    @classmethod
    def all(cls, backend: Backend) -> Backends:
        """Returns the same backend for every operator that has it. With "faiss", all but the lookup are "auto"."""
        only = {"faiss": "lookup", "cudnn": "convolution"}.get(backend)
        return cls(**{name: backend if only in (None, row.kind) else "auto" for name, row in OPERATORS.items()})


__all__ = ["Backends"]
for _row in _ROWS:
    for _function in (_row.function, *_row.exports):
        globals()[_function.__name__] = _function
        __all__.append(_function.__name__)  # pyright: ignore[reportUnsupportedDunderAll]
