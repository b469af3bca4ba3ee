"""Tests of the paper's linear evaluation against a transcription in numpy, fp64, with gradients by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mnclglf.config import LinearConfig
from mnclglf.data.images import ImageArray
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import make_loader
from mnclglf.evaluation.linear import train_linear
from mnclglf.models.encoder import ResNet
from mnclglf.recipes import view_of

IMAGES, BATCH, CLASSES, SEED = 22, 4, 3, 5  # 5 steps per epoch


@pytest.fixture
def images() -> ImageArray:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(IMAGES) % CLASSES
    pixels[np.arange(IMAGES), :, :, labels] //= 4  # each class lacks a color
    return ImageArray(name="made", split="train", images=pixels, labels=labels, classes=("a", "b", "c"))


@pytest.fixture
def encoder() -> ResNet:
    """Returns an encoder with changed running statistics."""
    network = ResNet(width=2).train()
    network(torch.randn(32, 3, 8, 8) * 2 + 1)
    return network


def loader_of(images: ImageArray) -> Loader:
    return make_loader(
        images, view_of("linear_train", "cifar10"), views=1, side=8, batch_size=BATCH, seed=SEED, dtype=torch.float32,
        device=torch.device("cpu"), backend="reference", threads=1,
    )  # fmt: skip


def train(encoder: ResNet, images: ImageArray, lines: list[str] | None = None, **settings: Any) -> nn.Linear:
    return train_linear(
        encoder,
        loader_of(images),
        torch.from_numpy(images.labels),
        LinearConfig(**{"epochs": 3, **settings}),
        classes=CLASSES,
        steps_per_epoch=5,
        dtype=torch.float32,
        seed=SEED,
        say=([] if lines is None else lines).append,
    )


def softmax(logits: NDArray) -> NDArray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def by_hand(features: list[NDArray], labels: list[NDArray], weights: list[NDArray], peak: float) -> list[NDArray]:
    """Returns [W, b] after one step per batch of features [N, F]: softmax regression by LARS, momentum 0.9, cosine."""
    weights = [weight.astype(np.float64) for weight in weights]
    momentum = [np.zeros_like(weight) for weight in weights]
    for step, (x, y) in enumerate(zip(features, labels, strict=True)):
        error = (softmax(x @ weights[0].T + weights[1]) - np.eye(CLASSES)[y]) / len(y)
        lr = peak / 2 * (1 + math.cos(math.pi * step / len(features)))
        for i, gradient in enumerate((error.T @ x, error.sum(axis=0))):
            ratio = 0.001 * np.linalg.norm(weights[i]) / np.linalg.norm(gradient)
            momentum[i] = 0.9 * momentum[i] + ratio * gradient
            weights[i] = weights[i] - lr * momentum[i]
    return weights


def test_agrees_with_a_transcription(encoder: ResNet, images: ImageArray):
    torch.manual_seed(SEED)
    initial = nn.Linear(16, CLASSES)
    encoder.eval()
    batches = list(loader_of(images).batches(0, 15))
    with torch.no_grad():
        features = [encoder(batch.views).double().numpy() for batch in batches]
    labels = [images.labels[batch.indices.numpy()] for batch in batches]
    expected = by_hand(features, labels, [p.detach().numpy() for p in initial.parameters()], peak=20.0)
    encoder.train()
    classifier = train(encoder, images, lr=20.0)
    for result, by_formula, before in zip(classifier.parameters(), expected, initial.parameters(), strict=True):
        result, before = result.detach().numpy(), before.detach().numpy()
        np.testing.assert_allclose(result, by_formula, rtol=1e-4, atol=1e-5)  # fp32: 15 steps of sums of 2**-24
        # Otherwise the comparison would show little.
        assert np.linalg.norm(result - before) > 0.05 * np.linalg.norm(before)


def test_the_encoder_stays_as_it_was(encoder: ResNet, images: ImageArray):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train(encoder, images)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())


def test_the_same_seed_gives_the_same_classifier(encoder: ResNet, images: ImageArray):
    first, second = train(encoder, images), train(encoder, images)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, train(encoder, images, lr=0.7).weight)


def test_it_learns(encoder: ResNet, images: ImageArray):
    lines: list[str] = []
    train(encoder, images, lines, epochs=60, lr=30.0)
    losses = [float(line.split()[3]) for line in lines]
    assert losses[0] > 0.8  # ln 3 is 1.1
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("epochs", "expected"), [(2, [1, 2]), (25, [1, *range(2, 25, 2), 25])])
def test_progress_comes_first_last_and_between(encoder: ResNet, images: ImageArray, epochs: int, expected: list[int]):
    lines: list[str] = []
    train(encoder, images, lines, epochs=epochs)
    assert [line.split()[:2] for line in lines] == [["epoch", f"{epoch}/{epochs}"] for epoch in expected]
    assert all(line.endswith(" left") for line in lines)


def test_steps_take_the_place_of_epochs(encoder: ResNet, images: ImageArray):
    lines: list[str] = []
    by_epochs, by_steps = train(encoder, images), train(encoder, images, epochs=90, steps=15)
    assert torch.equal(by_epochs.weight, by_steps.weight)  # 3 epochs of 5 steps
    other = train(encoder, images, lines, epochs=90, steps=7)
    assert not torch.equal(by_epochs.weight, other.weight)
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]  # the second has two steps


def test_features_that_are_not_finite_are_named(encoder: ResNet, images: ImageArray):
    def spoilt(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * math.nan

    encoder.register_forward_hook(spoilt)
    with pytest.raises(ValueError, match=r"nan after epoch 1.*not finite.*lr 0\.8"):
        train(encoder, images)


def test_bf16_is_the_encoders_alone(encoder: ResNet, images: ImageArray):
    seen: list[torch.dtype] = []
    encoder.conv1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    classifier = train_linear(
        encoder, loader_of(images), torch.from_numpy(images.labels), LinearConfig(epochs=1), classes=CLASSES,
        steps_per_epoch=2, dtype=torch.bfloat16, seed=SEED, say=print,
    )  # fmt: skip
    assert seen == [torch.bfloat16] * 2
    assert classifier.weight.dtype == torch.float32
