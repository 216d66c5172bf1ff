"""The transformer: the suite of networks of images in its variants, and its formula for the cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.nets import DiT
from tests.nets import images

SMALL = {"patch": 2, "features": 8, "heads": 2, "mlp_ratio": 1.5, "trunk": 4, "time_features": 4, "condition_tokens": 2}
SHAPE = (5, 4, 2)
VARIANTS = {
    "adaln": {},
    "rotary": {"positions": "rotary", "mlp": "swiglu", "bottleneck": 3, "decoupled": 1},
    "tokens": {"conditions": "tokens", "mlp": "swiglu", "positions": "both"},
}


def make(**fields):
    return DiT(**{**SMALL, "depth": 3, **fields})


@pytest.mark.representatives("tokens")
@pytest.mark.parametrize("name", VARIANTS)
def test_derivatives_dtypes_and_vmap(name):
    images.check_derivatives(make(depth=2, **VARIANTS[name]), SHAPE)


@pytest.mark.representatives("tokens")
@pytest.mark.parametrize("name", VARIANTS)
def test_starts_at_zero(name):
    assert images.check_start_and_shapes(make(depth=2, **VARIANTS[name]), (5, 4)) == {"output"}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16(name):
    images.check_bfloat16(make(**VARIANTS[name]), SHAPE, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaln", "tokens"])
def test_devices(name):
    images.check_devices(make(**VARIANTS[name]), SHAPE)


@pytest.mark.representatives("tokens")
@pytest.mark.parametrize("name", ["adaln", "tokens"])
def test_decoupled(name):
    images.check_decoupled(lambda **fields: make(**{**VARIANTS[name], **fields}), SHAPE)


@pytest.mark.representatives("tokens")
@pytest.mark.parametrize("name", ["adaln", "tokens"])
def test_conditions(name):
    images.check_conditions(lambda **fields: make(**{**VARIANTS[name], **fields}), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaln", "tokens"])
def test_remat_and_unroll_change_no_number(name):
    images.check_same_with(make(**VARIANTS[name]), make(**VARIANTS[name], remat=True, unroll=2), SHAPE)


def test_rotary_positions_take_images_of_any_size():
    net = make(positions="rotary", depth=1)
    params = images.random_params(net, images.image(4, 4))
    large = images.image(6, 8)
    out = jax.jit(lambda x: net.apply({"params": params}, images.F32(0.2), images.F32(0.7), x))(large)
    # Positions matter: the same patches in another order give other outputs.
    moved = jax.jit(lambda x: net.apply({"params": params}, images.F32(0.2), images.F32(0.7), x))(
        jnp.roll(large, 4, axis=1)
    )
    assert out.shape == (6, 8) and np.abs(np.roll(moved, -4, axis=1) - out).max() > 1e-3


def test_cost():
    m, p, d, h, depth = 6, 8, 8, 12, 3
    for name, fields in VARIANTS.items():
        net = make(**fields)
        images.check_batch_cost(net, SHAPE)
        tokens, swiglu, b = name == "tokens", "mlp" in fields, fields.get("bottleneck", 0)
        hidden = h * 2 // 3 if swiglu else h
        n = m + 4 * tokens
        expected = 2 * m * p * d + (2 * m * (p + d) * b if b else 2 * m * p * d)
        expected += depth * (8 * n * d**2 + 4 * n**2 * d + (6 if swiglu else 4) * n * d * hidden)
        if tokens:
            expected += 2 * 2 * d * (4 + d)
        else:
            passes = 2 if fields.get("decoupled") else 1
            expected += depth * 12 * passes_of(passes, 4, d) + 4 * 4 * d + passes * images.conditioning_flops(4, 4)
        assert images.matmul_flops(net, SHAPE) == expected, name


def passes_of(passes, trunk, features):
    """Every layer makes its own modulation, of one of the two vectors: the cost does not depend on their number."""
    return trunk * features


def test_presets_and_refusals():
    assert DiT.in_context(depth=2).conditions == "tokens" and DiT.extra_large().features == 1152
    assert DiT.base().heads == 12 and DiT.large(patch=4).patch == 4
    x = jax.ShapeDtypeStruct((32, 32, 4), jnp.float32)
    params = jax.eval_shape(DiT(num_classes=1000, patch=2).init, jax.random.key(0), 0.0, 1.0, x)
    # DiT-S/2 has 33 million parameters.
    assert 32e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 34e6
    with pytest.raises(
        ValueError, match="features: expected a multiple of 8 with heads=2 and positions='rotary', got 12"
    ):
        make(features=12, positions="rotary")
    with pytest.raises(ValueError, match="conditions: expected one of 'adaln', 'tokens', got 'film'"):
        make(conditions="film")
    with pytest.raises(ValueError, match="decoupled"):
        make(decoupled=3)
