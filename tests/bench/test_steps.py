"""Steps that take turns, what is made of their times, and what must be so before any time is reported."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import compare, draw, proof
from bench.conftest import measured_row
from bench.peers import PEERS
from bench.row import Ratio, StepRow
from bench.steps import EAGER, GRAPHS, KEPT, LADDER, REFERENCE, Size, rungs
from bench.turns import Comparison

CPU = torch.device("cpu")
TINY = Size(images=4, side=8, width=2)


def test_the_ladder_of_a_device():
    assert [rungs(CPU)[0], rungs(CPU)[-2]] == [REFERENCE, KEPT]
    assert GRAPHS not in rungs(CPU)
    assert KEPT not in rungs(torch.device("cuda"))


def states(name: str) -> list[float]:
    """Something of the weights after two steps of a rung, on the same noise."""
    torch.manual_seed(0)
    step, found = LADDER[name](TINY, CPU), []
    for _ in range(2):
        result = step()
        found.append(result["loss"] if isinstance(result, dict) else result[0].total.item())
    return found


def test_every_rung_computes_the_same():
    """To bf16: 2^-8 a rounding, through twenty layers, whose batch norms see four images, and a step between."""
    expected = states(REFERENCE)
    assert all(math.isfinite(loss) for loss in expected)
    for name in list(LADDER)[1 : list(LADDER).index(EAGER) + 1]:
        tolerance = 1e-4 if name == "+ channels_last" else 0.1
        assert states(name) == pytest.approx(expected, rel=tolerance), name


def test_contenders_take_turns_in_processes_of_their_own():
    comparison = Comparison(kind="ladder", names=(REFERENCE, EAGER), size=TINY, rounds=2)
    rows, rates = comparison.measure()
    assert [*rows] == [REFERENCE, EAGER]
    for row in rows.values():
        assert len(row.seconds) == len(rates) == 2
        assert min(row.seconds) > 0
        assert row.tflop > 0
        assert row.peak_bytes > 2**20
    assert rows[REFERENCE].ratio is None
    assert rows[EAGER].ratio.least > 0


def test_a_process_that_ends_is_named():
    with pytest.raises(RuntimeError, match="the process of 'no such step' ended with exit code 1"):
        Comparison(kind="ladder", names=("no such step",), size=TINY, rounds=1).measure()


def test_a_comparison_that_fails_is_tried_once():
    comparison = Comparison(kind="ladder", names=("no such step", "another"), size=TINY, rounds=1)
    measured = {}
    with pytest.raises(RuntimeError, match="'no such step' ended"):
        measured_row(comparison, "no such step", measured, print)
    with pytest.raises(pytest.fail.Exception, match="see the first failure"):
        measured_row(comparison, "another", measured, print)


def test_peers_are_compared_by_their_operations():
    comparison = Comparison(kind="peers", names=("ours", "other"), size=TINY, rounds=2)
    seconds, tflop = {"ours": [4.0, 8.0], "other": [1.0, 4.0]}, {"ours": 8.0, "other": 2.0}
    rows = comparison.rows(seconds, tflop, {"ours": 1, "other": 1})
    # Ours: 2 and 1 TFLOP/s; the other: 2 and 0.5.
    assert rows["other"].ratio == Ratio(1.5, 1.0, 2.0)
    ladder = Comparison(kind="ladder", names=("ours", "other"), size=TINY, rounds=2)
    assert ladder.rows(seconds, tflop, {"ours": 1, "other": 1})["other"].ratio == Ratio(3.0, 2.0, 4.0)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("dtype", "channels_last"), [(None, False), (torch.bfloat16, True)])
def test_peers_train_where_lightly_is_installed(name, dtype, channels_last):
    pytest.importorskip("lightly")
    from bench.peers import peer_step

    views = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    step = peer_step(name, views, dtype=dtype, channels_last=channels_last, width=2)
    losses = [step().float().item() for _ in range(8)]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == len(losses)  # it moves


def step_row(name: str, *, kind: str = "ladder", seconds: float = 2.0, ratio: Ratio | None = None) -> StepRow:
    return StepRow(
        kind=kind, name=name, size="tiny", images=4, seconds=[seconds], tflop=1.0, ratio=ratio, peak_bytes=2**30
    )


def save(path: Path, rows: list[StepRow], device: str = "somewhere") -> Path:
    """As pytest-benchmark writes them."""
    benchmarks = [{"extra_info": row.extra_info(), "stats": {"data": row.seconds}} for row in rows]
    saved = {
        "machine_info": {"device": device, "threads": 2, "versions": {"torch": "1", "lightly": "2"}},
        "commit_info": {"id": "0123456789abc", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(saved))
    return path


def test_rows_of_steps_survive_json_and_are_drawn(tmp_path):
    rows = [step_row(REFERENCE), step_row(EAGER, seconds=0.5, ratio=Ratio(4.0, 3.5, 4.5))]
    peers = [step_row(KEPT, kind="peers"), step_row("byol", kind="peers", ratio=Ratio(1.0, 0.9, 1.1))]
    path = save(tmp_path / "run.json", [*rows, *peers])
    saved = draw.read(path)
    assert saved.steps == [*rows, *peers]
    assert saved.source == (
        "somewhere, 2 threads; torch 1, lightly 2; commit 0123456789 with uncommitted changes; 2026-01-02"
    )
    draw.main([str(path)])
    text = (tmp_path / "run.md").read_text()
    assert "| + kernels | 0.500 | 8.0 | 2.000 | 4.00 (3.50 to 4.50) | 1.00 |" in text
    assert (tmp_path / "run-steps.png").read_bytes().startswith(b"\x89PNG")
    figure = draw.step_picture(saved.steps, saved.source)
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [
        ["2.0", "8.0   4.00x"],
        ["0.50", "0.50   1.00x"],
    ]


def test_what_is_no_result_is_named(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit, match=r"other.json holds no results of make bench \(KeyError"):
        draw.read(tmp_path / "other.json")


def test_a_ratio_that_fell_by_more_than_a_tenth_is_flagged(tmp_path, capsys):
    def saved(name: str, **ratios: float) -> Path:
        rows = [step_row(key, ratio=Ratio(value, value, value)) for key, value in ratios.items()]
        return save(tmp_path / f"{name}.json", [step_row(REFERENCE), *rows])

    old = saved("old", fell=2.0, stayed=2.0, gone=1.0)
    new = saved("new", fell=1.79, stayed=1.81, came=3.0)
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "FELL  ladder: tiny, fell: 2.00 -> 1.79" in printed
    assert "2 ratios compared, 1 fell by more than 10%" in printed
    assert compare.main([str(new), str(old)]) == 0
    elsewhere = save(tmp_path / "elsewhere.json", [step_row("fell", ratio=Ratio(2, 2, 2))], device="elsewhere")
    with pytest.raises(SystemExit, match="measured on different machines"):
        compare.main([str(old), str(elsewhere)])
    with pytest.raises(SystemExit, match="have no ratio in common"):
        compare.main([str(old), str(save(tmp_path / "none.json", [step_row(REFERENCE)]))])


def test_the_last_two_results_are_compared(tmp_path):
    with pytest.raises(SystemExit, match="holds 0 results, and comparing needs two"):
        compare.newest(tmp_path)
    for name in ("20260103-000000", "20260101-000000", "20260102-000000", "gpu-report"):
        (tmp_path / f"{name}.json").touch()
    assert [path.stem for path in compare.newest(tmp_path)] == ["20260102-000000", "20260103-000000"]


class Cache:
    """As pytest's."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def get(self, key: str, default: str | None) -> str | None:
        return self.kept.get(key, default)

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value


@pytest.fixture
def failing_and_passing(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"test_{name}.py" for name in ("failing", "passing")]
    for path, outcome in zip(paths, (False, True), strict=True):
        path.write_text(f"def test_it(): assert {outcome}")
    return [str(path) for path in paths]


def test_no_speed_is_reported_when_the_tests_fail(failing_and_passing, monkeypatch):
    monkeypatch.delenv("MNCLGLF_BENCH_PROVEN", raising=False)
    failing, passing = failing_and_passing
    config = SimpleNamespace(cache=Cache())
    with pytest.raises(pytest.exit.Exception, match="the tests fail, so no speed is reported"):
        proof.require_proof(config, [failing])
    assert not config.cache.kept
    proof.require_proof(config, [passing])
    assert config.cache.kept == {proof.KEPT: proof.digest()}
    proof.require_proof(config, [failing])  # not run again: nothing has changed


def test_a_change_of_a_source_asks_for_the_tests_again(tmp_path):
    (tmp_path / "mnclglf").mkdir()
    source = tmp_path / "mnclglf" / "a.py"
    found = set()
    for text in ("1", "2"):
        source.write_text(text)
        found.add(proof.digest(tmp_path))
    source.rename(source.with_name("b.py"))
    found.add(proof.digest(tmp_path))
    assert len(found) == 3


@pytest.mark.slow
def test_launches_are_counted():
    command = [sys.executable, "-m", "bench.launches"]  # it interprets the kernels of its process
    printed = subprocess.run(command, cwd=proof.ROOT, capture_output=True, text=True, check=True).stdout
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(r"\| (.+) \| ([\d,]+) \|", printed)}
    assert list(counts) == list(LADDER)[: list(LADDER).index(EAGER) + 1]
    assert 1000 < counts[EAGER] < counts[REFERENCE] / 2
