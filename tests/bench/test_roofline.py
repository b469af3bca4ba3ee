"""bench/roofline.py: its tables, and where it finds what each part took."""

import pytest
import torch

from bench import roofline
from bench.roofline import main, measured_parts, small_share, table
from bench.steps import Size, config_of
from mnclglf.training.roofline import Part, Peaks


def test_the_table_of_a_gpu(capsys):
    main(["--batch-size", "8", "--gpu", "h100"])
    printed = capsys.readouterr().out
    assert "mnclglf, batch 8, 32 x 32, bf16, on H100 SXM" in printed
    for name in ("convolutions, forward", "nearest_neighbor", "optimizer", "together"):
        assert f"| {name} |" in printed
    assert "measured" not in printed
    main(["--batch-size", "4", "--method", "supervised"])
    assert "supervised, batch 4" in capsys.readouterr().out


def test_what_was_measured_stands_beside_its_least():
    parts = {"matrix products": Part(10**9, 10**6), "optimizer": Part(0, 10**9)}
    peaks = Peaks("made up", flops=1e12, memory_bytes=1e12, pads=True)
    lines = table(parts, peaks, 4, {"matrix products": 0.004, "everything else": 0.001}).splitlines()
    assert lines == [
        "| part | TFLOP | GB | roofline ms | bound by | measured ms | fraction |",
        "|---|--:|--:|--:|---|--:|--:|",
        "| matrix products | 0.001 | 0.001 | 1.00 | compute | 4.00 | 25% |",
        "| optimizer | 0.000 | 1.000 | 1.00 | memory | - | - |",
        "| everything else | 0.000 | 0.000 | 0.00 |  | 1.00 | 0% |",
        "| together | 0.001 | 1.001 | 2.00 | 2000 images/s | 5.00 | 40% |",
    ]


def test_every_part_of_a_step_is_found(monkeypatch):
    """Checks the parts of a step on the CPU; an operator's part includes its backward."""
    monkeypatch.setattr(roofline, "keep_freed_memory", lambda: True)
    measured = measured_parts(config_of(Size(images=8, side=16, width=8)), 16, torch.device("cpu"))
    operators = {"divide", "combine", "contrastive_losses", "nearest_neighbor", "enqueue", "moving average"}
    networks = {
        "convolutions, forward",
        "convolutions, backward",
        "batch norm and element-wise",
        "matrix products",
        "optimizer",
    }
    assert operators | networks <= measured.keys()
    assert all(seconds > 0 for seconds in measured.values())
    assert measured["everything else"] < 0.3 * sum(measured.values())
    assert 0 < small_share(measured) < 1


@pytest.mark.parametrize("gpu", ["3090", "4090", "a100", "h100"])
def test_every_gpu_has_a_limit(gpu, capsys):
    main(["--gpu", gpu, "--batch-size", "4", "--side", "16"])
    assert "images/s" in capsys.readouterr().out
