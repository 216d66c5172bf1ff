"""Paths: divided differences, derivatives, ends, and every conversion between the four kinds of prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants

PATHS = sorted(interpolants.INTERPOLANTS)
PAIRS = [(0.2, 0.7), (0.9, 0.1), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5001)]


@pytest.fixture(params=PATHS)
def path(request):
    return interpolants.INTERPOLANTS[request.param]()


def test_ends_are_as_declared(path):
    ends = [path.alpha(0.0), path.beta(0.0), path.alpha(1.0), path.beta(1.0)]
    np.testing.assert_allclose(ends, path.endpoints, atol=1e-12)
    assert path.endpoints[0] > 0.99 and path.endpoints[3] > 0.99
    assert path.endpoints[1] < 0.02 and path.endpoints[2] < 0.02


@pytest.mark.parametrize("which", ["alpha", "beta"])
def test_divided_differences(path, which):
    value, dd = getattr(path, which), getattr(path, f"{which}_dd")
    dot = getattr(path, f"{which}_dot")
    for s, t in PAIRS:
        s, t = jnp.float64(s), jnp.float64(t)
        slope = (value(t) - value(s)) / (t - s)
        np.testing.assert_allclose(dd(s, t), slope, rtol=1e-8, atol=1e-9)
    for t in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(dd(jnp.float64(t), jnp.float64(t)), dot(t), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("which", ["alpha", "beta"])
def test_divided_differences_have_derivatives_on_the_diagonal(path, which):
    """d/dt f[s,t] at t = s is f''/2, which a formula that divides by t - s cannot give."""
    value, dd = getattr(path, which), getattr(path, f"{which}_dd")
    for t in (0.2, 0.6):
        second = jax.grad(jax.grad(lambda z: value(z)))(t)
        for argument in (0, 1):
            np.testing.assert_allclose(jax.grad(dd, argument)(t, t), second / 2, rtol=1e-9, atol=1e-10)


def test_derivatives_agree_with_finite_differences(path):
    h = 1e-6
    for t in (0.1, 0.5, 0.9):
        for value, dot in ((path.alpha, path.alpha_dot), (path.beta, path.beta_dot)):
            np.testing.assert_allclose(dot(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)
        c = path.coefficients(t)
        np.testing.assert_allclose(path.wronskian(t), c.alpha * c.beta_dot - c.alpha_dot * c.beta)
        assert path.wronskian(t) > 0


def test_finite_at_both_ends_with_gradients(path):
    x0, x1 = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5])

    def total(t):
        return jnp.sum(path.interpolate(t, x0, x1)) + jnp.sum(path.derivative(t, x0, x1))

    for t in (0.0, 1.0):
        assert t not in path.singular
        assert np.isfinite(total(t)) and np.isfinite(jax.grad(total)(t))


def test_the_mean_derivative_is_the_mean_velocity_of_the_pair(path):
    x0 = {"a": jnp.array([0.3, -1.0]), "b": jnp.array(0.8)}
    x1 = {"a": jnp.array([2.0, 0.5]), "b": jnp.array(-0.4)}

    def close(got, expected, **tolerance):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)

    for s, t in PAIRS:
        there, here = path.interpolate(t, x0, x1), path.interpolate(s, x0, x1)
        slope = jax.tree.map(lambda a, b, gap=t - s: (a - b) / gap, there, here)
        close(path.mean_derivative(s, t, x0, x1), slope, rtol=1e-8, atol=1e-9)
    for t in (0.0, 0.3, 1.0):
        close(path.mean_derivative(t, t, x0, x1), path.derivative(t, x0, x1), rtol=1e-10, atol=1e-14)
    # Within 1e-9 of the diagonal a quotient has lost seven digits.
    s, t = 0.3, 0.3 + 1e-9
    close(path.mean_derivative(s, t, x0, x1), path.derivative(0.5 * (s + t), x0, x1), rtol=1e-11)


def test_the_mean_derivative_is_the_integral_of_the_derivative(path):
    """By Gauss-Legendre quadrature; a formula of the divided differences that is wrong anywhere is found."""
    x0, x1, (s, t) = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5]), (0.15, 0.85)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    at = jnp.asarray(s + (t - s) * 0.5 * (nodes + 1))
    values = jax.vmap(lambda u: path.derivative(u, x0, x1))(at)
    np.testing.assert_allclose(path.mean_derivative(s, t, x0, x1), 0.5 * weights @ values, rtol=1e-9)


def test_the_mean_derivative_is_finite_with_its_gradients_in_every_corner(path):
    x0, x1 = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5])
    total = lambda s, t: jnp.sum(path.mean_derivative(s, t, x0, x1) ** 2)  # noqa: E731
    s, t = (grid.ravel() for grid in jnp.meshgrid(*2 * [jnp.array([0.0, 0.5, 1.0])]))
    for dtype in (jnp.float64, jnp.float32):
        found = jax.jit(jax.vmap(jax.value_and_grad(total, (0, 1))))(s.astype(dtype), t.astype(dtype))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("make", [interpolants.cosine, interpolants.variance_preserving])
def test_the_uncut_schedules_declare_their_singular_end(make):
    path = make(epsilon=0.0)
    assert path.singular == (1.0,)
    assert np.isfinite(path.alpha_dot(0.99))
    assert not np.isfinite(path.alpha_dot(1.0))


@pytest.mark.parametrize("source", interpolants.KINDS)
@pytest.mark.parametrize("target", interpolants.KINDS)
def test_conversions(path, source, target):
    t = 0.4
    x0, x1 = {"a": jnp.array([0.3, -1.0])}, {"a": jnp.array([2.0, 0.5])}
    values = {
        "velocity": path.derivative(t, x0, x1)["a"],
        "noise": x0["a"],
        "data": x1["a"],
        "score": -x0["a"] / path.alpha(t),
    }
    got = interpolants.convert(path, t, path.interpolate(t, x0, x1), {"a": values[source]}, source, target)
    np.testing.assert_allclose(got["a"], values[target], rtol=1e-9)


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
