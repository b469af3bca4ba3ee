"""Tests of the choice between two settings of a compiled step: what decides it, what it leaves, and how it is kept.

Forwards are pretended, but for one test: `compiled` returns the method's own, with a fault where a test asks for one.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import emulated_graph
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from training.test_graphs import CPU, CUDA, RATES, state_of
from training.test_step import make_batch, make_method
from training.test_whole_step import make_run

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from mnclglf.data.loader import Batch
from mnclglf.methods import SimCLR
from mnclglf.methods.base import Losses
from mnclglf.training import choices, whole_step
from mnclglf.training.choices import (
    Candidate,
    Choice,
    Here,
    apply,
    cache_file,
    changes,
    check_graphs,
    check_half_sums,
    choice_from,
    choose,
    exact_outcome,
    forced,
    greatest_error,
    key_of,
    offers,
    outcome,
    problems_of,
    recall,
    remember,
    settings_of,
    verdict,
)
from mnclglf.training.speedups import Forward
from mnclglf.training.step import TrainStep
from mnclglf_kernels import Backends

HERE = Here(EngineConfig(), CUDA, Backends.all("torch"))  # combo kernels and graphs are to be chosen
SAFE = {"batch_norm": "torch", "combo_kernels": "off", "convolution": "torch", "graphs": "off"}
ALL = {"batch_norm": "torch", "combo_kernels": "on", "convolution": "torch", "graphs": "on"}
Compiler = Callable[..., Forward]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_step(dtype: torch.dtype = torch.float32, *, one_embedding: bool = False) -> TrainStep:
    torch.manual_seed(3)
    return TrainStep(make_method(dtype=dtype, one_embedding=one_embedding), OptimConfig(), EngineConfig(), dtype)


class Clock:
    """Tells times of steps that follow from the parts: 3 ms of the safe setting, 2 of the other one."""

    milliseconds: dict[bool, float]

    def __init__(self, step: TrainStep, *, safe: float = 3.0, best: float = 2.0) -> None:
        self.step, self.milliseconds = step, {False: safe, True: best}
        self.times: list[float] = []
        self.order: list[bool] = []

    def __call__(self, device: torch.device, warm_up: int) -> "Clock":
        assert device == CPU
        self.times, self.warm_up = [], warm_up
        self.order.append(self.step.combo_kernels)
        return self

    def stop(self, waited: float) -> None:
        self.times.append(1000.0 if self.warm_up > 0 else self.milliseconds[self.step.combo_kernels] / 1e3)
        self.warm_up -= 1

    def take(self) -> tuple[float, list[float]]:
        return 0.0, [time for time in self.times if time < 1000]


Made = list[tuple[bool, bool]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Pretends a compiler; returns a function that sets a fault of each setting, and lists what is compiled."""

    def set_up(best: Callable[[Losses], Losses] | None = None, safe: Callable[[Losses], Losses] | None = None) -> Made:
        made: Made = []

        def pretended(forward: Forward, *, graphs: bool, combo_kernels: bool) -> Forward:
            made.append((graphs, combo_kernels))
            fault = best if combo_kernels else safe

            def run(views: Tensor, labels: Tensor | None = None) -> Losses:
                losses = forward(views, labels)
                return fault(losses) if fault else losses

            return run

        monkeypatch.setattr("mnclglf.training.step.compiled", pretended)
        return made

    return set_up


def times_as_large(factor: float) -> Callable[[Losses], Losses]:
    return lambda losses: losses._replace(total=losses.total * factor)


def steeper(losses: Losses) -> Losses:
    """Doubles the gradients, and keeps the losses."""
    return losses._replace(total=2 * losses.total - losses.total.detach())


def uncompilable(losses: Losses) -> NoReturn:
    raise BackendCompilerFailed(choices, ValueError("no such instruction"), None)


def chosen(step: TrainStep, here: Here = HERE, **how: Any) -> tuple[Choice, list[str]]:
    said: list[str] = []
    how = {"clock": Clock(step)} | how
    return choose(step, batch_of(step), here, RATES, say=said.append, rounds=1, steps=1, **how), said


def batch_of(step: TrainStep) -> Batch:
    with torch.random.fork_rng():  # which belongs to the state that is compared
        torch.manual_seed(7)
        return make_batch(dtype=step.dtype)


def test_what_is_faster_and_as_exact_is_taken(pretend: Callable[..., Made]) -> None:
    made, step = pretend(), make_step()
    before, clock = state_of(step), Clock(step)
    choice, said = chosen(step, clock=clock)
    assert (choice.taken, choice.parts, said) == ("all", ALL, [])
    assert "1.50 times as fast as safe, with 1.00 times its error" in choice.why
    assert choice.settings == {"safe": SAFE, "all": ALL}
    assert choice.milliseconds == pytest.approx({"safe": 3.0, "all": 2.0})
    assert 0 < (choice.errors["all"] or 0) < 1e-2  # of fp32 beside fp64
    assert choice.errors["all"] == choice.errors["safe"]
    assert made == [(True, True), (False, False)]  # each is compiled once
    assert clock.order == [False, True] * 2  # in turns, after a round that is not counted
    assert (step.compile, step.combo_kernels) == ("graphs", True)
    assert state_of(step) == before


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (times_as_large(1.001), r"error 1\.0\de-03 of the losses, more than 2 times"),
        (times_as_large(math.nan), "error nan of the losses, more than 2 times"),
        (steeper, r"error 1\.00e\+00 of the gradient of .*, more than 2 times"),
        (uncompilable, "all fails: .*no such instruction"),
    ],
)
def test_what_is_wrong_is_not_taken(pretend: Callable[..., Made], fault: Any, reason: str) -> None:
    pretend(fault)
    step = make_step()
    before = state_of(step)
    choice, _ = chosen(step)
    assert (choice.taken, choice.parts) == ("safe", SAFE)
    assert re.search(reason, choice.why), choice.why
    assert (step.compile, step.combo_kernels) == ("on", False)
    assert state_of(step) == before
    assert json.loads(json.dumps(choice.to_dict(), allow_nan=False)) == choice.to_dict()


@pytest.mark.parametrize("best", [3.0, 3.5])
def test_what_is_not_faster_is_not_taken(pretend: Callable[..., Made], best: float) -> None:
    pretend()
    step = make_step()
    choice, _ = chosen(step, clock=Clock(step, best=best))
    assert choice.taken == "safe"
    assert f"{best:.2f} ms, not less than 3.00" in choice.why
    assert step.compile == "on"


def test_a_compiler_that_fails_in_both_is_left_to_the_first_step(pretend: Callable[..., Made]) -> None:
    made, step = pretend(uncompilable, uncompilable), make_step()
    choice, _ = chosen(step)
    assert (choice.taken, choice.measured) == ("safe", False)
    assert "no such instruction" in choice.why
    assert made == [(True, True), (False, False)]  # and nothing has called the second
    with pytest.raises(BackendCompilerFailed):
        step.backward(batch_of(step))


def test_a_safe_setting_that_cannot_be_compiled_is_compared_as_it_is(pretend: Callable[..., Made]) -> None:
    pretend(safe=uncompilable)
    step = make_step()
    choice, said = chosen(step)
    assert choice.taken == "all"
    assert choice.measured
    assert len(said) == 1
    assert "the safe setting stays eager, safe fails: " in said[0]
    assert step.compile == "graphs"
    choice, _ = chosen(step, clock=Clock(step, safe=1.0))
    assert choice.taken == "safe"
    assert step.compile == "off"
    assert step.backward(batch_of(step)).total.isfinite()


def replayed_wrongly(calls: list[int]) -> Callable[[Losses], Losses]:
    """Returns a fault of every call but the first, as long as graphs are replayed."""

    def fault(losses: Losses) -> Losses:
        calls.append(1)
        return losses if len(calls) == 1 or len(calls) > 3 else times_as_large(2.0)(losses)

    return fault


def test_without_graphs_that_fail_their_proof_the_rest_goes_on(
    pretend: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step = pretend(replayed_wrongly([])), make_step()
    resets: list[int] = []
    monkeypatch.setattr("torch.compiler.reset", lambda: resets.append(len(made)))
    before = state_of(step)
    choice, _ = chosen(step)
    without = {**ALL, "graphs": "off"}
    assert (choice.taken, choice.parts, choice.settings["all"]) == ("all", without, without)
    assert "without CUDA graphs: the first difference is in total" in choice.why
    assert made == [(True, True), (False, True), (False, False)]
    assert resets == [1]  # the graphs' memory is given back before anything else is compiled
    assert step.compile == "on"
    assert state_of(step) == before


def test_graphs_that_were_asked_for_have_to_be_proved(pretend: Callable[..., Made]) -> None:
    pretend(replayed_wrongly([]))
    step = make_step()
    before = state_of(step)
    with pytest.raises(RuntimeError, match=r"graphs on .*first difference is in total.*--graphs auto"):
        chosen(step, HERE._replace(engine=EngineConfig(graphs="on")))
    assert state_of(step) == before


def test_the_memory_of_graphs_that_are_not_taken_is_given_back(
    pretend: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[int] = []
    monkeypatch.setattr("torch.compiler.reset", lambda: resets.append(1))
    made, step = pretend(), make_step()
    assert chosen(step, clock=Clock(step, best=9.0))[0].taken == "safe"
    assert resets == [1]
    assert made == [(True, True), (False, False), (False, False)]  # the last is that of the run
    assert chosen(step)[0].taken == "all"
    assert resets == [1]


def test_without_memory_for_fp64_the_safe_setting_is_taken(
    pretend: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choices, "checkpoint_activations", full)
    made, step = pretend(), make_step()
    before = state_of(step)
    choice, _ = chosen(step)
    assert (choice.taken, choice.measured) == ("safe", False)
    assert "fp64 to compare with does not fit" in choice.why
    assert made == [(False, False)]
    assert state_of(step) == before


def test_a_step_that_runs_out_of_memory_as_it_is_timed_leaves_the_safe_setting(pretend: Callable[..., Made]) -> None:
    step = make_step()

    def full(losses: Losses) -> Losses:
        calls.append(1)
        if len(calls) > 8:  # five of the proof, one of the error
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    calls: list[int] = []
    pretend(full)
    before = state_of(step)
    choice, _ = chosen(step)
    assert (choice.taken, choice.measured) == ("safe", False)
    assert "all fails as it is timed: CUDA out of memory" in choice.why
    assert state_of(step) == before


class WholeClock(Clock):
    """Tells times by what is replayed: 3 ms without graphs, 2 with those of the forward, `whole` of the step."""

    def __init__(self, step: TrainStep, whole: float) -> None:
        super().__init__(step)
        self.replayed = {"on": 3.0, "graphs": 2.0, "step": whole}

    def stop(self, waited: float) -> None:
        assert (self.step.recorded is not None) == (self.step.compile == "step")
        self.milliseconds = dict.fromkeys((False, True), self.replayed[self.step.compile])
        super().stop(waited)


@pytest.fixture
def resident(pretend: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> tuple[TrainStep, Batch, Made]:
    """A step that makes its views, the first batch of its loader, and the list of what is compiled."""
    made = pretend()
    monkeypatch.setattr(whole_step, "record", emulated_graph.record)
    step, loader = make_run("mnclglf")
    (batch,) = loader.batches(0, 1)
    return step, batch, made


def chosen_whole(resident: tuple[TrainStep, Batch, Made], whole: float = 1.0, **engine: Any) -> Choice:
    step, batch, _ = resident
    here = HERE._replace(resident=True, engine=EngineConfig(**engine))
    clock: Any = WholeClock(step, whole)
    return choose(step, batch, here, RATES, say=lambda _: None, rounds=1, steps=1, clock=clock)


def test_the_whole_step_is_taken_where_it_is_faster_than_all(resident: tuple[TrainStep, Batch, Made]) -> None:
    step, batch, made = resident
    before, views = state_of(step), batch.views.clone()
    choice = chosen_whole(resident)
    whole = {**ALL, "graphs": "step"}
    assert (choice.taken, choice.parts, choice.measured) == ("step", whole, True)
    assert choice.settings == {"safe": SAFE, "all": ALL, "step": whole}
    assert choice.milliseconds == pytest.approx({"safe": 3.0, "all": 2.0, "step": 1.0})
    assert "2.00 times as fast as all, with 1.00 times its error; all is 1.50 times as fast as safe" in choice.why
    assert made == [(True, True), (False, False), (False, True)]
    assert step.compile == "step"
    assert step.recorded is not None
    assert state_of(step) == before
    assert torch.equal(batch.views, views)
    assert choice_from(json.loads(json.dumps(choice.to_dict()))) == choice
    assert re.search(
        r"part +safe +all +step\n.*CUDA graphs +off +on +step\n",
        "\n".join(choice.lines(HERE._replace(resident=True))),
        re.DOTALL,
    )


def test_the_whole_step_is_not_taken_where_it_is_not_faster(resident: tuple[TrainStep, Batch, Made]) -> None:
    step, _, _ = resident
    choice = chosen_whole(resident, 2.5)
    assert (choice.taken, choice.parts) == ("all", ALL)
    assert "1.50 times as fast as safe" in choice.why
    assert "without the whole step in a graph: 2.50 ms, not less than 2.00" in choice.why
    assert step.compile == "graphs"
    assert step.recorded is None


def test_a_whole_step_that_cannot_be_recorded_leaves_all_as_it_is(
    resident: tuple[TrainStep, Batch, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(whole_step, "record", forbidden)
    step, _, _ = resident
    before = state_of(step)
    choice = chosen_whole(resident)
    assert (choice.taken, choice.parts, choice.measured) == ("all", ALL, True)
    assert choice.settings == {"safe": SAFE, "all": ALL}
    assert "without the whole step in a graph: it cannot be recorded: operation not permitted" in choice.why
    assert state_of(step) == before
    assert step.recorded is None
    with pytest.raises(RuntimeError, match=r"graphs step .*not permitted.*--graphs auto"):
        chosen_whole(resident, graphs="step")
    assert state_of(step) == before


def test_the_whole_step_is_in_both_settings_where_it_is_asked_for(resident: tuple[TrainStep, Batch, Made]) -> None:
    step, _, made = resident
    choice = chosen_whole(resident, graphs="step")
    assert {setting["graphs"] for setting in choice.settings.values()} == {"step"}
    assert made == [(False, True), (False, False)]
    assert step.recorded is not None


def test_a_loader_that_makes_the_views_outside_rules_the_whole_step_out() -> None:
    assert "not resident" in (offers(HERE)["graphs"]["step"] or "")
    assert offers(HERE._replace(resident=True))["graphs"]["step"] is None
    asked = HERE._replace(engine=EngineConfig(graphs="step"))
    with pytest.raises(ValueError, match=r"graphs step .*--loader resident"):
        check_graphs(asked)
    check_graphs(asked._replace(resident=True))


def test_losses_of_a_random_draw_are_not_compared(pretend: Callable[..., Made]) -> None:
    """A compiled step draws by another generator than an eager one."""
    made, step = pretend(), make_step(one_embedding=True)
    before = state_of(step)
    choice, _ = chosen(step)
    assert choice.taken == "safe"
    assert "random" in choice.why
    assert made == [(False, False)]
    assert state_of(step) == before


def test_the_truth_is_the_step_in_fp64() -> None:
    """Checks it against a method that was made in fp64, which keeps all its activations."""
    step = make_step()
    batch, expected = batch_of(step), make_method(dtype=torch.float64)  # the same weights, by its seed
    losses = expected(batch.views.double())
    losses.total.backward()
    found = exact_outcome(step, batch)
    assert isinstance(found, dict)
    assert {x.dtype for x in found.values()} == {torch.float64}
    torch.testing.assert_close(found["total"], losses.total.detach(), rtol=1e-12, atol=0)  # fp64, 20 layers
    names = {f"the gradient of {name}": x.grad for name, x in expected.named_parameters() if x.grad is not None}
    assert {*found} == {"total", "loss_s", "loss_m", *names}
    for name, gradient in names.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())


def test_a_loss_scale_is_taken_out_and_lowered_until_nothing_overflows() -> None:
    step = make_step(torch.float16)
    batch = batch_of(step)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**40})
    found = outcome(step, batch)
    assert all(x.isfinite().all() for x in found.values())
    truth = exact_outcome(make_step(torch.float16), batch)
    assert isinstance(truth, dict)
    assert found["total"].item() == pytest.approx(truth["total"].item(), rel=0.01)  # 2^-11 per rounding, 20 layers
    name = "the gradient of predictor.3.weight"
    assert found[name].norm().item() == pytest.approx(truth[name].norm().item(), rel=0.05)


def test_the_greatest_error_is_relative_to_each_tensor() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0]), "c": torch.tensor([1e-14])}
    truth = {name: x.double() for name, x in truth.items()}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([101.0]), "c": torch.tensor([1e-3])}
    assert greatest_error(found, truth) == (pytest.approx(0.1), "a")  # c is rounding
    assert greatest_error({**found, "b": torch.tensor([150.0])}, truth) == (pytest.approx(0.5), "b")
    error, worst = greatest_error({**found, "b": torch.tensor([math.nan])}, truth)
    assert math.isnan(error)
    assert worst == "b"
    assert greatest_error({"b": truth["b"]}, truth) == (math.inf, "a")


@pytest.mark.parametrize(
    ("error", "losses", "milliseconds", "taken"),
    [
        (2.0, 0.01, 0.9, True),
        (2.1, 0.01, 0.9, False),
        (0.1, 0.01, 1.0, False),
        (0.0, 0.00, 0.9, True),
        (1.0, 0.029, 0.9, True),  # 2 x 0.01 and 0.01 of rounding
        (1.0, 0.031, 0.9, False),
        (math.nan, 0.01, 0.9, False),
        (1.0, math.nan, 0.9, False),
        (1.0, 0.01, math.nan, False),
    ],
)
def test_twice_the_error_and_less_time_are_the_rule(
    error: float, losses: float, milliseconds: float, taken: bool
) -> None:
    safe = Candidate(name="safe", parts=SAFE, error=1.0, losses=0.01, milliseconds=1.0)
    best = Candidate(name="all", parts=ALL, error=error, losses=losses, milliseconds=milliseconds)
    assert (verdict(safe, best, 0.01) is None) == taken


TRITON = Backends.all("triton")


@pytest.mark.parametrize(
    ("engine", "backends", "safe", "best"),
    [
        ({}, TRITON, "torch off torch off", "triton on torch on"),
        ({}, TRITON._replace(batch_norm="torch"), "torch off torch off", "torch on torch on"),
        ({"kernels": "off"}, Backends.all("torch"), "torch off torch off", "torch on torch on"),
        ({"kernels": "require"}, TRITON, "triton off torch off", "triton on torch on"),
        ({"combo_kernels": "on"}, TRITON, "torch on torch off", "triton on torch on"),
        ({"combo_kernels": "off"}, TRITON, "torch off torch off", "triton off torch on"),
        ({"graphs": "on"}, TRITON, "torch off torch on", "triton on torch on"),
        ({"graphs": "off"}, TRITON, "torch off torch off", "triton on torch off"),
        ({"lookup": "faiss"}, TRITON, "torch off torch off", "triton on torch off"),
    ],
)
def test_an_option_fixes_its_part_in_both_settings(
    engine: dict[str, Any], backends: Backends, safe: str, best: str
) -> None:
    found = settings_of(Here(EngineConfig(**engine), CUDA, backends))
    assert {name: " ".join(setting.values()) for name, setting in found.items()} == {"safe": safe, "all": best}


FUSES = Here(EngineConfig(graphs="off"), CUDA, TRITON, torch.bfloat16, without_gradient=True, half_sums_cleared=True)


@pytest.mark.parametrize(
    ("capability", "cudnn", "changes", "best"),
    [
        ((8, 6), True, {}, "cudnn"),
        ((9, 0), True, {"dtype": torch.float16}, "cudnn"),
        ((8, 6), False, {}, "triton"),
        ((8, 9), True, {"engine": EngineConfig(graphs="off", half_sums="off")}, "triton"),
        ((9, 0), False, {}, "torch"),  # Triton's prologue takes half of such a GPU's peak
        ((8, 6), False, {"backends": TRITON._replace(convolution="torch")}, "torch"),
        ((8, 6), True, {"dtype": torch.float32}, "torch"),
        ((8, 6), True, {"without_gradient": False}, "torch"),
        ((8, 6), True, {"half_sums_cleared": False}, "triton"),
    ],
)
def test_the_convolutions_of_all_are_the_best_that_can_run(
    capability: tuple[int, int], cudnn: bool, changes: dict[str, Any], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    problem = None if cudnn else RuntimeError("not installed")
    monkeypatch.setattr("mnclglf.training.choices.cudnn_problem", lambda *_: problem)
    found = settings_of(FUSES._replace(**changes))
    assert (found["safe"]["convolution"], found["all"]["convolution"]) == ("torch", best)


def test_half_sums_that_are_asked_for_are_in_both_settings_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = FUSES._replace(engine=EngineConfig(half_sums="on"))
    monkeypatch.setattr("mnclglf.training.choices.cudnn_problem", lambda *_: None)
    assert {setting["convolution"] for setting in settings_of(here).values()} == {"cudnn"}
    check_half_sums(here)
    check_half_sums(here._replace(half_sums_cleared=False))  # who asks for it gets it
    with pytest.raises(ValueError, match=r"half_sums on .*gradient.*--half-sums auto"):
        check_half_sums(here._replace(without_gradient=False))
    with pytest.raises(ValueError, match=r"half_sums on .*GPU.*--half-sums auto"):
        check_half_sums(here._replace(device=CPU))
    monkeypatch.setattr("mnclglf.training.choices.cudnn_problem", lambda *_: RuntimeError("not installed"))
    with pytest.raises(ValueError, match=r"half_sums on .*not installed.*--half-sums auto"):
        check_half_sums(here)
    online = EngineConfig(precision="fp16", half_sums_online="forward")
    with pytest.raises(ValueError, match=r"half_sums_online forward: not installed.*--half-sums-online off"):
        check_half_sums(here._replace(engine=online))
    check_half_sums(here._replace(engine=EngineConfig()))


def test_on_a_cpu_there_is_nothing_to_choose() -> None:
    here = Here(EngineConfig(combo_kernels="on"), CPU, Backends.all("torch"))
    choice = forced("auto", here)
    assert choice is not None
    assert choice.parts == SAFE
    assert not choices.chooses(CPU)
    assert choices.chooses(CUDA)


def test_a_setting_that_is_asked_for_is_not_timed() -> None:
    here = HERE._replace(backends=TRITON)
    for name, parts in (("safe", SAFE), ("all", {**ALL, "batch_norm": "triton"})):
        choice = forced(name, here)
        assert choice is not None
        assert (choice.taken, choice.parts, choice.measured) == (name, parts, False)
        assert f"--choices {name}" in choice.why
    assert forced("auto", here) is None


def test_parts_are_set_where_a_step_reads_them() -> None:
    step = make_step()
    step.method.backends = Backends.all("auto")
    apply(step, {"batch_norm": "triton", "combo_kernels": "on", "convolution": "cudnn", "graphs": "on"})
    assert step.method.backends == Backends.all("auto")._replace(batch_norm="triton")
    assert step.method.encoder.get_submodule("bn1").backend == "triton"
    assert (step.combo_kernels, step.compile) == (True, "graphs")
    assert [(x.convolution, x.half_sums) for x in step.method.encoders()] == [("cudnn", True)] * 2
    apply(step, {**SAFE, "convolution": "triton"})
    assert [(x.convolution, x.half_sums) for x in step.method.encoders()] == [("triton", False)] * 2
    apply(step, SAFE)
    assert [(x.convolution, x.half_sums) for x in step.method.encoders()] == [("torch", False)] * 2
    assert step.method.encoder.get_submodule("bn1").backend == "torch"
    assert (step.combo_kernels, step.compile) == (False, "on")


def test_the_reasons_stand_in_the_table() -> None:
    here = Here(EngineConfig(graphs="off"), CUDA, TRITON._replace(batch_norm="torch"))
    choice = Choice(taken="all", why="it is fast", parts=SAFE, settings=settings_of(here))
    choice = replace(choice, errors={"safe": 0.0123, "all": None}, milliseconds={"safe": 3.0, "all": 2.5})
    assert [line.split() for line in choice.lines(here)] == [
        ["choices,", "at", "this", "start:"],
        ["part", "safe", "all"],
        ["batch", "norm", "torch", "torch", "(its", "kernels", "cannot", "run", "here)"],
        ["combo", "kernels", "off", "on"],
        ["convolutions", "without", "gradient", "torch", "torch", "(every", "forward", "has", "a", "gradient)"],
        ["CUDA", "graphs", "off", "off", "(--graphs", "off)"],
        ["error", "1.23e-02", "-"],
        ["ms", "per", "step", "3.00", "2.50"],
        ["taken:", "all,", "it", "is", "fast"],
    ]


MEASURED = Choice(
    taken="all",
    why="faster",
    parts=ALL,
    settings={"safe": SAFE, "all": ALL},
    errors={"safe": 1e-3, "all": 1e-3},
    milliseconds={"safe": 2.0, "all": 1.0},
)


def test_a_decision_survives_its_file() -> None:
    assert choice_from(json.loads(json.dumps(MEASURED.to_dict()))) == MEASURED


@pytest.mark.parametrize(
    "change",
    [
        {"taken": "both"},
        {"taken": None},
        {"parts": "all"},
        {"parts": {"graphs": 1}},
        {"settings": {"safe": SAFE}},
        {"errors": {"safe": "low", "all": 1}},
        {"milliseconds": {"safe": 1.0}},
        {"unknown": 1},
        {"why": 3},
    ],
    ids=str,
)
def test_what_is_no_decision_is_none(change: dict[str, Any]) -> None:
    assert choice_from({**MEASURED.to_dict(), **change}) is None


@pytest.mark.parametrize("saved", [None, 3, [], "all", {}])
def test_what_is_no_object_is_no_decision(saved: object) -> None:
    assert choice_from(saved) is None


CONFIG = RunConfig()
ON_CPU = HERE._replace(device=CPU)  # whose name torch can tell without a GPU


def key(config: RunConfig = CONFIG, here: Here = ON_CPU, **how: Any) -> dict[str, Any]:
    return key_of(config, here, **{"side": 32, "dtype": torch.bfloat16, **how})


def test_a_decision_is_kept_for_its_key() -> None:
    assert recall(key(), HERE) is None
    remember(key(), MEASURED)
    remember(key(side=64), replace(MEASURED, taken="safe", parts=SAFE))
    found = recall(key(), HERE)
    assert found == replace(MEASURED, source="from an earlier start on this machine")
    assert getattr(recall(key(side=64), HERE), "taken", None) == "safe"
    assert recall(key(side=28), HERE) is None


def other(**sections: Any) -> RunConfig:
    return replace(CONFIG, **sections)


@pytest.mark.parametrize(
    "changed",
    [
        key(other(method="simclr")),
        key(other(optim=OptimConfig(batch_size=128))),
        key(other(optim=OptimConfig(optimizer="lars"))),
        key(other(model=ModelConfig(width=32))),
        key(other(objective=ObjectiveConfig(k=3))),
        key(other(objective=ObjectiveConfig(queue_size=512))),
        key(other(engine=EngineConfig(channels_last=False))),
        key(here=ON_CPU._replace(backends=TRITON)),
        key(here=ON_CPU._replace(engine=EngineConfig(kernels="off"))),
        key(dtype=torch.float16),
    ],
)
def test_what_shapes_a_step_is_in_the_key(changed: dict[str, Any]) -> None:
    remember(key(), MEASURED)
    assert recall(changed, HERE) is None


def test_what_does_not_shape_a_step_is_not_in_the_key() -> None:
    remember(key(), MEASURED)
    changed = other(
        seed=4,
        optim=OptimConfig(lr=0.3, epochs=7),
        objective=ObjectiveConfig(temperature=0.1),
        engine=EngineConfig(log_every=3),
    )
    assert recall(key(changed), HERE) is not None


@pytest.mark.parametrize(
    ("where", "value"),
    [("torch.__version__", "2.0"), ("torch.backends.cudnn.version", lambda: 1), ("triton.__version__", "1.0")],
)
def test_versions_are_in_the_key(monkeypatch: pytest.MonkeyPatch, where: str, value: object) -> None:
    before = key()
    choices._machine.cache_clear()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(where, value)
    try:
        assert key() != before
    finally:
        choices._machine.cache_clear()  # pyright: ignore[reportPrivateUsage]


def test_the_sources_of_the_kernels_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = choices._kernels_digest  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr("mnclglf_kernels.__path__", [str(tmp_path)])
    found = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "one.py").write_text(text)
        digest.cache_clear()
        found.add(key()["kernels"])
    digest.cache_clear()
    assert len(found) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', "\udcff"])
def test_a_damaged_file_is_written_again(text: str) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_bytes(text.encode(errors="surrogateescape"))
    assert recall(key(), HERE) is None
    remember(key(), MEASURED)
    assert recall(key(), HERE) is not None


def test_a_place_that_cannot_be_written_is_no_error() -> None:
    cache_file().parent.parent.mkdir(parents=True)
    cache_file().parent.write_text("a file where a folder belongs")
    remember(key(), MEASURED)
    assert recall(key(), HERE) is None


def test_only_what_was_timed_is_kept() -> None:
    remember(key(), replace(MEASURED, milliseconds={"safe": 3.0, "all": None}))
    assert not cache_file().exists()


def test_a_kept_decision_that_cannot_be_taken_is_not_taken() -> None:
    remember(key(), MEASURED)
    assert recall(key(), HERE._replace(engine=EngineConfig(graphs="off"))) is None


def test_what_a_decision_lacks_here_is_named() -> None:
    here = Here(EngineConfig(graphs="off"), CUDA, TRITON)
    assert problems_of(SAFE, here) == []
    assert problems_of({"batch_norm": "cudnn", "graphs": "on"}, here) == [
        "batch_norm was cudnn",
        "combo_kernels was not chosen",
        "convolution was not chosen",
        "graphs on: --graphs off",
    ]
    assert changes(ALL, SAFE) == "combo_kernels on, graphs on"
    assert changes({"graphs": "off"}, SAFE) == "batch_norm not chosen, combo_kernels not chosen, convolution not chosen"


def test_each_part_has_a_row() -> None:
    assert {*offers(HERE)} == {"batch_norm", "combo_kernels", "convolution", "graphs"}
    assert all(len(values) > 1 for values in offers(HERE).values())


@pytest.mark.slow
def test_two_compiled_settings_are_compared_on_a_cpu() -> None:
    """Compiles with Inductor's C++; graphs are asked for, and torch cannot record them here."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    method = SimCLR(ModelConfig(width=4, projector_width=16), ObjectiveConfig())  # a seventh of MNCLGLF's code
    step = TrainStep(method.to(memory_format=torch.channels_last).train(), OptimConfig(), EngineConfig(), torch.float32)
    batch = batch_of(step)
    batch = Batch(batch.views[:32], batch.indices)
    parameters = [parameter.clone() for parameter in method.parameters()]
    here = HERE._replace(engine=EngineConfig(combo_kernels="off"))
    said: list[str] = []
    choice = choose(step, batch, here, RATES, say=said.append, rounds=1, steps=2)
    assert said == []
    assert choice.measured
    assert "without CUDA graphs: torch cannot record" in choice.why
    assert choice.errors["safe"] == choice.errors["all"]
    assert 0 < (choice.errors["safe"] or 0) < 1e-2
    assert all(torch.equal(x, y) for x, y in zip(parameters, method.parameters(), strict=True))
    torch._dynamo.reset()
