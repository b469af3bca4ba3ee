"""A training step leaves the host free, and is the same step when its forward is compiled."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig
from mnclglf.data.batches import Batch
from mnclglf.engine.guard import Guard
from mnclglf.engine.step import make_forward, make_optimizer, train_step
from mnclglf.methods import MNCLGLF

READS_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class NoReadBack(TorchDispatchMode):
    """Fails on operators whose result the host must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS_BACK, f"aten::{name} waits for the device"
        return func(*args, **(kwargs or {}))


def parts(device: torch.device, dtype: torch.dtype) -> tuple[MNCLGLF, torch.optim.SGD, Guard, Batch, dict[str, Any]]:
    """A small method, its optimizer and guard, a batch, and the settings of a step."""
    torch.manual_seed(0)
    objective = ObjectiveConfig(queue_size=40, one_embedding=True)
    method = MNCLGLF(ModelConfig(width=4, projector_width=16, predictor_width=8), objective, queue_dtype=dtype)
    method = method.to(device, memory_format=torch.channels_last).train()
    optimizer, guard = make_optimizer(method, OptimConfig()), Guard(device)
    views = torch.randn(3, 16, 3, 16, 16, device=device).to(dtype).unbind()
    batch = Batch(tuple(view.to(memory_format=torch.channels_last) for view in views), torch.arange(16, device=device))
    return method, optimizer, guard, batch, {"step": 0, "lr": 0.1, "momentum": 0.99, "dtype": dtype}


def make_step(device: torch.device, dtype: torch.dtype) -> Any:
    method, optimizer, guard, batch, settings = parts(device, dtype)
    return lambda: train_step(method, method, optimizer, guard, batch, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operator_of_a_step_reads_back(dtype: torch.dtype) -> None:
    step = make_step(torch.device("cpu"), dtype)
    with NoReadBack():
        losses, gradient_norm = step()
    assert losses.total.isfinite()
    assert gradient_norm > 0
    with pytest.raises(AssertionError, match="waits for the device"), NoReadBack():
        losses.total.item()


@pytest.mark.parametrize(
    ("engine", "options"),
    [({"compile": True}, {"mode": None}), ({"compile": True, "graphs": True}, {"mode": "reduce-overhead"})],
    ids=["compile", "graphs"],
)
def test_a_compiled_forward_gives_the_same_step(
    engine: dict[str, bool], options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    compiler = torch.compile

    def record(method: MNCLGLF, **how: object) -> object:
        asked.update(how)
        return compiler(method, fullgraph=True, backend="eager")  # Dynamo's graph, without minutes of code generation

    monkeypatch.setattr("torch.compile", record)
    results = []
    for config in (EngineConfig(), EngineConfig(**engine)):
        method, optimizer, guard, batch, settings = parts(torch.device("cpu"), torch.float32)
        forward = make_forward(method, config)
        for _ in range(2):
            losses, _ = train_step(method, forward, optimizer, guard, batch, **settings)
        results.append((losses.total.detach(), dict(method.state_dict())))
    assert asked == {"fullgraph": True, **options}
    (loss, state), (compiled_loss, compiled_state) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)  # the same operations; fp32
    torch.testing.assert_close(compiled_state, state, rtol=1e-4, atol=1e-6)


def test_without_compile_the_forward_is_the_method() -> None:
    method = parts(torch.device("cpu"), torch.float32)[0]
    assert make_forward(method, EngineConfig()) is method


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_the_gpu_never_synchronises(dtype: torch.dtype) -> None:
    step = make_step(torch.device("cuda"), dtype)
    step()  # libraries initialise themselves
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, _ = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.total.isfinite()
