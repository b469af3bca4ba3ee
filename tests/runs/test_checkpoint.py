"""Tests of checkpoints: whole or absent, damage reported, the right ones kept."""

import contextlib
import errno
import resource
import signal
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from mnclglf.runs import checkpoint
from mnclglf.runs.checkpoint import (
    CheckpointError,
    delete_old_checkpoints,
    list_checkpoints,
    list_milestones,
    load_checkpoint,
    read_milestones,
    record_milestones,
    save_checkpoint,
)


def save(folder: Path, step: int = 3) -> Path:
    return save_checkpoint(folder, step, {"method": {"weight": torch.arange(5000.0)}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = load_checkpoint(save(tmp_path))
    assert state["step"] == 3
    assert torch.equal(state["method"]["weight"], torch.arange(5000.0))


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.8, 0.999])
def test_any_flipped_byte_is_found(tmp_path: Path, place: float) -> None:
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0xFF
    path.write_bytes(data)
    state = None
    with contextlib.suppress(CheckpointError):
        state = load_checkpoint(path)
    # zip leaves padding and some of its header unchecked: what was loaded must then be what was saved
    assert state is None or torch.equal(state["method"]["weight"], torch.arange(5000.0))


def test_a_flipped_byte_of_a_tensor_is_named_as_damage(tmp_path: Path) -> None:
    path = save(tmp_path)
    data = path.read_bytes()
    value = torch.tensor(4321.0).numpy().tobytes()
    assert data.count(value) == 1
    path.write_bytes(data.replace(value, torch.tensor(4321.5).numpy().tobytes()))
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt is damaged .*delete it"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_short_file_is_named_as_damage(tmp_path: Path, kept: float) -> None:
    path = save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt is no file$"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_directory_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no file$"):
        load_checkpoint(tmp_path)


def test_every_damage_of_the_archive_itself_is_named(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    data = save_checkpoint(tmp_path, 1, {"weight": torch.arange(8.0)}).read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        state = None
        with contextlib.suppress(CheckpointError):  # any other error fails the test
            state = load_checkpoint(path)
        assert state is None or torch.equal(state["weight"], torch.arange(8.0)), place


def test_a_checkpoint_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="has format None"):
        load_checkpoint(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = tmp_path / "step-00000001.pt"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (target,))

    torch.save({"format": 1, "step": Evil()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_checkpoint(path)
    assert not target.exists()


def test_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=3)

    def full(value: object, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt.*No space left.*Free space"):
        save(tmp_path, step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.pt"]


def test_a_really_full_disk_is_named(tmp_path: Path) -> None:
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a limit on the file's size stands in for a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, earlier[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_the_newest_and_the_milestones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save(tmp_path, step)
    record_milestones(tmp_path, [20, 40, 60])
    delete_old_checkpoints(tmp_path, keep_last=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 40, 50, 60]
    delete_old_checkpoints(tmp_path, keep_last=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 40, 60]


def test_without_milestones_only_the_newest_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    delete_old_checkpoints(tmp_path, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030.pt"]


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 7)
    for name in ("step-x.pt", ".step-00000009.pt.1.tmp", "notes.txt"):
        (tmp_path / name).touch()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [7]


def test_milestones_are_the_multiples_oldest_first(tmp_path: Path) -> None:
    for step in (30, 5, 10, 12, 20):
        save(tmp_path, step)
    assert [path.name for path in list_milestones(tmp_path, 10)] == [f"step-000000{step}.pt" for step in (10, 20, 30)]
    assert list_milestones(tmp_path, 7) == []


def test_recorded_milestones_are_the_milestones(tmp_path: Path) -> None:
    for step in (5, 10, 12, 20):
        save(tmp_path, step)
    record_milestones(tmp_path, [12])
    record_milestones(tmp_path, [5, 99])
    assert read_milestones(tmp_path) == {5, 12, 99}
    assert [path.name for path in list_milestones(tmp_path, 10)] == ["step-00000005.pt", "step-00000012.pt"]
    assert list_milestones(tmp_path) == list_milestones(tmp_path, 10)


@pytest.mark.parametrize("text", ["", "[4]", "{}", '{"steps": 4}', '{"steps": [true]}', '{"steps": ["4"]}'])
def test_a_damaged_record_of_milestones_is_named_and_deletes_nothing(tmp_path: Path, text: str) -> None:
    for step in (4, 8):
        save(tmp_path, step)
    (tmp_path / "milestones.json").write_text(text)
    with pytest.raises(ValueError, match=r"milestones\.json is damaged.*remove it.*--keep-every"):
        delete_old_checkpoints(tmp_path, keep_last=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 8]
