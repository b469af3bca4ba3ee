"""bench/steps.py: the variants of the ablation compute the same."""

import math

import pytest
import torch

from bench.steps import ABLATION, EAGER, GRAPHS, KEPT, REFERENCE, Size, variants

CPU = torch.device("cpu")
TINY = Size(images=4, side=8, width=2)


def test_the_variants_of_a_device():
    assert [variants(CPU)[0], variants(CPU)[-2]] == [REFERENCE, KEPT]
    assert GRAPHS not in variants(CPU)
    assert KEPT not in variants(torch.device("cuda"))


def states(name: str) -> list[float]:
    """Returns the losses of two steps of a variant on the same noise."""
    torch.manual_seed(0)
    step, found = ABLATION[name](TINY, CPU), []
    for _ in range(2):
        result = step()
        if isinstance(result, dict):  # as the step as printed returns
            found.append(result["loss"])
        else:
            assert isinstance(result, tuple)
            found.append(result[0].total.item())
    return found


def test_every_variant_computes_the_same():
    """To bf16: 2^-8 a rounding, through twenty layers, whose batch norms see four images, and a step between."""
    expected = states(REFERENCE)
    assert all(math.isfinite(loss) for loss in expected)
    for name in list(ABLATION)[1 : list(ABLATION).index(EAGER) + 1]:
        tolerance = 1e-4 if name == "+ channels_last" else 0.1
        assert states(name) == pytest.approx(expected, rel=tolerance), name
