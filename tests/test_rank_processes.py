"""Tests of the helper that runs a function on several ranks."""

import pytest
from rank_processes import run_on_ranks


def test_a_rank_that_fails_shows_its_output() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)os:listdir on 2 ranks: rank \d ended with 1.*/nonexistent"):
        run_on_ranks("os:listdir", 2, "/nonexistent")


def test_ranks_that_hang_are_killed() -> None:
    with pytest.raises(RuntimeError, match=r"time:sleep on 2 ranks: not done after 0.5 seconds"):
        run_on_ranks("time:sleep", 2, 3600, seconds=0.5)
