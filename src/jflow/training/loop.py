"""The training loop: chunks of steps on the device, with logging, evaluation and checkpoints between them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from jflow import checks
from jflow.training.alarms import Watch
from jflow.training.distributed import Notice, PreemptedError
from jflow.training.hooks import Hook, Row, Started, as_hooks
from jflow.training.prefetch import Feed
from jflow.training.progress import Progress
from jflow.training.recorder import Interval, Recorder
from jflow.training.run_directory import Averages, Opened, RunDirectory
from jflow.training.state import TrainState
from jflow.training.step import Chunk
from jflow.types import PyTree


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps at which chunks, rows, checkpoints, evaluations and snapshots fall.

    They depend on the absolute step only, so they are the same in a resumed run.

    Attributes:
      total_steps: the step at which the run ends.
      chunk_steps: the length of a chunk. Steps that do not fill a chunk at the end are taken one by one, so at most two
        lengths are compiled.
      log_every: steps per row, a multiple of chunk_steps.
      checkpoint_every, snapshot_every: those of the run directory; multiples of log_every, or None for never.
      eval_every: ``every`` of the evaluation; a multiple of log_every, or None for never.

    Raises:
      ValueError: if a number is not positive, or not such a multiple.
      TypeError: if a number is not a whole number.
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


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A function of the state that is evaluated between chunks.

    Attributes:
      function: ``state -> {name: number}``. It must not keep the state, which the next step donates.
      every: steps between two evaluations, a multiple of ``log_every``. The function is also evaluated at the end.

    Raises:
      ValueError: if ``every`` is not positive.
      TypeError: if ``function`` is not a function, or ``every`` is not a whole number.
    """

    function: Callable[[TrainState], Mapping[str, Any]]
    every: int

    def __post_init__(self) -> None:
        checks.function("function", self.function, "state -> {name: number}")
        checks.integer("every", self.every, low=1)


def fit(
    state: TrainState,
    chunk: Chunk,
    data: PyTree,
    *,
    total_steps: int,
    log_every: int = 100,
    chunk_steps: int | None = None,
    run: RunDirectory | None = None,
    evaluation: Evaluation | None = None,
    forgive: int = 0,
    hooks: Sequence[Hook | Callable[[Row], object]] | None = None,
) -> TrainState:
    """Trains until the state has taken ``total_steps`` steps. ``training.train`` is shorter for the common case.

    On the same devices, versions and flags, a run that is stopped and resumed equals an uninterrupted run bit for bit: the
    state, the order of the data, and the rows except for their times. A run that was asked to stop between two rows has one
    more row. A run resumed on other devices, or with another number of processes, starts from the same bits, and its losses
    agree to rounding.

    With several processes, each must make the same call, with a state and data that are sharded over the devices of all
    processes (``jflow.sharding``). The first process writes the rows.

    If there are checkpoints, SIGTERM, or the notice that a machine of a pod will be preempted, stops the run: the current
    chunk ends, the state is saved, and PreemptedError is raised.

    Args:
      state: the state from ``init_state``. It is donated, so it cannot be used after the call. For a resumed run it gives the
        structure, shapes, dtypes and shardings of the restored state.
      chunk: the function from ``make_chunk``.
      data: the second argument of the chunk: arrays on the device, or a ``Feed``, which provides the data of each chunk.
      total_steps: the step at which the run ends, counted from the start of the first run.
      log_every: steps per row of metrics; a row averages over these steps.
      chunk_steps: steps per dispatch, a divisor of ``log_every``; by default ``log_every``.
      run: the directory of the run, and whether an earlier run is resumed; None to write nothing.
      evaluation: a function of the state, and how often it is evaluated; None for no evaluation.
      forgive: the largest number of consecutive broken steps after which the run continues. A broken step has a loss or a
        gradient that is not finite but leaves the parameters finite, because the optimizer skips such an update
        (``optax.apply_if_finite``, ``optax.MultiSteps`` with ``optax.skip_not_finite``, ``optax.zero_nans``). Broken steps
        are counted across chunks and resumptions. In a row, ``broken_steps`` is the number of broken steps, ``broken_run``
        the largest number of consecutive ones, and means are over the other steps, if there are any.
      hooks: hooks (``training.Hook``), or functions that are called with every row; they are called in this order. The
        default is ``Progress()`` alone; ``()`` means none. See also ``TensorBoard``, ``Profile``, ``CountFlops``,
        ``Watchdog``.

    Returns:
      The state after ``total_steps`` steps. Rows have ``kind`` ("train" or "eval"), ``step``, and the metrics. Training rows
      also have ``steps`` (the number averaged over), ``steps_per_second``, ``seconds`` since the call, and ``warning``, a
      sentence, if a value has exploded (``training.alarms``).

    Raises:
      NonFiniteError: if more than ``forgive`` consecutive steps have a loss, gradient or update that is not finite, or the
        parameters are not finite. Nothing is saved after it.
      PreemptedError: if the process was asked to stop; the state has been saved.
      FileExistsError: if the run's directory holds a run, and neither ``resume`` nor ``overwrite`` is set.
      FileNotFoundError: if there is no checkpoint to resume from, or every one is damaged.
      ValueError: if a number is not a multiple as required, the state is past ``total_steps``, its arrays were donated, or
        the checkpoint has another config, structure, shape or dtype.
      TypeError: if an argument has another type.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jflow import datasets, flow_map, interpolants, objectives, parameterizations, training
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * x
      >>> path = interpolants.linear()
      >>> model = flow_map(net, parameterizations.mean_velocity_form(path))
      >>> dataset = datasets.ArrayDataset(jnp.ones((8, 2), jnp.float32), batch_size=4)
      >>> optimizer = optax.sgd(0.1)
      >>> step = training.make_step(objectives.flow_matching(model, path), optimizer)
      >>> chunk = training.make_chunk(step, dataset.batch)
      >>> state = training.init_state(jnp.float32(0.5), optimizer, jax.random.key(0))
      >>> state = training.fit(state, chunk, dataset.data, total_steps=2, hooks=[])
      >>> int(state.step)
      2
    """
    _check_arguments(state, chunk, data, run, evaluation)
    hooks = [Progress()] if hooks is None else as_hooks(hooks)
    plan = Plan(
        total_steps,
        log_every if chunk_steps is None else chunk_steps,
        log_every,
        None if run is None else run.checkpoint_every,
        None if evaluation is None else evaluation.every,
        None if run is None else run.snapshot_every,
    )
    if run is not None and run.best is not None and evaluation is None:
        raise ValueError("evaluation: expected one with run.best, got None")
    checks.integer("forgive", forgive)
    if run is None or not run.resume:
        _begun(state, total_steps)
    nothing = Opened(state, None, False, None, None, None, Watch())
    with contextlib.ExitStack() as stack:
        opened = nothing if run is None else stack.enter_context(run.opened(state, plan.chunk_steps))
        notice = None if opened.checkpoints is None else stack.enter_context(Notice())
        state = opened.state
        step = _begun(state, total_steps)
        feed = data if isinstance(data, Feed) else None
        if feed is not None:
            stack.enter_context(feed)
            feed.start(step, opened.position, plan.length, total_steps)
        for hook in hooks:
            hook.__enter__()
            stack.push(functools.partial(_leave, hook))
        recorder = Recorder(opened, hooks, forgive)

        def save() -> None:
            # Called for a planned checkpoint or after a notice; neither exists without checkpoints.
            assert run is not None and opened.checkpoints is not None
            score = None if run.best is None else recorder.score(step, run.best)
            # Wait for the other save: two at once would use the same barriers of Orbax.
            if opened.snapshots is not None:
                opened.snapshots.wait()
            opened.checkpoints.save(state, position=None if feed is None else feed.position, score=score)

        first, saved = step, step if opened.resumed else -1
        interval: Interval = []
        done: Interval = []
        while step < total_steps:
            if notice is not None and notice.seen(step):
                recorder.train(done)
                recorder.train(interval)
                for hook in hooks:
                    hook.pause()
                if step != saved:
                    save()
                assert opened.checkpoints is not None
                opened.checkpoints.wait()
                raise PreemptedError(step)
            length = plan.length(step)
            if step == first:
                data = data if feed is None else feed.take()
                for hook in hooks:
                    hook.start(Started(step, total_steps, chunk, state, data))
            for hook in hooks:
                hook.before_chunk(step, length)
            if feed is not None and step != first:
                data = feed.take()
            state, metrics = chunk(state, data, length)
            interval.append((step, step + length, metrics))
            step += length
            for hook in hooks:
                hook.after_chunk(step, metrics)

            # Read the numbers of the previous interval only now, while the device computes this chunk.
            recorder.train(done)
            done = []
            if not plan.falls("log", step):
                continue
            done, interval = interval, []
            if not any(plan.falls(what, step) for what in ("eval", "checkpoint", "snapshot")) and step < total_steps:
                continue

            # The device is idle here. Write the rows first, so that no checkpoint is newer than the rows.
            recorder.train(done)
            done = []
            for hook in hooks:
                hook.pause()
            if evaluation is not None and plan.falls("eval", step):
                recorder.eval(step, evaluation.function(state))
            snapshots = opened.snapshots
            if snapshots is not None and plan.falls("snapshot", step) and step not in snapshots.steps():
                if opened.checkpoints is not None:
                    opened.checkpoints.wait()
                snapshots.save(Averages(state.step, state.ema))
            if plan.falls("checkpoint", step):
                save()
                saved = step
    return state


def _leave(hook: Hook, *error: Any) -> None:
    """Exits a hook, ignoring its return value, so that it cannot suppress an error."""
    hook.__exit__(*error)


def _check_arguments(state: Any, chunk: Any, data: Any, run: Any, evaluation: Any) -> None:
    """Checks arguments that would otherwise fail only after the first steps, or with a message of jax."""
    if not isinstance(state, TrainState):
        raise TypeError(f"state: expected a TrainState, from init_state, got {type(state).__name__}")
    checks.accepts("chunk", chunk, "(state, data, steps) -> (state, metrics), from make_chunk", 3, model=False)
    if not isinstance(data, Feed):
        for leaf in jax.tree.leaves(data):
            if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
                raise TypeError(
                    f"data: expected arrays, such as dataset.data, or a Feed of an iterator, got {type(leaf).__name__}"
                )
    if run is not None and not isinstance(run, RunDirectory):
        raise TypeError(f"run: expected a RunDirectory, got {type(run).__name__}")
    if evaluation is not None and not isinstance(evaluation, Evaluation):
        raise TypeError(f"evaluation: expected an Evaluation(function, every), got {type(evaluation).__name__}")


def _begun(state: TrainState, total_steps: int) -> int:
    """The number of steps that the state has taken."""
    if isinstance(state.step, jax.Array) and state.step.is_deleted():
        raise ValueError("state: its arrays are gone, donated to an earlier call; make it anew with init_state")
    step = int(state.step)
    if step > total_steps:
        raise ValueError(f"total_steps: expected at least the {step} steps that the state has taken, got {total_steps}")
    return step
