"""Checks of an exact flow map and of an oracle: identities, inverse, an accurate solve, and equations of the density."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import oracles, solvers
from jflow.testing import expect
from jflow.types import FlowMap, Params, Velocity

# Both directions, the diagonal, both ends, and a pair close to the diagonal.
PAIRS = np.array(
    [
        (0.0, 1.0),
        (1.0, 0.0),
        (0.2, 0.9),
        (0.7, 0.1),
        (0.0, 0.0),
        (1.0, 1.0),
        (0.45, 0.45),
        (0.3, 0.3001),
        (0.0, 0.5),
        (1.0, 0.6),
    ]
)
REPEATS = 3
# The fraction of the gap t - s that the first leg of the semigroup identity takes.
SHARE = 0.7


def check_flow_map(
    flow_map: FlowMap,
    params: Params,
    s: Any,
    t: Any,
    x: Any,
    *,
    velocity: Velocity | None = None,
    tolerance: float = 1e-7,
    solve_tolerance: float | None = 1e-9,
) -> None:
    """Checks that a map is the exact flow of a velocity. It is meant for closed forms and solvers, not for learned maps.

    For every row it checks the following, with errors relative to the terms of each equation:

    - v_{t,t} and the map's ``velocity`` are the velocity of the flow, and ``jump`` is x + (t - s) v.
    - The Eulerian, Lagrangian and semigroup residuals are zero, with derivatives in forward mode.
    - The jump back, if the map's domain allows it, is the inverse.
    - v is that of a "dopri8" solve of the velocity.

    Args:
      flow_map: the map; its events are single arrays.
      params: its parameters.
      s, t: source and target times, ``[N]``, within the map's domain. They should include both ends and s = t.
      x: the states at the source times, ``[N, ...]``, float64.
      velocity: the velocity of the flow, with the same parameters; by default that of the map.
      tolerance: the relative error that passes. For the jump there and back it is a tenth of this.
      solve_tolerance: the relative error against the solve that passes. None skips the solve, which takes a second or two
        to compile.

    Raises:
      AssertionError: if a property does not hold; the message has the value, its limit and its meaning.
      RuntimeError: if ``jax_enable_x64`` is off.
      ValueError: if times are outside the map's domain.
    """
    expect.require_x64()
    s, t, x = np.asarray(s, np.float64), np.asarray(t, np.float64), np.asarray(x, np.float64)
    outside = ~flow_map.domain.contains_all(s, t)
    if outside.any():
        raise ValueError(
            f"s, t: expected times within the domain, {flow_map.domain.name}, got {s[outside][0]:g}, {t[outside][0]:g}"
        )
    velocity = flow_map.velocity if velocity is None else velocity
    along = _derivative(flow_map)
    field = jax.jit(jax.vmap(velocity, (None, 0, 0)))
    own = jax.jit(jax.vmap(lambda p, a, b, y: (flow_map.jump(p, a, b, y), flow_map.velocity(p, b, y)), (None, 0, 0, 0)))
    rows = functools.partial(along, params)
    shown = _shown(s, t)

    def value(s: Any, t: Any, x: Any) -> np.ndarray:
        return np.asarray(rows(s, t, x, np.zeros_like(s), np.zeros_like(s), np.zeros_like(x))[0])

    def b(t: Any, x: Any) -> np.ndarray:
        return np.asarray(field(params, t, x))

    v, jump = value(s, t, x), np.asarray(own(params, s, t, x)[0])
    gap = _column(t - s, x)
    size = 1.0 + np.abs(v)
    expect.finite("mean velocity", v, f"the map fails at some of the times {shown}")
    meaning = "jump is not x + (t - s) mean_velocity"
    expect.at_most("error of jump", np.abs(jump - x - gap * v) / (size + np.abs(x)), tolerance, meaning)
    meaning = "the map's velocity is not that of the flow"
    ours = np.asarray(own(params, s, t, x)[1])
    expect.at_most("error of velocity", np.abs(ours - b(t, x)) / (1.0 + np.abs(ours)), tolerance, meaning)
    for name, residual in residuals(rows, b, s, t, x).items():
        meaning = f"the map is not the flow of the velocity (rows are the times {shown})"
        expect.at_most(f"{name} residual", np.abs(residual), tolerance, meaning)
    if flow_map.domain.backward:
        back = jump - gap * value(t, s, jump)
        error = np.abs(back - x) / (1.0 + np.abs(x) + np.abs(jump))
        expect.at_most("error of the jump there and back", error, 0.1 * tolerance, "the jump back is not the inverse")
    if solve_tolerance is not None:
        solved = solvers.solve(velocity, "dopri8", rtol=1e-12, atol=1e-12)
        want = np.asarray(jax.jit(jax.vmap(solved.mean_velocity, (None, 0, 0, 0)))(params, s, t, x))
        meaning = f"the map is not the solution of the velocity's ODE (rows are the times {shown})"
        expect.at_most("error against a solve", np.abs(v - want) / size, solve_tolerance, meaning)


def check_oracle(
    oracle: oracles.Oracle,
    params: oracles.MixtureParams,
    *,
    tolerance: float = 1e-7,
    solve_tolerance: float | None = 1e-9,
    seed: int = 0,
) -> None:
    """Checks an oracle: its map with ``check_flow_map``, and the consistency of its density, score, denoiser and velocity.

    - The score is the gradient of the log-density.
    - The density and the velocity satisfy the continuity equation, also at both ends.
    - The score and the denoiser satisfy Tweedie's formula, and the velocity is the combination of both given by the path.

    Args:
      oracle: the oracle.
      params: the parameters of its data.
      tolerance: the relative error that passes. For a map that is a solve, use about 100 times the tolerance of the solve.
      solve_tolerance: as in ``check_flow_map``; None if the map is itself a solve.
      seed: the seed of the points, which are drawn from the oracle's marginals.

    Raises:
      AssertionError, RuntimeError: as in ``check_flow_map``.
      TypeError: if ``oracle`` is not an Oracle.
    """
    expect.require_x64()
    if not isinstance(oracle, oracles.Oracle):
        raise TypeError(f"oracle: expected an oracles.Oracle, got {type(oracle).__name__}")
    s, t = np.repeat(PAIRS, REPEATS, axis=0).T
    x = _draw(oracle, params, s, seed)
    _check_density(oracle, params, s, x)
    check_flow_map(
        oracle.flow_map, params, s, t, x, velocity=oracle.velocity, tolerance=tolerance, solve_tolerance=solve_tolerance
    )


def residuals(
    rows: Callable[..., tuple[Any, Any]], velocity: Callable[[Any, Any], np.ndarray], s: Any, t: Any, x: Any
) -> dict[str, np.ndarray]:
    """The tangent, Eulerian, Lagrangian and semigroup residuals of many rows, relative to the sizes of their terms.

    They are computed independently of ``jflow.identities``.

    Args:
      rows: ``(s, t, x, ds, dt, dx) -> (v_{s,t}(x), its derivative along (ds, dt, dx))``, for arrays of rows.
      velocity: ``(t, x) -> b_t(x)``, for arrays of rows.
      s, t: times, ``[N]``.
      x: states at the times s, ``[N, ...]``.
    """
    zero, one, still, gap = np.zeros_like(s), np.ones_like(s), np.zeros_like(x), _column(t - s, x)

    def derivative(s: Any, t: Any, x: Any, *direction: Any) -> tuple[np.ndarray, np.ndarray]:
        value, along = rows(s, t, x, *direction)
        return np.asarray(value), np.asarray(along)

    def value(s: Any, t: Any, x: Any) -> np.ndarray:
        return derivative(s, t, x, zero, zero, still)[0]

    b = velocity(s, x)
    v, material = derivative(s, t, x, one, zero, b)
    in_time = derivative(s, t, x, zero, one, still)[1]
    u = (1.0 - SHARE) * s + SHARE * t
    first = value(s, u, x)
    legs = SHARE * first + (1.0 - SHARE) * value(u, t, x + _column(u - s, x) * first)
    scale = 1.0 + np.abs(b) + np.abs(v) + np.abs(gap * material) + np.abs(gap * in_time)
    return {
        "tangent": (value(t, t, x) - velocity(t, x)) / scale,
        "Eulerian": (v - b - gap * material) / scale,
        "Lagrangian": (v + gap * in_time - velocity(t, x + gap * v)) / scale,
        "semigroup": (v - legs) / scale,
    }


def _derivative(flow_map: FlowMap) -> Callable[..., tuple[Any, Any]]:
    """A function for v and its directional derivative at many rows; one program serves every direction."""

    def along(p: Params, s: Any, t: Any, x: Any, ds: Any, dt: Any, dx: Any) -> tuple[Any, Any]:
        return jax.jvp(lambda *a: flow_map.mean_velocity(p, *a), (s, t, x), (ds, dt, dx))

    return jax.jit(jax.vmap(along, (None, 0, 0, 0, 0, 0, 0)))


def _check_density(oracle: oracles.Oracle, params: oracles.MixtureParams, t: np.ndarray, x: np.ndarray) -> None:
    def at(p: oracles.MixtureParams, t: jax.Array, x: jax.Array) -> dict[str, Any]:
        gradient = jax.grad(lambda x: oracle.log_density(p, t, x))(x)
        in_time = jax.jvp(lambda t: oracle.log_density(p, t, x), (t,), (jnp.ones_like(t),))[1]
        b, divergence = oracle.velocity(p, t, x), jnp.trace(jax.jacfwd(lambda x: oracle.velocity(p, t, x))(x))
        c, score, denoiser = oracle.interpolant.coefficients(t), oracle.score(p, t, x), oracle.denoiser(p, t, x)
        mean, std = oracle.base.moments(x)
        # E[x0 | x] for x0 = mean + std z, from the score -E[z | x]/(alpha std).
        noise = mean - c.alpha * std**2 * score
        return {
            "score": (score, gradient),
            "continuity": jnp.stack([in_time, divergence, jnp.dot(gradient, b)]),
            "Tweedie": (c.alpha * noise + c.beta * denoiser, x),
            "velocity": (c.alpha_dot * noise + c.beta_dot * denoiser, b),
        }

    found = jax.device_get(jax.jit(jax.vmap(at, (None, 0, 0)))(params, t, x))
    meaning = "the score is not the gradient of the log-density"
    expect.close("score", *found["score"], meaning=meaning, rtol=1e-8, atol=1e-8)
    terms = found["continuity"]
    meaning = "d/dt log rho + div b + b . grad log rho is not 0: the velocity does not carry the density"
    limit = 1e-8 * (1.0 + np.abs(terms).sum(axis=1))
    expect.at_most("residual of the continuity equation", np.abs(terms.sum(axis=1)), limit, meaning)
    meaning = "alpha E[x0 | x] + beta E[x1 | x] is not x: score and denoiser are not of one density"
    expect.close("Tweedie's formula", *found["Tweedie"], meaning=meaning, rtol=1e-8, atol=1e-8)
    meaning = "the velocity is not alpha_dot E[x0 | x] + beta_dot E[x1 | x]"
    expect.close("velocity", *found["velocity"], meaning=meaning, rtol=1e-8, atol=1e-8)


def _draw(oracle: oracles.Oracle, params: oracles.MixtureParams, s: np.ndarray, seed: int) -> np.ndarray:
    """One point of the marginal at each time, drawn with numpy, which needs no compilation."""
    rng, p = np.random.default_rng(seed), jax.tree.map(np.asarray, params)
    k = rng.choice(len(p.log_weights), size=len(s), p=np.exp(p.log_weights))
    x1 = p.means[k] + np.einsum("nij,nj->ni", p.bases[k], np.sqrt(p.variances)[k] * rng.normal(size=p.means[k].shape))
    mean, std = map(np.asarray, oracle.base.moments(x1[0]))
    x0 = mean + std * rng.normal(size=x1.shape)
    alpha, beta = (np.array([float(f(u)) for u in s]) for f in (oracle.interpolant.alpha, oracle.interpolant.beta))
    return alpha[:, None] * x0 + beta[:, None] * x1


def _column(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Values per row, reshaped to broadcast with the rows of ``like``."""
    return np.reshape(values, (-1, *[1] * (like.ndim - 1)))


def _shown(s: np.ndarray, t: np.ndarray) -> str:
    pairs = dict.fromkeys(zip(s.tolist(), t.tolist(), strict=True))
    return ", ".join(f"({a:g}, {b:g})" for a, b in list(pairs)[:12])
