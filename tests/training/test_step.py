"""Tests that a training step never waits for the device, and that no optimization changes its result."""

import copy
import ctypes
import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.methods import MNCLGLF, SimCLR, Supervised
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.optim import rate_tensor
from mnclglf.training.speedups import cast, keep_freed_memory, share_casts, use_fast_math
from mnclglf.training.step import TrainStep
from mnclglf_kernels import Backends

CPU = torch.device("cpu")
PLAIN = EngineConfig(channels_last=False, tf32=False, cudnn_benchmark=False, keep_memory=False, compile="off")
MODEL = ModelConfig(width=4, projector_width=16, predictor_width=8)
READS_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class NoReadBack(TorchDispatchMode):
    """Raises on operators whose result the host must wait for, and on copies from a device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS_BACK, f"aten::{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0}
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        assert "cpu" not in made or devices <= {"cpu"}, f"aten::{name} copies to the host"
        return result


def make_method(
    device: torch.device = CPU,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    one_embedding: bool = False,
) -> MNCLGLF:
    torch.manual_seed(0)
    method = MNCLGLF(MODEL, ObjectiveConfig(queue_size=40, one_embedding=one_embedding), queue_dtype=dtype)
    method.to(device, torch.promote_types(dtype, torch.float32))
    return method.to(memory_format=memory_format).train()


def make_batch(device: torch.device = CPU, dtype: torch.dtype = torch.float32, first: int = 0) -> Batch:
    """Returns a batch of noise, the same on every device."""
    views = torch.randn(48, 3, 16, 16).to(device, dtype, memory_format=torch.channels_last)
    return Batch(views, torch.arange(first, first + 16, device=device))


def trained(
    engine: EngineConfig,
    *,
    dtype: torch.dtype = torch.float32,
    compile: str = "off",
    steps: int = 2,
    device: torch.device = CPU,
) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """Returns losses and gradient norms, state and SGD's momentum after steps from one start, each on its own batch.

    In float64 without autocast, so that two orders of a sum differ little after batch norms of 16 images.
    """
    memory_format = torch.channels_last if engine.channels_last else torch.contiguous_format
    method = make_method(device, dtype=dtype, memory_format=memory_format)
    autocast = torch.float32 if dtype == torch.float64 else dtype
    step = TrainStep(method, OptimConfig(), engine, autocast, compile=compile)
    losses = []
    for number in range(steps):
        torch.manual_seed(number)
        batch = make_batch(device, dtype, first=16 * number)
        found, gradient_norm = step(number, batch, lr=2**-7, momentum=0.9)  # the same number in fp32 and fp64
        losses += [found.total.item(), gradient_norm.item()]
    step.guard.raise_if_failed()
    state = {name: value.cpu() for name, value in method.state_dict().items()}
    return losses, state, [x["momentum_buffer"].cpu() for x in step.optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_operator_of_a_step_reads_back(dtype: torch.dtype) -> None:
    step = TrainStep(make_method(dtype=dtype, one_embedding=True), OptimConfig(clip_norm=1.0), EngineConfig(), dtype)
    batch = make_batch(dtype=dtype)
    step(0, batch, lr=0.1, momentum=0.99)  # makes the loss scale
    with NoReadBack():
        losses, gradient_norm = step(1, batch, lr=0.1, momentum=0.99)
    assert losses.total.isfinite()
    assert gradient_norm > 0
    with pytest.raises(AssertionError, match="waits for the device"), NoReadBack():
        losses.total.item()


def test_nothing_of_a_step_comes_to_the_host(fused_sgd_on_meta: None) -> None:
    """Runs on the meta device, where no value can be copied or read; autocast does not support it."""
    meta = torch.device("meta")
    method = make_method(meta)
    method.backends = Backends.all("triton")
    with torch.device("meta"):
        step = TrainStep(method, OptimConfig(clip_norm=1.0), EngineConfig(), torch.float32)
        with NoReadBack():
            losses, gradient_norm = step(0, make_batch(meta), lr=0.1, momentum=0.99)
    assert losses.total.device == gradient_norm.device == meta
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"), NoReadBack():
        losses.total.to("cpu")


def test_a_method_with_labels_trains_without_reading_back() -> None:
    method = Supervised(dataclasses.replace(MODEL, classes=4), ObjectiveConfig()).train()
    step = TrainStep(method, OptimConfig(), EngineConfig(), torch.bfloat16, labels=torch.arange(16) % 4)
    batch = Batch(make_batch(dtype=torch.bfloat16).views[:16], torch.arange(16))
    with NoReadBack():
        first, _ = step(0, batch, lr=0.1, momentum=0.99)
        second, _ = step(1, batch, lr=0.1, momentum=0.99)
    assert second.total < first.total


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_a_gradient_is_clipped_as_pytorch_clips_it(clip_norm: float) -> None:
    method, batch = make_method(), make_batch()
    plain = copy.deepcopy(method)
    torch.manual_seed(3)  # chooses the one embedding
    step = TrainStep(method, OptimConfig(clip_norm=clip_norm, weight_decay=0.01), PLAIN, torch.float32)
    _, norm = step(0, batch, lr=0.5, momentum=0.99)
    torch.manual_seed(3)
    plain(batch.views).total.backward()
    parameters = plain.trained_parameters()
    unclipped = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    assert 0.1 < unclipped < 1e6
    torch.testing.assert_close(norm, unclipped)
    for ours, parameter in zip(method.trained_parameters(), parameters, strict=True):
        assert parameter.grad is not None
        expected = parameter - 0.5 * (parameter.grad + 0.01 * parameter)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)  # fp32: the same products, fused or not


def assert_same_training(first: Any, second: Any, *, rtol: float, atol: float) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


FP64: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
"""Tolerance: 2^-53 per rounding, times a million for twenty layers of batch norms of 16 images and the steps."""
SWITCHES = {
    "channels_last": dataclasses.replace(PLAIN, channels_last=True),
    "activation_checkpointing": dataclasses.replace(PLAIN, activation_checkpointing=True),
    "all": EngineConfig(activation_checkpointing=True),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_no_number(name: str) -> None:
    """Checks the same operations with sums in another order."""
    assert_same_training(trained(SWITCHES[name], dtype=torch.float64), trained(PLAIN, dtype=torch.float64), **FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the second with shared casts
def test_a_checkpointed_step_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    """Checks that a block's second forward repeats the first and does not change the running statistics."""
    assert_same_training(
        trained(SWITCHES["activation_checkpointing"], dtype=dtype), trained(PLAIN, dtype=dtype), rtol=0, atol=0
    )


def test_checkpointing_saves_less_and_computes_again() -> None:
    def saved_and_forwards(engine: EngineConfig) -> tuple[int, int]:
        method, convolutions = make_method(), Counter()
        step, saved = TrainStep(method, OptimConfig(), engine, torch.float32), {}

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                convolutions[func.overloadpacket.__name__] += 1
                return func(*args, **(kwargs or {}))

        def keep(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Count():
            step(0, make_batch(), lr=0.1, momentum=0.9)
        return sum(x.untyped_storage().nbytes() for x in saved.values()), convolutions["convolution"]

    (plain, once), (checkpointed, again) = (
        saved_and_forwards(SWITCHES["activation_checkpointing"] if on else PLAIN) for on in (False, True)
    )
    assert checkpointed < 0.6 * plain
    assert again == once + 19  # all but the stem's, for the three views in one batch


def names_of_casts(method: MNCLGLF, forward: Callable[..., Any], batch: Batch) -> Counter[str]:
    """Returns the number of casts to bf16 per weight in a forward under autocast."""
    names, casts = {p.data_ptr(): name for name, p in method.named_parameters()}, Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default):
                sources = args[1] if func is torch.ops.aten._foreach_copy_.default else args[:1]
                casts.update(names[x.data_ptr()] for x in sources if x.data_ptr() in names)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        forward(batch.views)
    return casts


def test_a_weight_is_cast_once_a_step() -> None:
    method, batch = make_method(dtype=torch.bfloat16), make_batch(dtype=torch.bfloat16)
    multiplied = {
        f"{path}.{name}"
        for path, module in method.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for name, _ in module.named_parameters(recurse=False)
    }
    assert names_of_casts(method, share_casts(method, torch.bfloat16), batch) == dict.fromkeys(multiplied, 1)
    assert share_casts(method, torch.float32) is method


def test_a_weight_is_cast_to_fp16_once_a_step_and_otherwise_only_if_that_is_used() -> None:
    method, batch = fused_in_fp16(make_method(dtype=torch.bfloat16)), make_batch(dtype=torch.bfloat16)
    counts = names_of_casts(method, share_casts(method, torch.bfloat16), batch)
    convolutions = [f"{path}.weight" for path, x in method.encoder.named_modules() if isinstance(x, nn.Conv2d)]
    assert {f"encoder.{name}": counts[f"encoder.{name}"] for name in convolutions} == {
        f"encoder.{name}": 2 for name in convolutions
    }
    assert {counts[f"momentum.0.{name}"] for name in convolutions} == {1}


def test_shared_casts_train_to_the_bit_as_autocast_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trained(PLAIN, dtype=torch.bfloat16)
    monkeypatch.setattr("mnclglf.training.step.share_casts", lambda method, dtype: method)
    assert_same_training(ours, trained(PLAIN, dtype=torch.bfloat16), rtol=0, atol=0)


def test_a_fixed_input_takes_any_batch_and_copies_none_that_lies_there() -> None:
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is torch.ops.aten.copy_.default and args[0].shape == (48, 3, 16, 16):
                copied.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    torch.manual_seed(1)
    copied: list[int] = []
    steps = [TrainStep(make_method(), OptimConfig(), EngineConfig(), torch.float32) for _ in range(2)]
    fixed = steps[1].fix_input((48, 3, 16, 16))
    assert fixed.is_contiguous(memory_format=torch.channels_last)
    for number, lies_there in enumerate((False, True, False)):
        batch = make_batch(first=16 * number)
        expected, _ = steps[0](number, batch, lr=0.1, momentum=0.9)
        if lies_there:
            batch = Batch(fixed.copy_(batch.views), batch.indices)
        copied.clear()
        with Copies():
            found, _ = steps[1](number, batch, lr=0.1, momentum=0.9)
        assert copied == ([] if lies_there else [fixed.data_ptr()])
        assert torch.equal(found.total, expected.total)


def test_a_cast_keeps_the_memory_format() -> None:
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    (result,) = cast([weight], torch.bfloat16)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, weight.bfloat16())


def test_the_learning_rate_is_a_tensor_on_the_device_and_takes_effect() -> None:
    method = make_method()
    step = TrainStep(method, OptimConfig(weight_decay=0.0), EngineConfig(), torch.float32)
    rate = step.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    before = method.get_parameter("encoder.conv1.weight").clone()
    step(0, make_batch(), lr=0.0, momentum=0.9)
    assert torch.equal(method.get_parameter("encoder.conv1.weight"), before)
    step(1, make_batch(), lr=0.5, momentum=0.9)
    assert step.optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5
    assert not torch.equal(method.get_parameter("encoder.conv1.weight"), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_learning_rate_on_a_gpu_is_in_fp32(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(3, dtype=dtype, device="cuda"))
        rate = rate_tensor(0.1, weight)
    assert (rate.device.type, rate.dtype) == ("cuda", torch.float32)
    assert rate_tensor(0.1, nn.Parameter(torch.empty(3, dtype=dtype))).dtype == dtype


def sgd_in_two_groups(method: MNCLGLF, rates: list[float], optim: OptimConfig) -> dict[str, Tensor]:
    """Returns weights after steps of torch's plain SGD at these learning rates, the predictor's at `optim.lr`."""
    predictor = [*method.predictor.parameters()]
    rest = [*method.encoder.parameters(), *method.projector.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": rest}, {"params": predictor}], optim.lr, momentum=0.9, weight_decay=optim.weight_decay
    )
    for number, rate in enumerate(rates):
        torch.manual_seed(number)
        batch = make_batch(first=16 * number)
        losses = method(batch.views)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        method.after_step(losses, batch.indices, momentum=0.9, should_update=torch.tensor(True))
    return dict(method.named_parameters())


def test_a_predictor_at_a_constant_rate_is_another_group_of_sgd_and_goes_on_after_a_checkpoint() -> None:
    """Compares steps in fp32, fused or not: they differ by a few ulps, amplified by the batch norms of two steps."""
    optim, rates = OptimConfig(lr=0.1, weight_decay=0.01, constant_predictor_lr=True), [0.1, 0.06, 0.02]
    expected = sgd_in_two_groups(make_method(), rates, optim)
    method = make_method()
    step = TrainStep(method, optim, EngineConfig(), torch.float32)
    for number, rate in enumerate(rates):
        if number == 2:  # as a resumed run does
            state, weights = copy.deepcopy(step.state_dict()), copy.deepcopy(method.state_dict())
            method = make_method()
            method.load_state_dict(weights)
            step = TrainStep(method, optim, EngineConfig(), torch.float32)
            step.load_state_dict(state)
        torch.manual_seed(number)
        batch = make_batch(first=16 * number)
        with NoReadBack():
            step(number, batch, lr=rate, momentum=0.9)
    step.guard.raise_if_failed()
    assert [group["lr"].item() for group in step.optimizer.param_groups] == pytest.approx([0.02, 0.1])
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_a_constant_rate_needs_a_predictor() -> None:
    method = SimCLR(MODEL, ObjectiveConfig(), queue_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"SimCLR.*--constant-predictor-lr"):
        TrainStep(method, OptimConfig(constant_predictor_lr=True), EngineConfig(), torch.float32)


def test_one_fused_kernel_updates_all_weights_and_one_the_momentum_network() -> None:
    step, calls = TrainStep(make_method(), OptimConfig(), EngineConfig(), torch.float32), Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        step(0, make_batch(), lr=0.1, momentum=0.9)
    assert calls["aten._fused_sgd_.tensor_lr"] == 2  # both rates are read on the device
    assert not any("lerp" in name for name in calls)


def test_an_fp16_gradient_that_overflows_costs_its_step_and_halves_the_scale() -> None:
    method, batch = make_method(dtype=torch.float16), make_batch(dtype=torch.float16)
    step = TrainStep(method, OptimConfig(), EngineConfig(), torch.float16)
    step(0, batch, lr=0.1, momentum=0.9)
    scale = step.scaler.get_scale()
    before = {name: value.clone() for name, value in method.named_parameters()}
    rows = method.queue.rows.clone()
    handle = method.get_parameter("encoder.conv1.weight").register_hook(lambda gradient: gradient * torch.inf)
    step(1, batch, lr=0.1, momentum=0.9)
    handle.remove()
    assert step.scaler.get_scale() == scale / 2
    for name, value in method.named_parameters():
        assert torch.equal(value, before[name]), name
    assert torch.equal(method.queue.rows, rows)
    step.guard.raise_if_failed()
    step(2, batch, lr=0.1, momentum=0.9)
    step.guard.raise_if_failed()
    assert not torch.equal(method.get_parameter("encoder.conv1.weight"), before["encoder.conv1.weight"])


def test_an_fp16_gradient_that_is_never_finite_is_an_error() -> None:
    step = TrainStep(make_method(dtype=torch.float16), OptimConfig(), EngineConfig(), torch.float16)
    step.method.get_parameter("encoder.conv1.weight").register_hook(lambda gradient: gradient * torch.nan)
    for number in range(18):  # from 2^16 to below 1
        step(number, make_batch(dtype=torch.float16), lr=0.1, momentum=0.9)
    with pytest.raises(NonFiniteError, match="step 17: gradient not finite"):
        step.guard.raise_if_failed()


def fused_in_fp16(method: MNCLGLF) -> MNCLGLF:
    """Lets both networks without gradient compute in fp16; the width has no Triton kernel, so PyTorch computes."""
    method.fuse("triton", half_sums=True)
    return method


@pytest.mark.parametrize(
    ("network", "dtype"),
    [("momentum", torch.bfloat16), ("momentum", torch.float16), ("stop-gradient", torch.bfloat16)],
    ids=str,
)
def test_an_overflow_without_gradient_costs_its_step_alone(network: str, dtype: torch.dtype) -> None:
    method, batch = fused_in_fp16(make_method(dtype=dtype)), make_batch(dtype=dtype)
    step = TrainStep(method, OptimConfig(), EngineConfig(), dtype)
    step(0, batch, lr=0.1, momentum=0.9)
    encoder = method.encoder if network == "stop-gradient" else method.encoders()[1]
    weight = encoder.get_parameter("layer2.0.conv1.weight")
    kept = weight.detach().clone()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():  # of the weight in fp16 alone: a batch norm later the result would be the same in fp32
        weight.mul_(1e8)
    wrong = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    losses, _ = step(1, batch, lr=0.1, momentum=0.9)
    # A lookup of keys that are no numbers finds row 0, so the losses alone do not show it.
    assert losses.total.isfinite() == (network == "momentum")
    assert step.overflows == 1
    step.guard.raise_if_failed()
    for name, value in method.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, before[name]) or name in wrong or "running" in name, name
    with torch.no_grad():
        weight.copy_(kept)
    losses, _ = step(2, batch, lr=0.1, momentum=0.9)
    assert losses.total.isfinite()
    assert step.overflows == 1
    step.guard.raise_if_failed()
    trains = dtype == torch.bfloat16  # in fp16 the first gradients overflow
    assert torch.equal(method.get_parameter("encoder.conv1.weight"), before["encoder.conv1.weight"]) != trains


def test_a_loss_that_is_not_finite_without_an_overflow_is_an_error() -> None:
    method = fused_in_fp16(make_method(dtype=torch.bfloat16))
    step = TrainStep(method, OptimConfig(), EngineConfig(), torch.bfloat16)
    with torch.no_grad():
        method.get_parameter("predictor.0.weight")[0, 0] = torch.nan
    step(0, make_batch(dtype=torch.bfloat16), lr=0.1, momentum=0.9)
    with pytest.raises(NonFiniteError, match="step 0"):
        step.guard.raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_networks_without_gradient_in_fp16_train_as_those_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    batch, steps = make_batch(), []
    for fused in (False, True):
        method = make_method(dtype=torch.float32 if not fused else dtype)
        step = TrainStep(
            fused_in_fp16(method) if fused else method, OptimConfig(), PLAIN, dtype if fused else torch.float32
        )
        losses, _ = step(0, batch, lr=0.0, momentum=1.0)
        steps.append(losses)
    expected, found = steps
    for name, value in found.terms.items():  # 2^-9 per rounding of the online network in bf16, through 20 layers
        assert value.item() == pytest.approx(expected.terms[name].item(), rel=2e-2), name


def test_fp16_trains_as_fp32_within_its_precision() -> None:
    losses, _, _ = trained(PLAIN, dtype=torch.float16)
    expected, _, _ = trained(PLAIN)
    # The first gradients overflow until the loss scale is small enough.
    assert losses[::2] == pytest.approx(expected[::2], rel=2e-2)  # 2^-11 per rounding, through 20 layers and two steps


def test_the_state_goes_on_where_it_was() -> None:
    step = TrainStep(make_method(dtype=torch.float16), OptimConfig(), EngineConfig(), torch.float16)
    for number in range(2):
        step(number, make_batch(dtype=torch.float16), lr=0.1, momentum=0.9)
    other = TrainStep(make_method(dtype=torch.float16), OptimConfig(), EngineConfig(), torch.float16)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert other.scaler.state_dict() == step.scaler.state_dict()
    assert isinstance(other.optimizer.param_groups[0]["lr"], Tensor)
    older = step.state_dict()["optimizer"]  # as earlier versions saved it, with a float as learning rate
    older["param_groups"][0]["lr"] = 0.25
    other.load_state_dict({"optimizer": older})
    assert other.optimizer.param_groups[0]["lr"] == torch.tensor(0.25)


def test_the_state_goes_on_in_another_memory_format() -> None:
    """Checks memory formats: the fused kernel assumes the same memory order for weights and momentum."""
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    steps = {
        on: TrainStep(
            make_method(memory_format=form), OptimConfig(), dataclasses.replace(PLAIN, channels_last=on), torch.float32
        )
        for on, form in formats.items()
    }
    steps[True](0, make_batch(), lr=0.1, momentum=0.9)
    steps[False].method.load_state_dict(steps[True].method.state_dict())
    steps[False].load_state_dict(copy.deepcopy(steps[True].state_dict()))
    batch = make_batch(first=16)
    for step in steps.values():
        step(1, batch, lr=0.1, momentum=0.9)
    expected = dict(steps[True].method.named_parameters())
    for name, parameter in steps[False].method.named_parameters():
        # The same operations in fp32, summed in another order, through batch norms of 16 images.
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5, msg=name)


def test_fast_math_is_switched_by_one_interface() -> None:
    cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
    matmul, convolution = torch.backends.cuda.matmul, cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision, torch.backends.cudnn.benchmark
    try:
        for on in (True, False):
            use_fast_math(dataclasses.replace(PLAIN, tf32=on, cudnn_benchmark=on), torch.float32)
            assert matmul.fp32_precision == convolution.fp32_precision == ("tf32" if on else "ieee")
            assert torch.backends.cudnn.benchmark is on
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # torch's older interface would raise here
            use_fast_math(dataclasses.replace(PLAIN, tf32=on), torch.bfloat16)
            assert matmul.fp32_precision == "ieee"  # the losses, whose products are the only ones in fp32
    finally:
        matmul.fp32_precision, convolution.fp32_precision, torch.backends.cudnn.benchmark = before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no glibc")
def test_freed_memory_stays_with_the_process() -> None:
    """Counts the page faults of ten large tensors in turn, in a subprocess, as the setting is per process."""
    script = """
import resource, sys, torch
from mnclglf.training.speedups import keep_freed_memory
if sys.argv[1] == "keep": assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(15): torch.ones(2**26, dtype=torch.uint8)  # the heap finds its size
before = faults()
for _ in range(10): torch.ones(2**26, dtype=torch.uint8)
print(faults() - before)
"""
    found = {
        mode: int(
            subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("keep", "leave")
    }
    assert found["leave"] > 300  # 16,384 pages of 4 KiB each time, or 32 of 2 MiB
    assert found["keep"] < found["leave"] / 20


def test_without_glibc_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory()


@pytest.mark.gpu
def test_a_step_on_the_gpu_trains_as_on_the_cpu() -> None:
    ours, expected = (trained(PLAIN, dtype=torch.float64, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert_same_training(ours, expected, **FP64)


@pytest.mark.gpu
def test_a_step_that_is_not_kept_changes_nothing_on_the_gpu() -> None:
    device = torch.device("cuda")
    step = TrainStep(make_method(device), OptimConfig(), EngineConfig(), torch.float32)
    step(0, make_batch(device), lr=0.1, momentum=0.9)
    weights = {name: value.clone() for name, value in step.method.named_parameters()}
    rows, pointer = step.method.queue.rows.clone(), step.method.queue.pointer.clone()
    broken = make_batch(device)
    broken.views[0, 0, 0, 0] = torch.nan
    step(1, broken, lr=0.1, momentum=0.9)
    for name, value in step.method.named_parameters():
        assert torch.equal(value, weights[name]), name
    assert torch.equal(step.method.queue.rows, rows)
    assert torch.equal(step.method.queue.pointer, pointer)
    with pytest.raises(NonFiniteError, match="step 1"):
        step.guard.raise_if_failed()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_on_the_gpu_never_synchronises(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    step = TrainStep(make_method(device, dtype=dtype), OptimConfig(), EngineConfig(), dtype)
    batch = make_batch(device, dtype)
    step(0, batch, lr=0.1, momentum=0.99)  # libraries initialize
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, _ = step(1, batch, lr=0.1, momentum=0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.total.isfinite()
