"""Paths: divided differences, derivatives, ends, and every conversion between the four kinds of prediction."""

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, testing

PATHS = sorted(interpolants.INTERPOLANTS)


@pytest.fixture(params=PATHS)
def path(request):
    return interpolants.INTERPOLANTS[request.param]()


def test_the_definitions_of_a_path(path):
    testing.check_interpolant(path)
    assert path.endpoints[0] > 0.99 and path.endpoints[3] > 0.99
    assert path.endpoints[1] < 0.02 and path.endpoints[2] < 0.02
    assert not set(path.singular)


@pytest.mark.parametrize("make", [interpolants.cosine, interpolants.variance_preserving])
def test_the_uncut_schedules_declare_their_singular_end(make):
    path = make(epsilon=0.0)
    assert path.singular == (1.0,)
    assert np.isfinite(path.alpha_dot(0.99))
    assert not np.isfinite(path.alpha_dot(1.0))


def test_conversions_from_the_velocity_follow_the_table(path):
    """The formulas of the module's docstring, with a velocity that belongs to no pair."""
    t, x, b = 0.3, jnp.array([0.7, -0.2]), jnp.array([-1.1, 0.4])
    a, be, ad, bd, w = path.coefficients(t)
    convert = lambda target: interpolants.convert(path, t, x, b, "velocity", target)  # noqa: E731
    np.testing.assert_allclose(convert("data"), (a * b - ad * x) / w, rtol=1e-12)
    np.testing.assert_allclose(convert("noise"), (bd * x - be * b) / w, rtol=1e-12)
    np.testing.assert_allclose(convert("score"), (be * b - bd * x) / (a * w), rtol=1e-12)


def test_conversions_are_finite_at_the_ends():
    path = interpolants.linear()
    x, value = jnp.array([0.5, 1.0]), jnp.array([1.0, -2.0])
    for t in (0.0, 1.0):
        for source in interpolants.KINDS:
            for target in interpolants.KINDS:
                assert np.all(np.isfinite(interpolants.convert(path, t, x, value, source, target)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interpolants.cosine(offset=-1.0), ValueError, "offset"),
        (lambda: interpolants.variance_preserving(beta_min=0.0), ValueError, "beta_min"),
        (lambda: interpolants.variance_preserving(beta_min=2.0, beta_max=1.0), ValueError, "beta_max"),
        (lambda: interpolants.variance_exploding(sigma_max=0.001), ValueError, "sigma_max"),
        (lambda: interpolants.variance_exploding(rho=2.5), TypeError, "rho"),
        (lambda: interpolants.linear().interpolate(jnp.zeros(3), 1.0, 1.0), ValueError, "t: expected a scalar"),
        (lambda: interpolants.linear().interpolate(0.5, jnp.zeros(3), jnp.zeros(2)), ValueError, "x0"),
        (lambda: interpolants.linear().mean_derivative(0.1, 0.5, jnp.zeros(3), jnp.zeros(2)), ValueError, "x0"),
        (
            lambda: interpolants.convert("linear", 0.5, jnp.zeros(2), jnp.zeros(2), "velocity", "data"),
            TypeError,
            "interpolant: expected an Interpolant",
        ),
        (
            lambda: interpolants.convert(interpolants.linear(), 0.5, jnp.zeros(2), jnp.zeros(2), "velocity", "energy"),
            ValueError,
            "target",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
