"""The identities vanish for every exact map, on every path, and for no other map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import identities, interpolants, oracles, types

PARAMS = {
    "gaussian": lambda: oracles.gaussian_params(jnp.array([0.6, -0.3]), jnp.array([[0.5, 0.2], [0.2, 0.3]])),
    "quantile": lambda: oracles.mixture_params(
        jnp.array([0.7, 0.3]), jnp.array([[-0.8], [1.2]]), jnp.array([[[0.09]], [[0.25]]])
    ),
    "mixture": lambda: oracles.mixture_params(
        jnp.array([0.7, 0.3]),
        jnp.array([[-0.6, 0.2], [0.9, -0.5]]),
        jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]]),
    ),
}
# Both directions, the diagonal, and both ends.
TIMES = [(0.2, 0.7), (0.8, 0.3), (0.4, 0.4), (0.0, 0.9), (0.5, 1.0), (0.0, 0.0), (1.0, 1.0), (1.0, 0.1)]
IDENTITIES = ("tangent", "eulerian", "lagrangian", "semigroup")
# The closed forms are good to rounding, the solve to its tolerance of 1e-10.
TOLERANCE = {"gaussian": 1e-10, "quantile": 1e-9, "mixture": 1e-6}


def residuals(v, velocity, s, t, x, gamma=0.3):
    """All four residuals of one sample, and the Eulerian and Lagrangian with each stop-gradient."""
    out = {
        "tangent": identities.tangent(v, t, x, velocity(t, x)),
        "eulerian": identities.eulerian(v, s, t, x, velocity(s, x)),
        "lagrangian": identities.lagrangian(v, s, t, x, velocity),
        "semigroup": identities.semigroup(v, s, t, x, gamma),
    }
    return {name: residual.difference for name, residual in out.items()}


@functools.cache
def exact_residuals(oracle_name, path_name):
    """Residuals [times, points, d] of the exact map, and of it with eps phi added: everywhere, on and off the diagonal."""
    path = interpolants.INTERPOLANTS[path_name]()
    tolerances = {"rtol": 1e-10, "atol": 1e-10} if oracle_name == "mixture" else {}
    oracle, params = oracles.ORACLES[oracle_name](path, **tolerances), PARAMS[oracle_name]()
    velocity = functools.partial(oracle.velocity, params)
    d = params.means.shape[-1]
    x = jax.random.normal(jax.random.key(0), (3, d)) + 0.2

    def perturbed(on, off):
        def v(s, t, z):
            phi = jnp.sin(3.0 * z + 2.0 * s) + jnp.cos(t) * z**2
            weight = 1e-2 * jnp.where(s == t, on, off)
            return oracle.flow_map.mean_velocity(params, s, t, z) + weight * phi

        return v

    s, t = jnp.array(TIMES).T
    run = lambda on, off: jax.vmap(  # noqa: E731
        lambda s_, t_: jax.vmap(lambda z: residuals(perturbed(on, off), velocity, s_, t_, z))(x)
    )(s, t)
    switches = jnp.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    return jax.jit(lambda c: jax.lax.map(lambda row: run(row[0], row[1]), c))(switches)


CASES = [(oracle, path) for oracle in PARAMS for path in sorted(interpolants.INTERPOLANTS)]


@pytest.mark.parametrize(("oracle", "path"), CASES)
def test_zero_at_the_exact_map_and_at_no_other(oracle, path):
    exact = exact_residuals(oracle, path)
    for name in IDENTITIES:
        clean, everywhere, on, off = np.abs(exact[name])
        assert clean.max() < TOLERANCE[oracle], name
        gap = np.array([s != t for s, t in TIMES])
        if name == "tangent":
            assert np.all(everywhere.max((1, 2)) > 1e-3) and np.all(on.max((1, 2)) > 1e-3)
            assert off.max() < TOLERANCE[oracle]  # the diagonal alone is looked at
            continue
        assert np.all(everywhere[gap].max((1, 2)) > 1e-4), name
        assert np.all(off[gap].max((1, 2)) > 1e-4), name
        # On the diagonal the Eulerian and Lagrangian residuals are the tangent one; the semigroup's is zero there.
        if name != "semigroup":
            assert np.all(on[~gap].max((1, 2)) > 1e-3), name


def test_the_identity_map_obeys_all_but_the_tangent():
    still = lambda s, t, x: 0.0 * x  # noqa: E731
    own = lambda t, x: still(t, t, x)  # noqa: E731
    x = jnp.array([0.4, -1.0])
    got = residuals(still, own, 0.2, 0.9, x)
    assert all(np.all(got[name] == 0) for name in ("eulerian", "lagrangian", "semigroup"))
    true = identities.tangent(still, 0.9, x, jnp.ones(2))
    assert np.all(true.difference == -1)


def v_of(s, t, x):
    return jnp.sin(1.3 * x[::-1] + s) * (1.0 + t) + 0.4 * x**2 * s


def test_limits_of_the_semigroup_residual():
    """R_C / (1-gamma) -> R_E as u -> s, R_C / gamma -> R_L as u -> t, both to first order; self velocities."""
    s, t, x = 0.3, 0.8, jnp.array([0.5, -0.7])
    own = lambda u, z: v_of(u, u, z)  # noqa: E731
    eulerian = identities.eulerian(v_of, s, t, x, own(s, x)).difference
    lagrangian = identities.lagrangian(v_of, s, t, x, own).difference
    for h, limit, gamma in ((1e-3, eulerian, lambda h: 1 - h), (1e-3, lagrangian, lambda h: h)):
        errors = [
            np.abs(identities.semigroup(v_of, s, t, x, gamma(step)).difference / step - limit).max()
            for step in (h, h / 10)
        ]
        assert 9 < errors[0] / errors[1] < 11


def test_the_eulerian_and_lagrangian_residuals_tend_to_the_tangent_one():
    x, c = jnp.array([0.5, -0.7]), jnp.array([1.0, 2.0])
    tangent = identities.tangent(v_of, 0.4, x, c).difference
    np.testing.assert_allclose(identities.eulerian(v_of, 0.4, 0.4, x, c).difference, tangent, rtol=1e-12)
    at_c = identities.lagrangian(v_of, 0.4, 0.4, x, lambda t, z: c).difference
    np.testing.assert_allclose(at_c, tangent, rtol=1e-12)


def test_residuals_of_v_are_those_of_the_jump():
    """R_E = -(d/ds X + grad X c), R_L = d/dt X - c(X), and the semigroup's is that of X over t - s."""
    s, t, x, c, gamma = 0.3, 0.8, jnp.array([0.5, -0.7]), jnp.array([0.2, -1.1]), 0.3
    jump = lambda s_, t_, z: types.move(z, s_, t_, v_of(s_, t_, z))  # noqa: E731
    _, along = jax.jvp(lambda s_, z: jump(s_, t, z), (s, x), (1.0, c))
    np.testing.assert_allclose(identities.eulerian(v_of, s, t, x, c).difference, -along, rtol=1e-10)
    field = lambda u, z: jnp.cos(u * z)  # noqa: E731
    _, moving = jax.jvp(lambda t_: jump(s, t_, x), (t,), (1.0,))
    expected = moving - field(t, jump(s, t, x))
    np.testing.assert_allclose(identities.lagrangian(v_of, s, t, x, field).difference, expected, rtol=1e-10)
    u = gamma * s + (1 - gamma) * t
    expected = (jump(s, t, x) - jump(u, t, jump(s, u, x))) / (t - s)
    np.testing.assert_allclose(identities.semigroup(v_of, s, t, x, gamma).difference, expected, rtol=1e-9)


def test_stop_gradients_change_no_value():
    s, t, x, c = 0.3, 0.8, jnp.array([0.5, -0.7]), jnp.array([0.2, -1.1])
    for stop in ("spatial", "velocity", "none"):
        np.testing.assert_allclose(
            identities.eulerian(v_of, s, t, x, c, stop=stop).difference,
            identities.eulerian(v_of, s, t, x, c).difference,
            rtol=1e-12,
        )
    own = lambda u, z: v_of(u, u, z)  # noqa: E731
    for stop in ("target", "none"):
        np.testing.assert_allclose(
            identities.lagrangian(v_of, s, t, x, own, stop=stop).difference,
            identities.lagrangian(v_of, s, t, x, own).difference,
            rtol=1e-12,
        )


@pytest.mark.parametrize("derivative", [identities.forward_mode, identities.finite_difference(1e-6)])
def test_derivative_operators(derivative):
    s, x = jnp.float64(0.3), {"a": jnp.array([0.5, -0.7])}
    f = lambda s_, z: {"a": jnp.sin(s_ * z["a"]) + s_**2}  # noqa: E731
    tangents = ((jnp.float64(1.0), {"a": jnp.zeros(2)}), (jnp.float64(0.0), {"a": jnp.array([2.0, 1.0])}))
    value, (in_time, in_space) = derivative(f, (s, x), *tangents)
    np.testing.assert_allclose(value["a"], f(s, x)["a"])
    np.testing.assert_allclose(in_time["a"], jnp.cos(s * x["a"]) * x["a"] + 2 * s, atol=3e-6)
    np.testing.assert_allclose(in_space["a"], jnp.cos(s * x["a"]) * s * jnp.array([2.0, 1.0]), atol=3e-6)


def test_bad_input():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="stop: expected one of"):
        identities.eulerian(v_of, 0.1, 0.2, x, x, stop="everything")
    with pytest.raises(ValueError, match="stop: expected one of"):
        identities.lagrangian(v_of, 0.1, 0.2, x, lambda t, z: z, stop="spatial")
    with pytest.raises(ValueError, match="stop: expected one of"):
        identities.semigroup(v_of, 0.1, 0.2, x, 0.5, stop="velocity")
    with pytest.raises(ValueError, match="step"):
        identities.finite_difference(0.0)
