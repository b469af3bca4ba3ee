"""Choices made on the machine: which parts of a compiled step are on, found at start-up by a measurement.

A part is a row of PARTS. Compiling takes a minute, so a start compares two settings only: `safe`, with every part off,
and `all`, with every part on that can run here. `all` is taken if its losses and gradients are about as near to those
of a step in fp64 as safe's are, and if it is faster. Where `all` with CUDA graphs was taken and the whole step can be
in one graph (whole_step.py), a third setting, `step`, is compared with it. The decision is kept for later starts on
this machine.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mnclglf_kernels
from mnclglf.config import EngineConfig, RunConfig, require
from mnclglf.data.loader import Batch
from mnclglf.runs.files import cache_folder, read_object, write_json
from mnclglf.training.graphs import (
    copies,
    gradients_of,
    problem_of_replays,
    restore_state,
    ruled_out,
    saved_state,
)
from mnclglf.training.speedups import Forward, checkpoint_activations, share_casts
from mnclglf.training.step import Recorded, TrainStep
from mnclglf.training.timing import StepClock
from mnclglf.training.whole_step import problem_of_whole_step
from mnclglf_kernels import Backends
from mnclglf_kernels.backend import HAS_TRITON, cudnn_problem

MOST_ERROR = 2.0  # of `all`, in errors of `safe`: what two orders of the same sums differ by
ROUNDS, STEPS = 3, 10  # that are timed; the rounds of the settings take turns
# A gradient this much smaller than the largest is 0 but for rounding, as that of a bias before the mean is subtracted.
NOISE = 1e-12
SAFE, ALL, STEP = "safe", "all", "step"
NAMES = (SAFE, ALL)  # that every start compares

Setting = dict[str, str]
"""The value of each part, by the part's name."""
Rates = Mapping[str, float]
"""Learning rate and momentum of the steps that are compared, as `lr` and `momentum`."""


class Here(NamedTuple):
    """What the values of a part depend on."""

    engine: EngineConfig
    device: torch.device
    backends: Backends  # as they were chosen at the start of the run
    dtype: torch.dtype = torch.float32  # of autocast
    without_gradient: bool = False  # whether the method has forwards without gradient
    fusible: bool = True  # whether these can be fused: models/fused.py knows the encoder
    half_sums_cleared: bool = False  # whether sums in fp16 there cost the method no accuracy in the study
    resident: bool = False  # whether the step can make the views itself

    @classmethod
    def of(cls, step: TrainStep, engine: EngineConfig) -> Here:
        """Returns what the parts of a step depend on, as its method was made at the start of the run."""
        method = step.method
        return cls(
            engine,
            step.device,
            method.backends,
            step.dtype,
            without_gradient=method.without_gradient,
            fusible=method.encoder.fusible,
            half_sums_cleared=method.half_sums_cleared,
            resident=step.augment is not None,
        )


@dataclass(frozen=True)
class Part:
    """Something that can be on or off in a compiled step.

    Attributes:
        name: name in files.
        title: name in the table that a run prints.
        values: its values, the safe one first and the one of `all` last.
        ruled_out: returns why a value cannot be taken here, or None. An option that names one value rules out others.
        apply: sets a value; it is read when a step's forward is made and when it is traced.
    """

    name: str
    title: str
    values: tuple[str, ...]
    ruled_out: Callable[[Here, str], str | None]
    apply: Callable[[TrainStep, str], None]


def _batch_norm_ruled_out(here: Here, value: str) -> str | None:
    if value == "torch":
        return "--kernels require" if here.engine.kernels == "require" else None
    if here.engine.kernels == "off":
        return "--kernels off"
    return None if here.backends.batch_norm == "triton" else "its kernels cannot run here"


def _apply_batch_norm(step: TrainStep, value: str) -> None:
    step.method.backends = step.method.backends._replace(batch_norm=value)  # pyright: ignore[reportArgumentType]


def _combo_kernels_ruled_out(here: Here, value: str) -> str | None:
    if here.device.type != "cuda":  # the C++ code that Inductor writes for a CPU has none
        return "the run is on the CPU" if value == "on" else None
    asked = here.engine.combo_kernels
    return f"--combo-kernels {asked}" if asked not in ("auto", value) else None


def _apply_combo_kernels(step: TrainStep, value: str) -> None:
    step.combo_kernels = value == "on"


def _graphs_ruled_out(here: Here, value: str) -> str | None:
    asked = here.engine.graphs
    if asked in ("on", "step") and value != asked:
        return f"--graphs {asked}"
    if value == "off":
        return None
    reason = ruled_out(here.engine, here.device)
    if reason is None and value == "step" and not here.resident:
        return "the loader is not resident, so the whole step cannot be in one"
    return reason


def _apply_graphs(step: TrainStep, value: str) -> None:
    step.compile = {"off": "on", "on": "graphs", "step": "step"}[value]


def check_graphs(here: Here) -> None:
    """Raises ValueError if the whole step was asked for as a CUDA graph, and the loader makes views outside of it."""
    require(
        here.engine.graphs != "step" or here.resident,
        "graphs step was asked for, and the loader makes the views outside of the step; take --loader resident (images "
        "in memory, up to 64 x 64), or --graphs auto",
    )


def _convolution_ruled_out(here: Here, value: str) -> str | None:
    if here.engine.half_sums == "on" and value != "cudnn":
        return "--half-sums on"
    if value == "torch":
        return None
    if not here.without_gradient:
        return "every forward has a gradient"
    if not here.fusible:
        return "there is no fused forward of this encoder"
    if here.dtype == torch.float32:
        return "the run is in fp32"
    if value == "triton":
        if here.backends.convolution != "triton":
            return "its kernels cannot run here"
        return None if _is_geforce(here.device) else "Triton's convolutions are for GeForce GPUs"
    if here.engine.half_sums == "off":
        return "--half-sums off"
    if here.engine.half_sums == "auto" and not here.half_sums_cleared:
        return "sums in fp16 are not cleared for this method (docs/lab/half-precision.md)"
    problem = cudnn_problem(here.device, torch.float16)
    return None if problem is None else str(problem)


def _is_geforce(device: torch.device) -> bool:
    """Returns whether a GPU's tensor cores sum in fp32 at half rate, which leaves room for more instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 6), (8, 9))


def _apply_convolution(step: TrainStep, value: str) -> None:
    step.method.fuse(value, half_sums=value == "cudnn")  # pyright: ignore[reportArgumentType]


def check_half_sums(here: Here) -> None:
    """Raises ValueError if sums in fp16 were asked for and cannot be had here."""
    engine = here.engine
    if engine.half_sums == "on":
        reason = _convolution_ruled_out(here, "cudnn") or (
            None if chooses(here.device) else "they are a part of a compiled step on a GPU"
        )
        require(reason is None, f"half_sums on was asked for, and {reason}; take --half-sums auto")
    if engine.half_sums_online != "off":
        problem = cudnn_problem(here.device, here.dtype)
        require(problem is None, f"half_sums_online {engine.half_sums_online}: {problem}; take --half-sums-online off")


PARTS: tuple[Part, ...] = (
    Part("batch_norm", "batch norm", ("torch", "triton"), _batch_norm_ruled_out, _apply_batch_norm),
    Part("combo_kernels", "combo kernels", ("off", "on"), _combo_kernels_ruled_out, _apply_combo_kernels),
    Part(
        "convolution",
        "convolutions without gradient",
        ("torch", "triton", "cudnn"),
        _convolution_ruled_out,
        _apply_convolution,
    ),
    Part("graphs", "CUDA graphs", ("off", "on", "step"), _graphs_ruled_out, _apply_graphs),
)


def chooses(device: torch.device) -> bool:
    """Returns whether a run on the device chooses the parts of its compiled step: on a GPU only."""
    return device.type == "cuda"


def offers(here: Here) -> dict[str, dict[str, str | None]]:
    """Returns, of each part, its values and why each is ruled out here; None for those that are not."""
    return {part.name: {value: part.ruled_out(here, value) for value in part.values} for part in PARTS}


def settings_of(here: Here) -> dict[str, Setting]:
    """Returns the two settings that a start chooses between, by name: safe and all."""
    possible = {
        name: [value for value, reason in values.items() if reason is None] for name, values in offers(here).items()
    }
    return {
        SAFE: {name: values[0] for name, values in possible.items()},
        ALL: {name: values[-1] for name, values in possible.items()},
    }


def apply(step: TrainStep, setting: Setting) -> None:
    """Sets the parts of a step; a forward that was compiled with them is to be called with them."""
    for part in PARTS:
        part.apply(step, setting[part.name])


def problems_of(setting: Mapping[str, str], here: Here) -> list[str]:
    """Returns why a setting, e.g. of a run that is resumed, cannot be taken as it is; nothing if it can."""
    found: list[str] = []
    for name, values in offers(here).items():
        value = setting.get(name)
        if value not in values:
            found.append(f"{name} was {value or 'not chosen'}")
        elif values[value] is not None:
            found.append(f"{name} {value}: {values[value]}")
    return found


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns the parts whose values differ, as `name value`, with the values of `before`."""
    return ", ".join(f"{name} {before.get(name, 'not chosen')}" for name in now if before.get(name) != now[name])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A decision between the settings.

    Attributes:
        taken: name of the setting: safe, all or step.
        why: the reason, in words.
        parts: value of each part, as taken.
        settings: value of each part in safe, all and, where it was timed, step.
        errors: of each setting, the greatest error of a loss or a gradient; None if it was not measured.
        milliseconds: of each setting, the median time of a step; None if it was not timed.
        source: when it was decided.
    """

    taken: str
    why: str
    parts: Setting
    settings: dict[str, Setting]
    errors: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(NAMES))
    milliseconds: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(NAMES))
    source: str = "at this start"

    @property
    def measured(self) -> bool:
        """Returns whether the settings were timed."""
        return None not in self.milliseconds.values()

    def to_dict(self) -> dict[str, Any]:
        """Returns the decision as plain JSON types."""
        return asdict(self)

    def lines(self, here: Here) -> list[str]:
        """Returns the decision as a table for people, with the reasons why a part is as it is in the settings."""
        names = [*self.settings]
        rows: list[tuple[str, ...]] = [("part", *names, "")]
        for part in PARTS:
            values = [self.settings[name].get(part.name, "-") for name in names]
            reasons = list(dict.fromkeys(reason for reason in offers(here)[part.name].values() if reason))
            rows.append((part.title, *values, f"({'; '.join(reasons)})" if reasons else ""))
        rows.append(("error", *(_cell(self.errors[name], ".2e") for name in names), ""))
        rows.append(("ms per step", *(_cell(self.milliseconds[name], ".2f") for name in names), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
        table = ["  " + "  ".join([*(x.ljust(n) for x, n in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        return [f"choices, {self.source}:", *(line.rstrip() for line in table), f"  taken: {self.taken}, {self.why}"]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def choice_from(saved: object) -> Choice | None:
    """Returns the decision that `to_dict` made; None for what is none, as in a damaged file."""
    try:
        choice = Choice(**saved)  # pyright: ignore[reportCallIssue]
        assert {*NAMES} <= {*choice.settings} <= {*NAMES, STEP}
        for numbers in (choice.errors, choice.milliseconds):
            assert {*numbers} == {*choice.settings}
            assert all(x is None or isinstance(x, int | float) for x in numbers.values())
        for setting in (choice.parts, *choice.settings.values()):
            assert all(isinstance(x, str) for pair in setting.items() for x in pair)
        assert choice.taken in choice.settings
        assert all(isinstance(x, str) for x in (choice.why, choice.source))
    except (TypeError, KeyError, AttributeError, AssertionError):
        return None
    return choice


def forced(asked: str, here: Here) -> Choice | None:
    """Returns the decision that needs no measurement: it was asked for, or there is one setting; else None."""
    settings = settings_of(here)
    if settings[SAFE] == settings[ALL]:
        return Choice(taken=ALL, why="nothing else can run here", parts=settings[ALL], settings=settings)
    if asked in NAMES:
        return Choice(taken=asked, why=f"--choices {asked}", parts=settings[asked], settings=settings)
    return None


@dataclass(kw_only=True)
class Candidate:
    """A setting that is compared with another.

    Attributes:
        name: name in the decision.
        parts: value of each part; without CUDA graphs once they have failed their proof.
        forward: the step's forward, compiled.
        recorded: the whole step as a CUDA graph; None where it is launched.
        error: greatest error of a loss or a gradient; `worst` names it.
        losses: greatest error of a loss, which is far smaller than that of a gradient.
        milliseconds: median time of a step.
        problem: why it cannot be taken; None if it can.
        graphs: why CUDA graphs failed their proof; None if they did not.
        eager: true if it could not be compiled, and stays eager.
    """

    name: str
    parts: Setting
    forward: Forward | None = None
    recorded: Recorded | None = None
    error: float = math.nan
    worst: str = ""
    losses: float = math.nan
    milliseconds: float = math.nan
    problem: str | None = None
    graphs: str | None = None
    eager: bool = False


def choose(
    step: TrainStep,
    batch: Batch,
    here: Here,
    rates: Rates,
    *,
    say: Callable[[str], object],
    clock: Callable[[torch.device, int], StepClock] = StepClock,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    truth: dict[str, Tensor] | str | None = None,
) -> Choice:
    """Compares the settings of a step on a batch, and leaves the step with the best one.

    All that a step changes is as before, bit for bit.

    Args:
        step: a step whose forward is to be compiled.
        batch: the first batch.
        here: what the parts depend on.
        rates: learning rate and momentum of the steps.
        say: receives what goes wrong on the way.
        clock: makes the clock of a setting, from the device and the number of first steps to leave out.
        rounds: rounds that are timed.
        steps: steps per round and setting.
        truth: what `exact_outcome` returns, where it is known.

    Raises:
        RuntimeError: --graphs on or step was given, and replays are not the compiled step.
    """
    safe, best = (Candidate(name=name, parts=parts) for name, parts in settings_of(here).items())
    whole: Candidate | None = None
    if best.parts["graphs"] == "step" and offers(here)["graphs"]["on"] is None:
        best.parts = {**best.parts, "graphs": "on"}  # what the whole step is compared with
        whole = Candidate(name=STEP, parts={**best.parts, "graphs": "step"})
    start = saved_state(step)
    try:
        truth = exact_outcome(step, batch) if truth is None else truth
        if isinstance(truth, str):
            best.problem = truth
        else:
            try_out(best, step, batch, here, rates, truth)
            restore_state(step, start)
        if best.problem is None and not isinstance(truth, str):
            # After `all`: where its graphs fail, all that was compiled is thrown away.
            try_out(safe, step, batch, here, rates, truth)
            restore_state(step, start)
            if safe.problem is not None:
                say(f"the safe setting stays eager, {safe.problem}")
                safe.forward, safe.problem, safe.eager = share_casts(step.method, step.dtype), None, True
                try_out(safe, step, batch, here, rates, truth)
                restore_state(step, start)
            best.problem = time_in_turns((safe, best), step, batch, rates, clock, rounds, steps) or verdict(
                safe, best, torch.finfo(step.dtype).eps
            )
        taken, compared = (safe if best.problem else best), [safe, best]
        why = "; without CUDA graphs: ".join(filter(None, (best.problem or gain(safe, best), best.graphs)))
        if taken is safe and "on" in (best.parts["graphs"], safe.parts["graphs"]):
            safe.forward = best.forward = None
            torch.compiler.reset()  # gives the memory of the graphs back
        if whole is not None and taken.parts["graphs"] == "on" and not isinstance(truth, str):
            safe.forward = None
            restore_state(step, start)  # from which the step in fp64 was taken
            try_whole_step(whole, best, step, batch, here, rates, truth, clock, rounds, steps)
            if whole.problem is None:
                taken, why = whole, f"{gain(best, whole)}; {ALL} is {why}"
            else:
                why = f"{why}; without the whole step in a graph: {whole.problem}"
            if math.isfinite(whole.milliseconds):
                compared.append(whole)
        take(step, taken)
    finally:
        restore_state(step, start)
    return Choice(
        taken=taken.name,
        why=why,
        parts=taken.parts,
        settings={each.name: each.parts for each in compared},
        errors={each.name: _finite(each.error) for each in compared},
        milliseconds={each.name: _finite(each.milliseconds) for each in compared},
    )


def try_whole_step(
    whole: Candidate,
    best: Candidate,
    step: TrainStep,
    batch: Batch,
    here: Here,
    rates: Rates,
    truth: Mapping[str, Tensor],
    clock: Callable[[torch.device, int], StepClock],
    rounds: int,
    steps: int,
) -> None:
    """Compares the whole step as one CUDA graph with `best`; frees the graphs of the one that is not better."""
    start = saved_state(step)
    try_out(whole, step, batch, here, rates, truth)
    restore_state(step, start)
    if whole.problem is None:
        whole.problem = time_in_turns((best, whole), step, batch, rates, clock, rounds, steps) or verdict(
            best, whole, torch.finfo(step.dtype).eps
        )
        restore_state(step, start)
    if whole.problem is not None:
        whole.forward = whole.recorded = step.recorded = None
        return
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    best.forward = None
    reset_cudagraph_trees()  # no torch.compiler.reset(), which would unload the kernels of the recorded step


def take(step: TrainStep, candidate: Candidate) -> None:
    """Sets a step's parts and forward, which is made if the candidate has none yet."""
    apply(step, candidate.parts)
    if candidate.eager:
        step.compile = "off"
    if candidate.forward is None:
        candidate.forward = step.forward_of(step.compile)
    step.forward, step.recorded = candidate.forward, candidate.recorded


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def gain(safe: Candidate, best: Candidate) -> str:
    """Returns in words why `best` is taken."""
    error = f"{best.error / safe.error:.2f} times its error" if safe.error else "no more error"
    return f"{safe.milliseconds / best.milliseconds:.2f} times as fast as {safe.name}, with {error}"


def try_out(
    candidate: Candidate, step: TrainStep, batch: Batch, here: Here, rates: Rates, truth: Mapping[str, Tensor]
) -> None:
    """Compiles a setting, proves its CUDA graphs, and measures its error; goes on without graphs if they fail.

    Raises:
        RuntimeError: --graphs on or step was given, and replays are not the compiled step.
    """
    take(step, candidate)
    problem, found = None, dict[str, Tensor]()
    try:
        if step.compile == "graphs":
            problem = problem_of_replays(step, batch, lr=rates["lr"], momentum=rates["momentum"])
        elif step.compile == "step":
            problem = problem_of_whole_step(step, batch, lr=rates["lr"], momentum=rates["momentum"])
            candidate.recorded = step.recorded
        if problem is None:
            found = outcome(step, batch)
    except Exception as error:  # whatever fails, there is another setting
        candidate.problem = f"{candidate.name} fails: {' '.join(str(error).split()[:40])}"
        return
    if problem is None:
        candidate.error, candidate.worst = greatest_error(found, truth)
        candidate.losses, _ = greatest_error(found, {name: x for name, x in truth.items() if not x.dim()})
        return
    require_graphs(here.engine, problem)
    if step.compile == "step":  # there is this setting without it
        candidate.problem = problem
        return
    torch.compiler.reset()  # gives the memory of the graphs back
    candidate.graphs, candidate.forward = problem, None
    candidate.parts = {**candidate.parts, "graphs": "off"}
    try_out(candidate, step, batch, here, rates, truth)


def outcome(step: TrainStep, batch: Batch) -> dict[str, Tensor]:
    """Returns copies of the losses and the gradients of a step, without the loss scale; changes the step's state.

    A loss scale with which a gradient overflows is halved, as the first steps of a run do.
    """
    start = saved_state(step)
    while True:
        losses = step.backward(batch)
        scale = step.scaler.get_scale()
        gradients = {name: x / scale for name, x in copies(gradients_of(step.method)).items()}
        if scale <= 1 or all(x.isfinite().all() for x in gradients.values()):
            return copies({"total": losses.total, **losses.terms}) | gradients
        restore_state(step, start)
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale / 2})


def exact_outcome(step: TrainStep, batch: Batch) -> dict[str, Tensor] | str:
    """Returns the losses and the gradients of an eager step in fp64 by PyTorch's operators, or why there are none.

    Recomputes activations, which take four times the memory of bf16.
    """
    device, draws = step.device, torch.get_rng_state()
    cuda_draws = torch.cuda.get_rng_state(device) if device.type == "cuda" else draws
    try:
        method = copy.deepcopy(step.method).double()
        method.backends = Backends.all("torch")
        method.fuse("torch")
        checkpoint_activations(method)
        views = batch.views.contiguous(memory_format=step.memory_format).double()
        losses = method(views, None if step.labels is None else step.labels[batch.indices])
        losses.total.backward()
        found = copies({"total": losses.total, **losses.terms} | gradients_of(method))
    except torch.OutOfMemoryError:
        return "a step in fp64 to compare with does not fit into the memory"
    finally:
        method = losses = views = None
        if device.type == "cuda":
            torch.cuda.empty_cache()  # graphs have a pool of their own
    drew = not torch.equal(draws, torch.get_rng_state())
    drew |= device.type == "cuda" and not torch.equal(cuda_draws, torch.cuda.get_rng_state(device))
    # torch.compile draws by another generator, so the losses would be those of another draw.
    return "a step draws random numbers, and a compiled one others than one in fp64" if drew else found


def greatest_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[float, str]:
    """Returns the greatest relative error of a tensor by the L2 norm, NaN if one is, and the tensor's name."""
    norms = {name: x.norm().item() for name, x in truth.items()}
    errors = {
        name: (found[name].double() - x).norm().item() / norms[name] if name in found else math.inf
        for name, x in truth.items()
        if norms[name] > NOISE * max(norms.values())
    }
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[worst], worst


def time_in_turns(
    candidates: Sequence[Candidate],
    step: TrainStep,
    batch: Batch,
    rates: Rates,
    clock: Callable[[torch.device, int], StepClock],
    rounds: int,
    steps: int,
) -> str | None:
    """Times the steps of settings in rounds that take turns, after one round of warm-up; returns what failed."""
    medians: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds + 1):
        for candidate in candidates:
            take(step, candidate)
            watch = clock(step.device, 1)  # the first one begins with an idle device
            try:
                for _ in range(steps + 1):
                    if step.augment is not None and step.recorded is None and batch.parameters is not None:
                        step.augment(batch.indices, batch.parameters)  # as the loader does; a recorded step holds it
                    step(0, batch, lr=rates["lr"], momentum=rates["momentum"])
                    watch.stop(0.0)
                if step.device.type == "cuda":
                    torch.cuda.synchronize(step.device)
            except Exception as error:  # too little memory for both
                return f"{candidate.name} fails as it is timed: {' '.join(str(error).split()[:40])}"
            if number > 0:
                medians[candidate.name].append(statistics.median(watch.take()[1]))
    for candidate in candidates:
        candidate.milliseconds = 1e3 * statistics.median(medians[candidate.name])
    return None


def require_graphs(engine: EngineConfig, problem: str) -> None:
    """Raises RuntimeError if --graphs on or step was given; `problem` says why replays are not the compiled step."""
    if engine.graphs in ("on", "step"):
        raise RuntimeError(
            f"graphs {engine.graphs} was asked for, and replays are not the compiled step: {problem}; take --graphs "
            "auto or off"
        )


def verdict(safe: Candidate, best: Candidate, rounding: float) -> str | None:
    """Returns why `best` is not taken: its error is more than twice safe's, or it is not faster; None if it is.

    Args:
        safe: the setting to compare with.
        best: the setting that may be taken.
        rounding: of a loss, which the autocast dtype may add to twice safe's error: that is near 0 by chance.
    """
    if not best.losses <= MOST_ERROR * safe.losses + rounding:  # NaN too
        return f"error {best.losses:.2e} of the losses, more than {MOST_ERROR:g} times {safe.losses:.2e}"
    if not best.error <= MOST_ERROR * safe.error:
        return f"error {best.error:.2e} of {best.worst}, more than {MOST_ERROR:g} times {safe.error:.2e}"
    if not best.milliseconds < safe.milliseconds:
        return f"{best.milliseconds:.2f} ms, not less than {safe.milliseconds:.2f}"
    return None


def key_of(config: RunConfig, here: Here, side: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what a decision holds for: machine, versions, and the settings that shape a step."""
    engine, objective = config.engine, config.objective
    return {
        "machine": _machine(here.device),
        "kernels": _kernels_digest(),
        "method": config.method,
        "model": asdict(config.model),
        "objective": [objective.queue_size, objective.queue_dtype, objective.k, objective.one_embedding],
        "batch": config.optim.batch_size,
        "optimizer": config.optim.optimizer,
        "side": side,
        "dtype": str(dtype),
        "engine": [engine.channels_last, engine.tf32, engine.cudnn_benchmark],
        "backends": list(here.backends),
        "parts": offers(here),
    }


@cache
def _machine(device: torch.device) -> dict[str, Any]:
    """Returns the GPU, its driver, and the versions of what makes and runs its code."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": getattr(importlib.import_module("triton"), "__version__", None) if HAS_TRITON else None,
        "cudnn": torch.backends.cudnn.version(),
    }


@cache
def _kernels_digest() -> str:
    """Returns a digest of the sources of our operators."""
    folder, found = Path(mnclglf_kernels.__path__[0]), hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def cache_file() -> Path:
    """Returns the file of the decisions that were made on this machine."""
    return cache_folder() / "choices.json"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _cached() -> dict[str, Any]:
    with suppress(ValueError, OSError):  # damaged: it is written again
        return read_object(cache_file()) or {}
    return {}


def recall(key: Mapping[str, Any], here: Here) -> Choice | None:
    """Returns the decision that was made for this key on this machine; None if there is none that can be taken."""
    choice = choice_from(_cached().get(_digest(key)))
    if choice is None or problems_of(choice.parts, here):
        return None
    return replace(choice, source="from an earlier start on this machine")


def remember(key: Mapping[str, Any], choice: Choice) -> None:
    """Keeps a decision for later starts on this machine, if it was measured: what failed is tried again then."""
    if not choice.measured:
        return
    with suppress(OSError):
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), {**_cached(), _digest(key): choice.to_dict()})
