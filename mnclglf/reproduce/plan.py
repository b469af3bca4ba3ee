"""Plan of each table of the paper: its rows, and the runs that they need.

The name of a run is unique within a scale, so all rows of all tables that need the same run share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Console

from mnclglf.config import (
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    MethodName,
    ObjectiveConfig,
    RunConfig,
    require,
    require_types,
)
from mnclglf.data.sources import source_of
from mnclglf.recipes import RECIPES
from mnclglf.reproduce.paper import METHOD_TITLES, TABLE3, TABLE4, TABLE5, TABLE6, PaperResult
from mnclglf.runs.results import Protocol

TableName = Literal["table3", "table4", "table5", "table6"]
PaperDataset = Literal["cifar10", "cifar100", "tinyimagenet"]
ScaleName = Literal["paper", "small"]

MOST_SEEDS = 1000
PAPER_EPOCHS = 200
SMALL_EPOCHS = 12  # a multiple of four, for the milestones of Table 5
TITLES: dict[TableName, str] = {
    "table3": "Table 3: linear evaluation of eight methods",
    "table4": "Table 4: the weight lambda",
    "table5": "Table 5: training efficiency",
    "table6": "Table 6: k, the patches in each combination",
}
EPOCH_TITLES = {"nnclr": "NNCLR", "one_embedding": "MNCLGLF (one embedding)", "mnclglf": "MNCLGLF"}


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Make the missing runs and evaluations of a table of the paper, and write it with the paper's numbers and ours."""

    table: Annotated[TableName, tyro.conf.Positional]
    """Table of the paper."""
    dataset: tuple[PaperDataset, ...] = ()
    """Data sets of table3 to run; none given takes all three. The other tables use cifar10."""
    scale: ScaleName = "paper"
    """paper: Table 2's settings on the paper's data sets, for a GPU. small: 10,000 images of fashion_mnist at 16 x 16,
    a narrow network and few epochs, for two CPU cores; not the paper's setting."""
    seeds: int = 1
    """Number of runs per row, with the seeds 0, 1, ..."""
    out: Path | None = None
    """Folder of the runs and tables; None is reproduced/SCALE."""
    data_dir: Path | None = None
    """Folder of the data sets' files; None looks in their usual places."""
    download: bool = False
    """Fetch the data sets if they are missing."""
    plan: bool = False
    """Print one command per missing run, for xargs, GNU parallel or a Slurm array, and run nothing."""
    only: str | None = None
    """Name of a single run to make, in this process; used by the commands of --plan."""

    @property
    def folder(self) -> Path:
        return (self.out or Path("reproduced") / self.scale).expanduser().resolve()

    @property
    def data_folder(self) -> Path | None:
        return None if self.data_dir is None else self.data_dir.expanduser().resolve()

    def check(self) -> None:
        table = make_table(self)
        if self.only is not None:
            table.run(self.only)  # raises for a name that is not in the table
        from mnclglf.training.ranks import require_one_process

        remedy = "start one for each GPU, without torchrun and with CUDA_VISIBLE_DEVICES: they share the runs of --out"
        require_one_process("reproduce", remedy)

    def execute(self, console: Console) -> int:
        from mnclglf.reproduce.run import reproduce

        return reproduce(self, console)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings common to the runs of a table."""

    name: str
    configure: Callable[[MethodName, str], RunConfig]
    """Function from a method and a data set of the paper to a run."""
    protocols: Mapping[Protocol, Mapping[str, Any]]
    """Evaluations of each run, with their required settings; the first gives the table's top-1 and top-5."""
    protocol_text: str
    """Description of the evaluations, in words."""
    of_paper: bool
    """True if the setting is the paper's, so that its numbers can be compared with ours."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of a table: a setting, one run per seed, the paper's number."""

    label: str
    dataset: str
    """Data set that we train on."""
    paper_dataset: str
    """Data set of the paper's number."""
    configs: tuple[RunConfig, ...]
    """Runs, one per seed."""
    epoch: int
    """Epoch after which the encoder is evaluated."""
    representation: str
    """"pretrained" or "untrained"."""
    paper: PaperResult | None
    """The paper's result; None if it has no such row."""


@dataclass(kw_only=True)
class Run:
    """A run, and the evaluations asked of it."""

    config: RunConfig
    asked: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    """Representations to evaluate, by epoch."""

    @property
    def name(self) -> str:
        return run_name(self.config)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper at one scale."""

    name: TableName
    scale: Scale
    rows: tuple[Row, ...]

    def runs(self) -> list[Run]:
        """Returns the runs that the rows need, each once, seed by seed."""
        runs: dict[str, Run] = {}
        for row in self.rows:
            for config in row.configs:
                run = runs.setdefault(run_name(config), Run(config=config))
                representations = run.asked.setdefault(row.epoch, [])
                if row.representation not in representations:
                    representations.append(row.representation)
        return sorted(runs.values(), key=lambda run: run.config.seed)

    def run(self, name: str) -> Run:
        """Returns the run of this name.

        Raises:
            ValueError: the table has no such run.
        """
        found = [run for run in self.runs() if run.name == name]
        require(
            bool(found), f"only {name!r} is no run of {self.name}; they are {', '.join(r.name for r in self.runs())}"
        )
        return found[0]


def run_name(config: RunConfig) -> str:
    """Returns METHOD-DATASET-seedSEED with differences from the paper's objective, e.g. mnclglf-cifar10-k1-seed0."""
    objective, usual = config.objective, ObjectiveConfig()
    variant = {
        f"lambda{objective.lambda_:g}": objective.lambda_ != usual.lambda_,
        f"k{objective.k}": objective.k != usual.k,
        "one-embedding": objective.one_embedding,
    }
    parts = [config.method, config.dataset, *(name for name, differs in variant.items() if differs)]
    return "-".join([*parts, f"seed{config.seed}"])


def evaluation_of(
    protocol: Protocol, settings: Mapping[str, Any], checkpoint: Path | None
) -> KnnConfig | LinearConfig | LogisticConfig:
    """Returns the evaluation whose results have these settings."""
    if protocol == "knn":
        names = {"k": "neighbors", "temperature": "vote_temperature"}
        return KnnConfig(checkpoint=checkpoint, **{names[name]: value for name, value in settings.items()})
    if protocol == "linear":
        return LinearConfig(**settings, checkpoint=checkpoint)
    return LogisticConfig(checkpoint=checkpoint)


def make_table(request: Reproduce) -> Table:
    """Returns the requested part of a table.

    Raises:
        ValueError: the number of seeds is below 1, or the table does not have a requested data set.
    """
    require_types(request)
    require(1 <= request.seeds <= MOST_SEEDS, f"seeds {request.seeds} must be at least 1 and at most {MOST_SEEDS}")
    scale = SCALES[request.scale]
    datasets: tuple[PaperDataset, ...] = ("cifar10",)
    if request.table == "table3" and scale.of_paper:
        datasets = get_args(PaperDataset)
    others = [dataset for dataset in request.dataset if dataset not in datasets or not scale.of_paper]
    which = f"{request.table} is of cifar10" if scale.of_paper else f"scale {request.scale} is of fashion_mnist"
    require(not others, f"dataset {' '.join(others)} was given, but {which}; leave --dataset out")
    chosen = dict.fromkeys(request.dataset or datasets)
    rows = [_row(entry, dataset, scale, request) for dataset in chosen for entry in _entries(request.table, dataset)]
    if not scale.of_paper:
        rows.append(_row(_Entry(label="Untrained encoder", representation="untrained"), "cifar10", scale, request))
    return Table(name=request.table, scale=scale, rows=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Row without its scale and seeds."""

    label: str
    method: MethodName = "mnclglf"
    objective: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that differ from the recipe's."""
    trained: float = 1.0
    """Fraction of the run's epochs after which it is evaluated."""
    representation: str = "pretrained"
    paper: PaperResult | None = None


def _entries(table: TableName, dataset: str) -> list[_Entry]:
    if table == "table3":
        return [_Entry(label=METHOD_TITLES[method], method=method, paper=of[dataset]) for method, of in TABLE3.items()]
    if table == "table4":
        return [
            _Entry(label=f"lambda {value}", objective={"lambda_": float(value)}, paper=paper)
            for value, paper in TABLE4.items()
        ]
    if table == "table5":
        return [
            _Entry(
                label=f"{EPOCH_TITLES[name]}, after {epoch / PAPER_EPOCHS:.0%} of the epochs",
                method="nnclr" if name == "nnclr" else "mnclglf",
                objective={"one_embedding": name == "one_embedding"},
                trained=epoch / PAPER_EPOCHS,
                paper=paper,
            )
            for name, of in TABLE5.items()
            for epoch, paper in of.items()
        ]
    return [_Entry(label=f"k = {k}", objective={"k": k}, paper=paper) for k, paper in TABLE6.items()]


def _row(entry: _Entry, dataset: str, scale: Scale, request: Reproduce) -> Row:
    config = scale.configure(entry.method, dataset)
    config = replace(
        config,
        objective=replace(config.objective, **entry.objective),
        data=replace(config.data, data_dir=request.data_folder, download=request.download),
        engine=replace(config.engine, keep_every=config.optim.epochs // 4),
        model=replace(
            config.model, classes=source_of(config.dataset).class_count if config.method == "supervised" else None
        ),
    )
    return Row(
        label=entry.label,
        dataset=config.dataset,
        paper_dataset=dataset,
        configs=tuple(replace(config, seed=seed) for seed in range(request.seeds)),
        epoch=round(entry.trained * config.optim.epochs),
        representation=entry.representation,
        paper=entry.paper,
    )


def _small(method: MethodName, dataset: str) -> RunConfig:
    """Returns the quick recipe's settings for MNCLGLF on fashion_mnist, for every method and data set."""
    config = RECIPES["quick"]("mnclglf", "fashion_mnist")
    return replace(config, method=method, optim=replace(config.optim, epochs=SMALL_EPOCHS))


LOGISTIC = {"solver": "logistic regression"}
SCALES: dict[ScaleName, Scale] = {
    "paper": Scale(
        name="paper",
        configure=RECIPES["paper"],
        protocols={"linear": {"epochs": 90, "batch_size": 256, "lr": 0.8}},
        protocol_text="the paper's protocol: a linear layer on the frozen encoder, 90 epochs of LARS on augmented "
        "images",
        of_paper=True,
    ),
    "small": Scale(
        name="small",
        configure=_small,
        protocols={"logistic": LOGISTIC, "knn": {"k": 20, "temperature": 0.07}},
        protocol_text="logistic regression on frozen features computed once, C chosen on a held-out fifth of the "
        "training images; k-NN with k 20",
        of_paper=False,
    ),
}
