"""Counts the messages between ranks of one training step, by what they are for, and computes what they cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bench.steps import Size, noise
from mnclglf.config import RunConfig
from mnclglf.data.loader import Batch
from mnclglf.training.start import build_method
from mnclglf.training.step import TrainStep
from mnclglf_kernels.ranks import message_bytes, messages

NORM_FORWARD, NORM_BACKWARD = "batch norm, forward", "batch norm, backward"
CANDIDATES, OF_CANDIDATES, KEYS, WEIGHTS = "candidates", "gradients of candidates", "queue keys", "gradients of weights"
PURPOSES = {  # by the part of the step that sends a message, and its kind
    ("forward", "all_gather"): NORM_FORWARD,
    ("candidates", "all_gather"): CANDIDATES,
    ("backward", "all_reduce"): NORM_BACKWARD,
    ("backward", "reduce_scatter"): OF_CANDIDATES,
    ("message", "all_reduce"): WEIGHTS,
    ("update", "all_gather"): KEYS,
}
OF_IMAGES = (CANDIDATES, OF_CANDIDATES, KEYS)
"""What grows with the number of images; the other messages do not depend on it."""


class Messages(NamedTuple):
    """The messages of a step that are for one purpose.

    Attributes:
        kind: all_gather, reduce_scatter or all_reduce.
        number: how many a step has.
        given: bytes that a rank gives to them.
    """

    kind: str
    number: int
    given: int

    def sent(self, ranks: int) -> float:
        """Returns the bytes that each of W ranks sends where they form a ring, as in nccl-tests' bus bandwidth."""
        factor = {"all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
        return self.given * factor[self.kind]

    def seconds(self, link: Link, ranks: int) -> float:
        """Returns the time of the messages, one after another."""
        return self.number * link.latency + self.sent(ranks) / link.bandwidth


class Link(NamedTuple):
    """How ranks are connected.

    Attributes:
        latency: seconds of a message of a few bytes.
        bandwidth: bytes per second that each rank sends (bus bandwidth of nccl-tests).
    """

    latency: float
    bandwidth: float


Found = dict[str, Messages]
"""The messages of a step, by purpose."""
LINKS = {
    # 8 bytes over 8 GPUs by nccl-tests: 54 us with RTX 3090 (NVIDIA/nccl issue 1439), 42 us with RTX 4090 (issue 1530).
    # The bandwidth is assumed; PCIe 4 x16 carries 31.5 GB/s each way, and the rings of 8 GPUs share the hosts' bridges.
    "PCIe 4": Link(50e-6, 11e9),
    # H100: 900 GB/s nominal in both directions, 370 GB/s of bus bandwidth by a developer of NCCL (NVIDIA/nccl-tests
    # issue 212). The latency is assumed.
    "NVLink": Link(20e-6, 370e9),
    # 8 bytes over 256 A100 on 32 machines: 63 us (NVIDIA/nccl issue 652). The bandwidth is that of their four HDR
    # adapters per machine, nominal.
    "network": Link(63e-6, 100e9),
}


def counted_step(config: RunConfig, side: int) -> Found:
    """Returns the messages of one step of a run, by purpose; the forward is in bf16. Every rank has to call it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    network = build_method(config, torch.bfloat16).train()
    network.distribute(rank, ranks, sync_batch_norm=config.model.sync_batch_norm == "on")
    images, labels = config.optim.batch_size // ranks, torch.zeros(config.optim.batch_size, dtype=torch.int64)
    step = TrainStep(network, config.optim, config.engine, torch.bfloat16, labels=labels)
    found: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
    before = Counter(messages), Counter(message_bytes)

    def close(part: str) -> None:
        """Counts the messages since the last call as those of a part of the step."""
        nonlocal before
        now = Counter(messages), Counter(message_bytes)
        for kind, number in (now[0] - before[0]).items():
            purpose = PURPOSES.get((part, kind), f"{kind} of the part {part}")
            found[purpose].append((kind, number, now[1][kind] - before[1][kind]))
        before = now

    whole_batch = network.whole_batch

    def candidates(*parts: Tensor) -> tuple[Tensor, ...]:
        close("forward")
        made = whole_batch(*parts)
        close("candidates")
        return made

    network.whole_batch = candidates
    step.mark = close
    views = torch.cat(noise(Size(images, side), torch.device("cpu"), network.views)).to(torch.bfloat16)
    batch = Batch(views, torch.arange(images) + rank * images)
    step(0, batch, lr=0.1, momentum=0.99)
    close("update")
    return {
        purpose: Messages(parts[0][0], sum(part[1] for part in parts), sum(part[2] for part in parts))
        for purpose, parts in found.items()
    }


def count_all(configs: Sequence[RunConfig], side: int) -> list[Found]:
    """Returns the messages of each run."""
    return [counted_step(config, side) for config in configs]


def of_size(found: Found, counted: tuple[int, int], wanted: tuple[int, int]) -> Found:
    """Returns the messages of a step with another number of images and of ranks.

    What a rank gives is proportional to its own images; the gradients of candidates are those of all ranks' images.

    Args:
        found: messages as counted.
        counted: images per rank and ranks that they were counted with.
        wanted: images per rank and ranks of the result.
    """

    def scaled(purpose: str, own: Messages) -> Messages:
        if purpose not in OF_IMAGES:
            return own
        (images, ranks), (other_images, other_ranks) = counted, wanted
        if own.kind == "reduce_scatter":
            images, other_images = images * ranks, other_images * other_ranks
        return own._replace(given=own.given * other_images // images)

    return {purpose: scaled(purpose, own) for purpose, own in found.items()}
