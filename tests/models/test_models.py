"""The networks against torchvision's ResNet-18 and the paper's description."""

import oracles
import pytest
import torch

from mnclglf.config import Stem
from mnclglf.models.batch_norm import batch_norms
from mnclglf.models.encoder import ResNet
from mnclglf.models.heads import predictor, projector
from mnclglf.models.momentum import momentum_copy, update_momentum


@pytest.mark.parametrize(("stem", "side"), [("cifar", 16), ("imagenet", 64)])
def test_resnet_equals_torchvision(stem: Stem, side: int) -> None:
    reference = oracles.reference_resnet18(stem=stem).double().train()
    ours = ResNet(stem).double().train()
    state = reference.state_dict()
    for name in [name for name in state if "num_batches_tracked" in name]:
        del state[name]
    ours.load_state_dict(state)
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(ours(images), reference(images), rtol=1e-12, atol=1e-12)  # the same fp64 operations
    for name, value in ours.state_dict().items():  # running statistics after the forward
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_resnet_starts_like_torchvision() -> None:
    torch.manual_seed(3)
    ours, reference = ResNet().state_dict(), oracles.reference_resnet18().state_dict()
    for name, value in ours.items():
        if value.dim() == 4:  # the same distribution: standard deviations of thousands of draws agree within 10%
            assert value.std().item() == pytest.approx(reference[name].std().item(), rel=0.1), name
        else:
            assert torch.equal(value, reference[name]), name


@pytest.mark.parametrize("width", [1, 16, 64])
def test_feature_width_is_eight_times_the_width(width: int) -> None:
    network = ResNet(width=width)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, network.features) == (2, 8 * width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_images_of_one_pixel_are_not_what_memory_held(dtype: torch.dtype) -> None:
    """Views of 8 pixels have patches of 4, of which the last stage strides over 1: eight taps in nine see padding."""
    network = ResNet(width=4).to(memory_format=torch.channels_last)
    name = "layer4.0.conv1.weight"
    for _ in range(10):
        left_over = [torch.full((2**16,), torch.nan) for _ in range(8)]
        del left_over
        network.get_parameter(name).grad = None
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = network(torch.randn(16, 3, 4, 4).to(memory_format=torch.channels_last))
        features.float().square().sum().backward()
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        assert gradient.count_nonzero() == gradient[:, :, 1, 1].count_nonzero() > 0


def test_heads_equal_the_paper() -> None:
    for width, ours, reference in [
        (512, projector(512, 96), oracles.reference_projector(512, 96)),
        (96, predictor(96, 24), oracles.reference_predictor(96, 24)),
    ]:
        reference.load_state_dict(ours.state_dict(), strict=False)
        rows = torch.randn(8, width)
        torch.testing.assert_close(ours(rows), reference(rows))


def test_no_network_counts_its_batches() -> None:
    for module in (ResNet(width=4), projector(32, 8), predictor(8, 4)):
        assert batch_norms(module)
        assert not [name for name in module.state_dict() if "num_batches_tracked" in name]


def test_channels_last_changes_no_value() -> None:
    network = ResNet(width=4).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = network(images)
    last = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-12)  # another order of summation


def test_momentum_copy_is_its_own_network() -> None:
    online = ResNet(width=4)
    follower = momentum_copy(online)
    assert not any(parameter.requires_grad for parameter in follower.parameters())
    follower(torch.randn(2, 3, 16, 16))
    name = "bn1.running_mean"
    assert not torch.equal(follower.get_buffer(name), online.get_buffer(name))


def test_update_momentum_keeps_still_where_told() -> None:
    online, follower = ResNet(width=4), momentum_copy(ResNet(width=4))
    assert isinstance(follower, ResNet)
    before = follower.conv1.weight.clone()
    update_momentum(follower, online, 0.9, torch.tensor(False))
    assert torch.equal(follower.conv1.weight, before)
    update_momentum(follower, online, 0.9, torch.tensor(True))
    torch.testing.assert_close(follower.conv1.weight, 0.9 * before + 0.1 * online.conv1.weight)
