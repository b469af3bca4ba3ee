"""Tests of the locks between processes: who waits, who is refused, what a killed process leaves."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnclglf.reports.page import write_report
from mnclglf.runs import locks
from mnclglf.runs.locks import TakenError, held, one_at_a_time, training_in, writing_in
from mnclglf.runs.results import Result, load_results, save_results

HOLD = "import sys, time; from pathlib import Path; from mnclglf.runs.locks import training_in, writing_in\n"
HOLD += "with {}(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@contextmanager
def other_process(lock: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Holds a lock in another process."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-c", HOLD.format(lock), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_training_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    with other_process("training_in", tmp_path) as first:
        with pytest.raises(TakenError, match=rf"{tmp_path} .*process {first.pid} on .*--out"), training_in(tmp_path):
            pass
        first.kill()
        first.wait()
        with training_in(tmp_path):
            pass


def test_a_report_and_results_are_written_during_a_training(tmp_path: Path) -> None:
    with training_in(tmp_path):
        save_results(tmp_path / "evaluation.json", [one("pretrained")])
        write_report(tmp_path)
    assert (tmp_path / "report.html").exists()


def one(representation: str) -> Result:
    return Result(protocol="knn", representation=representation, top1=0.5, top5=1.0)


def save_twenty(path: Path, name: str) -> None:
    for number in range(20):
        save_results(path, [one(f"{name}{number}")])


def test_results_that_are_merged_at_the_same_moment_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=save_twenty, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {r.representation for r in load_results(path)} == {f"{name}{n}" for name in "abc" for n in range(20)}
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_writing_waits_for_its_holder(tmp_path: Path) -> None:
    with other_process("writing_in", tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    with writing_in(tmp_path):  # the holder was killed
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with held(tmp_path / "x.lock") as mine:
        assert mine
    with training_in(tmp_path), writing_in(tmp_path):
        pass
    assert f"{tmp_path / 'x.lock'} cannot be locked" in caplog.text
    assert os.strerror(number) in caplog.text


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"none is no directory.*--out"), writing_in(tmp_path / "none"):
        pass


def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A worker of a loader that outlives its run, as a traceback keeps it, must not keep the run from resuming."""
    with training_in(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with training_in(tmp_path):
            pass
        with training_in(tmp_path), pytest.raises(TakenError), training_in(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_processes_hold_a_lock_one_at_a_time_and_say_that_they_wait(tmp_path: Path) -> None:
    said: list[str] = []
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with one_at_a_time(tmp_path / "lock", lambda: (said.append("waiting"), waiting.set())):
            order.append("second")

    with one_at_a_time(tmp_path / "lock", lambda: said.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert (said, order) == (["waiting"], ["first", "second"])


def test_a_full_disk_does_not_keep_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    write = os.write
    monkeypatch.setattr(locks.os, "write", lambda _, data: write(full, data))
    with held(tmp_path / "lock") as mine:
        assert mine
    os.close(full)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_file_that_came_with_a_folder_is_not_written_through(kind: str, tmp_path: Path) -> None:
    lock = tmp_path / "run" / "checkpoints" / ".training.lock"
    lock.parent.mkdir(parents=True)
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    if kind == "link":
        lock.symlink_to(victim)
    else:
        os.mkfifo(lock)
    with (
        pytest.raises(OSError, match=r"no file but a link, a pipe or a device; remove it: '.*training\.lock'"),
        training_in(tmp_path / "run"),
    ):
        pass
    assert victim.read_text() == "mine"
    signal.alarm(10)  # opening a pipe would wait for a writer
    assert not locks.is_training(tmp_path / "run")
    signal.alarm(0)
