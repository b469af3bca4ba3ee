"""Supervised training against a loop of torchvision's ResNet-18, torch.optim.SGD and nn.CrossEntropyLoss."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from method_steps import FP64, Stepper, inputs_of, make_batch, make_method
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms import v2

from mnclglf.config import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, ViewConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageArray
from mnclglf.data.loader import Batch
from mnclglf.data.views import whole_views
from mnclglf.methods import Supervised
from mnclglf.models.encoder import ResNet
from mnclglf.recipes import quick
from mnclglf.training.loop import Trainer
from mnclglf.training.start import load_trained
from mnclglf.training.step import TrainStep

IMAGES, CLASSES, SIDE = 6, 10, 8
OPTIM = OptimConfig(lr=0.05, sgd_momentum=0.9, weight_decay=1e-3)


def torchvision_resnet18() -> nn.Module:
    """As it is usually made for CIFAR: a 3 x 3 stem of stride 1 without max-pool."""
    network = torchvision.models.resnet18(num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    network.set_submodule("maxpool", nn.Identity())
    return network.double().train()


def under_our_names(network: nn.Module) -> dict[str, Tensor]:
    """What the network holds, less the counters of batches, which ours has not."""
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    return {
        name.replace("fc.", "classifier.") if name.startswith("fc.") else f"encoder.{name}": value
        for name, value in state.items()
    }


def test_five_steps_equal_a_plain_training_loop_in_fp64() -> None:
    network = torchvision_resnet18()
    method = Supervised(ModelConfig(classes=CLASSES), ObjectiveConfig()).double().train()
    method.load_state_dict(under_our_names(network), strict=False)  # load_state_dict adds counters of batches itself
    labels = torch.randint(CLASSES, (40,))
    step = TrainStep(method, OPTIM, EngineConfig(channels_last=False), torch.float32, labels=labels)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for number in range(5):
        images = torch.randn(IMAGES, 3, SIDE, SIDE, dtype=torch.float64)
        rows = torch.randperm(40)[:IMAGES]
        losses, _ = step(number, Batch(images, rows), lr=0.05, momentum=0.99)

        optimizer.zero_grad()
        loss = criterion(network(images), labels[rows])
        loss.backward()
        optimizer.step()

        assert losses.total.item() == pytest.approx(loss.item(), rel=FP64["rtol"])
        expected, ours = under_our_names(network), method.state_dict()
        assert ours.keys() == expected.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], **FP64, msg=lambda text, name=name: f"{name}: {text}")
    step.guard.raise_if_failed()


def plain_training(
    network: nn.Module, images: ImageArray, *, side: int, optim: OptimConfig, view: ViewConfig, seed: int
) -> nn.Module:
    """The usual script: torchvision's transforms image by image, a DataLoader, SGD and a cosine, all in fp32."""
    mean, std = images.statistics()
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomRotation(
                (-view.rotation_degrees, view.rotation_degrees), interpolation=v2.InterpolationMode.BILINEAR
            ),
            v2.RandomResizedCrop(side, view.crop_scale, view.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(view.flip_probability),
            v2.RandomApply([v2.ColorJitter(view.brightness, view.contrast, view.saturation)], view.jitter_probability),
            v2.RandomGrayscale(view.gray_probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean.tolist(), std.tolist()),
        ]
    )
    torch.manual_seed(seed)
    data = [(images.pixels(row), int(label)) for row, label in enumerate(images.labels)]
    loader = torch.utils.data.DataLoader(
        data,  # pyright: ignore[reportArgumentType]  # any sequence will do, which its types leave out
        optim.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: (
            torch.stack([transform(pixels) for pixels, _ in rows]),
            torch.tensor([y for _, y in rows]),
        ),
    )
    optimizer = torch.optim.SGD(
        network.parameters(), optim.lr, momentum=optim.sgd_momentum, weight_decay=optim.weight_decay
    )
    total, warm_up = optim.epochs * len(loader), round(optim.warmup_epochs * len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))
        ),
    )
    network.train()
    for _ in range(optim.epochs):
        for batch, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), labels).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@pytest.mark.slow
def test_it_reaches_what_plain_training_reaches(tmp_path: Path) -> None:
    """On 350 test images the deviation of two accuracies of 0.95 is 0.016 each: three of their difference are 0.05."""
    config = quick("supervised", "digits")
    config = replace(
        config,
        data=DataConfig(image_size=8),
        model=replace(config.model, width=8),
        optim=replace(config.optim, epochs=8, batch_size=64),
        engine=EngineConfig(device="cpu", precision="fp32"),
    )
    train, test = load_dataset("digits", None, download=False)
    assert isinstance(train, ImageArray)
    assert isinstance(test, ImageArray)
    whole = whole_views(test.read(np.arange(len(test))), 8, *train.statistics(), torch.float32)
    labels = torch.from_numpy(test.labels)
    Trainer(config, tmp_path, console=Console(file=io.StringIO())).train()
    method = load_trained(tmp_path)[1].eval()
    assert isinstance(method, Supervised)
    network = nn.Sequential(ResNet("cifar", 8), nn.Linear(64, CLASSES))
    plain = plain_training(network, train, side=8, optim=config.optim, view=config.view, seed=0)
    with torch.inference_mode():
        ours = (method.classifier(method.encoder(whole)).argmax(dim=1) == labels).double().mean().item()
        theirs = (plain(whole).argmax(dim=1) == labels).double().mean().item()
    assert min(ours, theirs) > 0.9
    assert ours == pytest.approx(theirs, abs=0.05)


def test_it_learns_the_labels() -> None:
    method = make_method(Supervised)
    stepper, batch = Stepper(method), make_batch(views=1)
    losses = [stepper(batch)["loss"].item() for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0]
    view, labels = inputs_of(method, batch)
    assert labels is not None
    assert torch.equal(method.classifier(method.encoder(view)).argmax(dim=1), labels)


def test_there_is_nothing_but_the_network() -> None:
    method = make_method(Supervised)
    losses = method(*inputs_of(method, make_batch(views=1)))
    assert (losses.keys, losses.neighbors, method.queue_fill()) == (None, None, None)
    assert {name.split(".")[0] for name in method.state_dict()} == {"encoder", "classifier"}


def test_a_classifier_needs_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"classes None: .*ModelConfig\(classes=10\)"):
        Supervised(ModelConfig(), ObjectiveConfig())
