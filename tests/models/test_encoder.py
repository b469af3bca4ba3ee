"""ResNet-18, -34 and -50 against torchvision's, and what a run makes of `--encoder`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from method_steps import make_batch
from methods.test_mnclglf import CLASSES, SIDE, N
from torch import Tensor, nn

from mnclglf.config import METHOD_NAMES, MethodName, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, Stem
from mnclglf.methods import METHODS
from mnclglf.models.batch_norm import Views
from mnclglf.models.encoder import RESNETS, ResNet, features_of, make_encoder
from mnclglf.training.speedups import checkpoint_activations
from mnclglf.training.start import build_method
from mnclglf.training.step import TrainStep

TOLERANCE: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)  # fp64 sums in another order, through 50 layers
DEEPER = pytest.mark.parametrize("name", ["resnet34", "resnet50"])
EVERY = pytest.mark.parametrize("name", METHOD_NAMES)


def torchvision_network(name: str) -> nn.Module:
    network = torchvision.models.get_model(name, weights=None)
    network.set_submodule("fc", nn.Identity())
    for path, parameter in network.named_parameters():  # so that no batch norm or block is the identity
        if "bn" in path or "downsample.1" in path:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return network


def states_of(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()  # its metadata keeps torch from adding what is deleted here
    for name in [name for name in state if "num_batches_tracked" in name]:
        del state[name]
    return state


@DEEPER
def test_a_deeper_resnet_is_torchvision_s_forward_and_backward(name: str) -> None:
    torch.manual_seed(0)
    reference = torchvision_network(name).double().train()
    ours = ResNet("imagenet", 64, name).double().train()
    ours.load_state_dict(states_of(reference))  # strict: the same names and shapes
    images = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    ways = torch.randn(3, ours.features, dtype=torch.float64)
    for network in (ours, reference):
        (network(images) * ways).sum().backward()
    torch.testing.assert_close(states_of(ours), states_of(reference), **TOLERANCE)  # running statistics
    expected = {path: x.grad for path, x in reference.named_parameters()}
    for path, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path], rtol=1e-8, atol=1e-8, msg=path)
    torch.testing.assert_close(ours.eval()(images), reference.eval()(images), **TOLERANCE)


@DEEPER
def test_views_in_one_batch_are_separate_passes(name: str) -> None:
    torch.manual_seed(1)
    reference = torchvision_network(name).double().train()
    ours = ResNet("imagenet", 64, name).double().train()
    ours.load_state_dict(states_of(reference))
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    expected = torch.cat([reference(view) for view in images.chunk(2)])
    torch.testing.assert_close(ours(images, 2), expected, **TOLERANCE)
    torch.testing.assert_close(states_of(ours), states_of(reference), **TOLERANCE)


@DEEPER
def test_views_in_two_batches_leave_the_statistics_of_separate_passes_in_order(name: str) -> None:
    one, two = (ResNet(width=4, name=name).double().train() for _ in range(2))
    two.load_state_dict(one.state_dict())
    x1, x2, x3 = torch.randn(9, 3, 8, 8, dtype=torch.float64).chunk(3)
    for view in (x1, x2, x3):
        one(view)
    two(torch.cat([x1, x3]), Views(after=(2, 0), decays=3))
    two(x2, Views(after=(1,), decays=0))
    torch.testing.assert_close(two.state_dict(), one.state_dict(), **TOLERANCE)


@pytest.mark.parametrize(("name", "features"), [("resnet18", 8), ("resnet34", 8), ("resnet50", 32)])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_features_are_as_wide_as_their_encoder_says(name: str, features: int, width: int, stem: Stem) -> None:
    model = ModelConfig(encoder=name, width=width, stem=stem)
    encoder = make_encoder(model)
    found = encoder(torch.randn(2, 3, 8, 8))
    assert found.shape == (2, encoder.features) == (2, features_of(model)) == (2, features * width)


def test_the_default_is_the_paper_s_resnet18() -> None:
    assert ModelConfig().encoder == "resnet18"
    blocks = [name for name, module in make_encoder(ModelConfig()).named_children()]
    assert blocks == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert [len(getattr(make_encoder(ModelConfig(width=2)), f"layer{i}")) for i in (1, 2, 3, 4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", RESNETS)
def test_recomputed_blocks_give_the_same_gradients_and_statistics(name: str) -> None:
    plain, recomputed = (
        build_method(RunConfig(method="simsiam", model=model_of(name)), torch.float32).double() for _ in range(2)
    )
    checkpoint_activations(recomputed)
    views = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    for method in (plain, recomputed):
        method(views).total.backward()
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict(), rtol=0, atol=0)  # the same operations
    for (path, x), y in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0, msg=path)


def model_of(encoder: str) -> ModelConfig:
    return ModelConfig(encoder=encoder, width=2, projector_width=8, predictor_width=4, classes=CLASSES)


def train(name: MethodName, encoder: str, side: int = SIDE) -> list[float]:
    """Trains two steps of N images; returns the losses."""
    config = RunConfig(method=name, model=model_of(encoder), objective=ObjectiveConfig(queue_size=2 * N))
    method = build_method(config, torch.float32).train()
    before = {path: x.clone() for path, x in method.encoder.named_parameters()}
    step = TrainStep(method, OptimConfig(batch_size=N), config.engine, torch.float32, labels=torch.arange(N) % CLASSES)
    found: list[float] = []
    for count in range(2):
        batch = make_batch(torch.float32, views=METHODS[name].views)
        batch = batch._replace(views=torch.randn(len(batch.views), 3, side, side))
        losses, _ = step(count, batch, lr=0.1, momentum=0.9)
        found.append(losses.total.item())
    step.guard.raise_if_failed()
    changed = [path for path, x in method.encoder.named_parameters() if not torch.equal(x, before[path])]
    assert len(changed) > 0.9 * len(before), sorted({*before} - {*changed})  # a model of timm may have unused weights
    return found


@EVERY
@pytest.mark.parametrize("encoder", ["resnet34", "resnet50"])
def test_every_method_trains_it(name: MethodName, encoder: str) -> None:
    assert all(torch.tensor(train(name, encoder)).isfinite())


STEPS_OF_A_NARROW_ENCODER = """
import torch
from mnclglf.config import ModelConfig
from mnclglf.models.encoder import make_encoder
network = make_encoder(ModelConfig(width=8)).to(memory_format=torch.channels_last)
for _ in range(8):
    images = torch.rand(51, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(images)
    features.float().sum().backward()
"""


def test_a_narrow_encoder_does_not_spoil_the_memory_of_its_process() -> None:
    ended = subprocess.run([sys.executable, "-c", STEPS_OF_A_NARROW_ENCODER], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
