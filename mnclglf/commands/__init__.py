"""The commands of the command line: one file per command or family, one row each in COMMANDS."""

from __future__ import annotations

from mnclglf.commands.base import Command
from mnclglf.commands.data import Data
from mnclglf.commands.doctor import Doctor
from mnclglf.commands.embed import Embed
from mnclglf.commands.evaluation import Finetune, Knn, Linear, Logistic
from mnclglf.commands.export import Export
from mnclglf.commands.quality import Quality
from mnclglf.commands.report import Report
from mnclglf.commands.runs import Runs
from mnclglf.commands.search import Search
from mnclglf.commands.train import Train
from mnclglf.reproduce.plan import Reproduce

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "knn": Knn,
    "linear": Linear,
    "logistic": Logistic,
    "embed": Embed,
    "search": Search,
    "export": Export,
    "finetune": Finetune,
    "quality": Quality,
    "report": Report,
    "runs": Runs,
    "data": Data,
    "reproduce": Reproduce,
    "doctor": Doctor,
}
"""The commands by name, in the order of the help."""
