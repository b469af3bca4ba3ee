"""mnclglf data inspect, data views and data pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from mnclglf.config import MOST_PIXELS, MethodName, require, require_types, short_name
from mnclglf.data.sources import source_of
from mnclglf.recipes import RECIPES, view_of
from mnclglf.runs.console import say

if TYPE_CHECKING:
    from mnclglf.data.images import ImageSet

MOST_SHOWN = 100  # images of a picture
SHARD_BYTES = 256 * 2**20  # of a shard, without a limit of another kind


@dataclass(frozen=True, kw_only=True)
class Look:
    """Arguments common to the commands that look at images."""

    source: Annotated[str, tyro.conf.Positional]
    """A data set's name, or folder:PATH, shards:PATTERN, parquet:PATTERN."""
    data_dir: Path | None = None
    """Folder of the data set's files; None looks in its usual places."""
    download: bool = False
    """Fetch the data set if it is missing."""
    skip_corrupt: bool = False
    """Skip image files that cannot be read."""
    out: Path | None = None
    """File of the picture; None is SOURCE-images.png or SOURCE-views.png in the current directory."""

    def __post_init__(self) -> None:
        source_of(self.source)  # raises for a name that is not in the table
        require(
            self.out is None or self.out.suffix == ".png",
            f"--out {self.out} must end in .png, which is what is written",
        )


@dataclass(frozen=True, kw_only=True)
class Inspect(Look):
    """Print sizes, classes and channel statistics of a source, of image files also what they hold and which cannot be
    used; estimate side, batch and time of an epoch on a card of 24 GB; and draw some images."""

    method: MethodName = "mnclglf"
    """Method of the estimate."""


@dataclass(frozen=True, kw_only=True)
class Views(Look):
    """Draw the views that each loader makes of some images, side by side, and their patches."""

    view: str = "paper"
    """Named view: paper, simclr, mocov2, byol, simsiam, supervised, linear_train, eval or quick."""
    side: int | None = None
    """Side of a view in pixels; None is the images' own side, 224 for a folder."""
    images: int = 6
    """Images to show."""
    seed: int = 0
    """Seed of the views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_types(self)
        view_of(self.view, self.source)
        side = self.side
        require(
            side is None or (2 <= side <= MOST_PIXELS and side % 2 == 0),
            f"side {side} must be even and lie in 2..{MOST_PIXELS}: an image is divided into 2 x 2 patches",
        )
        require(self.images >= 1, f"{self.images} images cannot be shown; give --images from 1 to {MOST_SHOWN}")
        require(
            self.images <= MOST_SHOWN, f"images {self.images} are too many for a picture; give {MOST_SHOWN} at most"
        )
        require(self.seed >= 0, f"seed {self.seed} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Pack a source into shards, tar files as WebDataset writes them, each with DALI's index beside it. Files keep
    their bytes, other images become PNG. The same command goes on where an earlier one stopped."""

    source: Annotated[str, tyro.conf.Positional]
    """A data set's name, or folder:PATH, shards:PATTERN, parquet:PATTERN."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the shards, which is made: train-000000.tar and so on, and test-000000.tar of test images."""
    images_per_shard: int | None = None
    """Most images of a shard; None limits the bytes alone."""
    shard_bytes: int | None = None
    """Most bytes of a shard; None is 256 MiB, or no limit with --images-per-shard."""
    data_dir: Path | None = None
    """Folder of the data set's files; None looks in its usual places."""
    download: bool = False
    """Fetch the data set if it is missing."""
    skip_corrupt: bool = False
    """Skip image files that cannot be read."""

    def __post_init__(self) -> None:
        source_of(self.source)  # raises for a name that is not in the table
        for name in ("images_per_shard", "shard_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Look at a source of images, or pack it: data inspect SOURCE, data views SOURCE, data pack SOURCE OUT."""

    what: (
        Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
        | Annotated[Views, tyro.conf.subcommand("views", prefix_name=False)]
        | Annotated[Pack, tyro.conf.subcommand("pack", prefix_name=False)]
    )

    def check(self) -> None:
        pass

    def execute(self, console: Console) -> int:
        return pack(self.what, console) if isinstance(self.what, Pack) else look(self.what, console)


def pack(command: Pack, console: Console) -> int:
    """Runs `data pack`; returns the exit code."""
    from mnclglf.data.datasets import load_dataset
    from mnclglf.data.pack import Limit
    from mnclglf.data.pack import pack as pack_images

    unlimited = command.images_per_shard is None and command.shard_bytes is None
    limit = Limit(images=command.images_per_shard, file_bytes=SHARD_BYTES if unlimited else command.shard_bytes)
    images = load_dataset(
        command.source, command.data_dir, download=command.download, skip_corrupt=command.skip_corrupt
    )
    pack_images(images, command.out, limit, lambda line: say(console, line))
    return 0


def look(command: Inspect | Views, console: Console) -> int:
    """Runs `data inspect` or `data views`; returns the exit code."""
    from mnclglf.data.datasets import load_dataset
    from mnclglf.data.images import EncodedImages
    from mnclglf.data.sources.layout import check_picture
    from mnclglf.reports.sources import inspect_source, show_views

    kind = "views" if isinstance(command, Views) else "images"
    picture = command.out or Path(f"{short_name(command.source)}-{kind}.png")
    require(picture.parent.is_dir(), f"--out {picture}: there is no folder {picture.parent}; make it first")
    check_picture(picture, command.source)
    # To inspect is to count the corrupt ones too.
    skip = command.skip_corrupt or isinstance(command, Inspect)
    images = load_dataset(command.source, command.data_dir, download=command.download, skip_corrupt=skip)
    if isinstance(command, Views):
        show_views(
            images[0], picture, console, command.view, side=command.side, count=command.images, seed=command.seed
        )
        return 0
    inspect_source(images, picture, console)
    for line in estimates(command, images[0]):
        say(console, line)
    if command.skip_corrupt or not any(isinstance(part, EncodedImages) and part.corrupt for part in images):
        return 0
    say(console, "repair or remove the files that cannot be used, or leave them out of training with --skip-corrupt")
    return 1


def estimates(command: Inspect, train: ImageSet) -> list[str]:
    """Returns the lines that estimate a run on these images; none without triton, whose kernels are counted."""
    from mnclglf.training.forecast import forecast
    from mnclglf_kernels.backend import HAS_TRITON

    return forecast(RECIPES["paper"](command.method, command.source), train) if HAS_TRITON else []
