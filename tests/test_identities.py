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

    # One vmap over all rows: nested ones, or a map over the switches, take longer to trace and compile.
    switches = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    rows = np.stack(np.meshgrid(range(4), range(len(TIMES)), range(3), indexing="ij")).reshape(3, -1)
    (on, off), (s, t), z = switches[rows[0]].T, np.array(TIMES)[rows[1]].T, np.asarray(x)[rows[2]]
    run = jax.jit(jax.vmap(lambda on, off, s, t, z: residuals(perturbed(on, off), velocity, s, t, z)))
    return {name: np.reshape(found, (4, len(TIMES), 3, d)) for name, found in run(on, off, s, t, z).items()}


CASES = [(oracle, path) for oracle in PARAMS for path in sorted(interpolants.INTERPOLANTS)]


# Every path with the closed form; the other oracles, on one path each, are the identities for maps that are not affine.
@pytest.mark.representatives("gaussian-variance_exploding", "quantile-trigonometric")
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


def test_rescaled_multiplies_the_gradient_and_the_value_each_by_its_own_factor():
    def residual(theta):
        prediction = {"a": jnp.sin(theta * jnp.array([0.5, -0.7])), "b": theta**2}
        # The target may depend on theta; it gets no gradient.
        target = jax.lax.stop_gradient(jax.tree.map(jnp.cos, prediction))
        return identities.Residual(prediction, target, jax.tree.map(jnp.ones_like, prediction), 3.0)

    theta = jnp.float64(1.3)
    slope = jax.jacfwd(lambda p: residual(p).difference)(theta)
    value = residual(theta).difference

    @jax.jit
    def scaled(p, by, of):
        return residual(p).rescaled(prediction=by, difference=of)

    for by, of in ((1.0, 1.0), (0.4, 2.5), (-1.5, 0.3), (2.0, 0.0)):
        got = scaled(theta, by, of)
        got_slope = jax.jacrev(lambda p, by=by, of=of: scaled(p, by, of).difference)(theta)
        for name in value:
            np.testing.assert_allclose(got.difference[name], of * value[name], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(got_slope[name], by * slope[name], rtol=1e-12)
            np.testing.assert_array_equal(got.tangent[name], 1.0)
        assert got.weight == 3.0


def test_finite_differences_with_a_traced_step_either_way_are_of_first_order():
    """(f(p + h d) - f(p))/h - f' d = h f''[d, d]/2 + O(h^2), for h of either sign; the mean of both has order two."""
    primals, direction = (jnp.float64(0.3), jnp.array([0.5, -0.7])), (jnp.float64(1.0), jnp.array([2.0, 1.0]))
    f = lambda s, x: v_of(s, 0.8, x)  # noqa: E731
    along = lambda h: f(*(p + h * d for p, d in zip(primals, direction, strict=True)))  # noqa: E731
    first, second = jax.jit(lambda h: (jax.jacfwd(along)(h), jax.jacfwd(jax.jacfwd(along))(h)))(0.0)
    here = np.asarray(f(*primals))

    @jax.jit
    @jax.vmap
    def difference(h):
        value, (one, still) = identities.finite_difference(h)(f, primals, direction, (0.0 * primals[0], jnp.zeros(2)))
        return value, one, still

    steps = np.array([1e-2, 5e-3, 2e-3, 1e-3])
    errors = {}
    for sign in (1.0, -1.0):
        value, one, still = difference(sign * steps)
        np.testing.assert_array_equal(value, np.stack(4 * [here]))
        # Compiled, the two equal values may be rounded in another order; operation by operation they are the same.
        np.testing.assert_array_less(np.abs(still * steps[:, None]), 2 * np.finfo(np.float64).eps)
        nothing = (0.0 * primals[0], jnp.zeros(2))
        _, (still,) = identities.finite_difference(sign * 1e-3)(f, primals, nothing)
        np.testing.assert_array_equal(still, 0.0)
        errors[sign] = np.asarray(one) - np.asarray(first)
        for i in range(2):
            order = np.polyfit(np.log(steps), np.log(np.abs(errors[sign][:, i])), 1)[0]
            assert abs(order - 1.0) < 0.05
        np.testing.assert_allclose(errors[sign][-1] / (sign * 1e-3), second / 2, rtol=2e-2)
    central = np.abs(errors[1.0] + errors[-1.0]).max(1) / 2
    assert abs(np.polyfit(np.log(steps), np.log(central), 1)[0] - 2.0) < 0.05


def test_finite_differences_keep_the_dtype_of_the_state():
    x, h = jnp.ones(2, jnp.bfloat16), jnp.float32(-0.5)
    value, (one,) = identities.finite_difference(h)(lambda z: z * z, (x,), (x,))
    assert value.dtype == one.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one.astype(jnp.float32), 1.5)  # (0.25 - 1)/(-0.5)


@pytest.mark.parametrize("stop", ["target", "none"])
@pytest.mark.parametrize("derivative", [identities.forward_mode, identities.finite_difference(-1e-2)])
def test_a_scaled_derivative_runs_from_the_velocity_to_the_identity(stop, derivative):
    """r = 0: v - c, without a derivative; r = 1: the identity to the bit; between them it is linear in r."""
    s, t, x, c = 0.3, 0.8, jnp.array([0.5, -0.7]), jnp.array([0.2, -1.1])
    field = lambda u, z: jnp.cos(u * z)  # noqa: E731

    def both(along):
        return (
            identities.eulerian(v_of, s, t, x, c, stop=stop, derivative=along),
            identities.lagrangian(v_of, s, t, x, field, stop=stop, derivative=along),
        )

    at = jax.jit(lambda r: both(identities.scaled(derivative, r)))
    none, half, whole = at(0.0), at(0.5), at(1.0)
    v = v_of(s, t, x)
    np.testing.assert_allclose(none[0].difference, v - c, rtol=1e-14)
    np.testing.assert_allclose(none[1].difference, v - field(t, x + (t - s) * v), rtol=1e-14)
    for i, plain in enumerate(jax.jit(lambda: both(derivative))()):
        np.testing.assert_array_equal(whole[i].difference, plain.difference)
        np.testing.assert_array_equal(none[i].tangent, 0.0)
        np.testing.assert_allclose(half[i].tangent, plain.tangent / 2, rtol=1e-14)
        np.testing.assert_allclose(half[i].difference, (none[i].difference + plain.difference) / 2, rtol=1e-12)
        assert np.abs(plain.difference - none[i].difference).min() > 1e-2


def test_the_first_leg_of_the_semigroup_moves_the_source():
    """D/(1-gamma) = (X_{s,t}(x) - X_{u,t}(x'))/(u-s) with x' = x + (u-s) first, for any first; by default the legs'."""
    s, t, x, first = 0.3, 0.8, jnp.array([0.5, -0.7]), jnp.array([0.2, -1.1])
    other = lambda s_, t_, z: jnp.cos(s_ + t_ * z)  # noqa: E731
    for gamma in (0.9, 0.4, 0.0):
        u = gamma * s + (1 - gamma) * t
        moved = x + (u - s) * first
        got = identities.semigroup(v_of, s, t, x, gamma, legs=other, first=first)
        apart = x + (t - s) * v_of(s, t, x) - moved - (t - u) * other(u, t, moved)
        np.testing.assert_allclose(got.difference / (1 - gamma), apart / (u - s), rtol=1e-12)
        tangent = (other(u, t, moved) - v_of(s, t, x)) / (u - s)
        np.testing.assert_allclose(got.tangent, tangent, rtol=1e-12)
        default = identities.semigroup(v_of, s, t, x, gamma, legs=other)
        given = identities.semigroup(v_of, s, t, x, gamma, legs=other, first=other(s, u, x))
        jax.tree.map(np.testing.assert_array_equal, default, given)


def test_the_semigroup_with_a_first_leg_tends_to_the_eulerian_identity():
    """As u -> s its tangent tends to d/ds v + grad v first, and D/(1-gamma) to R_E along first, both to first order."""
    s, t, x, first = 0.3, 0.8, jnp.array([0.5, -0.7]), jnp.array([0.2, -1.1])
    _, total = jax.jvp(lambda s_, z: v_of(s_, t, z), (s, x), (1.0, first))
    eulerian = identities.eulerian(v_of, s, t, x, first).difference
    steps = jnp.array([1e-2, 5e-3, 2e-3, 1e-3])

    @jax.jit
    @jax.vmap
    def at(h):
        got = identities.semigroup(v_of, s, t, x, 1.0 - h, first=first)
        return got.tangent - total, got.difference / h - eulerian

    for errors in map(np.abs, at(steps)):
        for i in range(2):
            assert abs(np.polyfit(np.log(steps), np.log(errors[:, i]), 1)[0] - 1.0) < 0.05


@pytest.mark.parametrize("stop", ["target", "none"])
def test_the_semigroup_at_u_equal_to_s_is_the_first_leg_with_finite_gradients(stop):
    """gamma = 1: D = v_{s,t}(x) - v_{s,t}(x) = 0 whatever the first leg, the tangent zero; so too where s = t."""
    first = jnp.array([0.2, -1.1])

    def both(s, t, x, gamma, scale):
        v = lambda s_, t_, z: scale * v_of(s_, t_, z)  # noqa: E731
        got = identities.semigroup(v, s, t, x, gamma, first=scale * first, stop=stop)
        return got.difference, got.tangent

    x = jnp.array([0.5, -0.7])
    jacobian = jax.jit(jax.jacrev(both, (0, 1, 2, 3, 4)))
    for s, t, gamma in ((0.3, 0.8, 1.0), (0.3, 0.3, 0.4), (0.3, 0.3, 1.0), (0.0, 1.0, 1.0)):
        arguments = (s, t, x, jnp.float64(gamma), jnp.float64(1.7))
        difference, tangent = jax.jit(both)(*arguments)
        np.testing.assert_array_equal(tangent, 0.0)
        v = 1.7 * v_of(s, t, x)
        np.testing.assert_allclose(difference, (1 - gamma) * (v - 1.7 * first), rtol=1e-12, atol=1e-14)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jacobian(*arguments)))
    # The gradient of the residual itself: of the prediction alone, or of nothing where both sides are the same.
    slope = jacobian(0.3, 0.8, x, jnp.float64(1.0), jnp.float64(1.7))[0][4]
    np.testing.assert_allclose(slope, v_of(0.3, 0.8, x) if stop == "target" else 0.0 * x, rtol=1e-12, atol=1e-14)


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
    with pytest.raises(TypeError, match="step"):
        identities.finite_difference("forward")


# --- The central difference ------------------------------------------------------------------------------------------

# None lies on the other side of a gap below: the error of the one-sided difference is twice that of the central one.
STEPS = np.asarray([0.012, 0.006, 0.003, 0.0015])
EDGES = [(0.0, 0.9), (0.0, 1.0), (0.5, 1.0), (0.4, 0.43), (0.4, 0.401), (0.999, 1.0), (0.0, 1e-3), (0.2, 0.7)]
EDGES += [(t, s) for s, t in EDGES]


def exact_gaussian():
    oracle, params = oracles.gaussian(interpolants.linear()), PARAMS["gaussian"]()
    return (
        lambda s, t, x: oracle.flow_map.mean_velocity(params, s, t, x),
        lambda t, x: oracle.velocity(params, t, x),
    )


@functools.cache
def central_errors(identity):
    """Norms [edges, steps] of the residual of the exact map."""
    v, velocity = exact_gaussian()
    x = jnp.asarray([0.9, -1.4])

    def error(s, t, h):
        derivative = identities.central_difference(h)
        if identity == "lagrangian":
            return identities.lagrangian(v, s, t, x, velocity, derivative=derivative).difference
        return identities.eulerian(v, s, t, x, velocity(s, x), stop=identity, derivative=derivative).difference

    s, t = np.repeat(EDGES, len(STEPS), axis=0).T
    found = jax.jit(jax.vmap(error))(s, t, np.tile(STEPS, len(EDGES)))
    return np.linalg.norm(found, axis=1).reshape(len(EDGES), len(STEPS))


@pytest.mark.parametrize("identity", ["target", "spatial", "velocity", "none", "lagrangian"])
@pytest.mark.parametrize(("s", "t"), EDGES)
def test_the_central_difference_is_of_second_order_up_to_the_edges_of_the_domain(identity, s, t):
    errors = central_errors(identity)[EDGES.index((s, t))]
    assert errors.max() < 0.05 * abs(float(t - s)) + 1e-12
    if errors.min() > 1e-9 and len(np.unique(errors)) == len(errors):  # else h is bounded by the interval
        order = np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
        assert order == pytest.approx(2.0, abs=0.15)
    else:
        assert abs(float(t - s)) < 0.05 or errors.max() < 1e-9


@pytest.mark.parametrize("h", [1e-3, 0.05, 0.4, 3.0])
@pytest.mark.parametrize("identity", ["eulerian", "lagrangian"])
def test_the_central_difference_asks_only_where_the_map_is_defined(identity, h):
    """Times within [0, 1], on the side of the diagonal where the row lies, at ends, corners and on the diagonal itself."""
    times = [0.0, 1e-9, 1e-4, 0.3, 0.3 + 1e-4, 0.5, 1.0 - 1e-4, 1.0]
    pairs = jnp.asarray([(s, t) for s in times for t in times])

    def asked(s, t):
        seen = []

        def v(s_, t_, x):
            seen.append((s_, t_))
            return x * (1.0 + s_ - t_) + s_ * t_

        derivative, x = identities.central_difference(h), jnp.asarray([0.4])
        if identity == "lagrangian":
            out = identities.lagrangian(v, s, t, x, lambda t, x: x, derivative=derivative)
        else:
            out = identities.eulerian(v, s, t, x, x, derivative=derivative)
        return jnp.asarray(seen), (out.difference, out.tangent)

    seen, out = jax.jit(jax.vmap(asked))(pairs[:, 0], pairs[:, 1])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))
    forward = (pairs[:, 0] <= pairs[:, 1])[:, None]
    assert np.all(seen >= 0.0) and np.all(seen <= 1.0)
    assert np.all(np.where(forward, seen[..., 0] <= seen[..., 1], seen[..., 0] >= seen[..., 1]))


def test_the_central_difference_of_plain_functions_and_under_a_factor():
    x = jnp.asarray([0.4, -0.2])
    value, (one, two) = identities.central_difference(1e-3)(jnp.sin, (x,), (jnp.ones(2),), (x,))
    np.testing.assert_allclose(value, jnp.sin(x), rtol=1e-15)
    np.testing.assert_allclose(one, jnp.cos(x), rtol=2e-7)
    np.testing.assert_allclose(two, jnp.cos(x) * x, rtol=2e-7)
    seen = []

    def f(t):
        seen.append(float(t))
        return t**2

    half = identities.within(identities.scaled(identities.central_difference(0.1), 0.5), (0.0, 1.0))
    _, (slope,) = half(f, (jnp.asarray(1.0),), (jnp.asarray(1.0),))
    assert slope == pytest.approx(1.0, rel=1e-12) and max(seen) == 1.0
    small = jnp.asarray([0.5], jnp.float32)
    _, (kept,) = identities.central_difference(jnp.float32(0.01))(lambda z: z * z, (small,), (small,))
    assert kept.dtype == jnp.float32
    _, (kept,) = identities.central_difference(0.01)(lambda z: z * z, (small,), (small,))
    assert kept.dtype == jnp.float32
    for wrong, error in ((0.0, ValueError), (-0.1, ValueError), (np.inf, ValueError), ("h", TypeError)):
        with pytest.raises(error, match="step"):
            identities.central_difference(wrong)
