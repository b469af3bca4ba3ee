"""Tests of the smoke runs with other Pythons, on made-up ones."""

import subprocess
from pathlib import Path

import pytest

from tools import smoke_pythons

FIND = (smoke_pythons.ROOT / "tools" / "find_python.sh").read_text()


class Machine:
    """Replacement of subprocess.run: knows the version of each path, records the rest, fails at `fail_at`."""

    def __init__(self, on_path: dict[str, str], named: dict[str, str], fail_at: str = "") -> None:
        self.on_path, self.versions, self.fail_at = on_path, {**on_path, **named}, fail_at
        self.commands: list[list[str]] = []
        self.places: list[Path | None] = []

    def __call__(self, command, *, check=False, cwd=None, **_):
        if command[-1] == "--all":
            return subprocess.CompletedProcess(command, 0, "".join(f"{path}\n" for path in self.on_path))
        if command[1:] == ["-c", smoke_pythons.ASK_VERSION]:
            if command[0] not in self.versions:
                raise FileNotFoundError(command[0])
            return subprocess.CompletedProcess(command, 0, self.versions[command[0]] + "\n")
        self.commands.append(command)
        self.places.append(cwd)
        return subprocess.CompletedProcess(command, int(bool(self.fail_at) and self.fail_at in command))


def test_each_other_version_is_run_once_and_the_rest_is_named(monkeypatch, capsys):
    monkeypatch.setenv(smoke_pythons.NAMES, "/a b/python3.12:/opt/python3.13")
    machine = Machine(
        {"/usr/bin/python3.11": "3.11", "/usr/bin/python3.12": "3.12"},
        {"/a b/python3.12": "3.12", "/opt/python3.13": "3.13"},
    )
    assert smoke_pythons.main(machine, own="3.11") == 0
    setups = [command for command in machine.commands if command[0] == "make"]
    assert setups == [["make", "setup", "PYTHON=/a b/python3.12"], ["make", "setup", "PYTHON=/opt/python3.13"]]
    assert [command[1] for command in machine.commands if command[0] == ".venv/bin/mnclglf"] == ["train", "knn"] * 2
    assert sum("tests/test_wheel.py" in command for command in machine.commands) == 2
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "Python 3.11: the whole suite",
        "Python 3.12: smoke run passed",
        "Python 3.13: smoke run passed",
        "Python 3.14: not run; there is none here (MNCLGLF_PYTHONS may name one)",
    ]
    assert not any(place is None or place.exists() for place in machine.places)


def test_step_that_fails_is_named_and_the_other_versions_go_on(monkeypatch, capsys):
    monkeypatch.delenv(smoke_pythons.NAMES, raising=False)
    machine = Machine({"/p/python3.12": "3.12", "/p/python3.13": "3.13"}, {}, fail_at="knn")
    assert smoke_pythons.main(machine, own="3.11") == 1
    assert [command[0] for command in machine.commands].count("make") == 2
    assert "Python 3.12: FAILED: .venv/bin/mnclglf knn runs/smoke\n" in capsys.readouterr().out


def test_python_that_is_named_and_does_not_run_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv(smoke_pythons.NAMES, "/nowhere/python3.12")
    assert smoke_pythons.main(Machine({}, {}), own="3.11") == 1
    assert "/nowhere/python3.12" in (said := capsys.readouterr().err)
    assert smoke_pythons.NAMES in said


@pytest.mark.parametrize("version", smoke_pythons.VERSIONS)
def test_versions_are_those_that_make_looks_for(version):
    (line,) = (line for line in FIND.splitlines() if line.startswith("versions="))
    assert f"python{version}" in line
    assert line.count("python") == len(smoke_pythons.VERSIONS)


def test_ci_runs_it_after_the_suite():
    script = (smoke_pythons.ROOT / ".ci" / "run").read_text()
    assert 0 <= script.index("make test") < script.index("tools/smoke_pythons.py")
