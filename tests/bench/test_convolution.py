"""bench/convolution.py: the prototype of a fused convolution, interpreted, and compiled for sm_86."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from interpreter import confined, counting

from bench.convolution import LAYERS, Tile, convolution, empty_moments, launch_of, main, saving
from bench.proof import ROOT
from mnclglf_kernels._triton import launch

TINY = Tile(pixels=32, outputs=16, inputs=16)
EXACT = 1e-12  # fp64: 144 terms of about 1, each rounded by 1e-16, and a margin
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def operands(dtype, views=2, images=3, inputs=32, outputs=32, height=5, width=3):
    """Makes x, weight, scale and shift; 3 images of 5 x 3 are no multiple of 32 pixels."""
    x = torch.randn(views * images, inputs, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, inputs, 3, 3) / 17).to(dtype).contiguous(memory_format=torch.channels_last)
    sums = torch.promote_types(dtype, torch.float32)
    scale, shift = torch.randn(views, inputs, dtype=sums), torch.randn(views, inputs, dtype=sums) + 1
    return x, weight, scale, shift


def normalized(x, scale, shift):
    """Applies a batch norm of these factors and the ReLU to each view."""
    factors = [t.repeat_interleave(len(x) // len(t), 0)[:, :, None, None] for t in (scale, shift)]
    return F.relu(x.to(scale.dtype) * factors[0] + factors[1])


def parts(y, views, pixels):
    """Yields the part, [rows, K], of each view and place, as moments are laid out."""
    rows = y.permute(0, 2, 3, 1).reshape(views, -1, y.shape[1])
    for v in range(views):
        for p, part in enumerate(rows[v].split(pixels)):
            yield (v, p), part


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_convolution_equals_pytorch_s(dtype, prologue):
    x, weight, scale, shift = operands(dtype)
    y, moments = convolution(x, weight, *((scale, shift) if prologue else ()), views=2, tile=TINY)
    read = normalized(x, scale, shift) if prologue else x
    truth = F.conv2d(
        normalized(x.double(), scale.double(), shift.double()) if prologue else x.double(), weight.double(), padding=1
    )
    plain = F.conv2d(read.to(dtype), weight, padding=1)
    error, allowed = (y - truth).abs().max(), 2 * (plain - truth).abs().max() + EXACT
    assert y.dtype == dtype
    assert error <= allowed
    assert moments.shape == (2, 2, 2, 32)  # 45 pixels per view in parts of 32
    near = EXACT if dtype == torch.float64 else 2**-16  # sums of 288 products in fp32, not of y rounded to 16 bits
    for (view, part), values in parts(F.conv2d(read.to(dtype).double(), weight.double(), padding=1), 2, TINY.pixels):
        mean, squares = moments[view, part].double()
        torch.testing.assert_close(mean, values.mean(0), rtol=near, atol=near)
        torch.testing.assert_close(squares, (values - values.mean(0)).square().sum(0), rtol=near, atol=near)


def test_one_channel_s_nan_reaches_its_neighbors_and_no_other_image():
    x, weight, scale, shift = operands(torch.float64)
    x[1, 3, 0, 0] = torch.nan
    y, _ = convolution(x, weight, scale, shift, views=2, tile=TINY)
    expected = F.conv2d(normalized(x, scale, shift), weight, padding=1)
    torch.testing.assert_close(y, expected, rtol=EXACT, atol=EXACT, equal_nan=True)
    assert y.isnan().any((1, 2, 3)).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("prologue", [False, True])
def test_it_stores_each_element_once_and_moves_what_is_counted(prologue):
    x, weight, scale, shift = operands(torch.float32)
    y, moments = torch.empty_like(x), empty_moments(x, 32, 2, TINY)
    factors = (scale, shift) if prologue else (None, None)
    made = launch_of(x, weight, *factors, y, moments, 2, TINY)
    tensors = [value for value in made.arguments.values() if isinstance(value, torch.Tensor)]
    with confined(tensors, "convolution"):
        launch.run([made], x.device)
    with counting() as counted:
        launch.run([made], x.device)
    assert (counted.unique_bytes, counted.issued_bytes) == made.traffic[1:]
    assert made.traffic.flops == 2 * 9 * 32 * 32 * x[:, 0].numel()


def test_a_size_that_no_tile_fits_is_refused():
    with pytest.raises(ValueError, match=r"24 channels .*F.conv2d"):
        convolution(*operands(torch.float32, inputs=24), views=2, tile=TINY)


def test_a_saving_is_that_of_the_hand():
    first = LAYERS[0]
    flops, moved = saving(first, images=256)
    one = 256 * 32 * 32 * 64 * 2  # bytes of an activation of 256 images
    assert flops == 4 * 4 * 2 * 9 * 64 * 64 * 256 * 32 * 32
    # Each block: the first batch norm needs no pass of three, the second no pass for its moments.
    passes = 4 * 2 * (3 + 1) * one
    ours = 4 * 4 * 2 * 2048 * 2 * 64 * 4  # moments of 2,048 parts of 128 pixels, written and read
    assert passes - 2 * ours < moved + ours < passes + ours


def test_the_layer_of_64_channels_compiles_for_sm_86_as_it_must():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, "-m", "bench.convolution", "--arch", "sm_86", "--channels", "64"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.split("\n\n")[1].splitlines()]
    assert [row[head.index("prologue")] for row in rows] == ["no", "yes"]
    for row in rows:
        found = dict(zip(head, (cell.strip() for cell in row), strict=True))
        assert found["stack"] == ""  # no register is spilled
        assert found["mma"].endswith(" HMMA.16816.F32.BF16")  # in the inner loop, with fp32 sums
        assert int(found["cp.async of 16 bytes"]) > 0  # in the inner loop too
        assert int(found["blocks (warps) per SM"].split()[0]) >= 2


def test_an_unknown_layer_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--channels", "65"])
    assert "65" in capsys.readouterr().err
