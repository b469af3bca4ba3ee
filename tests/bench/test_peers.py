"""bench/peers.py: the peers train."""

import math

import pytest
import torch

from bench.peers import PEERS, peer_step


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("dtype", "channels_last"), [(None, False), (torch.bfloat16, True)])
def test_peers_train_where_lightly_is_installed(name, dtype, channels_last):
    pytest.importorskip("lightly")
    views = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    step = peer_step(name, views, dtype=dtype, channels_last=channels_last, width=2)
    losses = [step().float().item() for _ in range(8)]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == len(losses)  # it moves
