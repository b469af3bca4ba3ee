"""The training loop."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mnclglf.config import RunConfig, to_dict
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import Pixels, view_side
from mnclglf.data.loader import Batch, Loader, batch_indices
from mnclglf.data.loaders import make_loader
from mnclglf.data.splits import split_train
from mnclglf.data.views import whole_views
from mnclglf.methods import Losses
from mnclglf.runs.checkpoint import (
    CheckpointError,
    changed_settings,
    checkpoint_path,
    delete_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from mnclglf.runs.environment import describe_environment
from mnclglf.runs.files import write_atomically, write_json
from mnclglf.training.backends import choose_backends, describe_backends
from mnclglf.training.compiling import choose_compile, or_eager
from mnclglf.training.device import autocast_dtype, choose_device
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.health import effective_rank, feature_std, neighbor_agreement
from mnclglf.training.progress import RunLog, duration
from mnclglf.training.run_directory import build_method, check_queue, with_classes
from mnclglf.training.schedule import Schedule
from mnclglf.training.step import TrainStep, keep_freed_memory, share_casts, use_fast_math
from mnclglf.training.timing import (
    WARM_UP_STEPS,
    Speed,
    StepClock,
    Waiting,
    forget_peak_memory,
    peak_memory_bytes,
    speed_of,
)
from mnclglf_kernels.backend import HAS_TRITON

PICTURED_IMAGES = 6  # in the report
GPU_GIB = 24  # of an RTX 3090, for runs on a CPU


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what can be done."""


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered; a second signal ends the process as it always would."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self.earlier: dict[int, Any] = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._put_back()


class Trainer:
    """One pre-training run: everything it needs, made and checked before any work is done.

    Args:
        config: the run.
        out: run directory; made where it is missing.
        resume: "auto" goes on from the newest checkpoint of `out`, "never" refuses one, a path names another.
        console: where progress goes.
    """

    def __init__(self, config: RunConfig, out: Path, *, resume: str = "auto", console: Console | None = None) -> None:
        check_queue(config)
        self.out, self.console = out, console or Console()
        self.checkpoints = out / "checkpoints"
        self.device = choose_device(config.engine)
        checkpoint = find_checkpoint(out, resume)
        saved = None if checkpoint is None else load_checkpoint(checkpoint)
        self.dtype = autocast_dtype(config.engine, self.device)
        if self.device.type == "cuda":
            use_fast_math(config.engine, self.dtype)
        elif config.engine.keep_memory:
            keep_freed_memory()
        train_images, _ = load_dataset(
            config.dataset, config.data.data_dir, download=config.data.download, skip_corrupt=config.data.skip_corrupt
        )
        self.images, _ = split_train(train_images, config.data)
        self.config = config = with_classes(config, self.images)
        self.labels = torch.from_numpy(self.images.labels).to(self.device)
        self.fingerprint = self.images.fingerprint()
        self.side = view_side(self.images, config.data.image_size)
        self.method = build_method(config, self.dtype).to(self.device).train()
        source = int(max(sides.max() for sides in self.images.sizes(np.arange(len(self.images)))))
        self.method.backends = choose_backends(config, source, self.side, self.dtype, self.device, self.console)
        self.loader = self._make_loader(saved)
        self.schedule = Schedule.of(config, self.loader.steps_per_epoch)
        self.compile = choose_compile(config.engine, self.device, self._say)
        self.step = TrainStep(
            self.method, config.optim, config.engine, self.dtype, compile=self.compile, labels=self.labels
        )
        if self.compile != "off":
            self.step.forward = or_eager(self.step.forward, share_casts(self.method, self.dtype), self._stay_eager)
        self.least_seconds: float | None = None
        self.start = 0 if checkpoint is None or saved is None else self._restore(checkpoint, saved)

    def train(self) -> int | None:
        """Trains to the end, or to SIGINT or SIGTERM, whose number it gives; a checkpoint holds the state either way.

        Raises:
            TrainingError: a loss, gradient or embedding was not finite.
            CheckpointError: a checkpoint could not be written.
        """
        self._describe()
        total, began = self.schedule.total_steps, time.perf_counter()
        waiting, clock = Waiting(), StepClock(self.device)
        stopped: int | None = None
        with StopRequest() as stop, RunLog(self.out, start=self.start, total=total, console=self.console) as log:
            for step, batch, wait in waiting.timed(self.loader, self.start, total):
                lr, momentum = self.schedule.lr(step), self.schedule.ema_momentum(step)
                losses, gradient_norm = self.step(step, batch, lr=lr, momentum=momentum)
                clock.stop(wait)
                done = step + 1
                if done == self.start + 1 and self.compile != "off":
                    self._check()
                    self._say(f"compiled in {time.perf_counter() - began:.0f} s")
                if done == self.start + WARM_UP_STEPS + 1:
                    self._check()  # waits for the device, as every figure below does
                    self._say(f"estimated time: {duration(clock.times()[-1] * (total - self.start))}")
                    forget_peak_memory(self.device)
                    clock.restart()
                if done % self.config.engine.log_every == 0 or done == total:
                    self._check()
                    log.write(self._record(done, losses, gradient_norm, batch) | self._speed(clock))
                    clock.restart()
                stopped = stop.signal  # read once: a signal may come at any moment
                if self._save_due(done) or stopped:
                    self._check()
                    self._save(done)
                    clock.restart()
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

    def _make_loader(self, saved: dict[str, Any] | None) -> Loader:
        """The loader; a run that goes on with "auto" takes the one that it had, whose views are the same to the bit."""
        backend = self.config.data.loader
        if backend == "auto" and saved is not None:
            backend = saved.get("loader", backend)
        return make_loader(
            self.images,
            self.config.view,
            views=self.method.views,
            side=self.side,
            batch_size=self.config.optim.batch_size,
            seed=self.config.seed,
            dtype=self.dtype,
            device=self.device,
            backend=backend,
            augment_backend=self.method.backends.augment,
            threads=self.config.data.loader_threads,
        )

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> int:
        """Takes what a checkpoint holds; gives the steps it has behind it."""
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
        if state.get("images", self.fingerprint) != self.fingerprint:
            raise CheckpointError(
                f"{checkpoint} was trained on other images than {self.images.name} now holds ({len(self.images)} of "
                "them); put the old ones back, or start anew in another --out"
            )
        self.method.load_state_dict(state["method"])
        self.step.load_state_dict(state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return state["step"]

    def _save_due(self, done: int) -> bool:
        config, epoch = self.config.engine, self.schedule.steps_per_epoch
        milestone = config.keep_every is not None and done % (config.keep_every * epoch) == 0
        return milestone or done % max(1, round(config.save_every * epoch)) == 0 or done == self.schedule.total_steps

    def _save(self, done: int) -> None:
        cuda, method = self.device.type == "cuda", self.method.state_dict()
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
            "loader": self.loader.name,
            "mean": torch.from_numpy(self.loader.mean),
            "std": torch.from_numpy(self.loader.std),
            "side": self.side,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        keep_every = self.config.engine.keep_every
        save_checkpoint(self.checkpoints, done, state)
        delete_old_checkpoints(
            self.checkpoints,
            keep_last=self.config.engine.keep_last,
            milestone_steps=keep_every and keep_every * self.schedule.steps_per_epoch,
        )

    def _check(self) -> None:
        """Raises TrainingError if a step since the last check was not finite."""
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

    def _record(self, done: int, losses: Losses, gradient_norm: Tensor, batch: Batch) -> dict[str, Any]:
        """The figures of the step just done, as plain numbers."""
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
        }

    def _speed(self, clock: StepClock) -> dict[str, Any]:
        """Speed of the steps since the last record, which are none while the run warms up; memory; waiting."""
        waited, seconds = clock.take()
        speed = speed_of(seconds, self.config.optim.batch_size)
        figures = (
            dict.fromkeys(Speed._fields) if speed is None else {k: round(v, 6) for k, v in speed._asdict().items()}
        )
        least = self.least_seconds
        return {
            **figures,
            "data_wait_seconds": round(waited, 4),
            "limit_share": None if speed is None or least is None else round(least / speed.step_seconds, 4),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _say_speed(self, clock: StepClock) -> None:
        speed = speed_of(clock.all, self.config.optim.batch_size)
        if speed is None:
            return
        text = (
            f"{speed.images_per_second:,.0f} images/s (slowest tenth of the steps {speed.images_per_second_p10:,.0f}, "
            f"fastest {speed.images_per_second_p90:,.0f}), {speed.step_seconds:.3f} s a step, without the warm-up"
        )
        if self.least_seconds is not None:
            text += f": {self.least_seconds / speed.step_seconds:.0%} of this machine's limit"
        self._say(f"{text}; peak memory {peak_memory_bytes(self.device) / 2**30:.1f} GiB")

    def _stay_eager(self, why: str) -> None:
        self.compile = "off"
        self._say(why)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _describe(self) -> None:
        """Writes config.json, environment.json and the report's views; prints what was chosen and how long it takes."""
        self.out.mkdir(parents=True, exist_ok=True)
        for left_over in self.checkpoints.glob(".step-*.tmp"):  # of a process that was killed while it saved
            left_over.unlink()
        loader, dtype = self.loader.name, str(self.dtype).removeprefix("torch.")
        kernels = describe_backends(self.method.backends)
        chosen = {
            "precision": dtype,
            "loader": loader,
            "kernels": kernels,
            "image_side": self.side,
            "mean": self.loader.mean.tolist(),
            "std": self.loader.std.tolist(),
        }
        write_json(self.out / "config.json", to_dict(self.config))
        write_json(self.out / "environment.json", describe_environment(self.device, chosen))
        pictured = np.linspace(0, len(self.images) - 1, PICTURED_IMAGES, dtype=np.int64)  # spread: sets come sorted
        views = np.stack([view.cpu().numpy() for view in self.loader.render(pictured, epoch=0)])
        mean, std = self.loader.mean, self.loader.std
        images = originals(self.images.read(pictured), self.side)
        write_atomically(
            self.out / "views.npz", lambda file: np.savez(file, images=images, views=views, mean=mean, std=std)
        )

        say, total = self._say, self.schedule.total_steps
        say(
            f"{self.config.method} on {self.config.dataset}: {len(self.images):,} images of side {self.side}, "
            f"{self.config.optim.epochs} epochs of {self.schedule.steps_per_epoch} steps, device {self.device}, "
            f"{dtype}, loader {loader}, kernels {kernels}"
        )
        if self.start:
            say(f"going on after step {self.start} of {total}")
        if self.start < total:
            with torch.random.fork_rng():  # the run's numbers do not depend on what is found out here
                self._describe_limits()
            if self.compile != "off":
                say("compiling the forward, which takes minutes ...")

    def _describe_limits(self) -> None:
        """Prints how fast the step could be at most, and what fits in memory."""
        if not HAS_TRITON:  # the counts are those of its kernels
            return
        from mnclglf.training.memory import largest_batch, step_memory
        from mnclglf.training.roofline import least_seconds, peaks_of

        config, cuda = self.config, self.device.type == "cuda"
        peaks = peaks_of(self.device, self.dtype, tf32=config.engine.tf32)
        self.least_seconds = least_seconds(config, self.side, self.dtype, peaks)
        self._say(
            f"a step takes at least {self.least_seconds:.3g} s: {peaks.name}, {peaks.flops / 1e12:.3g} TFLOP/s, "
            f"{peaks.memory_bytes / 1e9:.3g} GB/s"
        )
        needed = step_memory(config, config.optim.batch_size, self.side, self.dtype)
        available = torch.cuda.get_device_properties(self.device).total_memory if cuda else GPU_GIB * 2**30
        fits = largest_batch(config, self.side, self.dtype, available)
        self._say(
            f"a step needs about {needed.total / 2**30:.2g} GiB, {needed.activations / 2**30:.2g} of it activations; "
            f"the largest batch for {available / 2**30:.0f} GiB is about {fits:,}"
        )


def originals(images: Pixels, side: int) -> NDArray[np.uint8]:
    """Images for the report, [n, H, W, 3]: as they are where they have one size, else their middles, side x side."""
    if isinstance(images, np.ndarray):
        return images
    pixels = whole_views(images, side, np.zeros(3, np.float32), np.ones(3, np.float32), torch.float32)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
