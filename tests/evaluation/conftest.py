"""A trained run for the tests of a module, from the configuration CONFIG of that module."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mnclglf.training.loop import Trainer


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run directory, which the tests of a module share and do not change."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(request.module.CONFIG, folder, console=Console(file=io.StringIO(), width=1000)).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Returns a copy of the run directory for one test."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
