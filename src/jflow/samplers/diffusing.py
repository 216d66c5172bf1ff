"""Samples the stochastic process with the marginals of a flow, with the velocity on a map's diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow import bases, solvers, trees
from jflow.interpolants import Interpolant
from jflow.samplers.steps import Grid, Info, State, check_bound, check_key, next_time, run, run_path, start
from jflow.solvers.ode import cast_like, check_times, widen
from jflow.types import Array, BoundFlowMap, Cond, Event, Key, Time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SDE:
    """The sampler of the SDE of ``solvers.sde``, with the velocity on the map's diagonal, called without a key.

    Attributes:
      bound: the flow map with its parameters; only its velocity is used, so its domain does not matter.
      interpolant: the path for which the map was made.
      method, diffusion: as in ``solvers.sde``.
      base: a ``bases.Normal``.
    """

    bound: BoundFlowMap
    interpolant: Interpolant = dataclasses.field(metadata={"static": True})
    method: str = dataclasses.field(default="euler", metadata={"static": True})
    diffusion: float | Callable[[Time], Array] = dataclasses.field(default=1.0, metadata={"static": True})
    base: bases.Base = bases.STANDARD_NORMAL

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """Returns the state of a sample x0 at time t. Narrow dtypes are also kept in float32, so that small steps add up.

        Raises:
          ValueError: as ``solvers.sde``, and if t is not a scalar.
          TypeError: as ``solvers.sde``, and if x0 is not floating-point.
        """
        self._step()
        state = start(x0, t, cond)
        dtype = trees.at_least_float32(state.x)
        narrow = any(leaf.dtype != dtype for leaf in jax.tree.leaves(state.x))
        return state._replace(wide=widen(state.x, dtype) if narrow else None)

    def step(self, key: Key, state: State, t: Time) -> tuple[State, Info]:
        """Makes one step to a time t > ``state.t``. It calls the velocity once with "euler", twice with "heun"."""
        check_key(key)
        t = next_time(state, t)
        y = state.x if state.wide is None else state.wide
        y, noise = self._step()(self.bound.params, key, state.t, t, y, state.cond, like=state.x)
        info = Info(t, noise, jnp.int32(1 if self.method == "euler" else 2))
        return State(cast_like(y, state.x), t, state.cond, None if state.wide is None else y), info

    def check(self, grid: Grid) -> None:
        """Checks the sampler's options, and that a concrete grid is strictly increasing within [0, 1].

        Raises:
          ValueError, TypeError: if an option or the grid is not valid.
        """
        self._step()
        check_times("grid", grid, increasing=True)

    def _step(self) -> Callable[..., tuple[Event, Event]]:
        check_bound(self.bound)
        velocity = self.bound.flow_map.velocity
        choices = {"method": self.method, "diffusion": self.diffusion, "base": self.base}
        return solvers.sde_step(velocity, self.interpolant, **choices)


def sde(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key,
    interpolant: Interpolant,
    method: str = "euler",
    diffusion: float | Callable[[Time], Array] = 1.0,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> Event:
    """Simulates the SDE with the marginals of the flow (``SDE``) for one sample. Returns the state at grid[-1], shaped like x0.

    Args:
      bound: the flow map with its parameters; only its velocity is used, so its domain does not matter.
      x0: the state at grid[0].
      grid: strictly ascending times, ``[N]``; more times give a higher accuracy.
      cond: conditioning of the sample.
      key: a PRNG key for the noise.
      interpolant: the path for which the map was made.
      method, diffusion: as in ``solvers.sde``.
      base: a ``bases.Normal``.

    Raises:
      ValueError: as ``solvers.sde``.
      TypeError: as ``solvers.sde``, and if ``bound`` is not a BoundFlowMap.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> samplers.sde(bound, x0, samplers.uniform_grid(2), key=jax.random.key(0), interpolant=interpolants.linear()).shape
      (2,)
    """
    return run(SDE(bound, interpolant, method, diffusion, base), key, x0, grid, cond)


def sde_path(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key,
    interpolant: Interpolant,
    method: str = "euler",
    diffusion: float | Callable[[Time], Array] = 1.0,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> Event:
    """Returns all states of ``sde`` for one sample, shaped like x0 with a leading axis N. The first is x0.

    The arguments and errors are those of ``sde``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> samplers.sde_path(
      ...     bound, x0, samplers.uniform_grid(2), key=jax.random.key(0), interpolant=interpolants.linear()
      ... ).shape
      (3, 2)
    """
    return run_path(SDE(bound, interpolant, method, diffusion, base), key, x0, grid, cond)[0]
