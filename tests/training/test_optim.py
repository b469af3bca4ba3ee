"""Every optimizer of the table keeps a step's promises; LARS of a whole network against loops over its numbers."""

import copy
import io
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from training.test_step import FP64, MODEL, NoReadBack, make_batch, make_method

from mnclglf.cli import main, parse
from mnclglf.commands import Train
from mnclglf.config import EngineConfig, ObjectiveConfig, OptimConfig, RunConfig, from_dict, to_dict
from mnclglf.data.loader import Batch
from mnclglf.methods import SimSiam
from mnclglf.models.batch_norm import batch_norms
from mnclglf.runs.checkpoint import list_checkpoints, load_checkpoint
from mnclglf.runs.files import differences, read_config
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.lars import LARS
from mnclglf.training.loop import Trainer
from mnclglf.training.optim import OPTIMIZERS, make_optimizer
from mnclglf.training.step import TrainStep

EVERY = pytest.mark.parametrize("name", OPTIMIZERS)
RUN = shlex.split(
    "train --dataset digits --recipe quick --image-size 8 --train-images 64 --loader reference --loader-threads 1 "
    "--width 2 --projector-width 16 --predictor-width 8 --queue-size 80 --one-embedding --epochs 2 --batch-size 16 "
    "--lr 0.5 --device cpu --log-every 2"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def configuration(arguments: list[str]) -> RunConfig:
    command = parse(arguments)
    assert isinstance(command, Train)
    return command.config


def optim(name: str, **changes: Any) -> OptimConfig:
    return OptimConfig(optimizer=name, weight_decay=0.01, **changes)


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """Every number that a step may change: weights, momentum network, queue and the optimizer's state."""
    found = {name: value.clone() for name, value in step.method.state_dict().items() if "running" not in name}
    found = {name: value for name, value in found.items() if "num_batches" not in name}
    names: dict[Tensor, str] = {parameter: name for name, parameter in step.method.named_parameters()}
    for parameter, kept in step.optimizer.state.items():
        found |= {f"{names[parameter]}: {key}": value.clone() for key, value in kept.items()}
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Every optimizer.


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_operator_of_a_step_reads_back(name: str, dtype: torch.dtype) -> None:
    step = TrainStep(make_method(dtype=dtype), optim(name, clip_norm=1.0), EngineConfig(), dtype)
    step(0, make_batch(dtype=dtype), lr=0.1, momentum=0.9)  # the loss scale is made
    with NoReadBack():
        step(1, make_batch(dtype=dtype), lr=0.1, momentum=0.9)


@EVERY
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    step = TrainStep(make_method(), optim(name), EngineConfig(), torch.float32)
    for number in range(2):  # the second step has a momentum to keep
        step(number, make_batch(first=16 * number), lr=0.1, momentum=0.9)
    before = state_of(step)
    handle = step.method.get_parameter("encoder.conv1.weight").register_hook(lambda gradient: gradient * torch.nan)
    step(2, make_batch(first=32), lr=0.1, momentum=0.9)
    handle.remove()
    assert_same(state_of(step), before)
    step(3, make_batch(first=48), lr=0.1, momentum=0.9)  # finite again, but behind a step that was not
    assert_same(state_of(step), before)
    with pytest.raises(NonFiniteError, match="step 2: gradient not finite"):
        step.guard.raise_if_failed()


@EVERY
def test_an_fp16_overflow_skips_the_step_and_halves_the_loss_scale(name: str) -> None:
    method, batch = make_method(dtype=torch.float16), make_batch(dtype=torch.float16)
    step = TrainStep(method, optim(name), EngineConfig(), torch.float16)
    for number in range(3):
        step(number, batch, lr=0.1, momentum=0.9)
    scale, before = step.scaler.get_scale(), state_of(step)
    handle = method.get_parameter("encoder.conv1.weight").register_hook(lambda gradient: gradient * torch.inf)
    step(3, batch, lr=0.1, momentum=0.9)
    handle.remove()
    assert step.scaler.get_scale() == scale / 2
    assert_same(state_of(step), before)
    step(4, batch, lr=0.1, momentum=0.9)
    step.guard.raise_if_failed()
    assert not torch.equal(method.get_parameter("encoder.conv1.weight"), before["encoder.conv1.weight"])


@EVERY
def test_training_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Through a file that is read back as a checkpoint is, with weights_only."""
    step = TrainStep(make_method(), optim(name), EngineConfig(), torch.float32)
    for number in range(2):
        step(number, make_batch(first=16 * number), lr=0.1, momentum=0.9)
    torch.save({"method": step.method.state_dict(), **step.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = TrainStep(make_method(), optim(name), EngineConfig(), torch.float32)
    resumed.method.load_state_dict(state["method"])
    resumed.load_state_dict(state)
    assert_same(state_of(resumed), state_of(step))
    for number in range(2, 4):
        batch = make_batch(first=16 * number)
        for one in (step, resumed):
            torch.manual_seed(number)  # of the one embedding
            one(number, batch, lr=0.05, momentum=0.9)
    assert_same(state_of(resumed), state_of(step))


@EVERY
def test_the_learning_rates_are_tensors_that_a_step_sets_in_place(name: str) -> None:
    step = TrainStep(make_method(), optim(name), EngineConfig(), torch.float32)
    rates = [group["lr"] for group in step.optimizer.param_groups]
    assert len({rate.data_ptr() for rate in rates}) == len(rates)
    before = {key: value.clone() for key, value in step.method.named_parameters()}
    step(0, make_batch(), lr=0.0, momentum=1.0)
    assert_same(dict(step.method.named_parameters()), before)
    step(1, make_batch(), lr=0.25, momentum=1.0)
    for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate
        assert rate == 0.25
    assert not torch.equal(step.method.get_parameter("encoder.conv1.weight"), before["encoder.conv1.weight"])


@EVERY
def test_a_predictor_of_constant_rate_keeps_it(name: str) -> None:
    step = TrainStep(make_method(), optim(name, lr=0.5, constant_predictor_lr=True), EngineConfig(), torch.float32)
    before = {key: value.clone() for key, value in step.method.named_parameters() if value.requires_grad}
    step(0, make_batch(), lr=0.0, momentum=0.9)
    for key, value in step.method.named_parameters():
        if key in before:
            assert torch.equal(value, before[key]) != key.startswith("predictor."), key
    trained = {parameter for group in step.optimizer.param_groups for parameter in group["params"]}
    assert trained == {*step.method.trained_parameters()}


@EVERY
def test_the_state_goes_on_in_another_memory_format(name: str) -> None:
    """The fused kernels go through weights and state as they lie in memory."""
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    steps = {
        on: TrainStep(
            make_method(dtype=torch.float64, memory_format=form),
            optim(name),
            EngineConfig(channels_last=on),
            torch.float32,
        )
        for on, form in formats.items()
    }
    steps[True](0, make_batch(dtype=torch.float64), lr=2**-7, momentum=0.9)
    steps[False].method.load_state_dict(steps[True].method.state_dict())
    steps[False].load_state_dict(copy.deepcopy(steps[True].state_dict()))
    batch = make_batch(dtype=torch.float64, first=16)
    for step in steps.values():
        step(1, batch, lr=2**-7, momentum=0.9)
    expected = dict(steps[True].method.named_parameters())
    for key, parameter in steps[False].method.named_parameters():
        torch.testing.assert_close(parameter, expected[key], **FP64, msg=lambda text, key=key: f"{key}: {text}")


@EVERY
def test_a_run_trains_resumes_and_tells_its_optimizer(name: str, tmp_path: Path) -> None:
    arguments = [*RUN, "--optimizer", name]
    assert main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    assert read_config(tmp_path / "straight").optim.optimizer == name
    config = configuration(arguments)
    run = Trainer(config, tmp_path / "halved", console=Console(file=io.StringIO()))
    end = run.schedule.total_steps
    batches = run.loader.batches

    def first_half(start: int, stop: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start, stop), start):
            if step == end // 2:
                raise KeyboardInterrupt
            yield batch

    run.loader.batches = first_half
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert Trainer(config, tmp_path / "halved", console=Console(file=io.StringIO())).train() is None
    straight, halved = (
        load_checkpoint(list_checkpoints(tmp_path / out / "checkpoints")[-1][1]) for out in ("straight", "halved")
    )
    assert straight["step"] == halved["step"] == end
    assert_same(straight["method"], halved["method"])
    assert straight["optimizer"]["state"].keys() == halved["optimizer"]["state"].keys()
    for key, kept in straight["optimizer"]["state"].items():
        assert_same(kept, halved["optimizer"]["state"][key])


def test_an_optimizer_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    config = configuration([*RUN, "--optimizer", "adagrad"])
    with pytest.raises(ValueError, match=r"optimizer 'adagrad'.*sgd, lars"):
        Trainer(config, tmp_path / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_settings_from_before_there_was_a_choice_are_sgd() -> None:
    values = json.loads(json.dumps(to_dict(RunConfig())))
    del values["optim"]["optimizer"]
    assert from_dict(values).optim.optimizer == "sgd"
    assert differences(from_dict(values), RunConfig()) == []
    lars = RunConfig(optim=OptimConfig(optimizer="lars"))
    assert differences(from_dict(values), lars) == ["optim.optimizer: sgd -> lars"]


# LARS.


def one_tensor(
    weight: list[float], gradients: list[list[float]], rates: list[float], *, decay: float, adapted: bool
) -> list[float]:
    """Weights after some steps, momentum 0.9 and trust 0.001, one number after the other in fp64.

    SimCLR's and BYOL's LARS (You et al. 2017, equation 6; the rate multiplies the momentum, as in PyTorch's SGD): a
    tensor that is not adapted trains by SGD with momentum, without weight decay.
    """
    weight, velocity = list(weight), [0.0] * len(weight)
    for gradient, rate in zip(gradients, rates, strict=True):
        ratio, beta = 1.0, 0.0
        if adapted:
            beta = decay
            norm = math.sqrt(sum(w * w for w in weight))
            gradient_norm = math.sqrt(sum(g * g for g in gradient))
            if norm > 0 and gradient_norm > 0:
                ratio = 0.001 * norm / (gradient_norm + beta * norm)
        for i in range(len(weight)):
            velocity[i] = 0.9 * velocity[i] + ratio * (gradient[i] + beta * weight[i])
        for i in range(len(weight)):
            weight[i] -= rate * velocity[i]
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_of_a_network_agrees_with_loops_over_its_numbers(decay: float) -> None:
    """As pre-training calls it, the rate a tensor and found_inf set: a convolution, a zero one, a norm and a bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {"conv": draw(4, 3, 2, 2), "zero": torch.zeros(3, 2).double(), "norm": 1 + draw(4), "bias": draw(3)}
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    config = OptimConfig(optimizer="lars", weight_decay=decay)
    optimizer = OPTIMIZERS["lars"]([[*parameters.values()]], config)
    assert isinstance(optimizer, LARS)
    rates = [0.8 * math.cos(step / 4) for step in range(6)]
    gradients = {name: [draw(*weight.shape) for _ in rates] for name, weight in weights.items()}
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(rate, dtype=torch.float64)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    for name, parameter in parameters.items():
        expected = one_tensor(
            weights[name].flatten().tolist(),
            [gradient.flatten().tolist() for gradient in gradients[name]],
            rates,
            decay=decay,
            adapted=name in ("conv", "zero"),
        )
        # fp64: six steps of a few roundings of 2^-53, of numbers near 1.
        torch.testing.assert_close(parameter.flatten().tolist(), expected, rtol=1e-12, atol=1e-13)


def test_lars_adapts_and_decays_weights_but_neither_biases_nor_norms() -> None:
    """By the kind of module that a parameter belongs to."""
    method = SimSiam(MODEL, ObjectiveConfig()).train()
    optimizer = make_optimizer(method, optim("lars"))
    assert isinstance(optimizer, LARS)
    multiplied = {
        module.weight for module in method.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }  # fmt: skip
    adapted = {p for group in optimizer.param_groups if group["adapts"] for p in group["params"]}
    others = {p for group in optimizer.param_groups if not group["adapts"] for p in group["params"]}
    assert adapted == multiplied
    assert others == {*method.trained_parameters()} - multiplied
    norms = batch_norms(method)
    assert len(norms) > 20
    assert {p for norm in norms for p in norm.parameters()} <= others
    assert [group["weight_decay"] for group in optimizer.param_groups if not group["adapts"]] == [0.0]
    before = {parameter: parameter.clone() for parameter in method.trained_parameters()}
    for parameter in before:
        parameter.grad = torch.full_like(parameter, 0.5)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.125)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    for parameter in others:
        torch.testing.assert_close(parameter, before[parameter] - 0.0625, rtol=0, atol=0)  # exact: powers of two
    for parameter in adapted:
        assert (parameter - before[parameter]).norm() <= 0.125 * 0.001 * 1.001 * before[parameter].norm()  # |ratio g|


def test_lars_on_the_meta_device_asks_for_no_value() -> None:
    parameters = [nn.Parameter(torch.empty(4, 3, device="meta")), nn.Parameter(torch.empty(4, device="meta"))]
    optimizer = OPTIMIZERS["lars"]([parameters], OptimConfig(optimizer="lars"))
    assert isinstance(optimizer, LARS)
    optimizer.found_inf = torch.empty((), device="meta")
    for group in optimizer.param_groups:
        group["lr"] = torch.empty((), device="meta")
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # on the meta device a value that is asked for raises
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.found_inf.item()


@pytest.mark.gpu
@EVERY
def test_a_step_on_the_gpu_never_synchronizes(name: str) -> None:
    device = torch.device("cuda")
    step = TrainStep(make_method(device), optim(name), EngineConfig(), torch.float32)
    step(0, make_batch(device), lr=0.1, momentum=0.99)  # libraries initialize themselves
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1, make_batch(device), lr=0.1, momentum=0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")
