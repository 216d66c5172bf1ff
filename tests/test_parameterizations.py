"""Parameterizations: the identity at s = t, the diagonal, and agreement with A x + B net for every form and path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, oracles, parameterizations, types

FORMS = sorted(parameterizations.PARAMETERIZATIONS)
CASES = [
    (form, path)
    for form in FORMS
    for path in sorted(interpolants.INTERPOLANTS)
    if form != "trigonometric" or path == "trigonometric"
]
# Every form and every path.
EACH = ["gaussian-cosine", "noise-linear", "noise-variance_preserving", "trigonometric-trigonometric", "v-linear"]
EACH += ["x-trigonometric", "x-variance_exploding"]
PAIRS = [(0.2, 0.7), (0.8, 0.3), (0.4, 0.4), (0.15, 0.9)]


def closed_form(form, path, s, t):
    """A(s,t) and B(s,t) as the table of parameterizations writes them."""
    a_s, a_t, b_s, b_t = path.alpha(s), path.alpha(t), path.beta(s), path.beta(t)
    return {
        "v": lambda: (1.0, t - s),
        "x": lambda: (a_t / a_s, b_t - a_t * b_s / a_s),
        "noise": lambda: (b_t / b_s, a_t - b_t * a_s / b_s),
        "gaussian": lambda: (jnp.sqrt((a_t**2 + b_t**2) / (a_s**2 + b_s**2)), t - s),
        "trigonometric": lambda: (jnp.cos(jnp.pi * (t - s) / 2), jnp.sin(jnp.pi * (t - s) / 2)),
    }[form]()


@pytest.mark.representatives(*EACH)
@pytest.mark.parametrize(("form", "name"), CASES)
def test_jump_is_a_x_plus_b_net(form, name):
    path = interpolants.INTERPOLANTS[name]()
    make = parameterizations.PARAMETERIZATIONS[form]
    parameterization = make(path) if form in ("v", "gaussian", "trigonometric") else make(path, clamp=1e-3)
    net = lambda params, s, t, x, cond=None, *, key=None: jnp.sin(params * x) + s - 2.0 * t  # noqa: E731
    flow_map = parameterizations.flow_map(net, parameterization, types.BOTH)
    x, params = jnp.array([0.7, -1.3]), jnp.float64(1.5)

    @jax.jit
    @jax.vmap
    def run(s, t):
        big_a, big_b = (jnp.asarray(c) for c in closed_form(form, path, s, t))
        expected = big_a * x + big_b * net(params, s, t, x)
        return flow_map.jump(params, s, t, x), expected, parameterization.jump_coefficients(s, t), (big_a, big_b)

    jumped, expected, coefficients, by_hand = run(*jnp.asarray(PAIRS).T)
    np.testing.assert_allclose(jumped, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(coefficients, by_hand, rtol=1e-9, atol=1e-10)


@pytest.mark.representatives(*EACH)
@pytest.mark.parametrize(("form", "name"), CASES)
def test_identity_at_s_equals_t_and_finite_derivatives_everywhere(form, name):
    path = interpolants.INTERPOLANTS[name]()
    parameterization = parameterizations.PARAMETERIZATIONS[form](path)
    ends = np.array([0.0, 0.5, 1.0])
    s, t = (jnp.asarray(grid.ravel()) for grid in np.meshgrid(ends, ends))

    @jax.jit
    def run(s, t):
        still = jax.vmap(parameterization.jump_coefficients)(jnp.asarray(ends), jnp.asarray(ends))
        return still, jax.vmap(jax.jacrev(parameterization.coefficients, (0, 1)))(s, t)

    (scale, shift), slopes = run(s, t)
    np.testing.assert_array_equal(scale, 1.0)
    np.testing.assert_array_equal(shift, 0.0)
    assert np.all(np.isfinite(jax.tree.leaves(slopes)))


def test_the_diagonal_of_each_form_is_what_it_claims():
    """With the exact prediction of one pair the velocity is that of the pair; trigonometric: (pi/2) net."""
    x0, x1, t = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5]), 0.4
    for name in interpolants.INTERPOLANTS:
        path = interpolants.INTERPOLANTS[name]()
        x, b = path.interpolate(t, x0, x1), path.derivative(t, x0, x1)
        for form, value in (("v", b), ("x", x1), ("noise", x0)):
            parameterization = parameterizations.PARAMETERIZATIONS[form](path)
            flow_map = parameterizations.flow_map(lambda p, *_, key=None: p, parameterization, types.BOTH)
            np.testing.assert_allclose(flow_map.velocity(value, t, x), b, rtol=1e-9)
    path = interpolants.trigonometric()
    flow_map = parameterizations.flow_map(
        lambda p, *_, key=None: p, parameterizations.trigonometric_form(path), types.BOTH
    )
    np.testing.assert_allclose(flow_map.velocity(x0, t, x1), jnp.pi / 2 * x0, rtol=1e-12)


@pytest.mark.representatives(*EACH)
@pytest.mark.parametrize(("form", "name"), CASES)
def test_the_form_of_a_map_says_what_its_network_predicts(form, name):
    """Predicting, of one pair, what ``form`` names, the map carries I_s to I_t: the flow of that pair alone."""
    path = interpolants.INTERPOLANTS[name]()
    parameterization = parameterizations.PARAMETERIZATIONS[form](path)
    flow_map = parameterizations.flow_map(lambda p, *_, key=None: p, parameterization, types.BOTH)
    x0, x1 = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5])
    sigma = lambda u: jnp.sqrt(path.alpha(u) ** 2 + path.beta(u) ** 2)  # noqa: E731

    def run(s, t):
        x, mean = path.interpolate(s, x0, x1), path.mean_derivative(s, t, x0, x1)
        growth = (sigma(t) / sigma(s) - 1.0) / (t - s) if s != t else jax.grad(lambda u: jnp.log(sigma(u)))(s)
        predicted = {
            "v": mean,
            "x": x1,
            "noise": x0,
            "gaussian": mean - growth * x,
            "trigonometric": path.derivative(s, x0, x1) * 2.0 / jnp.pi,
        }[flow_map.form]
        return flow_map.jump(predicted, s, t, x), path.interpolate(t, x0, x1), path.alpha(s), path.beta(s)

    for there, expected, *signal in jax.jit(lambda: [run(s, t) for s, t in PAIRS])():
        if form in ("x", "noise") and min(signal) < 0.05:
            continue  # the clamp is in force
        np.testing.assert_allclose(there, expected, rtol=1e-8, atol=1e-9)
    assert flow_map.form == form


def test_a_map_without_a_parameterization_has_no_form():
    bare = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: x)
    net = lambda p, *_, key=None: p  # noqa: E731
    assert bare.form == parameterizations.from_velocity(bare, net).form == ""


def test_the_clamp_of_the_data_form_is_finite_at_the_data_and_right_for_the_exact_denoiser():
    path = interpolants.linear()
    flow_map = parameterizations.flow_map(lambda p, *_, key=None: p, parameterizations.data_form(path), types.BOTH)
    x = jnp.array([1.5, -0.5])
    # At s = t = 1 the exact denoiser is x and the exact velocity E[x1 - x0 | x1 = x] = x.
    np.testing.assert_allclose(flow_map.velocity(x, 1.0, x), x, rtol=1e-9)


def test_bad_input():
    flow_map = parameterizations.flow_map(
        lambda p, s, t, x, cond, *, key: x[:1], parameterizations.mean_velocity_form()
    )
    with pytest.raises(ValueError, match="network output"):
        flow_map.jump(None, 0.0, 1.0, jnp.zeros(2))
    with pytest.raises(ValueError, match="s: expected a scalar"):
        flow_map.jump(None, jnp.zeros(3), 1.0, jnp.zeros(2))
    with pytest.raises(TypeError, match="x: expected floating-point"):
        flow_map.jump(None, 0.0, 1.0, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="trigonometric path"):
        parameterizations.trigonometric_form(interpolants.linear())
    with pytest.raises(ValueError, match="clamp"):
        parameterizations.data_form(interpolants.linear(), clamp=0.0)


def test_domain_goes_with_the_map():
    flow_map = parameterizations.flow_map(
        lambda p, s, t, x, cond, *, key: x, parameterizations.mean_velocity_form(), types.TO_DATA
    )
    assert flow_map.bind(None).domain is types.TO_DATA


def velocity(params, t, x, cond=None, *, key=None):
    return jnp.sin(params["a"] * x + t)


def correction(params, s, t, x, cond=None, *, key=None):
    return params["c"] * jnp.cos(x * t - s)


STARTED = parameterizations.Started({"a": jnp.float64(1.5)}, {"c": jnp.float64(0.8)})
X = jnp.array([0.7, -1.3])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_map_that_starts_from_a_velocity(frozen):
    flow_map = parameterizations.from_velocity(velocity, correction, frozen=frozen, domain=types.BOTH)
    for s, t in PAIRS:
        expected = velocity(STARTED.velocity, s, X) + (t - s) * correction(STARTED.correction, s, t, X)
        np.testing.assert_allclose(flow_map.mean_velocity(STARTED, s, t, X), expected, rtol=1e-14)
        # The diagonal is the velocity to the bit, by the override and without it.
        np.testing.assert_array_equal(flow_map.velocity(STARTED, t, X), velocity(STARTED.velocity, t, X))
        np.testing.assert_array_equal(flow_map.mean_velocity(STARTED, t, t, X), velocity(STARTED.velocity, t, X))

    def loss(params, s, t):
        return jnp.sum(flow_map.mean_velocity(params, s, t, X) ** 2) + jnp.sum(flow_map.velocity(params, t, X) ** 2)

    gradient = jax.grad(loss)(STARTED, 0.2, 0.7)
    assert (gradient.velocity["a"] == 0) == frozen and gradient.correction["c"] != 0
    h, at, along = 1e-6, (0.2, 0.7, X), (0.5, -1.0, jnp.array([0.3, 1.1]))
    move = lambda h: flow_map.mean_velocity(STARTED, *(a + h * d for a, d in zip(at, along, strict=True)))  # noqa: E731
    _, tangent = jax.jvp(lambda *a: flow_map.mean_velocity(STARTED, *a), at, along)
    np.testing.assert_allclose(tangent, (move(h) - move(-h)) / (2 * h), rtol=1e-7)


def test_a_started_map_of_exact_velocity_needs_half_its_derivative_along_the_flow():
    """The network's target at t = s, from the exact map of a Gaussian."""
    oracle, params = oracles.gaussian(interpolants.linear()), oracles.gaussian_params([0.5, -1.0], [0.3, 2.0])
    exact, s = oracle.flow_map, 0.4
    b = exact.velocity(params, s, X)
    _, along = jax.jvp(lambda s, x: exact.velocity(params, s, x), (s, X), (1.0, b))
    t = s + 1e-5
    np.testing.assert_allclose((exact.mean_velocity(params, s, t, X) - b) / (t - s), along / 2, rtol=1e-4)
    flow_map = parameterizations.from_velocity(exact, lambda p, s, t, x, cond=None, *, key=None: jnp.zeros_like(x))
    started = parameterizations.Started(params, None)
    np.testing.assert_allclose(flow_map.jump(started, s, 0.5, X), X + 0.1 * b, rtol=1e-14)  # one Euler step


@pytest.mark.parametrize("frozen", [False, True])
def test_on_the_diagonal_a_started_map_calls_the_velocity_alone(frozen):
    def never(*_, **__):
        pytest.fail("called")

    flow_map = parameterizations.from_velocity(velocity, never, frozen=frozen, domain=types.BOTH)
    assert flow_map.domain is types.BOTH
    np.testing.assert_array_equal(flow_map.velocity(STARTED, 0.3, X), velocity(STARTED.velocity, 0.3, X))
    # The derivative in t does not pass through the velocity.
    whole = parameterizations.from_velocity(velocity, correction, frozen=frozen)
    jaxpr = jax.make_jaxpr(lambda t: jax.jvp(lambda t: whole.mean_velocity(STARTED, 0.2, t, X), (t,), (1.0,)))(0.7)
    assert str(jaxpr).count("= sin") == 2  # of b, and the derivative of the network's cosine


def test_refusals_of_a_started_map():
    with pytest.raises(TypeError, match="velocity: expected a Velocity or a FlowMap, got dict"):
        parameterizations.from_velocity({}, correction)
    flow_map = parameterizations.from_velocity(velocity, correction)
    with pytest.raises(TypeError, match=r"params: expected Started\(velocity, correction\), got tuple"):
        flow_map.jump(({}, {}), 0.0, 1.0, X)
    with pytest.raises(ValueError, match="t: expected a scalar"):
        flow_map.jump(STARTED, 0.0, jnp.ones(2), X)
    with pytest.raises(TypeError, match="x: expected floating-point"):
        flow_map.velocity(STARTED, 0.0, jnp.zeros(2, int))
    short = lambda *args, key=None: X[:1]  # noqa: E731
    with pytest.raises(ValueError, match="network output"):
        parameterizations.from_velocity(velocity, short).jump(STARTED, 0.0, 1.0, X)
    with pytest.raises(ValueError, match="velocity's output"):
        parameterizations.from_velocity(short, correction).jump(STARTED, 0.0, 1.0, X)


def test_the_gaussian_form_reads_the_deviation_of_the_base():
    """With a network of zeros the map is the exact one of N(0, I) data and the base, and another base is refused."""
    from jflow import bases, oracles

    path, base = interpolants.trigonometric(), bases.Normal(std=2.5)
    zero = lambda p, s, t, x, cond=None, *, key=None: jnp.zeros_like(x)  # noqa: E731
    flow_map = parameterizations.flow_map(zero, parameterizations.gaussian_form(path, base))
    exact = oracles.gaussian(path, base=base)
    truth = oracles.gaussian_params(jnp.zeros(2), jnp.eye(2))
    x = jnp.array([0.7, -1.2])
    for s, t in ((0.0, 1.0), (0.2, 0.2), (0.3, 0.9)):
        want = exact.flow_map.mean_velocity(truth, s, t, x)
        np.testing.assert_allclose(flow_map.mean_velocity(None, s, t, x), want, rtol=1e-10)
    for other in (bases.Normal(mean=1.0), bases.Normal(std=jnp.ones(2))):
        with pytest.raises(ValueError, match="gaussian_form expects a Normal with mean 0"):
            parameterizations.gaussian_form(path, other)


@pytest.mark.parametrize("form", sorted(parameterizations.PARAMETERIZATIONS))
def test_a_name_is_not_an_interpolant(form):
    for wrong, got in (("linear", "str 'linear'"), (interpolants.linear, "function linear"), (0.05, "float 0.05")):
        with pytest.raises(TypeError, match=f"^interpolant: expected an Interpolant, .*got {got}$"):
            parameterizations.PARAMETERIZATIONS[form](wrong)


def test_arguments_that_are_not_a_network_and_a_form_are_named():
    net = lambda p, s, t, x, cond=None, *, key=None: p @ x  # noqa: E731
    form = parameterizations.mean_velocity_form()
    with pytest.raises(TypeError, match=r"parameterization: expected .*, got a function that was not called"):
        parameterizations.flow_map(net, parameterizations.mean_velocity_form)
    with pytest.raises(TypeError, match=r"parameterization: expected a Parameterization.*, got 'v'"):
        parameterizations.flow_map(net, "v")
    with pytest.raises(TypeError, match=r"apply: expected a network .*, got Parameterization"):
        parameterizations.flow_map(form, net)
    made = parameterizations.flow_map(net, form)
    with pytest.raises(TypeError, match=r"apply: expected a network .*, got FlowMap"):
        parameterizations.flow_map(made, form)
    with pytest.raises(TypeError, match=r"apply: expected a function .*of two times, got one of \(params, t, x"):
        parameterizations.flow_map(velocity, form)
    with pytest.raises(TypeError, match=r"apply: expected a network .*, got FlowMap"):
        parameterizations.from_velocity(velocity, made)
    # A batch in place of a sample: the network's own error, with what it was given.
    for call in (made.jump, made.mean_velocity):
        with pytest.raises(TypeError) as error:
            call(jnp.eye(3), 0.0, 1.0, jnp.zeros((8, 3)))
        assert any("one sample, here of shape (8, 3)" in note for note in error.value.__notes__)
    with pytest.raises(ValueError, match="s: expected a scalar"):
        made.jump(jnp.eye(3), jnp.zeros(8), jnp.ones(8), jnp.zeros((8, 3)))
    with pytest.raises(ValueError, match="outside the map's domain"):
        made.jump(jnp.eye(3), 1.0, 0.0, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"t: expected a time in \[0, 1\], got 999"):
        made.jump(jnp.eye(3), 0.0, 999.0, jnp.zeros(3))
