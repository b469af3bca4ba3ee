"""The command line: parses the arguments of the commands (mnclglf/commands) and runs one."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import logging
import os
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from itertools import pairwise
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from mnclglf.commands import COMMANDS
from mnclglf.commands.base import Command
from mnclglf.commands.ranks import WRONG_USAGE, error_text, execute_on_ranks, exit_code_of, run_rank, start_ranks
from mnclglf.commands.train import TRAIN_HELP, Train, name_unread
from mnclglf.config import MethodName, RecipeName, RunConfig, UsageError, require
from mnclglf.data.sources import is_dataset
from mnclglf.runs.console import LastingConsole, say
from mnclglf.settings import run_config
from mnclglf.version import version

WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "text", Path: "path"}
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
SHELLS = ("bash", "zsh")
HELP = f"""Commands: {", ".join(COMMANDS)}.

mnclglf --version prints the version, mnclglf --print-completion SHELL a script that lets {" or ".join(SHELLS)} complete
commands and options. mnclglf doctor says what this machine lacks."""
MARKERS = (tyro.conf.OmitArgPrefixes,)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Options that choose the defaults of the others."""

    config: Path | None = None
    method: str | None = None
    dataset: str | None = None
    recipe: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 after an error, whose message is printed; 128 + N if stopped by signal N. Wrong usage exits with 2.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if "RANK" in os.environ:
            return run_rank(lambda quiet: run(arguments, quiet=quiet))
        return run(arguments)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        say(Console(stderr=True), f"mnclglf: {error_text(error)}", style="bold red")
        return code


def run(arguments: Sequence[str], *, quiet: bool = False) -> int:
    """Runs one command; returns its exit code. With `quiet` it does not print what is wrong with the arguments."""
    try:
        with silence() if quiet else contextlib.nullcontext():
            command = parse(arguments)
        command.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if isinstance(command, Train) and not command.print_config and not quiet:
        name_unread(command.config, arguments)
        if command.starts_ranks():
            assert command.gpus is not None
            return start_ranks(command.gpus, arguments)
    if "RANK" in os.environ and not isinstance(command, Train):
        return execute_on_ranks(command, LastingConsole())
    return command.execute(LastingConsole())


@contextlib.contextmanager
def silence() -> Generator[None]:
    """Context in which nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def parse(arguments: Sequence[str]) -> Command:
    """Returns the command that the arguments ask for.

    Raises:
        SystemExit: after --help, --version or --print-completion, whose text is printed, with 0; after wrong usage,
            which is named, with 2.
        ValueError: settings that do not fit each other.
    """
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"mnclglf {version()}\n")
        raise SystemExit(0)
    if arguments[:1] == ["--print-completion"]:
        arguments = ["--tyro-print-completion", checked_shell(arguments[1:])]
    if arguments[:1] == ["train"]:
        start = Train(config=chosen_settings(arguments[1:]))
        return parsed(Train, arguments[1:], default=start, prog="mnclglf train", description=TRAIN_HELP)
    commands = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    return parsed(reduce(or_, commands), arguments, prog="mnclglf", description=HELP)


def checked_shell(arguments: Sequence[str]) -> str:
    """Returns the shell that --print-completion names; raises ValueError unless it is one of SHELLS."""
    require(len(arguments) == 1, f"--print-completion takes one shell: {', '.join(SHELLS)}")
    require(arguments[0] in SHELLS, f"--print-completion {arguments[0]}: give one of {', '.join(SHELLS)}")
    return arguments[0]


def parsed(kind: Any, arguments: Sequence[str], **options: Any) -> Any:
    """Returns what tyro makes of the arguments; an error of ours is printed without tyro's names of our classes."""
    for settings in settings_of(*COMMANDS.values()):
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


def settings_of(*kinds: Any) -> Iterator[type]:
    """Iterates over the dataclasses among types: they, what they inherit from, and what their fields hold."""
    for kind in kinds:
        if not isinstance(kind, type):
            yield from settings_of(*get_args(kind))
        elif is_dataclass(kind):
            yield from (parent for parent in kind.__mro__ if is_dataclass(parent))
            yield from settings_of(*get_type_hints(kind).values())


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


def chosen_settings(arguments: Sequence[str]) -> RunConfig:
    """Returns the settings of the file among the arguments, on top of the recipe that the arguments or it choose.

    An unknown name among the arguments is left out here; the full parse then rejects it.

    Raises:
        UsageError: the file cannot be read, or a setting in it cannot work.
    """
    chosen, _ = tyro.cli(Selection, args=[*arguments], prog="mnclglf train", return_unknown_args=True, add_help=False)
    known = {"method": chosen.method in get_args(MethodName), "recipe": chosen.recipe in get_args(RecipeName)}
    known["dataset"] = chosen.dataset is not None and is_dataset(chosen.dataset)
    options = {name: getattr(chosen, name) for name, is_known in known.items() if is_known}
    return run_config(options, chosen.config)
