"""Checks of a network of two times."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees
from jflow.nets.signatures import Network
from jflow.testing import expect
from jflow.types import Cond, Event, Params, PyTree

# The four corners of the square of times, a point on the diagonal, and a point inside.
TIMES = np.array([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.4, 0.4), (0.2, 0.7)])
DTYPES = ("float16", "bfloat16", "float32", "float64")


def check_network(
    network: Network,
    params: Params,
    x: Event,
    cond: Cond = None,
    *,
    step: float = 1e-6,
    rtol: float = 1e-6,
    dtypes: tuple[str, ...] = DTYPES,
) -> None:
    """Checks that a network of two times fulfils the requirements of training and sampling.

    - Its forward-mode derivative along (s, t, x) agrees with central differences in float64, also at s = t and at 0 and 1.
    - In float32, its value, this derivative, and the gradients of both with respect to the parameters, the times and x are
      finite, also at s = t, at 0 and 1, and at x = 0.
    - Its output has the shapes and dtypes of x.
    - Under ``jax.vmap`` it gives the same values as for single samples.

    A network may ignore a time.

    Args:
      network: ``(params, s, t, x, cond=None, *, key=None)``, of one sample, for example from ``nets.from_linen`` or
        ``nets.from_equinox``.
      params: its parameters; floating-point leaves are cast to float64 or float32.
      x: one sample, a pytree of floating-point arrays.
      cond: its condition, or None.
      step: the step of the differences. For a network that always computes in float32, use 1e-2.
      rtol: the error of the derivative that passes, relative to its entry plus a tenth of (1 + the largest output). For a
        network that always computes in float32, use 1e-2.
      dtypes: the dtypes of x to try.

    Raises:
      AssertionError: if a property does not hold; the message has the value, its limit and its meaning.
      RuntimeError: if ``jax_enable_x64`` is off.
      TypeError: if x is not floating-point, or the network is not a function of these arguments.
      ValueError: if the parameters are not finite.
    """
    expect.require_x64()
    checks.accepts("network", network, "(params, s, t, x, cond=None, *, key=None)", 5)
    checks.floating("x", x)
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.device_get(_cast(params, jnp.float64)))):
        raise ValueError("params: expected finite parameters")
    _check_dtypes(network, params, x, cond, dtypes)
    _check_finite(network, _cast(params, jnp.float32), _cast(x, jnp.float32), cond)
    _check_derivative(network, _cast(params, jnp.float64), _cast(x, jnp.float64), cond, step, rtol)


def _check_dtypes(network: Network, params: Params, x: Event, cond: Cond, dtypes: tuple[str, ...]) -> None:
    for name in dtypes:
        narrow, wide = jnp.dtype(name), jnp.dtype("float64" if name == "float64" else "float32")
        event, time = _cast(x, narrow), jnp.asarray(0.5, wide)
        out = jax.eval_shape(lambda p, s, y: network(p, s, s, y, cond), _cast(params, wide), time, event)
        got = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(out)]
        expected = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(event)]
        same = jax.tree.structure(out) == jax.tree.structure(event) and got == expected
        expect.true(same, f"network: expected the shapes and dtypes of x, {expected}, got {got}")


def _check_finite(network: Network, params: Params, x: Event, cond: Cond) -> None:
    def loss(p: Params, s: jax.Array, t: jax.Array, y: Event) -> jax.Array:
        value, tangent = jax.jvp(lambda s, t, y: network(p, s, t, y, cond), (s, t, y), (jnp.ones_like(s), s, y))
        return trees.sq_norm(value) + trees.sq_norm(tangent)

    grads = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), allow_int=True), (None, 0, 0, None))
    at = jax.jit(jax.vmap(grads, (None, None, None, 0)))
    s, t = jnp.asarray(TIMES, jnp.float32).T
    value, gradients = at(params, s, t, jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.zeros_like(leaf)]), x))
    place = f"entries are over x and 0, and over the times {TIMES.tolist()}"
    expect.finite("value and derivative", value, f"the network fails at these times in float32; {place}")
    floating = [leaf for leaf in jax.tree.leaves(gradients) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    expect.finite("gradient", floating, f"training would fail at these times in float32; {place}")


def _check_derivative(network: Network, params: Params, x: Event, cond: Cond, step: float, rtol: float) -> None:
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), x)
    direction = (jnp.asarray(0.7), jnp.asarray(-1.1), along)

    def apply(s: jax.Array, t: jax.Array, y: Event) -> jax.Array:
        return _flat(network(params, s, t, y, cond))

    def derivatives(time: jax.Array) -> tuple[jax.Array, ...]:
        at = (time[0], time[1], x)

        def moved(h: float) -> tuple:
            return jax.tree.map(lambda a, d: a + h * d, at, direction)

        value, tangent = jax.jvp(apply, at, direction)
        return value, tangent, (apply(*moved(step)) - apply(*moved(-step))) / (2 * step), apply(*at)

    times = jnp.asarray(TIMES)

    @jax.jit
    def run(times: jax.Array) -> tuple[Any, jax.Array]:
        return jax.vmap(derivatives)(times), jax.lax.map(lambda time: apply(time[0], time[1], x), times)

    (value, tangent, difference, plain), looped = map_to_numpy(run(times))
    scale = 1.0 + np.abs(value).max()
    meaning = "the network computes another value while it is differentiated"
    expect.at_most("|value of jvp - value|", np.abs(value - plain), 1e-12 * scale, meaning)
    meaning = "jax.vmap does not give what single samples give"
    expect.at_most("|vmap - loop|", np.abs(plain - looped), 1e-12 * scale, meaning)
    meaning = f"the forward-mode derivative is wrong (rows are the times {TIMES.tolist()})"
    limit = rtol * (np.abs(difference) + 0.1 * scale)
    expect.at_most("|jvp - central difference|", np.abs(tangent - difference), limit, meaning)


def map_to_numpy(tree: PyTree) -> PyTree:
    """The tree with numpy arrays as leaves."""
    return jax.tree.map(np.asarray, tree)


def _flat(tree: PyTree) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating-point leaves cast to this dtype."""

    def cast(leaf: Any) -> Any:
        floating = jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf).astype(dtype) if floating else leaf

    return jax.tree.map(cast, tree)
