"""Training over ranks: real processes against one process on the same global batches."""

from functools import cache

import pytest
import torch
from rank_processes import run_on_ranks
from ranks_of_methods import CASES, COMPILED, ROUNDED, Case, Trained, trained
from torch import Tensor

from mnclglf.config import UsageError
from mnclglf.training.ranks import ranks_of_environment


@cache
def on_ranks(ranks: int) -> list[list[Trained]]:
    """Returns what every case leaves on every rank; the processes are started once."""
    return run_on_ranks("ranks_of_methods:train_all", ranks, CASES + ROUNDED * (ranks == 2))


@cache
def alone(case: Case) -> Trained:
    return trained(case)


def tensors_of(found: Trained) -> dict[str, Tensor]:
    steps = {f"step {i}: {name}": x for i, step in enumerate(found.losses) for name, x in step.items()}
    moments = {f"optimizer {i}": x for i, x in enumerate(found.optimizer)}
    return steps | found.state | moments


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, filter(None, case))))
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_process(ranks: int, case: Case) -> None:
    every = [tensors_of(of_rank[CASES.index(case)]) for of_rank in on_ranks(ranks)]
    expected = tensors_of(alone(case))
    for found in every:
        for name, true in expected.items():
            # fp64 sums in another order; four steps amplify that as in FP64 of methods/test_mnclglf.py.
            difference = (found[name] - true).nan_to_num().abs() - 1e-10 * true.nan_to_num().abs()
            assert difference.max() <= 1e-10, (name, difference.max())
            assert torch.equal(found[name].isnan(), true.isnan()), name
            assert torch.equal(found[name].nan_to_num(), every[0][name].nan_to_num()), name
    assert {of_rank[CASES.index(case)].failed_step for of_rank in on_ranks(ranks)} == {alone(case).failed_step}


def error_of(found: Trained, truth: Trained) -> float:
    """Returns the mean relative error of the losses and the norm of the first step: later ones amplify by chance."""
    (first, *_), (true, *_) = found.losses, truth.losses
    errors = [(first[name].double() - x).abs() / x.abs() for name, x in true.items()]
    return float(torch.stack(errors).mean())


def assert_as_exact_as_one_process(case: Case, of_ranks: list[Trained]) -> None:
    """Asserts that ranks are no further from fp64 than one process is, and equal to each other."""
    truth = alone(Case(case.method))
    expected = error_of(alone(case._replace(compile="off", reduce_dtype="fp32")), truth)
    # 3, and 4 roundings to fp32: errors of a few roundings, whose signs are chance. 2**-9: gradients rounded to bf16.
    limit = 3 * expected + 2**-22 + (2**-9 if case.reduce_dtype == "bf16" else 0)
    for found in of_ranks:
        assert error_of(found, truth) <= limit
        for name, value in found.state.items():
            assert torch.equal(value, of_ranks[0].state[name]), name


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: "-".join(map(str, filter(None, case))))
def test_ranks_round_as_one_process_does(case: Case) -> None:
    place = len(CASES) + ROUNDED.index(case)
    assert_as_exact_as_one_process(case, [of_rank[place] for of_rank in on_ranks(2)])


@pytest.mark.slow
def test_compiled_ranks_are_one_process() -> None:
    found = run_on_ranks("ranks_of_methods:train_all", 2, COMPILED, seconds=500)
    for place, case in enumerate(COMPILED):
        assert_as_exact_as_one_process(case, [of_rank[place] for of_rank in found])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK 1 must be below WORLD_SIZE 1"),  # a job array that sets RANK
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK 0 must be below WORLD_SIZE 0"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK 2 must be below"),
    ],
)
def test_a_rank_beyond_the_number_of_ranks_is_refused(
    values: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **values}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{named}.*; start with torchrun, or unset both"):
        ranks_of_environment()
