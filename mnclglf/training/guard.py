"""Keeps non-finite values out of weights, momentum network, queue and checkpoints, without a host sync per step."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity.

    Attributes:
        step: global step, counted from 0.
        terms: names of the values that were not finite.
    """

    def __init__(self, step: int, terms: list[str]) -> None:
        self.step, self.terms = step, terms
        super().__init__(f"step {step}: {', '.join(terms)} not finite")


class Guard:
    """Records the first step with a non-finite value; from that step on `check` returns False.

    The result of `check` gates the optimizer, the moving average and the queue on the device. So the host can look
    later, with `raise_if_failed`: the state is still that of the last good step.
    """

    def __init__(self, device: torch.device) -> None:
        self.failed_step = torch.full((), -1, device=device)
        self.names: list[str] = []
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def check(self, step: int | Tensor, values: dict[str, Tensor]) -> Tensor:
        """Returns whether every value of this and all earlier steps is finite: bool, 0-D, on the device.

        Args:
            step: global step, a number or int64, 0-D, on the device.
            values: the values, by the names that an error tells.
        """
        finite = torch.stack([value.isfinite().all() for value in values.values()])
        if self.finite.shape != finite.shape:  # in the first step
            self.finite = torch.ones_like(finite)
        first = ~finite.all() & (self.failed_step < 0)
        # In place: a recorded step writes where these lay as it was recorded.
        self.failed_step.copy_(torch.where(first, step, self.failed_step))
        self.finite.copy_(torch.where(first | (self.failed_step < 0), finite, self.finite))
        self.names = list(values)
        return self.failed_step < 0

    def raise_if_failed(self) -> None:
        """Raises NonFiniteError if any step so far failed; waits for the device."""
        step = int(self.failed_step.item())
        if step >= 0:
            finite: list[bool] = self.finite.tolist()
            raise NonFiniteError(step, [name for name, ok in zip(self.names, finite, strict=True) if not ok])
