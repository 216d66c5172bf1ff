"""The divergence against the trace of a dense Jacobian: exact, its estimates, and the velocity of the pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import likelihood, solvers
from jflow.likelihood import WithLogDensity

# Far from symmetric, and of a trace that is large against the spread of every estimate's mean.
J = jnp.asarray([[2.0, 1.0, -0.5, 0.3], [-0.7, 1.5, 0.2, 0.9], [0.4, -1.1, 3.0, 0.6], [0.1, 0.8, -0.3, -1.0]])
X = jnp.asarray([0.3, -0.7, 1.1, 0.2])


def field(x):
    return jnp.sin(J @ x) + x * x[::-1]


def linear(x):
    return J @ x


def trace(f, x):
    return jnp.trace(jax.jacrev(f)(x))


ESTIMATES = {
    "rademacher": likelihood.hutchinson(),
    "rademacher of 3": likelihood.hutchinson(3),
    "gaussian": likelihood.hutchinson(1, "gaussian"),
    "gaussian of 3": likelihood.hutchinson(3, "gaussian"),
    "hutch++": likelihood.hutch_pp(),
    "hutch++ of 2, gaussian": likelihood.hutch_pp(2, "gaussian"),
}


def test_exact_is_the_trace_of_the_jacobian():
    run = jax.jit(lambda x: (likelihood.exact_divergence()(field, x, None), field(x), trace(field, x)))
    (value, div), want, want_div = run(X)
    np.testing.assert_allclose(value, want, rtol=1e-14)
    np.testing.assert_allclose(div, want_div, rtol=1e-13)


def draws(divergence, f, number, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(jax.jit(jax.vmap(lambda key: divergence(f, X, key)[1]))(keys))


@pytest.mark.representatives("rademacher of 3", "gaussian", "hutch++", "hutch++ of 2, gaussian")
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_are_unbiased(name, assert_mean):
    samples = draws(ESTIMATES[name], field, 20_000)
    want = float(trace(field, X))
    assert_mean(samples, want)
    # No sign, no factor of the number of probes and no forgotten part would pass.
    assert 40 * samples.std() / np.sqrt(len(samples)) < abs(want)


@pytest.mark.representatives("rademacher-3", "gaussian-1")
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_variance_is_the_documented_one(noise, probes, assert_mean):
    samples = draws(likelihood.hutchinson(probes, noise), linear, 40_000, seed=1)
    squares = np.asarray((J + J.T) / 2) ** 2
    want = 2 * (squares.sum() - (np.trace(squares) if noise == "rademacher" else 0.0)) / probes
    assert_mean((samples - float(jnp.trace(J))) ** 2, want)


@pytest.mark.parametrize(("rank", "probes"), [(2, 2), (1, 3), (4, 7)])
def test_hutch_pp_is_exact_for_a_small_rank(rank, probes):
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=(4, rank)) @ rng.normal(size=(rank, 4)))
    samples = draws(likelihood.hutch_pp(probes), lambda x: low @ x, 8)
    np.testing.assert_allclose(samples, float(jnp.trace(low)), rtol=1e-11)


def test_hutch_pp_has_an_unbiased_gradient_and_a_finite_one_of_no_jacobian_at_all(assert_mean):
    def gradient(scale, key):
        return jax.grad(lambda a: likelihood.hutch_pp(1)(lambda x: jnp.sin(a * (J @ x)), X, key)[1])(scale)

    keys = jax.random.split(jax.random.key(2), (2, 20_000))
    # At 0 the columns of the sketch are all zero, and d/da tr(a J) = tr J has an estimate nevertheless.
    found, still = jax.jit(jax.vmap(jax.vmap(gradient, (None, 0))))(jnp.asarray([0.8, 0.0]), keys)
    assert_mean(found, jax.grad(lambda a: trace(lambda x: jnp.sin(a * (J @ x)), X))(jnp.asarray(0.8)))
    assert_mean(still, jnp.trace(J))


@pytest.mark.parametrize(
    ("divergence", "rounding"),
    # The basis of Hutch++ is rounded to the event's dtype on its way through the function.
    [(likelihood.exact_divergence(), 1e-6), (likelihood.hutchinson(64), 1e-6), (likelihood.hutch_pp(5), 2.0**-8)],
    ids=["exact", "hutchinson", "hutch++"],
)
def test_events_are_trees_of_any_dtypes_and_sums_are_wide(divergence, rounding, key):
    def f(x):
        return {"a": x["a"] * 3.0, "b": x["b"] * x["b"]}

    x = {"a": jnp.full((2, 2), 0.5, jnp.bfloat16), "b": jnp.asarray([1.0], jnp.float32)}
    value, div = jax.jit(lambda x, key: divergence(f, x, key))(x, key)
    assert value["a"].dtype == jnp.bfloat16 and value["b"].dtype == div.dtype == jnp.float32
    # The Jacobian is diagonal, of trace 4 * 3 + 2, which bfloat16 sums of many probes would not hold.
    np.testing.assert_allclose(div, 14.0, rtol=rounding)


def velocity(params, t, x, cond=None, *, key=None):
    return params * t * (J @ x) + jnp.sin(x)


def test_the_state_moves_with_the_velocity_and_against_its_divergence():
    calls = []

    def counted(params, t, x, cond=None, *, key=None):
        calls.append((cond, key))
        return velocity(params, t, x)

    moved = likelihood.augment(counted)(2.0, 0.4, WithLogDensity(X, jnp.asarray(7.0)), "label")
    assert calls == [("label", None)]
    np.testing.assert_allclose(moved.x, velocity(2.0, 0.4, X), rtol=1e-14)
    np.testing.assert_allclose(moved.log_density, -trace(lambda x: velocity(2.0, 0.4, x), X), rtol=1e-13)


def test_one_key_gives_the_same_probes_at_all_times_and_another_key_to_the_velocity(key):
    def noisy(params, t, x, cond=None, *, key=None):
        return linear(x) + jax.random.normal(key)

    augmented = jax.jit(likelihood.augment(noisy, likelihood.hutchinson(1, "gaussian")))
    one, other = (augmented(None, t, WithLogDensity(X, jnp.zeros(())), key=key) for t in (0.1, 0.9))
    assert one.log_density == other.log_density and one.x.tolist() == other.x.tolist()
    # The solve's loop uses the key at every step: a key that is split there counts as reuse, and the session raises.
    solved = solvers.solve(likelihood.augment(noisy, likelihood.hutchinson()), "euler", steps=2).bind(None)
    jax.jit(lambda x, key: solved.jump(0.0, 1.0, WithLogDensity(x, jnp.zeros(())), key=key))(X, key)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_log_density_keeps_its_dtype_and_the_time_is_that_of_the_event(dtype):
    times = []

    def f(params, t, x, cond=None, *, key=None):
        times.append(t.dtype)
        return x * t.astype(dtype)

    moved = likelihood.augment(f)(None, jnp.asarray(0.5), WithLogDensity(X.astype(dtype), jnp.zeros((), jnp.float64)))
    assert (moved.x.dtype, moved.log_density.dtype, times) == (dtype, jnp.float64, [jnp.float32])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: likelihood.hutchinson(0), ValueError, "probes: .*at least 1.*0"),
        (lambda: likelihood.hutchinson(1.0), TypeError, "probes: .*whole number"),
        (lambda: likelihood.hutchinson(1, "normal"), ValueError, "noise: .*'rademacher'.*'normal'"),
        (lambda: likelihood.hutch_pp(-1), ValueError, "probes: "),
        (lambda: likelihood.hutch_pp(1, "uniform"), ValueError, "noise: "),
        (lambda: likelihood.hutchinson()(linear, X, None), ValueError, "key: expected a PRNG key.*None"),
        (lambda: likelihood.hutch_pp()(linear, X, None), ValueError, "key: "),
        (
            lambda: likelihood.exact_divergence()(lambda x: x[:2], X, None),
            ValueError,
            r"b\(x\): expected the shape of x",
        ),
        (lambda: likelihood.exact_divergence()(lambda x: (x,), X, None), ValueError, r"b\(x\): expected the pytree"),
        (lambda: likelihood.exact_divergence()(linear, np.arange(4), None), TypeError, "x: expected floating.*int"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- Reverse mode ----------------------------------------------------------------------------------------------------


@jax.custom_vjp
def reverse_only(x):
    return jnp.sin(x)


reverse_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def kernel_field(a, x):
    return reverse_only(a * (J @ x)) + x * x[::-1]


def plain_field(a, x):
    return jnp.sin(a * (J @ x)) + x * x[::-1]


@pytest.mark.representatives("1-gaussian", "3-rademacher")
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 3])
def test_reverse_mode_equals_forward_mode_probe_by_probe_with_its_gradient(probes, noise):
    def of(mode, f):
        divergence = likelihood.hutchinson(probes, noise, mode=mode)
        return jax.value_and_grad(lambda a, key: divergence(lambda x: f(a, x), X, key)[1])

    cases = [of("forward", plain_field), of("reverse", plain_field), of("reverse", kernel_field)]

    @jax.jit
    def run(a):
        return [jax.vmap(case, (None, 0))(a, jax.random.split(jax.random.key(0), 3)) for case in cases]

    forward, reverse, kernel = run(jnp.asarray(0.8))
    np.testing.assert_allclose(reverse, forward, rtol=1e-12)
    np.testing.assert_allclose(kernel, forward, rtol=1e-12)


def test_the_exact_divergence_in_reverse_mode():
    exact = likelihood.exact_divergence("reverse")
    value, div = exact(lambda x: kernel_field(0.8, x), X, None)
    np.testing.assert_allclose(value, plain_field(0.8, X), rtol=1e-14)
    np.testing.assert_allclose(div, trace(lambda x: plain_field(0.8, x), X), rtol=1e-13)
    found = jax.grad(lambda a: exact(lambda x: kernel_field(a, x), X, None)[1])(0.8)
    np.testing.assert_allclose(found, jax.grad(lambda a: trace(lambda x: plain_field(a, x), X))(0.8), rtol=1e-12)


def test_reverse_hutch_pp_is_exact_for_a_small_rank_and_unbiased(assert_mean):
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=(4, 2)) @ rng.normal(size=(2, 4)))
    samples = draws(likelihood.hutch_pp(2, mode="reverse"), lambda x: low @ x, 8)
    np.testing.assert_allclose(samples, float(jnp.trace(low)), rtol=1e-11)
    samples = draws(likelihood.hutch_pp(1, mode="reverse"), lambda x: kernel_field(1.0, x), 20_000)
    assert_mean(samples, float(trace(lambda x: plain_field(1.0, x), X)))


def test_reverse_mode_of_trees_is_wide_and_only_one_forward_pass(key):
    calls = []

    def f(x):
        calls.append(None)
        return {"a": x["a"] * 3.0, "b": x["b"] * x["b"]}

    x = {"a": jnp.full((2, 2), 0.5, jnp.bfloat16), "b": jnp.asarray([1.0], jnp.float32)}
    value, div = likelihood.hutchinson(64, mode="reverse")(f, x, key)
    assert value["a"].dtype == jnp.bfloat16 and value["b"].dtype == div.dtype == jnp.float32 and len(calls) == 1
    np.testing.assert_allclose(div, 14.0, rtol=1e-6)


def test_log_densities_along_a_solve_need_no_forward_mode(key):
    def b(p, t, x, cond=None, *, key=None):
        return kernel_field(0.4, x) * t

    def plain(p, t, x, cond=None, *, key=None):
        return plain_field(0.4, x) * t

    def along(velocity, divergence, how):
        moved = solvers.solve(likelihood.augment(velocity, divergence), "heun", steps=4)
        return how(lambda: moved.jump(None, 0.0, 1.0, WithLogDensity(X, jnp.zeros(())), key=jax.random.clone(key)))()

    expected = along(plain, likelihood.hutchinson(2), jax.jit)
    found = along(b, likelihood.hutchinson(2, mode="reverse"), jax.jit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)
    for how in (jax.jit, lambda f: f):
        with pytest.raises(TypeError, match="mode='reverse'"):
            along(b, likelihood.hutchinson(2), how)


def test_an_unknown_mode_is_refused():
    for make in (likelihood.exact_divergence, likelihood.hutchinson, likelihood.hutch_pp):
        with pytest.raises(ValueError, match=r"mode: .*'forward', 'reverse'.*'backward'"):
            make(mode="backward")
