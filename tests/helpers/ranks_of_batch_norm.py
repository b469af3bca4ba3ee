"""What each rank runs in the tests of batch norm over ranks, and what one process makes of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from batch_norms import EPS, VARIANTS, Case, case, upstream_of
from interpreter import index_one_element, round_to_nearest_bf16
from torch import Tensor
from torch.library import opcheck

from mnclglf.models.batch_norm import BatchNorm, Views
from mnclglf.models.fused import norm_of
from mnclglf_kernels import Backend, batch_norm
from mnclglf_kernels.backend import INTERPRETED
from mnclglf_kernels.ops.convolution import moments
from mnclglf_kernels.ranks import gather_rows, gather_together

Results = dict[str, Tensor]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "images inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


class Call(NamedTuple):
    """A call, by which all ranks and the one process that they are compared with draw the same arguments."""

    shape: tuple[int, ...]  # of the whole batch
    views: int
    residual: bool = False
    relu: bool = False
    fork: bool = False
    dtype: torch.dtype = torch.float64
    vectors: torch.dtype | None = None  # of weight and bias, None for that of the sums
    fold: Sequence[float] | None = None
    layout: str = "channels_last"
    running: bool = True
    backend: Backend = "torch"
    compiler: str | None = None


EXACT = [
    *(Call(shape, views, *variant) for views, shape in ((1, (8, 5)), (3, (24, 6, 3, 2))) for variant in VARIANTS),
    Call((24, 6, 3, 2), 3, True, True, fork=True),
    Call((24, 6, 3, 2), 3, False, True, layout="contiguous"),
    Call((24, 6, 3, 2), 3, True, False, layout="contiguous"),
    Call((24, 6, 3, 2), 3, True, True, layout="images inside"),
    Call((24, 6, 3, 2), 3, fold=[0.5, 0.2, 3, 0.1]),
    Call((24, 6, 3, 2), 3, True, True, running=False),
    Call((8, 3), 2),  # on 4 ranks one value per channel, view and rank
    Call((16, 1, 1, 3), 2, False, True),
    Call((24, 6, 3, 2), 3, False, True, backend="triton"),
    Call((24, 70, 3, 2), 3, True, True, fork=True, backend="triton"),  # two tiles of channels
    Call((72, 5, 28, 28), 1, backend="triton"),  # several parts per view
    Call((8, 3), 2, backend="triton"),
]
ROUNDED = [
    *(
        Call((24, 6, 5, 3), 3, *variant, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for variant in VARIANTS
    ),
    Call((24, 6, 5, 3), 3, True, True, dtype=torch.bfloat16, layout="contiguous"),
    Call((24, 6, 5, 3), 3, True, True, dtype=torch.float16),
    Call((24, 6, 5, 3), 3, False, True, dtype=torch.bfloat16, vectors=torch.bfloat16),
    Call((24, 6, 5, 3), 3, True, True, dtype=torch.float32, backend="triton"),
    Call((24, 6, 5, 3), 3, False, True, dtype=torch.bfloat16, backend="triton"),
]
COMPILED = [Call((8, 6, 5, 3), 2, True, True, fork=True, dtype=torch.float32, compiler="aot_eager")]
SLOW = [
    Call((8, 6, 5, 3), 2, residual, True, True, dtype, backend=backend, compiler="inductor")
    for residual in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    for backend in ("torch", "triton")
]


def part_of(x: Tensor, views: int, rank: int, ranks: int) -> Tensor:
    """Returns what one rank holds of a batch: its images of each view."""
    return x.unflatten(0, (views, ranks, -1))[:, rank].flatten(0, 1)


def whole_of(parts: Sequence[Tensor], views: int) -> Tensor:
    """Returns the batch of which the ranks hold these parts."""
    return torch.stack([part.unflatten(0, (views, -1)) for part in parts], 1).flatten(0, 2)


def drawn_for(call: Call) -> tuple[Case, Tensor]:
    """Draws arguments and upstream gradient of the whole batch.

    No gradient comes from where the ReLU may pass or stop it by a rounding.
    """
    drawn = case(call.shape, call.dtype, call.residual, call.vectors or torch.promote_types(call.dtype, torch.float32))
    upstream = upstream_of(drawn)
    if call.relu:
        x, weight, bias, residual = drawn.leaves(torch.float64)
        before = batch_norm(x, weight, bias, views=call.views, residual=residual, eps=EPS, backend="torch")
        upstream = torch.where(before.abs() > 0.1, upstream, 0)
    return drawn, upstream


def results_of(call: Call, rank: int = 0, ranks: int = 1, dtype: torch.dtype | None = None) -> Results:
    """Returns result, gradients and running statistics, computed in another dtype if one is given."""
    drawn, upstream = drawn_for(call)

    def own(x: Tensor) -> Tensor:
        return LAYOUTS[call.layout](part_of(x.to(dtype or x.dtype), call.views, rank, ranks))

    residual = None if drawn.residual is None else own(drawn.residual)
    weight, bias = (x.to(dtype or x.dtype) for x in (drawn.weight, drawn.bias))
    leaves = Case(own(drawn.x), weight, bias, residual).leaves()
    running = torch.linspace(0.5, 1.5, 2 * call.shape[1], dtype=leaves.weight.dtype)
    mean, var = running.view(2, -1)
    how: dict[str, Any] = dict(views=call.views, relu=call.relu, fold=call.fold, backend=call.backend, ranks=ranks)
    called = torch.compile(batch_norm, fullgraph=True, backend=call.compiler) if call.compiler else batch_norm
    kept = (mean, var) if call.running else (None, None)
    uses = called(*leaves[:3], *kept, residual=leaves.residual, eps=EPS, fork=True, **how)
    given = [own(upstream), own(upstream) / 2] if call.fork else [own(upstream)]
    gradients = torch.autograd.grad(uses[: len(given)], leaves.tensors(), given)
    names = ["gradient of x", "gradient of weight", "gradient of bias", "gradient of residual"]
    results = {"y": uses[0].detach(), **dict(zip(names, gradients, strict=False))}
    return results | {"running mean": mean, "running variance": var}


def joined(parts: Sequence[Results], views: int) -> Results:
    """Returns the results of one process from those of the ranks; the weights' gradients are added in fp64."""
    found: Results = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in ("gradient of weight", "gradient of bias"):
            found[name] = torch.stack(tensors).double().sum(0)
        elif "running" in name:
            found[name] = tensors[0]
        else:
            found[name] = whole_of(tensors, views)
    return found


def layer_results(rank: int = 0, ranks: int = 1) -> Results:
    """Returns what the networks' layer gives in train mode, and the scale and shift of a fused forward without it."""
    torch.manual_seed(3)
    x, residual = (torch.randn(12, 5, 2, 3, dtype=torch.float64) for _ in range(2))
    x, residual = (part_of(t, 3, rank, ranks) for t in (x, residual))
    norm = BatchNorm(5).double()
    norm.ranks = ranks
    views = Views(after=(3, 2, 0), decays=4)
    y, other = norm(x, views), norm.fork(x, views, residual)[1]
    scale, shift = norm_of(norm, *moments(x, 3), x.numel() // 15, views)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = {"y": y, "fork": other, "running mean": norm.running_mean, "running variance": norm.running_var}
    return {name: t.detach() for name, t in found.items()} | {"running scale": scale, "running shift": shift}


def check_operators(rank: int, ranks: int) -> list[str]:
    """Runs opcheck on the calls of batch_norm and on the messages between ranks; returns the operators' names."""
    operators = torch.ops.mnclglf
    x, residual, upstream = (torch.randn(6, 5, 3, 2).to(memory_format=torch.channels_last) for _ in range(3))
    weight, bias, mean, var = torch.rand(4, 5).unbind()
    forward = x, weight, bias, mean, var, residual, [0.5, 0.25, 0.25], 1e-5, True, ranks
    y, *saved = operators.batch_norm(*forward)
    backward = upstream, None, x, y, weight, bias, *saved, True, True, ranks
    rows = torch.randn(4 * ranks, 3)
    calls: dict[str, tuple[Any, ...]] = dict(
        batch_norm=forward, batch_norm_backward=backward, gather=(rows,), sum_over_ranks=(rows,), sum_rows=(rows,)
    )
    for name, arguments in calls.items():
        opcheck(getattr(operators, name), arguments)
    opcheck(operators.gather_rows, (rows.requires_grad_(),))
    check_gather_together(rank)
    return [*calls, "gather_rows"]


def check_gather_together(rank: int) -> None:
    """Asserts that tensors of several dtypes, in one message, arrive as in one message each; one row has odd bytes."""
    generator = torch.Generator().manual_seed(rank)
    for rows in (1, 3):
        keys = torch.randn(5, rows, generator=generator).t().bfloat16()
        images = torch.randint(2**40, (rows,), generator=generator)
        tensors = keys, images, images.double().reshape(rows, 1, 1), images % 2 == 0
        for found, own in zip(gather_together(*tensors), tensors, strict=True):
            assert torch.equal(found, gather_rows(own.contiguous()))


def calls_on(ranks: int) -> list[Call]:
    """Returns the calls to make on so many ranks: on more than two without most that take seconds."""
    calls = [*EXACT, *ROUNDED, *COMPILED]
    return calls if ranks == 2 else [x for x in calls if x.backend == "torch" and x.compiler is None] + EXACT[-1:]


class Found(NamedTuple):
    """Results of one rank."""

    calls: list[Results]
    layer: Results
    operators: list[str]


def results_of_all(calls: Sequence[Call]) -> list[Results]:
    """Returns the results of these calls on this rank, with uninitialized memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    if INTERPRETED:
        round_to_nearest_bf16()
        index_one_element()
    return [results_of(call, dist.get_rank(), dist.get_world_size()) for call in calls]


def everything() -> Found:
    """Returns this rank's results of all that is not slow."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results, layer = results_of_all(calls_on(ranks)), layer_results(rank, ranks)
    return Found(results, layer, check_operators(rank, ranks) if ranks == 2 else [])
