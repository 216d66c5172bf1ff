r"""The SDE with the marginals of a flow, by fixed steps of Diffrax's solvers. Diffrax is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow import checks, trees
from jflow.interpolants import Interpolant
from jflow.solvers.ode import cast_like, check_times, widen
from jflow.types import Array, Cond, Event, Key, Params, Time, Velocity

SDE_METHODS = ("euler", "heun")


def sde(
    velocity: Velocity,
    interpolant: Interpolant,
    *,
    method: str = "euler",
    diffusion: float | Callable[[Time], Array] = 1.0,
) -> Callable[..., Event]:
    r"""The SDE with the marginals of the flow, for a standard normal base, on a grid of times that the caller gives.

        dx = [ b_t + sigma_t^2/2 grad log rho_t ] dt + sigma_t dW,   grad log rho_t = (beta b - beta' x)/(alpha w)

    With a number c the noise is sigma_t^2 = 2 c alpha_t w_t and the drift b + c (beta b - beta' x), finite everywhere:
    nothing divides by alpha, and the noise ends at the data. A function of time is sigma_t itself, in the units of x per
    square root of time; its drift divides by alpha w and is taken as b where sigma_t is zero.

    Each step uses Diffrax's ``step`` of its Euler (the Ito-Euler scheme, which never looks at the last time) or Heun
    (drift of weak order 2, two evaluations) with fresh normal increments, inside one ``lax.scan``: any number of steps
    compiles once, and both modes of differentiation work.

    Args:
      velocity: b, as in ``solve``; called without a key.
      interpolant: the path whose marginals they are.
      method: "euler" or "heun".
      diffusion: c >= 0, or the function t -> sigma_t.

    Returns:
      ``(params, key, grid, x0, cond=None) -> x`` at grid[-1], of one sample: ``grid`` is [N], strictly increasing within
      [0, 1]; x is shaped like x0.

    Raises:
      ValueError: for an unknown method, c < 0 or not finite; at a call, for a grid that is not strictly increasing in
        [0, 1].
      TypeError: for ``diffusion`` that is neither a number nor callable; at a call, for x0 that is not floating-point.
    """
    checks.choice("method", method, SDE_METHODS)
    if not callable(diffusion):
        checks.number("diffusion", diffusion, low=0.0)

    def sigma(t: Array) -> Array:
        if callable(diffusion):
            return jnp.asarray(diffusion(t)).astype(t.dtype)
        c = interpolant.coefficients(t)
        return jnp.sqrt(jnp.maximum(2.0 * diffusion * c.alpha * c.w, 0.0))

    def correction(t: Array) -> Array:
        """What multiplies (beta b - beta' x) in the drift."""
        if not callable(diffusion):
            return jnp.asarray(diffusion, t.dtype)
        c = interpolant.coefficients(t)
        squared = jnp.square(sigma(t))
        return jnp.where(squared == 0.0, 0.0, 0.5 * squared / jnp.where(squared == 0.0, 1.0, c.alpha * c.w))

    def simulate(params: Params, key: Key, grid: Array, x0: Event, cond: Cond = None) -> Event:
        import diffrax
        import lineax

        check_times("grid", grid, increasing=True)
        checks.floating("x0", x0)
        like = jax.tree.map(jnp.asarray, x0)
        dtype = trees.at_least_float32(like)
        grid = jnp.asarray(grid, dtype)
        start = jax.tree.map(lambda leaf: leaf.astype(dtype), like)

        def drift(t: Array, y: Event, args: Any) -> Event:
            state = cast_like(y, like)
            b = widen(velocity(params, t, state, cond), dtype)
            c, factor = interpolant.coefficients(t), correction(t)
            return trees.combine(1.0 + factor * c.beta, b, -factor * c.beta_dot, y)

        def noise(t: Array, y: Event, args: Any) -> Any:
            return lineax.DiagonalLinearOperator(jax.tree.map(lambda leaf: jnp.full_like(leaf, sigma(t)), y))

        # "bounded" stages are differentiable in both modes; it is what Diffrax's DirectAdjoint chooses.
        solver = diffrax.Euler() if method == "euler" else diffrax.Heun(scan_kind="bounded")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(noise, diffrax.UnsafeBrownianPath(shapes, key))
        )

        def step(y: Event, pair: tuple[Array, Array]) -> tuple[Event, None]:
            # Neither solver carries a state from step to step.
            return solver.step(terms, pair[0], pair[1], y, None, None, False)[0], None

        end, _ = jax.lax.scan(step, start, (grid[:-1], grid[1:]))
        return cast_like(end, like)

    return simulate
