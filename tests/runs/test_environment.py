"""Tests of environment.json: what is not to be had is left out, and no run ends for it."""

import subprocess
from pathlib import Path

import pytest
import torch

from mnclglf.runs import environment
from mnclglf.runs.environment import describe_environment


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, as far as the code sees."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "mnclglf" / "runs" / "environment.py"))
    return tmp_path


def commit() -> object:
    return describe_environment(torch.device("cpu"), {})["commit"]


def test_a_checkout_without_git_on_the_path_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout / "empty"))
    assert commit() is None


def test_a_git_that_cannot_run_or_fails_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = checkout / "git"
    monkeypatch.setenv("PATH", str(checkout))
    git.write_bytes(b"\x7fELF")
    git.chmod(0o755)
    assert commit() is None  # of another architecture
    git.write_text("#!/bin/sh\necho fatal: detected dubious ownership >&2\nexit 128\n")
    assert commit() is None
    git.write_text("#!/bin/sh\necho 1234567\n")
    assert commit() == "1234567"


def test_a_git_that_hangs_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(environment.subprocess, "run", run)
    assert commit() is None


def test_the_command_has_neither_the_place_of_the_program_nor_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "--dataset", "shards:https://me:word@host/a.tar?signature=x", "--out", "runs/a b"]
    monkeypatch.setattr("sys.argv", ["/home/me/.venv/bin/mnclglf", *arguments])
    command = describe_environment(torch.device("cpu"), {})["command"]
    assert command == "mnclglf train --dataset shards:https://host/a.tar --out runs/a b"
