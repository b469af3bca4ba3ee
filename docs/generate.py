"""The parts of pages that are made from the code, so that they cannot go stale.

A page holds a comment such as `<!-- generated: settings -->`; `expand` puts the text in its place.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import os
import re
import typing
from collections.abc import Callable, Container
from contextlib import redirect_stdout
from functools import cache

from sphinx.pycode import ModuleAnalyzer

from mnclglf.config import WRITTEN

MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def expand(text: str) -> str:
    """Returns the text of a page with its generated parts in place."""
    return MARKER.sub(lambda found: PARTS[found[1]](), text)


@cache
def descriptions() -> dict[tuple[str, str], str]:
    """Returns (class, field) -> the text under a field in mnclglf/config.py."""
    found = ModuleAnalyzer.for_module("mnclglf.config").find_attr_docs()
    return {key: " ".join(" ".join(lines).split()) for key, lines in found.items()}


def cell(text: str) -> str:
    """Returns text that Markdown takes as one plain cell of a table."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text)


def option(field: dataclasses.Field) -> str:
    """Returns the option of the command line that sets a field."""
    return "--" + field.name.rstrip("_").replace("_", "-")


def default(field: dataclasses.Field) -> str:
    """Returns the default of a field, as it is written on the command line."""
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(format(v, ".4g") if isinstance(v, float) else str(v) for v in values)


def settings_table(section: type, inherited: bool = True) -> str:
    """Returns the fields of a settings class as a table: option, default, meaning."""
    owners = [owner.__name__ for owner in section.__mro__]
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default_factory) or field.name in WRITTEN:
            continue  # a section of its own; or not for users
        if not inherited and field.name not in vars(section).get("__annotations__", {}):
            continue
        said = next((descriptions()[o, field.name] for o in owners if (o, field.name) in descriptions()), "")
        lines.append(f"| `{option(field)}` | `{default(field)}` | {cell(said)} |")
    return "\n".join(lines)


def settings() -> str:
    """Returns every setting of a run: one table per section of RunConfig."""
    from mnclglf import config

    sections = [config.RunConfig]
    sections += [
        f.default_factory for f in dataclasses.fields(config.RunConfig) if dataclasses.is_dataclass(f.default_factory)
    ]
    return "\n\n".join(section_text(section) for section in sections)


def evaluation_settings() -> str:
    """Returns the settings of the evaluations: those that all share, then each protocol's own."""
    from mnclglf.config import EvaluationConfig, ImagesConfig, QualityConfig

    parts = [section_text(ImagesConfig), section_text(EvaluationConfig, inherited=False)]
    parts += [section_text(section, inherited=False) for section in EvaluationConfig.__subclasses__()]
    parts += [section_text(QualityConfig, inherited=False)]
    return "\n\n".join(parts)


def section_text(section: type, inherited: bool = True) -> str:
    """Returns the heading, the docstring and the table of one settings class."""
    said = " ".join((section.__doc__ or "").split())
    return f"### {section.__name__}\n\n{cell(said)}\n\n{settings_table(section, inherited)}"


def help_of(*arguments: str) -> str:
    """Returns what `mnclglf ARGUMENTS --help` prints, in lines of at most 100 characters."""
    from mnclglf.cli import main

    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            main([*arguments, "--help"])
    except SystemExit:
        pass
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return re.sub(r" +$", "", plain, flags=re.MULTILINE).rstrip()


def subcommands(*arguments: str) -> list[str]:
    """Returns the names in the first {a,b,c} of a command's usage; empty where there is none."""
    usage = help_of(*arguments).split("\n\n")[0]
    found = re.search(r"\{([a-z0-9,_\s│-]+)\}", usage)
    return re.split(r"[,\s]+", found[1].strip()) if found else []


def commands() -> list[tuple[str, ...]]:
    """Returns every command: ("knn",), ("data", "views") and so on; train's options are on the page of settings."""
    found: list[tuple[str, ...]] = []
    for name in subcommands():
        inner = [] if name in ("train", "reproduce") else subcommands(name)
        found += [(name, *more) for more in ([(i,) for i in inner] if name == "data" else [()])]
    return found


def command_line() -> str:
    """Returns the help of each command but train, whose options are the settings."""
    parts = []
    for command in commands():
        if command == ("train",):
            text = "Its options are the [settings](settings.md), `--config`, `--out`, `--resume` and `--print-config`."
        else:
            text = f"```text\n{help_of(*command)}\n```"
        parts.append(f"## mnclglf {' '.join(command)}\n\n{text}")
    return "\n\n".join(parts)


def autodoc(package: str, but: Container[str] = ()) -> str:
    """Returns an autodoc entry for each public name of a package, then for the classes of ours that signatures name."""
    module = importlib.import_module(package)
    public = [name for name in getattr(module, "__all__", ()) if name not in but]
    named: dict[str, type] = {}
    for value in [getattr(module, name) for name in public]:
        for hint in typing.get_type_hints(value).values() if inspect.isroutine(value) else ():
            for kind in [hint, *typing.get_args(hint)]:
                if inspect.isclass(kind) and kind.__module__.startswith("mnclglf"):
                    named[f"{kind.__module__}.{kind.__qualname__}"] = kind
    known = [getattr(module, name) for name in public]
    rest = {path: kind for path, kind in named.items() if kind not in known and kind.__name__ not in but}
    entries = {f"{package}.{name}": getattr(module, name) for name in public} | rest
    return "```{eval-rst}\n" + "\n".join(entry(path, value) for path, value in entries.items()) + "```"


def entry(path: str, value: object) -> str:
    """Returns the autodoc directive of one object. The fields of settings classes are on a page of their own."""
    if inspect.isclass(value):
        return f".. autoclass:: {path}{'(**settings)' if value.__module__ == 'mnclglf.config' else ''}\n"
    return f".. auto{'function' if inspect.isroutine(value) else 'data'}:: {path}\n"


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "evaluation-settings": evaluation_settings,
    "command-line": command_line,
    "python-api": lambda: autodoc("mnclglf"),
    "operators-api": lambda: autodoc("mnclglf_kernels"),
}
