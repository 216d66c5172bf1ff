"""Averages that were never stored, against the same averages computed directly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.training import ema, ema_posthoc

STEPS, EVERY, SIZE = 2000, 100, 32
GAMMAS = tuple(ema_posthoc.gamma_of_width(width) for width in (0.05, 0.10))
SNAPSHOTS = [(step, gamma) for step in range(EVERY, STEPS + 1, EVERY) for gamma in GAMMAS]


def profile(step, gamma, steps=STEPS):
    """The weights of p_1, ..., p_steps in ``ema.power(gamma)`` after ``step`` steps."""
    k = np.minimum(np.arange(steps + 1), step) / step
    return np.diff(k ** (gamma + 1))


@pytest.fixture(scope="module")
def walk():
    """Parameters that walk at random, far from zero: [STEPS, SIZE]."""
    return 50.0 + np.random.default_rng(0).normal(size=(STEPS, SIZE)).cumsum(0)


@pytest.fixture(scope="module")
def stored(walk):
    """The averages of the SNAPSHOTS, followed step by step."""
    schedules = [ema.power(gamma) for gamma in GAMMAS]

    def body(averages, row):
        n, p = row
        averages = [ema.update(a, p, schedule(n)) for a, schedule in zip(averages, schedules, strict=True)]
        return averages, averages

    first = [{"w": jnp.zeros(SIZE)} for _ in schedules]
    _, history = jax.lax.scan(body, first, (jnp.arange(STEPS), {"w": jnp.asarray(walk)}))
    return [{"w": history[GAMMAS.index(gamma)]["w"][step - 1]} for step, gamma in SNAPSHOTS]


@pytest.mark.parametrize("step", [STEPS, 1700, 1450])
@pytest.mark.parametrize("width", [0.03, 0.07, 0.15])
def test_reconstructed_averages_are_those_computed_directly(walk, stored, width, step):
    gamma = ema_posthoc.gamma_of_width(width)
    fit = ema_posthoc.fit_profile(SNAPSHOTS, step, gamma)
    got = np.asarray(ema_posthoc.combine(stored, fit.coefficients)["w"])
    # The combination has the profile that it is said to have; the weights of each step are rounded to float32.
    fitted = fit.coefficients @ np.stack([profile(*snapshot) for snapshot in SNAPSHOTS])
    np.testing.assert_allclose(got, fitted @ walk, atol=1e-5 * np.abs(fit.coefficients).sum())
    # And, both profiles having the sum one, |sum_k (fitted - wanted)_k (p_k - c)| <= |fitted - wanted| |p - c| for any c.
    wanted = profile(step, gamma)
    spread = np.linalg.norm(walk - walk.mean(0), axis=0)
    bound = fit.residual * np.linalg.norm(wanted) * spread
    assert np.all(np.abs(got - wanted @ walk) <= bound + 1e-4)


def test_residuals_say_what_can_be_reached():
    def residual(width, step):
        return ema_posthoc.fit_profile(SNAPSHOTS, step, ema_posthoc.gamma_of_width(width)).residual

    # Between the stored widths it fits well; outside of them, or between the stored steps, less so.
    assert residual(0.07, STEPS) < 3e-3
    assert residual(0.15, STEPS) < 1e-2
    assert residual(0.03, STEPS) > 1e-2
    assert residual(0.01, STEPS) > 0.3
    assert residual(0.07, STEPS - EVERY // 2) > 5 * residual(0.07, STEPS)
    # Nothing was stored past the end.
    assert residual(0.07, 2 * STEPS) > 0.5


@pytest.mark.parametrize("steps", [200, 2000])
@pytest.mark.parametrize("width", [0.03, 0.07, 0.15])
def test_no_other_combination_fits_better(steps, width):
    """Against the least squares on the weights themselves, with the same constraint; 200 steps are few."""
    snapshots = [(step, gamma) for step in range(steps // 10, steps + 1, steps // 10) for gamma in GAMMAS]
    gamma = ema_posthoc.gamma_of_width(width)
    fit = ema_posthoc.fit_profile(snapshots, steps, gamma)
    columns = np.stack([profile(*snapshot, steps) for snapshot in snapshots], axis=1)
    wanted = profile(steps, gamma, steps)

    def relative(c):
        return np.linalg.norm(columns @ c - wanted) / np.linalg.norm(wanted)

    # c_1 = 1 - c_2 - ... - c_m.
    rest = np.linalg.lstsq(columns[:, 1:] - columns[:, :1], wanted - columns[:, 0])[0]
    best = relative(np.concatenate([[1.0 - rest.sum()], rest]))
    assert best * (1 - 1e-9) <= relative(fit.coefficients) <= best * 1.001
    assert fit.residual == pytest.approx(best, rel=0.02)
    assert fit.coefficients.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_stored_average_is_its_own_reconstruction():
    fit = ema_posthoc.fit_profile(SNAPSHOTS, *SNAPSHOTS[25])
    np.testing.assert_allclose(fit.coefficients, np.eye(len(SNAPSHOTS))[25], atol=1e-6)
    assert fit.residual < 1e-6


def test_coefficients_stay_small_where_profiles_are_almost_the_same():
    snapshots = [(step, gamma) for step in range(10, 2001, 10) for gamma in (16.0, 16.0 * (1 + 1e-9))]
    fit = ema_posthoc.fit_profile(snapshots, 2000, 12.0)
    # Rounding of averages in float32 is multiplied by this.
    assert np.abs(fit.coefficients).sum() < 10
    assert fit.residual < 0.02
    # Nothing overflows, whatever the exponents and steps.
    far = ema_posthoc.fit_profile([(1, 500.0), (10**7, 1000.0), (10**7, 0.0)], 10**7, 900.0)
    assert np.all(np.isfinite(far.coefficients))
    assert far.residual < 0.1


def test_widths():
    assert ema_posthoc.gamma_of_width(0.05) == pytest.approx(16.97, abs=5e-3)
    assert ema_posthoc.gamma_of_width(0.10) == pytest.approx(6.94, abs=5e-3)
    assert ema_posthoc.gamma_of_width(ema_posthoc.WIDEST) == pytest.approx(0.0, abs=1e-12)
    for width in (1e-5, 0.01, 0.2, 0.28):
        assert ema_posthoc.width_of_gamma(ema_posthoc.gamma_of_width(width)) == pytest.approx(width, rel=1e-12)
    # It is the standard deviation of the profile.
    weights, k = profile(STEPS, GAMMAS[0]), np.arange(1, STEPS + 1) / STEPS
    deviation = np.sqrt(weights @ k**2 - (weights @ k) ** 2)
    assert deviation == pytest.approx(0.05, rel=1e-3)


def test_combine_keeps_dtypes_and_takes_a_generator():
    averages = ({"w": jnp.full(2, v, jnp.bfloat16), "d": np.full(2, float(v)), "n": jnp.int32(v)} for v in (1, 2, 3))
    got = ema_posthoc.combine(averages, [0.5, 0.25, 0.25])
    assert (got["w"].dtype, got["d"].dtype, int(got["n"])) == (jnp.float32, jnp.float64, 3)
    np.testing.assert_array_equal(got["w"], np.float32(1.75))
    np.testing.assert_array_equal(got["d"], 1.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_posthoc.gamma_of_width(0.289), "width"),
        (lambda: ema_posthoc.gamma_of_width(0.0), "width"),
        (lambda: ema_posthoc.width_of_gamma(-0.5), "gamma"),
        (lambda: ema_posthoc.fit_profile([(10, 7.0)], 10, 7.0), "snapshots: expected at least two"),
        (lambda: ema_posthoc.fit_profile([(10, 7.0), (20, 7.0), (10, 7)], 10, 7.0), r"snapshots.*\(10, 7.0\)"),
        (lambda: ema_posthoc.fit_profile([(0, 7.0), (20, 7.0)], 10, 7.0), "snapshots: step"),
        (lambda: ema_posthoc.fit_profile([(10, -1.0), (20, 7.0)], 10, 7.0), "snapshots: gamma"),
        (lambda: ema_posthoc.fit_profile([(10, 7.0), (20, 7.0)], 0, 7.0), "step"),
        (lambda: ema_posthoc.combine([], []), "averages"),
        (lambda: ema_posthoc.combine([{"w": np.ones(2)}], [0.5, 0.5]), "as many"),
        (lambda: ema_posthoc.combine([{"w": np.ones(2)}] * 3, [0.5, 0.5]), "as many"),
        (lambda: ema_posthoc.combine([{"w": np.ones(2)}, {"v": np.ones(2)}], [0.5, 0.5]), "averages"),
        (lambda: ema_posthoc.combine([{"w": np.ones(2)}, {"w": np.ones(3)}], [0.5, 0.5]), "averages"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda p: ema_posthoc.fit_profile(["0.9", "0.99"], 100, 6.94),
            TypeError,
            r"^snapshots: expected pairs \(step, gamma\), got \['0\.9', '0\.99'\]$",
            id="snapshots by name",
        ),
        pytest.param(
            lambda p: ema_posthoc.gamma_of_width(0.5),
            ValueError,
            r"^width: expected a number in \(0, 0\.288675\], got 0\.5$",
            id="a width wider than all",
        ),
        pytest.param(
            lambda p: ema_posthoc.fit_profile([(100, 16.0)], 100, 6.94),
            ValueError,
            "^snapshots: expected at least two stored averages to combine, got 1$",
            id="one snapshot",
        ),
        pytest.param(
            lambda p: ema_posthoc.fit_profile([(100, 16.0), (100, 16.0)], 100, 6.94),
            ValueError,
            r"^snapshots: expected each \(step, gamma\) once, got more of \[\(100, 16\.0\)\]$",
            id="a snapshot twice",
        ),
        pytest.param(
            lambda p: ema_posthoc.fit_profile([(0, 16.0), (100, 16.0)], 100, 6.94),
            ValueError,
            "^snapshots: step: expected a whole number of at least 1, got 0$",
            id="a snapshot before the start",
        ),
        pytest.param(
            lambda p: ema_posthoc.combine([p.params], [0.5, 0.5]),
            ValueError,
            "^averages, coefficients: expected as many of the one as of the other$",
            id="a coefficient too many",
        ),
        pytest.param(
            lambda p: ema_posthoc.combine([p.params, p.params["out"]], [0.5, 0.5]),
            ValueError,
            "^averages: expected the pytree structure of the first, .*got ",
            id="averages of different networks",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
