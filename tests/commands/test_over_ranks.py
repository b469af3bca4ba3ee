"""Commands that torchrun starts in two processes: what is printed and written, and what a failing rank leaves."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding import folder_of
from made_runs import make_run
from PIL import Image

from mnclglf.cli import main, parse
from mnclglf.evaluation.embedding_file import beside

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = 2200  # five batches, the last one short


def as_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging, "disable", lambda level: None)  # which a rank does for its whole process


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_runs_what_is_not_shared(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path / "runs" / "one", method="simsiam")
    as_rank(rank, monkeypatch)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr()
    assert (bool(said.out), (run / "report.html").is_file()) == (rank == 0, rank == 0)
    assert not said.err


@pytest.mark.parametrize(
    ("command", "remedy"), [("finetune runs/x", "linear or logistic"), ("reproduce table3", "CUDA_VISIBLE_DEVICES")]
)
def test_what_runs_in_one_process_is_refused(command: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(command.split()).check()
    as_rank(0, monkeypatch)
    with pytest.raises(ValueError, match=rf"torchrun has started 2; .*{remedy}"):
        parse(command.split()).check()


def test_help_is_printed_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    as_rank(1, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(["knn", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("over-ranks") / "run", method="simsiam")[0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Gives this process one thread, as each rank has: the last bits may depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many names of a few images."""
    folder = tmp_path_factory.mktemp("photos")
    few = sorted(folder_of(folder / "few", 8).rglob("*.png"))
    (folder / "many").mkdir()
    for number in range(PHOTOS):
        os.link(few[number % len(few)], folder / "many" / f"{number:05}.png")
    return folder / "many"


def start(log: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Starts a command by torchrun, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mnclglf"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *map(str, arguments), "--device", "cpu"],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """Returns the process number of a rank that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (found,) = [
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return found


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"{path} was not begun"
        assert time.monotonic() < deadline, f"{path} was not begun"
        time.sleep(0.005)


def errors_of(log: Path) -> Sequence[str]:
    return re.findall(r"^mnclglf: .*$", log.read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_knn_over_ranks_is_that_of_one_process(run: Path, tmp_path: Path) -> None:
    one, two, log = shutil.copytree(run, tmp_path / "one"), shutil.copytree(run, tmp_path / "two"), tmp_path / "log"
    assert start(log, "knn", two).wait(120) == 0, log.read_text()
    said = log.read_text()
    assert said.count("report: ") == 1
    assert said.count("| Top-1") == 1
    assert main(["knn", str(one), "--device", "cpu"]) == 0
    assert (two / "evaluation.json").read_bytes() == (one / "evaluation.json").read_bytes()
    assert (two / "gallery.npz").read_bytes() == (one / "gallery.npz").read_bytes()


@pytest.mark.slow
def test_a_missing_run_is_told_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert start(log, "logistic", tmp_path / "nowhere").wait(120) == 1
    (told,) = errors_of(log)
    assert re.match(r"mnclglf: rank [01]: .*nowhere", told)


@pytest.mark.slow
def test_a_damaged_image_of_another_rank_is_told_once(run: Path, photos: Path, tmp_path: Path) -> None:
    folder, out, log = tmp_path / "damaged", tmp_path / "a.npy", tmp_path / "log"
    shutil.copytree(photos, folder, copy_function=os.link)
    bad = folder / "00700.png"  # in the second batch, which rank 1 reads
    bad.unlink()
    bad.write_bytes(b"no image")
    assert start(log, "embed", run, folder, "--out", out).wait(120) == 1
    (told,) = errors_of(log)
    assert re.match(r"mnclglf: rank [01]: .*00700\.png.*--skip-corrupt", told)
    assert not out.exists()
    bad.unlink()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(bad)
    assert main(["embed", str(run), str(folder), "--out", str(out), "--device", "cpu"]) == 0  # one process goes on
    assert len(np.load(out)) == PHOTOS


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_is_ended_leaves_a_file_to_go_on_with(
    number: signal.Signals, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "a.npy", tmp_path / "log"
    process = start(log, "embed", run, photos, "--out", out)
    wait_for_file(beside(out, "partial.json"), process)
    os.kill(rank_of(process, 1), number)
    assert process.wait(120) != 0
    assert not out.exists()
    said = log.read_text()
    if number == signal.SIGKILL:
        (told,) = errors_of(log)
        assert "no sign of life from rank 1" in told
        assert "Give the same command again" in told
    else:
        assert said.count("stopped after") == 1
        assert not errors_of(log)
    assert main(["embed", str(run), str(photos), "--out", str(out), "--device", "cpu"]) == 0
    whole = tmp_path / "whole.npy"
    assert main(["embed", str(run), str(photos), "--out", str(whole), "--device", "cpu"]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert beside(out, "csv").read_bytes() == beside(whole, "csv").read_bytes()
