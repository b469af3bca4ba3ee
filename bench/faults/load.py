"""Takes many steps and many batches, and tells whether memory, handles, threads and shared memory grow.

    python -m bench.faults.load --steps 20000 --batches 20000

Each subject runs in a process of its own: a training that logs and saves, and each loader that runs on a CPU. The
first tenth is the warm-up. "flat" is a count whose lowest of the last tenth is no higher than that of the second one,
and memory that grows by less than GROWTH_BYTES, from the mean of the second tenth to that of the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

SAMPLES = 40
GROWTH_BYTES = 2 << 20  # less than 120 bytes per step or batch of 18,000; the allocator's noise is 1 MiB
COUNTS = ("descriptors", "threads", "children", "shared")
SUBJECTS = ("training", "resident", "dali", "dali of files", "reference")
OPTIONS = [
    *("--method", "mocov2", "--recipe", "quick", "--image-size", "8", "--batch-size", "8", "--width", "2"),
    *("--projector-width", "8", "--queue-size", "64", "--device", "cpu", "--precision", "fp32"),
    *("--loader-threads", "1", "--train-images", "64", "--log-every", "10", "--keep-last", "2"),
]


@dataclass(frozen=True)
class Sample:
    """What a process holds."""

    resident_bytes: int
    descriptors: int
    threads: int
    children: int
    shared: int
    """Entries of /dev/shm."""


def sample() -> Sample:
    """Returns what this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return Sample(
        resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        children=sum(map(len, children)),
        shared=len(os.listdir("/dev/shm")),
    )


def run(subject: str, count: int, folder: Path) -> list[Sample]:
    """Takes `count` steps or batches of a subject in this process; returns a sample of each SAMPLES-th part of them."""
    from mnclglf.cli import parse
    from mnclglf.commands import Train
    from mnclglf.models.encoder import RESNETS, Block
    from mnclglf.training.loop import Trainer

    dataset, loader, epochs = "digits", subject, "1"
    if subject == "training":
        loader, epochs = "resident", str(count // 8)  # 64 images are 8 steps per epoch
    elif subject == "dali of files":
        dataset, loader = f"folder:{write_images(folder / 'images')}", "dali"
    save = ("--save-every", str(max(1, count // 8 // SAMPLES)))
    command = parse(["train", *OPTIONS, "--dataset", dataset, "--loader", loader, "--epochs", epochs, *save])
    assert isinstance(command, Train)
    samples: list[Sample] = []
    # One block per stage in place of two: a step takes half as long, and holds the same kinds of things.
    with (folder / "log").open("w") as log, patch.dict(RESNETS, resnet18=(Block, (1, 1, 1, 1))):
        trainer = Trainer(command.config, folder / "run", console=Console(file=log))
        batches = trainer.loader.batches

        def sampled(start: int, stop: int) -> Iterator[object]:
            for number, batch in enumerate(batches(start, stop), start=1):
                if number % (count // SAMPLES) == 0:
                    samples.append(sample())
                yield batch

        if subject == "training":
            trainer.loader.batches = sampled  # pyright: ignore[reportAttributeAccessIssue]
            with redirect_stdout(log):
                trainer.train()
        else:
            for _ in sampled(0, count):
                pass
    return samples


def write_images(folder: Path) -> Path:
    """Writes the digits as a folder of 80 PNG files in two classes, and returns it."""
    from PIL import Image
    from sklearn.datasets import load_digits

    for number, pixels in enumerate(load_digits().images[:80]):  # pyright: ignore[reportAttributeAccessIssue]
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * pixels).astype("uint8")).convert("RGB").save(path)
    return folder


def growth(samples: list[Sample]) -> dict[str, int]:
    """Returns by how much each figure grew after the warm-up."""
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    # The lowest: the thread that writes a checkpoint comes and goes.
    found = {name: min(getattr(s, name) for s in late) - min(getattr(s, name) for s in early) for name in COUNTS}
    bytes_ = (statistics.fmean(s.resident_bytes for s in part) for part in (late, early))
    return {"resident_bytes": round(next(bytes_) - next(bytes_)), **found}


def is_flat(grown: dict[str, int]) -> bool:
    """Returns whether nothing grew."""
    return grown["resident_bytes"] < GROWTH_BYTES and all(grown[name] <= 0 for name in COUNTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument(
        "--here", metavar="SUBJECT", choices=SUBJECTS, help="run one here and print its samples as JSON"
    )
    arguments = parser.parse_args()
    counts = {subject: arguments.steps if subject == "training" else arguments.batches for subject in SUBJECTS}
    if arguments.here:
        with tempfile.TemporaryDirectory() as folder:
            samples = run(arguments.here, counts[arguments.here], Path(folder))
        print(json.dumps([asdict(s) for s in samples]))
        return 0
    print("| subject | number | s | RSS, MiB | grown by, MiB | descriptors | threads | children | /dev/shm | verdict |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    all_flat = True
    for subject in arguments.subjects:
        began = time.perf_counter()
        command = [sys.executable, "-m", "bench.faults.load", "--here", subject]
        command += ["--steps", str(arguments.steps), "--batches", str(arguments.batches)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        samples = [Sample(**values) for values in json.loads(done.stdout.splitlines()[-1])]
        grown, last = growth(samples), samples[-1]
        all_flat &= is_flat(grown)
        counted = [f"{getattr(last, name)} ({grown[name]:+})" for name in COUNTS]
        sizes = [f"{last.resident_bytes / 2**20:.0f}", f"{grown['resident_bytes'] / 2**20:+.2f}"]
        cells = [subject, f"{counts[subject]:,}", f"{time.perf_counter() - began:.0f}", *sizes, *counted]
        print(f"| {' | '.join(cells)} | {'flat' if is_flat(grown) else 'GROWS'} |", flush=True)
    return 0 if all_flat else 1


if __name__ == "__main__":
    raise SystemExit(main())
