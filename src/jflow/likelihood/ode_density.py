r"""The log-density along the ODE dx/dt = b_t(x), by one Diffrax solve of the state (x, log rho) (1806.07366).

.. math::

    \log \rho_t(x_t) = \log \rho_0(x_0) - \int_0^t \nabla \cdot b_u(x_u)\, du

The solve runs in either direction: backward from a given x at time t to the base, or forward from a base point x_0 to a
sample. With an estimated divergence, whose probes are fixed within a solve, the log-density is unbiased. The density, its
exponential, is then biased upward (see ``jflow.likelihood.importance``).
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
    """A point with its log-density, and the base point that is mapped to it.

    Attributes:
      log_density: log rho(x) in nats, a scalar, in float32 at least.
      x: the point, an event.
      x0: the base point, an event.
      valid: whether the log-density can be used, a bool. For a solve: it reached its end and the result is finite. For jumps:
        every Jacobian has a positive determinant, and every inverse was found.
      sign: the sign of the determinant of the sampler's Jacobian, the product over its jumps: 1.0; -1.0 if the map reverses
        orientation, as in a fold; 0.0 if it is singular. For a solve it is 1.0. See ``jflow.likelihood.importance``.
    """

    log_density: Array
    x: Event
    x0: Event
    valid: Array
    sign: Array


@dataclasses.dataclass(frozen=True)
class ODEDensity:
    """The density of the flow of a velocity, made by ``along_ode``. Its methods take one sample.

    Attributes:
      base: the law of x0.
      solve: ``(params, s, t, state, cond, key=) -> (mean velocity, SolveStats)`` of ``WithLogDensity``.
    """

    base: Base
    solve: solvers.CountedSolve

    def log_density(
        self, params: Params, x: Event, cond: Cond = None, *, key: Key | None = None, t: Time = 1.0
    ) -> LogDensity:
        """The log-density log rho_t(x), by a solve from x at time t backward to the base.

        Args:
          params: the parameters of the velocity.
          x: an event.
          cond: conditioning of the sample.
          key: a PRNG key for the probes and the velocity; not needed with an exact divergence.
          t: a scalar in [0, 1].

        Raises:
          ValueError: if t is not a scalar in [0, 1], x is not finite, the velocity is not shaped like x, the base density
            is not a scalar, or a stochastic estimate has no key.
          TypeError: if x is not floating-point.
          RuntimeError: if, without ``jax.jit``, the solve does not reach its end or the result is not finite. In a traced
            call ``valid`` is then False.
        """
        x = check_event("x", x)
        end, success = self._flow(params, t, 0.0, x, cond, key)
        return _checked(log_base(self.base, end.x), -end.log_density, x, end.x, success)

    def push(
        self, params: Params, x0: Event, cond: Cond = None, *, key: Key | None = None, t: Time = 1.0
    ) -> LogDensity:
        """The sample x at time t to which the base point x0 flows, and its log-density log rho_t(x).

        The other arguments and the errors are those of ``log_density``.
        """
        x0 = check_event("x0", x0)
        end, success = self._flow(params, 0.0, t, x0, cond, key)
        return _checked(log_base(self.base, x0), end.log_density, end.x, x0, success)

    def _flow(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond, key: Key | None
    ) -> tuple[WithLogDensity, Array]:
        """The WithLogDensity after the flow from (x, 0) at s to t, and whether the solve succeeded."""
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
    """The density of the flow of a velocity, from a base at time 0. For a FlowMap, pass its ``velocity``.

    For an event of d entries, each evaluation costs 1 + d forward passes with the exact divergence, and 1 + m with m probes.
    With fixed steps the result approximates the density of the exact flow, with the error of the method. It is not the density
    of the discretised map, which is given by ``push`` of that solve.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample.
      divergence: ``exact_divergence()`` by default; or ``hutchinson`` or ``hutch_pp``.
      base: the law of x0.
      solver, choices: as in ``solvers.solve``. Tolerances apply to the mean velocity of x and the log-density together, as a
        root mean square over their d + 1 entries. For ``jax.grad``, pass ``steps`` or the adjoint "recursive" or "direct".

    Raises:
      ValueError: as ``solvers.solve``.
      TypeError: as ``solvers.solve``, and if ``base`` is not a base.

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
    """The base's log-density at x, a scalar, in float32 at least.

    Raises:
      ValueError: if the log-density is not a scalar.
      TypeError: if ``base`` is not a base.
    """
    bases.check(base)
    value = jnp.asarray(base.log_density(x))
    checks.scalar("base.log_density(x)", value)
    return value.astype(trees.at_least_float32(value))


def check_event(name: str, x: Event) -> Event:
    """The event as jax arrays, after a check that it is floating-point and, if concrete, finite.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: if a concrete value is not finite.
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
    # The base may be minus infinity outside its support, but the change along the flow must be finite.
    valid = success & jnp.isfinite(change) & (log_density < jnp.inf)
    value = checks.concrete(valid)
    if value is not None and not value:
        raise RuntimeError(
            f"log_density: expected a finite number, got {float(base):g} at the base with a change of {float(change):g} "
            "along the flow; the velocity, its divergence or the base density is not finite there"
        )
    return LogDensity(log_density, x, x0, valid, jnp.ones_like(log_density))
