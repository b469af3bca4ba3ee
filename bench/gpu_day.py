"""`make gpu-day`: all that only a GPU can tell, in nine minutes at most, into one Markdown and one JSON file.

Each stage (gpu_stages.py) is a process of its own, killed with its children when its time is over, so that a stage
which fails, hangs or takes its process down leaves the others. What it prints goes into a file of its own as it is
printed. The report is written whole before and after every stage. A second call goes on where the first one was cut:
it skips the stages that have passed on the same device, versions and sources. `--rehearse` runs every stage on a CPU,
at tiny sizes and with interpreted kernels, so that no minute on a GPU is lost to a typo.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench import gpu_stages
from bench.digest import ROOT
from bench.gpu_stages import BASELINE, STAGES, WRONG, Figures, Stage
from mnclglf.runs.files import write_atomically

MARK = "figures: "  # begins an output line that holds figures
ATTEMPT = "----- "  # begins the line above each attempt in a stage's output
ENVIRONMENT = "environment"  # the stage that says whether earlier results hold
SAME = ("gpu", "driver, power limit, clocks, temperature", "python", "torch", "triton", "cuda", "tree")
REHEARSAL_SLACK = 4  # a rehearsal's stages may take so many budgets: the cores of a CPU are slow, and others use them
SHOWN = 40  # lines of output in the report, of a stage that did not pass
Outcome = Literal["passed", "failed", "timed out", "cut", "not run"]


@dataclass
class Result:
    """The outcome of a stage."""

    stage: str
    title: str
    budget: float
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    output: str = ""  # its last lines where it did not pass


@dataclass(frozen=True, kw_only=True)
class Day:
    """A day on a GPU, or its rehearsal.

    Attributes:
        out: path of the report, without suffix; the folder of this name holds each stage's output.
        program: command that runs a stage, without the stage's arguments.
        rehearse: true to run on the CPU.
        packs: unpacked packs.
    """

    out: Path
    program: Sequence[str]
    rehearse: bool = False
    packs: Sequence[Path] = ()

    def log(self, name: str) -> Path:
        """Returns the file with all that a stage printed, in all its attempts."""
        return self.out / f"{name}.log"

    def command(self, name: str, seconds: float) -> list[str]:
        arguments = ["--stage", name, "--seconds", f"{seconds:.0f}", "--out", str(self.out)]
        return [*self.program, *arguments, *["--rehearse"] * self.rehearse]

    def environment(self) -> dict[str, str]:
        """Returns the environment of a stage: the packs are found before what is installed."""
        given = {**os.environ, "PYTHONUNBUFFERED": "1"}
        libraries = sorted({str(path.parent) for pack in self.packs for path in pack.rglob("*.so*")})
        paths = {"PYTHONPATH": [*map(str, self.packs), str(ROOT), str(ROOT / "kernels")], "LD_LIBRARY_PATH": libraries}
        for name, added in paths.items():
            given[name] = os.pathsep.join([*added, *filter(None, [given.get(name)])])
        given["MNCLGLF_PACK"] = os.pathsep.join(map(str, self.packs))
        if self.rehearse:
            # DEBUG_COMPILE: C++ without optimization compiles in half the time.
            given |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_DEBUG_COMPILE": "1"}
        return given


def run_stage(day: Day, name: str, stage: Stage, limit: float, usable: float) -> Result:
    """Runs a stage in a process of its own; it is killed with its children after `limit` seconds.

    A stage that goes on for as long as it may is told to end after `usable` seconds.
    """
    log = day.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    since, result = time.monotonic(), Result(name, stage.title, stage.seconds, "cut")
    with log.open("ab") as output:
        output.write(f"{ATTEMPT}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        output.flush()
        process = subprocess.Popen(
            day.command(name, usable),
            cwd=ROOT,
            env=day.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            result.outcome, result.reason = ("passed", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            result.outcome, result.reason = "timed out", f"stopped after {limit:.0f} s"
        finally:  # after Ctrl-C too: no process may keep the GPU
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too, also those that it left behind
            process.wait()
    result.seconds = round(time.monotonic() - since, 1)
    return read_log(day, result)


def read_log(day: Day, result: Result) -> Result:
    """Adds what a stage has printed to its result: the figures of all its attempts, and the last lines."""
    log = day.log(result.stage)
    text = log.read_text(errors="replace") if log.exists() else ""
    result.figures, damaged = {}, False
    for line in text.splitlines():
        if line.startswith(ATTEMPT):
            result.figures.pop(WRONG, None)  # an earlier attempt's faults may be mended
        elif line.startswith(MARK):
            try:
                found = json.loads(line.removeprefix(MARK))
            except ValueError:  # killed in the middle of the line
                damaged = True
                continue
            found[WRONG] = result.figures.get(WRONG, []) + found.get(WRONG, [])
            result.figures |= found
    last_attempt = text[text.rfind(ATTEMPT) :]
    if result.outcome == "passed" and (damaged or MARK not in last_attempt):
        result.outcome, result.reason = "failed", "ended without its figures"
    if not result.figures.get(WRONG):
        result.figures.pop(WRONG, None)
    result.output = "" if result.outcome == "passed" else shown(last_attempt)
    return result


def shown(text: str) -> str:
    """Returns the last lines of an output, without its figures."""
    return "\n".join([line for line in text.splitlines() if not line.startswith((MARK, ATTEMPT))][-SHOWN:])


def cell(value: object) -> str:
    return str(value).replace("|", "\\|")


def table(rows: Sequence[Mapping[str, Any]], right: str = "") -> list[str]:
    """Formats rows with the same names as a Markdown table; columns whose name holds `right` are aligned to it."""
    names = [*rows[0]]
    marks = ["--:" if right and right in name else "---" for name in names]
    lines = [f"| {' | '.join(names)} |", f"|{'|'.join(marks)}|"]
    return lines + [f"| {' | '.join(cell(row.get(name, '-')) for name in names)} |" for row in rows]


def steps_table(results: Sequence[Result]) -> list[str]:
    """Returns the table of all training steps, each beside the baseline's time."""
    known = {result.stage: result for result in results if "median step, ms" in result.figures}
    base = known[BASELINE].figures["median step, ms"] if BASELINE in known else None
    rows = []
    for result in known.values():
        figures, milliseconds = result.figures, result.figures["median step, ms"]
        names = ("median step, ms", "images/s", "roofline fraction", "peak memory, GiB", "first step, seconds")
        row = {"step": result.title} | {name: figures.get(name, "-") for name in names}
        row[f"times as fast as {BASELINE}"] = "-" if base is None else f"{base / milliseconds:.3f}"
        row["first losses"] = figures.get("first losses", "-")
        rows.append(row)
    return ["", "## Training steps", "", *table(rows)] if rows else []


def markdown(results: Sequence[Result], *, rehearse: bool = False) -> str:
    """Formats the report."""
    counts = Counter(result.outcome for result in results)
    lines = ["# A rehearsal on a CPU: no figure here is of a GPU" if rehearse else "# A day on a GPU", ""]
    lines += [", ".join(f"{count} {outcome}" for outcome, count in counts.items()), ""]
    lines += ["| stage | outcome | seconds | budget |", "|---|---|--:|--:|"]
    for result in results:
        reason = f": {cell(result.reason)}" if result.reason else ""
        lines.append(f"| {result.title} | {result.outcome}{reason} | {result.seconds:.1f} | {result.budget:.0f} |")
    lines.append(f"| together | | {sum(r.seconds for r in results):.1f} | {sum(r.budget for r in results):.0f} |")
    lines += steps_table(results)
    for result in results:
        if result.figures or result.output:
            lines += ["", f"## {result.title}", ""]
            for name, value in result.figures.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    lines += ["", f"{name}:", "", *table(value), ""]
                else:
                    lines.append(f"- {name}: {value}")
            lines += ["", "~~~", result.output.replace("~~~", "---"), "~~~"] if result.output else []
    return "\n".join(lines) + "\n"


def save(day: Day, results: Mapping[str, Result]) -> None:
    """Writes OUT.md and OUT.json."""
    as_json = {"rehearsal": day.rehearse, "results": [asdict(result) for result in results.values()]}
    day.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".md", markdown([*results.values()], rehearse=day.rehearse)),
        (".json", json.dumps(as_json, indent=1) + "\n"),
    ):
        write_atomically(with_suffix(day.out, suffix), lambda file, text=text: file.write(text.encode()))


def with_suffix(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)  # with_suffix would take what follows a dot in the name


def earlier_results(day: Day) -> dict[str, Result]:
    """Reads the results of an earlier call; none if there are none, or the file is damaged."""
    try:
        found = json.loads(with_suffix(day.out, ".json").read_text())
        results = [Result(**entry) for entry in found["results"]]
        return {result.stage: result for result in results} if found["rehearsal"] == day.rehearse else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def differences(earlier: Figures, now: Figures) -> list[str]:
    """Returns what has changed of device, versions and sources."""
    return [
        f"{name}: {earlier.get(name)} -> {now.get(name)}" for name in SAME if same(earlier, name) != same(now, name)
    ]


def same(figures: Figures, name: str) -> str:
    """Returns what is compared of a figure: of the driver's line the version alone, as a GPU's temperature changes."""
    return str(figures.get(name)).split(",")[0] if name.startswith("driver") else str(figures.get(name))


def set_aside(day: Day) -> None:
    """Renames the report and the output of an earlier call, so that a new one starts without losing them."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while any(with_suffix(day.out, f"-until-{stamp}{end}").exists() for end in ("", ".json", ".md")):
        number += 1
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
    for path in (day.out, *(with_suffix(day.out, suffix) for suffix in (".json", ".md"))):
        if path.exists():
            suffix = path.name.removeprefix(day.out.name)
            path.rename(with_suffix(day.out, f"-until-{stamp}{suffix}"))
            print(f"set aside: {path.name} is now {day.out.name}-until-{stamp}{suffix}")


def run_day(day: Day, stages: Mapping[str, Stage], *, anew: bool = False) -> dict[str, Result]:
    """Runs the stages in order, within the sum of their budgets; writes the report before and after each.

    A stage may also use the time that those before it left, or that a stage which has passed earlier does not need.
    """
    began, granted = time.monotonic(), 0.0
    earlier = earlier_results(day)
    results: dict[str, Result] = {}
    for name, stage in stages.items():
        granted += stage.seconds * (REHEARSAL_SLACK if day.rehearse else 1)
        print(f"{stage.title} ...", end=" ", flush=True)
        known = earlier.get(name)
        if known is not None and known.outcome == "passed" and name != ENVIRONMENT:
            results[name] = known
            print("passed in an earlier call", flush=True)
            continue
        if reason := missing_gpu(day, stage, results):
            results[name] = Result(name, stage.title, stage.seconds, "not run", reason=reason)
        else:
            cut = Result(name, stage.title, stage.seconds, "cut", reason="the day ended here")
            later = {key: value for key, value in earlier.items() if key not in (*results, name)}
            if name != ENVIRONMENT:  # which says whether the earlier report is to be set aside
                save(day, {**results, name: read_log(day, cut)} | later)
            limit = max(1.0, began + granted - time.monotonic())
            usable = limit if name == [*stages][-1] else min(stage.seconds, limit)
            try:
                results[name] = run_stage(day, name, stage, limit, usable)
            except BaseException:  # Ctrl-C, or a signal to end
                if name != ENVIRONMENT:
                    save(day, {**results, name: read_log(day, cut)} | later)
                raise
        if name == ENVIRONMENT:
            earlier = begin(day, results[name], earlier, anew=anew)
        result = results[name]
        reason = f": {result.reason}" if result.reason else ""
        print(f"{result.outcome}{reason} ({result.seconds:.1f} of {stage.seconds:.0f} s)", flush=True)
        save(day, results | {key: value for key, value in earlier.items() if key not in results})
    return results


def missing_gpu(day: Day, stage: Stage, results: Mapping[str, Result]) -> str:
    """Returns why a stage cannot run, or an empty string."""
    gpu = results[ENVIRONMENT].figures.get("gpu") if ENVIRONMENT in results else None
    without = stage.needs_gpu and not day.rehearse and gpu == "none"
    return "torch sees no CUDA device" if without else ""


def begin(day: Day, environment: Result, earlier: dict[str, Result], *, anew: bool) -> dict[str, Result]:
    """Returns the earlier results that still hold; sets them and their output aside if they do not."""
    if not with_suffix(day.out, ".json").exists() and {log.stem for log in day.out.glob("*.log")} <= {ENVIRONMENT}:
        return {}
    before = earlier[ENVIRONMENT].figures if ENVIRONMENT in earlier else {}
    changed = ["--anew"] if anew else differences(before, environment.figures)
    if not changed:
        return earlier
    print(f"starting anew ({'; '.join(changed)}) ...", end=" ", flush=True)
    set_aside(day)
    return {}


@contextmanager
def unpacked(packs: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields the folder of each pack; what is a tar file is unpacked into a temporary folder.

    Raises:
        ValueError: a pack is neither a folder nor a tar file.
    """
    with ExitStack() as stack:
        folders: list[Path] = []
        for pack in packs:
            folder = pack
            if pack.is_file():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pack-")))
                try:
                    with tarfile.open(pack) as archive:
                        archive.extractall(folder, filter="data")
                except (tarfile.TarError, OSError, EOFError) as error:
                    raise ValueError(f"pack {pack} cannot be unpacked ({error}); make it again") from error
            elif not pack.is_dir():
                raise ValueError(f"pack {pack} is neither a folder nor a tar file; check --pack and MNCLGLF_PACK")
            # `pack` is the folder that a pack's tar file holds.
            folders.append((folder / "pack" if (folder / "pack").is_dir() else folder).resolve())
        yield folders


def work(name: str, options: argparse.Namespace) -> int:
    """Runs a stage in this process; prints its figures as they come."""
    packs = tuple(Path(path) for path in os.environ.get("MNCLGLF_PACK", "").split(os.pathsep) if path)
    given: dict[str, Any] = dict(seconds=options.seconds, folder=options.out, packs=packs)
    wrong: list[str] = []
    make = gpu_stages.on_a_cpu if options.rehearse else gpu_stages.on_a_gpu
    setting: Any = None if name == ENVIRONMENT else make(**given)
    for figures in STAGES[name].work(setting):
        print(MARK + json.dumps(figures), flush=True)
        wrong += figures.get(WRONG, [])
    return int(bool(wrong))


def stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__)
    parser.add_argument("--out", type=Path, help="report, without suffix; default: bench/results/gpu-day")
    parser.add_argument("--anew", action="store_true", help="run the stages that have passed too")
    parser.add_argument("--rehearse", action="store_true", help="run every stage on the CPU, at tiny sizes")
    parser.add_argument(
        "--pack",
        type=Path,
        action="append",
        help="folder or tar file with packages that this machine lacks (tools/make_pack.py makes one); may be given "
        "several times; default: MNCLGLF_PACK, separated by colons",
    )
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    parser.add_argument("--seconds", type=float, default=600.0, help="with --stage: time that it may use")
    options = parser.parse_args(arguments)
    options.out = (options.out or ROOT / "bench" / "results" / ("rehearsal" * options.rehearse or "gpu-day")).resolve()
    if options.stage:
        options.out.mkdir(parents=True, exist_ok=True)
        return work(options.stage, options)
    given = options.pack or [Path(path) for path in os.environ.get("MNCLGLF_PACK", "").split(os.pathsep) if path]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)  # so that the running stage is killed, too
    try:
        with unpacked(given) as packs:
            program = [sys.executable, "-m", "bench.gpu_day"]
            day = Day(out=options.out, program=program, rehearse=options.rehearse, packs=packs)
            results = run_day(day, STAGES, anew=options.anew)
    except ValueError as error:
        print(f"gpu-day: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on here. {with_suffix(options.out, '.md')} has what there is")
        return 130
    print(f"\n{markdown([*results.values()], rehearse=options.rehearse)}")
    print(f"wrote {with_suffix(options.out, '.md')} and {with_suffix(options.out, '.json')}")
    return int(any(result.outcome in ("failed", "timed out") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
