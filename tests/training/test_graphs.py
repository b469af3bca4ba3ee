"""Tests of the proof of CUDA graphs: what a replay may get wrong shows, and the run's state stays to the bit."""

import copy
from collections.abc import Callable
from hashlib import sha256
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from training.test_step import make_batch, make_method

from mnclglf.config import EngineConfig, OptimConfig
from mnclglf.methods.base import Losses
from mnclglf.training.graphs import first_difference, problem_of_replays, ruled_out
from mnclglf.training.speedups import compiled
from mnclglf.training.step import TrainStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RATES = {"lr": 0.1, "momentum": 0.9}


def make_step(dtype: torch.dtype = torch.float32, device: torch.device = CPU, **settings: Any) -> TrainStep:
    method = make_method(device, dtype=dtype, one_embedding=True)  # draws a random number in each forward
    return TrainStep(method, OptimConfig(**settings), EngineConfig(), dtype)


def state_of(step: TrainStep) -> list[Any]:
    """Returns digests of all that a step changes, in one order."""
    optimizer = [x for kept in step.optimizer.state.values() for x in kept.values()]
    rates = [group["lr"] for group in step.optimizer.param_groups]
    guard = [step.guard.failed_step, step.guard.finite.all()]
    tensors = [*step.method.state_dict().values(), *optimizer, *rates, *guard, torch.get_rng_state()]
    gradients = [parameter.grad for parameter in step.method.parameters()]
    digests = [sha256(x.cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest() for x in tensors]
    return [*digests, step.scaler.state_dict(), gradients]


def flip(x: Tensor) -> Tensor:
    """Returns a copy with the last bit of its first value flipped."""
    flipped = x.detach().clone()
    flipped.view(-1).view(torch.uint8)[0] ^= 1
    return flipped


def flip_in_place(x: Tensor) -> None:
    x.data.copy_(flip(x.contiguous()))  # data: as a graph writes, unseen by autograd


def with_fault(step: TrainStep, fault: Callable[[Losses], Losses | None], *, at_call: int = 2) -> Any:
    """Returns the method's forward with a fault in one call; calls 2 and 4 of the replayed one are compared."""
    calls = 0

    def forward(views: Tensor, labels: Tensor | None = None) -> Losses:
        nonlocal calls
        calls += 1
        losses = step.method(views, labels)
        return (fault(losses) if calls == at_call else None) or losses

    return forward


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_replays_are_accepted_and_change_nothing(dtype: torch.dtype, optimizer: str) -> None:
    step, expected = (make_step(dtype, optimizer=optimizer, clip_norm=1.0) for _ in range(2))
    batches = [make_batch(dtype=dtype, first=16 * number) for number in range(3)]
    torch.manual_seed(5)
    before = state_of(step)
    assert first_difference(step, step.method, step.method, batches[0], **RATES) is None
    assert state_of(step)[:-2] == before[:-2]
    for each in (step, expected):  # and what follows is what would have followed
        torch.manual_seed(6)
        for number, batch in enumerate(batches):
            each(number, batch, lr=0.1, momentum=0.9)
    assert state_of(step) == state_of(expected)


def test_the_state_of_a_run_that_goes_on_is_restored() -> None:
    step, batch = make_step(), make_batch(first=16)
    step(0, make_batch(), lr=0.1, momentum=0.9)
    before, forward = state_of(step), step.forward
    assert first_difference(step, step.method, step.method, batch, **RATES) is None
    assert state_of(step) == before
    faulty = with_fault(step, lambda _: flip_in_place(step.method.queue.rows))
    assert first_difference(step, step.method, faulty, batch, **RATES) is not None
    assert state_of(step) == before
    assert step.forward is forward


def gradient_of(weight: nn.Parameter) -> Callable[[Losses], None]:
    def fault(_: Losses) -> None:
        handle = weight.register_hook(lambda gradient: (handle.remove(), flip(gradient.contiguous()))[1])

    return fault


FAULTS: dict[str, Callable[[Any], Callable[[Losses], Any]]] = {
    "total": lambda _: (
        lambda losses: losses._replace(total=losses.total + (flip(losses.total) - losses.total.detach()))
    ),
    "loss_m": lambda _: lambda losses: losses._replace(terms=losses.terms | {"loss_m": flip(losses.terms["loss_m"])}),
    "features": lambda _: lambda losses: losses._replace(features=flip(losses.features)),
    "keys": lambda _: lambda losses: losses._replace(keys=flip(cast(Tensor, losses.keys))),
    "the gradient of encoder.conv1.weight": lambda method: gradient_of(method.get_parameter("encoder.conv1.weight")),
    "encoder.bn1.running_var": lambda method: lambda _: flip_in_place(method.get_buffer("encoder.bn1.running_var")),
    "queue.rows": lambda method: lambda _: flip_in_place(method.queue.rows[39]),  # the step writes rows 0 to 15
    "momentum.0.conv1.weight": lambda method: lambda _: flip_in_place(method.momentum[0].conv1.weight),
}


@pytest.mark.parametrize(("name", "call"), [*((name, 2) for name in FAULTS), ("queue.rows", 4)])
def test_one_bit_is_seen_and_named(name: str, call: int) -> None:
    step, batch = make_step(), make_batch()
    before = state_of(step)
    forward = with_fault(step, FAULTS[name](step.method), at_call=call)
    found = first_difference(step, step.method, forward, batch, **RATES)
    assert found is not None
    assert name in found
    assert ": 1 of " in found
    assert state_of(step) == before


def test_a_replay_of_old_inputs_is_seen() -> None:
    step, first = make_step(), []

    def stale(views: Tensor, labels: Tensor | None = None) -> Losses:
        first.append(views)
        return step.method(first[0], labels)

    found = first_difference(step, step.method, stale, make_batch(), **RATES)
    assert found is not None
    assert "the first difference is in " in found


def test_a_replay_of_old_weights_is_seen() -> None:
    step, old = make_step(), []

    def stale(views: Tensor, labels: Tensor | None = None) -> Losses:
        if not old:
            old.append(copy.deepcopy(step.method.encoder.state_dict()))
        step.method.encoder.load_state_dict(old[0])
        return step.method(views, labels)

    assert first_difference(step, step.method, stale, make_batch(), **RATES) is not None


def test_a_step_that_breaks_off_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    step, batch = make_step(), make_batch()
    before = state_of(step)

    def full(losses: Losses) -> None:
        losses.total.backward(retain_graph=True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(step, "forward", with_fault(step, full))
    assert "out of memory. Tried to allocate 2 GiB" in (problem_of_replays(step, batch, **RATES) or "")
    assert state_of(step) == before


@pytest.mark.parametrize(
    ("engine", "device", "reason"),
    [
        ({}, CUDA, None),
        ({"graphs": "on"}, CUDA, None),
        ({}, CPU, "CPU"),
        ({"graphs": "off"}, CPU, "--graphs off"),
        ({"compile": "off"}, CUDA, "--compile off"),
        ({"activation_checkpointing": True}, CUDA, "--activation-checkpointing"),
        ({"lookup": "faiss"}, CUDA, "--lookup faiss"),
    ],
)
def test_what_rules_graphs_out_is_named(engine: dict[str, Any], device: torch.device, reason: str | None) -> None:
    found = ruled_out(EngineConfig(**engine), device)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


@pytest.mark.slow
def test_a_compiled_step_is_equal_to_itself_and_not_to_the_eager_one() -> None:
    """On a CPU, where a forward of mode reduce-overhead is compiled as any other and torch records no graph."""
    torch._dynamo.reset()
    step, batch = make_step(), make_batch()
    before = state_of(step)
    step.forward = compiled(step.method, graphs=True)
    assert first_difference(step, step.forward, step.forward, batch, **RATES) is None
    assert first_difference(step, step.method, step.forward, batch, **RATES) is not None
    assert state_of(step) == before
    torch._dynamo.reset()
    step.forward = compiled(step.method, graphs=True)
    assert "cannot record" in (problem_of_replays(step, batch, **RATES) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_on_the_gpu_are_proved(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    step, batch = make_step(dtype, CUDA), make_batch(CUDA, dtype)
    before = state_of(step)
    step.forward = compiled(step.method, graphs=True)
    with inductor.patch({"triton.cudagraph_or_error": True, "graph_partition": False}):
        assert problem_of_replays(step, batch, **RATES) is None
    assert state_of(step) == before
    step(0, batch, lr=0.1, momentum=0.9)
    step.guard.raise_if_failed()
