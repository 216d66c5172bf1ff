"""Log-densities of many samples, in blocks: what the experiments with densities share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import options, run
from experiments.shared.model import Model, Problem
from jflow import bases, interpolants, likelihood, nets, samplers, solvers
from jflow.likelihood import Headed, LogDensity, WithLogDensity
from jflow.types import BoundFlowMap, Context, FlowMap

Grid = tuple[float, ...]
# Samples whose densities are computed at once.
BLOCK = 256
TOLERANCE = 1e-4


def grid_of(jumps: int) -> Grid:
    """Equal jumps from the base to the data."""
    return tuple(samplers.uniform_grid(jumps).tolist())


def _blocks(function: Callable[[Any], Any], rows: Any) -> Any:
    return jax.lax.map(function, rows, batch_size=BLOCK)


# --- through jumps ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def pushed(bound: BoundFlowMap, x0: jax.Array, grid: Grid) -> LogDensity:
    """The samples of base points ``[N, ...]``, with the density of the sampler."""
    return _blocks(lambda x: likelihood.push(bound, x, jnp.asarray(grid)), x0)


@functools.partial(jax.jit, static_argnums=2)
def at_data(bound: BoundFlowMap, x: jax.Array, grid: Grid) -> LogDensity:
    """The density of the sampler at data ``[M, ...]``, by inverting its jumps."""
    return _blocks(lambda x: likelihood.log_density(bound, x, np.array(grid)), x)


@functools.partial(jax.jit, static_argnums=(1, 5))
def renoised(
    bound: BoundFlowMap, path: interpolants.Interpolant, keys: jax.Array, x0: jax.Array, x: jax.Array, grid: Grid
) -> tuple[LogDensity, LogDensity]:
    """As ``pushed`` and ``at_data`` of consistency sampling, given the batch of ``x0`` and its noise."""
    before = likelihood.renoised(bound, x0, grid, keys=keys, interpolant=path)
    last = np.array(grid[-2:])
    there = _blocks(lambda x: likelihood.push(bound, x, last, base=before.base), before.states)
    return there, _blocks(lambda x: likelihood.log_density(bound, x, last, base=before.base), x)


@functools.cache
def euler(flow_map: FlowMap) -> FlowMap:
    """The map whose K jumps are K Euler steps of the diagonal."""
    return solvers.solve(flow_map.velocity, "euler", steps=1)


# --- along the solve --------------------------------------------------------------------------------------------------


@functools.cache
def _solved(flow_map: FlowMap, probes: int) -> likelihood.ODEDensity:
    divergence = likelihood.hutchinson(probes) if probes else likelihood.exact_divergence()
    return likelihood.along_ode(flow_map.velocity, divergence, rtol=TOLERANCE, atol=TOLERANCE)


@jax.jit
def solved_samples(bound: BoundFlowMap, x0: jax.Array) -> LogDensity:
    """The samples of the diagonal's ODE from base points, with the exact divergence."""
    return _blocks(lambda x: _solved(bound.flow_map, 0).push(bound.params, x), x0)


@functools.partial(jax.jit, static_argnums=3)
def solved_at_data(bound: BoundFlowMap, x: jax.Array, keys: jax.Array | None = None, probes: int = 0) -> LogDensity:
    """The density of the diagonal's ODE at data; with Hutchinson's estimate where there are probes, which need keys."""
    ode = _solved(bound.flow_map, probes)
    return _blocks(lambda row: ode.log_density(bound.params, row[0], key=row[1]), (x, keys))


def maximum_likelihood(flow_map: FlowMap, divergence: likelihood.Divergence) -> likelihood.MaximumLikelihood:
    """The objective of the diagonal, by adaptive steps.

    With few fixed ones the training learns to make their error large, as ``likelihood.maximum_likelihood`` says.
    """
    return likelihood.maximum_likelihood(flow_map.velocity, divergence=divergence, rtol=1e-3, atol=1e-3)


# --- by the head ------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A network for the divergence head of a map, beside the map's own.

    Attributes:
      flow_map: of ``WithLogDensity`` events; its params are ``Headed``.
      init: ``key -> params`` of the head.
    """

    flow_map: FlowMap
    init: Callable[[jax.Array], Any]


def head_of(flow_map: FlowMap, size: options.Size, event: tuple[int, ...]) -> Head:
    """An embedded network of the configuration's size as a head; one object for all of a size, as for the maps."""
    return _head(flow_map, size.features, size.depth, size.residual, event)


@functools.cache
def _head(flow_map: FlowMap, features: int, depth: int, residual: bool, event: tuple[int, ...]) -> Head:
    module = nets.MultiOutput(nets.MLP(features=features, depth=depth, residual=residual))
    zero = WithLogDensity(jnp.zeros(event, jnp.float32), jnp.float32(0.0))

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.float32(0.0), jnp.float32(1.0), zero)["params"]

    return Head(likelihood.with_head(flow_map, likelihood.scalar_head(nets.from_linen(module))), jax.jit(init))


def head_objective(head: Head, path: interpolants.Interpolant, **choices: Any) -> Callable[..., Any]:
    """The Lagrangian objective of the head's parameters alone, taught by the map's own velocity, at ``context.teacher``."""
    objective = likelihood.head_objective(head.flow_map, path, **choices)

    def of_head(params: Any, key: jax.Array, batch: Any, context: Context | None = None) -> tuple[jax.Array, Any]:
        frozen = jax.lax.stop_gradient(context.teacher)
        return objective(Headed(frozen, params), key, batch, context)

    return of_head


def train_head(
    config: options.Training,
    problem: Problem,
    bound: BoundFlowMap,
    path: interpolants.Interpolant,
    **choices: Any,
) -> BoundFlowMap:
    """Trains the head of a map that has been trained, to ``config.out``/head."""
    head = head_of(bound.flow_map, config.model, problem.event)
    warmup = min(config.optimizer.warmup, config.optimizer.steps // 10)
    config = options.replace(config, out=config.out / "head", warmup=warmup)
    model = Model(head.flow_map, head.init, path)
    objective = head_objective(head, path, **choices)
    this = run.trainer(config, problem, model, objective, teacher=bound.params)
    trained, _ = run.train(config, problem, model, this)
    return head.flow_map.bind(Headed(bound.params, trained.params))


@functools.partial(jax.jit, static_argnums=2)
def head_at(bound: BoundFlowMap, x0: jax.Array, grid: Grid) -> jax.Array:
    """The head's log-density ``[N]`` of the samples of base points."""

    def one(x: jax.Array) -> jax.Array:
        return samplers.jumps(
            bound, WithLogDensity(x, bases.STANDARD_NORMAL.log_density(x)), jnp.asarray(grid)
        ).log_density

    return _blocks(one, x0)
