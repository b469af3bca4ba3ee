"""mnclglf quality."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from mnclglf.commands.base import Run
from mnclglf.config import Device, QualityConfig
from mnclglf.data.sources import source_of
from mnclglf.runs.console import say


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Judge a run's encoder without labels: alignment, uniformity, effective rank, a page of nearest neighbors."""

    run: Run
    """Run directory."""
    config: Annotated[QualityConfig, tyro.conf.arg(name="")] = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if self.config.dataset is not None:
            source_of(self.config.dataset)  # raises for a name that is not in the table

    def check(self) -> None:
        pass

    @property
    def shared_device(self) -> Device:
        return self.config.device

    def execute(self, console: Console) -> int:
        from mnclglf.api import judge
        from mnclglf.reports.quality_page import quality_markdown, quality_table
        from mnclglf.training.ranks import ranks_of_environment

        results, page = judge(self.run, self.config, console, ranks_of_environment())
        for table in quality_table([vars(result) for result in results]):
            say(console, quality_markdown(table))
        say(console, f"nearest neighbors: {page.resolve()}")
        say(console, f"report: {(self.run / 'report.html').resolve()}")
        return 0
