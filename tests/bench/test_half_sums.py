"""bench/half_sums.py: the emulation of fp16 sums beside a slow loop, and in a training step."""

import itertools
import math
from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import bench.half_sums
from bench.half_sums import (
    FOLLOWING,
    HALF_SUMS,
    KINDS,
    WAYS,
    Closeness,
    Seen,
    closeness,
    embed,
    emulated,
    half_sum_conv2d,
    input_gradient_half_sums,
    main,
    study,
    study_table,
    table,
)
from mnclglf.api import train
from mnclglf.config import ModelConfig, ObjectiveConfig
from mnclglf.methods import METHODS
from mnclglf.models.encoder import ResNet
from mnclglf.runs.files import read_config, read_object


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


def slow_input_gradient(upstream, weight, size, stride, padding):
    """Rounds to fp16 after every 16 of the filters, from the last tap to the first, one pixel at a time."""
    above, kernel = upstream.numpy(), weight.numpy()
    filters, channels, taps, _ = kernel.shape
    result = np.zeros((len(above), channels, *size), dtype=np.float16)
    for n, c, y, x in np.ndindex(*result.shape):
        total = np.float16(0)
        for row, column, first in itertools.product(
            reversed(range(taps)), reversed(range(taps)), range(0, filters, 16)
        ):
            (down, odd_row), (right, odd_column) = (
                divmod(at, stride) for at in (y + padding - row, x + padding - column)
            )
            if odd_row or odd_column or not (0 <= down < above.shape[2] and 0 <= right < above.shape[3]):
                continue
            block = slice(first, first + 16)
            total = np.float16(float(total) + float(above[n, block, down, right] @ kernel[block, c, row, column]))
        result[n, c, y, x] = total
    return torch.from_numpy(result)


@pytest.mark.parametrize(
    ("filters", "taps", "stride", "padding", "size"),
    [
        (3, 3, 1, 1, (5, 4)),
        (20, 3, 2, 1, (6, 5)),
        (48, 3, 1, 1, (4, 5)),
        (32, 1, 2, 0, (6, 5)),
        (20, 3, 2, 1, (1, 1)),
        (20, 3, 2, 0, (6, 5)),
    ],
)
def test_the_gradient_of_the_input_is_the_slow_loop(filters, taps, stride, padding, size):
    rows, columns = ((side + 2 * padding - taps) // stride + 1 for side in size)
    upstream = torch.randint(-64, 65, (2, filters, rows, columns)).float()  # whole numbers, as in the forward's test
    weight = torch.randint(-16, 17, (filters, 4, taps, taps)).float()
    settings = size, stride, padding
    made = input_gradient_half_sums(upstream, weight, *settings)
    assert torch.equal(made, slow_input_gradient(upstream, weight, *settings))
    images = torch.zeros(2, 4, *size, requires_grad=True)
    F.conv2d(images, weight, None, stride, padding).backward(upstream)
    assert images.grad is not None
    exact = KINDS["fp16"].input_gradient(upstream, weight, *settings)
    assert torch.equal(exact, images.grad.half())
    assert torch.allclose(made.float(), images.grad, rtol=0.02, atol=32)  # half an ulp at 32,768 is 16
    if size != (1, 1):
        assert not torch.equal(made, exact)  # else the test is void


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
    encoder, images = ResNet(width=8).train(), torch.randn(4, 3, 8, 8)
    plain = encoder(images)
    with emulated(encoder, kind):
        assert torch.equal(encoder(images), plain)
        with torch.no_grad():
            without = encoder(images)
    assert not torch.equal(without, plain)
    with torch.no_grad():
        assert torch.equal(encoder(images), plain)  # and afterwards all is as it was


ALL_FP16: dict[str, Any] = {"kind": "fp16", "online": "fp16", "input_gradient": "fp16"}


@pytest.mark.parametrize("part", ALL_FP16)
def test_each_switch_changes_only_its_part(part):
    layer = torch.nn.Conv2d(48, 32, 3, stride=2, padding=1, bias=False)
    images, upstream = torch.randn(4, 48, 9, 9), torch.randn(4, 32, 5, 5)

    def parts_of(**parts):
        seen = images.clone().requires_grad_()
        layer.weight.grad = None
        with emulated(torch.nn.Sequential(layer), **parts):
            with torch.no_grad():
                without = layer(images)
            online = layer(seen)
            online.backward(upstream)
        return {"kind": without, "online": online, "input_gradient": seen.grad, "weight": layer.weight.grad}

    plain, changed = parts_of(**ALL_FP16), parts_of(**{**ALL_FP16, part: HALF_SUMS})
    assert [name for name in plain if not torch.equal(plain[name], changed[name])] == [part]


def test_the_gradient_of_the_weights_sums_in_fp32():
    layer = torch.nn.Conv2d(4, 4, 1, bias=False)
    images = torch.ones(2, 4, 47, 47)  # sums of 2,209 and -2,208; fp16 has no odd numbers above 2,048
    images[1] = -1
    images[1, :, 0, 0] = 0
    with emulated(torch.nn.Sequential(layer), HALF_SUMS, online=HALF_SUMS, input_gradient=HALF_SUMS):
        layer(images.requires_grad_()).backward(torch.ones(2, 4, 47, 47))
    assert layer.weight.grad is not None
    assert layer.weight.grad.unique().tolist() == [1]


def test_fp16_is_that_of_autocast():
    encoder, images = ResNet(width=8).train(), torch.randn(8, 3, 8, 8)

    def gradients(context):
        encoder.zero_grad()
        with context:
            encoder(images).square().mean().mul(1024).backward()  # a loss scale
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    exact = gradients(nullcontext())
    ours = gradients(emulated(encoder, **ALL_FP16))
    theirs = gradients(torch.autocast("cpu", dtype=torch.float16))
    assert 0 < (ours - exact).norm() <= 2 * (theirs - exact).norm()  # twice the error, as for any other kernel


@pytest.mark.parametrize("parts", [{"online": "fp16"}, {"input_gradient": HALF_SUMS}])
def test_half_of_a_graph_is_refused(parts):
    with (
        pytest.raises(ValueError, match=rf"{next(iter(parts.values()))}.*give both"),
        emulated(ResNet(width=8), "fp16", **parts),
    ):
        pass


def test_two_dtypes_in_a_graph_are_refused():
    with (
        pytest.raises(ValueError, match=r"bf16.*fp16.*one dtype"),
        emulated(ResNet(width=8), "fp16", online="bf16", input_gradient="fp16"),
    ):
        pass


def test_it_reads_the_weights_that_a_step_casts_to_bf16():
    encoder, images = ResNet(width=8).train(), torch.randn(4, 3, 8, 8)
    weights = {name: weight.bfloat16() for name, weight in encoder.named_parameters() if weight.ndim == 4}
    with torch.no_grad(), emulated(encoder, HALF_SUMS):
        assert torch.equal(functional_call(encoder, weights, (images,)), encoder(images))


def test_fp16_sums_lie_between_fp16_and_bf16_on_an_untrained_encoder():
    encoder, images = ResNet(width=16).train(), torch.randn(32, 3, 16, 16)
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


def test_the_methods_of_the_study_are_those_with_a_network_without_gradient():
    small = ModelConfig(width=8, projector_width=16, predictor_width=8, classes=2)
    made = {name: method(small, ObjectiveConfig(queue_size=32)) for name, method in METHODS.items()}
    assert set(FOLLOWING) == {name for name, method in made.items() if hasattr(method, "momentum") and name != "nnclr"}


def figures(knn=90.0, skipped=0):
    names = ("knn, pretrained", "knn, untrained", "logistic, pretrained", "logistic, untrained")
    return {**dict.fromkeys(names, knn), "skipped": skipped, "seconds": 1.0}


def test_a_stopped_study_goes_on_where_it_was(tmp_path, monkeypatch):
    trained = []

    def train(config, out, **parts):
        if config.seed == 1 and len(trained) == 1:
            raise KeyboardInterrupt
        trained.append((config.seed, config.engine.precision, parts))

    monkeypatch.setattr(bench.half_sums, "train", train)
    monkeypatch.setattr(bench.half_sums, "accuracies", lambda run: figures())
    monkeypatch.setattr(bench.half_sums, "skipped_steps", lambda run: 0)
    ways = {"half": WAYS["bf16"]["bf16; fp16 sums without gradient"]}
    with pytest.raises(KeyboardInterrupt):
        study(["byol"], ways, [0, 1], tmp_path, {"byol": dict(dataset="digits", epochs=2)})
    assert len(trained) == 1
    trained.append("went on")
    printed = study(["byol"], ways, [0, 1], tmp_path, {"byol": dict(dataset="digits", epochs=2)})
    assert trained == [(0, "bf16", {"kind": HALF_SUMS}), "went on", (1, "bf16", {"kind": HALF_SUMS})]
    assert "| byol | half | 2 | 90.0 (90.0 to 90.0) |" in printed
    with pytest.raises(ValueError, match=r"'epochs': 2.*'epochs': 3.*--out"):
        study(["byol"], ways, [0], tmp_path, {"byol": dict(dataset="digits", epochs=3)})


def test_the_table_of_a_study_has_means_spreads_and_overflows():
    runs = {f"byol, {way}, seed {seed}": figures(80.0 + 3 * seed, seed) for way in "ab" for seed in range(3)}
    del runs["byol, b, seed 2"]  # of a study that was stopped
    lines = study_table(runs, ["byol", "mocov2"], "ab", range(3)).splitlines()
    assert lines[2:] == [
        "| byol | a | 3 | 83.0 (80.0 to 86.0) | 83.0 (80.0 to 86.0) | 3 |",
        "| byol | b | 2 | 81.5 (80.0 to 83.0) | 81.5 (80.0 to 83.0) | 1 |",
        "| byol | untrained | 3 | 83.0 (80.0 to 86.0) | 83.0 (80.0 to 86.0) |  |",
    ]


@pytest.mark.parametrize(("precision", "way"), [(p, way) for p, ways in WAYS.items() for way in ways])
def test_every_way_trains(precision, way, tmp_path):
    small: dict[str, Any] = dict(image_size=8, width=8, projector_width=16, predictor_width=8, batch_size=64)
    small |= dict(dataset="digits", recipe="quick", epochs=1, train_images=128, log_every=1)
    study(["byol"], {way: WAYS[precision][way]}, [0], tmp_path, {"byol": small})
    (run,) = (read_object(tmp_path / "study.json") or {}).values()
    assert 10 < run["knn, pretrained"] <= 100
    assert 10 < run["logistic, untrained"] <= 100
    assert run["skipped"] < 2 or precision == "fp16"
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert read_config(folder).engine.precision == WAYS[precision][way].precision
