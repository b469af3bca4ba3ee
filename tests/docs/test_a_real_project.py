"""Follows docs/howto/a-real-project.md from its top, on small stand-ins for the reader's photographs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folder import pixels, write
from PIL import Image
from ruamel.yaml import YAML

import mnclglf
from mnclglf.cli import main
from mnclglf.training import loop

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "a-real-project.md").read_text()
BLOCK = re.compile(r"^<!-- tested by: [^\n]* -->\n```(\w+)\n(.*?)^```$", re.M | re.S)
TINY: dict[str, Any] = dict(
    image_size=32, batch_size=8, epochs=2, projector_width=8, predictor_width=4, queue_size=16, device="cpu",
    precision="fp32", validation_images=6, loader_threads=1,
)  # fmt: skip
SHORT = {"epochs=20": "epochs=1", "n_trials=20": "n_trials=2"}
COUNT = 40


def photographs(root: Path) -> None:
    """Writes photographs of many shapes below `root`: gray, of 16 bits, with transparency, damaged, oddly named."""
    for number in range(COUNT):
        image = pixels(40 + number % 5 * 4, 36 + number % 7 * 6, number)
        names = (f"{number}.jpg", f"2019/{number}.jpg", f"2019/a [b]/{number} ü.png", f"2020/{number}.png")
        write(root / names[number % 4], image[..., 0] if number % 8 == 2 else image)
    Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257).save(root / "deep.tif")
    Image.fromarray(np.dstack([pixels(30, 40), np.full((30, 40), 99, np.uint8)])).save(root / "2020" / "alpha.png")
    (root / "2020" / "cut.jpg").write_bytes((root / "0.jpg").read_bytes()[:300])


class Stopped(loop.Trainer):
    """Gets SIGINT at its sixth batch, the second of epoch 2."""

    def train(self) -> int | None:
        batches = self.loader.batches

        def stopping(start: int, stop: int) -> Iterator[Any]:
            for number, batch in enumerate(batches(start, stop), start):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        self.loader.batches = stopping
        return super().train()


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(line.removeprefix("$ "))
    if program != "mnclglf":
        subprocess.run([program, *words], check=True)
    elif words[-1] == "runs/photos":
        with monkeypatch.context() as patch:
            patch.setattr(loop, "Trainer", Stopped)
            assert main(words) == 128 + signal.SIGINT
        assert main([*words[:-1], "runs/straight"]) == 0  # the same run without a stop, on the images where they were
    else:
        code = 1 if words[0] == "data" else 0  # one file is damaged
        assert main([*words, "--epochs", "1"] if "20" in words else words) == code, line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Optuna, FAISS and what they import
def test_a_reader_follows_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photographs(Path("pictures"))
    names: dict[str, Any] = {}
    kinds: list[str] = []
    for kind, text in BLOCK.findall(PAGE):
        kinds.append(kind)
        if kind == "yaml":
            Path("photos.yaml").write_text(json.dumps({**YAML(typ="safe").load(text), **TINY}))
        elif kind == "python":
            for long, short in SHORT.items():
                text = text.replace(long, short)
            exec(compile(text, "the page", "exec"), names)
        for line in text.splitlines() if kind == "console" else []:
            run_line(line, monkeypatch)
    assert kinds == ["console"] * 2 + ["yaml"] + ["console"] * 6 + ["python", "console", "python", "console", "python"]
    printed = capsys.readouterr().out
    assert "PNG 21, JPEG 20, TIFF 1" in printed
    assert "on a card of 24 GB" in printed

    # The run that was stopped, moved and resumed ends as the one that was not.
    moved, straight = (mnclglf.load_encoder(run).state_dict() for run in ("moved/run", "runs/straight"))
    assert "resuming after step 6 of 8" in printed
    assert all(torch.equal(weights, straight[name]) for name, weights in moved.items())
    assert not Path("pictures").exists()

    assert "| warm | finished, 4 steps |" in printed
    both = Path("both.html").read_text()
    assert "objective.temperature" in both
    assert "6 validation images" in both
    trials = names["study"].trials
    assert [len(trial.params) for trial in trials] == [2, 2]
    assert all(1 <= trial.value <= 512 for trial in trials)

    assert set(names["losses"]) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert [set(found) for found in names["found"]] == [{"boxes", "labels", "scores"}] * 2
    assert names["rows"][:, 0].tolist() == [0, 1, 2]
    with Path("photos.npy.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(names["embeddings"]) == COUNT + 2
