"""Loggers: what other programs show of a run, beside its own metrics.jsonl. One file per logger, one row in LOGGERS.

A logger is named by --loggers and opened before the first step. From then on each works in a thread of its own, so that
no step waits for it, and one that fails is left out with a warning: it never stops a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import RunConfig, UsageError, to_dict
from mnclglf.runs.files import read_object, write_json
from mnclglf.runs.metrics import last_record
from mnclglf.runs.results import Result, changed_settings

CLOSE_SECONDS = 60.0  # for a logger to write what is left at the end
MOST_WAITING = 10_000  # calls that a logger has not made yet, 3 KB each
IDS = "loggers.json"  # in the run directory: what a resumed run goes on with


class Logger(Protocol):
    """What a logger does; any call may raise, and may take its time."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes finite figures of a step."""
        ...

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        """Writes images [n, H, W, 3]."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a logger knows of the run as it is opened."""

    folder: Path
    """Run directory."""
    settings: Mapping[str, Any]
    """Every setting by its name."""
    start: int | None
    """Steps behind the training that goes on here: 0 begins anew. None: only to add the results of an evaluation."""
    written: int
    """Last step that was written before; a step beyond `start` and up to it is not to be written twice."""

    def known_id(self, logger: str) -> str | None:
        """Returns the logger's own name of this run, if the run goes on; None if it begins anew."""
        return None if self.start == 0 else self._ids().get(logger)

    def keep_id(self, logger: str, value: str) -> None:
        """Keeps the logger's own name of this run for later."""
        write_json(self.folder / IDS, {**self._ids(), logger: value})

    def _ids(self) -> dict[str, Any]:
        try:
            return read_object(self.folder / IDS) or {}
        except ValueError:  # damaged: the logger begins anew
            return {}


def _tensorboard() -> Callable[[Opening], Logger]:
    from mnclglf.runs.loggers.tensorboard import TensorBoard

    return TensorBoard


def _wandb() -> Callable[[Opening], Logger]:
    from mnclglf.runs.loggers.wandb import Wandb

    return Wandb


def _mlflow() -> Callable[[Opening], Logger]:
    from mnclglf.runs.loggers.mlflow import Mlflow

    return Mlflow


LOGGERS: dict[str, Callable[[], Callable[[Opening], Logger]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""The import of each logger, by its name; the extra that installs what it needs has the same name."""
AUTO = "tensorboard"  # what auto takes, where it is installed


def check_loggers(names: Iterable[str]) -> None:
    """Imports the named loggers.

    Raises:
        UsageError: a package is missing or cannot be imported; the message has the command that installs it.
    """
    for name in names:
        if name != "auto" and (problem := _missing(name)) is not None:
            raise UsageError(
                f"logger {name} cannot run here: {problem}; pip install 'mnclglf[{name}]', or leave it out of --loggers"
            )


def _missing(name: str) -> str | None:
    try:
        LOGGERS[name]()
    except Exception as error:  # what an import of another project raises is its own affair
        return f"{type(error).__name__}: {error}"
    return None


class Loggers:
    """Open loggers, each in a thread of its own.

    Args:
        opened: the loggers by name.
        say: prints a warning.
    """

    def __init__(self, opened: Mapping[str, Logger], say: Callable[[str], object]) -> None:
        self.say = say
        self.workers = {name: _Worker(name, logger, say) for name, logger in opened.items()}

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes those of the figures of a step that are finite numbers."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        for worker in self.workers.values():
            worker.put(lambda logger: logger.scalars(step, numbers))

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        """Writes images [n, H, W, 3]."""
        for worker in self.workers.values():
            worker.put(lambda logger: logger.images(step, name, images))

    def close(self) -> None:
        """Waits until all is written, but not forever for a server that does not answer."""
        for worker in self.workers.values():
            worker.calls.put(None)
        for name, worker in self.workers.items():
            worker.join(CLOSE_SECONDS)
            if worker.is_alive():
                self.say(f"logger {name} did not end within {CLOSE_SECONDS:.0f} s; what it had not written is lost")


class _Worker(Thread):
    """Calls one logger, in order, until None stands for its end."""

    def __init__(self, name: str, logger: Logger, say: Callable[[str], object]) -> None:
        super().__init__(name=f"logger {name}", daemon=True)  # a hanging one does not keep the process
        self.calls: SimpleQueue[Callable[[Logger], None] | None] = SimpleQueue()
        self.logger, self.say = logger, say
        self.failed = self.behind = False
        self.start()

    def put(self, call: Callable[[Logger], None]) -> None:
        """Hands over a call; not to a logger that failed, nor to one that hangs, as the calls that wait hold memory."""
        if not self.behind and self.calls.qsize() >= MOST_WAITING:
            self.behind = True
            self.say(f"{self.name} does not keep up: it gets no more than the {MOST_WAITING:,} calls that wait for it")
        if not (self.failed or self.behind):
            self.calls.put(call)

    def run(self) -> None:
        for call in iter(self.calls.get, None):
            self._call(call)
        self._call(lambda logger: logger.close())

    def _call(self, call: Callable[[Logger], None]) -> None:
        if self.failed:
            return
        try:
            call(self.logger)
        except Exception as error:  # any of another project's; the run is worth more than its pictures
            self.failed = True
            self.say(f"{self.name} failed, and the run goes on without it: {type(error).__name__}: {error}")


def open_loggers(
    names: Iterable[str],
    folder: Path,
    config: RunConfig,
    *,
    start: int | None,
    say: Callable[[str], object],
    lenient: bool = False,
) -> Loggers:
    """Opens loggers for a run.

    Args:
        names: names of LOGGERS, or "auto" for TensorBoard where it is installed.
        folder: run directory.
        config: the run.
        start: steps behind the training that goes on here; None to add the results of an evaluation.
        say: prints a warning.
        lenient: warn of a logger that cannot be opened.

    Raises:
        UsageError: a named logger cannot be opened.
    """
    record = last_record(folder / "metrics.jsonl") or {"step": 0}
    opening = Opening(
        folder=folder.resolve(), settings=_flat(to_dict(config)), start=start, written=record["step"] if start else 0
    )
    opened: dict[str, Logger] = {}
    for given in dict.fromkeys(names):
        name = AUTO if given == "auto" else given
        if name in opened or (given == "auto" and _missing(name) is not None):
            continue
        try:
            opened[name] = LOGGERS[name]()(opening)
        except Exception as error:
            text = f"logger {name} cannot be opened for {folder} ({type(error).__name__}: {error})"
            if given != "auto" and not lenient:
                raise UsageError(f"{text}; fix that, or leave it out of --loggers") from error
            say(f"{text}; going on without it")
    return Loggers(opened, say)


def log_results(folder: Path, config: RunConfig, results: Iterable[Result], say: Callable[[str], object]) -> None:
    """Adds the accuracies of an evaluation to the run's loggers; what cannot be added is named in a warning."""
    loggers = open_loggers(config.engine.loggers, folder, config, start=None, say=say, lenient=True)
    newest = (last_record(folder / "metrics.jsonl") or {"step": 0})["step"]
    for result in results:
        step = result.settings.get("step")
        loggers.scalars(step if isinstance(step, int) else newest, {name_of(result): result.top1})
    loggers.close()


def name_of(result: Result) -> str:
    """Returns the name of an accuracy, e.g. "top1/knn/pretrained" or "top1/knn/pretrained/k 5"."""
    parts = ["top1", result.protocol, result.representation]
    parts += [result.split] if result.split != "test" else []
    parts += [f"label_share {result.label_share:g}"] if result.label_share != 1 else []
    parts += [f"{name} {value}" for name, value in changed_settings(result.protocol, result.settings).items()]
    return "/".join(parts)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of all sections by their names, with lists as text."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value)
        else:
            flat[name] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat
