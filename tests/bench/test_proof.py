"""bench/proof.py: nothing is measured before the tests pass, and a pass is remembered until a source changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from bench import proof


class Cache:
    """Stand-in for pytest's cache."""

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
    cache = Cache()
    config = cast(pytest.Config, SimpleNamespace(cache=cache))
    with pytest.raises(pytest.exit.Exception, match="tests fail"):
        proof.require_proof(config, [failing])
    assert not cache.kept
    proof.require_proof(config, [passing])
    assert cache.kept == {proof.KEPT: proof.digest()}
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


def test_the_tests_that_must_pass_exist():
    for path in (*proof.STEP_TESTS, *proof.OPERATOR_TESTS, *proof.GPU_TESTS):
        assert (proof.ROOT / path).exists(), path
