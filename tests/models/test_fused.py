"""Tests of the encoder's forward without gradient by convolutions that take in the batch norms around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mnclglf.config import Stem
from mnclglf.models.batch_norm import Views, batch_statistics_only
from mnclglf.models.encoder import ResNet
from mnclglf.models.fused import features_without_gradient, set_half
from mnclglf_kernels import Backend
from mnclglf_kernels.backend import HAS_CUDNN


def encoder_of(stem: Stem = "cifar", width: int = 4, dtype: torch.dtype = torch.float64) -> ResNet:
    """Returns an encoder in train mode whose batch norms differ from channel to channel."""
    torch.manual_seed(0)
    encoder = ResNet(stem, width).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    for name, x in encoder.named_parameters():
        if "bn" in name or name.endswith("downsample.1.weight"):
            torch.nn.init.uniform_(x, 0.5, 1.5) if name.endswith("weight") else torch.nn.init.normal_(x)
    return encoder.to(dtype)


def images_of(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype, memory_format=torch.channels_last)


def buffers_of(encoder: ResNet) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in encoder.named_buffers() if "running" in name}


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("views", [1, 3, Views(after=(2, 0), decays=3), Views(after=(1,), decays=0)], ids=str)
@torch.no_grad()
def test_features_and_running_statistics_are_those_of_the_plain_forward(views: Views | int, stem: Stem) -> None:
    plain, fused = encoder_of(stem), encoder_of(stem)
    images = images_of(6)
    torch.testing.assert_close(
        features_without_gradient(fused, images, views), plain(images, views), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(buffers_of(fused), buffers_of(plain), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_no_running_statistic_changes_where_none_is_tracked() -> None:
    encoder = encoder_of()
    before = buffers_of(encoder)
    with batch_statistics_only(encoder):
        features_without_gradient(encoder, images_of(4), 2)
    for name, x in buffers_of(encoder).items():
        assert torch.equal(x, before[name])


def test_only_training_forwards_without_gradient_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def note(encoder: ResNet, images: Tensor, views: Views | int) -> Tensor:
        called.append(views)
        return images.new_zeros(len(images), encoder.features)

    monkeypatch.setattr("mnclglf.models.encoder.features_without_gradient", note)
    encoder, images = encoder_of(), images_of(4)
    for backend in ("auto", "torch"):
        encoder.convolution = backend
        with torch.no_grad():
            encoder(images, 2)
    encoder.convolution = "triton"
    encoder(images, 2)
    with torch.no_grad():
        encoder.eval()(images, 2)
        assert called == []
        encoder.train()(images, 2)
    assert called == [2]


@torch.no_grad()
def test_features_by_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 16: the kernel takes multiples of 16 channels."""
    plain, fused = (encoder_of(width=16, dtype=torch.float32) for _ in range(2))
    fused.convolution = "triton"
    images = images_of(4, torch.float32)[:, :, :8, :8]
    exact = encoder_of(width=16)(images.double(), 2)
    found, expected = fused(images, 2), plain(images, 2)
    limit = 4 * (expected - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (found - exact).abs().max() < limit
    torch.testing.assert_close(buffers_of(fused), buffers_of(plain), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_overflow_is_noted_and_leaves_running_statistics_finite() -> None:
    encoder = encoder_of(dtype=torch.float32)
    encoder.layer2[0].conv1.weight.mul_(1e6)  # pyright: ignore
    set_half(encoder, True)
    before = buffers_of(encoder)
    features = features_without_gradient(encoder, images_of(4, torch.float32), 2)
    assert encoder.overflow
    assert not [name for name in encoder.state_dict() if "overflow" in name]
    assert features.isnan().all()
    after = buffers_of(encoder)
    assert all(x.isfinite().all() for x in after.values())
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])  # before the overflow
    assert torch.equal(after["layer2.0.bn1.running_var"], before["layer2.0.bn1.running_var"])


@torch.no_grad()
def test_half_sums_compute_in_fp16_from_weights_in_fp16() -> None:
    encoder, exact = encoder_of(dtype=torch.float32), encoder_of()
    set_half(encoder, True)
    images = images_of(8)
    with torch.autocast("cpu", torch.bfloat16):
        features = features_without_gradient(encoder, images.float(), 2)
        rough = encoder_of(dtype=torch.float32)(images.float(), 2)
    truth = exact(images, 2)
    assert features.dtype == torch.bfloat16
    # An fp16 rounding is an eighth of one in bf16; the features are rounded to bf16 at the end.
    assert (features - truth).abs().mean() < (rough - truth).abs().mean() / 3
    set_half(encoder, True)  # again: nothing changes
    assert "half_weight" not in str(encoder.state_dict().keys())
    assert not encoder.overflow
    set_half(encoder, False)
    assert not any("half" in name or "overflow" in name for name, _ in encoder.named_buffers())
    assert features_without_gradient(encoder, images.float(), 2).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@torch.no_grad()
def test_features_on_the_gpu_are_as_near_to_fp64_as_the_plain_ones(backend: Backend) -> None:
    if backend == "cudnn" and not HAS_CUDNN:
        pytest.skip("nvidia-cudnn-frontend is not installed: pip install 'mnclglf[cudnn]'")
    exact, plain, fused = (encoder_of(width=64, dtype=torch.float32).cuda() for _ in range(3))
    fused.convolution = backend
    set_half(fused, backend == "cudnn")
    images = images_of(64, torch.float32).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = fused(images, 2), plain(images, 2)
    truth = exact.double()(images.double(), 2)
    assert (found - truth).norm() < 2 * (expected - truth).norm()
    torch.testing.assert_close(buffers_of(fused), buffers_of(plain), rtol=0.02, atol=0.02)
