"""Report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import importlib.resources
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import Environment, StrictUndefined

from mnclglf.reports.figures import (
    DARK,
    LIGHT,
    SMOOTH_ABOVE,
    Theme,
    health_curves,
    loss_curves,
    schedule_curves,
    series,
    views_picture,
)
from mnclglf.reports.run_files import RunFiles, finite, read_run
from mnclglf.reports.tables import percent, result_table
from mnclglf.runs.files import write_atomically
from mnclglf.runs.locks import writing_in

# What each released method says of itself in environment.json, for runs of before it was written there. A new method
# needs no row.
FORMER_METHODS: dict[str, dict[str, Any]] = {
    "mnclglf": {"divided_views": [1, 3], "batch_candidates": True},
    "mnclglf_official": {"divided_views": [1, 2]},
    "supervised": {"needs_labels": True},
    "nnclr": {"batch_candidates": True},
    "fast_moco": {"divided_views": [1, 2], "batch_candidates": True},
    **{name: {} for name in ("simclr", "mocov2", "simsiam", "byol")},
}


class Picture(NamedTuple):
    """Figure in both color schemes, as base64 PNG."""

    light: str
    dark: str


class Group(NamedTuple):
    """Settings under one heading, as text."""

    title: str
    rows: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Steps that a run has done, and its total."""

    step: int
    total: int | None
    """Steps of the whole run; None if config.json or the epochs of the records are missing."""
    epoch: float | None
    epochs: int | None

    @property
    def finished(self) -> bool:
        """Returns whether the last step was logged; every run logs it."""
        return self.total is not None and self.step >= self.total


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from the other files of the run directory; missing ones are left out.

    Returns:
        The path of the report.

    Raises:
        NotADirectoryError: there is no such directory.
        ValueError: a file is there but damaged; the message names it.
    """
    path = run_dir / "report.html"
    with writing_in(run_dir):  # a process that read before another one wrote would overwrite a newer report
        page = render(read_run(run_dir))
        write_atomically(path, lambda file: file.write(page.encode()))
    return path


def render(run: RunFiles) -> str:
    """Returns the page of a run."""
    source = importlib.resources.files("mnclglf.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    return environment.from_string(source).render(**_context(run))


def progress(run: RunFiles) -> Progress | None:
    """Returns the progress in the records of a run; None without records."""
    if not run.records:
        return None
    last = run.records[-1]
    epoch, epochs = finite(last.get("epoch")), finite(_section(run.config, "optim").get("epochs"))
    total = round(epochs * last["step"] / epoch) if epoch and epochs else None
    return Progress(step=last["step"], total=total, epoch=epoch, epochs=int(epochs) if epochs else None)


def state_line(run: RunFiles) -> str:
    """Returns one sentence that says whether the run is done."""
    reached = progress(run)
    broken = run.nonfinite_step
    if broken is not None and (reached is None or broken >= reached.step):
        return f"Stopped at step {broken:,}: a loss or a gradient was not finite (nonfinite.json has the images)."
    if reached is None:
        return "Nothing logged yet."
    if reached.total is None or reached.epoch is None:
        return f"{reached.step:,} steps logged; how many the run has is not known without config.json."
    if reached.finished:
        epochs = "1 epoch" if reached.epochs == 1 else f"{reached.epochs} epochs"
        return f"Finished: {reached.step:,} of {reached.total:,} steps, {epochs}."
    return (
        f"Not finished, interrupted or still training: {reached.step:,} of {reached.total:,} steps, "
        f"epoch {reached.epoch:.1f} of {reached.epochs}."
    )


def speed_lines(run: RunFiles) -> list[tuple[str, str]]:
    """Returns throughput, memory, waiting and elapsed time in words, those that were logged."""
    lines: list[tuple[str, str]] = []
    speeds = series(run.records, "images_per_second")[1]
    if speeds:
        lines.append(("Throughput, median", f"{statistics.median(speeds):,.0f} images / s"))
    fractions = series(run.records, "roofline_fraction")[1]
    if fractions:
        lines.append(("Share of the roofline, median", f"{percent(statistics.median(fractions))} %"))
    memory = series(run.records, "peak_memory_bytes")[1]
    if memory:
        lines.append(("Peak memory", f"{max(memory) / 2**30:.1f} GiB"))
    share = _waiting_share(run)
    if share is not None:
        lines.append(("Waiting for data", f"{percent(share)} % of the time"))
    elapsed = series(run.records, "elapsed_seconds")[1]
    if elapsed:
        lines.append(("Time until the last record", _duration(elapsed[-1])))
    return lines


def _waiting_share(run: RunFiles) -> float | None:
    """Returns seconds waited for data over seconds trained, of all records after the first."""
    batch = finite(_section(run.config, "optim").get("batch_size"))
    waited = trained = 0.0
    for before, record in pairwise(run.records):
        wait, speed = finite(record.get("data_wait_seconds")), finite(record.get("images_per_second"))
        if batch and wait is not None and speed:
            waited += wait
            trained += (record["step"] - before["step"]) * batch / speed
    return min(1.0, waited / trained) if trained else None


def _context(run: RunFiles) -> dict[str, Any]:
    config = run.config or {}
    results = run.results
    facts = method_facts(run)
    labeled = facts is not None and bool(facts.get("needs_labels"))
    logged = {key for record in run.records for key, value in record.items() if finite(value) is not None}
    return {
        "title": f"{config.get('method', 'A run')} on {config['dataset']}" if "dataset" in config else run.folder.name,
        "labeled": labeled,
        "self_supervised": facts is not None and not labeled,
        "dataset": config.get("dataset"),
        "recipe": config.get("recipe"),
        "seed": config.get("seed"),
        "folder": run.folder.name,
        "path": str(run.folder),
        "state": state_line(run),
        "speed": speed_lines(run),
        "roofline": bool(series(run.records, "roofline_fraction")[1]),
        "table": result_table(results) if results else None,
        "protocols": {str(result["protocol"]) for result in results},
        "deviations": any(result.get("deviation") is not None for result in results),
        "classes": _classes(results),
        "measured": _measured_at(run),
        "losses": _losses(run),
        "logged": logged,
        "has_terms": any(key.startswith("loss_") for key in logged),
        "has_level": _uninformed(run) is not None and any(key.startswith("loss_") for key in logged),
        "is_smoothed": len(series(run.records, "loss")[0]) > SMOOTH_ABOVE,
        "momentum_changes": len(set(series(run.records, "ema_momentum")[1])) > 1,
        "health": _picture(lambda theme: health_curves(run.records, theme=theme)) if run.records else None,
        "schedule": _picture(lambda theme: schedule_curves(run.records, theme=theme)) if run.records else None,
        "views": _views(run),
        "view_count": 0 if run.views is None else len(run.views.views),
        "divided_views": _divided_views(run),
        "settings": _groups(run.config, "run"),
        "environment": _groups(_without_facts(run.environment), "machine and software"),
        "unreadable_lines": run.unreadable_lines,
    }


def method_facts(run: RunFiles) -> dict[str, Any] | None:
    """Returns what the run's method said of itself when it started; None if nothing is known of it."""
    said: object = (run.environment or {}).get("method")
    if isinstance(said, dict):
        return cast("dict[str, Any]", said)
    return FORMER_METHODS.get(str((run.config or {}).get("method")))


def _without_facts(environment: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (environment or {}).items() if name != "method"}


def _losses(run: RunFiles) -> Picture | None:
    if not run.records:
        return None
    return _picture(lambda theme: loss_curves(run.records, uninformed=_uninformed(run), theme=theme))


def _uninformed(run: RunFiles) -> float | None:
    """Returns the value of each term of the loss while all candidates look alike; None if the terms differ in it."""
    batch = finite(_section(run.config, "optim").get("batch_size"))
    return math.log(batch) if batch and (method_facts(run) or {}).get("batch_candidates") else None


def _views(run: RunFiles) -> Picture | None:
    views = run.views
    if views is None or not views.views.size or not views.images.size:
        return None
    return _picture(lambda theme: views_picture(*views, divided_views=_divided_views(run), theme=theme))


def _divided_views(run: RunFiles) -> tuple[int, ...]:
    """Returns the numbers of the views, from 1, that the run's method cuts into patches."""
    numbers: object = (method_facts(run) or {}).get("divided_views")
    listed = cast("list[object]", numbers) if isinstance(numbers, list) else []
    return tuple(number for number in listed if isinstance(number, int) and number > 0)


def _picture(draw: Callable[[Theme], bytes]) -> Picture:
    return Picture(*(base64.b64encode(draw(theme)).decode() for theme in (LIGHT, DARK)))


def _classes(results: list[dict[str, Any]]) -> int | None:
    """Returns the number of classes if all results agree on it, else None."""
    numbers = {finite(_section(result, "settings").get("classes")) for result in results}
    number = numbers.pop() if len(numbers) == 1 else None
    return int(number) if number else None


def _measured_at(run: RunFiles) -> str | None:
    """Returns a warning if results of the newest checkpoint are from an earlier step than the last one logged."""
    reached = progress(run)
    newest = [result for result in run.results if result.get("epoch") is None]
    steps = [finite(_section(result, "settings").get("step")) for result in newest]
    known = [int(step) for step in steps if step is not None]
    if reached is None or not known or min(known) >= reached.step:
        return None
    return (
        f"Some of these numbers are of the checkpoint after step {min(known):,}; the run has reached step "
        f"{reached.step:,} since."
    )


def _section(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    section = (values or {}).get(name)
    return cast("dict[str, Any]", section) if isinstance(section, dict) else {}


def _groups(values: Mapping[str, Any] | None, title: str) -> list[Group]:
    """Returns plain values under `title`, and one group per dict among them; deeper dicts get dotted names."""
    if not values:
        return []
    groups = [Group(title, [(name, _text(v)) for name, v in values.items() if not isinstance(v, dict)])]
    groups += [Group(name, _flat(cast("dict[str, Any]", v))) for name, v in values.items() if isinstance(v, dict)]
    return [group for group in groups if group.rows]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _text(value)))
    return rows


def _text(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in cast("list[object]", value))
    return str(value)


def _duration(seconds: float) -> str:
    """Returns seconds as "2 h 05 min", "12 min 30 s" or "45 s"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"
