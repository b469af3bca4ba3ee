"""bench/traffic.py: our launches and bytes beside eager PyTorch's."""

from pathlib import Path

import pytest
import torch

from bench.traffic import Eager, main, other_traffic, step_traffic

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_s_operators_launch_and_move_a_fraction_of_eager_pytorch(dtype):
    *operators, together = step_traffic(dtype)
    assert together.eager_launches >= 4 * together.launches
    assert together.eager_bytes >= 3 * together.unique_bytes
    for row in (*operators, *other_traffic(dtype)):
        assert row.launches < row.eager_launches
        assert row.unique_bytes < row.eager_bytes


def test_the_tables_in_the_documents_are_what_the_command_prints(capsys):
    main()
    text = (ROOT / "docs" / "explain" / "kernels.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in text


def test_eager_pytorch_is_counted_as_by_hand():
    a, b = (torch.empty(8, 4, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Eager() as counted:
        product = (a[:2] + 1) @ b.t()  # an addition of 2 x 4 and a product of 2 x 4 and 4 x 8 to 2 x 8
    assert product.shape == (2, 8)
    assert (counted.launches, counted.unique_bytes) == (2, 2 * (8 + 8) + 2 * (8 + 32 + 16))
