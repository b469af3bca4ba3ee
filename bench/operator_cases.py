"""The operators' benchmark cases: the reference form, further shapes and directions.

The inputs of a case are the example inputs of the operators table at the case's sizes, unless BENCHES says otherwise.
An operator without an entry in BENCHES is measured against its own PyTorch form, at the paper's sizes.

S subsets, N images, D embedding width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.harness import BOTH, DEVICE, DIRECTIONS, BenchCase, Direction, Implementation, Work
from bench.measurement import REFERENCE
from bench.reference import Algorithm1AsPrinted, nt_xent_as_published, queue_loss_as_published
from mnclglf.data.loaders.reference import render_view
from mnclglf.data.loaders.resident import parameter_table
from mnclglf.data.views import blur_window, draw_parameters
from mnclglf.recipes import VIEWS
from mnclglf_kernels.operators import OPERATORS, Example, Operator
from mnclglf_kernels.ops.augment import ViewFormat
from mnclglf_kernels.sizes import PAPER, Sizes

VIEW = VIEWS["paper"]
TEMPERATURE = 0.1  # the work does not depend on it
FORWARD: tuple[Direction, ...] = DIRECTIONS[:1]

Inputs = dict[str, Any]  # the operator's keyword arguments but `backend`
Outputs = Sequence[Tensor]


class Shape(NamedTuple):
    """One shape to measure.

    Attributes:
        name: name in test ids and saved results.
        sizes: sizes of the table's example inputs.
        directions: directions to measure, see DIRECTIONS.
        inputs: function that makes inputs other than the table's, in a dtype on a device.
    """

    name: str
    sizes: Sizes = PAPER
    directions: Sequence[Direction] = FORWARD
    inputs: Callable[[torch.dtype, torch.device], Inputs] | None = None


class OperatorBench(NamedTuple):
    """The measurements to make of an operator.

    Attributes:
        label: name of the operator in saved results.
        reference: plain form of the operator, called with its keyword arguments.
        shapes: shapes to measure; a quick run takes the first.
        on_meta: True if `reference` can be counted on the meta device.
    """

    label: str
    reference: Callable[..., Outputs]
    shapes: Sequence[Shape]
    on_meta: bool = True


def sizes(**changed: int) -> Sizes:
    """Returns the paper's sizes with some changed."""
    return PAPER._replace(**changed)


def outputs_of(result: Any, inputs: Inputs) -> Outputs:
    """Returns an operator's result as tensors; of one that works in place, its first argument."""
    return [next(iter(inputs.values()))] if result is None else tree_leaves(result)


def torch_form(row: Operator, **inputs: Any) -> Outputs:
    """Runs an operator's own PyTorch form."""
    return outputs_of(row.function(**inputs, backend="torch"), inputs)


# augment: the reference loader renders one image after the other with torchvision, on the CPU.


def augment_inputs(dtype: torch.dtype, device: torch.device, *, images: int = 256, side: int = 32) -> Inputs:
    """Describes three views of random images, by the parameters that a run with the paper's views draws."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    drawn = [draw_parameters(0, 0, np.arange(images), view, VIEW, side, side) for view in range(3)]
    return {
        "images": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device),
        "rows": torch.arange(images, device=device),
        "parameters": parameter_table(drawn).to(device),
        "mean": torch.full((3,), 0.5, device=device),
        "std": torch.full((3,), 0.25, device=device),
        "view_format": ViewFormat(side, blur_window=blur_window(VIEW, side)),
        "dtype": dtype,
    }


def augment_reference(
    images: Tensor, mean: Tensor, std: Tensor, view_format: ViewFormat, dtype: torch.dtype, **_: Any
) -> Outputs:
    """Renders the views that `augment_inputs` describes."""
    count, side = len(images), view_format.side
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    settings: dict[str, Any] = dict(side=side, config=VIEW, mean=mean.cpu().numpy(), std=std.cpu().numpy())
    drawn = [draw_parameters(0, 0, np.arange(count), view, VIEW, side, side) for view in range(3)]
    views = [render_view(pixels[row], view, row, **settings) for view in drawn for row in range(count)]
    return [torch.stack(views).to(images.device, dtype, memory_format=torch.channels_last)]


# contrastive_losses: MNCLGLF's step contrasts four pairs, two of them with the predictions of the same view.


def contrastive_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    subsets: tuple[int, ...],
    images: int,
    width: int,
    both_sides: bool = False,
) -> Inputs:
    """Makes one pair for each of `subsets`. In the step a gradient reaches the predictions only."""

    def embeddings(count: int, *, gradient: bool) -> Tensor:
        return torch.randn(count, width, device=device).to(dtype).requires_grad_(gradient)

    views = (2, 0, 1, 0)[: len(subsets)]  # c1, c3, n1 and n2 meet p3, p1, p2 and p1
    predictions = {view: embeddings(images, gradient=True) for view in sorted(set(views))}
    targets = [embeddings(s * images, gradient=both_sides) for s in subsets]
    pairs = [(h, predictions[view]) for h, view in zip(targets, views, strict=True)]
    return {"pairs": pairs, "temperature": TEMPERATURE}


def contrastive_shape(
    *subsets: int, images: int = 256, width: int = 2048, both_sides: bool = False, directions: Sequence[Direction]
) -> Shape:
    name = f"S {' + '.join(map(str, subsets))}, N {images}, D {width}" + (", both sides' gradients" * both_sides)
    how = dict(subsets=subsets, images=images, width=width, both_sides=both_sides)
    return Shape(name, directions=directions, inputs=partial(contrastive_inputs, **how))


def contrastive_reference(pairs: Sequence[tuple[Tensor, Tensor]], temperature: float) -> Outputs:
    return [Algorithm1AsPrinted.contrastive_loss(h, p, temperature) for h, p in pairs]


# nearest_neighbor: Algorithm 1 looks each view up by itself, and normalizes the queue both times.


def neighbor_reference(queries: Tensor, queue: Tensor) -> Outputs:
    return [Algorithm1AsPrinted.nearest_neighbor(z, queue) for z in queries.chunk(2)]


# enqueue: Algorithm 1 has a pointer on the host and no `should_update`.

_calls = itertools.count()


def enqueue_inputs(dtype: torch.dtype, device: torch.device, *, sizes: Sizes = PAPER) -> Inputs:
    """Returns the table's inputs with the pointer at the first row, where the reference begins."""
    inputs = OPERATORS["enqueue"].inputs(Example(sizes=sizes, dtype=dtype, device=device))
    return inputs | {"pointer": torch.zeros_like(inputs["pointer"])}


def enqueue_reference(queue: Tensor, rows: Tensor, **_: Any) -> Outputs:
    """Enqueues after the rows of the call before, as a step does: one place again and again would stay in a cache."""
    queue, _pointer = Algorithm1AsPrinted.enqueue(queue, next(_calls) * len(rows) % len(queue), rows)
    return [queue]


# batch_norm: a network without it, which has its views in one batch, normalizes view by view.


def batch_norm_inputs(dtype: torch.dtype, device: torch.device, *, rows: int, channels: int, views: int = 3) -> Inputs:
    """Makes rows of a head, with a ReLU, as under autocast."""
    x = torch.randn(rows, channels, device=device).to(dtype).requires_grad_()
    weight, bias, mean, variance = torch.ones(4, channels, device=device).unbind()
    vectors = dict(weight=weight.clone().requires_grad_(), bias=bias.clone().requires_grad_())
    return {"x": x, **vectors, "running_mean": mean, "running_var": variance, "views": views, "relu": True}


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    views: int,
    relu: bool,
    residual: Tensor | None = None,
) -> Outputs:
    others = [None] * views if residual is None else residual.chunk(views)
    found: list[Tensor] = []
    for part, other in zip(x.chunk(views), others, strict=True):
        y = F.batch_norm(part, running_mean, running_var, weight, bias, training=True)
        y = y if other is None else y + other
        found.append(F.relu(y) if relu else y)
    return [torch.cat(found)]


BENCHES: Mapping[str, OperatorBench] = {
    "augment": OperatorBench(
        "augment",
        augment_reference,
        [Shape(f"3 x 256 views, {side} x {side}", inputs=partial(augment_inputs, side=side)) for side in (32, 64)],
        on_meta=False,
    ),
    "divide": OperatorBench(
        "divide",
        lambda images: [Algorithm1AsPrinted.divide(images)],
        [Shape("N 256, 32 x 32", directions=DIRECTIONS)],
    ),
    "combine": OperatorBench(
        "combine",
        lambda features, k: [Algorithm1AsPrinted.combine(features, k)],
        [Shape("N 256, F 512, k 2", directions=DIRECTIONS)],
    ),
    "contrastive_losses": OperatorBench(
        "contrastive",
        contrastive_reference,
        [
            contrastive_shape(6, directions=DIRECTIONS),
            contrastive_shape(6, 6, 1, 1, directions=DIRECTIONS),
            contrastive_shape(6, both_sides=True, directions=[BOTH]),
            *(
                contrastive_shape(s, images=n, width=d, directions=[BOTH])
                for d in (512, 2048)
                for n in (64, 128)
                for s in (1, 6)
            ),
        ],
    ),
    "nearest_neighbor": OperatorBench(
        "nearest neighbor",
        neighbor_reference,
        [Shape("2 x 256 in 16384 x 2048"), Shape("2 x 64 in 4096 x 512", sizes(images=64, queue=4096, width=512))],
    ),
    "enqueue": OperatorBench(
        "enqueue", enqueue_reference, [Shape("256 rows into 16384 x 2048", inputs=enqueue_inputs)]
    ),
    "nt_xent": OperatorBench(
        "nt_xent",
        lambda first, second, temperature: [nt_xent_as_published(first, second, temperature)],
        [
            Shape("N 256, D 2048", directions=DIRECTIONS),
            *(Shape(f"N {n}, D {d}", sizes(images=n, width=d), [BOTH]) for d in (512, 2048) for n in (64, 128)),
        ],
    ),
    "queue_contrastive_loss": OperatorBench(
        "queue contrastive",
        lambda queries, keys, queue, temperature: [queue_loss_as_published(queries, keys, queue, temperature)],
        [
            Shape("N 256, K 16384, D 2048", directions=DIRECTIONS),
            *(
                Shape(f"N 64, K {size}, D 512", sizes(images=64, queue=size, width=512), [BOTH])
                for size in (4096, 16384)
            ),
        ],
    ),
    "batch_norm": OperatorBench(
        "batch norm",
        batch_norm_reference,
        [
            Shape("3 x 256, 64 x 32 x 32, residual, ReLU", directions=DIRECTIONS),
            Shape("3 x 256, 16 x 16 x 16, residual, ReLU", sizes(side=16, features=128), DIRECTIONS),
            *(
                Shape(
                    f"3 x 256, {channels}, ReLU",
                    directions=DIRECTIONS,
                    inputs=partial(batch_norm_inputs, rows=768, channels=channels),
                )
                for channels in (512, 2048)
            ),
        ],
    ),
}
"""The labels are the names under which results are saved, so that old and new results compare."""


def bench_of(row: Operator) -> OperatorBench:
    """Returns an operator's entry in BENCHES, or one that needs none: its PyTorch form at the paper's sizes."""
    if row.name in BENCHES:
        return BENCHES[row.name]
    learns = any(x.requires_grad for x in tree_leaves(row.inputs(Example())) if isinstance(x, Tensor))
    shape = Shape("paper's sizes", directions=DIRECTIONS if learns else FORWARD)
    return OperatorBench(row.name, partial(torch_form, row), [shape])


def inputs_of(row: Operator, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Returns the operator's inputs at a shape."""
    if shape.inputs is not None:
        return shape.inputs(dtype, device)
    return row.inputs(Example(sizes=shape.sizes, dtype=dtype, device=device))


def work(
    row: Operator, bench: OperatorBench, shape: Shape, direction: Direction, implementation: Implementation
) -> Work:
    """Returns what a case measures of one implementation."""
    inputs = inputs_of(row, shape, implementation.dtype, DEVICE)
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    leaves = list({id(x): x for x in leaves}.values())  # a view's predictions may be in two pairs
    if direction == "forward" and row.kind == "elementwise":  # the step divides and combines without a gradient
        for leaf in leaves:
            leaf.requires_grad_(False)
    if implementation.backend == REFERENCE:
        return Work(lambda: bench.reference(**inputs), leaves)
    return Work(lambda: outputs_of(row.function(**inputs, backend=implementation.backend), inputs), leaves)


def cases(row: Operator, bench: OperatorBench) -> list[BenchCase]:
    """Returns the cases of an operator."""
    return [
        BenchCase(bench.label, shape.name, direction, row.kind, partial(work, row, bench, shape, direction))
        for shape in bench.shapes
        for direction in shape.directions
    ]


def all_cases(*, quick: bool = False) -> list[BenchCase]:
    """Returns the cases of every operator in the table; a quick run has the first of each."""
    return [case for row in OPERATORS.values() for case in cases(row, bench_of(row))[: 1 if quick else None]]
