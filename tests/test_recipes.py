"""Tests of the recipes: `paper` is Table 2 for every method, `tuned` is docs/reference/algorithm.md."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from mnclglf.config import METHOD_NAMES, MethodName, ModelConfig, RecipeName, RunConfig
from mnclglf.data.sources import SOURCES
from mnclglf.recipes import RECIPES, TUNED, VIEWS, paper, tuned

METHOD_PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "algorithm.md"
NAMES = METHOD_NAMES
OF_THE_PAPER = ("cifar10", "cifar100", "tinyimagenet")
RUNS: list[tuple[RecipeName, MethodName, str]] = [
    (recipe, method, dataset)
    for recipe in RECIPES
    for method in (TUNED if recipe == "tuned" else NAMES)
    for dataset in (OF_THE_PAPER if recipe == "tuned" else SOURCES)
]


def test_every_method_of_table_3_has_a_name() -> None:
    assert set(NAMES) >= {
        "supervised", "mocov2", "simsiam", "simclr", "byol", "nnclr", "fast_moco", "mnclglf", "mnclglf_official"
    }  # fmt: skip


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dataset", SOURCES)
def test_the_paper_recipe_is_table_2(method: MethodName, dataset: str) -> None:
    config = RECIPES["paper"](method, dataset)
    optim, objective = config.optim, config.objective
    assert (optim.epochs, optim.sgd_momentum, optim.weight_decay) == (200, 0.9, 1e-4)
    assert (optim.lr, optim.warmup_epochs, optim.constant_predictor_lr) == (0.1, 0.0, False)
    assert (optim.batch_size, optim.clip_norm) == (256, None)
    assert (objective.temperature, objective.ema_momentum, objective.ema_schedule) == (1.0, 0.99, "constant")
    assert objective.queue_size == 16384
    assert (objective.lambda_, objective.k, objective.one_embedding) == (6.0, 2, False)
    assert config.model == ModelConfig(stem="cifar", width=64, projector_width=2048, predictor_width=512)
    assert (config.data.image_size, config.data.train_images, config.data.validation_images) == (None, None, 0)


def test_digits_are_never_flipped() -> None:
    assert not SOURCES["mnist5k"].flips
    assert not SOURCES["digits"].flips
    for recipe, method, dataset in RUNS:
        flip = RECIPES[recipe](method, dataset).view.flip_probability
        assert (flip == 0) == (not SOURCES[dataset].flips), (recipe, method, dataset)


def test_a_recipe_says_what_it_was_made_for() -> None:
    for recipe, method, dataset in RUNS:
        config = RECIPES[recipe](method, dataset)
        assert (config.recipe, config.method, config.dataset) == (recipe, method, dataset)


@pytest.mark.parametrize("dataset", ["mnist5k", "digits", "fashion_mnist", "folder:photos"])
def test_tuned_names_the_data_sets_that_it_is_for(dataset: str) -> None:
    with pytest.raises(ValueError, match=f"cifar10, cifar100, tinyimagenet.*'{dataset}'"):
        tuned("simclr", dataset)


def test_tuned_without_settings_of_a_method_says_where_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TUNED, "nnclr")
    with pytest.raises(ValueError, match=r"no settings of 'nnclr'; take --recipe paper, .* TUNED"):
        tuned("nnclr", "cifar10")


def settings(config: RunConfig) -> dict[str, str]:
    """Returns every setting that a recipe may change, as the documents write it; the views by their name."""
    values = asdict(config)
    flat = {f"{s}.{name}": str(v) for s in ("data", "model", "objective", "optim") for name, v in values[s].items()}
    names = [name for name, view in VIEWS.items() if view == config.view]
    assert len(names) == 1, f"the views of {config.method} are {len(names)} of the named ones"
    return flat | {"view": names[0]}


@pytest.mark.parametrize("dataset", OF_THE_PAPER)
def test_the_documents_list_each_tuned_value_that_differs_from_table_2(dataset: str) -> None:
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in METHOD_PAGE.read_text().splitlines()
        if re.match(rf"\| `?({'|'.join(NAMES)})`? \| `", line)
    ]
    assert all(source for *_, source in rows)
    documented = {(method, name): (value, other) for method, name, value, other, _ in rows}
    assert len(documented) == len(rows), "a value is listed twice"
    differing = {}
    for method in TUNED:
        ours, theirs = settings(tuned(method, dataset)), settings(paper(method, dataset))
        differing |= {(method, name): (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    assert documented == differing
