"""Training in one call: makes the state, the step and the chunk, and runs the loop, with default choices."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jflow import checks, objectives, sharding
from jflow.training import ema as averages
from jflow.training import prefetch
from jflow.training.hooks import Hook, Row
from jflow.training.loop import Evaluation, fit
from jflow.training.optimizers import Optimizer
from jflow.training.run_directory import RunDirectory
from jflow.training.state import TrainState, init_state
from jflow.training.step import make_chunk, make_step
from jflow.types import Array, Batch, Context, Key, ObjectiveFn, Params, PyTree


class Dataset(Protocol):
    """A dataset whose batches are a function of arrays and the step, such as those of ``jflow.datasets``."""

    @property
    def data(self) -> PyTree:
        """The arrays that are placed on the devices and passed to ``batch``."""

    def batch(self, data: PyTree, step: Array) -> Batch:
        """The batch of a step; the function is traced."""
        ...


# With a constant decay, a run of 2,000 steps would leave a weight of 0.14 on the first parameters.
DEFAULT_AVERAGE: dict[str, averages.Schedule] = {"0.999": averages.warmup(0.999)}


def train(
    objective: ObjectiveFn,
    optimizer: Optimizer,
    params: Params | Callable[[Key], Params],
    dataset: Dataset | prefetch.Feed,
    *,
    steps: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    ema: averages.Averages = DEFAULT_AVERAGE,
    teacher: Params = None,
    out_dir: str | os.PathLike[str] | RunDirectory | None = None,
    evaluate: Evaluation | None = None,
    log_every: int | None = None,
    forgive: int = 0,
    hooks: Sequence[Hook | Callable[[Row], object]] | None = None,
) -> TrainState:
    """Trains a network with an objective and an optax optimizer.

    For example::

        state = train(objectives.lsd(flow_map, path), optax.adam(1e-3), params, ArrayDataset(x, 256), steps=10_000)
        samples = samplers.jumps(flow_map.bind(state.averaged()), noise, samplers.uniform_grid(1))

    It makes the state (``init_state``), the step (``make_step``) and the chunk (``make_chunk``), and runs the loop (``fit``).
    Call these functions directly for options that are not arguments here.

    Args:
      objective: ``(params, key, batch, context) -> (loss [B], aux)``, such as one of ``jflow.objectives``.
      optimizer: an optax ``GradientTransformation``, or ``optax.MultiSteps``.
      params: a pytree of arrays; or ``key -> params``, which on a mesh makes each shard on its device.
      dataset: a dataset of ``jflow.datasets``, or a ``Feed`` of an iterator.
      steps: the number of steps, including those before a run was resumed.
      seed: the seed of all random numbers of the training, and of ``params`` if it is a function.
      mesh: a mesh from ``sharding.mesh``; by default all devices, each with the whole state. The number of devices must
        divide the rows of a batch.
      ema: decays of the averages, or a mapping of names to schedules of ``training.ema``; ``()`` for none. The default is one
        average "0.999" with the schedule ``ema.warmup(0.999)``, which also forgets the first parameters in a short run.
      teacher: frozen parameters of the objective's teacher, or None.
      out_dir: a directory for metrics, and for checkpoints at each fifth of the run, of which the newest three are kept; or
        a ``RunDirectory``, for other choices and to resume. None to write nothing.
      evaluate: a function of the state to evaluate during training, and how often.
      log_every: steps per row of metrics, and per dispatch; by default the largest number that is at most 100, at most a
        fifth of the steps, and a divisor of the numbers of steps in ``out_dir`` and ``evaluate``.
      forgive: as in ``fit``.
      hooks: as in ``fit``; by default a progress bar.

    Returns:
      The state: ``state.params`` are the trained parameters, ``state.averaged()`` their average.

    Raises:
      ValueError: if an argument is out of range, or the loss does not depend on ``teacher``. An earlier run is not changed.
      TypeError: if an argument has another type. An earlier run is not changed.
      NonFiniteError, PreemptedError, FileExistsError, FileNotFoundError: as ``fit``.

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
      >>> objective = objectives.flow_matching(model, path)
      >>> state = training.train(objective, optax.sgd(0.1), jnp.float32(0.5), dataset, steps=2, hooks=[])
      >>> int(state.step)
      2
    """
    checks.integer("steps", steps, low=1)
    checks.integer("seed", seed)
    feed = isinstance(dataset, prefetch.Feed)
    if not feed and not (callable(getattr(dataset, "batch", None)) and hasattr(dataset, "data")):
        raise TypeError(
            "dataset: expected one with data and batch(data, step), such as datasets.ArrayDataset(x, batch_size), or a "
            f"Feed of an iterator, got {type(dataset).__name__}"
        )
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, from sharding.mesh, got {type(mesh).__name__}")
    # An equinox module of parameters is callable too, but it is a pytree with leaves, whereas a function is a leaf itself.
    is_maker = callable(params) and jax.tree_util.all_leaves([params])
    if log_every is None:
        given = () if not isinstance(out_dir, RunDirectory) else (out_dir.checkpoint_every, out_dir.snapshot_every)
        every = [n for n in (*given, getattr(evaluate, "every", None)) if isinstance(n, int)]
        most, common = max(1, min(100, steps // 5)), math.gcd(*every)
        log_every = max(n for n in range(1, most + 1) if common % n == 0)
    checks.integer("log_every", log_every, low=1)
    checkpoint_every = log_every * max(1, steps // (5 * log_every))
    run = (
        out_dir
        if out_dir is None or isinstance(out_dir, RunDirectory)
        else RunDirectory(out_dir, checkpoint_every=checkpoint_every)
    )
    if mesh is None and jax.device_count() > 1:
        mesh = sharding.mesh()
    step = make_step(objective, optimizer, ema=ema)
    init_key, train_key = jax.random.split(jax.random.key(seed))

    if teacher is not None and not feed and isinstance(objective, objectives.Objective):
        made = jax.eval_shape(params, init_key) if is_maker else params
        batch = jax.eval_shape(dataset.batch, dataset.data, jnp.int32(0))
        _check_teacher_is_read(objective, made, batch, teacher)

    def make_state(init_key: Key, train_key: Key, teacher: Params) -> TrainState:
        made = params(init_key) if is_maker else params
        return init_state(made, optimizer, train_key, ema=ema, teacher=teacher, objective=objective)

    batch_fn: Any = prefetch.batch if isinstance(dataset, prefetch.Feed) else dataset.batch
    data: Any = dataset if isinstance(dataset, prefetch.Feed) else dataset.data
    if mesh is None:
        state, chunk = make_state(init_key, train_key, teacher), make_chunk(step, batch_fn)
    else:
        state = sharding.init(make_state, mesh, init_key, train_key, teacher)
        layout = sharding.parts(state, mesh)
        chunk = make_chunk(step, batch_fn, batch_sharding=sharding.rows(mesh), state_sharding=layout)
        if not feed:
            data = sharding.place(data, sharding.whole(mesh))
    return fit(
        state,
        chunk,
        data,
        total_steps=steps,
        log_every=log_every,
        run=run,
        evaluation=evaluate,
        forgive=forgive,
        hooks=hooks,
    )


def _check_teacher_is_read(objective: objectives.Objective, params: Params, batch: PyTree, teacher: Params) -> None:
    """Checks that the loss depends on the teacher's parameters; otherwise a run that should distil learns from the data."""

    def loss(teacher: Params, params: Params, key: Key, batch: Batch) -> Array:
        return objective(params, key, batch, Context(jnp.int32(0), ema=params, teacher=teacher))[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(loss)(teacher, params, key, batch).jaxpr
    given = jaxpr.invars[: len(jax.tree.leaves(teacher))]
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    if given and not any(id(variable) in read for variable in given):
        raise ValueError(
            f"teacher: expected None, because the loss of {objective.name} does not depend on a teacher; to distil, give the "
            "objective its model too, for example teacher=flow_map.velocity"
        )
