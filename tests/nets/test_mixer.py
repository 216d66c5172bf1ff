"""The Mixer: the suite of networks of images, its formula for the cost, and its locality."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import flops
from jflow.nets import Mixer
from tests.nets import images

SMALL = {
    "window": 4,
    "stride": 2,
    "features": 6,
    "tokens_hidden": 5,
    "channels_hidden": 7,
    "trunk": 4,
    "time_features": 4,
}
SHAPE = (5, 6, 2)


def make(**fields):
    return Mixer(**{**SMALL, "depth": 3, **fields})


@pytest.mark.representatives("decoupled")
@pytest.mark.parametrize("fields", [{}, {"decoupled": 1}, {"stride": 4}], ids=["plain", "decoupled", "patches"])
def test_derivatives_dtypes_and_vmap(fields):
    images.check_derivatives(make(depth=2, **fields), SHAPE)


def test_starts_at_zero():
    assert images.check_start_and_shapes(make(depth=1), (6, 6)) == {"output"}


@pytest.mark.slow
def test_bfloat16():
    images.check_bfloat16(make(), SHAPE, 0.05)


@pytest.mark.slow
def test_devices():
    images.check_devices(make(), SHAPE)


def test_decoupled():
    images.check_decoupled(make, SHAPE)


def test_conditions():
    images.check_conditions(make, SHAPE)


@pytest.mark.slow
def test_remat_and_unroll_change_no_number():
    images.check_same_with(make(), make(remat=True, unroll=1), SHAPE)


def test_cost():
    images.check_batch_cost(make(), SHAPE)
    net = Mixer()
    n, p, d, k, h, trunk = 49, 64, 128, 64, 160, 64
    expected = 4 * n * p * d + 4 * (4 * n * k * d + 4 * n * d * h + 12 * trunk * d) + 4 * trunk * d
    assert images.matmul_flops(net, (28, 28)) == expected + images.conditioning_flops(trunk)
    x = jax.ShapeDtypeStruct((28, 28), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), 0.0, 0.0, x)
    assert 24e6 < flops.count(net.apply, params, jnp.float32(0), jnp.float32(1), x) < 27e6
    assert 350e3 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 600e3


def test_refusals():
    with pytest.raises(ValueError, match="window: expected a multiple of the stride 3, got 8"):
        Mixer(stride=3)
    with pytest.raises(ValueError, match="depth: expected a whole number of at least 1, got 0"):
        Mixer(depth=0)
    with pytest.raises(ValueError, match=r"x: expected one image \[H, W, C\] or \[H, W\].* got shape \(4,\)"):
        make().init(jax.random.key(0), 0.0, 1.0, jnp.zeros(4))
    with pytest.raises(TypeError, match="x: expected floating-point arrays"):
        make().init(jax.random.key(0), 0.0, 1.0, np.zeros((4, 4), np.int32))
    with pytest.raises(ValueError, match="decoupled"):
        make(decoupled=3)
