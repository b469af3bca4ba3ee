"""Settings by name, from a file or from Python: they choose a recipe and replace settings of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError

from mnclglf.config import (
    SECTIONS,
    WRITTEN,
    RunConfig,
    UsageError,
    check_names,
    from_dict,
    require,
    require_mapping,
    to_dict,
)
from mnclglf.recipes import RECIPES

SECTION_OF = {
    field.name: name
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
    if field.name not in WRITTEN
}
"""Section of each setting that is in one; without those that a run writes by itself."""
CHOSEN_FIRST = ("method", "dataset", "recipe")
"""Settings that the recipe's others depend on."""
_MOST_TEXT, _MOST_VALUES = 2**20, 10_000
OWN = [field.name for field in dataclasses.fields(RunConfig) if field.name not in SECTIONS]


class _Constructor(SafeConstructor):
    """Makes the values of a YAML file; a date is text, as no setting is one."""

    def flatten_mapping(self, node: Any) -> Any:
        # Merges of merges write out far more than the file holds, before anything can count it.
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ValueError("it merges settings by <<; write them out")
        return super().flatten_mapping(node)


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def run_config(settings: Mapping[str, Any], file: Path | None = None) -> RunConfig:
    """Returns the recipe's run with the settings of a file, and these in place of them.

    Args:
        settings: settings by their names on the command line.
        file: YAML or JSON file with settings, as `read_settings` reads it.

    Raises:
        UsageError: the file cannot be read, there is no setting of a name, or a value cannot work.
    """
    settings = {**({} if file is None else read_settings(file)), **by_name(settings)}
    check_names(settings, [*OWN, *SECTION_OF], "a run")
    chosen = RunConfig(**{name: settings[name] for name in CHOSEN_FIRST if name in settings})  # raises for a wrong name
    values = to_dict(RECIPES[chosen.recipe](chosen.method, chosen.dataset))
    for name, value in settings.items():
        (values[SECTION_OF[name]] if name in SECTION_OF else values)[name] = value
    return from_dict(values)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML or JSON file by their names.

    A setting may stand in its section, as `mnclglf train --print-config` writes it, or outside of one.

    Raises:
        UsageError: the file cannot be read, or it names a setting that does not exist, or one twice.
    """
    owner, values = f"a run (in {path})", _read(path)
    found: dict[str, Any] = {}
    for name, value in by_name(require_mapping({} if values is None else values, owner), str(path)).items():
        settings = {name: value}
        if name in SECTIONS:
            section = f"the section {name} (in {path})"
            given = by_name(require_mapping({} if value is None else value, section), str(path))
            settings = {setting: given[setting] for setting in given if setting not in WRITTEN}
            check_names(settings, [setting for setting, of in SECTION_OF.items() if of == name], section)
        for setting in settings:
            require(setting not in found, f"{path} names {setting} twice; keep one of them")
        found |= settings
    check_names(found, [*OWN, *SECTION_OF], owner)
    return found


def by_name(settings: Mapping[str, Any], where: str = "the call") -> dict[str, Any]:
    """Returns settings by the names of their fields: batch-size is batch_size, and lambda is lambda_.

    Raises:
        UsageError: two names are one setting; `where` says where they stand.
    """
    fields = [str(name).replace("-", "_") for name in settings]
    names = ["lambda_" if name == "lambda" else name for name in fields]
    _refuse_twice(names, where)
    return dict(zip(names, settings.values(), strict=True))


def _read(path: Path) -> object:
    """Returns what a YAML file holds. JSON is YAML, but is read as JSON where it can be: that is faster."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # a pipe too, as of <(...)
            text = file.read(_MOST_TEXT + 1)
    except IsADirectoryError:
        raise UsageError(f"--config {path} is a folder; give a file, as {path / 'config.json'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read ({error}); give a YAML or JSON file with settings") from error
    require(len(text) <= _MOST_TEXT, f"{path} has more than {_MOST_TEXT:,} characters; give a file of settings")
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, str(path)))
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deep for settings; correct it there") from error
    except UsageError:
        raise
    except ValueError as error:  # it is no JSON, or holds a number of thousands of digits
        if path.suffix == ".json":
            raise UsageError(f"{path} is not JSON: {error}; correct it there") from error
    reader = YAML(typ="safe", pure=True)  # YAML 1.2, in which off is text and 1e-5 a number
    reader.Constructor = _Constructor
    try:
        value = reader.load(text)
    except MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise UsageError(f"{path} is not YAML: {error.problem}{place}; correct it there") from error
    except Exception as error:  # ruamel raises anything: ValueError, TypeError of a list as a key, RecursionError, ...
        raise UsageError(f"{path} is not YAML: {error}; correct it there") from error
    count = _count(value, {})
    require(
        count <= _MOST_VALUES,
        f"{path} has more than {_MOST_VALUES:,} values, with its aliases (*) written out; leave some out",
    )
    return value


def _count(value: object, known: dict[int, float]) -> float:
    """Returns how many values there are in one of YAML, in which the same may stand many times, or in itself."""
    if not isinstance(value, Mapping | list | set):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # for as long as it is counted: one that holds itself
        parts = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in cast("Iterable[object]", parts))
    return known[id(value)]


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Returns an object of JSON, whose names have to differ."""
    _refuse_twice([name for name, _ in pairs], where)
    return dict(pairs)


def _refuse_twice(names: Sequence[str], where: str) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    require(twice is None, f"{where} names {twice} twice; keep one of them")
