"""mnclglf knn, linear, logistic and finetune: the evaluations of runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import tyro
from rich.console import Console

from mnclglf.commands.base import Runs
from mnclglf.config import Device, FinetuneConfig, KnnConfig, LinearConfig, LogisticConfig, require
from mnclglf.data.sources import source_of
from mnclglf.runs.console import say


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Arguments common to all evaluations."""

    runs: Runs
    """Run directories. For several, which may differ only in the seed, mean and deviation are printed too."""
    config: Annotated[KnnConfig | LinearConfig | LogisticConfig | FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "no run directory is named; give one or more, as runs/x")
        if self.config.dataset is not None:
            source_of(self.config.dataset)  # raises for a name that is not in the table

    def check(self) -> None:
        pass

    @property
    def shared_device(self) -> Device:
        return self.config.device

    def execute(self, console: Console) -> int:
        """Evaluates the runs and prints a table per run; for several runs, a table of the means too."""
        # Imported here, so that --help and a wrong option need not wait for torch.
        from mnclglf.evaluation.run import check_comparable, evaluate_run
        from mnclglf.reports.page import write_report
        from mnclglf.reports.tables import mean_over_runs, print_table, result_table, verdict
        from mnclglf.training.ranks import ranks_of_environment

        ranks = ranks_of_environment()
        check_comparable(self.runs, self.config)
        found: list[list[dict[str, Any]]] = []
        for run in self.runs:
            found.append([asdict(result) for result in evaluate_run(run, self.config, console, ranks=ranks)])
            if not ranks.writes:
                continue
            if len(self.runs) > 1:
                say(console, f"{run}:")
            table = result_table(found[-1])
            print_table(table, console)
            for line in verdict(table):
                say(console, line)
        if not ranks.writes:
            return 0
        if len(self.runs) > 1:
            say(console, f"mean and standard deviation (n - 1) over {len(self.runs)} runs:")
            print_table(result_table(mean_over_runs(found)), console)
        for run in self.runs:
            say(console, f"report: {write_report(run).resolve()}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Weighted k-nearest-neighbor accuracy of a run's encoder, the untrained encoder and raw pixels."""

    config: Annotated[KnnConfig, tyro.conf.arg(name="")] = field(default_factory=KnnConfig)


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluation):
    """The paper's linear evaluation: accuracy of a linear layer trained by LARS on a run's frozen encoder."""

    config: Annotated[LinearConfig, tyro.conf.arg(name="")] = field(default_factory=LinearConfig)


@dataclass(frozen=True, kw_only=True)
class Logistic(Evaluation):
    """Accuracy of logistic regression on features computed once, on all labels and on 10 labels per class; of a run's
    encoder, the untrained encoder and raw pixels."""

    config: Annotated[LogisticConfig, tyro.conf.arg(name="")] = field(default_factory=LogisticConfig)


@dataclass(frozen=True, kw_only=True)
class Finetune(Evaluation):
    """Accuracy after fine-tuning: a run's encoder and a linear classifier trained on images with labels."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)

    def check(self) -> None:
        from mnclglf.training.ranks import require_one_process

        require_one_process("finetune", "start it without torchrun, or take linear or logistic")
