"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from mnclglf.config import RunConfig, from_dict, to_dict
from mnclglf.data.loader import Batch, batch_indices
from mnclglf.methods import Losses
from mnclglf.runs.checkpoint import (
    CheckpointError,
    changed_settings,
    checkpoint_path,
    delete_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_milestones,
    record_milestones,
    save_checkpoint,
)
from mnclglf.runs.console import LastingConsole, say
from mnclglf.runs.files import check_writable, read_object, write_json
from mnclglf.runs.locks import training_in
from mnclglf.training.choices import (
    Choice,
    Here,
    apply,
    changes,
    check_half_sums,
    choice_from,
    choose,
    chooses,
    forced,
    key_of,
    problems_of,
    recall,
    remember,
    require_graphs,
    settings_of,
)
from mnclglf.training.describe import describe_limits, write_run_files
from mnclglf.training.graphs import USED, problem_of_replays, ruled_out
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.health import effective_rank, feature_std, neighbor_agreement
from mnclglf.training.plans import prove_plans
from mnclglf.training.progress import RunLog, duration
from mnclglf.training.schedule import Schedule
from mnclglf.training.speedups import Forward, or_eager, share_casts
from mnclglf.training.start import (
    Compile,
    changed_images,
    describe_backends,
    name_of,
    saved_statistics,
    start_training,
)
from mnclglf.training.step import TrainStep
from mnclglf.training.stop import StopRequest
from mnclglf.training.timing import (
    WARM_UP_STEPS,
    Speed,
    StepClock,
    Waiting,
    forget_peak_memory,
    peak_memory_bytes,
    speed_of,
)

FEW_OVERFLOWS, MOST_OVERFLOWS = 3, 0.01  # steps, and the share of steps beyond them, that may overflow in fp16
DECIDED = ("cuda_graphs", "choices")  # entries of environment.json about the compiled step


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what can be done."""


class Trainer:
    """One pre-training run: everything it needs, made and checked before any work is done.

    Args:
        config: the run.
        out: run directory; made if missing.
        resume: "auto" resumes from the newest checkpoint in `out`; "never" raises if `out` holds a run; a path names
            the checkpoint to resume from.
        console: console for progress.
    """

    def __init__(self, config: RunConfig, out: Path, *, resume: str = "auto", console: Console | None = None) -> None:
        self.out = out
        self.console = console or LastingConsole()
        self.checkpoints = out / "checkpoints"
        check_writable(self.checkpoints, "give another --out")
        if self.checkpoints.is_dir():
            with training_in(out):  # raises now if another process holds it; `train` takes it for the whole training
                pass
        self.found = list_checkpoints(self.checkpoints)[-1:]
        # Read first, so that a damaged checkpoint is reported before a minute of work.
        checkpoint = find_checkpoint(out, resume)
        saved = None if checkpoint is None else load_checkpoint(checkpoint)

        self.started = start_training(
            config,
            self.console,
            resumed=saved is not None,
            loader=None if saved is None else saved.get("loader"),
            statistics=None
            if checkpoint is None or saved is None
            else saved_statistics(checkpoint.resolve().parents[1], saved),
        )
        self.config = self.started.config
        self.device = self.started.machine.device
        self.dtype = self.started.machine.dtype
        self.images = self.started.data.train
        self.side = self.started.data.side
        self.method = self.started.method
        self.loader = self.started.loader
        self.compile = self.started.compile
        self.labels = torch.from_numpy(self.images.labels).to(self.device)
        self.fingerprint = self.images.fingerprint()
        others = {"validation": self.started.data.validation, "test": self.started.data.test}
        self.other_fingerprints = {name: images.fingerprint() for name, images in others.items() if images is not None}
        self.schedule = Schedule.of(self.config, self.loader.steps_per_epoch)
        self.step = TrainStep(
            self.method, self.config.optim, self.config.engine, self.dtype, compile=self.compile, labels=self.labels
        )
        if self.compile != "off":
            self.step.forward = self._or_eager(self.step.forward)
        if self.compile == "graphs" and self.config.engine.channels_last:
            images = self.method.views * self.config.optim.batch_size
            self.loader.into = self.step.fix_input((images, 3, self.side, self.side))
        self.here = Here.of(self.step, self.config.engine)
        check_half_sums(self.here)
        self.origin = None if checkpoint is None else checkpoint.resolve().parents[1]  # the run that is resumed
        self.choice: Choice | None = None  # of the parts of a compiled step
        self.before: dict[str, Any] = {}  # what was decided there of the compiled step, as DECIDED names it
        self.milestones: set[int] = set()  # steps of checkpoints that are there, and are never deleted
        self.least_seconds: float | None = None  # the roofline step time, once it is known
        self.start = 0 if checkpoint is None or saved is None else self._restore(checkpoint, saved)

    def train(self) -> int | None:
        """Trains to the end, or to SIGINT, SIGTERM or SIGHUP; a checkpoint holds the state either way.

        Outside the main thread no signal is caught.

        Returns:
            The signal's number; None at the end.

        Raises:
            TrainingError: a loss, gradient or embedding was not finite.
            CheckpointError: a checkpoint could not be written, or another process has trained here since the start.
            TakenError: another process is training in the run directory.
        """
        with training_in(self.out):
            newest = list_checkpoints(self.checkpoints)[-1:]
            if newest != self.found:
                raise CheckpointError(
                    f"{self.out} was trained by another process meanwhile, and now ends with "
                    f"{newest[0][1].name if newest else 'no checkpoint'}; give the same command again to resume there"
                )
            return self._train()

    def _train(self) -> int | None:
        """Trains while this process holds the run directory."""
        self._open()
        total = self.schedule.total_steps
        began = time.perf_counter()
        waiting, clock = Waiting(), StepClock(self.device)
        stopped: int | None = None
        with StopRequest() as stop, RunLog(self.out, start=self.start, total=total, console=self.console) as log:
            for step, batch, wait in waiting.timed(self.loader, self.start, total):
                # Rates are closed forms of the step, so that a resumed run needs no schedule state.
                lr, momentum = self.schedule.lr(step), self.schedule.ema_momentum(step)
                if step == self.start:
                    self._settle(batch)
                losses, gradient_norm = self.step(step, batch, lr=lr, momentum=momentum)
                clock.stop(wait)  # an event on the stream; nothing waits here
                done = step + 1
                log.advance(done)

                # The first step compiles. Wait for it once, so that a failure shows now and its time is reported.
                if done == self.start + 1 and self.compile != "off":
                    self._check()
                    self._say(f"compiled in {time.perf_counter() - began:.0f} s")

                # The first step after the warm-up takes as long as all later ones will.
                if done == self.start + WARM_UP_STEPS + 1:
                    self._check()
                    self._say(f"estimated time: {duration(clock.times()[-1] * (total - self.start))}")
                    forget_peak_memory(self.device)
                    clock.restart()

                # Log: every figure is read from the device, so a step that logs waits for it. Others do not.
                if done % self.config.engine.log_every == 0 or done == total:
                    self._check()
                    self._watch_overflows(done, batch)
                    log.write(self._record(done, losses, gradient_norm, batch) | self._speed(clock))
                    clock.restart()

                # Checkpoint: check first, so that only a finite state is saved.
                stopped = stop.signal  # read once: a signal may come at any moment
                if self._save_due(done) or stopped:
                    self._check()
                    self._save(done)
                    clock.restart()

                # Stop: after the checkpoint, so that the same command resumes from here.
                if stopped:
                    break
        if waiting.first:
            self._say(waiting.summary())
        self._say_speed(clock)
        if stopped:
            return stopped
        if not checkpoint_path(self.checkpoints, total).exists():  # resumed at its end from another directory
            self._save(total)
        return None

    def _open(self) -> None:
        """Writes the run's files and prints the decisions of the start, before the first step."""
        for left_over in self.checkpoints.glob(".step-*.tmp"):  # from a process that was killed while it saved
            left_over.unlink()
        record_milestones(self.checkpoints, self.milestones)
        if self.origin is not None:
            with suppress(ValueError):  # damaged: it is written again
                found = read_object(self.origin / "environment.json") or {}
                self.before = {name: found[name] for name in DECIDED if name in found}
        write_run_files(self.started, self.out, self.before)
        self._say(self.started.describe())
        if self.compile != "graphs":
            reason = ruled_out(self.config.engine, self.device) or "torch.compile cannot run here"
            self._decide_graphs(f"not used, {reason}")
        total = self.schedule.total_steps
        if self.start:
            self._say(f"resuming after step {self.start} of {total}")
        if self.start < total:
            with torch.random.fork_rng():  # the estimates do not change the run's random numbers
                self.least_seconds = describe_limits(self.config, self.side, self.started.machine, self._say)
            if self.compile != "off":
                self._say("compiling the forward, which takes minutes ...")

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> int:
        """Restores the state of a checkpoint; returns the number of steps behind it."""
        later = [path for step, path in list_checkpoints(self.checkpoints) if step > state["step"]]
        if later:
            raise CheckpointError(
                f"{self.out} holds {later[-1].name}, which is later than {checkpoint}; give another --out, or move the "
                "later checkpoints away"
            )
        changed = changed_settings(checkpoint, state, self.config)
        if changed:
            raise CheckpointError(
                f"{checkpoint} was trained with other settings ({'; '.join(changed)}); give the same ones, or start "
                "anew in another --out"
            )
        changed = changed_images(self.started.data, state)
        moved = json.loads(state["config"])["dataset"] != self.config.dataset  # then it must be the same folder
        if "train" in changed or (changed and moved):
            raise CheckpointError(
                f"{checkpoint} was trained on other images than {self.images.name} now holds (other "
                f"{' and '.join(changed)} images; {len(self.images)} to train on); put the old ones back, or start "
                "anew in another --out"
            )
        # A run of an earlier version has no record of its milestones; its settings say what was promised to be kept.
        every = {self.config.engine.keep_every}
        if read_milestones(self.checkpoints) is None:
            every.add(from_dict(json.loads(state["config"])).engine.keep_every)
        self.milestones = {
            step for step, _ in list_checkpoints(self.checkpoints) if any(self._is_milestone(step, n) for n in every)
        }
        self.method.load_state_dict(state["method"])
        self.step.load_state_dict(state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return state["step"]

    def _save_due(self, done: int) -> bool:
        """Returns whether a checkpoint or a milestone is due after `done` steps."""
        config = self.config.engine
        regular = done % max(1, round(config.save_every * self.schedule.steps_per_epoch)) == 0
        return regular or self._is_milestone(done, config.keep_every) or done == self.schedule.total_steps

    def _is_milestone(self, done: int, keep_every: int | None) -> bool:
        """Returns whether the checkpoint after `done` steps is never deleted."""
        return keep_every is not None and done % (keep_every * self.schedule.steps_per_epoch) == 0

    def _save(self, done: int) -> None:
        """Writes the checkpoint after `done` steps, then deletes the old ones that are no milestones."""
        cuda = self.device.type == "cuda"
        method = self.method.state_dict()
        # The guard keeps non-finite steps out of the state. This catches what it does not see, as running statistics.
        broken = [name for name, value in method.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise TrainingError(
                f"after step {done} {', '.join(broken[:3])} hold values that are not finite; not saved: the last "
                f"checkpoint in {self.checkpoints} is. Lower --lr, in another --out"
            )
        state = {
            "config": json.dumps(to_dict(self.config)),
            "method": method,
            **self.step.state_dict(),
            "images": self.fingerprint,
            "other_images": self.other_fingerprints,
            "loader": self.loader.name,
            "mean": torch.from_numpy(self.loader.mean),
            "std": torch.from_numpy(self.loader.std),
            "side": self.side,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        if self._is_milestone(done, self.config.engine.keep_every):
            record_milestones(self.checkpoints, [done])  # first: a kill between the two must not lose it
        save_checkpoint(self.checkpoints, done, state)
        delete_old_checkpoints(self.checkpoints, keep_last=self.config.engine.keep_last)

    def _check(self) -> None:
        """Waits for the device; raises TrainingError if a step since the last check was not finite."""
        try:
            self.step.guard.raise_if_failed()
        except NonFiniteError as error:
            batch = batch_indices(self.config.seed, error.step, len(self.images), self.config.optim.batch_size)
            names, path = self.images.names(batch), self.out / "nonfinite.json"
            write_json(path, {"step": error.step + 1, "terms": error.terms, "images": names})
            shown = ", ".join(map(str, names[:8]))
            raise TrainingError(
                f"step {error.step + 1}: {', '.join(error.terms)} not finite; the batch holds the data set's images "
                f"{shown}, ... (all {len(names)} in {path}). Nothing of it was kept: checkpoints end before this step. "
                "Look at these images, or lower --lr or raise --temperature, in another --out"
            ) from error

    def _watch_overflows(self, done: int, batch: Batch) -> None:
        """Ends the use of fp16 in forwards without gradient if many steps have overflowed, and says so."""
        if not self.method.encoder.half_sums:
            return
        overflows, steps = int(self.step.overflows.item()), done - self.start
        if overflows <= FEW_OVERFLOWS + steps * MOST_OVERFLOWS:
            return
        self._say(
            f"{overflows} of {steps} steps overflowed in fp16 and were skipped; forwards without gradient go on in "
            f"{name_of(self.dtype)}, by PyTorch's convolutions"
        )
        self.method.fuse("torch")
        if self.compile == "off":
            self.step.forward = share_casts(self.method, self.dtype)
        else:
            torch.compiler.reset()
            self.step.forward = self._or_eager(self.step.forward_of(self.compile))
        if self.choice is not None:
            self.choice = replace(self.choice, parts={**self.choice.parts, "convolution": "torch"})
            self._note(choices=self.choice.to_dict())
        if self.compile == "graphs":
            self._prove_graphs(batch)

    def _record(self, done: int, losses: Losses, gradient_norm: Tensor, batch: Batch) -> dict[str, Any]:
        """Returns the figures of the step just done, as plain numbers; each waits for the device."""
        agreement = None
        if losses.neighbors is not None and self.images.labeled:
            agreement = neighbor_agreement(losses.neighbors, batch.indices, self.labels)
        return {
            "step": done,
            "epoch": done / self.schedule.steps_per_epoch,
            "loss": losses.total.item(),
            **{name: term.item() for name, term in losses.terms.items()},
            "lr": self.schedule.lr(done - 1),
            "ema_momentum": self.schedule.ema_momentum(done - 1),
            "gradient_norm": gradient_norm.item(),
            "feature_std": feature_std(losses.features),
            "effective_rank": effective_rank(losses.features),
            "neighbor_agreement": agreement,
            "queue_fill": self.method.queue_fill(),
            **({"overflows": int(self.step.overflows.item())} if self.method.encoder.half_sums else {}),
        }

    def _speed(self, clock: StepClock) -> dict[str, Any]:
        """Returns the speed since the last record (None during the warm-up), memory and the wait for data."""
        waited, seconds = clock.take()
        speed = speed_of(seconds, self.config.optim.batch_size)
        figures = (
            dict.fromkeys(Speed._fields) if speed is None else {k: round(v, 6) for k, v in speed._asdict().items()}
        )
        least = self.least_seconds
        return {
            **figures,
            "data_wait_seconds": round(waited, 4),
            "roofline_fraction": None if speed is None or least is None else round(least / speed.step_seconds, 4),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _say_speed(self, clock: StepClock) -> None:
        """Prints throughput and the percentage of the roofline over all steps after the warm-up."""
        speed = speed_of(clock.all, self.config.optim.batch_size)
        if speed is None:
            return
        text = (
            f"throughput: {speed.images_per_second:,.0f} images/s (slowest tenth of the steps "
            f"{speed.images_per_second_p10:,.0f}, fastest {speed.images_per_second_p90:,.0f}), "
            f"{speed.step_seconds:.3f} s per step, without the warm-up"
        )
        if self.least_seconds is not None:
            text += f"; {self.least_seconds / speed.step_seconds:.0%} of the roofline"
        whose = "" if self.device.type == "cuda" else " of the whole process"
        self._say(f"{text}; peak memory{whose} {peak_memory_bytes(self.device) / 2**30:.1f} GiB")

    def _settle(self, batch: Batch) -> None:
        """Proves what the step will use, and decides its parts on a GPU, by the first batch; changes no state.

        Raises:
            RuntimeError: --graphs on was given, and replays are not the compiled step.
        """
        if chooses(self.device) and self.compile != "off":
            self._choose(batch)
            return
        self._prove_plans(batch, [])
        if self.compile == "graphs":
            self._prove_graphs(batch)

    def _prove_plans(self, batch: Batch, settings: Iterable[Mapping[str, str]]) -> None:
        """Compares the plans of cuDNN that settings of the step may use with PyTorch; wrong ones are left out."""
        fused, online = any(x["convolution"] == "cudnn" for x in settings), self.config.engine.half_sums_online
        if fused or online != "off":
            prove_plans(self.method, batch.views, without_gradient=fused, online=online, say=self._say)

    def _choose(self, batch: Batch) -> None:
        """Takes a decision about the parts that is known, or makes one."""
        could_replay, key = self.compile == "graphs", key_of(self.config, self.here, self.side, self.dtype)
        before = choice_from(self.before.get("choices"))
        choice = forced(self.config.engine.choices, self.here)
        if choice is None and before is not None and not problems_of(before.parts, self.here):
            choice = replace(before, source="as before it was resumed")
        known = choice = choice or recall(key, self.here)
        self._prove_plans(batch, settings_of(self.here).values() if choice is None else [choice.parts])
        if choice is not None:
            apply(self.step, choice.parts)
            self.step.forward = self.step.forward_of(self.step.compile)
        else:
            self._say("compiling the step in two settings and timing both, once on this machine ...")
            choice = choose(self.step, batch, self.here, self._rates(), say=self._say)
            remember(key, choice)
        self.compile = cast(Compile, self.step.compile)
        if self.compile != "off":
            self.step.forward = self._or_eager(self.step.forward)
        self.choice = choice
        self._say("\n".join(choice.lines(self.here)))
        if before is not None and (changed := changes(before.parts, choice.parts)):
            self._say(f"choices before it was resumed: {changed}")
        self._note(choices=choice.to_dict(), kernels=describe_backends(self.method.backends))
        if self.compile == "graphs" and (known is not None or not choice.measured):  # else they are proved
            self._prove_graphs(batch)
        elif could_replay:
            self._decide_graphs(
                USED if self.compile == "graphs" else f"not used, {choice.taken} was taken: {choice.why}"
            )

    def _rates(self) -> dict[str, float]:
        """Returns learning rate and momentum of steps that are tried out."""
        return {"lr": self.config.optim.lr, "momentum": self.config.objective.ema_momentum}

    def _prove_graphs(self, batch: Batch) -> None:
        """Keeps CUDA graphs if replays of the first batch are bit-equal to the compiled step; changes no state."""
        problem = problem_of_replays(self.step, batch, **self._rates())
        if self.compile == "off":  # it turned out as the first step compiled
            self._decide_graphs("not used, torch.compile failed")
        elif problem is None:
            self._decide_graphs(USED)
        else:
            require_graphs(self.config.engine, problem)
            self._decide_graphs(f"not used, {problem}")
            self._say("compiling the forward again, without them ...")
            torch.compiler.reset()  # gives the memory of the graphs back
            self.compile = "on"
            self.step.forward = self._or_eager(self.step.forward_of("on"))

    def _decide_graphs(self, decision: str) -> None:
        """Prints what was decided about CUDA graphs, and what it was before a resume, and notes it with the run."""
        before = self.before.get("cuda_graphs")
        changed = "" if before in (None, decision) else f"; before it was resumed: {before}"
        self._say(f"CUDA graphs: {decision}{changed}")
        self._note(cuda_graphs=decision)

    def _note(self, **decided: Any) -> None:
        """Writes what was decided into environment.json."""
        path = self.out / "environment.json"
        write_json(path, {**(read_object(path) or {}), **decided})

    def _or_eager(self, forward: Forward) -> Forward:
        """Returns a forward that goes on eagerly if it cannot be compiled: that makes the run slower, not end."""
        eager = cache(lambda: share_casts(self.method, self.dtype))  # made when _stay_eager has set the method
        return or_eager(forward, lambda views, labels=None: eager()(views, labels), self._stay_eager)

    def _stay_eager(self, why: str) -> None:
        self.compile = self.step.compile = "off"
        self.method.backends = self.here.backends  # which an eager step is faster with
        self.method.fuse("torch")
        self._say(why)

    def _say(self, text: str) -> None:
        say(self.console, text)
