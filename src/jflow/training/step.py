"""One optimizer step, and a chunk of many steps in one dispatch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jflow import checks, objectives
from jflow.reports import Every, First, Largest, Last, Mean, Report, Total, as_reports, leave_out, mean, merged
from jflow.training import ema as averages
from jflow.training.optimizers import Optimizer, check_optimizer, has_updated, with_extra_args
from jflow.training.state import TrainState
from jflow.types import Array, Aux, Batch, Context, ObjectiveFn, Params, PyTree

Metrics = dict[str, Report]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
BatchFn = Callable[[PyTree, Array], Batch]
Chunk = Callable[[TrainState, PyTree, int], tuple[TrainState, Metrics]]
# A sequence of steps, or a traced function of the step.
When = Sequence[int] | Callable[[Array], Array]


def make_step(
    objective: ObjectiveFn,
    optimizer: Optimizer,
    *,
    ema: averages.Averages = (),
    context_ema: str | None = None,
    teacher_updates: When = (),
) -> Step:
    r"""Makes a training step: one call of the optimizer with the mean loss of a batch.

    The step is a pure function ``(state, batch) -> (state, metrics)``. With the parameters :math:`\theta` and the per-row
    losses :math:`\ell_i` of the objective, which draws from the key ``fold_in(state.key, state.step)``, it computes

    .. math::

        L(\theta) = \frac{1}{B} \sum_{i=1}^{B} \ell_i(\theta),

    adds the optimizer's update for the gradient of L to the parameters, and then updates every average in ``ema``.

    The batch and the key depend on ``state.step``. Averages, ``context.step`` (curricula, laws of times) and
    ``teacher_updates`` depend on ``state.updates``, the number of updates that the optimizer has made. With
    ``optax.MultiSteps(optimizer, 4)`` they change at every fourth step (``training.optimizers.has_updated`` lists the known
    wrappers). Put transformations such as weight decay inside ``MultiSteps``. Chained after it, they change the parameters at
    every step, so every step counts as an update.

    The step passes optax's extra arguments to the optimizer: ``value``, the loss; ``grad``, the gradient; and ``value_fn``,
    the loss at other parameters with the same key, batch and context, for line searches.

    Args:
      objective: ``(params, key, batch, context) -> (loss [B], aux)``. Its Context holds the number of updates, one average
        cast to the parameters' dtypes, the teacher and the objective's state. In place of ``Aux`` it may return a mapping of
        metrics.
      optimizer: an optax ``GradientTransformation``, or ``optax.MultiSteps``.
      ema: the averages, as passed to ``init_state``.
      context_ema: the name of the average that the Context holds; by default the first.
      teacher_updates: the steps at which the teacher is replaced by the average that the Context holds, or by the parameters
        if there is no average: a sequence of steps, or a traced ``step -> bool``. Steps are counted by ``state.updates``,
        the number of updates made before the step, and the objective sees the new teacher from that step on. These are the
        rounds of progressive distillation (2202.00512): the student of one round teaches the next. The optimizer's state,
        the averages and the objective's state are not reset.

    Returns:
      The step. Its metrics are reports (``jflow.reports``): the metrics of the objective; ``loss``; ``grad_norm``;
      ``update_norm``, the norm of the parameters' change, over steps that made an update; ``param_norm``, after the step;
      ``finite``, whether loss, gradient and update are finite; ``updates``, the number of updates after the step;
      ``broken_steps``, 1 if the loss or the gradient is not finite but the new parameters are; ``broken_run``, the number of
      consecutive steps, up to this one, that were not finite; ``first_loss`` and ``last_loss``. Means leave out broken steps.

      A step whose loss, gradient or update is not finite does not change the objective's state. Averages are never updated
      with parameters that are not finite.

    Raises:
      ValueError: if ``context_ema`` is not in ``ema``, or ``teacher_updates`` has a negative step. While tracing, the step
        raises it if the state's averages are not those of ``ema``, a teacher to be updated is missing or unlike the
        parameters, the loss does not have rank one, or the objective's state is missing or changes its structure, shapes or
        dtypes.
      TypeError: if ``teacher_updates`` has an entry that is not a whole number. While tracing, the step raises it if
        ``teacher_updates`` does not return a scalar bool, the objective does not return a loss and an Aux, or the state is
        not a TrainState.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jflow import flow_map, interpolants, objectives, parameterizations, training
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * x
      >>> path = interpolants.linear()
      >>> model = flow_map(net, parameterizations.mean_velocity_form(path))
      >>> step = training.make_step(objectives.flow_matching(model, path), optax.sgd(0.1))
      >>> state = training.init_state(jnp.float32(0.5), optax.sgd(0.1), jax.random.key(0))
      >>> state, metrics = jax.jit(step)(state, jnp.ones((8, 2), jnp.float32))
      >>> int(state.step)
      1
    """
    checks.function("objective", objective, "(params, key, batch, context) -> (loss, aux)")
    check_optimizer(optimizer)
    optimizer = with_extra_args(optimizer)
    schedules = averages.resolve(ema)
    due = _when(teacher_updates)
    if context_ema is None:
        context_ema = next(iter(schedules), None)
    elif context_ema not in schedules:
        raise ValueError(f"context_ema: expected one of {', '.join(map(repr, schedules))}, got {context_ema!r}")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"state: expected a TrainState, from init_state, got {type(state).__name__}: a step takes (state, batch), "
                "and make_chunk takes (step, batch_fn)"
            )
        if set(state.ema) != set(schedules):
            raise ValueError(f"state.ema: expected the averages {sorted(schedules)}, got {sorted(state.ema)}")
        _check_objective_state(objective, state)
        followed = None if context_ema is None else averages.as_params(state.ema[context_ema], state.params)
        teacher = state.teacher
        if due is not None:
            teacher = _next_teacher(due(state.updates), teacher, followed, state.params)
        context = Context(state.updates, followed, teacher, state.objective_state)

        def mean_loss(params: Params) -> tuple[Array, tuple[Array, Aux]]:
            # Make the key inside, since a line search calls this again; a key from outside would be used twice.
            key = jax.random.fold_in(state.key, state.step)
            return _mean_loss(*objectives.call(objective, params, key, batch, context))

        (loss, (rows, aux)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        # Cast to the default float dtype, because optax's backtracking transposes this function with a Python 1.0.
        value_fn = lambda params: mean_loss(params)[0].astype(float)  # noqa: E731
        params, opt_state = _optimize(optimizer, state, loss, grads, value_fn)
        # Measure the actual change: rounding may have removed an update, and keeping the updates would cost another pass.
        change = jax.tree.map(jnp.subtract, params, state.params)
        grad_norm, update_norm = _norm(grads), _norm(change)
        # If the change is finite, so are the new parameters.
        alive = jnp.isfinite(update_norm)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & alive
        updated = has_updated(state.opt_state, opt_state, update_norm != 0)
        new = TrainState(
            step=state.step + 1,
            updates=state.updates + updated.astype(jnp.int32),
            broken=jnp.where(finite, 0, state.broken + 1),
            params=params,
            opt_state=opt_state,
            ema=_next_averages(schedules, state, params, updated & alive),
            key=state.key,
            teacher=teacher,
            objective_state=_next_objective_state(state.objective_state, aux.state, finite),
        )
        broken = alive & ~finite
        metrics = {
            **as_reports(aux.metrics),
            "loss": Mean(loss * rows, rows),
            "grad_norm": mean(grad_norm),
            "update_norm": Mean(jnp.where(updated, update_norm, 0.0), updated.astype(update_norm.dtype)),
            "param_norm": Last(_norm(params)),
            "finite": Every(finite),
            "updates": Last(new.updates),
            "broken_steps": Total(broken.astype(jnp.int32)),
            "broken_run": Largest(new.broken),
            "first_loss": First(loss),
            "last_loss": Last(loss),
        }
        return new, leave_out(metrics, broken)

    return step


def make_chunk(
    step: Step,
    batch_fn: BatchFn,
    *,
    batch_sharding: NamedSharding | None = None,
    state_sharding: PyTree = None,
    donate: bool = True,
) -> Chunk:
    """Makes a chunk: a jitted ``(state, data, steps) -> (state, metrics)`` that takes ``steps`` steps in one dispatch.

    ``steps`` is static, so each value is compiled separately. The batches are ``batch_fn(data, state.step)``, so they depend
    on the absolute step only. The state is donated, so the state passed in cannot be used after the call.

    Args:
      step: the function from ``make_step``.
      batch_fn: ``(data, step) -> batch``; a pure function, which is traced.
      batch_sharding: the sharding of the leading axis of every leaf of a batch, or None.
      state_sharding: the sharding of the returned state, or a pytree of shardings; by default replicated over the mesh of
        ``batch_sharding``.
      donate: whether the state is donated.

    Returns:
      The chunk. Its metrics are those of the step, merged over the steps of the chunk.

    Raises:
      TypeError: if ``step`` or ``batch_fn`` is not a function of two arguments, or ``batch_sharding`` not a NamedSharding;
        while tracing, if the step does not return a state and metrics, as when the two functions are swapped.
    """
    checks.accepts("step", step, "(state, batch) -> (state, metrics), from make_step", 2, model=False)
    checks.accepts("batch_fn", batch_fn, "(data, step) -> batch, as dataset.batch", 2, model=False)
    if batch_sharding is not None and not isinstance(batch_sharding, NamedSharding):
        raise TypeError(f"batch_sharding: expected a NamedSharding, got {type(batch_sharding).__name__}")
    if state_sharding is None and batch_sharding is not None:
        state_sharding = NamedSharding(batch_sharding.mesh, PartitionSpec())

    def chunk(state: TrainState, data: PyTree, steps: int) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            batch = batch_fn(data, state.step)
            if batch_sharding is not None:
                batch = jax.lax.with_sharding_constraint(batch, batch_sharding)
            found = step(state, batch)
            # A Batch and a TrainState are tuples too.
            if type(found) is not tuple or len(found) != 2 or not isinstance(found[0], TrainState):
                raise TypeError(
                    "step: expected a function (state, batch) -> (state, metrics), from make_step, it returned "
                    f"{type(found).__name__}; make_chunk takes (step, batch_fn)"
                )
            state, metrics = found
            # The norm needs a pass over all parameters, so compute it once per chunk.
            return state, {name: value for name, value in metrics.items() if name != "param_norm"}

        # Objectives read this mesh so that each device evaluates its own rows.
        with (
            contextlib.nullcontext()
            if batch_sharding is None
            else jax.sharding.use_abstract_mesh(batch_sharding.mesh.abstract_mesh)
        ):
            state, stacked = jax.lax.scan(body, state, None, length=steps)
        return state, {**merged(stacked), "param_norm": Last(_norm(state.params))}

    return jax.jit(chunk, static_argnums=2, donate_argnums=(0,) if donate else (), out_shardings=(state_sharding, None))


def _mean_loss(loss: Array, aux: Aux) -> tuple[Array, tuple[Array, Aux]]:
    """The mean of the loss, and the pair (number of rows, aux)."""
    wide = averages.widen(loss)
    return jnp.mean(wide), (jnp.asarray(len(loss), wide.dtype), aux)


def _optimize(
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    loss: Array,
    grads: Params,
    value_fn: Callable[[Params], Array],
) -> tuple[Params, PyTree]:
    """The parameters and the optimizer's state after one call of the optimizer."""
    # Optax's arithmetic (decay**count) fails under strict dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.tree.structure(jax.eval_shape(optimizer.init, state.params))
        if (got := jax.tree.structure(state.opt_state)) != expected:
            raise ValueError(f"state.opt_state: expected that of this optimizer, {expected}, got {got}")
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=loss, grad=grads, value_fn=value_fn
        )
        return optax.apply_updates(state.params, updates), opt_state


def _next_averages(
    schedules: Mapping[str, averages.Schedule], state: TrainState, params: Params, moves: Array
) -> dict[str, Params]:
    """The averages after a step; unchanged unless ``moves``."""

    def weight(schedule: averages.Schedule) -> Array:
        found = jnp.asarray(schedule(state.updates))
        return jnp.where(moves, found, jnp.zeros_like(found))

    return {name: averages.update(state.ema[name], params, weight(schedule)) for name, schedule in schedules.items()}


def _norm(tree: PyTree) -> Array:
    """The Euclidean norm over all leaves, accumulated in at least float32."""
    # On CPU a dot product takes half the time of a sum of squares, and it needs no reshape of sharded arrays.
    wide = [averages.widen(leaf) for leaf in jax.tree.leaves(tree)]
    squares = [jnp.tensordot(leaf, leaf, leaf.ndim, precision=jax.lax.Precision.HIGHEST) for leaf in wide]
    dtype = max((square.dtype for square in squares), key=lambda d: d.itemsize, default=jnp.float32)
    return jnp.sqrt(sum((square.astype(dtype) for square in squares), jnp.zeros((), dtype)))


def _when(steps: When) -> Callable[[Array], Array] | None:
    """A function of the traced step that says whether the teacher is due for an update; None for never."""
    if callable(steps):

        def due(step: Array) -> Array:
            now = steps(step)
            if jnp.shape(now) != () or jnp.result_type(now) != jnp.bool_:
                raise TypeError(f"teacher_updates: expected a function step -> scalar bool, it returned {now}")
            return jnp.asarray(now)

        return due
    if not isinstance(steps, Sequence):
        raise TypeError(f"teacher_updates: expected a sequence of steps, or a function of the step, got {steps!r}")
    values = [checks.integer("teacher_updates", value) for value in steps]
    if not values:
        return None
    return lambda step: jnp.any(step == jnp.asarray(values, step.dtype))


def _next_teacher(due: Array, teacher: Params, followed: Params, params: Params) -> Params:
    new = params if followed is None else followed
    if teacher is None:
        raise ValueError("teacher_updates: expected a teacher in the state (init_state(..., teacher=...)), got None")
    checks.same_structure("state.teacher", teacher, "the parameters", params)
    got, expected = (jax.tree.map(lambda leaf: jnp.result_type(leaf).name, tree) for tree in (teacher, params))
    if got != expected:
        raise ValueError(f"state.teacher: expected the parameters' dtypes, {expected}, got {got}")
    return jax.lax.cond(due, lambda: new, lambda: teacher)


def _check_objective_state(objective: ObjectiveFn, state: TrainState) -> None:
    """Checks that the training state was made for this objective."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.eval_shape(lambda key: objectives.init(objective, key, state.params), key)
    if (got := jax.tree.structure(state.objective_state)) != jax.tree.structure(expected):
        raise ValueError(
            f"state.objective_state: expected what the objective's init makes, {jax.tree.structure(expected)}, got {got}: "
            "make the state with init_state(..., objective=objective)"
        )


def _next_objective_state(state: PyTree, new: PyTree, finite: Array) -> PyTree:
    """The objective's next state; a step that is not finite does not change it."""

    def kind(tree: PyTree) -> Any:
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)

    if jax.tree.structure(new) != jax.tree.structure(state) or kind(new) != kind(state):
        raise ValueError(f"aux.state: expected the state's own kind, {kind(state)}, got {kind(new)}")
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
