"""Checks of the ends, derivatives, divided differences and conversions of a path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import interpolants
from jflow.interpolants import Interpolant
from jflow.testing import expect

# Both directions, both ends, and a close pair, for which a quotient loses digits.
PAIRS = np.array([(0.2, 0.7), (0.9, 0.1), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5001)])
INSIDE = np.array([0.1, 0.3, 0.5, 0.9])
GRID = np.array([0.0, 0.3, 1.0])
X0, X1 = np.array([0.3, -1.0]), np.array([2.0, 0.5])
STEP = 1e-6


def check_interpolant(interpolant: Interpolant) -> None:
    """Checks a path I_t = alpha_t x0 + beta_t x1 against the definitions of its parts.

    - alpha and beta have the declared values at the ends.
    - alpha_dot and beta_dot agree with central differences, and w = alpha beta_dot - alpha_dot beta is positive inside.
    - alpha_dd and beta_dd are divided differences. At s = t they are the derivatives, and their partial derivatives are half
      of the second derivatives.
    - The mean derivative of a pair is (I_t - I_s)/(t - s), and agrees with Gauss-Legendre quadrature of I'.
    - Values and gradients are finite at every end that is not declared singular.
    - ``interpolants.convert`` converts correctly between velocity, noise, data and score.

    Args:
      interpolant: the path.

    Raises:
      AssertionError: if a property does not hold; the message has the value, its limit and its meaning.
      RuntimeError: if ``jax_enable_x64`` is off.
      TypeError: if ``interpolant`` is not an Interpolant.
    """
    expect.require_x64()
    interpolants.check(interpolant)
    ends = [f(jnp.asarray(t)) for t in (0.0, 1.0) for f in (interpolant.alpha, interpolant.beta)]
    meaning = "the path does not begin or end where it declares"
    expect.close(
        "alpha_0, beta_0, alpha_1, beta_1", ends, interpolant.endpoints, meaning=meaning, rtol=1e-7, atol=1e-12
    )
    regular = np.array([t for t in (0.0, 1.0) if t not in interpolant.singular])
    found = jax.device_get(jax.jit(lambda: _figures(interpolant, regular))())
    for which in ("alpha", "beta"):
        _check_coefficient(which, found[which])
    expect.above("w_t = alpha beta_dot - alpha_dot beta", found["w"], 0.0, "x0 and x1 do not follow from I_t and I_t'")
    meaning = "wronskian() is not alpha beta_dot - alpha_dot beta"
    expect.close("wronskian", found["w"], found["w by hand"], meaning=meaning, rtol=1e-7, atol=0.0)
    expect.close("mean_derivative", *found["mean"], meaning="it is not (I_t - I_s)/(t - s)", rtol=1e-8, atol=1e-9)
    expect.close(
        "mean_derivative",
        *found["integral"],
        meaning="it is not the integral of I_t' over t - s",
        rtol=1e-9,
        atol=1e-12,
    )
    meaning = "within 1e-9 of s = t the divided differences lose digits"
    expect.close("mean_derivative", *found["near"], meaning=meaning, rtol=1e-10, atol=1e-12)
    expect.finite("I_t, I_t', mean_derivative, and gradients at the ends", found["ends"], "declare the end in singular")
    for source in interpolants.KINDS:
        for target in interpolants.KINDS:
            name = f"convert from {source} to {target}"
            meaning = "the conversion is not that of the path's coefficients"
            expect.close(name, *found["conversions"][source][target], meaning=meaning, rtol=1e-8, atol=1e-9)


def _figures(path: Interpolant, regular: np.ndarray) -> dict[str, Any]:
    """All values to compare, computed in one program."""
    out: dict[str, Any] = {}
    inside = jnp.asarray(INSIDE)
    # Leave out singular ends, where coefficients are not defined.
    grid = jnp.asarray([t for t in GRID if t not in path.singular])
    s, t = jnp.asarray([pair for pair in PAIRS if not set(pair) & set(path.singular)]).T
    for which in ("alpha", "beta"):
        value, dot, dd = (getattr(path, which + suffix) for suffix in ("", "_dot", "_dd"))
        second = jax.vmap(jax.grad(jax.grad(value)))(inside)
        in_s, in_t = (jax.vmap(jax.grad(dd, argument))(inside, inside) for argument in (0, 1))
        out[which] = {
            "dot": (
                jax.vmap(dot)(inside),
                jax.vmap(lambda u, f=value: (f(u + STEP) - f(u - STEP)) / (2 * STEP))(inside),
            ),
            "dd": (jax.vmap(dd)(s, t), (jax.vmap(value)(t) - jax.vmap(value)(s)) / (t - s)),
            "diagonal": (jax.vmap(dd)(grid, grid), jax.vmap(dot)(grid)),
            "slopes": (jnp.stack([in_s, in_t]), jnp.stack([second, second]) / 2),
        }
    out["w"] = jax.vmap(path.wronskian)(inside)
    alpha, beta, alpha_dot, beta_dot = (
        jax.vmap(getattr(path, f))(inside) for f in ("alpha", "beta", "alpha_dot", "beta_dot")
    )
    out["w by hand"] = alpha * beta_dot - alpha_dot * beta
    x0, x1 = {"a": jnp.asarray(X0), "b": jnp.asarray(0.8)}, {"a": jnp.asarray(X1), "b": jnp.asarray(-0.4)}

    def flat(tree: Any) -> jax.Array:
        return jnp.append(tree["a"], tree["b"])

    def place(u: jax.Array) -> jax.Array:
        return flat(path.interpolate(u, x0, x1))

    def mean(a: jax.Array, b: jax.Array) -> jax.Array:
        return flat(path.mean_derivative(a, b, x0, x1))

    def slope(u: jax.Array) -> jax.Array:
        return flat(path.derivative(u, x0, x1))

    out["mean"] = (jax.vmap(mean)(s, t), (jax.vmap(place)(t) - jax.vmap(place)(s)) / (t - s)[:, None])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    start, gap = 0.15, 0.7
    integral = 0.5 * jnp.asarray(weights) @ jax.vmap(slope)(jnp.asarray(start + gap * 0.5 * (nodes + 1)))
    out["integral"] = (mean(jnp.asarray(start), jnp.asarray(start + gap)), integral)
    out["near"] = (mean(jnp.asarray(0.3), jnp.asarray(0.3 + 1e-9)), slope(jnp.asarray(0.3 + 0.5e-9)))

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(mean(a, b) ** 2) + jnp.sum(place(a)) + jnp.sum(slope(a))

    ends = np.append(regular, 0.5)
    corners = (jnp.asarray(axis.ravel()) for axis in np.meshgrid(ends, ends))
    a, b = corners
    at = jax.vmap(jax.value_and_grad(total, (0, 1)))
    out["ends"] = {dtype: at(a.astype(dtype), b.astype(dtype)) for dtype in ("float64", "float32")}
    out["conversions"] = _conversions(path)
    return out


def _conversions(path: Interpolant) -> dict[str, Any]:
    """The pairs (converted, expected) for the conversion of each kind of prediction to each other kind."""
    t, x0, x1 = jnp.asarray(0.4), jnp.asarray(X0), jnp.asarray(X1)
    alpha, beta = path.alpha(t), path.beta(t)
    slope = jax.jacfwd(lambda u: path.alpha(u) * x0 + path.beta(u) * x1)(t)
    x = alpha * x0 + beta * x1
    values = {"velocity": slope, "noise": x0, "data": x1, "score": -x0 / alpha}
    return {
        source: {
            target: (interpolants.convert(path, t, x, values[source], source, target), values[target])
            for target in interpolants.KINDS
        }
        for source in interpolants.KINDS
    }


def _check_coefficient(which: str, found: dict[str, Any]) -> None:
    expect.close(f"{which}_dot", *found["dot"], meaning=f"it is not the derivative of {which}", rtol=1e-6, atol=1e-8)
    meaning = f"it is not ({which}_t - {which}_s)/(t - s)"
    expect.close(f"{which}_dd", *found["dd"], meaning=meaning, rtol=1e-8, atol=1e-9)
    meaning = f"the divided difference at s = t is not {which}_dot"
    expect.close(f"{which}_dd(t, t)", *found["diagonal"], meaning=meaning, rtol=1e-10, atol=1e-14)
    meaning = f"it is not {which}''/2: a formula that divides by t - s has no derivative at s = t"
    expect.close(f"derivative of {which}_dd at s = t", *found["slopes"], meaning=meaning, rtol=1e-9, atol=1e-10)
