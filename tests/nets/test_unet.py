"""The UNet: the suite of networks of images, its cost, equal convolutions, and the magnitudes of EDM2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import flops
from jflow.nets import UNet
from tests.nets import images

SMALL = {"features": 4, "multipliers": (1, 2), "blocks": 1, "heads": 2, "trunk": 4, "time_features": 4}
SHAPE = (5, 3, 2)
VARIANTS = {
    "attention": {"attention": (1,), "convolution": "matmul"},
    "lax": {"decoupled": 2},
    "mp": {"mp": True, "attention": (1,), "convolution": "matmul"},
}


def make(**fields):
    return UNet(**{**SMALL, **fields})


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_derivatives_dtypes_and_vmap(name):
    # Normalisations of few channels have large third derivatives: a smaller step than the default.
    images.check_derivatives(make(multipliers=(1, 1), **VARIANTS[name]), SHAPE)


@pytest.mark.representatives("mp")
@pytest.mark.parametrize("name", VARIANTS)
def test_starts_at_zero(name):
    expected = {"output_gain"} if name == "mp" else {"output"}
    assert images.check_start_and_shapes(make(**VARIANTS[name]), (5, 3)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16(name):
    images.check_bfloat16(make(**VARIANTS[name]), SHAPE, 0.08)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "mp"])
def test_devices(name):
    images.check_devices(make(**VARIANTS[name]), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "mp"])
def test_decoupled(name):
    images.check_decoupled(lambda **fields: make(**{**VARIANTS[name], **fields}), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "mp"])
def test_conditions(name):
    images.check_conditions(lambda **fields: make(**{**VARIANTS[name], **fields}), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "mp"])
def test_remat_changes_no_number(name):
    images.check_same_with(make(**VARIANTS[name]), make(**VARIANTS[name], remat=True), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("mp", [False, True])
def test_both_convolutions_are_one_network(mp):
    images.check_same_with(make(mp=mp, convolution="lax"), make(mp=mp, convolution="matmul"), SHAPE)


def cost(n, c, d, trunk, mp=False):
    return 18 * n * (c * d + d**2) + (2 * n * c * d if c != d else 0) + (2 if mp else 4) * trunk * d


@pytest.mark.parametrize("name", ["attention", "mp"])
def test_cost(name):
    net, mp = make(**VARIANTS[name]), name == "mp"
    images.check_batch_cost(net, SHAPE)
    # Padded to 6 x 4 entries with 4 channels, and 3 x 2 with 8.
    blocks = [(24, 4, 4), (6, 4, 8), (6, 8, 8), (6, 8, 8), (6, 16, 8), (24, 12, 4)]
    expected = sum(cost(*block, 4, mp) for block in blocks) + 4 * (8 * 6 * 8**2 + 4 * 6**2 * 8)
    # The magnitude-preserving encoder changes the channels before the first convolution.
    expected += 18 * 6 * (8 * 8 - 4 * 8) if mp else 0
    expected += 18 * 24 * ((2 + mp) * 4 + 4 * 2) + (0 if mp else 4 * 4 * 4) + images.conditioning_flops(4, 4)
    assert images.matmul_flops(net, SHAPE) == expected


@pytest.mark.slow
def test_magnitudes_stay_near_one():
    """Of every block, whatever the size of the weights; gains start at zero."""
    net = UNet.magnitude_preserving(features=32, multipliers=(1, 2), blocks=2, attention=(1,), convolution="matmul")
    x = images.image(8, 8, 3)
    params = images.random_params(net, x)
    params = jax.tree.map(lambda leaf: 30.0 * leaf if leaf.ndim else 0.0 * leaf, params)
    run = jax.jit(
        lambda x: net.apply({"params": params}, images.F32(0.2), images.F32(0.7), x, capture_intermediates=True)[1]
    )
    found = {
        name: float(np.sqrt(np.mean(np.square(tree["__call__"][0]))))
        for name, tree in run(x)["intermediates"].items()
        if name.startswith(("input", "down", "middle", "up"))
    }
    assert len(found) == 1 + net.total_blocks
    # A little below 1, because the padding is zero.
    assert all(0.7 < rms < 1.1 for rms in found.values()), found


def test_presets_and_refusals():
    net = UNet.magnitude_preserving(num_classes=10)
    assert net.mp and net.null_label == 10
    x = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
    assert flops.count(lambda x: UNet().init_with_output(jax.random.key(0), 0.0, 1.0, x)[0], x) > 1e8
    for field in ("multipliers", "attention"):
        with pytest.raises(TypeError, match=f"^{field}: expected a tuple of whole numbers, got 1$"):
            make(**{field: 1})
    with pytest.raises(ValueError, match="multipliers: expected at least one level"):
        make(multipliers=())
    with pytest.raises(ValueError, match="attention: expected a whole number of at least 0 and at most 1, got 2"):
        make(attention=(2,))
    with pytest.raises(ValueError, match="heads: expected a divisor of the channels of level 1, got 3"):
        make(attention=(1,), heads=3)
    with pytest.raises(ValueError, match="convolution: expected one of 'lax', 'matmul'"):
        make(convolution="fft")
    with pytest.raises(ValueError, match="decoupled"):
        make(decoupled=6)
