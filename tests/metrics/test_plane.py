"""Histograms in the plane against closed forms and counts by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import metrics


def checkerboard(key, n):
    cell_key, place_key = jax.random.split(key)
    cell = jax.random.randint(cell_key, (n,), 0, 8)
    corner = jnp.stack([cell // 2, 2 * (cell % 2) + (cell // 2) % 2], axis=1)
    return -1 + 0.5 * (corner.astype(jnp.float64) + jax.random.uniform(place_key, (n, 2)))


def on_board(x):
    cell = jnp.floor((x + 1) / 0.5).astype(jnp.int32)
    return (cell[0] + cell[1]) % 2 == 0


def board_density(x):
    return jnp.where(on_board(x), 0.5, 0.0)


@pytest.mark.representatives("48-64000-0.008-0.0105", "50-64000-0.064-0.069")
@pytest.mark.parametrize(
    ("bins", "samples", "low", "high"),
    [
        # Bins on the support over twice the number of samples: 2048/200,000 and so on.
        (64, 100_000, 0.0095, 0.0113),
        (48, 64_000, 0.0080, 0.0105),
        (52, 64_000, 0.0095, 0.0125),
        (64, 64_000, 0.0150, 0.0180),
        # Edges on bin centres cost log 2 on the four lines of bins that they cut, .055, on top.
        (50, 64_000, 0.0640, 0.0690),
        (50, 100_000, 0.0600, 0.0650),
    ],
)
def test_histogram_floor_of_the_checkerboard(bins, samples, low, high):
    floor = metrics.histogram_kl_floor(
        jax.random.key(10), checkerboard, board_density, bins=bins, samples=samples, repeats=3
    )
    assert low < float(floor.value) < high
    assert 0 < float(floor.standard_error) < 0.002


def test_histogram_counts_lost_mass_and_keeps_its_axes():
    points = jax.random.uniform(
        jax.random.key(11), (4000, 2), minval=jnp.array([-1.0, -1.0]), maxval=jnp.array([0.0, 0.5])
    )

    def density(x):
        return jnp.where((x[0] < 0.0) & (x[1] < 0.5), 1 / 1.5, 0.0)

    inside = metrics.histogram_kl(points, density, bins=8)
    # Half of the samples lost: ρ̂ halves wherever ρ is, and the quadrature of ρ is one here.
    lost = jnp.concatenate([points, jnp.full((2000, 2), 1e30), jnp.full((2000, 2), -1.01)])
    np.testing.assert_allclose(metrics.histogram_kl(lost, density, bins=8) - inside, math.log(2), rtol=1e-6)
    assert inside < 0.01
    assert metrics.histogram_kl(points[:, ::-1], density, bins=8) > 1.0
    centres = metrics.bin_centres(8)
    array = jax.vmap(jax.vmap(density))(jnp.asarray(centres))
    assert metrics.histogram_kl(points, array, bins=8) == inside
    jitted = jax.jit(lambda z: metrics.histogram_kl(z, density, bins=8))
    np.testing.assert_allclose(jitted(points), inside, rtol=1e-12)
    assert jnp.isnan(jitted(points.at[0, 0].set(jnp.nan)))


def test_histogram_of_a_few_points_by_hand():
    # 2 x 2 bins of area 1; the upper edge 2 belongs to the last bin, the inner edge 1 to the upper one.
    points = jnp.array([[0.0, 0.0], [0.5, 1.0], [2.0, 2.0], [1.0, 0.2]])
    density = jnp.array([[0.1, 0.2], [0.3, 0.4]])
    expected = float(jnp.sum(density * jnp.log(density / 0.25)))
    got = metrics.histogram_kl(points, density, bins=2, low=0.0, high=2.0, pseudo_density=0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    empty = metrics.histogram_kl(points[:3], density, bins=2, low=0.0, high=2.0)
    np.testing.assert_allclose(
        empty, float(jnp.sum(density * jnp.log(density / jnp.array([[1 / 3, 1 / 3], [1e-8, 1 / 3]]))))
    )


def test_mass_off_support():
    good, bad = np.asarray(checkerboard(jax.random.key(12), 900)), np.tile([[0.25, -0.25]], (100, 1))
    got = metrics.mass_off_support(jnp.asarray(np.concatenate([good, bad, bad + 3.0, 0 * bad + 0.75])), on_board)
    # (3.25, 2.75) lies outside the square, but this indicator goes on periodically.
    np.testing.assert_allclose(got.value, 200 / 1200)
    np.testing.assert_allclose(got.standard_error, math.sqrt(200 / 1200 * 1000 / 1200 / 1200))
    good = jnp.asarray(good)
    assert metrics.mass_off_support(good, on_board).value == 0.0
    with pytest.raises(TypeError, match="indicator"):
        metrics.mass_off_support(good, lambda x: x[0])
