"""mnclglf train."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mnclglf.config import MOST_RANKS, RunConfig, default_folder, require, text_of, to_dict, with_whole_paths
from mnclglf.data.sources import OTHER_SOURCES, SOURCES, source_of
from mnclglf.runs.console import say
from mnclglf.runs.files import with_remedy


@dataclass(frozen=True, kw_only=True)
class Train:
    """Pre-train a method; the options start from --config, and that from --recipe for --method and --dataset."""

    out: Path | None = None
    """Run directory; None is runs/METHOD-DATASET-RECIPE-seedSEED."""
    resume: str = "auto"
    """auto: resume from the newest checkpoint in --out. never: refuse if --out holds a run. Or the path of a
    checkpoint."""
    extend: bool = False
    """Let the finished run in --out go on to more --epochs. From there on its learning rate is that of the longer run,
    a cosine to 0 over all epochs, so it rises once."""
    gpus: int | None = None
    """Train on so many GPUs of this machine, by torchrun: one process each, which share every batch. With --device cpu,
    in so many processes. None: one process, or those that torchrun has started."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """YAML or JSON file with settings, all or some, in the form of --print-config; options override it. Paths in it
    start from the working directory."""
    print_config: bool = False
    """Print the resolved configuration as JSON and stop."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        source_of(self.config.dataset)  # raises for a name that is not in the table
        gpus = self.gpus
        require(gpus is None or 1 <= gpus <= MOST_RANKS, f"gpus {text_of(gpus)} must lie in 1..{MOST_RANKS}")

    def check(self) -> None:
        if self.print_config:
            return
        import torch

        from mnclglf.methods import method_of
        from mnclglf.models.encoder import features_of
        from mnclglf.training.optim import check_optimizer
        from mnclglf.training.ranks import Ranks, ranks_of_environment
        from mnclglf.training.start import check_predictor, check_queue, choose_device

        method_of(self.config.method)  # raises for one of another package that cannot be imported
        features_of(self.config.model)  # makes the encoder without its weights
        check_queue(self.config)
        check_optimizer(self.config.optim.optimizer)
        check_predictor(self.config)
        device, count = choose_device(self.config.engine), self.gpus or 1
        ranks = ranks_of_environment()
        if ranks.count == 1:
            Ranks(count=count).share(self.config.optim.batch_size)
        require(
            self.gpus in (None, ranks.count) or ranks.count == 1,
            f"gpus {self.gpus}, and torchrun has started {ranks.count} processes; leave out --gpus",
        )
        require(
            count == 1 or device.type == "cpu" or count <= torch.cuda.device_count(),
            f"gpus {count}, and this machine has {torch.cuda.device_count()}; lower --gpus",
        )
        require(
            count == 1 or device.type == "cuda" or self.config.engine.device == "cpu",
            f"gpus {count}, and torch sees no GPU; for {count} processes on the CPU give --device cpu",
        )

    def starts_ranks(self) -> bool:
        """Returns whether the command starts torchrun, and does not train in this process."""
        return (self.gpus or 1) > 1 and "RANK" not in os.environ and not self.print_config

    def execute(self, console: Console) -> int:
        if self.print_config:
            sys.stdout.write(json.dumps(to_dict(self.config), indent=2) + "\n")
            return 0
        # Imported here, so that --help, --print-config and a wrong option need not wait for torch.
        from mnclglf.evaluation.monitor import KnnMonitor
        from mnclglf.reports.page import write_report
        from mnclglf.training.loop import Trainer, TrainingError
        from mnclglf.training.ranks import join, leave, ranks_of_environment
        from mnclglf.training.start import choose_device

        config = with_whole_paths(self.config)
        folder = self.out or default_folder(config)
        ranks = ranks_of_environment()
        join(ranks, choose_device(config.engine), config.engine.rank_timeout)
        options: Any = dict(resume=self.resume, extend=self.extend, console=console, monitor=KnnMonitor, ranks=ranks)
        trainer = Trainer(config, folder, **options)
        try:
            stopped = trainer.train()
        except TrainingError:
            if ranks.writes:
                try:
                    write_report(folder)  # also after a failure: it shows where the run stopped
                except Exception as error:  # the failure of the training is the one to show
                    say(console, f"the report cannot be written: {with_remedy(error)}")
            raise
        leave()
        if stopped:
            again = f"the same command with --out {shlex.quote(str(folder))}"
            say(console, f"stopped and saved; {again} resumes from there")
        if ranks.writes:
            say(console, f"report: {write_report(folder).resolve()}")
        return 128 + stopped if stopped else 0


TRAIN_HELP = (
    f"{Train.__doc__}\n\nData sets: {', '.join((*SOURCES, *OTHER_SOURCES))}, or folder:PATH, shards:PATTERN, "
    "parquet:PATTERN."
)


def name_unread(config: RunConfig, arguments: Sequence[str]) -> None:
    """Prints the options among the arguments that have no effect on the run."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    given = {option[2:].replace("-", "_").removeprefix("no_"): option for option in options}
    if "lambda" in given:
        given["lambda_"] = given["lambda"]
    from mnclglf.training.unread import unread_settings

    for name, why in unread_settings(config, set(given)).items():
        say(Console(stderr=True), f"{given[name]} has no effect with {why}; leave it out", style="yellow")
