"""Tests of a step's estimated memory against what it uses."""

import dataclasses

import pytest
import torch
from torch import Tensor

from bench.harness import peak_bytes
from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from mnclglf.data.loader import Batch
from mnclglf.training.memory import RESERVED, largest_batch, step_memory
from mnclglf.training.start import build_method
from mnclglf.training.step import TrainStep
from mnclglf_kernels import Backends

IMAGES, SIDE = 32, 16
CONFIG = RunConfig(
    model=ModelConfig(width=16, projector_width=32, predictor_width=16),
    objective=ObjectiveConfig(queue_size=64),
    optim=OptimConfig(batch_size=IMAGES),
)
CHECKPOINTED = dataclasses.replace(CONFIG, engine=EngineConfig(activation_checkpointing=True))
OTHERS = [
    dataclasses.replace(CONFIG, method=method, model=dataclasses.replace(CONFIG.model, classes=4))
    for method in ("supervised", "fast_moco", "mnclglf_official")
]


def make_step(config: RunConfig) -> tuple[TrainStep, Batch]:
    method = build_method(config, torch.float32).train()
    method.backends = Backends.all("triton")  # as on a GPU, interpreted
    labels = torch.arange(IMAGES) % 4
    step = TrainStep(method, config.optim, config.engine, torch.float32, labels=labels)
    views = torch.randn(method.views * IMAGES, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    return step, Batch(views, torch.arange(IMAGES))


def saved_bytes(config: RunConfig) -> int:
    """Returns the bytes that autograd saves in a real forward, each storage once, without weights and buffers."""
    step, batch = make_step(config)
    own = {x.untyped_storage().data_ptr() for x in (*step.method.parameters(), *step.method.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = step.forward(batch.views, step.labels)
    del losses
    return sum(x.untyped_storage().nbytes() for address, x in saved.items() if address not in own)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CONFIG, CHECKPOINTED, *OTHERS], ids=["plain", "checkpointed", *(config.method for config in OTHERS)]
)
def test_the_activations_are_those_that_autograd_saves(config: RunConfig) -> None:
    assert step_memory(config, IMAGES, SIDE, torch.float32).activations == saved_bytes(config)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the peak is that of the GPU there, and of kernels that ran on it"
)
@pytest.mark.parametrize("config", [CONFIG, CHECKPOINTED], ids=["plain", "checkpointed"])
def test_a_step_has_as_much_alive_as_is_estimated(config: RunConfig) -> None:
    step, batch = make_step(config)
    step.method.backends = Backends.all("torch")
    step(0, batch, lr=0.1, momentum=0.9)
    alive = peak_bytes(lambda: step(1, batch, lr=0.1, momentum=0.9))
    estimate = step_memory(config, IMAGES, SIDE, torch.float32).for_step
    # `passing` is only a rough estimate, and oneDNN keeps weights in its own formats.
    assert 0.75 * alive < estimate < 1.35 * alive


def test_what_is_kept_is_the_state() -> None:
    step, _ = make_step(CONFIG)
    momentum = sum(x["momentum_buffer"].nbytes for x in step.optimizer.state.values())
    state = sum(value.nbytes for value in step.method.state_dict().values())
    assert step_memory(CONFIG, IMAGES, SIDE, torch.float32).kept == state + momentum


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    memory = 2**31
    fits = largest_batch(CONFIG, SIDE, torch.bfloat16, memory)
    assert step_memory(CONFIG, fits, SIDE, torch.bfloat16).total + RESERVED <= memory
    assert step_memory(CONFIG, round(1.02 * fits), SIDE, torch.bfloat16).total + RESERVED > memory
    assert largest_batch(CHECKPOINTED, SIDE, torch.bfloat16, memory) > 1.5 * fits
    assert largest_batch(CONFIG, SIDE, torch.bfloat16, RESERVED) == 0


def test_the_largest_batch_of_images_so_small_that_gradients_need_more_than_activations() -> None:
    heads = ModelConfig(width=2, projector_width=1024, predictor_width=512)
    config, side, memory = dataclasses.replace(CONFIG, model=heads), 8, RESERVED + 2**28
    small = step_memory(config, 64, side, torch.bfloat16)
    assert small.gradients > small.activations + small.passing
    fits = largest_batch(config, side, torch.bfloat16, memory)
    assert step_memory(config, fits, side, torch.bfloat16).total + RESERVED <= memory
    assert step_memory(config, round(1.02 * fits), side, torch.bfloat16).total + RESERVED > memory
    assert largest_batch(config, side, torch.bfloat16, RESERVED + small.kept + small.casts) == 0
