"""Log-densities along the ODE against closed forms, in both directions, with their estimates, flags and cost."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, interpolants, likelihood, nets, oracles
from jflow.types import FlowMap


def own(log_density):
    """A base of one's own, of which only the log-density is asked."""
    return SimpleNamespace(name="own", sample=jax.random.normal, log_density=log_density, score=jax.grad(log_density))


WEIGHTS = [0.6, 0.4]
MEANS = [[-1.0, 0.5], [1.2, -0.3]]
COVS = [[[0.5, 0.2], [0.2, 0.3]], [[0.15, -0.05], [-0.05, 0.4]]]
MIXTURE = oracles.mixture_params(WEIGHTS, MEANS, COVS)
# Scales far from 1: a forgotten or doubled divergence is off by nats.
GAUSSIAN = oracles.gaussian_params([0.7, -1.1, 0.2], [[0.2, 0.05, 0.0], [0.05, 0.1, 0.02], [0.0, 0.02, 4.0]])
TIMES = np.array([1.0, 1.0, 0.6, 0.3, 0.0])
# Near the means at time 1, and near the base at time 0.
POINTS = {
    "gaussian": [[1.2, -0.5, 1.4], [0.8, -1.3, 1.6], [1.3, -2.2, 1.4], [0.1, -0.4, -0.7], [0.6, 0.9, 1.5]],
    "mixture": [[-2.271, 0.406], [-0.869, 0.228], [-0.161, -0.714], [0.564, -0.224], [-1.123, 0.017]],
}
CASES = [("gaussian", "trigonometric"), ("mixture", "linear"), ("mixture", "cosine")]


@functools.cache
def make(name, path):
    """The oracle, its params, its density along the ODE, and a point for each of TIMES."""
    oracle = oracles.ORACLES[name](interpolants.INTERPOLANTS[path]())
    params = MIXTURE if name == "mixture" else GAUSSIAN
    return oracle, params, likelihood.along_ode(oracle.velocity), np.array(POINTS[name])


def both(name, path):
    oracle, params, ode, x = make(name, path)

    @jax.jit
    @jax.vmap
    def there_and_back(t, x):
        back = ode.log_density(params, x, t=t)
        forth = ode.push(params, back.x0, t=t)
        return back, forth, oracle.log_density(params, t, x), bases.STANDARD_NORMAL.log_density(back.x0)

    return there_and_back(TIMES, x)


# The divergence of the mixture's velocity depends on the point.
@pytest.mark.representatives("mixture-linear")
@pytest.mark.parametrize(("name", "path"), CASES)
def test_the_log_density_is_the_closed_form_in_both_directions(name, path):
    back, forth, want, base = both(name, path)
    # Demanded: 1e-5.
    np.testing.assert_allclose(back.log_density, want, rtol=0, atol=1e-7)
    np.testing.assert_allclose(forth.log_density, want, rtol=0, atol=1e-7)
    np.testing.assert_allclose(forth.x, back.x, atol=1e-7)
    assert np.all(back.valid) and np.all(forth.valid)
    assert back.log_density.dtype == jnp.float64
    # The test could tell a sign or a factor: the base alone, or twice the change, is far away.
    assert np.all(np.abs(base - want)[:3] > 1e-2)


def test_a_base_of_ones_own_and_the_sign_in_closed_form():
    """dx/dt = c x: log rho_t(x) = log rho_0(x e^{-ct}) - c d t."""

    def log_density(x):
        return -0.5 * jnp.sum((x / 3.0) ** 2) - 2.0 * jnp.log(3.0) - jnp.log(2.0 * jnp.pi)

    ode = likelihood.along_ode(lambda c, t, x, cond=None, *, key=None: c * x, base=own(log_density))

    @jax.jit
    def there_and_back(c, x):
        found = ode.log_density(c, x, t=0.5)
        return found, ode.push(c, found.x0, t=0.5), log_density(x * jnp.exp(-0.4)) - 0.8

    found, again, want = there_and_back(0.8, np.array([0.4, -1.0]))
    np.testing.assert_allclose(found.log_density, want, atol=1e-8)
    np.testing.assert_allclose(again.log_density, found.log_density, atol=1e-8)


def test_the_standard_normal_is_one_over_all_leaves():
    x = {"a": np.array([[0.3, -1.0]]), "b": np.array(2.0)}
    want = -0.5 * (0.09 + 1.0 + 4.0) - 1.5 * np.log(2 * np.pi)
    log_density = jax.jit(bases.STANDARD_NORMAL.log_density)
    np.testing.assert_allclose(log_density(x), want, rtol=1e-14)
    narrow = log_density(np.ones(1000, jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, -500 - 500 * np.log(2 * np.pi), rtol=1e-6)


# --- estimates --------------------------------------------------------------------------------------------------------


@functools.cache
def estimates(name):
    """(estimates of log rho_1 of one point, with as many keys; the closed form). Fixed steps: compiled at once."""
    oracle, params, _, points = make("mixture", "linear")
    divergence = {
        "rademacher": likelihood.hutchinson(),
        "gaussian": likelihood.hutchinson(2, "gaussian"),
        "hutch++": likelihood.hutch_pp(),
    }[name]
    ode = likelihood.along_ode(oracle.velocity, divergence, solver="tsit5", steps=12)
    keys = jax.random.split(jax.random.key(3), 2000)
    found = jax.jit(jax.vmap(lambda key: ode.log_density(params, points[0], key=key).log_density))(keys)
    return np.asarray(found), float(oracle.log_density(params, 1.0, points[0]))


# Each estimate by itself is unbiased in test_divergence.
@pytest.mark.representatives("rademacher")
@pytest.mark.parametrize("name", ["rademacher", "gaussian", "hutch++"])
def test_estimates_are_unbiased_in_nats(name, assert_mean):
    found, want = estimates(name)
    assert_mean(found, want)
    # Probes are fixed within a solve, so that the spread does not average out along it; what is tested is small beside it.
    assert found.std() > 0.05
    assert 4 * found.std() / np.sqrt(len(found)) < 0.1


def test_the_density_from_one_probe_is_biased_upward(assert_mean):
    found, want = estimates("rademacher")
    ratio = np.exp(found - want)
    assert ratio.mean() - 1.0 > 8 * ratio.std() / np.sqrt(len(ratio))


# --- what is passed on, failures --------------------------------------------------------------------------------------


def test_conditions_keys_trees_and_dtypes_reach_the_velocity():
    def velocity(params, t, x, cond=None, *, key=None):
        assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        shift = jax.random.normal(key, dtype=x["a"].dtype)
        return {"a": params * x["a"] + shift, "b": cond * x["b"]}

    ode = likelihood.along_ode(velocity, solver="heun", steps=2)
    x = {"a": np.ones((2, 2), np.float32), "b": np.ones((), np.float32)}

    @jax.jit
    def run(cond, key):
        found = ode.log_density(np.float32(0.5), x, cond, key=key)
        return found, found.log_density - bases.STANDARD_NORMAL.log_density(found.x0)

    found, change = run(np.float32(-2.0), jax.random.key(0))
    # div b = 4 * 0.5 - 2 = 0: then with another condition, of divergence 3.
    np.testing.assert_allclose(change, 0.0, atol=1e-5)
    other, change = run(np.float32(1.0), jax.random.key(0))
    np.testing.assert_allclose(change, -3.0, atol=1e-5)
    assert other.log_density.dtype == other.x0["a"].dtype == jnp.float32
    another, _ = run(np.float32(-2.0), jax.random.key(1))
    assert not np.allclose(another.x0["a"], found.x0["a"])


@pytest.mark.slow
def test_jit_and_no_jit_agree():
    ode = likelihood.along_ode(blows_up, solver="euler", steps=2)
    eager, jitted = ode.push(0.2, X), jax.jit(ode.push)(0.2, X)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-12, atol=1e-12), eager, jitted))


def blows_up(params, t, x, cond=None, *, key=None):
    return params * x**3


def kinked(params, t, x, cond=None, *, key=None):
    # Finite itself, with a derivative that is not.
    return params * jnp.sqrt(jnp.abs(x))


# By Euler steps to infinity, the change along the flow is not finite, as with the kink.
@pytest.mark.representatives("solve")
@pytest.mark.parametrize(
    ("ode", "params", "x", "message"),
    [
        (likelihood.along_ode(blows_up, max_steps=16), 50.0, [1.0], "max_steps=16"),
        (likelihood.along_ode(blows_up, solver="euler", steps=30), 1e3, [3.0], "log_density: expected a finite number"),
        (likelihood.along_ode(kinked, solver="euler", steps=1), 1.0, [0.0], "log_density: expected a finite number"),
        (
            likelihood.along_ode(blows_up, solver="euler", steps=1, base=own(lambda x: jnp.nan * jnp.sum(x))),
            0.1,
            [0.3],
            "log_density: expected a finite number.*nan",
        ),
    ],
    ids=["solve", "steps", "kink", "base"],
)
def test_what_is_not_finite_raises_when_eager_and_is_flagged_when_traced(ode, params, x, message):
    with pytest.raises(RuntimeError, match=message):
        ode.push(params, jnp.asarray(x))
    assert not jax.jit(ode.push)(params, jnp.asarray(x)).valid


def test_a_base_may_end():
    ode = likelihood.along_ode(
        lambda c, t, x, cond=None, *, key=None: c * x,
        solver="heun",
        steps=2,
        base=own(lambda x: jnp.where(jnp.all(jnp.abs(x) < 1), 0.0, -jnp.inf)),
    )
    found = jax.jit(ode.log_density)(0.1, np.array([5.0]))
    assert found.log_density == -jnp.inf and found.valid


X = np.array([0.3, -0.2])
DECAY = likelihood.along_ode(lambda params, t, x, cond=None, *, key=None: -x, solver="euler", steps=1)


def of(velocity, *args, **kwargs):
    return likelihood.along_ode(velocity, *args, solver="euler", steps=1, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: likelihood.along_ode(3.0), TypeError, "velocity: expected a function.*float"),
        (lambda: likelihood.along_ode(likelihood.hutchinson(), blows_up), TypeError, r"velocity: .*got one of \(b"),
        (
            lambda: likelihood.along_ode(FlowMap(lambda p, s, t, x, c=None, *, key=None: x)),
            TypeError,
            "velocity: .*FlowMap",
        ),
        (lambda: likelihood.along_ode(blows_up, likelihood.hutchinson), TypeError, "divergence: .*function hutchinson"),
        (lambda: likelihood.along_ode(blows_up, 1), TypeError, "divergence: expected .*got int 1"),
        (lambda: likelihood.along_ode(blows_up, solver="rk5"), ValueError, "solver: "),
        (lambda: likelihood.along_ode(blows_up, solver="heun"), ValueError, "steps: "),
        (lambda: likelihood.along_ode(blows_up, rtol=-1.0), ValueError, "rtol: "),
        (lambda: DECAY.log_density(None, X, t=1.5), ValueError, r"t: expected a time in \[0, 1\], got 1.5"),
        (lambda: DECAY.push(None, X, t=-0.1), ValueError, r"t: expected a time in \[0, 1\], got -0.1"),
        (lambda: DECAY.push(None, X, t=float("nan")), ValueError, "t: expected a time"),
        (lambda: DECAY.log_density(None, X, t=np.ones(2)), ValueError, r"t: expected a scalar.*\(2,\)"),
        (lambda: DECAY.log_density(None, np.arange(2)), TypeError, "x: expected floating.*int"),
        (lambda: DECAY.push(None, np.array([0.0, np.nan])), ValueError, "x0: expected finite numbers.*nan"),
        (lambda: DECAY.log_density(None, np.array([np.inf])), ValueError, "x: expected finite numbers.*inf"),
        (
            lambda: of(lambda p, t, x, cond=None, *, key=None: x[:1]).log_density(None, X),
            ValueError,
            r"b\(x\): expected the shape of x, \(2,\), got \(1,\)",
        ),
        (
            lambda: of(lambda p, t, x, cond=None, *, key=None: (x, x)).push(None, X),
            ValueError,
            r"b\(x\): expected the pytree structure of x",
        ),
        (lambda: of(blows_up, likelihood.hutchinson()).push(0.1, X), ValueError, "key: expected a PRNG key"),
        (
            lambda: of(blows_up, base=own(lambda x: x)).push(0.1, X),
            ValueError,
            r"base.log_density\(x\): expected a scalar.*\(2,\)",
        ),
        (lambda: of(blows_up, base=lambda x: x), TypeError, "base: expected a base, .* got function"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- cost -------------------------------------------------------------------------------------------------------------

DIM = 8


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@functools.cache
def network():
    module = nets.MLP.plain(features=256, depth=2)
    zero, x = jnp.zeros((), jnp.float32), jnp.zeros((DIM,), jnp.float32)
    params = jax.eval_shape(lambda key: module.init(key, zero, zero, x)["params"], jax.random.key(0))
    apply = nets.from_linen(module)

    def velocity(params, t, x, cond=None, *, key=None):
        return apply(params, t, t, x)

    return velocity, params, x


@pytest.mark.representatives("exact", "3 probes")
@pytest.mark.parametrize(
    ("divergence", "passes", "allowed"),
    [
        (likelihood.exact_divergence(), 1 + DIM, 1.02 * (1 + DIM)),
        (likelihood.hutchinson(), 2, 2.05),
        (likelihood.hutchinson(3), 4, 4.1),
        (likelihood.hutch_pp(), 4, 4.1),
    ],
    ids=["exact", "hutchinson", "3 probes", "hutch++"],
)
def test_an_evaluation_costs_its_passes(divergence, passes, allowed):
    """Within a solve, whose one stage in the loop over steps XLA counts once."""
    velocity, params, x = network()
    forward = flops(lambda params, x: velocity(params, jnp.float32(0.5), x), params, x)
    assert 0.95 < forward / (2 * (10 * 256 + 256**2 + 256 * DIM)) < 1.1
    ode = likelihood.along_ode(velocity, divergence, solver="euler", steps=5)
    keys = jax.eval_shape(lambda: jax.random.key(0))
    found = flops(lambda params, x, key: ode.log_density(params, x, key=key), params, x, keys) / forward
    assert 0.98 * passes < found <= allowed


@pytest.mark.representatives("0")
@pytest.mark.parametrize("probes", [0, 1])
def test_a_midpoint_step_takes_one_divergence(probes):
    """Its first stage gives a point alone: 1 pass, and 1 + d or 1 + 1 at the middle."""
    velocity, params, x = network()
    forward = flops(lambda params, x: velocity(params, jnp.float32(0.5), x), params, x)
    divergence = likelihood.hutchinson(probes) if probes else likelihood.exact_divergence()
    ode = likelihood.along_ode(velocity, divergence, solver="midpoint", steps=5)
    keys = jax.eval_shape(lambda: jax.random.key(0))
    found = flops(lambda params, x, key: ode.log_density(params, x, key=key), params, x, keys) / forward
    passes = 2 + (probes or DIM)
    assert 0.98 * passes < found <= 1.03 * passes
