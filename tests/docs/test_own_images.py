"""The commands of docs/howto/own-images.md, run in order on a small stand-in for the reader's photographs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnclglf.cli import main
from tests.helpers.image_folder import pixels, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "own-images.md"
# Given after the page's own options, so that these hold.
TINY = shlex.split(
    "--image-size 16 --batch-size 8 --epochs 1 --width 2 --projector-width 8 --predictor-width 4 --queue-size 16 "
    "--device cpu"
)
EVALUATED = {"knn": ["--neighbors", "3"], "linear": ["--steps", "2", "--batch-size", "8"]}


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            for number in range(8):
                write(Path("photos", part, name, f"{number}.jpg"), pixels(40 + number, 36, number))
    write(Path("photos/train/cats/gray.png"), pixels()[..., 0])
    Image.fromarray(np.full((30, 30), 40_000, np.uint16)).save("photos/train/dogs/deep.tif")
    commands = [line[2:] for line in re.findall(r"^\$ mnclglf .*$", PAGE.read_text(), flags=re.MULTILINE)]
    assert len(commands) == 8
    for command in commands:
        _, name, *words = shlex.split(command)
        more = TINY if name == "train" else EVALUATED.get(name, [])
        assert main([name, *words, *more]) == 0, (command, capsys.readouterr().err)
    printed = capsys.readouterr().out
    assert "JPEG 16, PNG 1, TIFF 1" in printed
    assert "on a card of 24 GB" in printed
