"""The runs below a folder as a table: state, accuracies and the settings that differ. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnclglf.config import RunConfig, to_dict
from mnclglf.recipes import RECIPES
from mnclglf.reports.tables import percent
from mnclglf.runs.console import say
from mnclglf.runs.files import list_checkpoints, read_config, read_object
from mnclglf.runs.locks import is_training
from mnclglf.runs.metrics import last_record
from mnclglf.runs.quality import FeatureQuality, load_qualities
from mnclglf.runs.results import Result, load_results

PROTOCOLS = {"knn": "k-NN", "linear": "linear", "logistic": "logistic"}
QUALITY = {"alignment": "alignment", "uniformity": "uniformity", "effective_rank": "effective rank"}
CHOOSERS = ("method", "dataset", "recipe", "seed")
INSIDE = {"checkpoints", "tensorboard", "wandb", "mlflow-files"}  # folders in which there is no run


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What one run directory holds, in short."""

    folder: Path
    state: str
    """running, finished, stopped, failed or unreadable, and at which step or why."""
    changed: float
    """When the run was written last, in seconds since 1970."""
    config: RunConfig | None = None
    top1: dict[str, float] = field(default_factory=dict[str, float])
    """Accuracy of the pretrained encoder by protocol, with the protocol's default settings on the test images."""
    quality: FeatureQuality | None = None
    """Figures without labels of the pretrained encoder and the run's own images: of held-out ones if
    there are, and of most images."""
    problems: tuple[str, ...] = ()
    """Why something in the directory cannot be read."""


def read_runs(folder: Path) -> list[RunSummary]:
    """Reads every run below a folder, newest first; what is damaged is said in its `problems`."""
    return sorted((read_summary(run) for run in find_runs(folder)), key=lambda run: run.changed, reverse=True)


def find_runs(folder: Path) -> Iterator[Path]:
    """Iterates over the run directories below a folder, the folder itself included; links are followed once."""
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "config.json" in files or "metrics.jsonl" in files or "checkpoints" in folders:
            yield Path(path)
        folders[:] = sorted(name for name in folders if name not in INSIDE and not name.startswith("."))


def read_summary(folder: Path) -> RunSummary:
    """Reads one run directory, whatever state it is in."""
    problems: list[str] = []
    config, record, results, qualities = None, None, [], []
    try:
        config = read_config(folder)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    try:
        record = last_record(folder / "metrics.jsonl")
    except OSError as error:
        problems.append(str(error))
    try:
        results = load_results(folder / "evaluation.json")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    try:
        qualities = load_qualities(folder / "quality.json")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    return RunSummary(
        folder=folder,
        state="unreadable" if config is None else _state(folder, config, record),
        changed=_changed(folder),
        config=config,
        top1=_accuracies(results),
        quality=_own_quality(qualities),
        problems=tuple(problems),
    )


def _state(folder: Path, config: RunConfig, record: dict[str, Any] | None) -> str:
    saved = max((step for step, _ in list_checkpoints(folder / "checkpoints")), default=0)
    done, total = max(saved, 0 if record is None else record["step"]), None
    epoch = None if record is None else record.get("epoch")
    if record is not None and isinstance(epoch, int | float) and epoch > 1e-9:  # else it is damaged
        total = round(config.optim.epochs * record["step"] / epoch)
    of = f"{done:,}" if total is None else f"{done:,} of {total:,}"
    if is_training(folder):
        return f"running, step {of}"
    if total is not None and saved >= total:
        return f"finished, {total:,} steps"
    broken = _broken_step(folder)
    if broken is not None and broken > saved:
        return f"failed at step {broken:,}: not finite"
    return f"stopped at step {of}"


def _broken_step(folder: Path) -> int | None:
    """Returns the step that nonfinite.json names."""
    try:
        step = (read_object(folder / "nonfinite.json") or {}).get("step")
    except (OSError, ValueError):
        return None
    return step if isinstance(step, int) else None


def _changed(folder: Path) -> float:
    times = [0.0]
    for name in ("config.json", "metrics.jsonl", "checkpoints"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _accuracies(results: Sequence[Result]) -> dict[str, float]:
    wanted: dict[tuple[Any, ...], str] = {
        (protocol, "pretrained", None, "test", 1.0, None, ()): protocol for protocol in PROTOCOLS
    }
    return {wanted[result.key]: result.top1 for result in results if result.key in wanted}


def _own_quality(results: Sequence[FeatureQuality]) -> FeatureQuality | None:
    own = [result for result in results if result.key[:2] == ("pretrained", None) and result.epoch is None]
    return max(own, key=lambda result: (result.split != "train", result.images), default=None)


def differing(runs: Sequence[RunSummary]) -> list[list[str]]:
    """Returns for each run those settings in words that differ among the runs, e.g. ["seed 1", "lr 0.2"].

    A setting that every run takes from its recipe is left out: method, dataset and recipe say it.
    """
    settings = [None if run.config is None else _flat(run.config) for run in runs]
    known = [values for values in settings if values is not None]
    usual = [_usual(run.config) for run in runs if run.config is not None]
    names = [
        name
        for name in (known[0] if known else {})
        if len({values[name] for values in known}) > 1
        and (name in CHOOSERS or any(values[name] != of.get(name) for values, of in zip(known, usual, strict=True)))
    ]
    return [[] if values is None else [f"{name.rstrip('_')} {values[name]}" for name in names] for values in settings]


def _flat(config: RunConfig) -> dict[str, str]:
    """Returns every setting by its name, as it would stand in a file."""
    flat: dict[str, str] = {}
    for name, value in to_dict(config).items():
        for inner, of in value.items() if isinstance(value, dict) else [(name, value)]:
            flat[inner] = of if isinstance(of, str) else json.dumps(of)
    return flat


def _usual(config: RunConfig) -> dict[str, str]:
    """Returns the settings of a run's recipe; none if it is not for its method or data set any more, or those are not
    here: an object of another program, or of a package that is not installed."""
    try:
        return _flat(RECIPES[config.recipe](config.method, config.dataset))
    except (ValueError, RuntimeError):
        return {}


def to_json(run: RunSummary) -> dict[str, Any]:
    """Returns a run as plain JSON types, with all its settings."""
    return {
        "run": str(run.folder),
        "state": run.state,
        "changed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.changed)),
        "top1": run.top1,
        "quality": None if run.quality is None else asdict(run.quality),
        "config": None if run.config is None else to_dict(run.config),
        "problems": list(run.problems),
    }


def print_overview(runs: Sequence[RunSummary], folder: Path, console: Console) -> None:
    """Prints the table: as columns in a terminal, as Markdown in a pipe or a file.

    Accuracies are top-1 in percent. The figures without labels are shown if a run has them.
    """
    if not runs:
        say(console, f"there is no run below {folder}; mnclglf train makes one")
        return
    settings = differing(runs)
    shown = [name for name in PROTOCOLS if any(name in run.top1 for run in runs)]
    judged = [] if all(run.quality is None for run in runs) else list(QUALITY)
    numbers = [*(PROTOCOLS[name] for name in shown), *(QUALITY[name] for name in judged)]
    header = ["run", "state", *numbers, *(["settings that differ"] if any(settings) else [])]
    rows = [
        [
            str(run.folder.relative_to(folder)) if run.folder != folder else str(folder),
            run.state,
            *(percent(run.top1[name]) if name in run.top1 else "" for name in shown),
            *(_figure(run.quality, name) for name in judged),
            ", ".join(of),
        ][: len(header)]
        for run, of in zip(runs, settings, strict=True)
    ]
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            number = name in numbers
            table.add_column(Text(name), justify="right" if number else "left", overflow="fold", no_wrap=number)
        for row in rows:
            table.add_row(*(Text(_printable(cell, console)) for cell in row))
        console.print(table)
    else:
        for row in [header, ["---"] * len(header), *rows]:
            cells = (_printable(cell, console).replace("|", "\\|").replace("\n", " ") for cell in row)
            say(console, f"| {' | '.join(cells)} |")
    for run in runs:
        for problem in run.problems:
            say(console, _printable(f"{run.folder}: {problem}", console))


def _figure(quality: FeatureQuality | None, name: str) -> str:
    if quality is None:
        return ""
    value = getattr(quality, name)
    return f"{value:.1f} of {quality.features}" if name == "effective_rank" else f"{value:.3f}"


def _printable(text: str, console: Console) -> str:
    """Returns text without the characters that the terminal's encoding lacks, such as the bytes of an odd name."""
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)
