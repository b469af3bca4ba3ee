"""Compares the batches per second of a loader on shards, Parquet files and a folder of the same images, in turns.

    python -m bench.shards

Each round checks that the batches of all are equal, bit for bit. A ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mnclglf.config import LoaderName
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet
from mnclglf.data.loader import Batch
from mnclglf.data.loaders import make_loader
from mnclglf.data.pack import Limit, pack
from mnclglf.recipes import VIEWS

SIDE, BATCH, WARM_UP = 32, 256, 2
PER_FILE = 1000  # images of a shard or a Parquet file
COUNTS: tuple[tuple[LoaderName, int], ...] = (("dali", 30), ("reference", 3))  # batches that are timed


def batches(images: ImageSet, backend: LoaderName, count: int) -> tuple[list[Batch], float]:
    """Returns the first batches of an epoch, and how many were made per second after the first few."""
    loader = make_loader(
        images, VIEWS["paper"], backend=backend, views=2, side=SIDE, batch_size=BATCH, seed=0, dtype=torch.float32,
        device=torch.device("cpu"), threads=2,
    )  # fmt: skip
    made, since = list[Batch](), 0.0
    for batch in loader.batches(0, WARM_UP + count):
        made.append(batch)
        if len(made) == WARM_UP:
            since = time.perf_counter()
    return made, count / (time.perf_counter() - since)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "photos"
        files.mkdir()
        coarse = np.random.default_rng(0).integers(0, 256, (arguments.images, 6, 6, 3), dtype=np.uint8)
        for number, pixels in enumerate(coarse):
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(files / f"{number:06}.jpg", quality=90)
        folder, _ = load_dataset(f"folder:{files}")
        pack((folder, None), Path(place) / "shards", Limit(images=PER_FILE))
        packed = {"shards": load_dataset(f"shards:{place}/shards")[0]}
        write_parquet(sorted(files.iterdir()), Path(place) / "hub")
        packed["parquet"] = load_dataset(f"parquet:{place}/hub")[0]
        for backend, count in COUNTS:
            rates: list[dict[str, float]] = []
            for _ in range(arguments.rounds):
                expected, folder_rate = batches(folder, backend, count)
                rates.append({"folder": folder_rate})
                for name, images in packed.items():
                    made, rates[-1][name] = batches(images, backend, count)
                    assert all(torch.equal(a.views, b.views) for a, b in zip(made, expected, strict=True))
            for name in packed:
                ours, theirs = (statistics.median(rate[which] for rate in rates) for which in (name, "folder"))
                ratio = statistics.median(rate[name] / rate["folder"] for rate in rates)
                print(f"{backend}: {name} {ours:.2f} batches/s, folder {theirs:.2f}, ratio {ratio:.2f}; equal batches")


def write_parquet(files: Sequence[Path], folder: Path) -> None:
    """Writes the contents of image files into Parquet files, as the Hugging Face hub stores them."""
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, start in enumerate(range(0, len(files), PER_FILE)):
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files[start : start + PER_FILE]]
        table = pa.table({"image": pa.array(rows, kind)})
        pq.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=100)


if __name__ == "__main__":
    main()
