"""Tests that attacks on the file of a checkpoint change no number, run nothing and reserve no memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.faults.checkpoints import (
    STEP,
    flipped,
    harmful,
    lying,
    make_checkpoint,
    outcome,
    regions,
    reserved_bytes,
    run,
    state,
)
from mnclglf.config import ModelConfig
from mnclglf.runs import checkpoint, torch_file
from mnclglf.runs.checkpoint import load_checkpoint
from mnclglf.training.initial_weights import read_weights

NOTED = "ignore:.*(pickle protocol|TorchScript)"  # what torch warns of in such files


@pytest.mark.filterwarnings(NOTED)
def test_attacks_lose_nothing() -> None:
    rows = run(60, 10, seed=0)
    assert [row for row in rows if row.lost] == []
    assert rows[0].tried == rows[0].refused == 60  # the checksum covers every bit
    assert {row.attack: row.refused for row in rows}["tensors marked as folders"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings(NOTED)
def test_more_attacks_lose_nothing() -> None:
    assert [row for row in run(500, 50, seed=1) if row.lost] == []


def test_flips_are_of_every_region(tmp_path: Path) -> None:
    data = make_checkpoint(tmp_path).read_bytes()
    covered = sorted(place for places in regions(data).values() for place in places)
    assert covered == list(range(len(data)))
    names = [name for name, _ in flipped(data, 50, np.random.default_rng(0))]
    assert all(sum(region in name for name in names) == 10 for region in regions(data))


@pytest.mark.parametrize("lack", ["sizes", "names", "kinds"])
def test_the_attacks_find_what_is_not_checked(lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that no check refuses would be lost: this is what the table would say."""
    data = make_checkpoint(tmp_path).read_bytes()
    found = dict(lying(data))
    path = tmp_path / f"step-{STEP:08d}.pt"
    if lack == "sizes":
        monkeypatch.setattr(checkpoint, "check_archive", lambda *_, **__: None)
        path.write_bytes(found["tensors marked as folders"])
        assert outcome(path) == "other numbers were loaded"
    elif lack == "names":
        monkeypatch.setattr(torch_file, "_named", lambda _: [])
        path.write_bytes(found["torch.FloatTensor(2147483647)"])
        assert outcome(path).endswith("MiB were reserved")
    else:
        monkeypatch.setattr(checkpoint, "KINDS", {})
        path.write_bytes(found["config is 3"])
        assert outcome(path) == "other numbers were loaded"


@pytest.mark.filterwarnings(NOTED)
def test_initial_weights_are_no_way_in(tmp_path: Path) -> None:
    data = make_checkpoint(tmp_path).read_bytes()
    path, ran = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save(state()["method"], path)
    assert read_weights(str(path), ModelConfig())[1].keys() == state()["method"].keys()
    attacks = [*harmful(data, ran), *lying(data)]
    before = reserved_bytes()
    for name, forged in attacks:
        path.write_bytes(forged)
        with pytest.raises(ValueError, match=r"weights\.pt"):
            read_weights(str(path), ModelConfig())
        assert not ran.exists(), name
    assert reserved_bytes() - before < 2**27


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    def named(**changes: Any) -> str:
        path = tmp_path / "step-00000001.pt"
        torch.save({"format": 1, "step": 1, **changes}, path)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            load_checkpoint(path)
        return str(caught.value)

    assert "step is a Tensor" in named(step=torch.tensor(3))
    assert "step is -1" in named(step=-1)
    assert "step is a bool" in named(step=True)
    assert "side is 0" in named(side=0)
    assert "steps_per_epoch is -3" in named(steps_per_epoch=-3)
    assert f"step is {2**53}" in named(step=2**53)
    assert "side is a str; rng is a list" in named(side="8", rng=[1])
    assert "mean is not of 3 channels" in named(mean=torch.zeros(2))
    assert "config is a NoneType" in named(config=None)
