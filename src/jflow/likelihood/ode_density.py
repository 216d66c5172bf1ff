r"""The log-density along the ODE dx/dt = b_t(x), by one Diffrax solve of the state (x, log rho) (1806.07366)::

    log rho_t(x_t) = log rho_0(x_0) - int_0^t div b_u(x_u) du

in both directions: of a given x at time t, which is carried back to the base, and of the sample that a base point x_0
flows to. With an estimated divergence, whose probes are fixed within a solve, the log-density is unbiased; the density,
its exponential, is then biased upward (see ``jflow.likelihood.importance``).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jflow import bases, checks, solvers, trees
from jflow.bases import Base
from jflow.likelihood.divergence import Divergence, WithLogDensity, augment
from jflow.types import Array, Cond, Event, Key, Params, Time, Velocity, move


class LogDensity(NamedTuple):
    """A point of the model, the base point that flows to it, and its log-density.

    Attributes:
      log_density: log rho(x) in nats, a scalar, float32 at least.
      x: the point, an event.
      x0: the base point, an event.
      valid: whether the log-density holds, a bool: the solve reached its end and the result is finite; through jumps, every
        Jacobian has a positive determinant and every inverse was found.
      sign: of the determinant of the sampler's Jacobian, the product over its jumps: 1.0; -1.0 where the map reverses
        orientation, as in a fold; 0.0 where it is singular. Along a solve it is 1. See ``jflow.likelihood.importance``.
    """

    log_density: Array
    x: Event
    x0: Event
    valid: Array
    sign: Array


@dataclasses.dataclass(frozen=True)
class ODEDensity:
    """The density of a velocity's flow; made by ``along_ode``. Methods work on one sample.

    Attributes:
      base: the law of x0.
      solve: ``(params, s, t, state, cond, key=) -> (mean velocity, SolveStats)`` of ``WithLogDensity``.
    """

    base: Base
    solve: solvers.CountedSolve

    def log_density(
        self, params: Params, x: Event, cond: Cond = None, *, key: Key | None = None, t: Time = 1.0
    ) -> LogDensity:
        """log rho_t(x), by a solve from x at time t back to the base.

        Args:
          params: the velocity's.
          x: an event.
          cond: conditioning of the sample.
          key: of the probes and the velocity; an exact divergence needs none.
          t: a scalar in [0, 1].

        Raises:
          ValueError: if t is not a scalar in [0, 1], x is not finite, the velocity is not shaped like x, the base density
            is not a scalar, or a stochastic estimate has no key.
          TypeError: if x is not floating-point.
          RuntimeError: at an un-jitted call whose solve does not reach its end, or whose result is not finite. Traced,
            ``valid`` is then False.
        """
        x = check_event("x", x)
        end, success = self._flow(params, t, 0.0, x, cond, key)
        return _checked(log_base(self.base, end.x), -end.log_density, x, end.x, success)

    def push(
        self, params: Params, x0: Event, cond: Cond = None, *, key: Key | None = None, t: Time = 1.0
    ) -> LogDensity:
        """The x at time t that the base point x0 flows to, and log rho_t(x): a sample with its log-density.

        Args and errors: as ``log_density``.
        """
        x0 = check_event("x0", x0)
        end, success = self._flow(params, 0.0, t, x0, cond, key)
        return _checked(log_base(self.base, x0), end.log_density, end.x, x0, success)

    def _flow(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond, key: Key | None
    ) -> tuple[WithLogDensity, Array]:
        """The WithLogDensity after the flow from (x, 0) at s to t, one of which is the caller's time and the other 0."""
        _check_time(s)
        _check_time(t)
        start = WithLogDensity(x, jnp.zeros((), trees.at_least_float32(x)))
        v, stats = self.solve(params, s, t, start, cond, key=key)
        return move(start, s, t, v), stats.success


def along_ode(
    velocity: Velocity,
    divergence: Divergence | None = None,
    *,
    base: Base = bases.STANDARD_NORMAL,
    solver: solvers.SolverLike | None = None,
    **choices: Unpack[solvers.Choices],
) -> ODEDensity:
    """The density of the flow of a velocity, from a base at time 0; of a FlowMap, pass its ``velocity``.

    Each evaluation costs 1 + d forward passes with the exact divergence of an event of d entries, 1 + m with m probes.
    Fixed steps give the density of the exact flow with the method's error, not that of the discretised map, whose own
    is ``push`` of its solve.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample.
      divergence: ``exact_divergence()`` by default; or ``hutchinson`` or ``hutch_pp``.
      base: the law of x0.
      solver, choices: as in ``solvers.solve``; tolerances are on the mean velocity of x and
        log-density together, as a root mean square over their d + 1 entries. For ``jax.grad``, give ``steps`` or an
        adjoint "recursive" or "direct".

    Raises:
      ValueError, TypeError: as ``solvers.solve``.
      TypeError: for a base that is not one.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import likelihood
      >>> def velocity(params, t, x, cond=None, *, key=None):
      ...     return jnp.ones_like(x)
      >>> density = likelihood.along_ode(velocity, solver="euler", steps=2)
      >>> found = density.log_density(None, jnp.ones(1, jnp.float32))
      >>> round(float(found.log_density), 4)  # of N(1, 1) at its mean
      -0.9189
    """
    bases.check(base)
    solve = solvers.solve_counted(augment(velocity, divergence), solver, **choices)
    return ODEDensity(base, solve)


def log_base(base: Base, x: Event) -> Array:
    """The base's log-density at x, checked to be one number, in float32 at least.

    Raises:
      ValueError: if it is not a scalar.
      TypeError: for a base that is not one.
    """
    bases.check(base)
    value = jnp.asarray(base.log_density(x))
    checks.scalar("base.log_density(x)", value)
    return value.astype(trees.at_least_float32(value))


def check_event(name: str, x: Event) -> Event:
    """The event as jax arrays: floating-point, and finite where they are concrete.

    Raises:
      TypeError: for other dtypes.
      ValueError: for numbers that are not finite.
    """
    checks.floating(name, x)
    for leaf in jax.tree.leaves(x):
        values = checks.concrete(leaf)
        if values is not None and not np.all(np.isfinite(values.astype(np.float64))):
            raise ValueError(f"{name}: expected finite numbers, got {np.array2string(values, threshold=20)}")
    return jax.tree.map(jnp.asarray, x)


def _check_time(t: Time) -> None:
    checks.scalar("t", t)
    value = checks.concrete(t)
    if value is not None and not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"t: expected a time in [0, 1], got {float(value):g}")


def _checked(base: Array, change: Array, x: Event, x0: Event, success: Array) -> LogDensity:
    log_density = base + change.astype(base.dtype)
    # The base may give minus infinity, outside its support; the change along the flow must be finite.
    valid = success & jnp.isfinite(change) & (log_density < jnp.inf)
    value = checks.concrete(valid)
    if value is not None and not value:
        raise RuntimeError(
            f"log_density: expected a finite number, got {float(base):g} at the base with a change of {float(change):g} "
            "along the flow; the velocity, its divergence or the base density is not finite there"
        )
    return LogDensity(log_density, x, x0, valid, jnp.ones_like(log_density))
