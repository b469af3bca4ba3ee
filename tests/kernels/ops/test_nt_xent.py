"""Tests of nt_xent against numbers by hand. Tests that queue_contrastive_loss shares are in test_view_losses.py."""

import math

import pytest
import torch

from mnclglf_kernels import nt_xent


def test_a_row_is_no_candidate_of_itself(backend):
    same = torch.ones(1, 7)
    # The positive is the only candidate, however far it is.
    assert nt_xent(same, -same, 0.1, backend=backend).item() == 0
    both = torch.eye(2, 7)
    # The cosine of each row is 1 with its positive and 0 with two other rows.
    assert nt_xent(both, both, 1.0, backend=backend).item() == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)
