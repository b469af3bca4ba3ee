"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from torch import Tensor

from mnclglf.config import RunConfig, from_dict, require, to_dict
from mnclglf.data.loader import Batch, batch_indices
from mnclglf.data.loaders.resident import ResidentLoader
from mnclglf.methods import Losses
from mnclglf.models.encoder import Encoder
from mnclglf.runs.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    changed_settings,
    checkpoint_path,
    delete_old_checkpoints,
    list_checkpoints,
    load_method,
    read_milestones,
    record_milestones,
)
from mnclglf.runs.console import LastingConsole, say
from mnclglf.runs.files import clear_left_over, read_object, write_json
from mnclglf.runs.locks import training_in
from mnclglf.runs.loggers import Loggers, open_loggers
from mnclglf.training.choices import (
    Choice,
    Here,
    apply,
    changes,
    check_graphs,
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
from mnclglf.training.describe import describe_limits, views_of, write_run_files
from mnclglf.training.deterministic import cost_of
from mnclglf.training.extension import check_finished, describe_extension
from mnclglf.training.graphs import USED, problem_of_replays, ruled_out
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.health import effective_rank, feature_std, neighbor_agreement
from mnclglf.training.out_of_memory import advice, available_bytes, is_out_of_memory
from mnclglf.training.plans import prove_plans
from mnclglf.training.progress import RunLog, duration
from mnclglf.training.pulse import describe_loss, is_of_messages
from mnclglf.training.queue_pictures import QueuePictures
from mnclglf.training.ranks import ALONE, RankError, Ranks
from mnclglf.training.resuming import find_run
from mnclglf.training.schedule import Schedule
from mnclglf.training.speedups import Forward, or_eager, share_casts
from mnclglf.training.start import (
    Compile,
    Start,
    changed_images,
    describe_backends,
    name_of,
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
from mnclglf.training.unread import unread_settings
from mnclglf.training.whole_step import USED_WHOLE, problem_of_whole_step
from mnclglf_kernels.ranks import gather_together

FEW_OVERFLOWS, MOST_OVERFLOWS = 3, 0.01  # steps, and the share of steps beyond them, that may overflow in fp16
COLLAPSED = 0.01  # feature_std below which an encoder gives all images the same features
# Entries of environment.json that a resumed run keeps until it decides them anew.
DECIDED = ("cuda_graphs", "choices", "initial_weights")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what can be done."""


class Monitor(Protocol):
    """Evaluates the encoder during training, without changing it; evaluation/monitor.py has it."""

    description: str
    evaluations: int
    seconds: float

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Returns figures for metrics.jsonl, knn_top1 and knn_seconds among them."""
        ...


class Trainer:
    """One pre-training run: everything it needs, made and checked before any work is done.

    Args:
        config: the run.
        out: run directory; made if missing.
        resume: "auto" resumes from the newest checkpoint in `out`; "never" raises if `out` holds a run; a path names
            the checkpoint to resume from.
        extend: whether a finished run may go on to more epochs; see training/extension.py.
        console: console for progress.
        monitor: makes what evaluates the encoder during training (evaluation/monitor.py); needed for --knn-every.
        ranks: the place of this process among those of the run, which it has joined (ranks.py). Rank 0 alone reads and
            writes `out`, and prints.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        resume: str = "auto",
        extend: bool = False,
        console: Console | None = None,
        monitor: Callable[[Start], Monitor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.out = out
        self.console = console or LastingConsole()
        if not ranks.writes:
            self.console.quiet = True
        self.checkpoints = out / "checkpoints"
        self.writer = CheckpointWriter()
        self.found = find_run(out, config, resume, extend=extend, ranks=ranks)
        checkpoint, saved = self.found.checkpoint, self.found.state

        self.started = start_training(
            self.found.config,
            self.console,
            resumed=saved is not None,
            loader=None if saved is None else saved.get("loader"),
            statistics=self.found.statistics,
            ranks=ranks,
        )
        self.config = self.started.config
        self.monitor: Monitor | None = None
        if self.config.engine.knn_every is not None:
            require(monitor is not None, "knn_every needs the argument monitor=KnnMonitor of Trainer")
            assert monitor is not None
            self.monitor = monitor(self.started)
        self.device = self.started.machine.device
        self.dtype = self.started.machine.dtype
        self.images = self.started.data.train
        self.side = self.started.data.side
        self.method = self.started.method
        self.loader = self.started.loader
        self.compile = self.started.compile
        self.labels = torch.from_numpy(self.images.labels).to(self.device)
        self.fingerprint = self.images.fingerprint()
        ranks.wait_for_all()
        ranks.require_equal("loader", self.loader.name, "name one as --loader")
        # Kernels and a compiled step order their messages as eager ones need not.
        how = f"compile {self.compile}, operators {describe_backends(self.method.backends)}"
        ranks.require_equal("way to compute a step", how, "give --compile off and --kernels off, or mend that rank")
        ranks.require_equal("set of training images", self.fingerprint, "give every rank the same images (--data-dir)")
        others = {"validation": self.started.data.validation, "test": self.started.data.test}
        self.other_fingerprints = {name: images.fingerprint() for name, images in others.items() if images is not None}
        self.schedule = Schedule.of(self.config, self.loader.steps_per_epoch)
        self.step = TrainStep(
            self.method, self.config.optim, self.config.engine, self.dtype, compile=self.compile, labels=self.labels
        )
        if self.compile != "off":
            self.step.forward = self._or_eager(self.step.forward)
        if self.compile == "graphs" and self.config.engine.channels_last:
            images = self.method.views * ranks.share(self.config.optim.batch_size)
            self.loader.into = self.step.fix_input((images, 3, self.side, self.side))
        if isinstance(self.loader, ResidentLoader):
            self.step.augment = self.loader.views_of
        self.here = Here.of(self.step, self.config.engine)
        check_half_sums(self.here)
        check_graphs(self.here)
        self.origin = None if checkpoint is None else checkpoint.resolve().parents[1]  # the run that is resumed
        self.choice: Choice | None = None  # of the parts of a compiled step
        self.before: dict[str, Any] = {}  # what was decided there, as DECIDED names it
        self.milestones: set[int] = set()  # steps of checkpoints that are there, and are never deleted
        self.collapsed = False  # whether it was said that the encoder has collapsed
        self.least_seconds: float | None = None  # the roofline step time, once it is known
        self.start = 0 if checkpoint is None or saved is None else self._restore(checkpoint, saved)

    def train(self) -> int | None:
        """Trains to the end, or to SIGINT, SIGTERM, SIGHUP or SIGUSR1; a checkpoint holds the state either way.

        Outside the main thread no signal is caught.

        Returns:
            The signal's number; None at the end.

        Raises:
            TrainingError: a loss, gradient or embedding was not finite.
            CheckpointError: a checkpoint could not be written, or another process has trained here since the start.
            TakenError: another process is training in the run directory.
            RankError: another rank of the run ended, or does not answer.
        """
        with training_in(self.out) if self.ranks.writes else nullcontext():
            newest = list_checkpoints(self.checkpoints)[-1:]
            if self.ranks.writes and newest != self.found.newest:
                raise CheckpointError(
                    f"{self.out} was trained by another process meanwhile, and now ends with "
                    f"{newest[0][1].name if newest else 'no checkpoint'}; give the same command again to resume there"
                )
            try:
                return self._train()
            except RuntimeError as error:
                if self.ranks.count > 1 and is_of_messages(error):
                    raise RankError(describe_loss(self.ranks.count, error)) from error
                if not is_out_of_memory(error):
                    raise
                available = available_bytes(self.device)
                peak = peak_memory_bytes(self.device) if self.device.type == "cuda" else 0
                text = advice(self.started.own, self.side, self.started.machine, available, peak=peak)
                raise TrainingError(f"{text}. {self._resumable()}") from error

    def _resumable(self) -> str:
        """Returns what is kept of a run that stopped."""
        found = list_checkpoints(self.checkpoints)
        if not found:
            return f"No checkpoint is in {self.checkpoints} yet"
        return f"{found[-1][1]} is whole: a run with the same batch, and switches that save memory, resumes from there"

    def _train(self) -> int | None:
        """Trains while this process holds the run directory."""
        self._open()
        total = self.schedule.total_steps
        began = time.perf_counter()
        waiting, clock = Waiting(), StepClock(self.device)
        self.step.mark = clock.mark
        pictures = QueuePictures(self.out / "queue.npz", self.images, self.start, total) if self.ranks.writes else None
        stopped: int | None = None
        log: RunLog | None = None
        if self.ranks.writes:
            log = RunLog(self.out, start=self.start, total=total, console=self.console, loggers=self._open_loggers())
        with StopRequest() as stop, log or nullcontext(), self.writer:
            for step, batch, wait in waiting.timed(self.loader, self.start, total):
                # Rates are closed forms of the step, so that a resumed run needs no schedule state.
                lr, momentum = self.schedule.lr(step), self.schedule.ema_momentum(step)
                if step == self.start:
                    self._settle(batch)
                    self.loader.deferred = self.step.recorded is not None
                if self.step.message is not None:
                    self.step.message.ask(stop.signal)
                losses, gradient_norm = self.step(step, batch, lr=lr, momentum=momentum)
                clock.stop(wait)  # an event on the stream; nothing waits here
                done = step + 1
                if log is not None:
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
                if done % self.config.engine.log_every == 0 or done == total or self._knn_due(done):
                    self._check()
                    self._watch_overflows(done, batch)
                    losses, batch = self._of_all_ranks(losses, batch)
                    record = self._record(done, losses, gradient_norm, batch) | self._speed(clock)
                    self._watch_features(done, record["feature_std"])
                    record |= self._evaluate(done, time.perf_counter() - began)
                    if pictures is not None and losses.neighbors is not None and pictures.is_due(done):
                        keep = partial(pictures.keep, done, batch.indices, losses.neighbors)
                        self._try_to_write(pictures.path, keep)
                    if log is not None:
                        log.write(record)
                    clock.restart()
                elif done % self.schedule.steps_per_epoch == 0:
                    self._watch_features(done, feature_std(losses.features))

                # One that could not be written ends the training at the next step.
                self.writer.check()

                # Checkpoint: check first, so that only a finite state is saved.
                # Read once, as a signal may come at any moment; ranks stop after the same step.
                stopped = stop.signal if self.step.message is None else self.step.message.signal()
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
        self._say_monitor(time.perf_counter() - began)
        if stopped:
            return stopped
        # Resumed at its end from another directory.
        if self.ranks.writes and not checkpoint_path(self.checkpoints, total).exists():
            with self.writer:
                self._save(total)
        return None

    def _of_all_ranks(self, losses: Losses, batch: Batch) -> tuple[Losses, Batch]:
        """Returns the losses with features and neighbors of the whole batch, and the batch with its indices."""
        if self.ranks.count == 1:
            return losses, batch
        own = [losses.features, batch.indices, *([] if losses.neighbors is None else [losses.neighbors])]
        features, indices, *neighbors = gather_together(*own)
        whole = losses._replace(features=features, neighbors=neighbors[0] if neighbors else None)
        return whole, batch._replace(indices=indices)

    def _open(self) -> None:
        """Writes the run's files and prints the decisions of the start, before the first step."""
        if self.ranks.writes:
            self._open_directory()
        for line in (self.started.describe(), *self.started.describe_ranks(), *self.started.describe_encoder()):
            self._say(line)
        if self.compile != "graphs":
            reason = ruled_out(self.config.engine, self.device, self.ranks.count) or "torch.compile cannot run here"
            self._decide_graphs(f"not used, {reason}")
        total = self.schedule.total_steps
        if self.start:
            done = "; nothing is left to train, --extend --epochs N goes on" if self.start >= total else ""
            self._say(f"resuming after step {self.start} of {total}{done}")
        if self.config.optim.extended_from:
            self._say(describe_extension(self.config, self.schedule))
        if self.start < total:
            with torch.random.fork_rng():  # the estimates do not change the run's random numbers
                limits = describe_limits(self.started.own, self.side, self.started.machine, self._say)
            if limits is not None:
                self.least_seconds = sum(limits.values())
                self._note(roofline_seconds=limits)
            if self.compile != "off":
                self._say("compiling the forward, which takes minutes ...")

    def _open_directory(self) -> None:
        """Writes the run's files, with the decisions of the run that is resumed."""
        for folder in (self.out, self.checkpoints):
            clear_left_over(folder)
        for damaged, problem in self.found.damaged.items():
            aside = damaged.replace(damaged.with_name(f"{damaged.name}.damaged"))
            self._say(f"{damaged} is damaged ({problem}); it is {aside.name} now, and an earlier checkpoint serves")
        record_milestones(self.checkpoints, self.milestones)
        delete_old_checkpoints(self.checkpoints, keep_last=self.config.engine.keep_last)  # a kill may have come between
        if self.origin is not None:
            with suppress(ValueError):  # damaged: it is written again
                found = read_object(self.origin / "environment.json") or {}
                self.before = {name: found[name] for name in DECIDED if name in found}
        write_run_files(self.started, self.out, self.before)
        if self.monitor is not None:
            self._note(knn_every=self.monitor.description)

    def _open_loggers(self) -> Loggers:
        """Opens the loggers; a run that begins anew shows its views."""
        names, say = self.config.engine.loggers, self._say
        loggers = open_loggers(names, self.out, self.config, start=self.start, say=say)
        if self.start == 0:
            loggers.images(0, "views", views_of(self.out))
        return loggers

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> int:
        """Restores the state of a checkpoint; returns the number of steps behind it."""
        later = [
            path
            for step, path in list_checkpoints(self.checkpoints)
            if step > state["step"] and path not in self.found.damaged
        ]
        if later:
            raise CheckpointError(
                f"{self.out} holds {later[-1].name}, which is later than {checkpoint}; give another --out, or move the "
                "later checkpoints away"
            )
        changed = changed_settings(checkpoint, state, self.config)
        if changed:
            longer = ", give --extend to let a finished run go on" if changed[0].startswith("optim.epochs") else ""
            raise CheckpointError(
                f"{checkpoint} was trained with other settings ({'; '.join(changed)}); give the same ones{longer}, or "
                "start anew in another --out"
            )
        check_finished(self.config, checkpoint, state, self.schedule.steps_per_epoch)
        changed = changed_images(self.started.data, state)
        before = json.loads(state["config"])["dataset"]
        moved = before != to_dict(self.config)["dataset"]  # then it must be the same folder
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
        load_method(self.method, state, checkpoint)
        try:
            self.step.load_state_dict(state)
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint} holds a state of the optimizer or of random numbers that does not fit this run "
                f"({error}); give another checkpoint"
            ) from error
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
        """Begins to write the checkpoint after `done` steps, then to delete the old ones that are no milestones."""
        cuda = self.device.type == "cuda"
        method = self.method.state_dict()
        # The guard keeps non-finite steps out of the state. This catches what it does not see, as running statistics.
        # A sum of finite values may overflow, and one with others is never finite: it takes a tenth of the time.
        floats = {name: value for name, value in method.items() if value.is_floating_point()}
        sums = torch.stack([value.sum(dtype=torch.float32) for value in floats.values()])
        broken = [] if sums.isfinite().all() else [name for name, x in floats.items() if not x.isfinite().all()]
        if broken:
            raise TrainingError(
                f"after step {done} {', '.join(broken[:3])} hold values that are not finite; not saved: the last "
                f"checkpoint in {self.checkpoints} is. Lower --lr, in another --out"
            )
        if not self.ranks.writes:
            return
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
        self.writer.write(self.checkpoints, done, state, keep_last=self.config.engine.keep_last)

    def _check(self) -> None:
        """Waits for the device; raises TrainingError if a step since the last check was not finite."""
        try:
            self.step.guard.raise_if_failed()
        except NonFiniteError as error:
            count, size = len(self.images), self.config.optim.batch_size
            batch = batch_indices(self.config.seed, error.step, count, size, self.config.data.shuffle_block)
            names, path = self.images.names(batch), self.out / "nonfinite.json"
            if self.ranks.writes:
                found = {"step": error.step + 1, "terms": error.terms, "images": names}
                self._try_to_write(path, lambda: write_json(path, found))
            shown = ", ".join(map(str, names[:8]))
            warmer = "" if unread_settings(self.config, {"temperature"}) else " or raise --temperature"
            raise TrainingError(
                f"step {error.step + 1}: {', '.join(error.terms)} not finite; the batch holds the data set's images "
                f"{shown}, ... (all {len(names)} in {path}). Nothing of it was kept: checkpoints end before this step. "
                f"Look at these images, or lower --lr{warmer}, in another --out"
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
        if self.step.recorded is not None and self.step.augment is not None and batch.parameters is not None:
            self.step.recorded = None
            batch = batch._replace(views=self.step.augment(batch.indices, batch.parameters))
        self.method.fuse("torch")
        if self.compile == "off":
            self.step.forward = share_casts(self.method, self.dtype)
        else:
            torch.compiler.reset()
            self.step.forward = self._or_eager(self.step.forward_of(self.compile))
        if self.choice is not None:
            self.choice = replace(self.choice, parts={**self.choice.parts, "convolution": "torch"})
            self._note(choices=self.choice.to_dict())
        if self.compile in ("graphs", "step"):
            self._prove_graphs(batch)
        self.loader.deferred = self.step.recorded is not None

    def _watch_features(self, done: int, spread: float) -> None:
        """Says once that the encoder has collapsed, by the `feature_std` of a step; looked at in every epoch."""
        if self.collapsed or not spread < COLLAPSED:  # NaN of a batch of one image
            return
        self.collapsed = True
        self._say(
            f"step {done}: the encoder has collapsed: all images get the same features (feature_std {spread:.4f}; runs "
            "that learn have 0.4 to 0.5). Mostly the learning rate is too high: lower --lr or raise --warmup-epochs in "
            "another --out. If it is not, see whether the images differ: mnclglf data inspect"
        )

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
            **{f"{phase}_seconds": round(seconds, 6) for phase, seconds in clock.take_phases().items()},
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

    def _knn_due(self, done: int) -> bool:
        """Returns whether the encoder is to be evaluated after `done` steps."""
        every = self.config.engine.knn_every
        return every is not None and (
            done % (every * self.schedule.steps_per_epoch) == 0 or done == self.schedule.total_steps
        )

    def _evaluate(self, done: int, elapsed: float) -> dict[str, float]:
        """Returns the figures of the monitor if it is due, and prints them with their cost; else none."""
        if self.monitor is None or not self._knn_due(done):
            return {}
        figures = self.monitor(self.method.encoder)
        seconds = figures["knn_seconds"]
        self._say(
            f"k-NN after epoch {done / self.schedule.steps_per_epoch:g}: top-1 {figures['knn_top1']:.1%} in "
            f"{seconds:.1f} s, {self.monitor.seconds / (elapsed + seconds):.1%} of the time so far"
        )
        return figures

    def _say_monitor(self, elapsed: float) -> None:
        """Prints what the evaluations during training cost."""
        if self.monitor is not None and self.monitor.evaluations:
            count, seconds = self.monitor.evaluations, self.monitor.seconds
            self._say(
                f"k-NN during training: {count} evaluation{'s' * (count != 1)}, {seconds / count:.1f} s each, "
                f"{seconds / elapsed:.1%} of the training time; leave out --knn-every, or raise it, to save that"
            )

    def _settle(self, batch: Batch) -> None:
        """Proves what the step will use, and decides its parts on a GPU, by the first batch; changes no state.

        Raises:
            RuntimeError: --graphs on or step was given, and replays are not the compiled step.
        """
        if self.config.engine.deterministic and self.ranks.count == 1:
            self._say(cost_of(self.step, batch, self._rates(), self.config.engine))
        if chooses(self.device) and self.compile != "off" and self.ranks.count == 1:
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
        used = {"graphs": USED, "step": USED_WHOLE}.get(self.compile)
        if used is not None and (known is not None or not choice.measured):  # else they are proved
            self._prove_graphs(batch)
        elif could_replay:
            self._decide_graphs(used or f"not used, {choice.taken} was taken: {choice.why}")

    def _rates(self) -> dict[str, float]:
        """Returns learning rate and momentum of steps that are tried out."""
        return {"lr": self.config.optim.lr, "momentum": self.config.objective.ema_momentum}

    def _prove_graphs(self, batch: Batch) -> None:
        """Keeps CUDA graphs if replays of the first batch are bit-equal to the compiled step; changes no state.

        Where those of the whole step are not, tries those of forward and backward.
        """
        whole = self.compile == "step"
        problem = (problem_of_whole_step if whole else problem_of_replays)(self.step, batch, **self._rates())
        # One rank's graphs would send their messages in another order than the others' launches.
        problems = [told.decode() for told in self.ranks.exchange((problem or "").encode()) if told]
        problem = problems[0] if problems else None
        if self.compile == "off":  # it turned out as the first step compiled
            self.step.recorded = None
            self._decide_graphs("not used, torch.compile failed")
        elif problem is None:
            self._decide_graphs(USED_WHOLE if whole else USED)
        else:
            require_graphs(self.config.engine, problem)
            self._decide_graphs(f"not used{' for the whole step' * whole}, {problem}")
            self._say("compiling the forward again, without them ...")
            torch.compiler.reset()  # gives the memory of the graphs back
            self.compile = self.step.compile = "graphs" if whole else "on"
            self.step.forward = self._or_eager(self.step.forward_of(self.compile))
            if whole:
                self._prove_graphs(batch)

    def _decide_graphs(self, decision: str) -> None:
        """Prints what was decided about CUDA graphs, and what it was before a resume, and notes it with the run."""
        before = self.before.get("cuda_graphs")
        changed = "" if before in (None, decision) else f"; before it was resumed: {before}"
        self._say(f"CUDA graphs: {decision}{changed}")
        self._note(cuda_graphs=decision)

    def _note(self, **decided: Any) -> None:
        """Writes what was decided into environment.json."""
        if not self.ranks.writes:
            return
        path = self.out / "environment.json"
        self._try_to_write(path, lambda: write_json(path, {**(read_object(path) or {}), **decided}))

    def _try_to_write(self, path: Path, write: Callable[[], object]) -> None:
        """Writes what a training can do without, and goes on with a warning if that fails."""
        try:
            write()
        except (OSError, ValueError) as error:
            self._say(f"{path} is not written, and the run goes on without: {error}")

    def _or_eager(self, forward: Forward) -> Forward:
        """Returns a forward that goes on eagerly if it cannot be compiled: that makes the run slower, not end.

        Over several ranks it raises TrainingError: a rank that went on eagerly alone might send its messages in another
        order.
        """
        eager = cache(lambda: share_casts(self.method, self.dtype))  # made when _stay_eager has set the method
        return or_eager(forward, lambda views, labels=None: eager()(views, labels), self._stay_eager)

    def _stay_eager(self, why: str) -> None:
        if self.ranks.count > 1:
            raise TrainingError(f"{why}; over several ranks none goes on without it alone, so give --compile off")
        self.compile = self.step.compile = "off"
        self.method.backends = self.here.backends  # which an eager step is faster with
        self.method.fuse("torch")
        self._say(f"{why}; the step stays eager")

    def _say(self, text: str) -> None:
        say(self.console, text)
