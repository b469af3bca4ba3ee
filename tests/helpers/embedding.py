"""A small encoder and folders of images, for tests of embed and search."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from mnclglf.data.listing import list_source
from mnclglf.evaluation import embed
from mnclglf.evaluation.embed import Embedder, embed_source
from mnclglf.models.encoder import ResNet

SIDE = 16
MEAN, STD = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.3], np.float32)


def small_embedder(seed: int = 0) -> Embedder:
    """Returns an encoder of random weights for images of 16 x 16, in fp32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ResNet(width=4, stem="cifar").eval()
    return Embedder(
        encoder=encoder,
        run=Path("runs/x"),
        mean=MEAN,
        std=STD,
        side=SIDE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def folder_of(root: Path, count: int, classes: int = 2) -> Path:
    """Writes images 0 .. count - 1 as PNG in class folders of the same size, in the order of their names."""
    for number in range(count):
        path = root / f"class{number * classes // count}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(number)).save(path)
    return root


def embed_folder(root: Path, out: Path, *, seed: int = 0, skip_corrupt: bool = False) -> tuple[int | None, str]:
    """Embeds a folder; returns the signal that stopped it, and what was printed."""
    text = io.StringIO()
    name = f"folder:{root}"
    stopped = embed_source(
        small_embedder(seed), list_source(name), name, out, skip_corrupt=skip_corrupt,
        console=Console(file=text, width=200),
    )  # fmt: skip
    return stopped, text.getvalue()


def killed_after(root: Path, out: Path, images: int) -> None:
    """Embeds a folder in batches of 4, and kills its own process (signal 9) when `images` are done."""
    import os
    import signal

    from mnclglf.evaluation import embedding_file

    torch.set_num_threads(1)
    embed.MOST_IMAGES, embedding_file.SAVE_SECONDS = 4, 0.0

    def advance(self: embed.Meter, done: int) -> None:
        if done >= images:
            os.kill(os.getpid(), signal.SIGKILL)

    embed.Meter.advance = advance
    embed_folder(root, out)
