r"""The divergence of a velocity, exact or estimated, and the velocity of the pair (x, log rho).

Let :math:`J = \nabla b_t(x)` be the Jacobian, and d the number of entries of x. The divergence tr J is computed as

.. math::

    \text{exact:} \quad & \sum_{i=1}^d e_i^\top J e_i, \\
    \text{Hutchinson (1810.01367):} \quad & \frac{1}{m} \sum_{j=1}^m z_j^\top J z_j, \\
    \text{Hutch++ (2010.09649):} \quad
        & \mathrm{tr}\, Q^\top J Q + \frac{1}{m} \sum_{j=1}^m g_j^\top J g_j, \qquad g_j = (I - Q Q^\top) z_j,

which costs 1 + d, 1 + m and 1 + 3m passes of the network. The probes :math:`z_j` have independent entries of mean 0 and
variance 1. Q is an orthonormal basis of :math:`J w_1, \dots, J w_m` for normal probes :math:`w_j`. Both estimates are unbiased.

By default the derivatives are computed in forward mode: one linearisation of b, then one product with J per vector. With
``mode="reverse"`` they are vector-Jacobian products after one forward pass, for networks whose kernels (such as fused
attention) have only a reverse rule. The results are the same, since J and its transpose have the same trace and the same
quadratic forms. ``jax.grad`` of the result differentiates the kernel's reverse rule, so jax must be able to differentiate it.

Along the flow the log-density satisfies

.. math::

    \frac{d}{dt} \log \rho_t(x_t) = -\nabla \cdot b_t(x_t),

so the pair (x, log rho) has a velocity. Solves, identities and objectives use it like any other velocity.
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

# (b, x, key) -> (b(x), div b(x)), where b is a function of x alone, which is called once.
Divergence = Callable[[Callable[[Event], Event], Event, Key | None], tuple[Event, Array]]
Noise = Literal["rademacher", "gaussian"]
MODES = ("forward", "reverse")


class WithLogDensity(NamedTuple):
    """A point and its log-density.

    Attributes:
      x: an event.
      log_density: log rho_t(x) in nats, or its change since the start of the flow; a scalar.
    """

    x: Event
    log_density: Array


def exact_divergence(mode: Mode = "forward") -> Divergence:
    """The exact divergence tr J, from d columns of J in forward mode or d rows in reverse mode. It needs no key.

    Raises:
      ValueError: if the mode is neither "forward" nor "reverse".
    """
    checks.choice("mode", mode, MODES)

    def of(b: Callable[[Event], Event], x: Event, key: Key | None) -> tuple[Event, Array]:
        del key
        linear = linearise("b(x)", b, x, mode)
        return linear.value, jnp.trace(linear.columns())

    return of


def hutchinson(probes: int = 1, noise: Noise = "rademacher", mode: Mode = "forward") -> Divergence:
    r"""Hutchinson's unbiased estimate of the divergence: the mean of z'Jz over m = ``probes`` probes z (1810.01367).

    With S = (J + J')/2 its variance is

    .. math::

        \frac{2}{m} \sum_{i \ne j} S_{ij}^2 \quad \text{(Rademacher probes)}, \qquad
        \frac{2}{m} \sum_{i, j} S_{ij}^2 \quad \text{(Gaussian probes)}.

    Raises:
      ValueError: if ``probes`` is below 1, or ``noise`` or ``mode`` is unknown. At a call, if there is no key.
      TypeError: if ``probes`` is not a whole number. At a call, if the function has no derivative in forward mode and
        ``mode`` is "forward".
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
    """Hutch++ (2010.09649): the exact trace on a sketch of the range of J, and Hutchinson's estimate on its complement.

    It costs 1 + 3m passes, where m = ``probes``. For a Jacobian of rank at most m it is exact, up to the rounding of x's
    dtype. The sketch uses normal vectors; ``noise`` is the law of the probes on the complement.

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
        # Always normal: random sign vectors are often multiples of each other, and then span a smaller space.
        w = jax.random.normal(sketch_key, (probes, linear.size), linear.dtype)
        # For every fixed basis the estimate is unbiased, and so is its derivative. Differentiating the basis would give
        # infinite values if its columns are linearly dependent.
        q = jax.lax.stop_gradient(jnp.linalg.qr(columns(w).T)[0].T)
        z = _probes(probe_key, (probes, linear.size), linear.dtype, noise)
        # Use full precision on every accelerator: a component of g along Q would be a bias.
        g = z - _matmul(_matmul(z, q.T), q)
        return linear.value, jnp.sum(q * columns(q)) + jnp.sum(g * columns(g)) / probes

    return of


def augment(velocity: Velocity, divergence: Divergence | None = None) -> Velocity:
    """The velocity (b_t(x), -div b_t(x)) of the pair (x, log rho), with the same params; its events are ``WithLogDensity``.

    Args:
      velocity: a velocity of events x.
      divergence: ``exact_divergence()`` by default. The estimates draw their probes from the key of the call. A solve uses
        one key, so the probes are fixed within it.

    Raises:
      TypeError: if ``velocity`` or ``divergence`` cannot be called as such, or ``divergence`` is a function that makes one,
        such as ``hutchinson`` without the call.
    """
    check_velocity(velocity)
    divergence = exact_divergence() if divergence is None else divergence
    if divergence in (exact_divergence, hutchinson, hutch_pp) or not callable(divergence):
        got = described(divergence)
        raise TypeError(f"divergence: expected (b, x, key) -> (b(x), div b(x)), such as hutchinson(), got {got}")

    def augmented(
        params: Params, t: Time, state: WithLogDensity, cond: Cond = None, *, key: Key | None = None
    ) -> WithLogDensity:
        # Fold in rather than split: a solve uses one key at every step, and jax's key-reuse check rejects repeated splits.
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
