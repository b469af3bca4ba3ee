"""Tests that checkpoints of earlier versions load and resume; earlier_checkpoints/README.md says how they were made."""

import hashlib
import io
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mnclglf.runs.checkpoint import list_checkpoints, load_checkpoint
from mnclglf.runs.files import read_config
from mnclglf.runs.metrics import read_records
from mnclglf.training.loop import Trainer
from mnclglf.training.start import load_trained

KEPT = Path(__file__).parent / "earlier_checkpoints"
EXPECTED: dict[str, dict[str, Any]] = json.loads((KEPT / "expected.json").read_text())


def digest(state: object) -> str:
    """Returns the SHA-256 of every name and value in nested dicts and lists."""
    checksum = hashlib.sha256()

    def add(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.ndim:
            checksum.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.reshape(-1).clone(memory_format=torch.contiguous_format)
            checksum.update(plain.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, torch.Tensor):
            checksum.update(f"{name} {value.dtype} {value.item()!r}".encode())
        elif isinstance(value, (dict, list)):
            for key, kept in value.items() if isinstance(value, dict) else enumerate(value):
                add(f"{name}.{key}", kept)
        else:
            checksum.update(f"{name} {value!r}".encode())

    add("", state)
    return checksum.hexdigest()


@pytest.mark.parametrize("commit", EXPECTED)
def test_a_checkpoint_of_an_earlier_version_loads_and_resumes(
    commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    shutil.copytree(KEPT / commit, run, ignore=shutil.ignore_patterns("*.xz"))
    path = run / "checkpoints" / "step-00000002.pt"
    path.parent.mkdir()
    path.write_bytes(lzma.decompress((KEPT / commit / f"{path.name}.xz").read_bytes()))

    assert digest(load_checkpoint(path)) == EXPECTED[commit]["sha256"]
    assert load_trained(run)[2] == 2
    trainer = Trainer(read_config(run), run, console=Console(file=io.StringIO()))
    assert trainer.start == 2
    trainer.train()
    newest = load_checkpoint(list_checkpoints(path.parent)[-1][1])
    assert (newest["step"], newest["format"]) == (4, 2)
    # The loss of the run that wrote it; later versions round elsewhere, and draw views otherwise than the first (2%).
    assert read_records(run / "metrics.jsonl")[0][-1]["loss"] == pytest.approx(EXPECTED[commit]["loss"], rel=0.03)
