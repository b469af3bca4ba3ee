"""docs/howto/operators-in-your-loop.md: its SimCLR of lightly's parts runs as it stands and with the line changed."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "operators-in-your-loop.md"
TEXT = PAGE.read_text()
SCRIPT = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)[0]
CHANGES = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.M | re.S)


def side(change: str, sign: str) -> list[str]:
    return [line[1:] for line in change.splitlines() if line.startswith(sign)]


def losses(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """Runs the script on few random images, and returns the losses that it prints."""

    def few_images(root: str, download: bool, transform: object) -> torchvision.datasets.FakeData:
        assert download
        return torchvision.datasets.FakeData(size=24, image_size=(3, 32, 32), transform=transform)  # pyright: ignore

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", few_images)
    short = script.replace("range(10)", "range(1)").replace("batch_size=256", "batch_size=8")
    assert short != script
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # lightly's transforms draw from the global generators
    torch.manual_seed(0)
    exec(compile(short, str(PAGE), "exec"), {})
    return [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]


def test_the_changed_line_gives_the_same_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (before,), (after,) = side(CHANGES[0], "-"), side(CHANGES[0], "+")
    assert SCRIPT.count(before + "\n") == 1
    theirs = losses(SCRIPT, monkeypatch, capsys)
    ours = losses(SCRIPT.replace(before, after), monkeypatch, capsys)
    assert len(theirs) == 3
    # The gradients of step 1 differ by rounding, which batch norm of 8 images carries into the later losses.
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_each_changed_line_is_python_that_runs() -> None:
    for change in CHANGES:
        for sign in "-+":
            exec("\n".join(side(change, sign)), {})
