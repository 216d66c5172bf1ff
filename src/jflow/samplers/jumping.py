"""Jumps of a flow map along a grid, towards the data or, by a map that goes backward, towards the base."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, solvers
from jflow.samplers.steps import (
    Grid,
    Info,
    State,
    check_bound,
    check_key,
    next_time,
    no_noise,
    run,
    run_path,
    start,
    times_of,
)
from jflow.types import BoundFlowMap, Cond, Event, Key, Time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Jumps:
    """The sampler x_{k+1} = X_{t_k, t_{k+1}}(x_k).

    Attributes:
      bound: the flow map with its parameters.
      keyed: whether the network gets the key of the step (dropout and the like); else it is called without one.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> print(samplers.run(samplers.Jumps(bound), None, x0, samplers.uniform_grid(2)))
      [2. 2.]
    """

    bound: BoundFlowMap
    keyed: bool = dataclasses.field(default=False, metadata={"static": True})

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """The state of a sample x0 at time t; errors as ``run``."""
        check_bound(self.bound)
        return start(x0, t, cond)

    def step(self, key: Key | None, state: State, t: Time) -> tuple[State, Info]:
        """X_{state.t, t}(x); one call. The key may be None unless ``keyed``."""
        if self.keyed:
            check_key(key)
        t = next_time(state, t)
        x = self.bound.jump(state.t, t, state.x, state.cond, key=key if self.keyed else None)
        return state._replace(x=x, t=t), Info(t, no_noise(state), jnp.int32(1))

    def check(self, grid: Grid) -> None:
        """Refuses a concrete grid with a jump outside the map's domain.

        Raises:
          ValueError: naming the jump; TypeError for anything but a BoundFlowMap.
        """
        check_bound(self.bound)
        self.bound.domain.check_grid(grid)


def jumps(bound: BoundFlowMap, x0: Event, grid: Grid, cond: Cond = None, *, key: Key | None = None) -> Event:
    """The state at grid[-1] after one jump between each two times of the grid, of one sample; shaped like x0.

    Args:
      bound: the flow map with its parameters.
      x0: the state at grid[0], a pytree of floating-point arrays.
      grid: the times, ``[K + 1]``, every jump within ``bound.domain``; ascending generates.
      cond: conditioning of the sample.
      key: passed on to the network, one per jump (dropout and the like); None for none.

    Raises:
      ValueError: for a grid with a jump outside the domain (the values of a traced grid are not checked).
      TypeError: for anything but a BoundFlowMap, or x0 that is not floating-point.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> print(samplers.jumps(bound, x0, samplers.uniform_grid(2)))
      [2. 2.]
    """
    return run(Jumps(bound, keyed=key is not None), key, x0, grid, cond)


def jumps_path(bound: BoundFlowMap, x0: Event, grid: Grid, cond: Cond = None, *, key: Key | None = None) -> Event:
    """All states x_0, X_{t_0,t_1}(x_0), X_{t_1,t_2}(...), ... of ``jumps``: shaped like x0 with a leading axis K + 1.

    Arguments and errors: as ``jumps``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> samplers.jumps_path(bound, x0, samplers.uniform_grid(2)).tolist()
      [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    """
    return run_path(Jumps(bound, keyed=key is not None), key, x0, grid, cond)[0]


def encode(
    bound: BoundFlowMap,
    x1: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key | None = None,
    solver: solvers.SolverLike | None = None,
    **choices: Unpack[solvers.Choices],
) -> Event:
    """Data to noise along a descending grid, of one sample.

    A map whose domain goes backward jumps along the grid. Any other is solved: its diagonal is integrated
    from grid[0] to grid[-1] by an adaptive solve, and a UserWarning says so. The inner times of the grid then
    do not matter, the cost is that of the solve, and the diagonal must have been trained (a consistency
    model's may not be).

    Args:
      bound: the flow map with its parameters.
      x1: the state at grid[0].
      grid: strictly descending times, ``[K + 1]``.
      cond: conditioning of the sample.
      key: passed on to the network; None for none.
      solver, choices: of the solve, as in ``solvers.solve``.

    Returns:
      The state at grid[-1], shaped like x1.

    Raises:
      ValueError: for a grid that does not descend; for a map that goes backward, for a jump outside its domain, or options of
        a solve that it does not need.
      TypeError: for anything but a BoundFlowMap, or x1 that is not floating-point.
      RuntimeError: at an un-jitted call whose solve needs more than ``max_steps``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import samplers, solvers
      >>> def velocity(params, t, x, cond=None, *, key=None):
      ...     return 2.0 * jnp.ones_like(x)
      >>> bound = solvers.solve(velocity, "euler", steps=2).bind(None)
      >>> print(samplers.encode(bound, jnp.zeros(2, jnp.float32), samplers.uniform_grid(2)[::-1]))
      [-2. -2.]
    """
    check_bound(bound)
    checks.floating("x1", x1)
    times = times_of(x1, grid)
    values = checks.concrete(grid)
    if values is not None and not (np.diff(values) < 0).all():
        raise ValueError(f"grid: expected strictly descending times, got {values}")
    if bound.domain.backward:
        if solver is not None or choices:
            given = ", ".join(["solver"] * (solver is not None) + sorted(choices))
            raise ValueError(
                f"{given}: expected none for a map whose domain goes backward, which jumps and is not solved"
            )
        return jumps(bound, x1, grid, cond, key=key)
    warnings.warn(
        f"encode: the map's domain, {bound.domain.name}, has no backward direction: its diagonal is solved",
        UserWarning,
        stacklevel=2,
    )
    solved = solvers.solve(bound.flow_map.velocity, solver, **choices)
    return solved.bind(bound.params).jump(times[0], times[-1], jax.tree.map(jnp.asarray, x1), cond, key=key)
