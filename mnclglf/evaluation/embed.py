"""Embeddings of all images of a source, into one file: read ahead, in batches, resumable."""

# n images, F feature width, S side of a view

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

from mnclglf.config import UsageError, require, shown
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.listing import Listing
from mnclglf.data.sources.examination import DRAWN
from mnclglf.data.views import whole_views
from mnclglf.evaluation.embedding_file import EmbeddingFile, Origin, beside, check_out, is_whole
from mnclglf.evaluation.features import autocast
from mnclglf.models.encoder import Encoder
from mnclglf.runs.console import say
from mnclglf.runs.files import check_writable, clear_left_over
from mnclglf.runs.locks import TakenError, held
from mnclglf.training.progress import PLAIN_LINE_SECONDS, duration
from mnclglf.training.ranks import ALONE, Ranks
from mnclglf.training.stop import StopRequest

MOST_IMAGES, MOST_PIXELS = 512, 2**24  # of a batch: its views take 200 MB in fp32 at most


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A frozen encoder on its device, and how images are prepared for it."""

    encoder: Encoder
    """In evaluation mode."""
    run: Path
    mean: NDArray[np.float32]
    """[3]"""
    std: NDArray[np.float32]
    """[3]"""
    side: int
    """Side S of a view in pixels."""
    dtype: torch.dtype
    """Autocast dtype."""
    device: torch.device

    @property
    def batch_images(self) -> int:
        """Returns the images per batch; it depends on the side alone, as the last bits of a row depend on its batch."""
        return max(1, min(MOST_IMAGES, MOST_PIXELS // self.side**2))

    def view(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Returns an image uint8 [H, W, 3] as the encoder takes it, [1, 3, S, S] on the CPU."""
        return whole_views([pixels], self.side, self.mean, self.std, self.dtype)

    def embed(self, views: list[Tensor]) -> NDArray[np.float32]:
        """Returns the features [n, F] of n views.

        Raises:
            ValueError: a feature is not finite.
        """
        if not views:
            return np.empty((0, self.encoder.features), np.float32)
        batch = torch.cat(views).contiguous(memory_format=torch.channels_last).to(self.device)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            features = self.encoder(batch).float().cpu()
        if not features.isfinite().all():
            raise ValueError(f"features hold NaN or infinity: the encoder of {self.run} is broken; take another run")
        return features.numpy()

    def fingerprint(self) -> str:
        """Returns a hash of the weights and of all else that the features depend on."""
        made = hashlib.sha256(repr((self.side, str(self.dtype), self.device.type, self.batch_images)).encode())
        made.update(self.mean.tobytes() + self.std.tobytes())
        for name, value in sorted(self.encoder.state_dict().items()):
            made.update(name.encode() + value.cpu().numpy().tobytes())
        return made.hexdigest()


class Prepared(NamedTuple):
    """One image, ready for the encoder or not usable."""

    identity: bytes
    view: Tensor | None
    problem: str


class Part(NamedTuple):
    """What one rank made of a batch."""

    images: int
    identities: bytes
    """Those of the images, joined."""
    problems: list[tuple[int, str]]
    """Number in the batch and problem of each image without a row."""
    rows: NDArray[np.float32]
    """[n, F]"""


def embed_source(
    embedder: Embedder,
    listing: Listing,
    source: str,
    out: Path,
    *,
    skip_corrupt: bool,
    console: Console,
    ranks: Ranks = ALONE,
) -> int | None:
    """Embeds all images of a source into a file; goes on where an earlier call stopped.

    Images that cannot be used have no row. Ranks take the batches in turn; rank 0 writes the file, which is that of one
    process, to the byte.

    Args:
        embedder: the encoder.
        listing: the images.
        source: name of the images' source.
        out: file of the embeddings, .npy, .parquet or .npz.
        skip_corrupt: leave out images that cannot be used; else the first one is an error.
        console: console for progress.
        ranks: the processes that share the work, which all see the images.

    Returns:
        None; the number of the signal that stopped it, after which the same call goes on.

    Raises:
        UsageError: `out` is a file of something else.
        DataError: an image cannot be used, or none can.
        TakenError: another process writes the file.
    """
    check_out(out)
    encoder = embedder.fingerprint()
    if ranks.count > 1:
        ranks.require_equal("encoder", encoder, "wait until the run is trained, or give --checkpoint")
        ranks.require_equal("list of images", digest_of_names(listing), "give every rank the same images")
    with ExitStack() as locked:

        def begin() -> bytes:
            check_writable(out.parent, "make it writable, or choose another --out")
            out.parent.mkdir(parents=True, exist_ok=True)
            if not locked.enter_context(held(out.with_name(f".{out.name}.lock"))):
                raise TakenError(f"{out} is being written by another process; wait for it, or choose another --out")
            clear_left_over(out.parent, [out.name, *(beside(out, end).name for end in ("json", "csv", "partial.json"))])
            start = Origin(
                encoder=encoder,
                run=str(embedder.run),
                source=shown(source),
                features=embedder.encoder.features,
                fingerprint=listing.digest(()).hexdigest(),
            )
            whole = finished(out, start, listing, console)
            if whole is not None:
                for end in ("partial", "partial.json"):  # of a process that was killed before it removed them
                    beside(out, end).unlink(missing_ok=True)
            origin = whole or resumed(out, start, listing, console)
            refuse_corrupt(origin.left_out, skip_corrupt)
            return json.dumps({"whole": whole is not None, "origin": asdict(origin)}).encode()

        begun = json.loads(ranks.from_first(begin))
        origin = Origin.of(begun["origin"])
        if begun["whole"]:
            say(console, f"{out} is up to date: {origin.rows:,} rows of {origin.features} features")
            return None
        with EmbeddingFile(out, origin) if ranks.writes else nullcontext() as file, StopRequest() as stop:
            origin, stopped = fill(
                file, origin, embedder, listing, skip_corrupt=skip_corrupt, console=console, stop=stop, ranks=ranks
            )
            if stopped is not None and origin.images < len(listing):
                say(console, f"stopped after {origin.images:,} of {len(listing):,} images; the same command goes on")
                return stopped
            if file is not None:
                file.finish(listing)
    left = len(origin.left_out)
    told = f"; {left:,} images that cannot be used have no row" * (left > 0)
    say(console, f"{out}: {origin.rows:,} rows of {origin.features} features{told}")
    return None


def digest_of_names(listing: Listing) -> str:
    """Returns a hash of the names of all images, in their order."""
    made = hashlib.sha256()
    for name in listing.names:
        made.update(f"{name}\0".encode(errors="surrogateescape"))
    return made.hexdigest()


def fill(
    file: EmbeddingFile | None,
    origin: Origin,
    embedder: Embedder,
    listing: Listing,
    *,
    skip_corrupt: bool,
    console: Console,
    stop: StopRequest,
    ranks: Ranks,
) -> tuple[Origin, int | None]:
    """Embeds the images that the file lacks, until all are there or a signal asks one of the ranks to stop.

    Returns:
        What the file now holds, and the number of the signal, on every rank.
    """
    digest = listing.digest(() if file is None else range(origin.images))

    def prepare(row: int) -> Prepared:
        identity = listing.identity(row)  # before the image is read: what replaces it then is noticed
        try:
            return Prepared(identity, embedder.view(listing.pixels(row)), "")
        except UnreachableError:  # which says nothing about the image
            raise
        except DataError as error:
            return Prepared(identity, None, str(error))

    stopped: int | None = None
    try:
        with Meter(console, origin.images, len(listing)) as meter:
            for batch in read_ahead(prepare, ranks.batches(origin.images, len(listing), embedder.batch_images)):
                problems = [(at, one.problem) for at, one in enumerate(batch) if one.view is None]
                rows = embedder.embed([one.view for one in batch if one.view is not None])
                own = Part(len(batch), b"".join(one.identity for one in batch), problems, rows)
                for part in of_all_ranks(own, ranks):
                    bad = tuple((origin.images + at, problem) for at, problem in part.problems)
                    refuse_corrupt(bad, skip_corrupt)
                    digest.update(part.identities)
                    origin = replace(
                        origin,
                        images=origin.images + part.images,
                        fingerprint=digest.hexdigest(),
                        left_out=origin.left_out + bad,
                    )
                    if file is not None:
                        file.append(part.rows, origin)
                meter.advance(origin.images)
                stopped = signal_of_all(stop, ranks)
                if stopped is not None:
                    break
    finally:
        if file is not None:
            file.save()
    if origin.images == len(listing) and not origin.rows:
        raise DataError(f"{origin.source} has no image that can be used; the first: {origin.left_out[0][1]}")
    return origin, stopped


def of_all_ranks(own: Part, ranks: Ranks) -> list[Part]:
    """Returns the parts of all ranks, in the order of ranks."""
    if ranks.count == 1:
        return [own]
    told = ranks.exchange(json.dumps([own.images, own.problems]).encode())
    identities, rows = ranks.exchange(own.identities), ranks.exchange(own.rows.tobytes())
    parts: list[Part] = []
    for counted, identity, row_bytes in zip(told, identities, rows, strict=True):
        images, problems = json.loads(counted)
        made = np.frombuffer(row_bytes, np.float32).reshape(-1, own.rows.shape[1])
        parts.append(Part(images, identity, [(at, problem) for at, problem in problems], made))
    return parts


def signal_of_all(stop: StopRequest, ranks: Ranks) -> int | None:
    """Returns the signal that asked one of the ranks to stop, the same on all."""
    told = ranks.exchange(str(stop.signal or "").encode())
    return next((int(number) for number in told if number), None)


def read_ahead(prepare: Callable[[int], Prepared], batches: Sequence[range]) -> Iterator[list[Prepared]]:
    """Yields batches of images; threads prepare the next batch while one is used.

    A batch is emptied when the next one is asked for.
    """
    threads = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without the GIL
    ahead: deque[list[Future[Prepared]]] = deque()

    def begin(number: int) -> None:
        if number < len(batches):
            ahead.append([threads.submit(prepare, row) for row in batches[number]])

    try:
        begin(0)
        for number in range(len(batches)):
            begin(number + 1)
            batch = [future.result() for future in ahead.popleft()]
            yield batch
            batch.clear()  # the consumer still names it while the batch after the next one is begun
    finally:
        threads.shutdown(cancel_futures=True)


def refuse_corrupt(left_out: Sequence[tuple[int, str]], skip_corrupt: bool) -> None:
    """Raises DataError for images that were left out as corrupt unless that is allowed; not for pictures of ours."""
    corrupt = [problem for _, problem in left_out if not problem.endswith(DRAWN)]
    if corrupt and not skip_corrupt:
        raise DataError(
            f"{'; '.join(corrupt[:5])}{'; ...' if len(corrupt) > 5 else ''}. Repair or remove them, or leave them out "
            "with --skip-corrupt; the same command then goes on from here"
        )


def finished(out: Path, asked: Origin, listing: Listing, console: Console) -> Origin | None:
    """Returns what `out` holds if that is what is asked for; None if it has to be made.

    Raises:
        UsageError: there is a file that holds something else.
    """
    if not out.exists():
        return None
    origin = Origin.read(beside(out, "json"))
    begun = EmbeddingFile.begun(out)
    if begun is not None and origin is not None and begun == origin:
        return None  # a process was killed while it put the file in its place
    if origin is None:
        raise UsageError(
            f"{out} is there, and no {beside(out, 'json').name} says what it is made of; remove it, or choose another "
            "--out"
        )
    same_images = (
        origin.images == len(listing) and origin.fingerprint == listing.digest(range(len(listing))).hexdigest()
    )
    if same_images and origin.encoder == asked.encoder:
        if is_whole(out, origin):
            return origin
        say(console, f"{out} is made anew: it is cut or damaged")
        return None
    require(
        same_images or origin.source == asked.source,
        f"{out} holds the embeddings of {origin.source}, not of {asked.source}; choose another --out, or remove it",
    )
    changed = "the images have changed" if not same_images else f"the encoder is not that of {origin.run} then"
    say(console, f"{out} is made anew: {changed}")
    return None


def resumed(out: Path, asked: Origin, listing: Listing, console: Console) -> Origin:
    """Returns what the partial file beside `out` holds, if its images are the first of those asked for."""
    begun = EmbeddingFile.begun(out)
    if begun is None or not begun.images:
        return asked
    if begun.encoder != asked.encoder:
        problem = "by another encoder or on another device"
    elif begun.images > len(listing) or begun.fingerprint != listing.digest(range(begun.images)).hexdigest():
        problem = f"of other images ({begun.source})"
    else:
        say(console, f"going on after {begun.images:,} of {len(listing):,} images")
        return replace(begun, run=asked.run, source=asked.source)
    say(console, f"starting anew: {beside(out, 'partial')} was made {problem}")
    return asked


class Meter:
    """Shows progress: a bar on a terminal, a line every ten seconds elsewhere; a context manager.

    Args:
        console: where.
        start: images done before.
        total: images in all.
    """

    def __init__(self, console: Console, start: int, total: int) -> None:
        self.console, self.start, self.total = console, start, total
        self.started = self.last_line = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.completed:,}/{task.total:,}"),
            TextColumn("{task.fields[left]} left"),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self.task = self.progress.add_task("images", total=total, completed=start, left="-:--:--")

    def __enter__(self) -> Meter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, done: int) -> None:
        """Shows how many images are done."""
        now = time.perf_counter()
        rate = (done - self.start) / max(now - self.started, 1e-9)
        left = duration((self.total - done) / rate)
        self.progress.update(self.task, completed=done, description=f"{rate:,.0f} images/s", left=left)
        if not self.console.is_terminal and (now - self.last_line >= PLAIN_LINE_SECONDS or done == self.total):
            self.last_line = now
            say(self.console, f"{done:,}/{self.total:,} images  {rate:,.0f} images/s  {left} left")
