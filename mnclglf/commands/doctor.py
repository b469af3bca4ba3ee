"""mnclglf doctor."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from mnclglf.runs.console import say

NAME_WIDTH = 23  # one more than nvidia-cudnn-frontend
STYLES = {"ok": None, "note": "yellow", "missing": "yellow", "broken": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has and lacks for a run, and how to fix it. Exits with 0 if a run can be made, else with
    1. Takes half a minute."""

    def check(self) -> None:
        pass

    def execute(self, console: Console) -> int:
        from mnclglf.doctor import examine

        stops: list[str] = []
        for finding in examine():
            say(console, f"{finding.status:8}{finding.name:{NAME_WIDTH}}{finding.text}", style=STYLES[finding.status])
            if finding.remedy is not None:
                say(console, f"{'':8}{'':{NAME_WIDTH}}remedy: {finding.remedy}")
            if finding.stops:
                stops.append(finding.name)
        if stops:
            say(console, f"no run can be made before this is fixed: {', '.join(stops)}", style="bold red")
            return 1
        say(console, "a run can be made: mnclglf train --dataset digits --recipe quick")
        return 0
