"""Signals at any time: a training is saved from its first step on, and ends without a traceback before it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.faults import children
from bench.faults.commands import Attacked, Place
from bench.faults.kills import again
from bench.faults.outcome import Row
from bench.faults.processes import ROOT, newest_step
from mnclglf.training.step import TrainStep

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SLOW = 20.0  # seconds of a step that a second signal must end at once


def attack(count: int, seed: int, folder: Path) -> Iterator[Row]:
    """Sends signals to a training, in forked children and, a tenth as often, to processes of their own.

    Args:
        count: signals of each kind at random times.
        seed: of the times.
        folder: an empty folder to work in.
    """
    draw, place = random.Random(seed), Place(folder)
    attacked = place.undisturbed("train")
    row = Row("train: a signal at a random time")
    for number in SIGNALS:
        for _ in range(count):
            after = draw.uniform(0, attacked.seconds)
            row.add(f"{number.name} after {after:.2f} s", signalled(place, attacked, number, after))
    yield row
    row = Row("train: a second signal")
    for number in SIGNALS:
        row.add(number.name, twice(place, attacked, number))
    yield row
    row = Row("train: a signal from the start of the process on")
    for _ in range(max(1, count // 10)):
        for number in SIGNALS:
            after = draw.uniform(0.05, 12)
            row.add(f"{number.name} after {after:.1f} s", started(place, attacked, number, after))
    yield row
    row = Row("train: stdout closed")
    for _ in range(max(1, count // 10)):
        row.add("at a random time", unread(place, attacked, draw.uniform(0, attacked.seconds)))
    yield row


def mark_steps(marker: Path, seconds: float = 0.0) -> None:
    """Makes a file as the first step of this process begins, which then takes so many seconds more."""
    launch = TrainStep.__call__

    def marked(self: TrainStep, *arguments: object, **named: object) -> object:
        if not marker.exists():
            marker.touch()
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # a handler may run in between, as in a step
                time.sleep(0.01)
        return launch(self, *arguments, **named)  # pyright: ignore[reportArgumentType]

    TrainStep.__call__ = marked  # pyright: ignore[reportAttributeAccessIssue]


def signalled(place: Place, attacked: Attacked, number: signal.Signals, after: float) -> list[str]:
    """Sends a signal to a training after so many seconds; returns what is wrong."""
    place.begin(attacked.before)
    marker = place.folder / "marker"
    marker.unlink(missing_ok=True)
    place.log.unlink(missing_ok=True)
    child = children.start(attacked.arguments, place.log, partial(mark_steps, marker))
    time.sleep(after)
    in_steps = marker.exists()
    os.kill(child, number)
    end = children.wait(child, place.log)
    return problems_of(place, end, number, in_steps=in_steps) + again(place, attacked) + left_of(child)


def problems_of(place: Place, end: children.End, number: int, *, in_steps: bool) -> list[str]:
    """Returns what is wrong with the end of a training that got a signal."""
    if "Traceback" in end.text:
        return [f"traceback: {end.text.strip()[-400:]}"]
    if end.code == 0 and newest_step(place.work / "run") == 12:
        return []  # it was at its end
    if end.code == 128 + number:
        return [] if newest_step(place.work / "run") else ["ended as saved, and has no checkpoint"]
    if in_steps and not newest_step(place.work / "run"):
        return [f"not saved, ended with {end.code}"]
    return [] if end.code != 0 else ["ended with 0"]


def left_of(child: int) -> list[str]:
    """Returns what an ended process has left: processes of its group, and shared memory."""
    lost = [f"/dev/shm/{path.name}" for path in Path("/dev/shm").iterdir() if str(child) in path.name]
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        lost += [f"process {status.parent.name}"] if parent == child else []
    return lost


def twice(place: Place, attacked: Attacked, number: signal.Signals) -> list[str]:
    """Sends a signal twice within a step that takes long; returns what is wrong."""
    place.begin(attacked.before)
    marker = place.folder / "marker"
    marker.unlink(missing_ok=True)
    place.log.unlink(missing_ok=True)
    child = children.start(attacked.arguments, place.log, partial(mark_steps, marker, SLOW))
    while not marker.exists():
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(child, number)
    time.sleep(0.2)
    os.kill(child, number)
    end = children.wait(child, place.log)
    problems = [] if end.code == -number else [f"ended with {end.code}"]
    if time.monotonic() - began > SLOW / 2:
        problems.append("not at once")
    return problems + again(place, attacked)


def started(place: Place, attacked: Attacked, number: signal.Signals, after: float) -> list[str]:
    """Sends a signal to a process of its own that trains, so many seconds after its start; returns what is wrong."""
    place.begin(attacked.before)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with place.log.open("wb") as log:
        command = [sys.executable, "-m", "mnclglf", *attacked.arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        time.sleep(after)
        process.send_signal(number)
        end = children.End(process.wait(children.SECONDS), place.log.read_text())
    return problems_of(place, end, number, in_steps=False) + left_of(process.pid)


def unread(place: Place, attacked: Attacked, after: float) -> list[str]:
    """Closes the pipe that a training prints to, after so many seconds; returns what is wrong."""
    place.begin(attacked.before)
    reader, writer = os.pipe()

    def print_to_pipe() -> None:
        os.close(reader)
        os.dup2(writer, 1)
        os.close(writer)

    place.log.unlink(missing_ok=True)
    child = children.start(attacked.arguments, place.log, print_to_pipe)
    os.close(writer)
    time.sleep(after)
    os.close(reader)
    end = children.wait(child, place.log)
    ended = [] if end.code == 0 else [f"ended with {end.code}: {end.text.strip()[-300:]}"]
    return ended + again(place, attacked)
