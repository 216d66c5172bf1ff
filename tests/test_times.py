"""Laws of times: range, order, moments, stratification, and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import times

N = 20_000
PAIR_LAWS = {
    "triangle": times.triangle(),
    "triangle_stratified": times.triangle(stratified=True),
    "ordered": times.ordered(times.logit_normal(0.4, 1.0)),
    "gapped": times.gapped(times.uniform(0.2, 0.8)),
    "fixed_end": times.independent(times.uniform(), times.constant(1.0)),
    "dyadic": times.dyadic(5),
    "mixed": times.mixed([times.triangle(), times.gapped(times.constant(1.0))], [0.7, 0.3]),
}


@pytest.mark.parametrize("name", sorted(PAIR_LAWS))
def test_pairs_are_ordered_and_inside(name, key):
    s, t = PAIR_LAWS[name](key, N)
    assert s.shape == t.shape == (N,)
    assert np.all((0 <= s) & (s <= t) & (t <= 1))
    again = PAIR_LAWS[name](jax.random.clone(key), N)
    np.testing.assert_array_equal(s, again[0])
    other = PAIR_LAWS[name](jax.random.key(1), N)
    assert not np.array_equal(s, other[0])


@pytest.mark.parametrize("stratified", [False, True])
def test_triangle_is_uniform(stratified, key):
    """Both coordinates of the uniform triangle: E s = 1/3, E t = 2/3, Var = 1/18, Cov = 1/36."""
    s, t = times.triangle(stratified=stratified)(key, N)
    for value, mean in ((s, 1 / 3), (t, 2 / 3)):
        assert abs(value.mean() - mean) < 4 * np.sqrt(1 / 18 / N)
        assert abs(value.var() - 1 / 18) < 4 * np.sqrt(1 / 18 / N)
    assert abs(np.cov(s, t)[0, 1] - 1 / 36) < 4 / 18 / np.sqrt(N)


def test_stratified_puts_one_sample_in_each_cell_in_random_order(key):
    u = times.uniform(0.2, 0.6, stratified=True)(key, 100)
    cells = np.floor((np.asarray(u) - 0.2) / 0.4 * 100).astype(int)
    assert sorted(cells) == list(range(100))
    assert not np.array_equal(cells, np.arange(100))


def test_logit_normal(key):
    t = times.logit_normal(0.4, 1.3)(key, N)
    z = jnp.log(t) - jnp.log1p(-t)
    assert abs(z.mean() - 0.4) < 4 * 1.3 / np.sqrt(N)
    assert abs(z.std() - 1.3) < 4 * 1.3 / np.sqrt(2 * N)


def test_dyadic_lies_on_the_grid_with_its_midpoint(key):
    s, t = times.dyadic(4)(key, 500)
    gap = np.asarray(t - s)
    assert set(np.unique(gap)) == {1.0, 0.5, 0.25, 0.125}
    np.testing.assert_array_equal(np.asarray(s) / gap % 1, 0)


def test_mixed_draws_in_proportion(key):
    s, t = PAIR_LAWS["mixed"](key, N)
    share = np.mean((np.asarray(s) == 0) & (np.asarray(t) == 1))
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / N)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: times.uniform(0.5, 0.2), "high"),
        (lambda: times.logit_normal(std=0.0), "std"),
        (lambda: times.constant(1.5), "value"),
        (lambda: times.mixed([times.triangle()], [0.5]), "weights"),
        (lambda: times.mixed([times.triangle()], [0.5, 0.5]), "weights"),
        (lambda: times.dyadic(0), "levels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
