"""Feeds damaged and hostile inputs to everything that reads: files, settings, run directories, command lines.

An input is drawn by its kind, the seed and its number, so each can be made again. It must be read, or refused with an
error whose message is for the user. An input is lost if it leads to a traceback, a crash, no end within SECONDS, an
error without words, more memory than LARGEST, or code run from it. Bombs ask for much by a small file.

Inputs are read in child processes, so that a crash or a hang ends one of them; the next one goes on after the input.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from bench.faults.bombs import BOMBS
from bench.faults.corpus import READERS
from mnclglf.cli import parse, settings_of
from mnclglf.commands import COMMANDS
from mnclglf.commands.ranks import error_text, exit_code_of
from mnclglf.config import SECTIONS, RunConfig, to_dict
from mnclglf.data.sources.patterns import expand_braces
from mnclglf.recipes import RECIPES
from mnclglf.reports.overview import print_overview, read_summary, to_json
from mnclglf.reports.page import render
from mnclglf.reports.run_files import read_run
from mnclglf.runs.checkpoint import load_checkpoint, save_checkpoint
from mnclglf.runs.files import read_config
from mnclglf.runs.results import VERSION
from mnclglf.settings import run_config
from mnclglf.training.initial_weights import read_pickle, read_safetensors

SECONDS = 20  # for one input
LARGEST = 256 * 2**20  # bytes that the inputs of a process may take, all together
PART = 500  # inputs of a process
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63), -(10**30), 0.5,
    -0.0, 1e-320, 1e38, 1e39, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), "", " ", "0", "nan", "auto",
    "none", "None", "../..", "/", "/dev/null", "a\0b", "\udcff", "\u202e", "\n", "\x1b[31m", "[red]", "%s", "{0}",
    "x" * 5000, [], [1], ["a"], [[]], [None, 1], {}, {"a": 1}, {"": None}, [0.5, 1.0], [1.0, 0.5], "9" * 5000,
)  # fmt: skip
"""Values that stand where others belong."""


class Tally(NamedTuple):
    """What became of the inputs of a kind."""

    kind: str
    tried: int
    read: int
    refused: int
    seconds: float
    lost: list[str]
    """Number of each input that was lost, and what happened."""


class Lost(Exception):
    """An input did what none may do."""


def attack(counts: dict[str, int], seed: int) -> Iterator[Tally]:
    """Yields the tally of each kind after so many inputs."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        for kind, count in counts.items():
            place = Path(folder) / "inputs"
            since = time.monotonic()
            read, refused, lost = 0, 0, list[str]()
            start = 0
            while start < count:
                stop = min(start + PART, count)
                ended = _in_child(kind, seed, start, stop, place)
                read += ended.read
                refused += ended.refused
                lost += ended.lost
                start = ended.next
            yield Tally(kind, count, read, refused, time.monotonic() - since, lost)


class _Ended(NamedTuple):
    read: int
    refused: int
    lost: list[str]
    next: int


def _in_child(kind: str, seed: int, start: int, stop: int, place: Path) -> _Ended:
    """Feeds the inputs from `start` to `stop` to a child process, or up to the one that ends it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            with os.fdopen(writing, "w", buffering=1) as told:
                _feed(kind, seed, start, stop, place, told)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as heard:
        lines = heard.read().splitlines()
    _, status = os.waitpid(child, 0)
    verdicts = [json.loads(line) for line in lines]
    read, refused = verdicts.count("read"), verdicts.count("refused")
    lost = [f"{start + at}: {told}" for at, told in enumerate(verdicts) if told not in ("read", "refused")]
    following = start + len(verdicts)
    if following < stop and status:  # else it ended after the input that took much memory
        ended = "no end" if os.WTERMSIG(status) == signal.SIGALRM else f"the process ended, status {status}"
        lost.append(f"{following}: {ended}")
        following += 1
    return _Ended(read, refused, lost, following)


def _feed(kind: str, seed: int, start: int, stop: int, place: Path, told: io.TextIOBase) -> None:
    """Reads inputs and writes a line per input: read, refused, or what was lost."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = 2**22  # an image takes the memory that its header asks for
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    os.chdir(place)
    marker = place.parent / "marker"
    os.environ["MARKER"] = str(marker)
    make = KINDS[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(start, stop):
        signal.alarm(SECONDS)
        try:
            verdict = _judge(make, random.Random(f"{kind} {seed} {number}"), place)
        except Lost as error:
            verdict = str(error)
        signal.alarm(0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > LARGEST:
            verdict = f"{grown / 2**20:,.0f} MiB more"
        if marker.exists():
            verdict = "code was run"
            marker.unlink()
        told.write(json.dumps(verdict) + "\n")
        if grown > LARGEST:  # the peak does not fall again: go on in another process
            return


def _judge(make: Callable[[random.Random, Path], None], draw: random.Random, place: Path) -> str:
    """Returns what became of an input: read, refused, or what was lost."""
    try:
        make(draw, place)
    except Lost:
        raise
    except SystemExit as stop:
        return "refused" if stop.code in (0, 2) else f"exit status {stop.code}"
    except Exception as error:
        code, text = exit_code_of(error), error_text(error)
        if code is None or isinstance(error, RecursionError | UnicodeError | MemoryError):
            at = error.__traceback__
            while at and at.tb_next:
                at = at.tb_next
            where = f"{at.tb_frame.f_code.co_filename.rpartition('/')[2]}:{at.tb_lineno}" if at else ""
            return f"{type(error).__name__} in {where}: {text[:120]}"
        return "refused" if text.strip() else f"{type(error).__name__} without a message"
    return "read"


def damaged(draw: random.Random, whole: bytes, most: int = 5) -> bytes:
    """Returns contents with changes: bits flipped, bytes set, removed, inserted, doubled, the end cut off."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, most)):
        if not data:
            break
        at, length = draw.randrange(len(data)), draw.choice([1, 2, 4, 8, 64])
        change = draw.choice(["flip", "flip", "set", "cut out", "put in", "double", "end"])
        if change == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif change == "set":
            data[at : at + length] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"9", b"{", b"["]) * length
        elif change == "cut out":
            del data[at : at + length]
        elif change == "put in":
            data[at:at] = draw.randbytes(length)
        elif change == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def _reader(kind: str) -> Callable[[random.Random, Path], None]:
    whole, name, read = READERS[kind]

    def one(draw: random.Random, place: Path) -> None:
        path = place / "inside" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        start = whole[: draw.randrange(40)]
        data = damaged(draw, whole) if draw.random() < 0.8 else start + draw.randbytes(draw.randrange(400))
        path.write_bytes(data)
        before = sorted(os.listdir(place))
        try:
            read(path)
        except ValueError as error:
            if exit_code_of(error) is not None and path.name not in str(error):
                raise Lost(f"the file is not named: {error}") from error
            raise
        finally:
            shutil.rmtree(place / "inside" / "made", ignore_errors=True)
            path.unlink(missing_ok=True)
        if sorted(os.listdir(place)) != before:
            raise Lost("something was written outside")

    return one


def changed(draw: random.Random, value: Any) -> Any:
    """Returns JSON with one to three values replaced, removed, renamed or moved."""
    made = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        at, deep = made, draw.randint(1, 4)
        while deep and isinstance(at, dict | list) and len(at):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = draw.choice(cast("Sequence[Any]", keys))
            inside = at[key]
            if deep == 1 or not isinstance(inside, dict | list) or not inside:
                how = draw.random()
                if how < 0.75:
                    at[key] = copy.deepcopy(draw.choice(HOSTILE))
                elif how < 0.85:
                    del at[key]
                elif isinstance(at, dict):
                    at[str(draw.choice(HOSTILE))] = at.pop(key)
                else:
                    at.append(copy.deepcopy(inside))
                break
            at, deep = inside, deep - 1
    return made if draw.random() < 0.97 else draw.choice(HOSTILE)


def _text(draw: random.Random, value: Any) -> bytes:
    """Returns changed JSON as text, sometimes damaged besides."""
    data = json.dumps(changed(draw, value)).encode(errors="surrogatepass")
    return data if draw.random() < 0.7 else damaged(draw, data)


@cache
def _config() -> dict[str, Any]:
    return to_dict(RECIPES["quick"]("mnclglf", "digits"))


def _yaml(value: dict[str, Any]) -> str:
    lines: list[str] = []
    for name, inside in value.items():
        if isinstance(inside, dict) and inside:
            lines.append(f"{name}:")
            lines += [f"  {key}: {json.dumps(kept)}" for key, kept in inside.items()]
        else:
            lines.append(f"{name}: {json.dumps(inside)}")
    return "\n".join(lines) + "\n"


YAML_PIECES = (
    "&a ", "*a", "<<: *a", "!!python/object/apply:os.system ['touch $MARKER']", "!!binary aGVsbG8=", "? ", "- ",
    "---\n", "...\n", "%YAML 1.1\n", "|\n", ">\n", "{a: ", "[", "]", "}", "\t", "2024-01-01", "0x7fffffffffffffffff",
    "1_000", "~", "!!set {a}", "!!omap [a: 1]", "0o17", ".inf", "-.inf", ".nan", "1:30", "yes", "\u2028", "\ufeff",
    "'", '"',
)  # fmt: skip


def settings_file(draw: random.Random, place: Path) -> None:
    """Reads a changed file of settings, YAML or JSON."""
    value = changed(draw, _config())
    if draw.random() < 0.4:
        path, data = place / "run.json", _text(draw, _config())
    else:
        path = place / "run.yaml"
        text = _yaml(value) if isinstance(value, dict) else json.dumps(value)
        for _ in range(draw.randrange(3)):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(YAML_PIECES) + text[at:]
        data = text.encode(errors="surrogatepass")
        data = damaged(draw, data, 2) if draw.random() < 0.3 else data
    path.write_bytes(data)
    run_config({}, path)


def settings_of_python(draw: random.Random, place: Path) -> None:
    """Makes a run from hostile keywords, as mnclglf.train takes them."""
    names = [field.name for kind in (RunConfig, *SECTIONS.values()) for field in fields(kind)]
    run_config({draw.choice(names): draw.choice(HOSTILE) for _ in range(draw.randint(1, 3))})


@cache
def _results() -> dict[str, Any]:
    result = dict(
        protocol="knn", representation="pretrained", dataset=None, split="test", label_share=1.0, epoch=None, top1=0.5,
        top5=0.9, deviation=None, settings={"k": 20, "temperature": 0.07, "train_images": 100, "note": "x"},
    )  # fmt: skip
    return {"version": VERSION, "results": [result, {**result, "protocol": "logistic", "representation": "untrained"}]}


@cache
def _run_files() -> dict[str, Any]:
    record = dict(
        step=10, epoch=0.5, loss=3.0, loss_s=1.0, loss_m=2.0, lr=0.1, images_per_second=100.0, data_wait_seconds=0.1,
        elapsed_seconds=5.0, peak_memory_bytes=10**9, roofline_fraction=0.5, forward_seconds=0.1, backward_seconds=0.2,
    )  # fmt: skip
    quality = dict(
        representation="pretrained", dataset=None, split="test", images=100, step=30, epoch=None, alignment=0.5,
        uniformity=-2.0, effective_rank=10.0, features=64,
    )  # fmt: skip
    return {
        "config.json": _config(),
        "evaluation.json": _results(),
        "environment.json": {"python": "3.12", "torch": "2.9", "device": "cpu", "packages": {"numpy": "2"}},
        "quality.json": {"version": 1, "results": [quality]},
        "nonfinite.json": {"step": 7, "images": [1, 2]},
        "metrics.jsonl": [{**record, "step": step, "epoch": step / 20} for step in (10, 20, 30)],
    }


def run_directory(draw: random.Random, place: Path) -> None:
    """Reads a run directory of which a file is changed: as the list of runs, the report and an evaluation read it."""
    run = place / "run"
    run.mkdir(exist_ok=True)
    broken = draw.choice(list(_run_files()))
    for name, value in _run_files().items():
        if name == "metrics.jsonl":
            lines = [_text(draw, row) if name == broken else json.dumps(row).encode() for row in value]
            data = b"\n".join(lines) + b"\n"
        else:
            data = _text(draw, value) if name == broken else json.dumps(value).encode()
        (run / name).write_bytes(data)
    summary = read_summary(run)
    print_overview([summary], place, Console(file=io.StringIO(), width=draw.choice([1, 40, 200])))
    json.dumps(to_json(summary))
    problems: list[Exception] = []
    draws_page = draw.random() < 0.1  # its figures take most of a second
    for read in (read_config, (lambda folder: render(read_run(folder))) if draws_page else read_run):
        try:
            read(run)
        except ValueError as error:
            problems.append(error)
    if problems:
        raise problems[0]


@cache
def _checkpoint() -> bytes:
    generator = torch.Generator().manual_seed(0)
    method = {f"layer{at}.weight": torch.randn(8, 8, generator=generator) for at in range(6)}
    state = dict(config=json.dumps(_config()), method=method, mean=torch.zeros(3), std=torch.ones(3), side=16)
    with tempfile.TemporaryDirectory() as folder:
        return save_checkpoint(Path(folder), 4, {**state, "steps_per_epoch": 4}).read_bytes()


def checkpoint(draw: random.Random, place: Path) -> None:
    """Reads a damaged checkpoint; numbers that differ from those written count as lost."""
    path = place / "step-00000004.pt"
    data = damaged(draw, _checkpoint(), 3)
    path.write_bytes(data)
    state = load_checkpoint(path)
    if data != _checkpoint() and not torch.equal(state["method"]["layer0.weight"], _weight()):
        raise Lost("loads other numbers")


@cache
def _weight() -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


@cache
def _weights(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"weights{kind}"
        weights = {f"layer{at}.weight": torch.full((4, 4), float(at)) for at in range(4)}
        (torch.save if kind == ".pt" else save_file)(weights, path)  # pyright: ignore[reportArgumentType]
        return path.read_bytes()


def initial_weights(draw: random.Random, place: Path) -> None:
    """Reads a damaged file of weights, as --init takes it."""
    kind, read = draw.choice([(".pt", read_pickle), (".safetensors", read_safetensors)])
    path = place / f"weights{kind}"
    path.write_bytes(damaged(draw, _weights(kind), 3))
    read(path)


def pattern(draw: random.Random, place: Path) -> None:
    """Expands a pattern of files."""
    pieces = [
        "{",
        "}",
        ",",
        "..",
        "0",
        "9" * draw.randint(1, 30),
        "0000",
        "a",
        "*",
        "?",
        "[",
        "]",
        "/",
        "-",
        "\0",
        "é",
        ".tar",
    ]
    expand_braces("".join(draw.choices(pieces, k=draw.randrange(30))))


@cache
def _options(command: str) -> tuple[str, ...]:
    """Returns the options of a command, from the fields that its parser is made of."""
    kinds = [kind for kind in settings_of(COMMANDS[command]) if kind not in SECTIONS.values() or command == "train"]
    names = {field.name.rstrip("_") for kind in kinds for field in fields(kind)}
    return tuple(sorted(f"--{name.replace('_', '-')}" for name in names))


WORDS = (
    "digits", "mnclglf", "byol", "quick", "paper", "table3", "small", "auto", "on", "off", "none", "inspect", "views",
    "pack", "folder:", "folder:.", "folder:/dev", "shards:", "shards:x-{0..3}.tar", "parquet:*", "object:X",
    "os:system", "a:b:c", "runs/x", "--", "-", "--help", "--config", "=", "--seed=1e9", "--seed=",
    "--tyro-print-completion",
)  # fmt: skip


def command_line(draw: random.Random, place: Path) -> None:
    """Parses random options with hostile values, and checks the command as before it runs."""
    name = draw.choice(list(COMMANDS))
    arguments = [name]
    for _ in range(draw.randrange(5)):
        option, value = draw.choice([*_options(name), "--help"]), draw.choice([*HOSTILE, *WORDS])
        word = str(value).replace("\0", "")
        arguments += draw.choice([[option, word], [f"{option}={word}"], [option], [word]])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        parse(arguments).check()


def _bomb(name: str) -> Callable[[random.Random, Path], None]:
    def one(draw: random.Random, place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            BOMBS[name](Path(folder))

    return one


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    **{kind: _reader(kind) for kind in READERS},
    "settings in a file": settings_file,
    "settings from Python": settings_of_python,
    "run directory": run_directory,
    "checkpoint": checkpoint,
    "initial weights": initial_weights,
    "pattern": pattern,
    "command line": command_line,
    **{f"bomb: {name}": _bomb(name) for name in BOMBS},
}
"""What makes and reads an input, by kind."""
SHARES = {
    **dict.fromkeys(("tar", "tar.gz", "zip", "index of a shard", "decoded array"), 0.3),
    "settings in a file": 0.1,
    "settings from Python": 0.3,
    "command line": 0.05,
    "run directory": 0.05,
    **{f"bomb: {name}": 0.0 for name in BOMBS},
}
"""Inputs of a kind in units of those of the others; the slow ones have fewer, of each bomb there is one."""


def counts_of(inputs: int) -> dict[str, int]:
    """Returns how many of these inputs each kind has, at least one."""
    total = sum(SHARES.get(kind, 1.0) for kind in KINDS)
    return {kind: max(1, round(inputs * SHARES.get(kind, 1.0) / total)) for kind in KINDS}


def main() -> int:
    """Prints a table of the inputs; returns 1 if one of them was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count, seed = arguments.inputs, arguments.seed
    print("| input | tried | read | refused | s | lost |\n|---|--:|--:|--:|--:|---|")
    tried = lost = 0
    for tally in attack(counts_of(count), seed):
        tried += tally.tried
        lost += len(tally.lost)
        cells = [tally.kind, f"{tally.tried:,}", f"{tally.read:,}", f"{tally.refused:,}", f"{tally.seconds:.0f}"]
        print(f"| {' | '.join(cells)} | {len(tally.lost) or 'nothing'} |", flush=True)
        for told in tally.lost:
            print(f"  {tally.kind} {told}", flush=True)
    print(f"\n{tried:,} inputs with seed {seed}, {lost:,} lost")
    return 0 if lost == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
