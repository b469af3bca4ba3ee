"""bench/bench_operators.py: a run is saved, grouped by operator and case, and drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import draw, proof

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_run_is_saved_and_drawn(tmp_path):
    saved = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_operators.py", "-k", "enqueue", f"--benchmark-json={saved}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["MNCLGLF_BENCH_PROVEN"] = proof.digest()  # these are the tests
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(saved.read_text())
    assert set(found["machine_info"]) >= {"device", "threads", "autocast", "versions"}
    names = {benchmark["name"] for benchmark in found["benchmarks"]}
    assert names >= {"reference fp32", "torch fp32"}
    assert {benchmark["group"] for benchmark in found["benchmarks"]} == {"enqueue: 256 rows into 16384 x 2048, forward"}
    if not torch.cuda.is_available():
        assert "left out: triton: " in run.stdout
        assert not any("triton" in name for name in names)

    draw.main([str(saved)])
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = saved.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in names)
