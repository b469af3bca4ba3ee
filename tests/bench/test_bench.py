"""What bench/ measures and what it makes of it. Its speed is nobody's business here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import (
    bench_combine,
    bench_contrastive,
    bench_divide,
    bench_enqueue,
    bench_neighbor,
    bench_nt_xent,
    bench_queue_contrastive,
    draw,
    proof,
    side_by_side,
)
from bench.row import Ratio, Row, ratio
from bench.side_by_side import BOTH, DIRECTIONS, Case, Implementation, Work

ROOT = Path(__file__).resolve().parents[2]
FP32, BF16 = torch.float32, torch.bfloat16
MIB = 2**20

SMALL_CASES = [
    *(bench_divide.divide_case(direction, images=2, side=4) for direction in DIRECTIONS),
    *(bench_combine.combine_case(direction, images=2, width=8) for direction in DIRECTIONS),
    *(bench_contrastive.contrastive_case(direction, subsets=(6,), images=4, width=8) for direction in DIRECTIONS),
    bench_contrastive.contrastive_case(BOTH, subsets=bench_contrastive.STEP, images=4, width=8),
    bench_contrastive.contrastive_case(BOTH, subsets=(2,), images=4, width=8, both_sides=True),
    bench_neighbor.neighbor_case(queries=3, size=16, width=8),
    bench_enqueue.enqueue_case(images=2, size=4, width=8),
    *(bench_nt_xent.nt_xent_case(direction, images=4, width=8) for direction in DIRECTIONS),
    *(bench_queue_contrastive.queue_case(direction, images=4, size=16, width=8) for direction in DIRECTIONS),
]


def computed(case: Case, implementation: Implementation) -> torch.Tensor:
    """Everything that one call gives, from the same inputs each time."""
    torch.manual_seed(0)
    results = side_by_side.call(case, implementation)()
    return torch.cat([result.detach().double().flatten() for result in results])


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (case, name)
        for case in SMALL_CASES
        for name in ("torch", "triton", "faiss")
        if name != "faiss" or case.kind == "lookup"
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.operator}, {value.shape}, {value.direction}",
)
def test_implementations_of_a_case_compute_the_same(case, backend):
    if backend == "faiss" and (reason := side_by_side.problem(Implementation("faiss", FP32), case.kind)):
        pytest.skip(reason)
    reference = computed(case, Implementation("reference", FP32))
    actual = computed(case, Implementation(backend, FP32))
    # Sums of a dozen terms in another order, divided by a temperature of 0.05 or more: 1e-7 x 12 x 20.
    torch.testing.assert_close(actual, reference, rtol=1e-4, atol=3e-5)


def row(backend: str, *, dtype: str = "fp32", operator: str = "divide", **changes) -> Row:
    known = dict(operator=operator, shape="N 1", direction="forward", backend=backend, dtype=dtype, seconds=[0.002])
    return Row(**(known | dict(ratio=None, like_with_like=None, peak_bytes=3 * MIB) | changes))


def test_ratio_compares_each_round_with_itself():
    assert ratio([4.0, 6.0, 10.0], [2.0, 2.0, 1.0]) == Ratio(median=3.0, least=2.0, greatest=10.0)


def test_results_have_ratios_to_both_references():
    seconds = {
        Implementation("reference", FP32): [8.0],
        Implementation("reference", BF16): [4.0],
        Implementation("torch", BF16): [2.0],
        Implementation("faiss", FP32): [16.0],
    }
    case = bench_neighbor.neighbor_case(queries=1, size=2, width=2)
    rows = side_by_side.results(case, seconds, dict.fromkeys(seconds))
    found = {
        r.implementation: (r.ratio and r.ratio.median, r.like_with_like and r.like_with_like.median)
        for r in rows.values()
    }
    assert found == {
        "reference fp32": (None, None),
        "reference bf16": (2.0, None),
        "torch bf16": (4.0, 2.0),
        "faiss fp32": (0.5, None),
    }


def test_implementations_take_turns(monkeypatch):
    calls = []

    def make(implementation: Implementation) -> Work:
        return Work(lambda: calls.append(implementation.backend) or [])

    monkeypatch.setattr(side_by_side, "AUTOCAST", FP32)
    monkeypatch.setattr(side_by_side, "LEAST_ROUNDS", 3)
    monkeypatch.setattr(side_by_side, "MOST_ROUNDS", 3)
    rows = side_by_side.measure(Case("none", "none", "forward", "elementwise", make))
    backends = [implementation.backend for implementation in rows]
    assert backends[:2] == ["reference", "torch"]
    assert calls[-3 * len(backends) :] == 3 * backends
    assert all(len(measured.seconds) == 3 for measured in rows.values())


def test_what_cannot_run_is_left_out_with_its_reason(monkeypatch):
    def resolve(backend: str, *tensors: torch.Tensor, kind: str) -> str:
        if backend == "faiss":
            raise RuntimeError("no faiss today")
        return backend

    monkeypatch.setattr(side_by_side, "resolve", resolve)
    monkeypatch.setattr(side_by_side, "left_out", {})
    assert "faiss" not in [implementation.backend for implementation in side_by_side.implementations("lookup")]
    assert side_by_side.left_out["faiss"] == "no faiss today"


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench measures on the GPU here")
def test_peak_is_of_what_is_alive_at_once():
    def run() -> torch.Tensor:
        kept, freed = torch.empty(4 * MIB, dtype=torch.uint8), torch.empty(8 * MIB, dtype=torch.uint8)
        del freed
        return torch.cat([kept, torch.empty(2 * MIB, dtype=torch.uint8)])  # 4 + 2 + 6 MiB, as much as 4 + 8

    assert side_by_side.peak_bytes(run) == 12 * MIB
    assert side_by_side.peak_bytes(lambda: None) == 0


def test_table_has_no_figure_for_what_was_not_measured():
    rows = [row("reference"), row("torch", ratio=Ratio(2.0, 1.5, 4.0), peak_bytes=None)]
    assert draw.markdown(rows, "somewhere").splitlines()[4:] == [
        "| case | implementation | median ms | x reference fp32 | x reference bf16 | peak MiB |",
        "|---|---|--:|--:|--:|--:|",
        "| divide: N 1, forward | reference fp32 | 2.000 | - | - | 3.0 |",
        "|  | torch fp32 | 2.000 | 2.00 (1.50 to 4.00) | - | - |",
    ]


def test_picture_shows_what_was_measured_and_nothing_else():
    slower, faster = Ratio(0.5, 0.4, 0.6), Ratio(2.0, 1.5, 4.0)
    rows = [
        row("reference"),
        row("torch", ratio=slower),
        row("reference", operator="combine"),
        row("torch", ratio=faster, operator="combine"),
    ]
    figure = draw.picture(rows, "somewhere")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["divide", "combine"]
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [["0.50"], ["2.00"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["torch fp32"]


@pytest.mark.slow
def test_run_is_saved_and_drawn(tmp_path):
    saved = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_enqueue.py", f"--benchmark-json={saved}"]
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
