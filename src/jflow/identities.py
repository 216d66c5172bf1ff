r"""The identities that a flow map satisfies, as pairs (prediction, target) for one sample.

The residual is prediction - target. It is zero for the exact map. A stop-gradient on either part does not change its
value. The residuals of the tangent, Eulerian, Lagrangian and semigroup identities are

.. math::
    R_T &= v_{t,t}(x) - b_t(x) \\
    R_E &= v_{s,t}(x) - c_s(x) - (t-s) (\partial_s v_{s,t}(x) + \nabla v_{s,t}(x)\, c_s(x)) \\
    R_L &= v_{s,t}(x) + (t-s)\, \partial_t v_{s,t}(x) - c_t(X_{s,t}(x)) \\
    R_S &= v_{s,t}(x) - (1-\gamma) v_{s,u}(x) - \gamma v_{u,t}(X_{s,u}(x)), \quad u = \gamma s + (1-\gamma) t

Here c is a velocity estimate (from the pair, the map's own diagonal, a teacher, ...), and v is any function
``(s, t, x) -> v_{s,t}(x)``, such as a bound FlowMap's ``mean_velocity``. If c is the map's own diagonal, the last three
identities hold for the flow map of any velocity, even for X = id. The tangent identity determines the velocity
(2406.07507, 2505.18825).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow import autodiff, checks, trees
from jflow.types import Array, Event, Time, move

MeanVelocityFn = Callable[[Time, Time, Event], Event]
VelocityFn = Callable[[Time, Event], Event]
Interval = tuple[Array | float, Array | float]


# (function, primals, *tangents) -> (function(*primals), its derivatives along each tangent)
Derivative = Callable[..., tuple[Event, tuple[Event, ...]]]


class Residual(NamedTuple):
    """The residual of an identity for one sample.

    Attributes:
      prediction: the trained side, shaped like x.
      target: the other side, shaped like x.
      tangent: the derivative term without its factor t - s, or its finite difference, shaped like x. None or zeros if the
        residual contains no derivative. A growing norm of it indicates unstable training.
      weight: a scalar factor of the reduced loss; no gradient flows through it.
    """

    prediction: Event
    target: Event
    tangent: Event = None
    weight: Array | float = 1.0

    @property
    def difference(self) -> Event:
        """The residual's value, prediction - target."""
        return trees.sub(self.prediction, self.target)

    def rescaled(self, *, prediction: Array | float, difference: Array | float) -> Residual:
        """Returns a residual with the prediction and the difference multiplied by separate factors.

        The new target is chosen so that the new difference is ``difference`` times this one, and it is under a
        stop-gradient. Use it only if this target gets no gradient: then ``prediction`` scales the derivative of the residual
        and ``difference`` its value.
        """
        scaled = trees.scale(prediction, self.prediction)
        away = trees.scale(difference, self.difference)
        return self._replace(prediction=scaled, target=jax.lax.stop_gradient(trees.sub(scaled, away)))


def forward_mode(function: Callable[..., Event], primals: tuple, *tangents: tuple) -> tuple[Event, tuple[Event, ...]]:
    """Computes a function's value and its exact directional derivative along each tangent; the value is computed once.

    Raises:
      TypeError: if the function has no forward-mode derivative (fused attention kernels, for example). The message suggests
        ``central_difference``.
    """
    if len(tangents) == 1:
        value, out = autodiff.jvp(function, primals, tangents[0])
        return value, (out,)
    value, linear = autodiff.linearize(function, *primals)
    return value, tuple(linear(*tangent) for tangent in tangents)


def finite_difference(step: Array | float) -> Derivative:
    r"""Returns a one-sided finite-difference derivative, which needs no forward-mode differentiation.

    The derivative of f at p along d, with an error of order h, is

    .. math:: \frac{f(p + h d) - f(p)}{h}.

    The time moves by h even if it then lies outside [0, 1] or beyond s = t. A FlowMap raises ValueError for a concrete time
    outside [0, 1], so an eager call can fail near that end. Under ``jit``, times are traced, and the function is evaluated
    outside. ``central_difference`` stays inside.

    Args:
      step: h, a number or a traced scalar, not zero; negative for a backward difference.

    Raises:
      ValueError: if the step is zero or not finite.
      TypeError: if the step is not a number.
    """
    if not isinstance(step, jax.Array):
        checks.number("step", step)
        if step == 0.0:
            raise ValueError("step: expected a number other than zero, got 0")

    def derivative(function: Callable[..., Event], primals: tuple, *tangents: tuple) -> tuple[Event, tuple[Event, ...]]:
        value = function(*primals)
        moved = (function(*_moved(primals, step, t)) for t in tangents)
        return value, tuple(trees.scale(1.0 / step, trees.sub(there, value)) for there in moved)

    return derivative


def central_difference(step: Array | float) -> Derivative:
    r"""Returns a central finite-difference derivative, which needs no forward-mode differentiation.

    The derivative of f at p along d, with an error of order h^2, is

    .. math:: \frac{f(p + h d) - f(p - h d)}{2h}.

    Use it for networks whose kernels have only a reverse-mode rule (cuDNN and Pallas attention). It costs two more calls of
    the function for each direction; ``jax.grad`` differentiates all of them.

    The identities give it the interval in which the time may move without leaving [0, 1] or crossing s = t (a map of one
    direction is not trained beyond its diagonal). It therefore also works in eager calls at the ends of [0, 1], where a
    FlowMap rejects times outside. Without an interval, it evaluates both sides. If h does not fit on one side, the difference
    is one-sided,

    .. math:: \frac{-3 f(p) + 4 f(p + h d) - f(p + 2 h d)}{2h},

    or the same with -h. It is also of second order, with twice the error. h is at most three tenths of the interval, so
    that one side always has room. In an interval of length 0 the derivative is zero; there s = t, and the identities
    multiply the derivative by t - s.

    Args:
      step: h > 0, in units of time: a number, or a traced scalar. Rounding adds an error of order eps/h: about 5e-3 suits
        float32, 1e-5 float64.

    Raises:
      ValueError: if the step is not positive and finite.
      TypeError: if the step is not a number.
    """
    if not isinstance(step, jax.Array):
        checks.number("step", step, low=0.0, open_low=True)
    return _CentralDifference(step)


@dataclasses.dataclass(frozen=True)
class _CentralDifference:
    """Implements ``central_difference``. If there is an interval, the function's first argument is a time inside it."""

    step: Array | float
    interval: Interval | None = None

    def __call__(
        self, function: Callable[..., Event], primals: tuple, *tangents: tuple
    ) -> tuple[Event, tuple[Event, ...]]:
        value = function(*primals)
        near, far, room = _stencil(self.step, primals[0], self.interval)
        out = []
        for direction in tangents:
            # In an interval of length 0, room is 0: the function is evaluated at the point itself.
            there = (function(*_moved(primals, room * a, direction)) for a in (near, far))
            at_near, at_far = (trees.sub(moved, value) for moved in there)
            # The three-point formula of nodes 0, a and b: (b/a (f_a - f_0) - a/b (f_b - f_0))/(b - a).
            slope = trees.combine(far / near, at_near, -near / far, at_far)
            out.append(trees.scale(room / (far - near), slope))
        return value, tuple(out)

    def within(self, interval: Interval) -> Derivative:
        return dataclasses.replace(self, interval=interval)


def _stencil(step: Array | float, time: Array, interval: Interval | None) -> tuple[Array, Array, Array]:
    """Returns the two offsets of a three-point difference, and a factor: 0 in an interval of length 0, else 1."""
    if interval is None:
        h = jnp.asarray(step)
        return -h, h, jnp.ones_like(h)
    low, high = (jnp.asarray(end, jnp.result_type(time)) for end in interval)
    # Three tenths of the interval fit twice on one side, wherever the time lies.
    h = jnp.minimum(jnp.asarray(step).astype(low.dtype), 0.3 * (high - low))
    fits = h > 0.0
    h = jnp.where(fits, h, 1.0)
    both = (time - h >= low) & (time + h <= high)
    side = jnp.where(high - time >= time - low, h, -h)
    return jnp.where(both, -h, side), jnp.where(both, h, 2.0 * side), jnp.where(fits, 1.0, 0.0)


def _moved(primals: tuple, step: Array | float, direction: tuple) -> tuple:
    return tuple(trees.axpy(step, d, p) for p, d in zip(primals, direction, strict=True))


def source_interval(s: Time, t: Time) -> Interval:
    """Returns the interval in which s may move without leaving [0, 1] or crossing t: [0, t] if s <= t, else [t, 1]."""
    return jnp.where(s <= t, jnp.zeros_like(t), t), jnp.where(s <= t, t, jnp.ones_like(t))


def target_interval(s: Time, t: Time) -> Interval:
    """Returns the interval in which t may move without leaving [0, 1] or crossing s: [s, 1] if s <= t, else [0, s]."""
    return jnp.where(s <= t, s, jnp.zeros_like(s)), jnp.where(s <= t, jnp.ones_like(s), s)


def within(derivative: Derivative, interval: Interval) -> Derivative:
    """Restricts a derivative to an interval of times, for functions whose first argument is a time.

    ``central_difference`` then evaluates the function only inside the interval. Other derivatives are returned unchanged.
    """
    limit = getattr(derivative, "within", None)
    return derivative if limit is None else limit(interval)


def scaled(derivative: Derivative, factor: Array | float) -> Derivative:
    """Multiplies derivatives by a factor. A factor r that rises from 0 to 1 is the tangent warm-up (2410.11081, 2506.14603)."""
    return _Scaled(derivative, factor)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Implements ``scaled``."""

    derivative: Derivative
    factor: Array | float

    def __call__(
        self, function: Callable[..., Event], primals: tuple, *tangents: tuple
    ) -> tuple[Event, tuple[Event, ...]]:
        value, out = self.derivative(function, primals, *tangents)
        return value, tuple(trees.scale(self.factor, one) for one in out)

    def within(self, interval: Interval) -> Derivative:
        return dataclasses.replace(self, derivative=within(self.derivative, interval))


def tangent(v: MeanVelocityFn, t: Time, x: Event, velocity: Event) -> Residual:
    r"""Computes the residual of the tangent identity: the map's diagonal minus a velocity estimate b at (t, x).

    .. math:: R_T = v_{t,t}(x) - b

    The estimate gets no gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import identities
      >>> x = jnp.ones(2, jnp.float32)
      >>> residual = identities.tangent(lambda s, t, x: -x, jnp.float32(0.5), x, jnp.zeros(2, jnp.float32))
      >>> print(residual.difference)
      [-1. -1.]
    """
    prediction = v(t, t, x)
    return Residual(prediction, jax.lax.stop_gradient(velocity), trees.zeros_like(prediction))


def eulerian(
    v: MeanVelocityFn,
    s: Time,
    t: Time,
    x: Event,
    velocity: Event,
    *,
    tangent_velocity: Event | None = None,
    stop: str = "target",
    derivative: Derivative = forward_mode,
) -> Residual:
    r"""Computes the residual of the Eulerian identity: the map does not change when its source moves along the flow.

    .. math:: R_E = v_{s,t}(x) - c_s(x) - (t-s) \left( \partial_s v_{s,t}(x) + \nabla v_{s,t}(x)\, c'_s(x) \right)

    Args:
      v: the mean velocity, ``(s, t, x) -> v``.
      s: source time, a scalar.
      t: target time, a scalar.
      x: the point at time s.
      velocity: c_s(x), the estimate that enters linearly.
      tangent_velocity: c'_s(x), the velocity along which v is differentiated; by default ``velocity``.
      stop: the parts under a stop-gradient: "target", everything except the leading v (2505.13447); "spatial", the velocity
        and the spatial derivative (2505.18825); "velocity", the velocities; "none", nothing.
      derivative: ``forward_mode``, ``central_difference(h)`` or ``finite_difference(h)``.

    Returns:
      The Residual.

    Raises:
      ValueError: if ``stop`` is not one of these strings.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import identities
      >>> def v(s, t, x):  # the exact mean velocity of dx/dt = 2
      ...     return 2.0 * jnp.ones_like(x)
      >>> x, s, t = jnp.ones(2, jnp.float32), jnp.float32(0.25), jnp.float32(0.75)
      >>> print(identities.eulerian(v, s, t, x, v(s, s, x)).difference)
      [0. 0.]
    """
    checks.choice("stop", stop, ("target", "spatial", "velocity", "none"))
    sg = jax.lax.stop_gradient if stop != "none" else lambda leaf: leaf
    c = sg(velocity)
    along = c if tangent_velocity is None else sg(tangent_velocity)
    one, zero = jnp.ones_like(s), jnp.zeros_like(s)
    derivative = within(derivative, source_interval(s, t))

    def at_target(s_: Time, x_: Event) -> Event:
        return v(s_, t, x_)

    if stop == "spatial":
        still = trees.zeros_like(along)
        value, (in_time, in_space) = derivative(at_target, (s, x), (one, still), (zero, along))
        in_space = jax.lax.stop_gradient(in_space)
        prediction = trees.axpy(s - t, in_time, value)
        return Residual(prediction, trees.axpy(t - s, in_space, c), trees.add(in_time, in_space))
    value, (total,) = derivative(at_target, (s, x), (one, along))
    if stop == "target":
        return Residual(value, jax.lax.stop_gradient(trees.axpy(t - s, total, c)), total)
    return Residual(trees.axpy(s - t, total, value), c, total)


def lagrangian(
    v: MeanVelocityFn,
    s: Time,
    t: Time,
    x: Event,
    velocity: VelocityFn,
    *,
    stop: str = "velocity",
    derivative: Derivative = forward_mode,
) -> Residual:
    r"""Computes the residual of the Lagrangian identity: the image of x moves with the velocity at its own position.

    .. math:: R_L = v_{s,t}(x) + (t-s)\, \partial_t v_{s,t}(x) - c_t(X_{s,t}(x))

    Args:
      v: the mean velocity, ``(s, t, x) -> v``.
      s: source time, a scalar.
      t: target time, a scalar.
      x: the point at time s.
      velocity: c, ``(t, x) -> c_t(x)``. It is called at X_{s,t}(x), a point that was not sampled with a pair. Do not use a
        conditional velocity.
      stop: the parts under a stop-gradient: "velocity", c and its argument (2505.18825); "target", everything except the
        leading v (2506.14603); "none", nothing (2406.07507).
      derivative: ``forward_mode``, ``central_difference(h)`` or ``finite_difference(h)``.

    Returns:
      The Residual.

    Raises:
      ValueError: if ``stop`` is not one of these strings.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import identities
      >>> def v(s, t, x):  # the exact mean velocity of dx/dt = 2
      ...     return 2.0 * jnp.ones_like(x)
      >>> x, s, t = jnp.ones(2, jnp.float32), jnp.float32(0.25), jnp.float32(0.75)
      >>> print(identities.lagrangian(v, s, t, x, lambda t, x: v(t, t, x)).difference)
      [0. 0.]
    """
    checks.choice("stop", stop, ("target", "velocity", "none"))
    derivative = within(derivative, target_interval(s, t))
    value, (in_time,) = derivative(lambda t_: v(s, t_, x), (t,), (jnp.ones_like(t),))
    c = velocity(t, move(x, s, t, value))
    if stop == "target":
        return Residual(value, jax.lax.stop_gradient(trees.axpy(s - t, in_time, c)), in_time)
    c = jax.lax.stop_gradient(c) if stop == "velocity" else c
    return Residual(trees.axpy(t - s, in_time, value), c, in_time)


def semigroup(
    v: MeanVelocityFn,
    s: Time,
    t: Time,
    x: Event,
    gamma: Array | float,
    *,
    legs: MeanVelocityFn | None = None,
    first: Event | None = None,
    stop: str = "target",
) -> Residual:
    r"""Computes the residual of the semigroup identity: the jump from s to t equals the jumps from s to u and from u to t.

    .. math:: R_S = v_{s,t}(x) - (1-\gamma)\, v_{s,u}(x) - \gamma\, v_{u,t}(X_{s,u}(x)), \qquad u = \gamma s + (1-\gamma) t

    In terms of the jumps, where x' is the end of the first leg, it satisfies

    .. math:: X_{s,t}(x) - X_{u,t}(x') = (t - s)\, R_S, \qquad \frac{X_{s,t}(x) - X_{u,t}(x')}{u - s} = \frac{R_S}{1 - \gamma}.

    Args:
      v: the mean velocity, ``(s, t, x) -> v``.
      s: source time, a scalar.
      t: target time, a scalar.
      x: the point at time s.
      gamma: the position of u: 1 at s, 0 at t, 1/2 at the midpoint.
      legs: the mean velocity of the two legs: v by default (2505.18825), or that of a moving average or a teacher
        (2202.00512).
      first: the mean velocity of the first leg, if it does not come from ``legs`` but from the pair or a solver's step.
      stop: the parts under a stop-gradient: "target", both legs; "none", nothing.

    Returns:
      The Residual. Its tangent is (v_{u,t}(x') - v_{s,t}(x))/(u - s), or zero at u = s.

    Raises:
      ValueError: if ``stop`` is not one of these strings.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import identities
      >>> def v(s, t, x):  # the exact mean velocity of dx/dt = 2
      ...     return 2.0 * jnp.ones_like(x)
      >>> x, s, t = jnp.ones(2, jnp.float32), jnp.float32(0.25), jnp.float32(0.75)
      >>> print(identities.semigroup(v, s, t, x, 0.5).difference)
      [0. 0.]
    """
    checks.choice("stop", stop, ("target", "none"))
    legs = v if legs is None else legs
    gamma = jnp.asarray(gamma, jnp.result_type(t))
    u = gamma * s + (1.0 - gamma) * t
    value = v(s, t, x)
    first = legs(s, u, x) if first is None else first
    second = legs(u, t, move(x, s, u, first))
    target = trees.combine(1.0 - gamma, first, gamma, second)
    target = jax.lax.stop_gradient(target) if stop == "target" else target
    gap = u - s
    moved = jax.lax.stop_gradient(trees.sub(second, value))
    return Residual(
        value, target, trees.scale(jnp.where(gap == 0.0, 0.0, 1.0 / jnp.where(gap == 0.0, 1.0, gap)), moved)
    )
