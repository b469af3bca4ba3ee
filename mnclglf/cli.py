"""The one command: mnclglf train | knn | linear | report."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from rich.console import Console

from mnclglf.config import DatasetName, MethodName, RunConfig, to_dict
from mnclglf.recipes import RECIPES

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
Run = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The options that choose where the others start from."""

    method: str = "mnclglf"
    dataset: str = "cifar10"
    recipe: str = "paper"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Pre-train a method; the options start from the values of --recipe for --method and --dataset."""

    out: Path | None = None
    """Run directory; None is runs/METHOD-DATASET-RECIPE-seedSEED."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in --out; never: start anew; or the path of a checkpoint."""
    print_config: bool = False
    """Print the resolved configuration as JSON and stop."""
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Knn:
    """Weighted k-nearest-neighbor accuracy of a run's encoder, beside the untrained encoder and raw pixels."""

    run: Run
    """Run directory."""
    k: int = 20
    """Neighbors that vote."""
    vote_temperature: float = 0.07
    """Temperature of the votes."""
    split: Literal["test", "validation"] = "test"
    """Images to classify; validation are those that --validation-images held out."""
    checkpoint: Path | None = None
    """Checkpoint to evaluate; None is the newest."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Accuracy of a linear classifier on a run's frozen features, beside the untrained encoder and raw pixels."""

    run: Run
    """Run directory."""
    fast: bool = False
    """Logistic regression on cached features, on all labels and on 10 a class: the protocol of this version."""
    split: Literal["test", "validation"] = "test"
    """Images to classify; validation are those that --validation-images held out."""
    checkpoint: Path | None = None
    """Checkpoint to evaluate; None is the newest."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report.html anew."""

    run: Run
    """Run directory."""


Command = Train | Knn | Linear | Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0; 1 after an error, which it explains; 128 + N when stopped by signal N.

    Wrong usage exits with 2 and says what is wrong.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return run(parse(sys.argv[1:] if arguments is None else arguments), Console())
    except (ValueError, OSError, RuntimeError) as error:
        message = f"mnclglf: {error}"
        Console(stderr=True).print(message, style="bold red", highlight=False, soft_wrap=True, markup=False)
        return 1


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments ask for."""
    if arguments[:1] == ["train"]:
        start = Train(config=chosen_recipe(arguments[1:]))
        return tyro.cli(Train, default=start, args=[*arguments[1:]], prog="mnclglf train", config=MARKERS)
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(config=RunConfig()))]
        | Annotated[Knn, tyro.conf.subcommand("knn")]
        | Annotated[Linear, tyro.conf.subcommand("linear")]
        | Annotated[Report, tyro.conf.subcommand("report")]
    )
    return tyro.cli(commands, args=[*arguments], prog="mnclglf", description=__doc__, config=MARKERS)


def chosen_recipe(arguments: Sequence[str]) -> RunConfig:
    """What the recipe gives for the method and data set among the arguments.

    A name that does not exist stands for its default here: parsing the arguments proper refuses it.
    """
    chosen, _ = tyro.cli(Selection, args=[*arguments], return_unknown_args=True, add_help=False)
    known = RunConfig()
    method = chosen.method if chosen.method in get_args(MethodName) else known.method
    dataset = chosen.dataset if chosen.dataset in get_args(DatasetName) else known.dataset
    recipe = chosen.recipe if chosen.recipe in RECIPES else known.recipe
    return RECIPES[recipe](method, dataset)


def run(command: Command, console: Console) -> int:
    """Runs `command`; gives the exit code."""
    if isinstance(command, Train):
        return train(command, console)
    return 0


def train(command: Train, console: Console) -> int:
    config = command.config
    if command.print_config:
        sys.stdout.write(json.dumps(to_dict(config), indent=2) + "\n")
        return 0
    from mnclglf.engine.train import Trainer  # here, so that --help and --print-config do not wait for torch

    out = command.out or Path("runs") / f"{config.method}-{config.dataset}-{config.recipe}-seed{config.seed}"
    stopped = Trainer(config, out, resume=command.resume, console=console).train()
    if stopped:
        console.print(f"stopped and saved; the same command goes on from there (--out {out})", soft_wrap=True)
        return 128 + stopped
    return 0
