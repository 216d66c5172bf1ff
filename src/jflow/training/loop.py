"""The loop: chunks of steps on the device, and between them, at fixed steps, logging, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from jflow import checks
from jflow.training import throughput
from jflow.training.alarms import Watch
from jflow.training.checkpoint_config import as_json
from jflow.training.checkpoints import Checkpoints, absolute
from jflow.training.distributed import Notice, PreemptedError, Watchdog, barrier, first_process
from jflow.training.metrics_log import MetricsLog, read
from jflow.training.prefetch import Feed
from jflow.training.progress import progress
from jflow.training.recorder import Interval, Recorder, Row
from jflow.training.state import TrainState
from jflow.training.step import Chunk, Metrics
from jflow.types import Array, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Plan:
    """What falls on which step. It depends on the absolute step only, so a resumed run keeps the boundaries.

    Attributes:
      total_steps: the step at which the run ends.
      chunk_steps: the length of a chunk; only the steps that are left at the end are taken one by one, so two lengths
        are compiled at most.
      log_every: a multiple of chunk_steps.
      checkpoint_every, eval_every, snapshot_every: multiples of log_every, or None for never.

    Raises:
      ValueError, TypeError: naming the number that is none, not positive, or no such multiple.
    """

    total_steps: int
    chunk_steps: int
    log_every: int
    checkpoint_every: int | None = None
    eval_every: int | None = None
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        for name, divisor in (
            ("total_steps", None),
            ("chunk_steps", None),
            ("log_every", "chunk_steps"),
            ("checkpoint_every", "log_every"),
            ("eval_every", "log_every"),
            ("snapshot_every", "log_every"),
        ):
            value = getattr(self, name)
            if value is None and divisor == "log_every" and name != "log_every":
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

    def falls(self, what: Literal["log", "checkpoint", "eval", "snapshot"], step: int) -> bool:
        """Whether a row is written, or a checkpoint, an evaluation or a snapshot made, after ``step`` steps."""
        every = getattr(self, f"{what}_every")
        return every is not None and (step % every == 0 or step == self.total_steps)


class Averages(NamedTuple):
    """What a snapshot keeps: the step and the averages of a state."""

    step: Array
    ema: dict[str, Params]


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
    snapshot_every: int | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    ignore: Collection[str] = (),
    keep: int = 3,
    keep_best: int = 0,
    best: str | None = None,
    forgive: int = 0,
    stall_seconds: float | None = None,
    count_flops: bool = False,
    profile: tuple[int, int] | None = None,
    callbacks: Sequence[Callable[[Row], None]] = (),
    show_progress: bool = True,
) -> TrainState:
    """Trains until ``total_steps`` steps have been taken in all.

    Stopped and resumed, a run goes on bit for bit as if unbroken (same devices, versions and flags): state, order of the
    data, and rows but for their times. Resumed on other devices, or another number of processes, it starts from the same
    bits, and the losses agree to rounding. Of several processes each calls it alike, with a state and data laid out over
    the devices of all (``jflow.sharding``) and an ``out_dir`` that all see; the first one writes rows and shows progress.

    SIGTERM, or the notice that a machine of a pod is about to be taken away, ends the chunk under way, saves it, and raises
    PreemptedError, where there are checkpoints.

    Args:
      state: from ``init_state``; donated, so gone after the call. With ``resume``, what the restored one looks like, and
        how it is laid out.
      chunk: from ``make_chunk``.
      data: its second argument: arrays on the device; or a ``Feed``, which hands it the data of each chunk.
      total_steps: the step at which to end; not counted from the restored one.
      log_every: steps per row of metrics, averaged over them.
      chunk_steps: steps per dispatch, a divisor of ``log_every``, which is the default.
      checkpoint_every: steps per checkpoint, a multiple of ``log_every``, or None for none; also at the end.
      eval_every: steps per call of ``eval_fn``, a multiple of ``log_every``; also at the end.
      eval_fn: ``state -> {name: number}``; must not keep the state, which the next step donates.
      snapshot_every: steps per snapshot of the averages alone, a multiple of ``log_every``; also at the end. All are kept,
        in ``out_dir/averages``, to be recombined after training (``training.ema_posthoc``); ``restore_params(out_dir /
        "averages", NAME, step=...)`` reads one.
      out_dir: where ``metrics.jsonl`` and ``checkpoints`` go; None to write nothing.
      config: JSON values kept in the checkpoints; on resume they must be the same.
      resume: continue from the newest whole checkpoint in ``out_dir``; later rows of metrics are dropped. "auto": where
        there is none, begin; so that one command serves a machine that may be taken away.
      overwrite: delete the metrics, checkpoints and snapshots that are in ``out_dir``.
      ignore: config entries, by dotted name, that may differ on resume.
      keep: how many checkpoints are kept.
      keep_best: how many checkpoints are kept beside them, those of the lowest ``best``.
      best: an entry of what ``eval_fn`` returns. The checkpoints compared are those of steps with an evaluation.
      forgive: how many broken steps in a row the run may go on after: steps whose loss or gradient is not finite, and that
        leave the parameters finite, since the optimizer leaves such an update out (``optax.apply_if_finite``,
        ``optax.MultiSteps`` with ``optax.skip_not_finite``, ``optax.zero_nans``). Runs of them are counted over chunks
        and resumptions. In rows ``broken_steps`` says how many there were, ``broken_run`` the most in a row so far, and
        means are over the other steps, if there are any.
      stall_seconds: when no chunk has ended for so long, compilation included, the process says so and ends with exit code
        ``EXIT_STALLED``; None to wait for ever. For runs of several processes.
      count_flops: let XLA count the floating-point operations of a step, which compiles one more chunk; rows have
        ``flops_per_second`` and, on devices whose peak is known, ``utilisation`` (``training.throughput``).
      profile: steps (first, last) between which ``jax.profiler`` traces the first process into ``out_dir/profile``, as
        far as chunks allow.
      callbacks: each called with every row that is written (of several processes, on each).
      show_progress: show a bar in a terminal, elsewhere print a line per row.

    Returns:
      The state after ``total_steps`` steps. Rows have ``kind`` ("train" or "eval"), ``step``, the metrics, and in those
      of training ``steps`` (averaged over), ``steps_per_second`` and ``seconds`` since the call, and ``warning``, a
      sentence that is shown as well, where a tangent or a residual has exploded (``training.alarms``).

    Raises:
      NonFiniteError: when a loss, gradient or update is not finite, or more than ``forgive`` in a row are, or the
        parameters after a step; nothing is saved after it.
      PreemptedError: when asked to stop; the state has been saved.
      FileExistsError: when ``out_dir`` holds a run and neither ``resume`` nor ``overwrite`` is set.
      FileNotFoundError: when there is nothing to resume, or no checkpoint that is whole.
      ValueError: for numbers that are no multiples, a state past the end, or a checkpoint of another config or kind.
    """
    plan = Plan(
        total_steps,
        log_every if chunk_steps is None else chunk_steps,
        log_every,
        checkpoint_every,
        eval_every,
        snapshot_every,
    )
    if (eval_fn is None) != (eval_every is None):
        raise ValueError("eval_fn, eval_every: expected both or neither")
    checks.choice("resume", resume, (False, True, "auto"))
    if out_dir is None and (checkpoint_every or snapshot_every or resume or profile):
        raise ValueError("out_dir: expected a directory to write to or to resume from, got None")
    if resume == "auto" and checkpoint_every is None:
        raise ValueError("resume, checkpoint_every: expected checkpoints to go on from with resume='auto', got None")
    if (best is None) != (keep_best == 0) or (best is not None and (eval_every is None or checkpoint_every is None)):
        raise ValueError("best, keep_best, eval_every, checkpoint_every: expected all, or neither of the first two")
    if profile is not None:
        if not isinstance(profile, (tuple, list)) or len(profile) != 2:
            raise TypeError(f"profile: expected two steps, (first, last), got {profile!r}")
        first, last = (checks.integer("profile", edge) for edge in profile)
        if not first < last <= total_steps:
            raise ValueError(f"profile: expected steps first < last <= total_steps, got {profile}")
    _check_arguments(state, data, eval_fn, callbacks)
    # All that can be refused is, before an earlier run is deleted.
    as_json("config", config or {})
    checks.integer("keep", keep, low=1)
    checks.integer("keep_best", keep_best)
    checks.integer("forgive", forgive)
    watchdog = Watchdog(stall_seconds)
    if not resume:
        _begun(state, total_steps)

    with contextlib.ExitStack() as stack:
        # Where to start: the newest whole checkpoint, with the rows of metrics up to it.
        checkpoints, snapshots, log, watch, position = None, None, None, Watch(), None
        out, notice, resumed = None, None, False
        if out_dir is not None:
            out = _open(out_dir, bool(resume), overwrite)
            if resume or checkpoint_every is not None:
                notes = {"chunk_steps": plan.chunk_steps}
                checkpoints = Checkpoints(
                    out / "checkpoints",
                    config=config,
                    notes=notes,
                    keep=keep,
                    keep_best=keep_best,
                    resume=bool(resume),
                )
                stack.enter_context(checkpoints)
                notice = stack.enter_context(Notice())
            if checkpoints is not None and (resume is True or (resume == "auto" and checkpoints.steps())):
                resumed = True
                state, position = checkpoints.restore_latest(state, ignore=ignore)
            # Of a run that was killed before its first checkpoint nothing is left to go on from but the files.
            kept = (int(state.step) if resumed else 0) if resume else None
            if snapshot_every is not None:
                snapshots = Checkpoints(out / "averages", config=config, keep=None, resume=bool(resume))
                stack.enter_context(snapshots)
                snapshots.drop_after(int(state.step))
            if first_process():
                log = stack.enter_context(MetricsLog(out / "metrics.jsonl", kept))
                if resumed:
                    watch = Watch(rows=read(log.path))
        step = _begun(state, total_steps)
        feed = data if isinstance(data, Feed) else None
        if feed is not None:
            stack.enter_context(feed)
            feed.start(step, position, plan.length, total_steps)
        report = stack.enter_context(progress(total_steps, step, show_progress))
        trace = stack.enter_context(_Trace(out / "profile" if out is not None and profile else None, profile))
        stack.enter_context(watchdog)
        recorder = Recorder(checkpoints, log, watch, callbacks, report, forgive)

        def save() -> None:
            # Called for a planned checkpoint or on a notice, and there is neither without the checkpoints.
            assert checkpoints is not None
            score = None if best is None else recorder.score(step, best)
            checkpoints.save(state, position=None if feed is None else feed.position, score=score)

        saved = step if resumed else -1
        interval: Interval = []
        done: Interval = []
        while step < total_steps:
            if checkpoints is not None and notice is not None and notice.seen(step):
                recorder.train(done)
                recorder.train(interval)
                if step != saved:
                    save()
                checkpoints.wait()
                raise PreemptedError(step)
            watchdog.beat(f"steps {step + 1} to {step + plan.length(step)}")
            if feed is not None:
                data = feed.take()
            if count_flops:
                recorder.flops = throughput.flops_per_step(chunk, state, data)
                count_flops = False
            trace.before(step)
            length = plan.length(step)
            state, metrics = chunk(state, data, length)
            interval.append((step, step + length, metrics))
            step += length
            trace.after(step, metrics)

            # The numbers of the interval before are read only now, while the device is busy with this chunk.
            recorder.train(done)
            done = []
            if not plan.falls("log", step):
                continue
            done, interval = interval, []
            if not any(plan.falls(what, step) for what in ("eval", "checkpoint", "snapshot")) and step < total_steps:
                continue

            # Here the device waits. Rows come first, so that a checkpoint never lacks the rows before it.
            recorder.train(done)
            done = []
            watchdog.rest()
            if eval_fn is not None and plan.falls("eval", step):
                recorder.eval(step, eval_fn(state))
            if snapshots is not None and plan.falls("snapshot", step) and step not in snapshots.steps():
                snapshots.save(Averages(state.step, state.ema))
            if plan.falls("checkpoint", step):
                save()
                saved = step
    return state


class _Trace:
    """A trace by ``jax.profiler`` of the chunks that hold the steps asked for, on the first process."""

    def __init__(self, directory: pathlib.Path | None, steps: tuple[int, int] | None) -> None:
        self._directory = directory if directory is not None and first_process() else None
        self._first, self._last = steps or (0, 0)
        self._running = False

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if self._directory is not None and self._first <= step < self._last and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, metrics: Metrics) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._running, self._directory = False, None


def _check_arguments(state: Any, data: Any, eval_fn: Any, callbacks: Any) -> None:
    """Refuses what would fail only after the first steps, or in the words of jax."""
    if not isinstance(state, TrainState):
        raise TypeError(f"state: expected a TrainState, from init_state, got {type(state).__name__}")
    if not isinstance(data, Feed):
        for leaf in jax.tree.leaves(data):
            if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
                raise TypeError(
                    f"data: expected arrays, such as dataset.data, or a Feed of an iterator, got {type(leaf).__name__}"
                )
    if eval_fn is not None:
        checks.function("eval_fn", eval_fn, "state -> {name: number}")
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks: expected a sequence of functions, got {type(callbacks).__name__}")
    for callback in callbacks:
        checks.function("callbacks", callback, "of a row")


def _begun(state: TrainState, total_steps: int) -> int:
    """The steps that the state has taken."""
    if isinstance(state.step, jax.Array) and state.step.is_deleted():
        raise ValueError("state: its arrays are gone, donated to an earlier call; make it anew with init_state")
    step = int(state.step)
    if step > total_steps:
        raise ValueError(f"total_steps: the state has taken {step} steps already, got {total_steps}")
    return step


def _open(out_dir: str | os.PathLike[str], resume: bool, overwrite: bool) -> pathlib.Path:
    """The run's directory, made; what an earlier run left is refused, kept or deleted."""
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected at most one of them")
    out = absolute("out_dir", out_dir)
    out.mkdir(parents=True, exist_ok=True)
    # Other files, a config or figures, may lie beside them.
    folders = [out / "checkpoints", out / "averages"]
    metrics = out / "metrics.jsonl"
    used = metrics.exists() or any(folder.exists() and any(folder.iterdir()) for folder in folders)
    if used and not (resume or overwrite):
        raise FileExistsError(f"{out} holds a run already; resume it, overwrite it, or choose another out_dir")
    barrier("looked at the run's directory")
    if used and overwrite and first_process():
        metrics.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    barrier("emptied the run's directory")
    return out
