"""bench/compare.py: ratios that fell, and which files are compared."""

from pathlib import Path

import pytest
from saved_benchmarks import save, step_row

from bench import compare
from bench.measurement import Ratio
from bench.steps import REFERENCE


def test_a_ratio_that_fell_by_more_than_a_tenth_is_flagged(tmp_path, capsys):
    def saved(name: str, **ratios: float) -> Path:
        rows = [step_row(key, ratio=Ratio(value, value, value)) for key, value in ratios.items()]
        return save(tmp_path / f"{name}.json", [step_row(REFERENCE), *rows])

    old = saved("old", fell=2.0, stayed=2.0, gone=1.0)
    new = saved("new", fell=1.79, stayed=1.81, came=3.0)
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "FELL  ablation: tiny, fell: 2.00 -> 1.79" in printed
    assert "2 ratios compared, 1 fell by more than 10%" in printed
    assert compare.main([str(new), str(old)]) == 0
    elsewhere = save(tmp_path / "elsewhere.json", [step_row("fell", ratio=Ratio(2, 2, 2))], device="elsewhere")
    with pytest.raises(SystemExit, match=r"different machines.*one machine"):
        compare.main([str(old), str(elsewhere)])
    with pytest.raises(SystemExit, match="no ratio in common"):
        compare.main([str(old), str(save(tmp_path / "none.json", [step_row(REFERENCE)]))])


def test_the_last_two_results_are_compared(tmp_path):
    with pytest.raises(SystemExit, match=r"0 results.*make bench"):
        compare.newest(tmp_path)
    for name in ("20260103-000000", "20260101-000000", "20260102-000000", "gpu-day"):
        (tmp_path / f"{name}.json").touch()
    assert [path.stem for path in compare.newest(tmp_path)] == ["20260102-000000", "20260103-000000"]
