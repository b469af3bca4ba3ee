"""Tests of fine-tuning: against a plain loop of torchvision's ResNet-18, and of a run's whole evaluation by it."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torchvision.models import resnet18

from mnclglf.config import DataConfig, EngineConfig, FinetuneConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageArray
from mnclglf.data.loader import Batch
from mnclglf.data.loaders.reference import ReferenceLoader
from mnclglf.data.splits import split_train
from mnclglf.evaluation import run as module
from mnclglf.evaluation.finetune import finetune
from mnclglf.evaluation.run import evaluate_run
from mnclglf.models.encoder import ResNet
from mnclglf.runs.results import load_results

CONFIG = RunConfig(
    method="simclr",
    dataset="digits",
    view=ViewConfig(blur_probability=0.0, flip_probability=0.0),
    data=DataConfig(image_size=8, train_images=200, loader="reference"),
    model=ModelConfig(width=2, projector_width=8, predictor_width=8),
    optim=OptimConfig(epochs=1, batch_size=50),
    engine=EngineConfig(device="cpu", precision="fp32"),
)


def silent() -> Console:
    return Console(file=io.StringIO(), width=1000)


def tiny(**changes: object) -> FinetuneConfig:
    return FinetuneConfig(**{"steps": 3, "batch_size": 32, "device": "cpu", **changes})  # type: ignore[arg-type]


def images(count: int, side: int, classes: int) -> ImageArray:
    """Returns images whose class is the place of a bright bar, on noise."""
    draw = np.random.default_rng(0)
    labels = np.arange(count) % classes
    pixels = draw.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[label * side // classes : (label + 1) * side // classes] += 130
    names = tuple(map(str, range(classes)))
    return ImageArray(name="bars", split="train", labels=labels.astype(np.int64), classes=names, images=pixels)


def loader_of(data: ImageArray, side: int, batch_size: int, dtype: torch.dtype = torch.float32) -> ReferenceLoader:
    return ReferenceLoader(
        data, ViewConfig(blur_probability=0, jitter_probability=0, crop_scale=(0.8, 1.0)), views=1, side=side,
        batch_size=batch_size, seed=0, dtype=dtype, device=torch.device("cpu"), threads=1,
    )  # fmt: skip


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
def test_each_step_is_that_of_a_plain_loop_of_torchvisions_network() -> None:
    data, steps, rate = images(12, 32, 3), 3, 0.02
    loader, labels = loader_of(data, 32, 4, torch.float64), torch.from_numpy(data.labels)
    torch.manual_seed(5)
    encoder = ResNet("imagenet", 64)
    plain = resnet18()
    setattr(plain, "fc", nn.Identity())  # noqa: B010  # its type is Linear
    plain.load_state_dict(encoder.state_dict(), strict=False)  # ours counts no batches
    classifier = finetune(
        encoder, loader, labels, FinetuneConfig(steps=steps, lr=rate), classes=3, steps_per_epoch=2,
        dtype=torch.float32, seed=7, say=lambda _: None,
    )  # fmt: skip

    torch.manual_seed(7)
    head = nn.Linear(512, 3)
    plain.train()
    parameters = [*plain.parameters(), *head.parameters()]
    buffers = [torch.zeros_like(p) for p in parameters]
    for step, batch in enumerate(loader.batches(0, steps)):
        loss = F.cross_entropy(head(plain(batch.views)), labels[batch.indices])
        gradients = torch.autograd.grad(loss, parameters)
        lr = rate * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():  # Nesterov's momentum as PyTorch's documentation has it
            for parameter, buffer, gradient in zip(parameters, buffers, gradients, strict=True):
                buffer.mul_(0.9).add_(gradient)
                parameter.sub_(lr * (gradient + 0.9 * buffer))
    theirs = plain.state_dict()
    for name, value in encoder.state_dict().items():
        # fp64: a batch of 4 in train mode magnifies the rounding of other orders of sums, from 1e-16
        torch.testing.assert_close(value, theirs[name], rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(classifier.weight, head.weight, rtol=1e-8, atol=1e-10)
    torch.manual_seed(5)
    moved = (encoder.conv1.weight - ResNet("imagenet", 64).conv1.weight).abs().max()
    assert moved > 1e-2  # or the tolerance would hide a loop that does nothing


def test_fine_tuning_learns() -> None:
    data = images(45, 8, 3)
    loader, labels = loader_of(data, 8, 15), torch.from_numpy(data.labels)
    torch.manual_seed(0)
    encoder = ResNet("cifar", 4)
    first = accuracy(encoder, nn.Linear(32, 3), loader, labels)
    said: list[str] = []
    classifier = finetune(
        encoder, loader, labels, FinetuneConfig(epochs=10, lr=0.05), classes=3, steps_per_epoch=3,
        dtype=torch.float32, seed=0, say=said.append,
    )  # fmt: skip
    assert accuracy(encoder, classifier, loader, labels) >= max(0.9, first + 0.3)
    assert said[0].startswith("epoch 1/10  loss ")
    assert said[-1].startswith("epoch 10/10  loss ")


def accuracy(encoder: ResNet, classifier: nn.Linear, loader: ReferenceLoader, labels: Tensor) -> float:
    batches: list[Batch] = list(loader.batches(0, loader.steps_per_epoch))
    encoder.eval()
    with torch.no_grad():
        hits = [classifier(encoder(b.views)).argmax(dim=1) == labels[b.indices] for b in batches]
    return float(torch.cat(hits).float().mean())


def test_a_rate_that_is_too_high_is_named() -> None:
    data = images(20, 8, 2)
    with pytest.raises(ValueError, match=r"loss was (nan|inf).*lr 1e\+20.*--lr"):
        finetune(
            ResNet("cifar", 2), loader_of(data, 8, 10), torch.from_numpy(data.labels),
            FinetuneConfig(steps=8, lr=1e20), classes=2, steps_per_epoch=8, dtype=torch.float32, seed=0,
            say=lambda _: None,
        )  # fmt: skip


def test_a_run_is_fine_tuned_beside_training_from_scratch(run: Path) -> None:
    before = {p.name: p.read_bytes() for p in (run / "checkpoints").glob("*.pt")}
    found = evaluate_run(run, tiny(untrained=True), silent())
    assert [(r.protocol, r.representation) for r in found] == [("finetune", "pretrained"), ("finetune", "untrained")]
    assert {p.name: p.read_bytes() for p in (run / "checkpoints").glob("*.pt")} == before
    assert load_results(run / "evaluation.json") == found
    expected = {"optimizer": "SGD", "steps": 3, "batch_size": 32, "lr": 0.05, "momentum": 0.9, "nesterov": True,
                "weight_decay": 0.0, "train_images": 200, "test_images": 350, "classes": 10, "step": 4}  # fmt: skip
    assert found[0].settings | expected == found[0].settings
    assert evaluate_run(run, tiny(), silent()) == found[:1]  # the same seed, the same numbers


@pytest.mark.parametrize(("share", "count"), [(0.01, 10), (0.1, 20), (1.0, 200)])
def test_shares_of_the_labels_are_of_each_class(
    run: Path, share: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    steps: list[int] = []

    def recorded(encoder, loader, labels, config, *, steps_per_epoch, **_) -> nn.Linear:
        given.append(labels)
        steps.append(steps_per_epoch)
        return nn.Linear(16, 10)

    monkeypatch.setattr(module, "finetune", recorded)
    (result,) = evaluate_run(run, tiny(label_share=share), silent())
    counts = np.bincount(split_train(load_dataset("digits")[0], CONFIG.data)[0].labels)
    expected = np.maximum(1, np.rint(share * counts))  # at least one per class
    np.testing.assert_array_equal(np.bincount(given[0]), expected)
    assert result.settings["train_images"] == expected.sum() == pytest.approx(count, abs=3)
    assert steps == [200 // 32]  # as many steps with few labels as with all
    evaluate_run(run, tiny(label_share=share), silent())
    torch.testing.assert_close(given[0], given[1])


def test_an_interruption_keeps_what_was_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([nn.Linear(16, 10)])

    def stopped(*_: object, **__: object) -> nn.Linear:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module, "finetune", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, tiny(untrained=True), silent())
    assert [r.representation for r in load_results(run / "evaluation.json")] == ["pretrained"]


def test_half_precision_scales_its_loss_and_learns(run: Path) -> None:
    data = images(30, 8, 3)
    loader, labels = loader_of(data, 8, 15), torch.from_numpy(data.labels)
    torch.manual_seed(0)
    encoder = ResNet("cifar", 4)
    classifier = finetune(
        encoder, loader, labels, FinetuneConfig(epochs=15, lr=0.05), classes=3, steps_per_epoch=2,
        dtype=torch.float16, seed=0, say=lambda _: None,
    )  # fmt: skip
    assert accuracy(encoder, classifier, loader, labels) > 0.6


def test_settings_that_cannot_work_are_named() -> None:
    for changes, message in (
        ({"batch_size": 1}, r"batch_size 1 .*two images"),
        ({"epochs": 3}, r"epochs 3 and steps 3 .*leave out"),
        ({"lr": 0.0}, r"lr 0.0 must be positive"),
        ({"milestones": True, "untrained": True}, r"leave out untrained"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)
    assert dataclasses.replace(tiny(), lr=0.1).lr == 0.1
