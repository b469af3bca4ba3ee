"""What the attacks on runs count as lost, and a short form of them."""

import errno
import gc
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.faults import contents, disk, kills, pairs, signals
from bench.faults.commands import Place
from bench.faults.operations import kill_before
from bench.faults.outcome import Row, table_of
from bench.faults.processes import LOG_EVERY, STEPS
from bench.faults.ranks import differences
from bench.faults.ranks import kills as kills_of_ranks
from mnclglf.reports import page
from mnclglf.training import describe, loop

SEED = 0


STATE = {"method": {"weight": torch.arange(3.0)}, "optimizer": {"state": {0: torch.ones(3)}}}


def finished(out: Path) -> Path:
    """Writes what a finished run leaves, as far as it is compared."""
    (out / "checkpoints").mkdir(parents=True)
    torch.save(STATE, out / "checkpoints" / f"step-{STEPS:08}.pt")
    np.savez(out / "queue.npz", steps=np.arange(2))
    steps = range(LOG_EVERY, STEPS + 1, LOG_EVERY)
    (out / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    return out


def test_each_loss_is_found(tmp_path: Path) -> None:
    true = finished(tmp_path / "true")
    found = tmp_path / "found"
    newest, metrics = found / "checkpoints" / f"step-{STEPS:08}.pt", found / "metrics.jsonl"

    def of(change: Callable[[Path], object]) -> list[str]:
        shutil.rmtree(found, ignore_errors=True)
        change(finished(found))
        return differences(found, true)

    lines = (true / "metrics.jsonl").read_text()
    assert of(lambda out: None) == []
    assert of(lambda out: newest.rename(out / "checkpoints" / "step-00000008.pt")) == ["ends at step 8 of 24"]
    assert of(lambda out: torch.save(STATE | {"method": {"weight": torch.ones(3)}}, newest)) == ["weight differs"]
    assert of(lambda out: torch.save(STATE | {"optimizer": {"state": {}}}, newest)) == ["the optimizer differs"]
    assert of(lambda out: np.savez(out / "queue.npz", steps=np.arange(3))) == ["queue.npz differs"]
    assert of(lambda out: (out / "queue.npz").write_bytes(b"torn")) == ["queue.npz cannot be read"]
    assert of(lambda out: (out / "queue.npz").unlink()) == ["queue.npz is missing"]
    assert of(lambda out: metrics.write_text(lines[: lines.rfind("{")])) == ["records of steps [4, 8, 12, 16, 20]"]
    assert of(lambda out: metrics.write_text(lines + lines[lines.rfind("{") :]))[0].endswith("20, 24, 24]")
    assert of(lambda out: metrics.write_text(lines[:-3])) == ["a torn record, or none"]
    assert of(lambda out: (out / ".config.json.tmp").touch()) == [".config.json.tmp is left over"]
    assert of(lambda out: metrics.unlink()) != []


@pytest.mark.slow
def test_a_run_survives_a_kill() -> None:
    (kill,) = kills_of_ranks(1, seed=0)
    assert (kill.lost, kill.commands) == ([], 1)
    assert kill.starts == 2


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place whose commands run in children of this process, which is as before afterwards."""
    for module, name in ((page, "render"), (loop, "describe_limits"), (describe, "describe_environment")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    yield Place(tmp_path)
    torch.set_num_threads(threads)
    gc.unfreeze()


def some(operations: list[str], count: int) -> list[str]:
    return random.Random(SEED).sample(sorted(operations), count)


def test_packing_survives_kills_and_failing_disks(place: Place) -> None:
    attacked = place.undisturbed("pack")
    for operation in some([*kills.operations_of(place, attacked)], 4):
        assert kills.killed(place, attacked, partial(kill_before, place.work, operation, 1)) == [], operation
    for operation in some(disk.operations_of(place, attacked), 3):
        assert disk.failed(place, attacked, operation, errno.EIO) == [], operation


@pytest.mark.slow
def test_a_training_survives_kills_disks_and_signals(place: Place) -> None:
    attacked = place.undisturbed("train")
    for operation in some([*kills.operations_of(place, attacked)], 6):
        assert kills.killed(place, attacked, partial(kill_before, place.work, operation, 1)) == [], operation
    for operation in some(disk.operations_of(place, attacked), 6):
        assert disk.failed(place, attacked, operation, errno.ENOSPC) == [], operation
    for number in signals.SIGNALS:
        assert signals.signalled(place, attacked, number, attacked.seconds / 2) == [], number.name
    assert signals.twice(place, attacked, signal.SIGTERM) == []
    half, pair = place.half_trained(), ("train", "knn")
    true = pairs.one_after_the_other(place, half, pair)
    assert pairs.at_once(place, half, pair, 0.1, true) == []


def test_what_differs_in_a_folder_is_found(tmp_path: Path) -> None:
    def written(name: str, seconds: float, loss: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "step_seconds": {seconds}}}\n')
        torch.save({"weight": torch.full((2,), loss)}, folder / "step-00000001.pt")
        (folder / ".training.lock").touch()
        return folder

    true = contents.contents_of(written("true", 1.0, 0.5))
    assert contents.differences(written("same", 2.0, 0.5), true) == []
    other = written("other", 1.0, 0.25)
    (other / ".config.json.1-00000000.tmp").touch()
    assert contents.differences(other, true) == [
        "metrics.jsonl differs",
        "step-00000001.pt differs",
        ".config.json.1-00000000.tmp is left over",
    ]
    (other / "metrics.jsonl").write_text('{"step": 1, "lo\n')
    (other / "step-00000001.pt").unlink()
    torn, _, missing = contents.differences(other, true)
    assert torn.startswith("metrics.jsonl cannot be read")
    assert missing == "step-00000001.pt is missing"


def test_a_message_names_its_file_and_a_remedy() -> None:
    def problems(code: int, text: str) -> list[str]:
        return [problem.partition(":")[0] for problem in disk.problems_of(code, text, "/runs/work", "")]

    assert problems(0, "done") == []
    assert problems(1, "mnclglf: [Errno 28] No space left on device: '/runs/work/x'; free space") == []
    assert problems(1, "mnclglf: [Errno 28] No space left on device; free space") == [
        "the message does not name a file"
    ]
    assert problems(1, "mnclglf: [Errno 5] error: '/runs/work/x'") == ["the message has no remedy"]
    assert problems(1, "Traceback (most recent call last):") == ["traceback"]
    assert problems(-11, "")[0].startswith("ended with -11")


def test_the_table_counts_what_survived() -> None:
    row = Row("kill")
    row.add("one", [])
    row.add("two", ["x differs"])
    assert (
        table_of([row])
        == "| attack | tried | survived | lost |\n|---|--:|--:|--:|\n| kill | 2 | 1 | 1 |\n\n- kill: two: x differs\n"
    )
