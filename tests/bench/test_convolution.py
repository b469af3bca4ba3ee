"""bench/convolution.py: what the operator saves by count, and its kernel as compiled for sm_86."""

import os
import subprocess
import sys

import pytest

from bench.convolution import LAYERS, main, saving
from bench.proof import ROOT


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
