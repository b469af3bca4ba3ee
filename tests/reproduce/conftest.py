"""Fixtures: the tiny scale in place of `small`, and a folder for runs written by hand."""

from pathlib import Path

import pytest
from tiny_reproduce import TINY, HandMade

from mnclglf.reproduce.plan import SCALES


@pytest.fixture
def tiny_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SCALES, "small", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def hand_made(tmp_path: Path) -> HandMade:
    return HandMade(tmp_path / "out" / "runs")
