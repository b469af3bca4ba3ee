"""The one message of a step beside those of its forward: gradients, losses and what every rank has to know."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mnclglf.config import ReduceDtype
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import BatchNorm, batch_norms
from mnclglf.training.stop import SIGNALS
from mnclglf_kernels.ranks import sum_in_place

LIGHTER = 2.0**-16  # weight of a signal over that of the one before; fewer than 2**16 ranks cannot outweigh that one
LAG = 2  # steps until the host reads on a GPU what ranks asked for: by then it need not wait


class StepMessage:
    """Averages gradients and losses over all ranks, in one sum over all of them after backward.

    So the guard, the gradient's norm and the optimizer find the same numbers on every rank, and decide alike. A rank
    also tells whether its keys are finite, whether a forward in fp16 overflowed, and that it was asked to stop.

    Args:
        method: the method, distributed over ranks.
        device: device of the step.
        reduce_dtype: dtype in which gradients travel, "fp32" (their own) or "bf16"; the rest travels in its own.

    Attributes:
        keys: zeros, or NaN where the keys of any rank are not finite; None for a method without keys.
    """

    def __init__(self, method: Method, device: torch.device, *, reduce_dtype: ReduceDtype = "fp32") -> None:
        self.method, self.device = method, device
        self.dtype = torch.bfloat16 if reduce_dtype == "bf16" else None
        self.keys: Tensor | None = None
        self.asked = torch.zeros(2, device=device)  # weight of the signal that this rank caught, and 1 if there was one
        self.heard: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @torch.no_grad()
    def average(self, losses: Losses, parameters: Sequence[Tensor]) -> Losses:
        """Replaces gradients by their means over ranks; returns the losses with total and terms averaged.

        Args:
            losses: result of this rank's forward, after backward.
            parameters: those that the optimizer updates.
        """
        gradients = [in_memory_order(p.grad) for p in parameters if p.grad is not None]
        flags = [encoder.overflow for encoder in self.method.encoders() if encoder.half_sums]
        keys = losses.keys
        small = torch.stack([losses.total.detach(), *(term.detach() for term in losses.terms.values())])
        told = [torch.zeros_like(small[:1]) if keys is None else (~keys.isfinite().all()).to(small.dtype)[None]]
        told += [flag.to(small.dtype)[None] for flag in flags] + [self.asked.to(small.dtype)]
        told += [x.to(small.dtype) for x in self._own_statistics()]
        rest = torch.cat([small, *told])
        # Gradients and the rest in one message, unless their dtypes differ.
        joined = self.dtype is None and gradients[0].dtype == rest.dtype
        flat = torch.cat(gradients + [rest] * joined)
        travels = flat if self.dtype is None else flat.to(self.dtype)
        mean = sum_in_place(travels).to(flat.dtype).div_(self.method.ranks)
        if joined:
            mean, rest = mean.split([len(mean) - len(rest), len(rest)])
        else:
            rest = sum_in_place(rest).div_(self.method.ranks)
        torch._foreach_copy_(gradients, mean.split([len(x) for x in gradients]))  # pyright: ignore
        return self._read(losses, rest, flags)

    def _read(self, losses: Losses, rest: Tensor, flags: Sequence[Tensor]) -> Losses:
        """Takes the means over ranks apart; see `average` for their order."""
        statistics = self._own_statistics()
        total, *terms, unusable = rest[: len(losses.terms) + 2].unbind()
        overflows, asked, running = rest[len(losses.terms) + 2 :].split(
            [len(flags), len(self.asked), sum(len(x) for x in statistics)]
        )
        self.keys = None if losses.keys is None else torch.where(unusable > 0, torch.nan, 0.0)
        for flag, mean in zip(flags, overflows, strict=True):
            flag.copy_(mean > 0)
        for own, mean in zip(statistics, running.split([len(x) for x in statistics]), strict=True):
            own.copy_(mean)
        self._hear(asked)
        return losses._replace(total=total, terms=dict(zip(losses.terms, terms, strict=True)))

    def _own_statistics(self) -> list[Tensor]:
        """Returns the running statistics that are of this rank's images alone, and are averaged after each step."""
        return [
            x for layer in unsynchronized(self.method) for x in (layer.running_mean, layer.running_var) if x is not None
        ]

    def ask(self, signal: int | None) -> None:
        """Tells the other ranks, with the next step, that this one got a signal to stop."""
        if signal is not None:
            # Ranks may have caught different ones. Weights of 1, 2**-16, 2**-32, ... show the first in their sum.
            self.asked[0], self.asked[1] = LIGHTER ** SIGNALS.index(signal), 1

    def _hear(self, asked: Tensor) -> None:
        event = None
        if self.device.type == "cuda":
            asked = asked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.heard.append((asked, event))

    def signal(self) -> int | None:
        """Returns the signal on which all ranks stop after this step: the first of SIGNALS that any caught; else None.

        On a GPU it is what ranks told LAG steps ago, so that the host need not wait for the device.
        """
        if len(self.heard) <= (LAG if self.device.type == "cuda" else 0):
            return None
        asked, event = self.heard.popleft()
        if event is not None:
            event.synchronize()
        weights, count = asked.tolist()
        if not count:
            return None
        return next(number for place, number in enumerate(SIGNALS) if weights / count > LIGHTER ** (place + 1))


def in_memory_order(x: Tensor) -> Tensor:
    """Returns a dense tensor's elements as they lie in memory, [n], sharing it."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def unsynchronized(method: Method) -> list[BatchNorm]:
    """Returns the batch norms with running statistics of this rank's images alone (--sync-batch-norm off)."""
    layers = [layer for layer in batch_norms(method) if isinstance(layer, BatchNorm)]
    return [layer for layer in layers if layer.ranks < method.ranks]
