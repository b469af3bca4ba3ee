"""bench/scaling.py: the messages of a step over ranks, what they cost, and when gradients are ready."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from rank_processes import run_on_ranks

from bench.rank_messages import Found, Link, Messages, of_size
from bench.rank_steps import measure
from bench.readiness import AUTOCAST, SHARED, STAGED, Ready, cast_by_block, exposed, readiness
from bench.scaling import CLASSES, print_costs, print_measured, print_messages, print_readiness, print_steps
from bench.steps import Size, config_of
from mnclglf.config import METHOD_NAMES, ModelConfig, RunConfig
from mnclglf.recipes import quick
from mnclglf.training.speedups import share_casts
from mnclglf.training.start import build_method

RANKS, IMAGES, SIDE = 2, 2, 8


def run_of(method: str, images: int = IMAGES) -> RunConfig:
    config = config_of(Size(images * RANKS, SIDE), method)
    small = ModelConfig(width=2, projector_width=16, predictor_width=8, classes=CLASSES)
    return replace(config, model=small, objective=replace(config.objective, queue_size=64))


def in_bf16(config: RunConfig) -> RunConfig:
    return replace(config, engine=replace(config.engine, reduce_dtype="bf16"))


def per_rank(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, sync_batch_norm="off"))


@cache
def counted() -> dict[str, Found]:
    """Returns the messages of small steps on two ranks, which are started once."""
    runs = {name: run_of(name) for name in METHOD_NAMES}
    runs |= {"mnclglf, more images": run_of("mnclglf", 2 * IMAGES), "mnclglf, bf16": in_bf16(runs["mnclglf"])}
    runs |= {f"{name}, per rank": per_rank(runs[name]) for name in ("mnclglf", "byol")}
    every = run_on_ranks("bench.rank_messages:count_all", RANKS, [*runs.values()], SIDE)
    assert every[0] == every[1]
    return dict(zip(runs, every[0], strict=True))


EXPECTED: dict[str, dict[str, tuple[int, int]]] = {
    "byol": {
        "batch norm, forward": (47, 6464),
        "batch norm, backward": (24, 3296),
        "gradients of weights": (1, 49632),
    },
    "fast_moco": {
        "batch norm, forward": (47, 6464),
        "candidates": (1, 128),
        "batch norm, backward": (24, 3296),
        "gradients of weights": (1, 49632),
    },
    "mnclglf": {
        "batch norm, forward": (70, 11280),
        "candidates": (1, 192),
        "batch norm, backward": (24, 4944),
        "gradients of candidates": (1, 384),
        "gradients of weights": (1, 49632),
        "queue keys": (1, 80),
    },
    "mnclglf_official": {
        "batch norm, forward": (94, 11280),
        "candidates": (2, 1024),
        "batch norm, backward": (24, 3296),
        "gradients of candidates": (1, 512),
        "gradients of weights": (1, 49632),
        "queue keys": (1, 80),
    },
    "mocov2": {
        "batch norm, forward": (46, 3168),
        "batch norm, backward": (23, 1584),
        "gradients of weights": (1, 48476),
        "queue keys": (1, 80),
    },
    "nnclr": {
        "batch norm, forward": (24, 3296),
        "candidates": (1, 128),
        "batch norm, backward": (24, 3296),
        "gradients of candidates": (1, 256),
        "gradients of weights": (1, 49632),
        "queue keys": (1, 80),
    },
    "simclr": {
        "batch norm, forward": (23, 3168),
        "candidates": (1, 128),
        "batch norm, backward": (23, 3168),
        "gradients of candidates": (1, 256),
        "gradients of weights": (1, 48476),
    },
    "simsiam": {
        "batch norm, forward": (24, 3296),
        "batch norm, backward": (24, 3296),
        "gradients of weights": (1, 49632),
    },
    "supervised": {
        "batch norm, forward": (20, 1200),
        "batch norm, backward": (20, 1200),
        "gradients of weights": (1, 45700),
    },
    "mnclglf, bf16": {
        "batch norm, forward": (70, 11280),
        "candidates": (1, 192),
        "batch norm, backward": (24, 4944),
        "gradients of candidates": (1, 384),
        "gradients of weights": (2, 24828),
        "queue keys": (1, 80),
    },
    "mnclglf, per rank": {
        "candidates": (1, 192),
        "gradients of candidates": (1, 384),
        "gradients of weights": (1, 52864),
        "queue keys": (1, 80),
    },
    "byol, per rank": {
        "gradients of weights": (1, 52864),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_number_and_bytes_of_messages(name: str) -> None:
    """An added message, or one more byte, is seen here; docs/lab/many-gpus.md and docs/explain/scaling.md tell them."""
    assert {purpose: (own.number, own.given) for purpose, own in counted()[name].items()} == EXPECTED[name]


def test_all_is_counted() -> None:
    assert set(EXPECTED) == {*counted()} - {"mnclglf, more images"}


def test_the_bytes_of_more_images_are_those_that_are_counted() -> None:
    scaled = of_size(counted()["mnclglf"], (IMAGES, RANKS), (2 * IMAGES, RANKS))
    assert scaled == counted()["mnclglf, more images"] != counted()["mnclglf"]


def test_bytes_sent_are_those_of_a_ring() -> None:
    # Rank by rank: every part of a gather passes W - 1 ranks, of a sum as well, and of a sum for all ranks twice.
    assert Messages("all_gather", 1, 100).sent(4) == 300
    assert Messages("reduce_scatter", 1, 400).sent(4) == 300
    assert Messages("all_reduce", 1, 400).sent(4) == 600
    assert Messages("all_reduce", 5, 400).seconds(Link(latency=2.0, bandwidth=300.0), 4) == 12


def test_the_tables_hold_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"all": [counted()[name] for name in METHOD_NAMES]}
    print_messages(ways["all"])
    print_costs(ways)
    print_steps(ways)
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    number, given = EXPECTED["mnclglf"]["gradients of weights"]
    assert ["mnclglf", "gradients of weights", "all_reduce", str(number), f"{given:,}", f"{given * 7 / 4:,.0f}"] in rows
    messages = sum(number for number, _ in EXPECTED["mnclglf"].values())
    cost, count = next(cells[1] for cells in rows if cells[0] == "mnclglf" and len(cells) == 2).split()
    assert count == f"({messages})"
    assert float(cost) == pytest.approx(messages * 0.05, abs=0.02)  # ms over PCIe; so few bytes cost next to nothing


def test_buckets_are_sent_as_soon_as_they_are_ready() -> None:
    large = 2**25
    link, seconds = Link(latency=0.0, bandwidth=1.5 * large), 1.0  # so a message of it takes a second on four ranks
    assert exposed(Ready([(0.0, large), (1.0, large)], 0.5), seconds, link, ranks=4) == pytest.approx(1)
    assert exposed(Ready([(1.0, large), (1.0, large)], 0.5), seconds, link, ranks=4) == pytest.approx(2)
    assert exposed(Ready([(0.0, 1), (1.0, large)], 0.5), seconds, link, ranks=4) == pytest.approx(1)  # one message
    assert Ready([(0.1, 1), (0.6, 3)], 0.5).share(0.5) == 0.25


def test_casts_by_block_give_the_gradients_of_shared_ones() -> None:
    found: list[list[torch.Tensor]] = []
    for casts in (share_casts, cast_by_block):
        method = build_method(run_of("mnclglf"), torch.bfloat16).train()
        torch.manual_seed(0)
        views = torch.randn(3 * 8, 3, SIDE, SIDE).bfloat16()
        forward = casts(method, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = forward(views).total
        total.backward()
        found.append([total.detach(), *(p.grad for p in method.trained_parameters() if p.grad is not None)])
    assert len(found[0]) > 60
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_readiness_is_of_all_weights(capsys: pytest.CaptureFixture[str]) -> None:
    size = Size(images=4, side=8, width=2)
    found = {how: readiness(how, size, steps=2) for how in (SHARED, AUTOCAST, STAGED)}
    whole = sum(p.numel() * 4 for p in build_method(config_of(size), torch.bfloat16).trained_parameters())
    for ready in found.values():
        assert sum(given for _, given in ready.at) == whole
        assert 0 <= ready.at[0][0] <= ready.at[-1][0] <= 1
    print_readiness(found, size)
    assert SHARED in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_are_measured_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    config = quick("mnclglf", "digits")
    config = replace(config, model=run_of("mnclglf").model, optim=replace(config.optim, batch_size=32))
    (first, _) = found = [*measure(config, rounds=2, steps=1)]
    assert set(first[1].parts) == {*first[0].parts, "message"}
    print_measured("digits", found)
    assert "2 x 1" in capsys.readouterr().out
