"""Samples by jumps of a flow map along a grid, towards the data or, with a map that goes backward, towards the base."""

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
    r"""The sampler that jumps from each time of a grid to the next.

    .. math:: x_{k+1} = X_{t_k, t_{k+1}}(x_k)

    Attributes:
      bound: the flow map with its parameters.
      keyed: whether to pass the step's key to the network (for example for dropout). If False, it is called without a key.

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
        """Returns the state of a sample x0 at time t. The errors are those of ``run``."""
        check_bound(self.bound)
        return start(x0, t, cond)

    def step(self, key: Key | None, state: State, t: Time) -> tuple[State, Info]:
        """Jumps from ``state.t`` to t with one call of the map. The key may be None unless ``keyed``."""
        if self.keyed:
            check_key(key)
        t = next_time(state, t)
        x = self.bound.jump(state.t, t, state.x, state.cond, key=key if self.keyed else None)
        return state._replace(x=x, t=t), Info(t, no_noise(state), jnp.int32(1))

    def check(self, grid: Grid) -> None:
        """Checks that the jumps of a concrete grid are inside the map's domain.

        Raises:
          ValueError: if a jump is outside the domain.
          TypeError: if ``bound`` is not a BoundFlowMap.
        """
        check_bound(self.bound)
        self.bound.domain.check_grid(grid)


def jumps(bound: BoundFlowMap, x0: Event, grid: Grid, cond: Cond = None, *, key: Key | None = None) -> Event:
    """Jumps along a grid for one sample. Returns the state at grid[-1], shaped like x0.

    Args:
      bound: the flow map with its parameters.
      x0: the state at grid[0], a pytree of floating-point arrays.
      grid: the times, ``[K + 1]``; every jump must be inside ``bound.domain``. Ascending times generate.
      cond: conditioning of the sample.
      key: a PRNG key for the network (for example for dropout), folded with each step; None to call it without a key.

    Raises:
      ValueError: if a jump of the grid is outside the domain. The values of a traced grid are not checked.
      TypeError: if ``bound`` is not a BoundFlowMap, or x0 is not floating-point.

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
    """Returns all states of ``jumps`` for one sample, shaped like x0 with a leading axis K + 1. The first is x0.

    The arguments and errors are those of ``jumps``.

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
    """Maps data to noise along a descending grid, for one sample.

    A map whose domain goes backward jumps along the grid. For any other map, the velocity on its diagonal is integrated from
    grid[0] to grid[-1] by an adaptive solve, and a UserWarning is raised. The solve ignores the inner times of the grid, and
    it needs a trained diagonal, which a consistency model may not have.

    Args:
      bound: the flow map with its parameters.
      x1: the state at grid[0].
      grid: strictly descending times, ``[K + 1]``.
      cond: conditioning of the sample.
      key: a PRNG key for the network; None to call it without a key.
      solver, choices: the options of the solve, as in ``solvers.solve``.

    Returns:
      The state at grid[-1], shaped like x1.

    Raises:
      ValueError: if the grid does not descend, a jump is outside the domain, or options of a solve are given for a map that
        goes backward.
      TypeError: if ``bound`` is not a BoundFlowMap, or x1 is not floating-point.
      RuntimeError: outside ``jit``, if the solve does not finish within ``max_steps``.

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
