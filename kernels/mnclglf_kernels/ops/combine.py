"""combine: averages over the k-subsets of an image's four patches (equation 4)."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from mnclglf_kernels.backend import Backend, resolve
from mnclglf_kernels.checks import check_matrix

PATCHES = 4


def combine(features: Tensor, k: int, *, backend: Backend = "auto") -> Tensor:
    """Averages every k-subset of the four patches' features (equation 4).

    Args:
        features: [4N, F], patch-major as `divide` orders its rows; any floating dtype.
        k: patches per subset, 1 to 4.
        backend: see `resolve`.

    Returns:
        [S * N, F] averages in the dtype of `features`, S = C(4, k): subset-major, subsets in the order of
        itertools.combinations. Sums are fp32 (fp64 for fp64). Differentiable.

    Raises:
        ValueError: `features` does not have two dimensions, its rows are no multiple of 4, or k is not in 1..4.
        TypeError: a dtype is not floating point.
    """
    check_matrix("features", features, "[4N, F]")
    if features.shape[0] % PATCHES:
        raise ValueError(f"features have {features.shape[0]} rows; combine needs four rows per image, [4N, F]")
    if k not in range(1, PATCHES + 1):
        raise ValueError(f"k is {k}; an image has four patches, so k must be 1, 2, 3 or 4")
    if features.numel() and resolve(backend, features) == "triton":
        return torch.ops.mnclglf.combine(features, k)
    patches = features.to(torch.promote_types(features.dtype, torch.float32)).chunk(PATCHES)
    sums = [sum(subset[1:], subset[0]) for subset in combinations(patches, k)]
    return (torch.cat(sums) / k).to(features.dtype)
