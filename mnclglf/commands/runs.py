"""mnclglf runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from mnclglf.config import require


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder, newest first: state, top-1 accuracies, figures without labels and the settings that
    differ."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder that holds run directories, at any depth."""
    json: bool = False
    """Print JSON, with every setting."""

    def check(self) -> None:
        require(self.folder.is_dir(), f"there is no folder {self.folder}; give one that holds run directories")

    def execute(self, console: Console) -> int:
        from mnclglf.reports.overview import print_overview, read_runs, to_json

        runs = read_runs(self.folder)
        if self.json:
            sys.stdout.write(json.dumps([to_json(run) for run in runs], indent=2) + "\n")
        else:
            print_overview(runs, self.folder, console)
        return 0
