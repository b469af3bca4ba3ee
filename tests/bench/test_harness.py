"""bench/harness.py: interleaved rounds, ratios to both references, peak memory, and what cannot run here."""

import pytest
import torch

from bench import harness
from bench.harness import BenchCase, Implementation, Work

FP32, BF16 = torch.float32, torch.bfloat16
MIB = 2**20


def case(make=None) -> BenchCase:
    return BenchCase("none", "none", "forward", "elementwise", make or (lambda implementation: Work(list)))


def test_results_have_ratios_to_both_references():
    seconds = {
        Implementation("reference", FP32): [8.0],
        Implementation("reference", BF16): [4.0],
        Implementation("torch", BF16): [2.0],
        Implementation("faiss", FP32): [16.0],
    }
    measured = harness.results(case(), seconds, dict.fromkeys(seconds))
    found = {
        m.implementation: (m.ratio and m.ratio.median, m.like_with_like and m.like_with_like.median)
        for m in measured.values()
    }
    assert found == {
        "reference fp32": (None, None),
        "reference bf16": (2.0, None),
        "torch bf16": (4.0, 2.0),
        "faiss fp32": (0.5, None),
    }


def test_rounds_are_interleaved(monkeypatch):
    calls = []

    def make(implementation: Implementation) -> Work:
        return Work(lambda: calls.append(implementation.backend) or [])

    monkeypatch.setattr(harness, "AUTOCAST", FP32)
    monkeypatch.setattr(harness, "LEAST_ROUNDS", 3)
    monkeypatch.setattr(harness, "MOST_ROUNDS", 3)
    measured = harness.measure(case(make))
    backends = [implementation.backend for implementation in measured]
    assert backends[:2] == ["reference", "torch"]
    assert calls[-3 * len(backends) :] == 3 * backends
    assert all(len(m.seconds) == 3 for m in measured.values())


def test_what_cannot_run_is_left_out_with_its_reason(monkeypatch):
    def resolve(backend: str, *tensors: torch.Tensor, kind: str) -> str:
        if backend == "faiss":
            raise RuntimeError("no faiss today")
        return backend

    monkeypatch.setattr(harness, "resolve", resolve)
    monkeypatch.setattr(harness, "left_out", {})
    assert "faiss" not in [implementation.backend for implementation in harness.implementations("lookup")]
    assert harness.left_out["faiss"] == "no faiss today"


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench measures on the GPU here")
def test_peak_is_of_what_is_alive_at_once():
    def run() -> torch.Tensor:
        kept, freed = torch.empty(4 * MIB, dtype=torch.uint8), torch.empty(8 * MIB, dtype=torch.uint8)
        del freed
        return torch.cat([kept, torch.empty(2 * MIB, dtype=torch.uint8)])  # 4 + 2 + 6 MiB, as much as 4 + 8

    assert harness.peak_bytes(run) == 12 * MIB
    assert harness.peak_bytes(lambda: None) == 0
