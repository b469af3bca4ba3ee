"""The commands that are attacked, in a folder that holds all that they read and write."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bench.faults import children
from bench.faults.contents import contents_of

TRAIN = [
    *("train", "--method", "nnclr", "--dataset", "digits", "--recipe", "quick", "--epochs", "3"),
    *("--train-images", "64", "--batch-size", "16", "--width", "2", "--projector-width", "16"),
    *("--predictor-width", "16", "--queue-size", "128", "--device", "cpu", "--precision", "fp32"),
    *("--log-every", "2", "--save-every", "0.5", "--loggers"),
]


class Attacked(NamedTuple):
    """A command, and what it leaves when it is not disturbed."""

    name: str
    arguments: list[str]
    before: Path
    """The folder before it; missing for an empty one."""
    true: dict[str, object]
    """What the files of the folder hold after it."""
    seconds: float


class Place:
    """A folder in which commands run; `work` is made anew for every attack, always by the same name.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.log = folder, folder / "work", folder / "log"
        run = self.work / "run"
        self.train = [*TRAIN, "--out", str(run)]
        self.others = {
            "report": ["report", str(run)],
            "knn": ["knn", str(run), "--device", "cpu"],
            "linear": ["linear", str(run), "--device", "cpu", "--epochs", "1"],
            "logistic": ["logistic", str(run), "--device", "cpu"],
            "export": ["export", str(run), "--formats", "safetensors"],
            "embed": ["embed", str(run), f"folder:{folder / 'images'}", "--device", "cpu"],
            "pack": ["data", "pack", f"folder:{folder / 'images'}", str(self.work / "pack"), "--images-per-shard", "5"],
            "unpack": ["data", "inspect", f"parquet:{folder / 'images.parquet'}", "--out", str(self.work / "seen.png")],
        }
        make_images(folder / "images")
        make_parquet(folder / "images", folder / "images.parquet")
        os.environ["XDG_CACHE_HOME"] = str(self.work / "cache")
        children.prepare(self.train, *self.others.values())

    def command(self, name: str) -> list[str]:
        """Returns the arguments of a command by its name."""
        return self.train if name == "train" else self.others[name]

    def begin(self, before: Path) -> None:
        """Makes `work` as it is in `before`, or empty if there is no such folder."""
        self.work.mkdir(exist_ok=True)
        for path in self.work.iterdir():  # not the folder, which may be a mount
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if before.exists():
            shutil.copytree(before, self.work, dirs_exist_ok=True)

    def run(self, name: str, hook: Callable[[], object] = lambda: None) -> children.End:
        """Runs a command in a child."""
        return children.run(self.command(name), self.log, hook)

    def trained(self) -> Path:
        """Returns a folder with the finished run."""
        saved = self.folder / "trained"
        if not saved.exists():
            self.begin(saved)
            self.succeed("train")
            self.work.rename(saved)
        return saved

    def half_trained(self) -> Path:
        """Returns a folder with a run that was stopped in its middle."""
        saved = self.folder / "half"
        if not saved.exists():
            self.begin(self.trained())
            kept = sorted((self.work / "run" / "checkpoints").glob("step-*.pt"))
            kept[-1].unlink()
            self.work.rename(saved)
        return saved

    def undisturbed(self, name: str) -> Attacked:
        """Runs a command without an attack."""
        before = self.folder / "empty" if name in ("train", "pack", "unpack") else self.trained()
        self.begin(before)
        began = time.monotonic()
        self.succeed(name)
        return Attacked(name, self.command(name), before, contents_of(self.work), time.monotonic() - began)

    def succeed(self, name: str) -> None:
        """Runs a command that must succeed; raises RuntimeError with what it printed."""
        end = self.run(name)
        if end.code != 0:
            raise RuntimeError(f"{name} ended with {end.code}, undisturbed:\n{end.text}")


def make_images(folder: Path) -> None:
    """Writes 12 small images of two classes."""
    draw = np.random.default_rng(0)
    for number in range(12):
        path = folder / f"class-{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def make_parquet(images: Path, out: Path) -> None:
    """Writes the images of a folder as the Hugging Face hub stores them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(images.rglob("*.png"))
    kind: Any = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in files], kind)
    labels = pa.array([int(path.parent.name[-1]) for path in files])
    pq.write_table(pa.table({"image": column, "label": labels}), out)
