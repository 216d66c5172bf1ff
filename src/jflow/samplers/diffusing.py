"""The stochastic process with the marginals of a flow, from a map's diagonal."""

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
    """The sampler of ``solvers.sde``, with the velocity on the map's diagonal, which is called without a key.

    Attributes:
      bound: the flow map with its parameters; only its velocity is used, whatever its domain.
      interpolant: the path that the map was made for.
      method, diffusion: as in ``solvers.sde``.
      base: a ``bases.Normal``.
    """

    bound: BoundFlowMap
    interpolant: Interpolant = dataclasses.field(metadata={"static": True})
    method: str = dataclasses.field(default="euler", metadata={"static": True})
    diffusion: float | Callable[[Time], Array] = dataclasses.field(default=1.0, metadata={"static": True})
    base: bases.Base = bases.STANDARD_NORMAL

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """The state of a sample x0 at time t; narrow dtypes are also kept in float32, where small steps are not lost.

        Raises:
          ValueError, TypeError: as ``solvers.sde``, and for a t that is not a scalar.
        """
        self._step()
        state = start(x0, t, cond)
        dtype = trees.at_least_float32(state.x)
        narrow = any(leaf.dtype != dtype for leaf in jax.tree.leaves(state.x))
        return state._replace(wide=widen(state.x, dtype) if narrow else None)

    def step(self, key: Key, state: State, t: Time) -> tuple[State, Info]:
        """One step of the method to a time t > ``state.t``; one call of the velocity with "euler", two with "heun"."""
        check_key(key)
        t = next_time(state, t)
        y = state.x if state.wide is None else state.wide
        y, noise = self._step()(self.bound.params, key, state.t, t, y, state.cond, like=state.x)
        info = Info(t, noise, jnp.int32(1 if self.method == "euler" else 2))
        return State(cast_like(y, state.x), t, state.cond, None if state.wide is None else y), info

    def check(self, grid: Grid) -> None:
        """Refuses a concrete grid that is not strictly increasing within [0, 1], and choices that ``init`` refuses.

        Raises:
          ValueError, TypeError: naming what came.
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
    """The SDE with the marginals of the flow, ``SDE``, of one sample: the state at grid[-1], shaped like x0.

    Args:
      bound: the flow map with its parameters; only its velocity is used, whatever its domain.
      x0: the state at grid[0].
      grid: strictly ascending times, ``[N]``: as many as the accuracy needs.
      cond: conditioning of the sample.
      key: of the noise.
      interpolant: the path that the map was made for.
      method, diffusion: as in ``solvers.sde``.
      base: a ``bases.Normal``.

    Raises:
      ValueError, TypeError: as ``solvers.sde``; TypeError for anything but a BoundFlowMap.

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
    """All states of ``sde``, of one sample: shaped like x0 with a leading axis N; the first is x0.

    Arguments and errors: as ``sde``.

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
