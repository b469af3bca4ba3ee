"""mnclglf report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mnclglf.commands.base import Runs
from mnclglf.config import require
from mnclglf.runs.console import say


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report.html again; for several runs, one page that compares them."""

    runs: Runs
    """Run directories."""
    out: Path = Path("comparison.html")
    """File of the page that compares several runs."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "no run directory is named; give one or more, as runs/x")
        require(
            len(self.runs) > 1 or self.out == Report.out,
            f"--out {self.out} is for several runs; the report of one is its report.html",
        )

    def check(self) -> None:
        pass

    def execute(self, console: Console) -> int:
        from mnclglf.reports.compare import write_comparison
        from mnclglf.reports.page import write_report

        pages = [write_report(run) for run in self.runs]
        if len(self.runs) > 1:
            say(console, f"comparison: {write_comparison(self.runs, self.out).resolve()}")
        else:
            say(console, f"report: {pages[0].resolve()}")
        return 0
