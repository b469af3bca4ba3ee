"""Measures every operator of the operators table beside its reference form; operator_cases.py has the cases."""

from __future__ import annotations

from collections.abc import Callable

from bench.harness import QUICK, BenchCase, Implementation, by_implementation
from bench.operator_cases import all_cases


@by_implementation(all_cases(quick=QUICK))
def test_operator(
    case: BenchCase, implementation: Implementation, side_by_side: Callable[[BenchCase, Implementation], None]
) -> None:
    side_by_side(case, implementation)
