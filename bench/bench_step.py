"""One training step of the paper recipe against the reference path, side by side in one process.

The reference is Algorithm 1 as it is printed: fp32, eager, NCHW, three networks with their own weights, the queue
normalised in every step. Ours is the step that `mnclglf train` runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import oracles
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.side_by_side import timed
from mnclglf.config import EngineConfig
from mnclglf.data.batches import Batch
from mnclglf.engine.device import autocast_dtype, choose_device
from mnclglf.engine.guard import Guard
from mnclglf.engine.run import build_method
from mnclglf.engine.step import make_optimizer, train_step
from mnclglf.methods import Method
from mnclglf.recipes import paper

SIDE = 32
ROUNDS = 5
MATMUL = 4096  # rows, columns and depth of the product that the machine's rate is measured with


def our_step(method: Method, views: list[torch.Tensor], dtype: torch.dtype) -> Callable[[], object]:
    config, device = paper("mnclglf", "cifar10"), views[0].device
    optimizer, guard = make_optimizer(method, config.optim), Guard(device)
    ready = tuple(view.to(dtype, memory_format=torch.channels_last) for view in views)
    batch = Batch(ready, torch.arange(len(views[0]), device=device))
    return lambda: train_step(
        method, method, optimizer, guard, batch, step=0, lr=0.1, momentum=config.objective.ema_momentum, dtype=dtype
    )


def reference_step(method: Method, views: list[torch.Tensor]) -> Callable[[], object]:
    config = paper("mnclglf", "cifar10")
    reference = oracles.Algorithm1AsPrinted(
        method.encoder.to(memory_format=torch.contiguous_format),
        method.projector,
        method.predictor,
        method.queue.rows.float(),
        temperature=config.objective.temperature,
        ema_momentum=config.objective.ema_momentum,
        lambda_=config.objective.lambda_,
        k=config.objective.k,
        lr=config.optim.lr,
        sgd_momentum=config.optim.sgd_momentum,
        weight_decay=config.optim.weight_decay,
    )
    return lambda: reference.step(*views)


def matmul(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a = torch.randn(MATMUL, MATMUL, device=device).to(dtype)
    return lambda: a @ a


def test_step_against_reference(say: Callable[[str], None]) -> None:
    device = choose_device(EngineConfig())
    dtype = autocast_dtype(EngineConfig(), device)
    config = paper("mnclglf", "cifar10")
    batch_size = config.optim.batch_size
    views = [torch.randn(batch_size, 3, SIDE, SIDE, device=device) for _ in range(3)]
    reference = reference_step(build_method(config, dtype).to(device), views)
    ours = our_step(build_method(config, dtype).to(device).train(), views, dtype)
    product = matmul(dtype, device)

    with FlopCounterMode(display=False) as counter:
        ours()  # warm-up, as the reference's below
    reference()
    product()
    rows = [[timed(run, device) for run in (ours, reference, product)] for _ in range(ROUNDS)]
    our_seconds, reference_seconds, product_seconds = (statistics.median(column) for column in zip(*rows, strict=True))
    flops, rate = counter.get_total_flops(), 2 * MATMUL**3 / product_seconds
    name = str(dtype).removeprefix("torch.")
    say(f"MNCLGLF, batch {batch_size}, full ResNet-18, {SIDE} x {SIDE}, paper recipe; medians of {ROUNDS} rounds")
    say(f"  reference path  {reference_seconds:8.3f} s   {batch_size / reference_seconds:8.1f} images/s")
    say(f"  ours ({name})  {our_seconds:8.3f} s   {batch_size / our_seconds:8.1f} images/s")
    say(f"  ratio           {statistics.median(r / o for o, r, _ in rows):8.2f}   round by round " + " ".join(
        f"{r / o:.2f}" for o, r, _ in rows
    ))  # fmt: skip
    say(
        f"  {flops / 1e12:.2f} TFLOP a step: {flops / our_seconds / 1e12:.2f} TFLOP/s, "
        f"{100 * flops / our_seconds / rate:.0f}% of this machine's {rate / 1e12:.2f} TFLOP/s in a {MATMUL} x {MATMUL} "
        f"{name} matmul"
    )
