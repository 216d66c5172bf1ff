"""Laws of times: range, order, moments, stratification, and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, objectives, times, types
from jflow.named import described, shown

N = 20_000
PAIR_LAWS = {
    "triangle": times.triangle(),
    "triangle_stratified": times.triangle(stratified=True),
    "ordered": times.ordered(times.logit_normal(0.4, 1.0)),
    "gapped": times.gapped(times.uniform(0.2, 0.8)),
    "fixed_end": times.independent(times.uniform(), times.constant(1.0)),
    "dyadic": times.dyadic(5),
    "cells": times.cells(7),
    "to_data": times.to_data(),
    "mixed": times.mixed([times.triangle(), times.gapped(times.constant(1.0))], [0.7, 0.3]),
}


@pytest.mark.parametrize("name", sorted(PAIR_LAWS))
def test_pairs_are_ordered_and_inside(name, key):
    law = jax.jit(lambda key: PAIR_LAWS[name](key, N))
    s, t = jax.device_get(law(key))
    assert s.shape == t.shape == (N,)
    assert np.all((0 <= s) & (s <= t) & (t <= 1))
    again = law(jax.random.clone(key))
    np.testing.assert_array_equal(s, again[0])
    other = law(jax.random.key(1))
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
    assert set(np.unique(gap)) == {1.0, 0.5, 0.25, 0.125, 0.0625}
    np.testing.assert_array_equal(np.asarray(s) / gap % 1, 0)


def test_mixed_draws_in_proportion(key):
    s, t = PAIR_LAWS["mixed"](key, N)
    share = np.mean((np.asarray(s) == 0) & (np.asarray(t) == 1))
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / N)


def test_to_data_ends_at_the_data_and_starts_where_its_law_says(key, assert_mean):
    uniform_key, other_key = jax.random.split(key)
    s, t = times.to_data()(uniform_key, N)
    assert np.all(t == 1.0)
    assert_mean(np.stack([s, (s - 0.5) ** 2], 1), [1 / 2, 1 / 12])
    s, t = times.to_data(times.logit_normal(-1.0, 0.5))(other_key, N)
    z = jnp.log(s) - jnp.log1p(-s)
    assert np.all(t == 1.0)
    assert_mean(np.stack([z, (z + 1.0) ** 2], 1), [-1.0, 0.25])


@pytest.mark.parametrize("count", [1, 2, 7, 49, 1000])
def test_cells_are_a_grid_of_equal_neighbours_each_as_likely(count, key):
    s, t = map(np.asarray, times.cells(count)(key, N))
    starts, ends = np.unique(s), np.unique(t)
    # Neighbours share their times to the bit; XLA multiplies by 1/count, and 49 times that is one bit below 1.
    np.testing.assert_array_equal(starts[1:], ends[:-1])
    np.testing.assert_allclose(starts, np.arange(count) / count, rtol=4e-16)
    np.testing.assert_allclose(ends, np.arange(1, count + 1) / count, rtol=4e-16)
    assert starts[0] == 0.0 and ends[-1] <= 1.0
    cell = np.round(s * count).astype(int)
    np.testing.assert_array_equal(cell + 1, np.round(t * count))
    expected = N / count
    found = np.bincount(cell, minlength=count)
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected))
    # The sum of squares has the mean count - 1 and the variance 2 (count - 1), or a little less.
    assert abs(np.sum((found - expected) ** 2) / expected - (count - 1)) <= 4 * np.sqrt(2 * (count - 1))


def test_a_traced_count_of_cells_is_the_concrete_one(key):
    traces = []

    @jax.jit
    def traced(count, k):
        traces.append(1)
        return times.cells(count)(k, 500)

    for count in (1, 3, 10):
        expected = times.cells(count)(jax.random.clone(key), 500)
        for given in (jnp.int32(count), jnp.float64(count)):  # a schedule's value is floating point
            # A concrete count is a constant to XLA, which multiplies by its reciprocal.
            np.testing.assert_allclose(traced(given, jax.random.clone(key)), expected, rtol=4e-16)
    assert len(traces) == 2  # one for each dtype


def test_by_step_is_the_law_in_force(key):
    by_step = times.ByStep(lambda step: times.cells(2 ** (step // 10)))
    fixed = times.triangle()
    assert times.at_step(fixed, 3) is fixed
    traced = jax.jit(lambda step, k: times.at_step(by_step, step)(k, 100))
    for step, count in ((0, 1), (9, 1), (10, 2), (35, 8)):
        expected = times.cells(count)(jax.random.clone(key), 100)
        np.testing.assert_array_equal(traced(jnp.int32(step), jax.random.clone(key)), expected)
        np.testing.assert_array_equal(times.at_step(by_step, step)(jax.random.clone(key), 100), expected)


@pytest.mark.slow
def test_an_objective_takes_laws_by_step_wherever_it_takes_laws(key):
    """At every step the loss of the objective with the laws then in force, from one trace."""

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        return jnp.sin(params * x + s) + t * x

    def make(**laws):
        return objectives.psd_u(types.FlowMap(mean_velocity), interpolants.linear(), diagonal=0.5, **laws)

    changing = make(
        pairs=times.ByStep(lambda step: times.cells(2 ** (step // 10))),
        times=times.ByStep(lambda step: lambda k, n: jnp.full((n,), 0.02 * step.astype(float))),
        gammas=times.ByStep(lambda step: lambda k, n: jnp.full((n,), 1.0 / (2.0 + step.astype(float)))),
    )
    x = np.random.default_rng(0).normal(size=(2, 16, 2))
    batch, params, traces = types.Batch(jnp.asarray(x[0]), jnp.asarray(x[1])), jnp.float64(0.7), []

    @jax.jit
    def run(step, k):
        traces.append(1)
        return changing(params, k, batch, types.Context(step=step))

    losses = []
    for step, count in ((0, 1), (15, 2), (29, 4)):
        loss, aux = run(jnp.int32(step), jax.random.clone(key))
        then = make(
            pairs=times.cells(count), times=times.constant(0.02 * step), gammas=times.constant(1.0 / (2.0 + step))
        )
        np.testing.assert_allclose(loss, jax.jit(then)(params, jax.random.clone(key), batch)[0], rtol=1e-12)
        # All eight gaps are 1/count, which lies in the bin 8/count (the last bin holds 1 as well).
        np.testing.assert_array_equal(
            aux.metrics["semigroup/raw"].by["gap"].count, 8 * (np.arange(8) == min(8 // count, 7))
        )
        losses.append(loss)
    assert len(traces) == 1
    assert np.abs(losses[0] - losses[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: times.uniform(0.5, 0.2), "high"),
        (lambda: times.logit_normal(std=0.0), "std"),
        (lambda: times.constant(1.5), "value"),
        (lambda: times.mixed([times.triangle()], [0.5]), "weights"),
        (lambda: times.mixed([times.triangle()], [0.5, 0.5]), "weights"),
        (lambda: times.dyadic(0), "levels"),
        (lambda: times.cells(0), "count"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_number_of_cells_is_whole():
    with pytest.raises(TypeError, match="count"):
        times.cells(2.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: times.mixed(times.triangle(), 1.0), r"^laws: expected a sequence"),
        (lambda: times.mixed([times.triangle()], 1.0), r"^weights: expected a sequence"),
        (lambda: times.mixed([1.0], [times.triangle()]), r"^laws\[0\]: expected a function"),
        (lambda: times.mixed([times.triangle()], ["1"]), r"^weights\[0\]: expected a number"),
        (lambda: times.ByStep(times.uniform()), r"^law: expected a function step -> law, .*got one of \(key"),
        (lambda: times.ByStep(times.uniform), r"^law: expected a function step -> law, .*got the function uniform"),
        (lambda: times.ByStep(lambda: times.uniform()), r"^law: expected a function step -> law, .*got one of \(\)"),
    ],
)
def test_wrong_parts_of_a_law_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_law_by_step_may_be_a_maker_that_takes_a_traced_number(key):
    count = jnp.int32(4)
    s, t = times.at_step(times.ByStep(times.cells), count)(key, 50)
    np.testing.assert_allclose(t - s, 0.25, rtol=1e-12)


def test_laws_print_as_the_calls_that_made_them():
    assert repr(times.constant(0.5)) == described(times.constant(0.5)) == "constant(value=0.5)"
    assert shown(times.ordered(times.constant(0.5))) == "ordered(law=constant(value=0.5))"
    assert shown(times.mixed([times.triangle()] * 4, [0.25] * 4)) == "mixed(...)"
