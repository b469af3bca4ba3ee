"""Tests of checkpoints: whole or absent, damage reported, the right ones kept."""

import contextlib
import errno
import resource
import signal
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from mnclglf.models.feature_queue import FeatureQueue
from mnclglf.runs import checkpoint
from mnclglf.runs.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    DamagedError,
    delete_old_checkpoints,
    list_checkpoints,
    list_milestones,
    load_checkpoint,
    load_method,
    newest_whole,
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


def test_a_file_of_something_else_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged .*give a checkpoint") as caught:
        load_checkpoint(tmp_path / "config.json")
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_short_file_is_named_as_damage(tmp_path: Path, kept: float) -> None:
    path = save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt is no file; give a checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_directory_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "step-00000003.pt"
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt is no file; move it away to resume from an earlier"):
        load_checkpoint(path)


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
    with pytest.raises(CheckpointError, match="holds a list"):
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
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1 and 2"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=3)

    def full(value: object, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt.*No space left.*free space"):
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


def test_an_old_checkpoint_that_vanished_meanwhile_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "list_checkpoints", lambda folder: [(1, folder / "gone.pt"), (2, folder / "2.pt")])
    delete_old_checkpoints(tmp_path, keep_last=1)


def test_an_old_checkpoint_that_cannot_be_deleted_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.pt").mkdir()
    writer = CheckpointWriter()
    writer.write(tmp_path, 2, {}, keep_last=1)
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt cannot be deleted: .*; remove it by hand"):
        writer.wait()


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


def test_users_read_a_checkpoint_by_torch_alone(tmp_path: Path) -> None:
    path = save(tmp_path)
    for mmap in (False, True):
        state = torch.load(path, weights_only=True, mmap=mmap)
        assert state["format"] == 2
        assert torch.equal(state["method"]["weight"], torch.arange(5000.0))


def test_a_checkpoint_saved_again_by_torch_is_read(tmp_path: Path) -> None:
    state = load_checkpoint(save(tmp_path))
    torch.save(state, tmp_path / "step-00000003.pt")
    assert load_checkpoint(tmp_path / "step-00000003.pt")["step"] == 3


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network mount that fails for a while must not make a run step back to an earlier checkpoint."""
    save(tmp_path)

    def failing(file: BinaryIO) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "read_comment", failing)
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt cannot be read: .*Input/output error") as caught:
        load_checkpoint(tmp_path / "step-00000003.pt")
    assert not isinstance(caught.value, DamagedError)


def test_the_newest_whole_checkpoint_is_found_behind_damaged_ones(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert newest_whole(run) == (None, None, {})
    run.mkdir()
    paths = [save(run / "checkpoints", step) for step in (2, 4, 6)]
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    path, state, damaged = newest_whole(run)
    assert (path, state and state["step"]) == (paths[0], 2)
    assert damaged == dict.fromkeys((paths[2], paths[1]), "its end is missing")
    paths[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"damaged checkpoints only \(step-00000006\.pt: .*choose another --out"):
        newest_whole(run)


def test_a_checkpoint_that_cannot_be_used_is_not_stepped_over(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 2)
    torch.save({"format": 3, "step": 4}, tmp_path / "checkpoints" / "step-00000004.pt")
    with pytest.raises(CheckpointError, match="has format 3"):
        newest_whole(tmp_path)


def test_the_writer_saves_the_state_as_it_was_and_deletes_old_ones(tmp_path: Path) -> None:
    weight, module = torch.arange(4.0), torch.nn.BatchNorm1d(2)
    state: dict[str, Any] = {"method": {"weight": weight, "list": [weight]}, "module": module.state_dict()}
    with CheckpointWriter() as writer:
        for step in (1, 2, 3):
            writer.write(tmp_path, step, state, keep_last=2)
            weight += 1
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]
    saved = load_checkpoint(tmp_path / "step-00000003.pt")
    assert torch.equal(saved["method"]["weight"], torch.arange(4.0) + 2)
    assert torch.equal(saved["method"]["list"][0], torch.arange(4.0) + 2)
    assert saved["module"]._metadata == module.state_dict()._metadata  # pyright: ignore[reportAttributeAccessIssue]


def test_a_step_does_not_wait_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def slow(*_: object) -> None:
        assert may_end.wait(60)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    with CheckpointWriter() as writer:
        writer.write(tmp_path, 1, {}, keep_last=1)  # else it would wait here, as nobody lets it end
        writer.check()
        may_end.set()


def test_an_error_of_the_writer_is_raised_by_the_next_check_and_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(value: object, file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    writer = CheckpointWriter()
    for ask in (writer.wait, lambda: writer.write(tmp_path, 2, {}, keep_last=1), lambda: writer.__exit__(None)):
        writer.write(tmp_path, 1, {}, keep_last=1)
        with pytest.raises(CheckpointError, match=r"step-00000001\.pt.*No space left.*free space"):
            ask()
    writer.write(tmp_path, 1, {}, keep_last=1)
    with pytest.raises(KeyError), writer:  # an error of the training is shown, and not hidden by that of the write
        raise KeyError
    writer.check()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": torch.zeros(3, 4)}, r"weight \(\(3, 4\), torch.float32\) for \(\(3, 5\), torch.float32\)"),
        ({"weight": torch.zeros(3, 5).half()}, r"weight \(\(3, 5\), torch.float16\)"),
        ({"weight": 1}, r"weight <class 'int'>"),
        ({"more": torch.zeros(1)}, "more .* for none"),
        ({"bias": None}, "bias .*NoneType"),
    ],
)
def test_networks_that_do_not_fit_are_named_and_nothing_is_loaded(change: dict[str, Any], named: str) -> None:
    module = torch.nn.Linear(5, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {"method": {name: value + 1 for name, value in before.items()} | change}
    with pytest.raises(CheckpointError, match=rf"run holds other networks than its settings describe: .*{named}"):
        load_method(module, state, Path("run"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(CheckpointError, match="weight missing"):
        load_method(module, {}, Path("run"))


@pytest.mark.parametrize("pointer", [-1, 8, 2**40])
def test_a_pointer_outside_its_queue_is_refused(pointer: int) -> None:
    # A kernel on a GPU would write there.
    method = torch.nn.ModuleDict({"queue": FeatureQueue(8, 4)})
    state = {"method": {**method.state_dict(), "queue.pointer": torch.tensor(pointer)}}
    with pytest.raises(CheckpointError, match=rf"run holds queue\.pointer {pointer}, outside 0\.\.7; give another"):
        load_method(method, state, Path("run"))
    load_method(method, {"method": {**state["method"], "queue.pointer": torch.tensor(7)}}, Path("run"))
    assert method.state_dict()["queue.pointer"] == 7


def test_a_run_directory_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt cannot be written: .*put it back"):
        save_checkpoint(tmp_path / "run" / "checkpoints", 3, {})
    assert not list(tmp_path.iterdir())
