"""What a run over two ranks does when a rank is killed, stopped, stuck or fails: the program, started by torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from bench.faults.processes import (
    OPTIONS,
    ROOT,
    STEPS,
    end_of,
    log_of,
    newest_step,
    ranks_of,
    wait_for_step,
)
from bench.faults.processes import start_training as start

pytestmark = pytest.mark.slow  # each starts processes, which takes seconds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "undisturbed"
    process = start(out)
    assert process.wait(300) == 0, log_of(out)
    return out


def assert_same_end(out: Path, undisturbed: Path) -> None:
    """Asserts that the run's end is that of the undisturbed one, bit for bit, and that no record is lost or doubled."""
    assert newest_step(out) == STEPS
    expected = end_of(undisturbed)
    for name, value in end_of(out).items():
        assert torch.equal(value, expected[name]), name
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 16, 20, 24]


JOIN = """
import time, torch
from mnclglf.training.ranks import join, leave, ranks_of_environment
ranks = ranks_of_environment()
for start in range(6):
    time.sleep(0.3 * (ranks.rank + start) % 2)  # another rank is first each time
    join(ranks, torch.device("cpu"), 30)
    ranks.wait_for_all()
    leave()
"""


def test_ranks_that_start_again_do_not_meet_ended_ones() -> None:
    # torchrun keeps its store when it starts all ranks again, and with it gloo's addresses of ended ranks.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "PYTHONPATH": path}
    environment = {**os.environ, **shared, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [
        subprocess.Popen([sys.executable, "-c", JOIN], env={**environment, "RANK": str(rank)}) for rank in range(2)
    ]
    assert [process.wait(120) for process in started] == [0, 0]


def test_rank_0_alone_prints_and_writes(undisturbed: Path) -> None:
    said = log_of(undisturbed)
    assert said.count("byol on digits") == said.count("report: ") == 1
    assert "2 ranks: batch size 32 is that of all together, 16 images on each" in said
    assert (undisturbed / "report.html").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_goes_on_after_a_rank_is_killed(rank: int, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "killed"
    process = start(out)
    wait_for_step(out, 6, process)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    assert process.wait(300) == 0, log_of(out)
    assert_same_end(out, undisturbed)
    assert "resuming after step" in log_of(out)
    assert len(re.findall(rf"no sign of life from rank {rank} \(process \d+ on", log_of(out))) == 1


def test_all_ranks_stop_after_the_same_step_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = start(out)
    wait_for_step(out, 6, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM, log_of(out)
    assert log_of(out).count("stopped and saved") == 1
    alone = start(out, gpus=1)
    assert alone.wait(300) == 0, log_of(out)
    assert "resuming after step" in log_of(out)
    assert newest_step(out) == STEPS


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    out = tmp_path / "one"
    process = start(out)
    wait_for_step(out, 6, process)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    assert process.wait(120) == 128 + signal.SIGUSR1, log_of(out)
    assert log_of(out).count("stopped and saved") == 1
    assert "resuming" not in log_of(out)


def test_a_stuck_rank_is_named_within_the_time_out(tmp_path: Path) -> None:
    out = tmp_path / "stuck"
    process = start(out, "--rank-timeout", "15")
    wait_for_step(out, 6, process)
    stuck = ranks_of(process)[1]
    os.kill(stuck, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while "no sign of life" not in log_of(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert re.findall(rf"no sign of life from rank 1 \(process {stuck} on", log_of(out)), log_of(out)
    process.send_signal(signal.SIGTERM)
    os.kill(stuck, signal.SIGKILL)
    process.wait(60)


def test_an_error_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "error"
    process = start(out, "--lr", "1e30")
    assert process.wait(300) == 1, log_of(out)
    said = log_of(out)
    assert said.count("not finite; the batch holds") == 1
    assert len(re.findall(r"mnclglf: rank [01]: step", said)) == 1


def test_a_batch_that_ranks_cannot_divide_is_refused_before_they_start(tmp_path: Path) -> None:
    out = tmp_path / "odd"
    process = start(out, gpus=3)
    assert process.wait(60) == 2
    assert log_of(out).count("take 30 or 33") == 1
    assert not out.exists()


def test_ranks_with_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "other"
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from mnclglf.cli import main\n"
        "raise SystemExit(main([*sys.argv[1:], '--seed', os.environ['RANK']]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [*command, "train", *OPTIONS, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("rank 1 has another") == 1
    assert not out.exists()
