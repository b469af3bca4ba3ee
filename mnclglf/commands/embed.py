"""mnclglf embed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from mnclglf.commands.base import Run
from mnclglf.config import Device, require, short_name
from mnclglf.data.sources import named_or_folder


@dataclass(frozen=True, kw_only=True)
class OfImages:
    """Arguments common to the commands that embed images."""

    run: Run
    """Run directory."""
    source: Annotated[str, tyro.conf.Positional]
    """A folder of image files, or a data set's name."""
    checkpoint: Path | None = None
    """Checkpoint whose encoder is taken; None is the newest."""
    data_dir: Path | None = None
    """Folder of the data set's files; None looks in its usual places."""
    download: bool = False
    """Fetch the data set if it is missing."""
    skip_corrupt: bool = False
    """Leave out image files that cannot be used; they have no row."""
    device: Device = "auto"
    """auto is cuda where torch sees a GPU."""

    def prepare(self) -> None:
        """Lets OpenMP's threads sleep while they wait; to be called before torch is loaded, which reads it once.

        They would spin beside the threads that decode: 0.5 ms of the processor per image became 1.5 (6,000 images of
        64 x 64, two busy cores).
        """
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    @property
    def shared_device(self) -> Device:
        return self.device

    def default_file(self) -> Path:
        """Returns RUN/embeddings/SOURCE.npy."""
        return self.run / "embeddings" / f"{short_name(named_or_folder(self.source))}.npy"


@dataclass(frozen=True, kw_only=True)
class Embed(OfImages):
    """Write the embeddings of all images of a folder or a data set into one file, with their names and labels."""

    out: Path | None = None
    """File to write: its end, .npy, .parquet or .npz, says the format. None is RUN/embeddings/SOURCE.npy. The same
    command goes on where an earlier one stopped."""

    def check(self) -> None:
        from mnclglf.evaluation.embedding_file import check_out

        require(self.run.is_dir(), f"{self.run} is no run directory; mnclglf train --out makes one")
        check_out(self.out or self.default_file())

    def execute(self, console: Console) -> int:
        self.prepare()
        from mnclglf.api import make_embedder
        from mnclglf.data.listing import list_source
        from mnclglf.evaluation.embed import embed_source
        from mnclglf.training.ranks import ranks_of_environment

        source, out = named_or_folder(self.source), self.out or self.default_file()
        embedder = make_embedder(self.run, self.checkpoint, self.device)
        listing = list_source(source, self.data_dir, download=self.download, skip_corrupt=self.skip_corrupt)
        stopped = embed_source(
            embedder,
            listing,
            source,
            out,
            skip_corrupt=self.skip_corrupt,
            console=console,
            ranks=ranks_of_environment(),
        )
        return 128 + stopped if stopped else 0
