r"""Simulates the SDE with the marginals of a flow, by fixed steps of Diffrax's solvers. Diffrax is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jflow import bases, checks, interpolants, trees
from jflow.interpolants import Interpolant
from jflow.solvers.ode import cast_like, check_times, check_velocity, widen
from jflow.types import Array, Cond, Event, Key, Params, Time, Velocity

if TYPE_CHECKING:
    import lineax

SDE_METHODS = ("euler", "heun")


def sde(
    velocity: Velocity,
    interpolant: Interpolant,
    *,
    method: str = "euler",
    diffusion: float | Callable[[Time], Array] = 1.0,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> Callable[..., Event]:
    r"""Returns a function that simulates the SDE with the marginals of the flow, on a grid that the caller gives.

    For a base :math:`N(m, \mathrm{diag}(\mathrm{std}^2))` that is independent of the data, the equation is

    .. math::
        dx = \left[ b_t + \tfrac12 \sigma_t^2\, \nabla \log \rho_t \right] dt + \sigma_t\, dW, \qquad
        \nabla \log \rho_t = \frac{\beta b - \dot\beta x + w m}{\alpha w\, \mathrm{std}^2}.

    If ``diffusion`` is a number c, the noise and the drift are, entry by entry,

    .. math::
        \sigma_t^2 = 2 c\, \alpha_t w_t\, \mathrm{std}^2, \qquad
        \mathrm{drift} = b + c \left( \beta b - \dot\beta x + w m \right).

    This drift does not divide by alpha, so it is finite everywhere, and the noise vanishes at the data. If ``diffusion`` is a
    function of time, it is :math:`\sigma_t` in the units of x per square root of time. The drift then divides by alpha w,
    except where :math:`\sigma_t = 0`, where it is b.

    Each step is a step of ``sde_step`` with fresh normal increments, inside one ``lax.scan``: any number of steps compiles
    once, and both modes of differentiation work. ``samplers.sde`` runs the same step and can return the path.

    Args:
      velocity: b, as in ``solve``; called without a key.
      interpolant: the path of the flow.
      method: "euler" or "heun".
      diffusion: c >= 0, or the function t -> sigma_t.
      base: a ``bases.Normal``.

    Returns:
      ``(params, key, grid, x0, cond=None) -> x``, which returns the state at grid[-1] of one sample, shaped like x0. The grid
      is ``[N]``, strictly increasing within [0, 1].

    Raises:
      ValueError: if the method is unknown, c is negative or not finite, or the base is not a ``bases.Normal``; when called, if
        the grid is not strictly increasing within [0, 1].
      TypeError: if ``velocity`` or ``interpolant`` has a wrong type, or ``diffusion`` is neither a number nor a function; when
        called, if the key is not a PRNG key, or x0 is not floating-point.
    """
    step = sde_step(velocity, interpolant, method=method, diffusion=diffusion, base=base)

    def simulate(params: Params, key: Key, grid: Array, x0: Event, cond: Cond = None) -> Event:
        checks.key("key", key)
        check_times("grid", grid, increasing=True)
        checks.floating("x0", x0)
        like = jax.tree.map(jnp.asarray, x0)
        dtype = trees.at_least_float32(like)
        grid = jnp.asarray(grid, dtype)

        def leg(y: Event, pair: tuple[Array, Array]) -> tuple[Event, None]:
            return step(params, key, *pair, y, cond, like=like)[0], None

        end, _ = jax.lax.scan(leg, widen(like, dtype), (grid[:-1], grid[1:]))
        return cast_like(end, like)

    return simulate


def sde_step(
    velocity: Velocity,
    interpolant: Interpolant,
    *,
    method: str = "euler",
    diffusion: float | Callable[[Time], Array] = 1.0,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> Callable[..., tuple[Event, Event]]:
    """Returns a function that makes one step of ``sde`` with Diffrax's Euler or Heun solver.

    "euler" is the Ito-Euler scheme, which does not evaluate the velocity at the end of the step. "heun" uses two evaluations,
    and its drift has weak order 2. The arguments and errors are those of ``sde``.

    Returns:
      ``(params, key, s, t, y, cond=None, *, like) -> (y at t, noise)`` for one sample. y is the state, with all leaves in one
      dtype of at least float32; the velocity is called with y in the dtypes of ``like``. The increments of the noise depend on
      the key and on both times. ``noise`` is their standard deviation sigma_s sqrt(t - s), a scalar for a leaf whose entries
      have the same one.
    """
    check_velocity(velocity)
    interpolants.check(interpolant)
    checks.choice("method", method, SDE_METHODS)
    base = bases.gaussian(base, "solvers.sde")
    if not callable(diffusion):
        checks.number("diffusion", diffusion, low=0.0)

    def sigma(t: Array, std: Event) -> Event:
        if callable(diffusion):
            value = jnp.asarray(diffusion(t)).astype(t.dtype)
            return jax.tree.map(lambda _: value, std)
        c = interpolant.coefficients(t)
        return trees.scale(jnp.sqrt(jnp.maximum(2.0 * diffusion * c.alpha * c.w, 0.0)), std)

    def correction(t: Array, std: Event) -> Event:
        """Returns the factor of (beta b - beta_dot x + w m) in the drift, entry by entry."""
        if not callable(diffusion):
            return jax.tree.map(lambda s: jnp.asarray(diffusion, s.dtype), std)
        c = interpolant.coefficients(t)

        def of(noise: Array, s: Array) -> Array:
            squared = jnp.square(noise)
            return jnp.where(squared == 0.0, 0.0, 0.5 * squared / jnp.where(squared == 0.0, 1.0, c.alpha * c.w * s * s))

        return jax.tree.map(of, sigma(t, std), std)

    def step(
        params: Params, key: Key, s: Array, t: Array, y: Event, cond: Cond = None, *, like: Event
    ) -> tuple[Event, Event]:
        import diffrax
        import lineax

        dtype = trees.at_least_float32(y)
        s, t = jnp.asarray(s, dtype), jnp.asarray(t, dtype)
        mean, std = base.moments(y)

        def drift(u: Time, y: Event, args: None) -> Event:
            b = widen(velocity(params, u, cast_like(y, like), cond), dtype)
            c = interpolant.coefficients(u)

            def of(factor: Array, m: Array, b: Array, x: Array) -> Array:
                return (1.0 + factor * c.beta) * b - factor * c.beta_dot * x + factor * c.w * m

            return jax.tree.map(of, correction(u, std), mean, b, y)

        def noise(u: Time, y: Event, args: None) -> lineax.AbstractLinearOperator:
            return lineax.DiagonalLinearOperator(
                jax.tree.map(lambda leaf, n: jnp.broadcast_to(n, leaf.shape), y, sigma(u, std))
            )

        # "bounded" stages are differentiable in both modes; Diffrax's DirectAdjoint makes the same choice.
        solver = diffrax.Euler() if method == "euler" else diffrax.Heun(scan_kind="bounded")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), y)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(noise, diffrax.UnsafeBrownianPath(shapes, key))
        )
        # Neither solver has a state, so each step can start without one.
        end = solver.step(terms, s, t, y, None, None, False)[0]
        return end, trees.scale(jnp.sqrt(t - s), sigma(s, std))

    return step
