"""What features say of themselves without labels: alignment, uniformity, effective rank, nearest neighbors.

Alignment and uniformity: Wang and Isola 2020 (equations 1 and 2, alpha 2, t 2). Effective rank: Roy and Vetterli 2007,
which Garrido et al. 2023 call RankMe; theirs adds 1e-7 to each share of a singular value.
"""

# n images, F feature width, k neighbors, q queries

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from mnclglf.config import QualityConfig, RunConfig, require
from mnclglf.data.images import ImageSet
from mnclglf.data.loader import Loader
from mnclglf.data.philox import SPLIT_STREAM, permutation
from mnclglf.data.splits import SPLIT_SEED
from mnclglf.data.views import whole_views
from mnclglf.evaluation.features import autocast, eval_mode, extract_features, gathered
from mnclglf.evaluation.images import EvalImages, load_images
from mnclglf.evaluation.knn import nearest_columns
from mnclglf.models.encoder import Encoder
from mnclglf.runs.console import LastingConsole, say
from mnclglf.runs.files import check_writable, read_config
from mnclglf.runs.quality import FeatureQuality, Tile, load_qualities, save_qualities
from mnclglf.training.health import effective_rank
from mnclglf.training.ranks import ALONE, Ranks
from mnclglf.training.start import (
    Machine,
    build_method,
    choose_backends,
    elsewhere,
    load_trained,
    longest_side,
    make_views,
    start_machine,
)

PAIR_BATCH = 256  # images whose two views go through the encoder at once
CHUNK_PAIRS = 2**25  # distances in memory at once: 128 MB in fp32
TILE_SIDE = 96  # largest side of a picture on the page, in pixels


class Judged(NamedTuple):
    """Result of `measure_quality`."""

    dataset: str
    """Name of the data set."""
    other: bool
    """True if it is not the run's own."""
    results: list[FeatureQuality]
    """Figures of the pretrained and of the untrained encoder."""
    tiles: list[list[Tile]]
    """One row per query: the query, then its neighbors, nearest first."""


def alignment(first: Tensor, second: Tensor) -> float:
    """Returns the mean squared distance between the unit vectors of rows [n, F] of positive pairs: 0 to 4."""
    return float((F.normalize(first.float()) - F.normalize(second.float())).square().sum(dim=1).double().mean())


def uniformity(features: Tensor) -> float:
    """Returns log of the mean of exp(-2 |x - y|^2) over all pairs of unit rows of [n, F]: -8 to 0.

    Raises:
        ValueError: there is no pair.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"{count} image has no pair; uniformity needs two images")
    rows = F.normalize(features.float())
    size = max(1, CHUNK_PAIRS // count)
    total = 0.0
    for start in range(0, count, size):
        chunk = rows[start : start + size]
        potential = (4 * (chunk @ rows.T) - 4).clamp_max(0).exp_()  # |x - y|^2 = 2 - 2 x y
        potential[torch.arange(len(chunk)), torch.arange(start, start + len(chunk))] = 0  # no image with itself
        total += float(potential.double().sum())
    return math.log(total / (count * (count - 1)))


def nearest_neighbors(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the rows and cosine similarities [q, k] of the rows of [n, F] nearest to each query row, itself left
    out; nearest first, equal ones by their row."""
    unit = F.normalize(features.float())
    similarities = unit[queries] @ unit.T
    similarities[torch.arange(len(queries)), queries] = -math.inf
    columns = nearest_columns(similarities, k).sort(dim=1).values
    found = similarities.gather(1, columns)
    order = found.argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), found.gather(1, order)


def measure_quality(run: Path, quality: QualityConfig, console: Console | None = None, ranks: Ranks = ALONE) -> Judged:
    """Judges a run's encoder without labels, beside the untrained one, and merges the figures into RUN/quality.json.

    Ranks share the work of the encoders; rank 0 judges and writes, and the others return no figures.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: a run, image set or checkpoint is missing or unusable; the
            message names the remedy.
    """
    console = console or LastingConsole()
    config, file = read_config(run), run / "quality.json"
    load_qualities(file)  # raises for a damaged file before any work is done
    check_writable(run, "make it writable, or copy the run to where you can write")
    engine = elsewhere(config.engine, quality.device)
    machine, config = start_machine(engine), replace(config, engine=engine)
    images = load_images(run, config, quality, console)
    chosen = chosen_images(images, quality.images)
    require(len(chosen) >= 2, f"{chosen.name} {chosen.split} holds {len(chosen)} image; two or more can be compared")
    if ranks.count > 1:
        ranks.require_equal("set of images", chosen.fingerprint(), "give every rank the same images (--data-dir)")
    loader = pair_loader(config, images, chosen, machine, console)
    _, method, step = load_trained(run, quality.checkpoint)
    ranks.require_equal("newest checkpoint", f"step {step}", "wait until the run is trained, or give --checkpoint")
    epoch = None if quality.checkpoint is None else step / images.steps_per_epoch
    results: list[FeatureQuality] = []
    tiles: list[list[Tile]] = []
    for name, encoder in (("pretrained", method.encoder), ("untrained", build_method(config, machine.dtype).encoder)):
        say(console, f"quality, {name}: {len(chosen):,} {chosen.split} images of {chosen.name}")
        features = features_of(encoder.to(machine.device), chosen, images, machine, ranks)
        pairs = pair_features(encoder, loader, machine, ranks)
        if not ranks.writes:
            continue
        if not features.isfinite().all():
            raise ValueError(f"the features of the {name} encoder hold NaN or infinity: the encoder is broken")
        results.append(
            FeatureQuality(
                representation=name,
                dataset=images.dataset,
                split=chosen.split,
                images=len(chosen),
                step=step,
                epoch=epoch,
                alignment=alignment(*pairs),
                uniformity=uniformity(features.to(machine.device)),
                effective_rank=effective_rank(features.to(machine.device)),
                features=features.shape[1],
            )
        )
        if name == "pretrained":
            tiles = neighbor_tiles(features, chosen, quality)
    if ranks.writes:
        save_qualities(file, results)
    return Judged(images.dataset or config.dataset, images.dataset is not None, results, tiles)


def chosen_images(images: EvalImages, most: int) -> ImageSet:
    """Returns the test images, else those that the run held out, else the training images: at most `most`, always the
    same ones."""
    held_out = images.validation if images.test is None else images.test
    whole = images.train if held_out is None or len(held_out) == 0 else held_out
    if len(whole) <= most:
        return whole
    order = permutation(len(whole), seed=SPLIT_SEED, stream=SPLIT_STREAM, epoch=3)  # other choices take epochs 0 to 2
    return whole.subset(np.sort(order[:most]))


def pair_loader(config: RunConfig, images: EvalImages, chosen: ImageSet, machine: Machine, console: Console) -> Loader:
    """Returns a loader of two random views per image, drawn as in the run's training."""

    def make(config: RunConfig) -> Loader:
        backends = choose_backends(config, longest_side(chosen), images.side, machine, console, operators=["augment"])
        return make_views(
            config,
            chosen,
            config.view,
            machine,
            views=2,
            side=images.side,
            batch_size=min(PAIR_BATCH, len(chosen)),
            augment_backend=backends.augment,
            statistics=images.statistics,
        )

    try:
        return make(config)
    except ImportError as error:  # the run was trained with DALI, which this machine lacks
        say(console, f"the run's loader cannot be made here; falling back to --loader auto: {error}")
        return make(replace(config, data=replace(config.data, loader="auto")))


def features_of(
    encoder: Encoder, chosen: ImageSet, images: EvalImages, machine: Machine, ranks: Ranks = ALONE
) -> Tensor:
    """Returns features [n, F] of whole images, on the CPU; an empty tensor on other ranks than 0."""
    mean, std = images.statistics
    return extract_features(
        encoder,
        chosen,
        side=images.side,
        mean=mean,
        std=std,
        dtype=machine.dtype,
        device=machine.device,
        ranks=ranks,
    )


def pair_features(encoder: Encoder, loader: Loader, machine: Machine, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Returns features [n, F] of two views of each image, without those of an incomplete last batch, on the CPU.

    Each rank takes some batches that follow each other; rank 0 gets all features, the others empty tensors.
    """
    steps, rank, count = loader.steps_per_epoch, ranks.rank, ranks.count
    firsts, seconds = ([torch.empty(0, encoder.features)] for _ in range(2))
    with eval_mode(encoder), torch.inference_mode(), autocast(machine.device, machine.dtype):
        for batch in loader.batches(steps * rank // count, steps * (rank + 1) // count):
            first, second = encoder(batch.views).float().cpu().chunk(2)
            firsts.append(first)
            seconds.append(second)
    first, second = (torch.cat(gathered(torch.cat(views), ranks)) for views in (firsts, seconds))
    return first, second


def neighbor_tiles(features: Tensor, images: ImageSet, quality: QualityConfig) -> list[list[Tile]]:
    """Returns the pictures of some queries, spread over the images, and of their nearest neighbors."""
    count = len(images)
    queries = torch.from_numpy(np.unique(np.linspace(0, count - 1, quality.queries).round().astype(np.int64)))
    rows, similarities = nearest_neighbors(features, queries, min(quality.neighbors, count - 1))
    return [
        [tile(images, int(query), None), *(tile(images, row, s) for row, s in zip(near, like, strict=True))]
        for query, near, like in zip(queries, rows.tolist(), similarities.tolist(), strict=True)
    ]


def tile(images: ImageSet, row: int, similarity: float | None) -> Tile:
    """Returns the picture of an image; a large one at the size of the page, cropped to a square as the encoder's."""
    pixels = images.pixels(row)
    if max(pixels.shape[:2]) > TILE_SIDE:
        zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
        view = whole_views([pixels], TILE_SIDE, zero, one, torch.float32)[0]
        pixels = (view.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    (name,) = images.names(np.array([row]))
    return Tile(pixels, str(name), images.classes[images.labels[row]] if images.labeled else None, similarity)
