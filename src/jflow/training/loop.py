"""The loop: chunks of steps on the device, and between them, at fixed steps, logging, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jflow import checks
from jflow.training.checkpoints import Checkpoints
from jflow.training.divergence import Watch
from jflow.training.metrics_log import MetricsLog, average, read
from jflow.training.progress import Report, progress
from jflow.training.state import TrainState
from jflow.training.step import Chunk, Metrics
from jflow.types import PyTree

Row = dict[str, Any]
# The steps taken before a chunk and after it, and its metrics, still on the device.
Interval = list[tuple[int, int, Metrics]]


class NonFiniteError(RuntimeError):
    """A loss, gradient or update was not finite.

    Attributes:
      first_step, last_step: the steps among which it happened, both counted from 1.
      checkpoint: the step of the newest checkpoint, from before it happened, or None.
    """

    def __init__(self, first_step: int, last_step: int, checkpoint: int | None, metrics: Mapping[str, Any]) -> None:
        self.first_step, self.last_step, self.checkpoint = first_step, last_step, checkpoint
        numbers = ", ".join(
            f"{name} {np.asarray(metrics[name]):.4g}"
            for name in ("loss", "grad_norm", "update_norm")
            if name in metrics
        )
        good = "there is no checkpoint" if checkpoint is None else f"the last good checkpoint is of step {checkpoint}"
        super().__init__(f"not finite within steps {first_step} to {last_step} (means: {numbers}); {good}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What falls on which step. It depends on the absolute step only, so a resumed run keeps the boundaries.

    Attributes:
      total_steps: the step at which the run ends.
      chunk_steps: the length of a chunk; only the steps that are left at the end are taken one by one, so two lengths
        are compiled at most.
      log_every: a multiple of chunk_steps.
      checkpoint_every, eval_every: multiples of log_every, or None for never.

    Raises:
      ValueError, TypeError: naming the number that is none, not positive, or no such multiple.
    """

    total_steps: int
    chunk_steps: int
    log_every: int
    checkpoint_every: int | None = None
    eval_every: int | None = None

    def __post_init__(self) -> None:
        for name, divisor in (
            ("total_steps", None),
            ("chunk_steps", None),
            ("log_every", "chunk_steps"),
            ("checkpoint_every", "log_every"),
            ("eval_every", "log_every"),
        ):
            value = getattr(self, name)
            if value is None and name in ("checkpoint_every", "eval_every"):
                continue
            checks.integer(name, value, low=1)
            if divisor is not None and value % getattr(self, divisor):
                raise ValueError(
                    f"{name}: expected a multiple of {divisor} = {getattr(self, divisor)}, got {value}: a resumed run "
                    "has the same chunks and rows as an unbroken one only then"
                )

    def length(self, step: int) -> int:
        """The length of the chunk that starts at ``step``."""
        whole = step % self.chunk_steps == 0 and step + self.chunk_steps <= self.total_steps
        return self.chunk_steps if whole else 1

    def logs(self, step: int) -> bool:
        """Whether a row is written after ``step`` steps."""
        return step % self.log_every == 0 or step == self.total_steps

    def evaluates(self, step: int) -> bool:
        """Whether the state is evaluated after ``step`` steps."""
        return self.eval_every is not None and (step % self.eval_every == 0 or step == self.total_steps)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step`` steps."""
        return self.checkpoint_every is not None and (step % self.checkpoint_every == 0 or step == self.total_steps)


def fit(
    state: TrainState,
    chunk: Chunk,
    data: PyTree,
    *,
    total_steps: int,
    log_every: int = 100,
    chunk_steps: int | None = None,
    checkpoint_every: int | None = None,
    eval_every: int | None = None,
    eval_fn: Callable[[TrainState], Mapping[str, Any]] | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    ignore: Collection[str] = (),
    keep: int = 3,
    callbacks: Sequence[Callable[[Row], None]] = (),
    show_progress: bool = True,
) -> TrainState:
    """Trains until ``total_steps`` steps have been taken in all.

    Stopped and resumed at a multiple of ``log_every``, a run goes on bit for bit as if unbroken (same devices, versions
    and flags): state, and rows but for their times.

    Args:
      state: from ``init_state``; donated, so gone after the call. With ``resume``, what the restored one looks like.
      chunk: from ``make_chunk``.
      data: its second argument: arrays on the device.
      total_steps: the step at which to end; not counted from the restored one.
      log_every: steps per row of metrics, averaged over them.
      chunk_steps: steps per dispatch, a divisor of ``log_every``, which is the default.
      checkpoint_every: steps per checkpoint, a multiple of ``log_every``, or None for none; also at the end.
      eval_every: steps per call of ``eval_fn``, a multiple of ``log_every``; also at the end.
      eval_fn: ``state -> {name: number}``; must not keep the state, which the next step donates.
      out_dir: where ``metrics.jsonl`` and ``checkpoints`` go; None to write nothing.
      config: JSON values kept in the checkpoints; on resume they must be the same.
      resume: continue from the newest whole checkpoint in ``out_dir``; later rows of metrics are dropped.
      overwrite: delete the metrics and checkpoints that are in ``out_dir``.
      ignore: config entries, by dotted name, that may differ on resume.
      keep: how many checkpoints are kept.
      callbacks: each called with every row that is written.
      show_progress: show a bar in a terminal, elsewhere print a line per row.

    Returns:
      The state after ``total_steps`` steps. Rows have ``kind`` ("train" or "eval"), ``step``, the metrics, and in those
      of training ``steps`` (averaged over), ``steps_per_second`` and ``seconds`` since the call, and ``warning``, a
      sentence that is shown as well, where a tangent or a residual has exploded (``training.divergence``).

    Raises:
      NonFiniteError: when a loss, gradient or update is not finite; nothing is saved after it.
      FileExistsError: when ``out_dir`` holds a run and neither ``resume`` nor ``overwrite`` is set.
      FileNotFoundError: when there is nothing to resume.
      ValueError: for numbers that are no multiples, a state past the end, or a checkpoint of another config or kind.
    """
    plan = Plan(total_steps, log_every if chunk_steps is None else chunk_steps, log_every, checkpoint_every, eval_every)
    if (eval_fn is None) != (eval_every is None):
        raise ValueError("eval_fn, eval_every: expected both or neither")
    if out_dir is None and (checkpoint_every is not None or resume):
        raise ValueError("out_dir: expected a directory to write checkpoints to or to resume from, got None")

    with contextlib.ExitStack() as stack:
        # Where to start: the newest whole checkpoint, with the rows of metrics up to it.
        checkpoints, log, watch = None, None, Watch()
        if out_dir is not None:
            out = _open(out_dir, resume, overwrite)
            if resume or checkpoint_every is not None:
                notes = {"chunk_steps": plan.chunk_steps}
                checkpoints = Checkpoints(out / "checkpoints", config=config, notes=notes, keep=keep, resume=resume)
                stack.enter_context(checkpoints)
            if resume:
                state = checkpoints.restore_latest(state, ignore=ignore)
            log = stack.enter_context(MetricsLog(out / "metrics.jsonl", int(state.step) if resume else None))
            if resume:
                watch = Watch(read(log.path))
        step = int(state.step)
        if step > total_steps:
            raise ValueError(f"total_steps: the state has taken {step} steps already, got {total_steps}")
        report = stack.enter_context(progress(total_steps, step, show_progress))
        recorder = Recorder(checkpoints, log, watch, callbacks, report)

        interval: Interval = []
        done: Interval = []
        while step < total_steps:
            # A preemption notice would be looked at here.
            length = plan.length(step)
            state, metrics = chunk(state, data, length)
            interval.append((step, step + length, metrics))
            step += length

            # The numbers of the interval before are read only now, while the device is busy with this chunk.
            recorder.train(done)
            done = []
            if not plan.logs(step):
                continue
            done, interval = interval, []
            if not (plan.evaluates(step) or plan.saves(step) or step == total_steps):
                continue

            # Here the device waits. Rows come first, so that a checkpoint never lacks the rows before it.
            recorder.train(done)
            done = []
            if plan.evaluates(step):
                recorder.eval(step, eval_fn(state))
            if plan.saves(step):
                checkpoints.save(state)
    return state


class Recorder:
    """Reads metrics from the device, refuses those that are not finite, and writes rows."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        log: MetricsLog | None,
        watch: Watch,
        callbacks: Sequence[Callable[[Row], None]],
        report: Report,
    ) -> None:
        self._checkpoints, self._log, self._watch = checkpoints, log, watch
        self._callbacks, self._report = callbacks, report
        self._began = self._last = time.perf_counter()

    def train(self, interval: Interval) -> None:
        """One row for the chunks of an interval; waits until they are done."""
        if not interval:
            return
        chunks = jax.device_get([metrics for _, _, metrics in interval])
        now = time.perf_counter()
        first, last = interval[0][0], interval[-1][1]
        weights = np.asarray([stop - start for start, stop, _ in interval], np.float64)
        stacked = {name: np.stack([_wide(metrics[name]) for metrics in chunks]) for name in chunks[0]}
        rate = (last - first) / (now - self._last)
        row = {
            "kind": "train",
            "step": last,
            "steps": last - first,
            **average(stacked, weights),
            "steps_per_second": rate,
            "seconds": now - self._began,
        }
        self._last = now
        warning = self._watch(row)
        self._write(row if warning is None else {**row, "warning": warning})
        self._report(last, rate, float(row["loss"]), warning)
        for (start, stop, _), metrics in zip(interval, chunks, strict=True):
            if not metrics["finite"]:
                raise NonFiniteError(start + 1, stop, self._last_good(), metrics)

    def eval(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of what an evaluation found."""
        self._write({"kind": "eval", "step": step, **jax.device_get(dict(values))})
        # The time it took is not the training's.
        self._last = time.perf_counter()

    def _write(self, row: Row) -> None:
        if self._log is not None:
            self._log.write(row)
        for callback in self._callbacks:
            callback(row)

    def _last_good(self) -> int | None:
        if self._checkpoints is None:
            return None
        self._checkpoints.wait()
        return max(self._checkpoints.steps(), default=None)


def _wide(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value if value.dtype == bool else value.astype(np.float64)


def _open(out_dir: str | os.PathLike[str], resume: bool, overwrite: bool) -> pathlib.Path:
    """The run's directory, made; what an earlier run left is refused, kept or deleted."""
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected at most one of them")
    out = pathlib.Path(out_dir).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
    # Other files, a config or figures, may lie beside them.
    used = metrics.exists() or (checkpoints.exists() and any(checkpoints.iterdir()))
    if used and not (resume or overwrite):
        raise FileExistsError(f"{out} holds a run already; resume it, overwrite it, or choose another out_dir")
    if used and overwrite:
        metrics.unlink(missing_ok=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return out
