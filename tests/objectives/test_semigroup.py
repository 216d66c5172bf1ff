"""The gaps of a shortcut: how often each is drawn, and what its legs and its smallest gap are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, objectives, times, types

LEVELS = 3
CELL = 2.0**-LEVELS


def ramp(params, s, t, x, cond=None, *, key=None):
    """theta min((t - s)/cell, 1): nothing at s = t, and theta at every gap of the grid."""
    return params * jnp.minimum(jnp.abs(t - s) / CELL, 1.0) * jnp.ones_like(x)


def test_every_gap_of_a_shortcut_is_trained_down_to_the_smallest(key):
    """x1 = x0: the velocity is zero, and so is the exact map's. With the smallest gap left out theta is never touched."""
    objective = objectives.shortcut(types.FlowMap(ramp), interpolants.linear(), levels=LEVELS, leg="own")
    x = jax.random.normal(jax.random.key(1), (512, 1))
    batch = types.Batch(x, x)

    @jax.jit
    def descend(theta, k):
        def step(theta, k):
            value, slope = jax.value_and_grad(lambda p: objective(p, k, batch)[0].mean())(theta)
            return theta - 4.0 * slope, value

        return jax.lax.scan(step, theta, jax.random.split(k, 200))

    theta, losses = descend(jnp.float64(1.0), key)
    assert losses[0] > 1e-3
    assert abs(theta) < 1e-3
    for gap in (CELL, 2 * CELL, 4 * CELL, 1.0):
        jumped = types.FlowMap(ramp).jump(theta, 0.0, gap, jnp.ones(1))
        np.testing.assert_allclose(jumped, 1.0, atol=1e-3)


def test_a_parameter_of_the_smallest_gap_alone_gets_a_gradient(key):
    def bump(params, s, t, x, cond=None, *, key=None):
        return jnp.where(jnp.abs(jnp.abs(t - s) - CELL) < 0.1 * CELL, params, 0.0) * jnp.ones_like(x)

    objective = objectives.shortcut(types.FlowMap(bump), interpolants.linear(), levels=LEVELS, leg="own")
    x = jnp.zeros((256, 1))
    slope = jax.jit(jax.grad(lambda p: objective(p, key, types.Batch(x, x))[0].mean()))(jnp.float64(0.5))
    # An eighth of the rows, a quarter of them of the smallest gap: about 2 theta/32, its legs asked at s = t.
    assert 0.5 / 32 < slope < 2.0 / 32


@pytest.mark.representatives("float64-0.125", "float64-0.25", "float64-0.5", "float64-1.0", "float32-0.25")
@pytest.mark.parametrize("gap", [CELL, 2 * CELL, 0.5, 1.0])
@pytest.mark.parametrize("width", [jnp.float32, jnp.float64])
def test_the_legs_of_a_shortcut_follow_the_formula(gap, width, key):
    """Two Euler steps of the diagonal over a cell; two jumps over half the gap where it is longer."""

    def v(p, s, t, x, cond=None, *, key=None):
        return jnp.sin(p * x + s) + (t - s) * x + 0.5 * t

    p, s = width(0.8), width(0.0 if gap == 1.0 else gap)
    law = times.independent(times.constant(float(s)), times.constant(float(s) + gap))
    objective = objectives.shortcut(
        types.FlowMap(v), interpolants.linear(), levels=LEVELS, pairs=law, domain=types.dyadic(LEVELS), diagonal=0.0
    )
    batch = types.Batch(jnp.array([[0.4], [-1.0]], width), jnp.array([[1.0], [0.3]], width))
    ema = width(-0.5)
    loss, _ = jax.jit(objective)(p, key, batch, types.Context(ema=ema))
    x, t, half = (1 - s) * batch.x0 + s * batch.x1, s + width(gap), width(gap / 2)
    u = s + half
    asked = (lambda a, b, z: v(ema, a, a, z)) if gap == CELL else (lambda a, b, z: v(ema, a, b, z))
    first = asked(s, u, x)
    second = asked(u, t, x + half * first)
    expected = jnp.sum((v(p, s, t, x) - width(0.5) * (first + second)) ** 2, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5 if width is jnp.float32 else 1e-12)


def test_every_gap_is_drawn_as_often(key):
    n = 20_000
    s, t = times.dyadic(LEVELS)(key, n)
    levels = np.round(-np.log2(np.asarray(t - s))).astype(int)
    counts = np.bincount(levels, minlength=LEVELS + 1)
    share = 1 / (LEVELS + 1)
    assert len(counts) == LEVELS + 1
    assert np.all(np.abs(counts / n - share) < 4 * np.sqrt(share * (1 - share) / n))
