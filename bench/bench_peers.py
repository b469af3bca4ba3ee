"""Compares our steps with lightly's, in interleaved rounds, each in a process of its own.

Measured are our MNCLGLF, NNCLR, MoCo v2, SimCLR and BYOL; lightly's as its documentation trains them (fp32, NCHW,
eager); and lightly's like for like, with our precision, memory format and kept memory. Backbone, batch, views and
device are the same. The methods compute different amounts (MNCLGLF about 13 forwards, SimCLR 6; our heads are the
paper's, theirs their examples'), so the ratio compares operations per second: how many times as fast our MNCLGLF goes
through its own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from bench.harness import QUICK, left_out
from bench.rounds import Comparison
from bench.steps import PEER_STEPS, Size

if find_spec("lightly") is None:
    left_out["lightly"] = "it is not installed; pip install lightly"
left_out["solo-learn"] = "its newest release, 1.0.2, asks for torch 1.9.1"
NAMES = list(PEER_STEPS)[: 3 if QUICK else None] if find_spec("lightly") else []
SIZE = Size(images=32) if QUICK else Size()
PEERS = Comparison(kind="peers", names=tuple(NAMES), size=SIZE, rounds=2 if QUICK else 3)


@pytest.mark.parametrize("name", NAMES)
def test_peers(name: str, interleaved: Callable[[Comparison, str], None]) -> None:
    interleaved(PEERS, name)
