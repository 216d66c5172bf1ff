"""Residual grids and comparisons: zero for an exact map, known in closed form for a perturbed one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import diagnostics, interpolants, oracles, solvers, times, types

PATH = interpolants.trigonometric()
MEAN, STD = 0.7, 0.4
TIMES = np.array([0.0, 0.3, 0.6, 1.0])


def deviation(t):
    return jnp.sqrt(jnp.square(PATH.alpha(t)) + jnp.square(PATH.beta(t) * STD))


SMALL = 1e-3


def growing(s, t, x):
    return SMALL * (t - s)


@functools.cache
def gaussian(domain=types.FORWARD, perturb=None):
    """Data N(mean, std²) in every coordinate, shifted by cond; by divided differences, good at s = t too."""

    def mean_velocity(scale, s, t, x, cond=None, *, key=None):
        mean = MEAN + (0.0 if cond is None else cond)
        squares = PATH.alpha_dd(s, t) * (PATH.alpha(s) + PATH.alpha(t))
        squares += STD**2 * PATH.beta_dd(s, t) * (PATH.beta(s) + PATH.beta(t))
        slope = squares / (deviation(s) + deviation(t)) / deviation(s)

        def one(leaf):
            v = mean * PATH.beta_dd(s, t) + slope * (leaf - mean * PATH.beta(s))
            return v if perturb is None else v + scale * perturb(s, t, leaf)

        return jax.tree.map(one, x)

    return types.FlowMap(mean_velocity, domain).bind(jnp.float64(1.0))


def identity_map():
    return types.FlowMap(lambda p, s, t, x, c=None, *, key=None: jax.tree.map(jnp.zeros_like, x), types.BOTH).bind(())


def pairs(n=40):
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(n, 3)), MEAN + STD * rng.normal(size=(n, 3))
    return {"a": x0[:, :2], "b": x0[:, 2]}, {"a": x1[:, :2], "b": x1[:, 2]}


# ---- residuals ----


def test_exact_map_has_none_in_both_directions():
    exact = gaussian(types.BOTH)
    for reference in (None, exact):
        grid = diagnostics.residual_grid(exact, PATH, *pairs(), TIMES, TIMES[1:], reference=reference)
        for name in ("eulerian", "lagrangian", "semigroup"):
            assert getattr(grid, name).shape == (4, 3)
            assert np.all(getattr(grid, name) < 1e-12)
        assert np.all(np.isnan(grid.tangent)) if reference is None else np.all(grid.tangent < 1e-12)
    np.testing.assert_array_equal(grid.s, TIMES)
    np.testing.assert_array_equal(grid.t, TIMES[1:])


def test_residuals_of_a_perturbed_map_are_those_worked_out_by_hand():
    """v + e (t-s), whose jumps err by e (t-s)²: with a linear velocity nothing depends on x."""
    wrong = gaussian(perturb=growing)
    grid = diagnostics.residual_grid(wrong, PATH, *pairs(), TIMES, TIMES, reference=gaussian(), batch_size=7)
    s, t = np.meshgrid(TIMES, TIMES, indexing="ij")
    gap, u = t - s, 0.5 * (s + t)
    std = np.vectorize(lambda time: float(deviation(jnp.float64(time))))
    rate = np.vectorize(lambda time: float(jax.grad(lambda q: jnp.log(deviation(q)))(jnp.float64(time))))
    slope = np.where(gap > 0, (std(t) / std(u) - 1) / np.where(gap > 0, gap / 2, 1), 0)
    expected = {
        "eulerian": 2 * SMALL * gap,
        "lagrangian": 2 * SMALL * gap - rate(t) * SMALL * gap**2,
        "semigroup": 0.5 * SMALL * gap - 0.125 * slope * SMALL * gap**2,
    }
    for name, values in expected.items():
        got = getattr(grid, name)
        np.testing.assert_array_equal(np.isnan(got), gap < 0)
        np.testing.assert_allclose(got[gap >= 0], np.abs(values)[gap >= 0], rtol=1e-7, atol=1e-13)
    # The diagonal is exact, so the tangent residual is zero.
    assert np.all(grid.tangent < 1e-12)


def test_map_that_stands_still_is_a_flow_but_not_this_one():
    still, exact = identity_map(), gaussian()
    own = diagnostics.consistency_report(still, PATH, jax.random.key(0), *pairs())
    assert own == {"eulerian": 0.0, "lagrangian": 0.0, "semigroup": 0.0, "velocity": 0.0}
    other = diagnostics.consistency_report(still, PATH, jax.random.key(0), *pairs(), reference=exact)
    assert other["tangent"] == other["eulerian"] == other["velocity"] > 0.3
    assert other["lagrangian"] > 0.3 and other["semigroup"] == 0.0


def test_wrong_diagonal_alone_shows_in_the_tangent_and_against_the_reference():
    wrong = gaussian(perturb=lambda s, t, x: jnp.where(s == t, 1e-2, 0.0) * jnp.sin(x))
    key = jax.random.key(1)
    report = diagnostics.consistency_report(wrong, PATH, key, *pairs(), reference=gaussian())
    assert report["tangent"] > 1e-3
    assert max(report["eulerian"], report["lagrangian"], report["semigroup"]) < 1e-12
    own = diagnostics.consistency_report(wrong, PATH, jax.random.key(1), *pairs())
    assert min(own["eulerian"], own["lagrangian"]) > 1e-3


def test_report_is_the_root_mean_square_over_its_pairs():
    wrong = gaussian(perturb=growing)
    law = times.triangle()
    s, t = law(jax.random.key(2), 40)
    expected = 2 * SMALL * np.sqrt(np.mean(np.square(t - s)))
    report = diagnostics.consistency_report(wrong, PATH, jax.random.key(2), *pairs(), reference=gaussian(), pairs=law)
    np.testing.assert_allclose(report["eulerian"], expected, rtol=1e-9)


@pytest.mark.representatives("domain0-names0")
@pytest.mark.parametrize(("domain", "names"), [(types.TO_DATA, {"eulerian"}), (types.dyadic(3), {"semigroup"})])
def test_report_and_grid_hold_what_the_domain_defines(domain, names):
    report = diagnostics.consistency_report(gaussian(domain), PATH, jax.random.key(3), *pairs())
    assert set(report) == names | {"velocity"}
    assert all(report[name] < 1e-12 for name in names)
    s, t = [0.0, 0.3, 0.5], [0.75, 1.0]
    grid = diagnostics.residual_grid(gaussian(domain), PATH, *pairs(), s, t)
    expected = {"eulerian": [[0, 1], [0, 1], [0, 1]], "semigroup": [[0, 1], [0, 0], [1, 1]]}
    for name in ("eulerian", "lagrangian", "semigroup"):
        # On the dyadic grid, 3/4 is not a power of two and 0.3 is not a point.
        wanted = expected[name] if name in names else np.zeros((3, 2))
        np.testing.assert_array_equal(np.isfinite(getattr(grid, name)), wanted, err_msg=name)


@pytest.mark.parametrize(
    ("domain", "s", "t", "names"),
    [
        (types.FORWARD, 0.2, 0.7, {"eulerian", "lagrangian", "semigroup"}),
        (types.FORWARD, 0.7, 0.2, set()),
        (types.BOTH, 0.7, 0.2, {"eulerian", "lagrangian", "semigroup"}),
        (types.TO_DATA, 0.7, 1.0, {"eulerian"}),
        (types.TO_DATA, 0.2, 0.7, set()),
        (types.FROM_NOISE, 0.0, 0.7, {"lagrangian"}),
        (types.FROM_NOISE, 0.2, 0.7, set()),
        (types.FROM_NOISE, 0.7, 0.0, set()),
        (types.dyadic(3), 0.25, 0.5, {"semigroup"}),
        # The midpoint of the smallest cell is not a point of the grid.
        (types.dyadic(3), 0.25, 0.375, set()),
    ],
)
def test_what_a_domain_defines(domain, s, t, names):
    got = {name for name in diagnostics.IDENTITIES if diagnostics.defined(domain, name, s, t)}
    assert got == names | {"tangent"}


@pytest.mark.slow
def test_a_map_from_noise_is_asked_for_jumps_from_noise_alone():
    """v + e (t-s) at s = 0, and anything elsewhere: the report is the Lagrangian residual worked out by hand."""

    def perturbed(s, t, x):
        return jnp.where((s > 0) & (s != t), 1e6, SMALL * (t - s))

    exact, key = gaussian(types.FROM_NOISE), jax.random.key(6)
    own = diagnostics.consistency_report(exact, PATH, jax.random.clone(key), *pairs())
    assert set(own) == {"lagrangian", "velocity"} and own["lagrangian"] < 1e-12
    wrong = gaussian(types.FROM_NOISE, perturbed)
    report = diagnostics.consistency_report(wrong, PATH, jax.random.clone(key), *pairs(), reference=gaussian())
    assert set(report) == {"tangent", "lagrangian", "velocity"} and report["tangent"] < 1e-12
    _, t = times.independent(times.constant(0.0), times.uniform())(key, 40)
    rate = jax.vmap(jax.grad(lambda q: jnp.log(deviation(q))))(t)
    expected = np.sqrt(np.mean((2 * SMALL * t - rate * SMALL * t**2) ** 2))
    np.testing.assert_allclose(report["lagrangian"], expected, rtol=1e-7)
    grid = diagnostics.residual_grid(wrong, PATH, *pairs(), [0.0, 0.3], [0.6, 1.0], reference=gaussian())
    np.testing.assert_array_equal(np.isfinite(grid.lagrangian), [[1, 1], [0, 0]])
    assert np.all(np.isnan(grid.eulerian)) and np.all(np.isnan(grid.semigroup))
    with pytest.raises(ValueError, match="outside the map's domain, s = 0 only"):
        diagnostics.consistency_report(exact, PATH, jax.random.key(7), *pairs(), pairs=times.triangle())


def test_conditioning_reaches_map_and_reference():
    x0, x1 = pairs(40)
    cond, exact = np.linspace(-1.0, 1.0, 40), gaussian()
    reports = [
        diagnostics.consistency_report(exact, PATH, jax.random.key(4), x0, x1, reference=exact, cond=given)
        for given in (cond, None)
    ]
    assert max(reports[0][name] for name in diagnostics.IDENTITIES) < 1e-12
    assert abs(reports[0]["velocity"] - reports[1]["velocity"]) > 1e-3


def test_bad_arguments_of_residuals():
    x0, x1 = pairs(4)
    exact, key = gaussian(), jax.random.key(5)
    with pytest.raises(ValueError, match=r"s: expected 1 or more times in \[0, 1\]"):
        diagnostics.residual_grid(exact, PATH, x0, x1, [1.5], [1.0])
    with pytest.raises(ValueError, match="x0: expected the shape"):
        diagnostics.residual_grid(exact, PATH, x0, jax.tree.map(lambda leaf: leaf[:2], x1), [0.5], [1.0])
    with pytest.raises(ValueError, match="one leading axis"):
        diagnostics.residual_grid(exact, PATH, x0, x1, [0.5], [1.0], cond=np.ones(3))
    with pytest.raises(ValueError, match="gamma"):
        diagnostics.residual_grid(exact, PATH, x0, x1, [0.5], [1.0], gamma=1.5)
    with pytest.raises(ValueError, match="outside the map's domain"):
        backward = times.independent(times.constant(1.0), times.constant(0.0))
        diagnostics.consistency_report(exact, PATH, key, x0, x1, pairs=backward)
    with pytest.raises(TypeError, match="floating-point"):
        diagnostics.residual_grid(exact, PATH, np.arange(4), np.arange(4), [0.5], [1.0])
    with pytest.raises(ValueError, match="identity"):
        diagnostics.defined(types.BOTH, "sideways", 0.0, 1.0)


# ---- comparison ----


def test_compare_measures_the_error_of_every_map_on_every_grid():
    maps = {
        "exact": gaussian(),
        "wrong": gaussian(perturb=growing),
        "to data": gaussian(types.TO_DATA),
    }
    x0, _ = pairs(10)
    table = diagnostics.compare(maps, gaussian(), x0, [1, 2], batch_size=4)
    assert table.maps == ("exact", "wrong", "to data") and table.grids == ("1", "2")
    assert table.errors.shape == (3, 2, 10)
    np.testing.assert_array_equal(table.jumps, [1, 2])
    assert np.all(table.errors[0] < 1e-12)
    # One jump errs by e. Of two, the first error e/4 is carried on by the ratio of deviations.
    half = float(deviation(jnp.float64(1.0)) / deviation(jnp.float64(0.5)))
    for j, expected in enumerate([SMALL, SMALL / 4 * (1 + half)]):
        np.testing.assert_allclose(table.errors[1, j], expected, rtol=1e-9)
        np.testing.assert_allclose([table.rmse[1, j], table.median[1, j]], expected, rtol=1e-9)
    assert np.all(table.errors[2, 0] < 1e-12) and np.all(np.isnan(table.errors[2, 1]))
    rows = table.rows()
    assert len(rows) == 5 and rows[2] == {
        "map": "wrong",
        "grid": "1",
        "jumps": 1,
        "rmse": table.rmse[1, 0],
        "median": table.median[1, 0],
    }
    json.dumps(rows)


@pytest.mark.slow
def test_compare_ranks_solves_against_the_exact_map_of_a_mixture():
    oracle = oracles.quantile(PATH)
    params = oracles.mixture_params([0.8, 0.2], [[-0.5], [2.0]], [[0.09], [0.16]])
    exact = oracle.flow_map.bind(params)
    maps = {
        "euler 16": solvers.solve(oracle.velocity, "euler", steps=16).bind(params),
        "euler 32": solvers.solve(oracle.velocity, "euler", steps=32).bind(params),
        "tsit5": solvers.solve(oracle.velocity, rtol=1e-9, atol=1e-9).bind(params),
    }
    table = diagnostics.compare(maps, exact, np.linspace(-2.0, 2.0, 21)[:, None], [1])
    # First order; the solve to its tolerance.
    assert 1.7 < table.rmse[0, 0] / table.rmse[1, 0] < 2.3
    assert table.rmse[2, 0] < 1e-7


def test_compare_on_named_grids_with_other_ends_and_uneven_errors():
    wrong = gaussian(types.BOTH, perturb=lambda s, t, x: x)
    grids = {"part": [0.2, 0.7], "back": [1.0, 0.5]}
    x0 = np.random.default_rng(1).normal(size=(9, 2))
    table = diagnostics.compare({"wrong": wrong}, gaussian(types.BOTH), x0, grids)
    # One jump errs by (t - s) x, sample by sample.
    expected = 0.5 * np.sqrt(np.mean(x0**2, axis=1))
    for j in range(2):
        np.testing.assert_allclose(table.errors[0, j], expected, rtol=1e-9)
        np.testing.assert_allclose(table.rmse[0, j], np.sqrt(np.mean(expected**2)), rtol=1e-9)
        np.testing.assert_allclose(table.median[0, j], np.median(expected), rtol=1e-9)


def test_bad_arguments_of_compare():
    x0, exact = np.zeros((3, 2)), gaussian()
    with pytest.raises(ValueError, match="maps, grids"):
        diagnostics.compare({}, exact, x0, [1])
    with pytest.raises(ValueError, match=r"grids\['short'\]: expected 2 or more times"):
        diagnostics.compare({"m": exact}, exact, x0, {"short": [0.0]})
    with pytest.raises(ValueError, match="outside the map's domain"):
        diagnostics.compare({"m": exact}, exact, x0, {"back": [1.0, 0.0]})
    with pytest.raises(ValueError, match="one leading axis"):
        diagnostics.compare({"m": exact}, exact, np.float64(1.0), [1])
    with pytest.raises(ValueError, match="batch_size"):
        diagnostics.compare({"m": exact}, exact, x0, [1], batch_size=0)
