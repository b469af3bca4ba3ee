"""Tests of a frozen encoder's features, and of raw pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mnclglf.data.images import ImageArray
from mnclglf.data.views import whole_views
from mnclglf.evaluation.features import extract_features, raw_pixels
from mnclglf.models.encoder import ResNet

MEAN, STD = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.25, 0.3], np.float32)
CPU = torch.device("cpu")


def image_set(n: int = 11, side: int = 16, gray: bool = False) -> ImageArray:
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 1 if gray else 3), dtype=np.uint8)
    images = np.broadcast_to(pixels, (n, side, side, 3)).copy()
    return ImageArray(name="made up", split="test", images=images, labels=np.arange(n) % 3, classes=("a", "b", "c"))


def features(
    encoder: nn.Module, images: ImageArray, *, dtype: torch.dtype = torch.float32, batch_size: int = 4
) -> Tensor:
    return extract_features(
        encoder, images, side=16, mean=MEAN, std=STD, dtype=dtype, device=CPU, batch_size=batch_size
    )


@pytest.fixture
def encoder() -> ResNet:
    """Returns an encoder with changed running statistics, and one batch norm in evaluation mode."""
    network = ResNet(width=4).train()
    network(torch.randn(32, 3, 16, 16) * 2 + 1)
    network.layer2.eval()
    return network


def test_agrees_with_the_encoder_in_evaluation_mode(encoder: ResNet):
    images = image_set()
    result = features(encoder, images)
    with torch.no_grad():
        expected = encoder.eval()(whole_views(images.images, 16, MEAN, STD, torch.float32))
    assert result.shape == (11, 32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)  # other batch size, other order of sums
    assert not result.is_inference()


def test_the_encoder_stays_as_it_was(encoder: ResNet):
    modes = {name: module.training for name, module in encoder.named_modules()}
    assert set(modes.values()) == {True, False}
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features(encoder, image_set())
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_modes_come_back_after_an_error(encoder: ResNet):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder

        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no")

    modes = [module.training for module in encoder.modules()]
    broken = Broken()
    with pytest.raises(RuntimeError, match="no"):
        features(broken, image_set())
    assert [module.training for module in encoder.modules()] == modes
    assert broken.training


@pytest.mark.parametrize("batch_size", [1, 11, 64])
def test_batches_do_not_change_the_features(encoder: ResNet, batch_size: int):
    images = image_set()
    torch.testing.assert_close(
        features(encoder, images, batch_size=batch_size), features(encoder, images), rtol=1e-4, atol=1e-5
    )


def test_bf16_runs_under_autocast_and_comes_back_as_fp32(encoder: ResNet):
    seen: list[torch.dtype] = []
    encoder.conv1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    result = features(encoder, image_set(), dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert result.dtype == torch.float32
    exact = features(encoder, image_set())
    assert set(seen[3:]) == {torch.float32}
    difference = (result - exact).norm() / exact.norm()
    assert 0 < difference < 0.05  # 20 layers of bf16's 2**-9


def test_fp16_runs_under_autocast_too(encoder: ResNet):
    seen: list[torch.dtype] = []
    encoder.conv1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    result, exact = (features(encoder, image_set(), dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert seen[0] == torch.float16
    difference = (result - exact).norm() / exact.norm()
    assert 0 < difference < 0.01  # 20 layers of fp16's 2**-11


def test_an_encoder_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the encoder made \(4, 3, 16, 16\) of 4 images"):
        features(nn.Identity(), image_set())


def test_no_images_are_refused(encoder: ResNet):
    empty = image_set().subset([])
    with pytest.raises(ValueError, match="made up test holds no images"):
        features(encoder, empty)
    with pytest.raises(ValueError, match="made up test holds no images"):
        raw_pixels(empty, side=16)


def test_pixels_are_the_pixels():
    images = image_set()
    expected = torch.from_numpy(images.images).permute(0, 3, 1, 2).flatten(1) / 255
    torch.testing.assert_close(raw_pixels(images, side=16), expected, rtol=0, atol=1e-7)


def test_gray_pixels_are_taken_once():
    images = image_set(gray=True)
    expected = torch.from_numpy(images.images[..., 0]).flatten(1) / 255
    torch.testing.assert_close(raw_pixels(images, side=16), expected, rtol=0, atol=1e-7)


def test_one_coloured_pixel_is_enough_for_three_channels():
    images = image_set(gray=True)
    images.images[3, 2, 1, 0] ^= 255
    assert raw_pixels(images, side=16).shape == (11, 3 * 16 * 16)


def test_pixels_of_another_side_stay_in_range(monkeypatch: pytest.MonkeyPatch):
    images = image_set()
    pixels = raw_pixels(images, side=8)
    assert pixels.shape == (11, 3 * 8 * 8)
    assert 0 <= pixels.min() < pixels.max() <= 1
    monkeypatch.setattr("mnclglf.evaluation.features.CHUNK_IMAGES", 3)
    assert torch.equal(raw_pixels(images, side=8), pixels)
