"""nt_xent by hand; what it shares with the other loss of two views is in test_view_losses.py."""

import math

import pytest
import torch

from mnclglf_kernels import nt_xent


def test_a_row_is_no_candidate_of_itself(backend):
    same = torch.ones(1, 7)
    assert nt_xent(same, -same, 0.1, backend=backend).item() == 0  # its only candidate is the positive, far as it is
    both = torch.eye(2, 7)
    # Each row meets its positive, at 1, and two rows at right angles.
    assert nt_xent(both, both, 1.0, backend=backend).item() == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)
