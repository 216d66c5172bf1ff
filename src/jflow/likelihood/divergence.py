r"""The divergence of a velocity, exact or estimated, and the velocity of the pair (x, log rho) that it makes.

With the Jacobian J = grad b_t(x), of d rows, where d is the number of entries of x::

    exact        tr J = sum_i e_i'J e_i                                        1 + d forward passes
    hutchinson   1/m sum_j z_j'J z_j                                           1 + m passes          (1810.01367)
    hutch_pp     tr Q'J Q + 1/m sum_j g_j'J g_j,  g_j = (I - QQ')z_j           1 + 3m passes         (2010.09649)

z_j are probes with independent entries of mean 0 and variance 1, Q an orthonormal basis of the columns J w_1, ..., J w_m
of normal probes. Both estimates are unbiased. Derivatives are forward-mode by default: one linearisation, then its columns.
With ``mode="reverse"`` they are those of J', one vector-Jacobian product each after one forward pass, for networks whose
kernels have a reverse rule alone (fused attention): J' has the trace of J, and z'J'z = z'Jz probe by probe. ``jax.grad`` of
the result differentiates the kernel's reverse rule and therefore needs one that jax can differentiate.

Along the flow, d/dt log rho_t(x_t) = -div b_t(x_t): the pair (x, log rho) follows a velocity of its own, with which
solves, identities and objectives work as with any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jflow import checks, trees
from jflow.likelihood.jacobian import Mode, linearise
from jflow.named import described
from jflow.solvers.ode import check_velocity
from jflow.types import Array, Cond, Event, Key, Params, Time, Velocity

# (b, x, key) -> (b(x), div b(x)): of a function of x alone, with one call of it.
Divergence = Callable[[Callable[[Event], Event], Event, Key | None], tuple[Event, Array]]
Noise = Literal["rademacher", "gaussian"]
MODES = ("forward", "reverse")


class WithLogDensity(NamedTuple):
    """A point and the log-density that has come with it.

    Attributes:
      x: an event.
      log_density: log rho_t(x) in nats, or its change since the flow began; a scalar.
    """

    x: Event
    log_density: Array


def exact_divergence(mode: Mode = "forward") -> Divergence:
    """tr J, by d columns in forward mode or d rows in reverse mode; needs no key.

    Raises:
      ValueError: for a mode that is neither "forward" nor "reverse".
    """
    checks.choice("mode", mode, MODES)

    def of(b: Callable[[Event], Event], x: Event, key: Key | None) -> tuple[Event, Array]:
        del key
        linear = linearise("b(x)", b, x, mode)
        return linear.value, jnp.trace(linear.columns())

    return of


def hutchinson(probes: int = 1, noise: Noise = "rademacher", mode: Mode = "forward") -> Divergence:
    """The mean of z'Jz over ``probes`` probes: unbiased.

    With Rademacher probes its variance is 2/m times the squares of the off-diagonal entries of (J + J')/2, with Gaussian
    ones those of all entries.

    Raises:
      ValueError: for no probes, another noise or another mode.
      TypeError: if ``probes`` is not a whole number. At a call, ValueError without a key, and TypeError in forward mode for
        a function that has none.
    """
    checks.integer("probes", probes, low=1)
    checks.choice("noise", noise, ("rademacher", "gaussian"))
    checks.choice("mode", mode, MODES)

    def of(b: Callable[[Event], Event], x: Event, key: Key | None) -> tuple[Event, Array]:
        linear = linearise("b(x)", b, x, mode)
        z = _probes(_given(key), (probes, linear.size), linear.dtype, noise)
        return linear.value, jnp.sum(z * jax.vmap(linear.column)(z)) / probes

    return of


def hutch_pp(probes: int = 1, noise: Noise = "rademacher", mode: Mode = "forward") -> Divergence:
    """Hutch++: the trace on a sketch of the range of J, and Hutchinson's estimate on its complement; ``probes`` is m.

    For a Jacobian of rank at most m it is exact, to the rounding of x's dtype. Costs 1 + 3m forward passes (2010.09649). The
    sketch is normal; ``noise`` is the law of the probes of the complement.

    Raises:
      ValueError, TypeError: as ``hutchinson``.
    """
    checks.integer("probes", probes, low=1)
    checks.choice("noise", noise, ("rademacher", "gaussian"))
    checks.choice("mode", mode, MODES)

    def of(b: Callable[[Event], Event], x: Event, key: Key | None) -> tuple[Event, Array]:
        linear = linearise("b(x)", b, x, mode)
        columns = jax.vmap(linear.column)
        sketch_key, probe_key = jax.random.split(_given(key))
        # Normal for either noise: probes of signs are often multiples of each other, and then span less.
        w = jax.random.normal(sketch_key, (probes, linear.size), linear.dtype)
        # The estimate is unbiased for every basis, and so is its derivative with the basis held fixed. The derivative of a
        # basis of dependent columns would not be finite.
        q = jax.lax.stop_gradient(jnp.linalg.qr(columns(w).T)[0].T)
        z = _probes(probe_key, (probes, linear.size), linear.dtype, noise)
        # In full precision on every accelerator: a part of Q that stays in g would be a bias.
        g = z - _matmul(_matmul(z, q.T), q)
        return linear.value, jnp.sum(q * columns(q)) + jnp.sum(g * columns(g)) / probes

    return of


def augment(velocity: Velocity, divergence: Divergence | None = None) -> Velocity:
    """The velocity (b_t(x), -div b_t(x)) of ``WithLogDensity``: a Velocity whose events are of that type, with the same params.

    Args:
      velocity: of events x.
      divergence: ``exact_divergence()`` by default; the others draw their probes from the key of the call, which serves a whole
        solve, so that the probes are fixed within it.

    Raises:
      TypeError: for a velocity that cannot be called as one, or anything but a Divergence.
    """
    check_velocity(velocity)
    divergence = exact_divergence() if divergence is None else divergence
    if divergence in (exact_divergence, hutchinson, hutch_pp) or not callable(divergence):
        got = described(divergence)
        raise TypeError(f"divergence: expected (b, x, key) -> (b(x), div b(x)), such as hutchinson(), got {got}")

    def augmented(
        params: Params, t: Time, state: WithLogDensity, cond: Cond = None, *, key: Key | None = None
    ) -> WithLogDensity:
        # Folded, not split: a solve uses its one key at every step, and splitting it repeatedly would count as reuse.
        probe_key, model_key = (None if key is None else jax.random.fold_in(key, i) for i in range(2))
        # The precision of the time depends on x alone, as it does without the log-density.
        t = jnp.asarray(t).astype(trees.at_least_float32(state.x))
        b, div = divergence(lambda x: velocity(params, t, x, cond, key=model_key), state.x, probe_key)
        return WithLogDensity(b, -div.astype(jnp.result_type(state.log_density)))

    return augmented


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _given(key: Key | None) -> Key:
    if key is None:
        raise ValueError(
            "key: expected a PRNG key, from which an estimate of the divergence draws its probes, got None"
        )
    return key


def _probes(key: Key, shape: tuple[int, ...], dtype: jnp.dtype, noise: Noise) -> Array:
    draw = jax.random.rademacher if noise == "rademacher" else jax.random.normal
    return draw(key, shape, dtype)
