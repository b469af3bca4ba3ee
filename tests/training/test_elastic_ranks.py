"""torchrun with --nnodes=1:2: machines that join and leave a run, here two agents of torchrun on this one."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from bench.faults.processes import OPTIONS, log_of, newest_step, ranks_of, start, wait_for_step

pytestmark = pytest.mark.slow  # each starts processes, which takes seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_machine(out: Path, port: int, processes: int = 1) -> subprocess.Popen[str]:
    """Starts torchrun as on one of at most two machines."""
    torchrun = ["torch.distributed.run", "--nnodes=1:2", f"--nproc-per-node={processes}", "--max-restarts=2"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=1"]
    command = [*torchrun, "-m", "mnclglf", "train", *OPTIONS, "--epochs", "1000", "--out", out]
    # Without this a machine that joins waits for ever in torch 2.14, as the others keep their first meeting place.
    return start(command, out.with_suffix(".log"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def wait_for_starts(out: Path, count: int, process: subprocess.Popen[str]) -> int:
    """Waits until a run was resumed `count` times and has a later checkpoint; returns the step resumed from."""
    deadline = time.monotonic() + 180
    while len(steps := re.findall(r"resuming after step (\d+) of", log_of(out))) < count:
        assert time.monotonic() < deadline, log_of(out)
        time.sleep(0.1)
    wait_for_step(out, int(steps[-1]) + 6, process)
    return int(steps[-1])


def assert_no_record_is_lost_or_doubled(out: Path) -> None:
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(4, newest_step(out) + 1, 4)]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_machine_joins_and_leaves(end: signal.Signals, tmp_path: Path) -> None:
    out, port = tmp_path / "elastic", free_port()
    first = start_machine(out, port)
    wait_for_step(out, 4, first)
    second = start_machine(out, port)
    joined = wait_for_starts(out, 1, first)
    assert "2 ranks: batch size 32" in log_of(out)
    ranks = ranks_of(second)
    second.send_signal(end)
    if end == signal.SIGKILL:  # the machine is lost with its rank
        os.kill(ranks[1], end)
    assert second.wait(120) != 0
    assert wait_for_starts(out, 2, first) > joined
    assert log_of(out).count("2 ranks: batch size 32") == 1  # the last start is of one rank
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) != 0
    assert log_of(out).count("stopped and saved") == (3 if end == signal.SIGTERM else 2)
    assert_no_record_is_lost_or_doubled(out)


def test_machines_whose_ranks_cannot_divide_the_batch_are_refused(tmp_path: Path) -> None:
    out, port = tmp_path / "odd", free_port()
    first = start_machine(out, port)
    wait_for_step(out, 4, first)
    second = start_machine(out, port, processes=2)
    assert [first.wait(300), second.wait(300)] == [1, 1]  # torchrun's own exit code
    said = log_of(out)
    assert "batch_size 32 is that of all 3 ranks together, which cannot divide it evenly; take 30 or 33" in said
    assert "resuming after step" not in said
    saved = newest_step(out)
    again = start_machine(out, free_port())
    assert wait_for_starts(out, 1, again) == saved
    again.send_signal(signal.SIGTERM)
    again.wait(120)
    assert_no_record_is_lost_or_doubled(out)
