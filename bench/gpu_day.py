"""`make gpu-report`: runs everything that only a GPU can tell, into one Markdown and one JSON file to attach.

Each stage (gpu_stages.py) is a process of its own with a time limit (`python -m bench.gpu_report --stage NAME`), so
that a stage which fails, hangs or takes the process down leaves the others. A stage that did not run is listed with its
reason. Both files are written whole after every stage. Where the stages in PROOF pass, that is remembered, and from
then on a run replays CUDA graphs by default.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from bench.gpu_stages import DEVICE, STAGES, WRONG, Figures, Stage
from mnclglf.runs.files import write_atomically
from mnclglf.training.start import remember_proof

ROOT = Path(__file__).resolve().parents[1]
MARK = "figures: "  # begins the output line that holds a stage's figures
Outcome = Literal["passed", "failed", "timed out", "not run"]

PROOF = {"kernels", "tests", "compiled_operators", "cuda_graphs", "triton", "compile", "graphs"}
"""The stages that must pass before CUDA graphs are replayed by default."""


@dataclass
class Result:
    """The outcome of a stage."""

    stage: str
    title: str
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    output: str = ""  # its last lines where it did not pass


def run_stage(name: str, stage: Stage, program: Sequence[str]) -> Result:
    """Runs a stage in a process of its own: `program` followed by the stage's name."""
    result = Result(name, stage.title, "not run")
    if stage.needs_gpu and not torch.cuda.is_available():
        result.reason = "torch sees no CUDA device"
        return result
    since = time.perf_counter()
    with subprocess.Popen(
        [*program, name],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=stage.limit)
            result.outcome = "passed" if process.returncode == 0 else "failed"
            result.reason = "" if process.returncode == 0 else f"exit code {process.returncode}"
        except BaseException as error:  # a time-out or Ctrl-C: no process may keep the GPU
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            text, _ = process.communicate()
            result.outcome, result.reason = "timed out", f"ran longer than {stage.limit:g} s"
    result.seconds = round(time.perf_counter() - since, 1)
    figures = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    try:
        result.figures = json.loads(figures[-1])
    except (IndexError, ValueError):
        if result.outcome == "passed":
            result.outcome, result.reason = "failed", "ended without its figures"
    if result.outcome != "passed":
        result.output = "\n".join(text.splitlines()[-40:])
    return result


def markdown(results: Sequence[Result]) -> str:
    """Formats the report."""
    counts = Counter(result.outcome for result in results)
    lines = ["# GPU report", "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), ""]
    lines += ["| stage | outcome | seconds |", "|---|---|--:|"]
    for result in results:
        reason = f": {result.reason}" if result.reason else ""
        lines.append(f"| {result.title} | {result.outcome}{reason} | {result.seconds:.1f} |")
    for result in results:
        if result.figures or result.output:
            lines += ["", f"## {result.title}", ""]
            lines += [f"- {name}: {value}" for name, value in result.figures.items()]
            lines += ["", "~~~", result.output.replace("~~~", "---"), "~~~"] if result.output else []
    return "\n".join(lines) + "\n"


def report(stages: Mapping[str, Stage], out: Path, program: Sequence[str]) -> list[Result]:
    """Runs the stages in order and writes OUT.md and OUT.json after each."""
    results: list[Result] = []
    for name, stage in stages.items():
        print(f"{stage.title} ...", end=" ", flush=True)
        result = run_stage(name, stage, program)
        print(f"{result.outcome}{f': {result.reason}' if result.reason else ''} ({result.seconds:.1f} s)", flush=True)
        results.append(result)
        as_json = json.dumps([asdict(result) for result in results], indent=1) + "\n"
        for path, text in ((out.with_suffix(".md"), markdown(results)), (out.with_suffix(".json"), as_json)):
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-report", help="without suffix")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    options = parser.parse_args(arguments)
    if options.stage:
        figures = STAGES[options.stage].work()
        print(MARK + json.dumps(figures))
        return int(bool(figures.get(WRONG)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = report(STAGES, options.out, [sys.executable, "-m", "bench.gpu_report", "--stage"])
    print(f"wrote {options.out.with_suffix('.md')} and {options.out.with_suffix('.json')}; attach them to an issue")
    if {result.stage for result in results if result.outcome == "passed"} >= PROOF:
        remember_proof(DEVICE)
        print("from now on `mnclglf train` replays CUDA graphs on this machine; --graphs off turns that off")
    return int(any(result.outcome in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    sys.exit(main())
