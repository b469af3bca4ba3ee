"""Tests of the roofline's counts against arithmetic by hand and PyTorch's own counter."""

import dataclasses
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mnclglf.config import ModelConfig, ObjectiveConfig, OptimConfig
from mnclglf.methods import MNCLGLF
from mnclglf.models.batch_norm import BatchNorm, Stack
from mnclglf.recipes import paper
from mnclglf.training import roofline as limit
from mnclglf.training.roofline import Counter, Part, Peaks, measured_peaks, nominal_peaks, peaks_of, step_parts
from mnclglf.training.start import build_method
from mnclglf_kernels.ops.augment import PARAMETERS

SMALL = dataclasses.replace(
    paper("mnclglf", "cifar10"),
    model=ModelConfig(width=4, projector_width=24, predictor_width=12),
    objective=ObjectiveConfig(queue_size=20),
    optim=OptimConfig(batch_size=6),
)


def test_a_small_network_by_hand():
    with torch.device("meta"):
        norm = BatchNorm(8)
        norm.backend = "triton"
        network = Stack(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm, nn.ReLU())
        norm.num_batches_tracked = None
        images = torch.empty(2, 3, 6, 4)
    with Counter(pads=True) as counter:
        network(images).sum().backward()
    pixels = 2 * 6 * 4
    forward, backward = (counter.parts[f"convolutions, {direction}"] for direction in ("forward", "backward"))
    assert forward.flops == 2 * pixels * 8 * 3 * 9
    assert forward.unique_bytes == 4 * (pixels * 3 + 8 * 3 * 9 + pixels * 8)
    assert backward.flops == forward.flops  # only of the weights: the images need no gradient
    # Batch norm and ReLU: 3 passes forward and 5 backward.
    assert counter.parts["batch norm and element-wise"].unique_bytes == 4 * pixels * 8 * (3 + 5)


def test_a_step_has_the_operations_that_pytorch_counts(monkeypatch):
    # Switches the screened lookup off, which PyTorch's counter does not know.
    monkeypatch.setattr("mnclglf_kernels.ops.nearest_neighbor.CPU_MULTIPLIES_BF16", False)
    parts = step_parts(SMALL, 16, "fp32")
    method = build_method(SMALL, torch.float32).train()
    with FlopCounterMode(display=False) as counter:
        method(torch.randn(18, 3, 16, 16)).total.backward()
    networks = sum(parts[name].flops for name in ("convolutions, forward", "convolutions, backward", "matrix products"))
    # PyTorch's form of the operators: the lookup, four products of the loss, and their gradients for the predictions.
    lookup, loss = 2 * 12 * 20 * 24, 2 * 14 * 6 * 6 * 24
    assert counter.get_total_flops() == networks + lookup + 2 * loss
    assert parts["nearest_neighbor"].flops == lookup
    assert parts["contrastive_losses"].flops == 3 * loss  # the logits are made twice


def test_an_operator_counts_at_the_sizes_of_the_method_that_calls_it():
    # Batch 6, D 24, K 20.
    def flops(method: str, operator: str) -> int:
        return step_parts(dataclasses.replace(SMALL, method=method), 16, "fp32")[operator].flops

    assert flops("nnclr", "contrastive_losses") == 3 * 2 * 2 * 6 * 6 * 24  # two pairs with S = 1
    assert flops("simclr", "nt_xent") == 3 * 2 * 12 * 12 * 24  # one gradient of all rows, of both their roles
    assert flops("mocov2", "queue_contrastive_loss") == 3 * 2 * 6 * 20 * 24
    assert "nt_xent" not in step_parts(SMALL, 16, "fp32")


@pytest.mark.parametrize(("method", "views"), [("supervised", 1), ("simclr", 2), ("mnclglf", 3)])
def test_the_input_writes_the_views_of_the_method(method: str, views: int):
    config = dataclasses.replace(SMALL, method=method, model=dataclasses.replace(SMALL.model, classes=4))
    parts = step_parts(config, 16, "fp32")
    images, written = 6 * (3 * 16 * 16 + 8), 4 * 6 * 3 * 16 * 16  # bytes with a row number; one fp32 view of each
    parameters = 4 * 6 * len(PARAMETERS)
    assert parts["input"].unique_bytes == images + views * (written + parameters) + 4 * 6  # and mean, deviation


def test_updates_move_their_weights():
    parts = step_parts(SMALL, 16, "bf16")
    method = build_method(SMALL, torch.bfloat16)
    assert isinstance(method, MNCLGLF)
    trained = sum(p.numel() for p in (*method.encoder.parameters(), *method.projector.parameters()))
    trained += sum(p.numel() for p in method.predictor.parameters())
    followed = sum(p.numel() for p in method.momentum.parameters())
    assert parts["optimizer"].unique_bytes == 20 * trained
    assert parts["moving average"].unique_bytes == 12 * followed
    assert parts["weight casts"].unique_bytes == 6 * (trained + followed)


def test_the_longer_of_computing_and_moving_sets_a_part():
    peaks = nominal_peaks(86, "bf16")
    assert Part(flops=71 * 10**9, unique_bytes=1).seconds(peaks) == (pytest.approx(1e-3), "compute")
    assert Part(flops=1, unique_bytes=936 * 10**6).seconds(peaks) == (pytest.approx(1e-3), "memory")
    rates = [nominal_peaks(86, "fp32", tf32=tf32).flops for tf32 in (False, True)]
    assert rates == [35.6e12, 35.5e12]
    assert nominal_peaks(80, "fp32", tf32=True).flops == 156e12


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (7, 2, 3)])
def test_products_with_the_zeros_around_an_image_can_be_left_out(kernel: int, stride: int, padding: int):
    convolution = nn.Conv2d(2, 5, kernel, stride, padding, bias=False)
    images = torch.ones(3, 2, 6, 10, requires_grad=True)
    nn.init.ones_(convolution.weight)
    flops = []
    for pads in (False, True):
        with Counter(pads=pads) as counter:
            products = convolution(images)  # each output counts its products with the image
            products.sum().backward()
        flops.append([counter.parts[f"convolutions, {way}"].flops for way in ("forward", "backward")])
    (inside, inside_back), (padded, padded_back) = flops
    assert inside == 2 * products.sum()
    assert padded == 2 * products.numel() * 2 * kernel**2
    assert (inside_back, padded_back) == (2 * inside, 2 * padded)  # of the images and of the weights


def test_a_known_gpu_has_its_nominal_peaks_and_another_is_measured(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    cuda = torch.device("cuda")
    assert peaks_of(cuda, torch.bfloat16, tf32=True) == nominal_peaks(89, "bf16")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA GeForce RTX 4090 D")
    monkeypatch.setattr(limit, "measured_peaks", lambda device, dtype: "measured")
    assert peaks_of(cuda, torch.bfloat16, tf32=True) == "measured"


def test_this_cpu_is_measured():
    peaks = measured_peaks(torch.device("cpu"), torch.float32)
    assert 1e8 < peaks.flops < 1e14  # between a pocket calculator's and a GPU's
    assert 1e8 < peaks.memory_bytes < 1e13
    assert not peaks.pads


@pytest.mark.parametrize(
    ("dtype", "multiplies_bf16", "side"),
    [
        (torch.float32, False, 2048),
        (torch.bfloat16, True, 2048),
        (torch.bfloat16, False, 256),
        (torch.float16, True, 256),
        (torch.float16, False, 256),
    ],
)
def test_products_that_a_cpu_emulates_are_small(dtype, multiplies_bf16, side, monkeypatch):
    shapes = []

    def note(call, device):
        shapes.extend({cell.cell_contents.shape for cell in call.__closure__ if cell.cell_contents.ndim == 2})
        return 1.0

    monkeypatch.setattr(limit, "best_seconds", note)
    monkeypatch.setattr(limit, "CPU_MULTIPLIES_BF16", multiplies_bf16)
    with FakeTensorMode():
        limit._best_rates(torch.device("cpu"), dtype)
    assert shapes == [(side, side)]


def test_a_gpu_has_its_memory_back_once_it_is_measured(monkeypatch):
    """Checks, without a GPU, that the tensors are freed before the allocator's cache is emptied."""
    alive, left = [], []

    def note(call, device):
        alive.extend(weakref.ref(cell.cell_contents) for cell in call.__closure__)
        return 1.0

    monkeypatch.setattr(limit, "best_seconds", note)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: left.append([x for x in alive if x() is not None]))
    with FakeTensorMode():
        measured_peaks(torch.device("cuda"), torch.bfloat16)
    assert alive
    assert left == [[]]


def test_a_step_takes_the_sum_of_its_parts():
    peaks = Peaks("made up", flops=1e9, memory_bytes=1e9, pads=True)
    parts = step_parts(SMALL, 16, "fp32")
    expected = sum(max(part.flops, part.unique_bytes) / 1e9 for part in parts.values())
    assert limit.least_seconds(SMALL, 16, torch.float32, peaks) == pytest.approx(expected)
