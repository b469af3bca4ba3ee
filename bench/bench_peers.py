"""Our step, and our NNCLR, MoCo v2, SimCLR and BYOL, beside lightly's, all in turns, each in a process of its own.

On the same backbone, batch, views and device: ours, lightly's as its documentation trains them (fp32, NCHW, eager), and
like for like, with our precision, memory format and kept memory. Methods differ in what they compute (MNCLGLF has 13
forwards' worth of it, SimCLR 6; our heads are the paper's, theirs their examples'), so the ratio compares operations a
second: how many times as fast our MNCLGLF goes through its own.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from bench.side_by_side import QUICK, left_out
from bench.steps import PEER_STEPS, Size
from bench.turns import Comparison

if find_spec("lightly") is None:
    left_out["lightly"] = "it is not installed; pip install lightly"
left_out["solo-learn"] = "its newest release, 1.0.2, asks for torch 1.9.1"
NAMES = list(PEER_STEPS)[: 3 if QUICK else None] if find_spec("lightly") else []
SIZE = Size(images=32) if QUICK else Size()
PEERS = Comparison(kind="peers", names=tuple(NAMES), size=SIZE, rounds=2 if QUICK else 3)


@pytest.mark.parametrize("name", NAMES)
def test_peers(name, in_turns) -> None:
    in_turns(PEERS, name)
