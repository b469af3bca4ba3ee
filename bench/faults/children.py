"""Commands of mnclglf in forked children: each starts in milliseconds, as the parent has imported everything.

The parent computes nothing with torch, so that no thread of it is missing in a child. Three things of a child are not
those of a user's process: the report is the text of what it would draw (`drawn`), as drawing takes seconds and reads
nothing; the roofline is not measured; and the machine is described once.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from mnclglf.__main__ import main
from mnclglf.cli import parse
from mnclglf.reports import page
from mnclglf.reports.run_files import RunFiles
from mnclglf.training import describe, loop

SECONDS = 120.0  # after which a command counts as hung
HUNG = -signal.SIGKILL


class End(NamedTuple):
    """How a command ended."""

    code: int
    """Its exit code; -N if signal N killed it."""
    text: str
    """What it printed."""


def prepare(*commands: Sequence[str]) -> None:
    """Makes this process ready to fork children: imports what commands import, and parses such commands once."""
    torch.set_num_threads(1)
    for name in ("api", "commands.train", "training.memory", "training.roofline"):
        importlib.import_module(f"mnclglf.{name}")
    importlib.import_module("sklearn.manifold")
    page.render = drawn
    loop.describe_limits = lambda *_: None
    described = describe.describe_environment(torch.device("cpu"), {})
    describe.describe_environment = lambda _, chosen: {**described, **chosen}
    gc.freeze()  # else a collection in a child copies the memory of the parent
    for command in commands:
        parse(command)  # which reads the help of all settings from the source, once in a process


def drawn(run: RunFiles) -> str:
    """Returns what the report of a run draws, as text."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else str(value)

    return json.dumps(dataclasses.asdict(run), default=plain, indent=1)


def start(arguments: Sequence[str], log: Path, before: Callable[[], object] = lambda: None) -> int:
    """Starts a command in a child, whose output goes to `log`; `before` runs in the child first.

    Returns:
        The number of the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run(arguments, log, before)
    return child


def _run(arguments: Sequence[str], log: Path, before: Callable[[], object]) -> NoReturn:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))  # those of a test are others
        sys.argv = ["mnclglf", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it starts with &
        before()
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # as at the end of a process
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def wait(child: int, log: Path, seconds: float = SECONDS) -> End:
    """Waits for a child; kills one that hangs."""
    deadline = time.monotonic() + seconds
    log.touch()  # a child may be killed before it makes it
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return End(HUNG, f"hung after {seconds:.0f} s\n{log.read_text(errors='replace')}")
        time.sleep(0.002)
    return End(os.waitstatus_to_exitcode(found[1]), log.read_text(errors="replace"))


def run(arguments: Sequence[str], log: Path, before: Callable[[], object] = lambda: None) -> End:
    """Runs a command in a child."""
    log.unlink(missing_ok=True)
    return wait(start(arguments, log, before), log)
