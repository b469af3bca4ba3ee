"""bench/half_sums.py: the emulation of fp16 sums beside a slow loop, and in a training step."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from bench.half_sums import HALF_SUMS, KINDS, Closeness, Seen, closeness, embed, emulated, half_sum_conv2d, main, table
from mnclglf.api import train
from mnclglf.config import ModelConfig, ObjectiveConfig
from mnclglf.methods import METHODS
from mnclglf.models.encoder import ResNet18

FOLLOWING = ["byol", "fast_moco", "mnclglf", "mnclglf_official", "mocov2"]


def slow_convolution(images, weight, stride, padding):
    """Rounds to fp16 after every 16 channels of every tap, one output at a time."""
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    kernel = weight.numpy()
    taps, channels = kernel.shape[2], kernel.shape[1]
    size = (padded.shape[2] - taps) // stride + 1
    result = np.zeros((len(padded), len(kernel), size, size), dtype=np.float16)
    for n, k, y, x in np.ndindex(*result.shape):
        total = np.float16(0)
        for row, column, first in itertools.product(range(taps), range(taps), range(0, channels, 16)):
            pixel = padded[n, first : first + 16, stride * y + row, stride * x + column]
            with np.errstate(over="ignore"):
                total = np.float16(float(total) + float(pixel @ kernel[k, first : first + 16, row, column]))
        result[n, k, y, x] = total
    return torch.from_numpy(result)


@pytest.mark.parametrize(("channels", "taps", "stride"), [(3, 3, 1), (20, 3, 2), (48, 3, 1), (32, 1, 2)])
def test_it_is_the_slow_loop(channels, taps, stride):
    # Whole numbers: 16 products and a sum are exact in fp32, in any order. Sums above 2,048 are rounded in fp16.
    images = torch.randint(-64, 65, (2, channels, 5, 6)).float()[..., :5]
    weight = torch.randint(-16, 17, (4, channels, taps, taps)).float()
    made = half_sum_conv2d(images, weight, stride, taps // 2)
    assert made.dtype == torch.float16
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, slow_convolution(images, weight, stride, taps // 2))
    assert not torch.equal(made, F.conv2d(images, weight, None, stride, taps // 2).half())  # else the test is void


def test_an_overflow_within_a_sum_is_seen_also_where_the_result_would_fit():
    weight = torch.cat([torch.full((1, 16, 1, 1), 256.0), torch.full((1, 16, 1, 1), -256.0)], dim=1)
    layer = torch.nn.Conv2d(32, 1, 1, bias=False)
    layer.weight.data = weight
    seen = Seen()
    with torch.no_grad(), emulated(torch.nn.Sequential(layer), HALF_SUMS, seen):
        result = layer(torch.full((1, 32, 2, 2), 16.0))  # 65,536, then back to 0
    assert result.isinf().all()
    assert seen.largest == {"0": math.inf}
    assert seen.overflows == {"0": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_with_gradient_stays_what_it_is(kind):
    encoder, images = ResNet18(width=8).train(), torch.randn(4, 3, 8, 8)
    plain = encoder(images)
    with emulated(encoder, kind):
        assert torch.equal(encoder(images), plain)
        with torch.no_grad():
            without = encoder(images)
    assert not torch.equal(without, plain)
    with torch.no_grad():
        assert torch.equal(encoder(images), plain)  # and afterwards all is as it was


def test_it_reads_the_weights_that_a_step_casts_to_bf16():
    encoder, images = ResNet18(width=8).train(), torch.randn(4, 3, 8, 8)
    weights = {name: weight.bfloat16() for name, weight in encoder.named_parameters() if weight.ndim == 4}
    with torch.no_grad(), emulated(encoder, HALF_SUMS):
        assert torch.equal(functional_call(encoder, weights, (images,)), encoder(images))


def test_fp16_sums_lie_between_fp16_and_bf16_on_an_untrained_encoder():
    encoder, images = ResNet18(width=16).train(), torch.randn(32, 3, 16, 16)
    exact = embed(encoder, images)
    means = {}
    for kind in KINDS:
        with emulated(encoder, kind):
            means[kind] = closeness(embed(encoder, images), exact, F.normalize(exact)).mean
    assert 0 < means["fp16"] < means[HALF_SUMS] < means["bf16"] < 0.02


def test_closeness_is_that_of_the_angle_and_of_the_neighbor():
    exact = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    turned = torch.tensor([[3.0, 0.0], [1.0, 1.0]])  # by 0 and 45 degrees
    queue = torch.tensor([[0.0, 1.0], [0.8, 0.6]])  # the second lies nearer to 45 degrees
    close = closeness(turned, exact, queue)
    assert close.worst == pytest.approx(1 - math.sqrt(0.5))
    assert close.mean == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert close.same_neighbor == 0.5


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_every_method_with_a_network_without_gradient_takes_it(name, precision):
    model = ModelConfig(width=8, projector_width=16, predictor_width=8)
    method = METHODS[name](model, ObjectiveConfig(queue_size=32), queue_dtype=precision).train()
    views, seen = torch.randn(method.views * 8, 3, 16, 16), Seen()
    with emulated(method, HALF_SUMS, seen), torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        losses = method(views)
    losses.total.backward()
    assert losses.total.isfinite()
    assert {layer.split(".")[0] for layer in seen.largest} >= {"momentum"}
    assert any(layer.startswith("encoder") for layer in seen.largest) == name.startswith("mnclglf")


def test_the_table_names_the_largest_sums_and_the_overflows():
    seen = Seen(largest={"conv1": 12.34}, overflows=Counter(conv1=3))
    printed = table({"small": {kind: (Closeness(1e-5, 2e-4, 0.953), seen) for kind in KINDS}})
    assert "| small | bf16 | 1.0e-05 (2.0e-04) | 95.3% | 3 |" in printed
    assert "| conv1 | 12.3 |" in printed


def test_the_command_compares_a_run(tmp_path, capsys):
    small: dict[str, Any] = dict(image_size=8, width=8, projector_width=16, predictor_width=8, batch_size=64)
    run = train(method="byol", dataset="digits", recipe="quick", epochs=1, train_images=128, out=tmp_path, **small)
    main(["--run", str(run.path), "--width", "8", "--side", "8", "--images", "64"])
    printed = capsys.readouterr().out
    assert f"| trained, width 8, 8 x 8 | {HALF_SUMS} |" in printed
    assert f"| untrained, width 8, 8 x 8 | {HALF_SUMS} |" in printed
