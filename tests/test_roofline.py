"""bench/roofline.py: what it counts, against arithmetic by hand and PyTorch's own counter."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import Counter, Part, main, step_parts
from mnclglf.config import ModelConfig, ObjectiveConfig, OptimConfig
from mnclglf.engine.run import build_method
from mnclglf.recipes import paper
from mnclglf_kernels.inspect import GPUS

SMALL = dataclasses.replace(
    paper("mnclglf", "cifar10"),
    model=ModelConfig(width=4, projector_width=24, predictor_width=12),
    objective=ObjectiveConfig(queue_size=20),
    optim=OptimConfig(batch_size=6),
)


def test_a_small_network_by_hand():
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        network[1].num_batches_tracked = None
        images = torch.empty(2, 3, 6, 4)
    with Counter() as counter:
        network(images).sum().backward()
    pixels = 2 * 6 * 4
    forward, backward = (counter.parts[f"convolutions, {direction}"] for direction in ("forward", "backward"))
    assert forward.flops == 2 * pixels * 8 * 3 * 9
    assert forward.unique_bytes == 4 * (pixels * 3 + 8 * 3 * 9 + pixels * 8)
    assert backward.flops == forward.flops  # of the weights only: the images need no gradient
    # Batch norm: 3 passes forward and 5 backward; ReLU: one, backward.
    assert counter.parts["batch norm and element-wise"].unique_bytes == 4 * pixels * 8 * (3 + 5 + 1)


def test_a_step_has_the_operations_that_pytorch_counts(monkeypatch):
    monkeypatch.setattr(
        "mnclglf_kernels.neighbor.CPU_MULTIPLIES_BF16", False
    )  # the screened lookup is counted by nobody
    parts = step_parts(SMALL, 16, "fp32")
    method = build_method(SMALL, torch.float32).train()
    with FlopCounterMode(display=False) as counter:
        method([torch.randn(6, 3, 16, 16) for _ in range(3)]).total.backward()
    networks = sum(parts[name].flops for name in ("convolutions, forward", "convolutions, backward", "heads"))
    # PyTorch's form of the operators: the lookup, four products of the loss, and their gradients for the predictions.
    lookup, loss = 2 * 12 * 20 * 24, 2 * 14 * 6 * 6 * 24
    assert counter.get_total_flops() == networks + lookup + 2 * loss
    assert parts["nearest_neighbor"].flops == lookup
    assert parts["contrastive_losses"].flops == 3 * loss  # the logits are made twice


def test_updates_move_their_weights():
    parts = step_parts(SMALL, 16, "bf16")
    method = build_method(SMALL, torch.bfloat16)
    trained = sum(p.numel() for p in (*method.encoder.parameters(), *method.projector.parameters()))
    trained += sum(p.numel() for p in method.predictor.parameters())
    followed = sum(p.numel() for p in method.momentum.parameters())
    assert parts["optimizer"].unique_bytes == 20 * trained
    assert parts["moving average"].unique_bytes == 12 * followed
    assert parts["weight casts"].unique_bytes == 6 * (trained + followed)


def test_the_longer_of_computing_and_moving_sets_a_part():
    gpu = GPUS[86]
    assert Part(flops=71 * 10**9, unique_bytes=1).seconds(gpu, "bf16") == (pytest.approx(1e-3), "compute")
    assert Part(flops=71 * 10**9, unique_bytes=1).seconds(gpu, "fp32")[0] == pytest.approx(71 / 35.6 * 1e-3)
    assert Part(flops=1, unique_bytes=936 * 10**6).seconds(gpu, "bf16") == (pytest.approx(1e-3), "DRAM")


def test_the_table(capsys):
    main(["--batch-size", "8", "--arch", "sm_90"])
    printed = capsys.readouterr().out
    assert "mnclglf, batch 8, 32 x 32, bf16, on an H100 SXM" in printed
    for name in ("convolutions, forward", "nearest_neighbor", "optimizer", "together"):
        assert f"| {name} |" in printed
