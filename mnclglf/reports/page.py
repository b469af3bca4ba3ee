"""Report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mnclglf.reports.figures import (
    DARK,
    LIGHT,
    SMOOTH_ABOVE,
    Drawing,
    Theme,
    health_curves,
    loss_curves,
    schedule_curves,
    views_picture,
)
from mnclglf.reports.pictures import (
    Map,
    combinations_of,
    map_of,
    mistakes_of,
    moments_of,
    queries_of,
)
from mnclglf.reports.quality_page import quality_table
from mnclglf.reports.run_files import RunFiles, read_run
from mnclglf.reports.series import DRAWN_POINTS, finite
from mnclglf.reports.tables import percent, result_table, verdict
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


class Phase(NamedTuple):
    """Phase of a step: its time in words, and its share of the step."""

    name: str
    text: str
    share: float
    color: str


# Records of metrics.jsonl, without "_seconds", their names, and their colors.
PHASES = (
    ("data", "making the views", "var(--third)"),
    ("forward", "forward", "var(--first)"),
    ("backward", "backward", "var(--second)"),
    ("update", "update", "var(--muted)"),
)


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
    return page("report.html.jinja", _context(run))


def page(template: str, context: Mapping[str, Any]) -> str:
    """Returns a page from a template of this folder."""
    environment = Environment(
        loader=FunctionLoader(text_of), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(css=Markup(text_of("page.css")), **context)


def text_of(name: str) -> str:
    """Returns a file of this folder."""
    return importlib.resources.files("mnclglf.reports").joinpath(name).read_text(encoding="utf-8")


def progress(run: RunFiles) -> Progress | None:
    """Returns the progress in the records of a run; None without records."""
    if not len(run.metrics.steps):
        return None
    step = int(run.metrics.steps[-1])
    epoch, epochs = run.metrics.at_the_end("epoch"), finite(_section(run.config, "optim").get("epochs"))
    total = round(epochs * step / epoch) if epoch and epochs else None
    return Progress(step=step, total=total, epoch=epoch, epochs=int(epochs) if epochs else None)


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
    speed = _median(run, "images_per_second")
    if speed is not None:
        lines.append(("Throughput, median", f"{speed:,.0f} images / s"))
    fraction = _median(run, "roofline_fraction")
    if fraction is not None:
        lines.append(("Share of the roofline, median", f"{percent(fraction)} %"))
    memory = run.metrics.of("peak_memory_bytes").values
    if len(memory):
        lines.append(("Peak memory", f"{memory.max() / 2**30:.1f} GiB"))
    share = _waiting_share(run)
    if share is not None:
        lines.append(("Waiting for data", f"{percent(share)} % of the time"))
    elapsed = run.metrics.of("elapsed_seconds").values
    if len(elapsed):
        lines.append(("Time until the last record", _duration(elapsed[-1])))
    return lines


def _waiting_share(run: RunFiles) -> float | None:
    """Returns seconds waited for data over seconds trained, of all records after the first."""
    batch = finite(_section(run.config, "optim").get("batch_size"))
    waits, speeds = run.metrics.of("data_wait_seconds"), run.metrics.of("images_per_second")
    both, of_waits, of_speeds = np.intersect1d(waits.steps, speeds.steps, assume_unique=True, return_indices=True)
    rows = np.searchsorted(run.metrics.steps, both)
    counted = (rows > 0) & (speeds.values[of_speeds] != 0)
    if not batch or not counted.any():
        return None
    rows = rows[counted]
    steps = run.metrics.steps[rows] - run.metrics.steps[rows - 1]
    trained = float((steps * batch / speeds.values[of_speeds][counted]).sum())
    return min(1.0, float(waits.values[of_waits][counted].sum()) / trained) if trained else None


def _median(run: RunFiles, key: str) -> float | None:
    """Returns the median of a figure over all records that have it; None without any."""
    values = run.metrics.of(key).values
    return float(np.median(values)) if len(values) else None


def _context(run: RunFiles) -> dict[str, Any]:
    config = run.config or {}
    results = run.results
    facts = method_facts(run)
    labeled = facts is not None and bool(facts.get("needs_labels"))
    table = result_table(results) if results else None
    picture_map = map_of(run.gallery)
    combined = [] if run.views is None else combinations_of(run.views, _divided_views(run), _patches(run))
    logged = {key for key, series in run.metrics.series.items() if len(series.steps)}
    return {
        "title": f"{config.get('method', 'A run')} on {config['dataset']}" if "dataset" in config else run.folder.name,
        "labeled": labeled,
        "self_supervised": facts is not None and not labeled,
        "dataset": config.get("dataset"),
        "recipe": config.get("recipe"),
        "encoder": _section(config, "model").get("encoder"),
        "seed": config.get("seed"),
        "folder": run.folder.name,
        "path": str(run.folder),
        "state": state_line(run),
        "speed": speed_lines(run),
        "roofline": "roofline_fraction" in logged,
        "table": table,
        "quality": quality_table(run.quality),
        "protocols": {str(result["protocol"]) for result in results},
        "deviations": any(result.get("deviation") is not None for result in results),
        "classes": _classes([result for result in results if result.get("dataset") is None]),
        "measured": _measured_at(run),
        "losses": _losses(run),
        "logged": logged,
        "has_terms": any(key.startswith("loss_") for key in logged),
        "has_level": _uninformed(run) is not None and any(key.startswith("loss_") for key in logged),
        "is_smoothed": len(run.metrics.of("loss").steps) > SMOOTH_ABOVE,
        "thinned": is_thinned(run),
        "health": health_curves(run.metrics),
        "schedule": schedule_curves(run.metrics),
        "phases": _phases(run),
        "limits": _limits(run),
        "verdict": [] if table is None else verdict(table),
        "map": picture_map,
        "map_data": "" if picture_map is None else _map_data(picture_map),
        "script": text_of("map.js"),
        "queries": queries_of(run.gallery),
        "mistakes": mistakes_of(run.gallery),
        "moments": moments_of(run.queue),
        "combined": combined,
        **_seen(run),
        "views": _views(run),
        "view_count": 0 if run.views is None else len(run.views.views),
        "divided_views": _divided_views(run),
        "settings": _groups(run.config, "run"),
        "environment": _groups(_without_facts(run.environment), "machine and software"),
        "unreadable_lines": run.metrics.unreadable_lines,
    }


def is_thinned(run: RunFiles) -> bool:
    """Returns whether the curves of a run leave out points."""
    return len(run.metrics.steps) > DRAWN_POINTS


def method_facts(run: RunFiles) -> dict[str, Any] | None:
    """Returns what the run's method said of itself when it started; None if nothing is known of it."""
    said: object = (run.environment or {}).get("method")
    if isinstance(said, dict):
        return cast("dict[str, Any]", said)
    return FORMER_METHODS.get(str((run.config or {}).get("method")))


def _without_facts(environment: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the environment without what the method said, and with a count in place of the names of weights."""
    shown = {name: value for name, value in (environment or {}).items() if name != "method"}
    weights = _section(shown, "initial_weights")
    if weights:
        shown["initial_weights"] = {"source": weights.get("source"), "tensors": len(weights.get("taken") or ())}
    return shown


def _losses(run: RunFiles) -> list[Drawing] | None:
    return loss_curves(run.metrics, uninformed=_uninformed(run)) if len(run.metrics.steps) else None


def _map_data(shown: Map) -> str:
    """Returns what the map's script reads, as JSON that may stand in a page."""
    names = ("points", "sheet", "columns", "side", "labels")
    return json.dumps({name: getattr(shown, name) for name in names}).replace("<", "\\u003c")


def _phases(run: RunFiles) -> list[Phase]:
    """Returns the phases of a step with their median times."""
    found = [(name, color, _median(run, f"{key}_seconds")) for key, name, color in PHASES]
    medians = [(name, color, seconds) for name, color, seconds in found if seconds is not None]
    total = sum(seconds for *_, seconds in medians)
    return [Phase(name, _milliseconds(seconds), seconds / total, color) for name, color, seconds in medians if total]


def _limits(run: RunFiles) -> list[tuple[str, str, float]]:
    """Returns the parts of the roofline, the longest first: name, time, share of the step that was measured."""
    parts = {name: finite(value) for name, value in _section(run.environment, "roofline_seconds").items()}
    reached = _median(run, "roofline_fraction")
    if not parts or reached is None or None in parts.values():
        return []
    known = {name: value for name, value in parts.items() if value}
    total = sum(known.values())
    rows = sorted(known.items(), key=lambda part: -part[1])
    listed = [(name, _milliseconds(value), reached * value / total) for name, value in rows]
    return [*listed, ("all parts", _milliseconds(total), reached)]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _patches(run: RunFiles) -> int:
    """Returns the number of patches in a combination."""
    k = finite(_section(run.config, "objective").get("k"))
    return int(k) if k else 2


def _seen(run: RunFiles) -> dict[str, str]:
    """Returns how many patches a combination has, in words, and how much of a view they are."""
    counted = {1: "one patch", 2: "two patches", 3: "three patches", 4: "all four patches"}
    parts = {1: "a quarter", 2: "half", 3: "three quarters", 4: "all"}
    k = _patches(run)
    return {"patches_text": counted.get(k, f"{k} patches"), "seen_text": parts.get(k, "a part")}


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
