"""bench/rounds.py: steps in processes of their own, in interleaved rounds, and the ratios of their times."""

import pytest

from bench.conftest import measured_step
from bench.measurement import Ratio
from bench.rounds import Comparison
from bench.steps import EAGER, REFERENCE, Size

TINY = Size(images=4, side=8, width=2)


def test_steps_run_in_rounds_in_processes_of_their_own():
    comparison = Comparison(kind="ablation", names=(REFERENCE, EAGER), size=TINY, rounds=2)
    rows, rates = comparison.measure()
    assert [*rows] == [REFERENCE, EAGER]
    for row in rows.values():
        assert len(row.seconds) == len(rates) == 2
        assert min(row.seconds) > 0
        assert row.tflop is not None
        assert row.tflop > 0
        assert row.peak_bytes is not None
        assert row.peak_bytes > 2**20
    assert rows[REFERENCE].ratio is None
    ratio = rows[EAGER].ratio
    assert ratio is not None
    assert ratio.least > 0


def test_a_process_that_ends_is_named():
    with pytest.raises(RuntimeError, match=r"no such step.*exit code 1"):
        Comparison(kind="ablation", names=("no such step",), size=TINY, rounds=1).measure()


def test_a_comparison_that_fails_is_tried_once():
    comparison = Comparison(kind="ablation", names=("no such step", "another"), size=TINY, rounds=1)
    measured = {}
    with pytest.raises(RuntimeError, match="no such step"):
        measured_step(comparison, "no such step", measured, print)
    with pytest.raises(pytest.fail.Exception, match="first failure"):
        measured_step(comparison, "another", measured, print)


def test_peers_are_compared_by_their_operations():
    comparison = Comparison(kind="peers", names=("ours", "other"), size=TINY, rounds=2)
    seconds, tflop = {"ours": [4.0, 8.0], "other": [1.0, 4.0]}, {"ours": 8.0, "other": 2.0}
    rows = comparison.results(seconds, tflop, {"ours": 1, "other": 1})
    # Ours: 2 and 1 TFLOP/s; the other: 2 and 0.5.
    assert rows["other"].ratio == Ratio(1.5, 1.0, 2.0)
    ablation = Comparison(kind="ablation", names=("ours", "other"), size=TINY, rounds=2)
    assert ablation.results(seconds, tflop, {"ours": 1, "other": 1})["other"].ratio == Ratio(3.0, 2.0, 4.0)
