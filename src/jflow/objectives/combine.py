"""Combines objectives: training stages in sequence, or a weighted sum of losses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jflow import checks, trees
from jflow.objectives.calling import CALL, call, init
from jflow.reports import Report, as_reports
from jflow.types import Array, Aux, Batch, Context, Key, ObjectiveFn, Params, PyTree, as_context


@dataclasses.dataclass(frozen=True)
class Stages:
    """An objective that evaluates one of several stages, depending on the step; ``sequence`` makes it.

    Attributes:
      starts: the first step of each stage.
      objectives: the objectives of the stages. The state is the tuple of their states, or ``()`` if no stage has a state.
    """

    starts: tuple[int, ...]
    objectives: tuple[ObjectiveFn, ...]

    def init(self, key: Key, params: Params) -> PyTree:
        """Returns the initial states of all stages."""
        return _init_all(self.objectives, key, params)

    def __call__(self, params: Params, key: Key, batch: Batch, context: Context | None = None) -> tuple[Array, Aux]:
        """Returns the loss of each row in the current stage, and the metrics of all stages.

        The metrics of the other stages are neutral: they do not contribute to averages. A report per row becomes its mean
        over the rows: ``aux.metrics["diagonal_rows"]`` is the share of diagonal rows in the current stage, not a mask.
        """
        context = as_context(context)
        states = _states(self.objectives, key, params, context)
        operands = (params, key, batch, context._replace(state=states))
        calls = [_stage(objective, place) for place, objective in enumerate(self.objectives)]
        outputs = [jax.eval_shape(call, *operands) for call in calls]
        union: dict[str, Report] = {name: report for _, aux in outputs for name, report in aux.metrics.items()}
        width = outputs[0][0].dtype

        def branch(call: Callable[..., tuple[Array, Aux]]) -> Callable[..., tuple[Array, Aux]]:
            def padded(*operands: Any) -> tuple[Array, Aux]:
                loss, aux = call(*operands)
                metrics = {name: aux.metrics.get(name, report.neutral()) for name, report in union.items()}
                return loss.astype(width), aux._replace(metrics=metrics)

            return padded

        index = jnp.sum(jnp.asarray(context.step) >= jnp.asarray(self.starts, jnp.int32)[1:])
        loss, aux = jax.lax.switch(index, [branch(call) for call in calls], *operands)
        return loss, aux._replace(state=_whole(aux.state))


def sequence(stages: Sequence[tuple[int, ObjectiveFn]]) -> ObjectiveFn:
    """Makes an objective that trains in stages.

    Each stage is a pair (first step, objective), for example ``[(0, flow_matching), (2000, lsd)]``. Only the current stage
    is computed (``jax.lax.switch`` on ``context.step``), so a first stage of flow matching costs no more than flow matching
    alone. The metrics of the other stages are neutral.

    Raises:
      ValueError: if there is no stage, the first does not start at step 0, or the first steps do not increase.
      TypeError: if a stage is not a pair of an integer and a function.
    """
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise TypeError(f"stages: expected a sequence of (first step, objective), got {type(stages).__name__}")
    for stage in stages:
        if not isinstance(stage, tuple) or len(stage) != 2:
            raise TypeError(f"stages: expected pairs (first step, objective), got {type(stage).__name__}")
    starts = [checks.integer("stages: first step", start) for start, _ in stages]
    if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"stages: expected first steps that increase from 0, got {starts}")
    for _, objective in stages:
        checks.accepts("stages", objective, CALL, 4, model=False)
    if len(stages) == 1:
        return stages[0][1]
    return Stages(tuple(starts), tuple(objective for _, objective in stages))


@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """The weighted sum of the losses of several objectives; ``weighted_sum`` makes it.

    Attributes:
      names: the prefixes of the terms' metrics; "" adds no prefix.
      weights: the weights of the losses.
      objectives: the terms. The state is the tuple of their states, or ``()`` if no term has a state.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    objectives: tuple[ObjectiveFn, ...]

    def init(self, key: Key, params: Params) -> PyTree:
        """Returns the initial states of all terms."""
        return _init_all(self.objectives, key, params)

    def __call__(self, params: Params, key: Key, batch: Batch, context: Context | None = None) -> tuple[Array, Aux]:
        """Returns the weighted sum of the losses of each row, and the metrics of all terms.

        Each term splits the batch with its own key: ``aux.metrics["diagonal_rows"]`` is the mask of the first term, and
        ``aux.metrics["NAME_diagonal_rows"]`` that of the term NAME.
        """
        context = as_context(context)
        states = _states(self.objectives, key, params, context)
        keys = jax.random.split(key, len(self.objectives))
        loss, next_states, metrics = None, [], {}
        terms = zip(self.names, self.weights, self.objectives, keys, states, strict=True)
        for name, weight, objective, its_key, state in terms:
            added, aux = call(objective, params, its_key, batch, context._replace(state=state))
            loss = trees.scale(weight, added) if loss is None else trees.axpy(weight, added, loss)
            next_states.append(aux.state)
            named = {f"{name}_{entry}" if name else entry: report for entry, report in aux.metrics.items()}
            if both := metrics.keys() & named.keys():
                raise ValueError(f"{name}: expected another name, for two objectives would report {sorted(both)}")
            metrics |= named
        assert loss is not None
        return loss, Aux(_whole(next_states), metrics)


def weighted_sum(objective: ObjectiveFn, **more: tuple[ObjectiveFn, float]) -> ObjectiveFn:
    """Makes the weighted sum of objectives that share params and batch, for example ``weighted_sum(lsd, head=(head, 0.1))``.

    Args:
      objective: the first term, with weight one; its metrics keep their names.
      **more: the other terms by name, each a pair (objective, weight). The metrics of the term NAME are called NAME_metric.

    Returns:
      The objective. When called, it raises ValueError if two metrics have the same name.

    Raises:
      ValueError: if a weight is negative or not finite.
      TypeError: if an objective is not a function, or a term is not a pair (objective, number).
    """
    checks.accepts("objective", objective, CALL, 4, model=False)
    for name, pair in more.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair (objective, weight), got {type(pair).__name__}")
        checks.accepts(name, pair[0], CALL, 4, model=False)
    weights = [checks.number(name, weight, low=0.0) for name, (_, weight) in more.items()]
    return WeightedSum(("", *more), (1.0, *weights), (objective, *(other for other, _ in more.values())))


def _init_all(objectives: Sequence[ObjectiveFn], key: Key, params: Params) -> PyTree:
    """Returns the initial states of the parts, or ``()`` if no part has a state, so that callers need not pass one."""
    keys = jax.random.split(key, len(objectives))
    return _whole(init(objective, k, params) for objective, k in zip(objectives, keys, strict=True))


def _whole(states: Iterable[PyTree]) -> PyTree:
    found = tuple(states)
    return found if jax.tree.leaves(found) else ()


def _states(objectives: Sequence[ObjectiveFn], key: Key, params: Params, context: Context) -> tuple[PyTree, ...]:
    """Returns the states of the parts.

    Raises:
      ValueError: if ``context.state`` does not have the structure that ``init`` makes.
    """
    expected = jax.eval_shape(lambda *args: _init_all(objectives, *args), key, params)
    wanted, got = jax.tree.structure(expected), jax.tree.structure(context.state)
    if got != wanted:
        raise ValueError(f"context.state: expected what objectives.init makes, {wanted}, got {got}")
    return context.state if jax.tree.leaves(expected) else ((),) * len(objectives)


def _stage(objective: ObjectiveFn, place: int) -> Callable[..., tuple[Array, Aux]]:
    """Wraps the stage at this position so that it takes and returns the states of all stages."""

    def staged(params: Params, key: Key, batch: Batch, context: Context) -> tuple[Array, Aux]:
        states = context.state
        loss, aux = call(objective, params, key, batch, context._replace(state=states[place]))
        return loss, Aux((*states[:place], aux.state, *states[place + 1 :]), as_reports(aux.metrics))

    return staged
