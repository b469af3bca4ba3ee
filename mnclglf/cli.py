"""The command line: mnclglf train | knn | linear | logistic | report | data | reproduce."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

import tyro
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from mnclglf.config import (
    MOST_PIXELS,
    SECTIONS,
    EvaluationConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    MethodName,
    RecipeName,
    RunConfig,
    UsageError,
    default_folder,
    require,
    require_numbers,
    short_name,
    to_dict,
    with_whole_paths,
)
from mnclglf.data.sources import SOURCES, is_dataset, source_of
from mnclglf.recipes import RECIPES, view_of
from mnclglf.reproduce.plan import Reproduce, make_table
from mnclglf.runs.console import LastingConsole, say

MOST_SHOWN = 100  # images of a picture
WRONG_USAGE = 2  # exit code
WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "text", Path: "path"}
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
MARKERS = (tyro.conf.OmitArgPrefixes,)
Run = Annotated[Path, tyro.conf.Positional]
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Options that choose the defaults of the others."""

    method: str = "mnclglf"
    dataset: str = "cifar10"
    recipe: str = "paper"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Pre-train a method; the options start from the values of --recipe for --method and --dataset."""

    out: Path | None = None
    """Run directory; None is runs/METHOD-DATASET-RECIPE-seedSEED."""
    resume: str = "auto"
    """auto: resume from the newest checkpoint in --out. never: refuse if --out holds a run. Or the path of a
    checkpoint."""
    print_config: bool = False
    """Print the resolved configuration as JSON and stop."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        source_of(self.config.dataset)  # raises for a name that is not in the table


TRAIN_HELP = f"{Train.__doc__}\n\nData sets: {', '.join(SOURCES)}, or folder:PATH."


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Arguments common to all evaluations."""

    runs: Runs
    """Run directories. For several, which may differ only in the seed, mean and deviation are printed too."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "no run directory is named; give one or more, as runs/x")


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Weighted k-nearest-neighbor accuracy of a run's encoder, the untrained encoder and raw pixels."""

    config: Annotated[KnnConfig, tyro.conf.arg(name="")] = field(default_factory=KnnConfig)


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluation):
    """The paper's linear evaluation: accuracy of a linear layer trained by LARS on a run's frozen encoder."""

    config: Annotated[LinearConfig, tyro.conf.arg(name="")] = field(default_factory=LinearConfig)


@dataclass(frozen=True, kw_only=True)
class Logistic(Evaluation):
    """Accuracy of logistic regression on features computed once, on all labels and on 10 labels per class; of a run's
    encoder, the untrained encoder and raw pixels."""

    config: Annotated[LogisticConfig, tyro.conf.arg(name="")] = field(default_factory=LogisticConfig)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report.html again."""

    run: Run
    """Run directory."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Arguments common to the commands that look at images."""

    source: Annotated[str, tyro.conf.Positional]
    """A data set's name, or folder:PATH."""
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
    """Print sizes, classes and channel statistics of a source, and draw some images."""


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
        require_numbers(self)
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
class Data:
    """Look at a source of images: data inspect SOURCE, data views SOURCE."""

    what: (
        Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
        | Annotated[Views, tyro.conf.subcommand("views", prefix_name=False)]
    )


WITH_HELP = (
    *(Train, Evaluation, Report, Look, Views, Reproduce, RunConfig, *SECTIONS.values()),
    *(EvaluationConfig, KnnConfig, LinearConfig, LogisticConfig),
)
Command = Train | Knn | Linear | Logistic | Report | Data | Reproduce


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 after an error, whose message is printed; 128 + N if stopped by signal N. Wrong usage exits with 2.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            command = parse(arguments)
            check_usage(command)
        except ValueError as error:
            say(Console(stderr=True), f"mnclglf: {error}", style="bold red")
            return WRONG_USAGE
        if isinstance(command, Train) and not command.print_config:
            name_unread(command.config, arguments)
        return run(command, LastingConsole())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UsageError as error:  # a setting that does not fit the images, the machine or the run
        say(Console(stderr=True), f"mnclglf: {error}", style="bold red")
        return WRONG_USAGE
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        say(Console(stderr=True), f"mnclglf: {error}", style="bold red")
        return 1
    except MemoryError as error:
        say(
            Console(stderr=True), f"mnclglf: not enough memory: {error}; take fewer or smaller images", style="bold red"
        )
        return 1


def parse(arguments: Sequence[str]) -> Command:
    """Returns the command that the arguments ask for.

    Raises:
        SystemExit: after --help, whose text is printed, with 0; after wrong usage, which is named, with 2.
        ValueError: settings that do not fit each other.
    """
    if arguments[:1] == ["train"]:
        start = Train(config=chosen_recipe(arguments[1:]))
        return parsed(Train, arguments[1:], default=start, prog="mnclglf train", description=TRAIN_HELP)
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(config=RunConfig()))]
        | Annotated[Knn, tyro.conf.subcommand("knn")]
        | Annotated[Linear, tyro.conf.subcommand("linear")]
        | Annotated[Logistic, tyro.conf.subcommand("logistic")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    )
    return parsed(commands, arguments, prog="mnclglf", description=__doc__)


def check_usage(command: Command) -> None:
    """Raises ValueError for arguments that do not fit each other, before any file is read."""
    if isinstance(command, Reproduce):
        table = make_table(command)
        if command.only is not None:
            table.run(command.only)  # raises for a name that is not in the table
    if isinstance(command, Train) and not command.print_config:
        from mnclglf.training.optim import check_optimizer
        from mnclglf.training.start import check_predictor, check_queue, choose_device

        check_queue(command.config)
        check_optimizer(command.config.optim.optimizer)
        check_predictor(command.config)
        choose_device(command.config.engine)


def parsed(kind: Any, arguments: Sequence[str], **options: Any) -> Any:
    """Returns what tyro makes of the arguments; an error of ours is printed without tyro's names of our classes."""
    for settings in WITH_HELP:
        join_help_lines(settings)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=[*arguments], config=MARKERS, registry=VALUES, **options)
    except ValueError as error:
        message = str(error)
    except SystemExit as stop:
        error = stop.__context__  # None for an unknown option; else ValueError or tyro's error, with the place as text
        if error is None or not isinstance(getattr(error, "arg", ""), str):
            sys.stderr.write(printed.getvalue())
            raise
        message = str(getattr(error, "message", error))
    say(Console(stderr=True), f"mnclglf: {message}", style="bold red")
    raise SystemExit(WRONG_USAGE)


@cache
def join_help_lines(settings: type) -> None:
    """Gives tyro each field's docstring as one paragraph, as it breaks the help where a docstring's line breaks."""
    (definition,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(definition, ast.ClassDef)
    fields_of = {made.name: made for made in fields(settings)}
    for field_of, text in pairwise(definition.body):
        if (
            isinstance(field_of, ast.AnnAssign)
            and isinstance(field_of.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            fields_of[field_of.target.id].metadata = MappingProxyType({"help": " ".join(str(text.value.value).split())})


def value_spec(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Returns how a number is read, or a setting that may be None; None leaves another type to tyro."""
    kinds = [kind for kind in get_args(info.type) or (info.type,) if kind is not type(None)]
    optional = type(None) in get_args(info.type)
    if len(kinds) != 1 or kinds[0] not in (WORDS if optional else (int, float)):
        return None
    kind, word = kinds[0], WORDS[kinds[0]]

    def read(words: list[str]) -> Any:
        if optional and words[0].lower() == "none":
            return None
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is no {word}{', and not None' * optional}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=METAVARS[kind] + "|None" * optional,
        instance_from_str=read,
        is_instance=lambda value: (
            (optional and value is None) or isinstance(value, int if kind is int else (kind, int))
        ),
        str_from_instance=lambda value: [str(value)],
    )


VALUES = tyro.constructors.ConstructorRegistry()
VALUES.primitive_rule(value_spec)


def chosen_recipe(arguments: Sequence[str]) -> RunConfig:
    """Returns the recipe's settings for the method and data set among the arguments.

    An unknown name is replaced by its default here; the full parse then rejects it.
    """
    chosen, _ = tyro.cli(Selection, args=[*arguments], prog="mnclglf train", return_unknown_args=True, add_help=False)
    known = RunConfig()
    methods: dict[str, MethodName] = {name: name for name in get_args(MethodName)}
    recipes: dict[str, RecipeName] = {name: name for name in get_args(RecipeName)}
    recipe = RECIPES[recipes.get(chosen.recipe, known.recipe)]
    dataset = chosen.dataset if is_dataset(chosen.dataset) else known.dataset
    return recipe(methods.get(chosen.method, known.method), dataset)


def run(command: Command, console: Console) -> int:
    """Runs `command`; returns the exit code."""
    if isinstance(command, Train) and command.print_config:
        sys.stdout.write(json.dumps(to_dict(command.config), indent=2) + "\n")
        return 0
    if isinstance(command, Data):
        look(command.what, console)
        return 0
    if isinstance(command, Reproduce):
        from mnclglf.reproduce.run import reproduce

        return reproduce(command, console)
    # Imported here, so that --help, --print-config and a wrong option need not wait for it; torch likewise below.
    from mnclglf.reports.page import write_report

    code = 0
    if isinstance(command, Train):
        folder, code = train(command, console)
        folders = (folder,)
    elif isinstance(command, Report):
        folders = (command.run,)
    else:
        folders = command.runs
        evaluate(command, console)
    for folder in folders:
        say(console, f"report: {write_report(folder).resolve()}")
    return code


def name_unread(config: RunConfig, arguments: Sequence[str]) -> None:
    """Prints the options among the arguments that have no effect on the run."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    given = {option[2:].replace("-", "_").removeprefix("no_"): option for option in options}
    if "lambda" in given:
        given["lambda_"] = given["lambda"]
    from mnclglf.training.unread import unread_settings

    for name, why in unread_settings(config, set(given)).items():
        say(Console(stderr=True), f"{given[name]} has no effect with {why}; leave it out", style="yellow")


def look(command: Inspect | Views, console: Console) -> None:
    """Runs `data inspect` or `data views`."""
    from mnclglf.data.datasets import load_dataset
    from mnclglf.data.sources.layout import check_picture
    from mnclglf.reports.sources import inspect_source, show_views

    kind = "views" if isinstance(command, Views) else "images"
    picture = command.out or Path(f"{short_name(command.source)}-{kind}.png")
    require(picture.parent.is_dir(), f"--out {picture}: there is no folder {picture.parent}; make it first")
    check_picture(picture, command.source)
    images = load_dataset(
        command.source, command.data_dir, download=command.download, skip_corrupt=command.skip_corrupt
    )
    if isinstance(command, Views):
        show_views(
            images[0], picture, console, command.view, side=command.side, count=command.images, seed=command.seed
        )
    else:
        inspect_source(images, picture, console)


def train(command: Train, console: Console) -> tuple[Path, int]:
    """Trains; returns the run directory and the exit code."""
    from mnclglf.reports.page import write_report
    from mnclglf.training.loop import Trainer, TrainingError

    config = with_whole_paths(command.config)
    folder = command.out or default_folder(config)
    trainer = Trainer(config, folder, resume=command.resume, console=console)
    try:
        stopped = trainer.train()
    except TrainingError:
        write_report(folder)  # also after a failure: it shows where the run stopped
        raise
    if not stopped:
        return folder, 0
    say(console, f"stopped and saved; the same command with --out {shlex.quote(str(folder))} resumes from there")
    return folder, 128 + stopped


def evaluate(command: Knn | Linear | Logistic, console: Console) -> None:
    """Evaluates runs and prints a table per run; for several runs, a table of the means too."""
    from mnclglf.evaluation.run import check_comparable, evaluate_run
    from mnclglf.reports.tables import mean_over_runs, print_table, result_table

    check_comparable(command.runs, command.config)
    found: list[list[dict[str, Any]]] = []
    for run in command.runs:
        found.append([asdict(result) for result in evaluate_run(run, command.config, console)])
        if len(command.runs) > 1:
            say(console, f"{run}:")
        print_table(result_table(found[-1]), console)
    if len(command.runs) > 1:
        say(console, f"mean and standard deviation (n - 1) over {len(command.runs)} runs:")
        print_table(result_table(mean_over_runs(found)), console)
