"""What each rank runs in the tests of evaluations over ranks; the same functions run in one process."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from embedding import small_embedder
from rich.console import Console
from torch import Tensor

from mnclglf.config import (
    DataConfig,
    EngineConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    ModelConfig,
    OptimConfig,
    QualityConfig,
    RunConfig,
)
from mnclglf.data.errors import DataError
from mnclglf.data.listing import list_source
from mnclglf.data.loader import Batch
from mnclglf.evaluation import embed, features
from mnclglf.evaluation.embed import embed_source
from mnclglf.evaluation.linear import train_linear
from mnclglf.evaluation.monitor import KnnMonitor
from mnclglf.evaluation.quality import measure_quality
from mnclglf.evaluation.run import evaluate_run
from mnclglf.models.encoder import ResNet
from mnclglf.recipes import view_of
from mnclglf.runs.results import Result
from mnclglf.training.loop import Trainer
from mnclglf.training.ranks import ALONE, Ranks

CONFIG = RunConfig(
    method="simsiam",
    dataset="digits",
    view=view_of("quick", "digits"),
    data=DataConfig(image_size=8, train_images=320),
    model=ModelConfig(width=2, projector_width=8, predictor_width=8),
    optim=OptimConfig(epochs=1, batch_size=64),
    engine=EngineConfig(device="cpu", precision="fp32", knn_every=1),
)
BATCH = 50  # images per forward: the 320 training images are six batches and a short one, the 360 test images eight
EXACT = [KnnConfig(device="cpu"), LogisticConfig(device="cpu", label_share=0.5, raw_pixels=False)]
LINEAR = LinearConfig(steps=10, batch_size=64, device="cpu", untrained=True)
QUALITY = QualityConfig(images=300, queries=3, neighbors=4, device="cpu")  # one batch of 256 pairs
EMBEDDED = 4  # images per batch in `embed_folder`


def here() -> Ranks:
    """Returns the place of this process."""
    return Ranks(rank=dist.get_rank(), count=dist.get_world_size()) if dist.is_initialized() else ALONE


def silent() -> Console:
    return Console(file=io.StringIO(), width=1000)


@contextmanager
def small_batches() -> Generator[None]:
    """Context in which few images make several batches."""
    defaults: Any = features.extract_features.__kwdefaults__
    before = defaults["batch_size"], embed.MOST_IMAGES
    defaults["batch_size"], embed.MOST_IMAGES = BATCH, EMBEDDED
    try:
        yield
    finally:
        defaults["batch_size"], embed.MOST_IMAGES = before


@small_batches()
def evaluate_all(run: Path) -> tuple[list[list[Result]], list[list[Result]]]:
    """Returns the results of the EXACT evaluations, and those of LINEAR; writes the figures of QUALITY into the run."""
    ranks = here()
    exact = [evaluate_run(run, evaluation, silent(), ranks=ranks) for evaluation in EXACT]
    linear = evaluate_run(run, LINEAR, silent(), ranks=ranks)
    measure_quality(run, QUALITY, silent(), ranks)
    return exact, [linear]


@small_batches()
def train_with_knn(out: Path) -> list[dict[str, float]]:
    """Trains a run; returns the figures of its k-NN evaluations on this rank."""
    found: list[dict[str, float]] = []

    class Recorded(KnnMonitor):
        def __call__(self, encoder: Any) -> dict[str, float]:
            found.append(super().__call__(encoder))
            return found[-1]

    Trainer(CONFIG, out, console=silent(), monitor=Recorded, ranks=here()).train()
    return found


@small_batches()
def embed_folder(root: Path, out: Path, *, skip_corrupt: bool = True, stop_after: int | None = None) -> str:
    """Embeds a folder; returns the signal that stopped it or the error, and what was printed.

    Args:
        root: folder of the images.
        out: file of the embeddings.
        skip_corrupt: as of embed_source.
        stop_after: number of images after which the last rank, or the one process, gets SIGTERM.
    """
    ranks, console, advance = here(), silent(), embed.Meter.advance

    def counted(self: embed.Meter, done: int) -> None:
        advance(self, done)
        if done == stop_after and ranks.rank == ranks.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    embed.Meter.advance = counted
    source = f"folder:{root}"
    console.quiet = not ranks.writes
    try:
        ended = embed_source(
            small_embedder(), list_source(source), source, out, skip_corrupt=skip_corrupt, console=console, ranks=ranks
        )
    except DataError as error:
        ended = error
    finally:
        embed.Meter.advance = advance
    assert isinstance(console.file, io.StringIO)
    return f"{ended}\n{console.file.getvalue()}"


def train_linear_layer() -> Tensor:
    """Returns the weights of a linear layer after some steps on the features of an encoder in fp64."""
    ranks = here()
    torch.manual_seed(3)
    encoder = ResNet(width=2, stem="cifar").double()
    images = torch.rand(24, 3, 8, 8, dtype=torch.float64)
    labels = torch.arange(24) % 3

    class Batches:
        def batches(self, start: int, stop: int) -> Iterator[Batch]:
            for step in range(start, stop):
                own = torch.tensor([*range(24)]).roll(step)[ranks.rank * 24 // ranks.count :][: 24 // ranks.count]
                yield Batch(images[own], own)

    config = LinearConfig(steps=5, batch_size=24)
    common: Any = dict(classes=3, steps_per_epoch=1, dtype=torch.float32, seed=0, say=lambda line: None, ranks=ranks)
    return train_linear(encoder, cast("Any", Batches()), labels, config, **common).weight.detach()


def all_in_turn(calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Calls functions of this module by their names and arguments; returns their results."""
    return [globals()[name](**arguments) for name, arguments in calls]
