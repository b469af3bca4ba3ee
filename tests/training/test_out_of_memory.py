"""What is said when a run does not fit the memory."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mnclglf.config import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, UsageError
from mnclglf.training import out_of_memory
from mnclglf.training.loop import Trainer, TrainingError
from mnclglf.training.memory import step_memory
from mnclglf.training.out_of_memory import advice, check_memory
from mnclglf.training.start import Machine
from mnclglf.training.step import TrainStep

CONFIG = RunConfig(
    method="simsiam",
    dataset="digits",
    data=DataConfig(train_images=256),
    model=ModelConfig(width=8, projector_width=32, predictor_width=16),
    objective=ObjectiveConfig(queue_size=256),
    optim=OptimConfig(epochs=1, batch_size=64),
    engine=EngineConfig(device="cpu", precision="fp32", save_every=0.5),
)
CPU = Machine(torch.device("cpu"), torch.float32)
GIB = 2**30


def needed(batch: int, config: RunConfig = CONFIG, side: int = 64) -> int:
    return step_memory(config, batch, side, torch.float32).total


def named_batch(text: str) -> int:
    found = re.search(r"--batch-size (\d+)", text)
    assert found is not None, text
    return int(found[1])


def test_the_largest_batch_fits_by_the_estimate() -> None:
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, batch_size=4096))
    available = needed(2048) + GIB  # a GiB is no tensor's
    fits = named_batch(advice(config, 64, CPU, available))
    assert fits == pytest.approx(2048, rel=0.01)  # a multiple of 8 of a line through two estimates


def test_the_estimate_is_scaled_by_the_measured_peak() -> None:
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, batch_size=4096))
    available = needed(2048) + GIB
    plain = named_batch(advice(config, 64, CPU, available))
    measured = named_batch(advice(config, 64, CPU, available, peak=2 * needed(4096)))
    # Of what was twice as much as estimated half fits, and a tenth of that is left free.
    assert measured == pytest.approx(0.45 * plain, rel=0.03)


def test_a_run_that_the_estimate_would_let_fit_gets_a_smaller_batch_all_the_same() -> None:
    assert 2 <= named_batch(advice(CONFIG, 64, CPU, 64 * GIB)) < 64


def test_the_switch_that_saves_most_is_named() -> None:
    text = advice(CONFIG, 64, CPU, 64 * GIB)
    checkpointed = dataclasses.replace(CONFIG, engine=EngineConfig(activation_checkpointing=True))
    taken = {
        "--activation-checkpointing": step_memory(checkpointed, 64, 64, torch.float32).total,
        "--precision bf16": step_memory(CONFIG, 64, 64, torch.bfloat16).total,
    }
    assert f"saves most is {min(taken, key=lambda name: taken[name])}" in text
    both = dataclasses.replace(CONFIG, engine=EngineConfig(activation_checkpointing=True))
    assert "--image-size 48" in advice(both, 64, Machine(CPU.device, torch.bfloat16), 64 * GIB)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")],
)
def test_a_run_out_of_memory_says_what_fits_and_what_is_kept(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainStep.__call__

    def full(self: TrainStep, number: int, *others: Any, **named: Any) -> Any:
        if number == 3:
            raise error
        return step(self, number, *others, **named)

    monkeypatch.setattr(TrainStep, "__call__", full)
    with pytest.raises(
        TrainingError, match=r"out of memory: a step on 64 images of side 8 .*--batch-size \d+"
    ) as raised:
        Trainer(CONFIG, tmp_path).train()
    assert "step-00000002.pt is whole" in str(raised.value)
    monkeypatch.undo()
    Trainer(CONFIG, tmp_path).train()
    assert (tmp_path / "checkpoints" / "step-00000004.pt").exists()


def test_another_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise RuntimeError("sizes differ")

    monkeypatch.setattr(TrainStep, "__call__", wrong)
    with pytest.raises(RuntimeError, match="sizes differ"):
        Trainer(CONFIG, tmp_path).train()


def test_a_start_out_of_memory_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mnclglf.training.start.make_views", full)
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda _: 2 * GIB)
    with pytest.raises(UsageError, match=r"2 GiB can be had.*--batch-size"):
        Trainer(CONFIG, tmp_path)


def test_a_hopeless_run_is_refused_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda device: needed(64) // 2 + GIB)
    check_memory(CONFIG, 64, CPU, ranks=1)  # tight, and perhaps it fits
    with pytest.raises(UsageError, match=r"out of memory: a step on 64 images of side 2048.* lower|smaller"):
        check_memory(CONFIG, 2048, CPU, ranks=1)
    assert torch.equal(torch.get_rng_state(), state)
