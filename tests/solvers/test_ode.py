"""The solves against an ODE with a closed form: dx/dt = p (1 + 2t)(1 + x^2), x(t) = tan(atan x_s + p (t + t^2 - s - s^2))."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, solvers
from jflow.types import FORWARD
from tests.solvers.cases import counted_velocity

P = 0.2
X = np.array([-0.7, 0.2, 0.9])
TIMES = [(0.1, 0.8), (0.8, 0.1), (0.4, 0.4), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)]


def velocity(params, t, x, cond=None, *, key=None):
    rate = params if cond is None else params * cond
    return jax.tree.map(lambda leaf: (rate * (1.0 + 2.0 * t)).astype(leaf.dtype) * (1.0 + leaf * leaf), x)


def exact_jump(p, s, t, x):
    return jnp.tan(jnp.arctan(x) + p * (t + t * t - s - s * s))


def exact_mean(p, s, t, x):
    return (exact_jump(p, s, t, x) - x) / (t - s)


def args(s, t, dtype=jnp.float64):
    return jnp.asarray(P, dtype), jnp.asarray(s, dtype), jnp.asarray(t, dtype), jnp.asarray(X, dtype)


def field(t, x):
    return velocity(jnp.asarray(P), t, x)


PRECISE = solvers.solve(velocity, "dopri8", rtol=1e-12, atol=1e-12)
precise = jax.jit(PRECISE.mean_velocity)
HEUN = solvers.solve(velocity, "heun", steps=16)
heun = jax.jit(HEUN.mean_velocity)


@pytest.mark.parametrize(("s", "t"), TIMES)
def test_the_mean_velocity_is_the_exact_one_in_both_directions(s, t):
    p, s, t, x = args(s, t)
    want = field(t, x) if s == t else exact_mean(p, s, t, x)
    np.testing.assert_allclose(precise(p, s, t, x), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["adaptive", "heun"])
def test_the_velocity_given_and_the_diagonal_of_the_solve_agree(method):
    p, _, t, x = args(0.0, 0.37)
    flow, mean_velocity = (PRECISE, precise) if method == "adaptive" else (HEUN, heun)
    np.testing.assert_allclose(mean_velocity(p, t, t, x), flow.velocity(p, t, x), rtol=1e-14)


@jax.jit
def derivatives(p, s, t, x):
    """The derivatives along s, t and x, and the second derivative along t."""
    zero, one, still, ones = jnp.zeros_like(s), jnp.ones_like(s), jnp.zeros_like(x), jnp.ones_like(x)

    def first(t):
        along = jax.vmap(lambda *d: jax.jvp(lambda *a: PRECISE.mean_velocity(p, *a), (s, t, x), d)[1])
        return along(jnp.stack([one, zero, zero]), jnp.stack([zero, one, zero]), jnp.stack([still, still, ones]))

    (ds, dt, dx), (_, dtt, _) = jax.jvp(first, (t,), (one,))
    return ds, dt, dx, dtt


@jax.jit
def exact_derivatives(p, s, t, x):
    """As ``derivatives``, of the closed form."""
    one = jnp.ones_like(s)

    def along_t(t):
        return jax.jvp(lambda t: exact_mean(p, s, t, x), (t,), (one,))[1]

    ds = jax.jvp(lambda s: exact_mean(p, s, t, x), (s,), (one,))[1]
    dx = jax.jvp(lambda x: exact_mean(p, s, t, x), (x,), (jnp.ones_like(x),))[1]
    return ds, along_t(t), dx, jax.jvp(along_t, (t,), (one,))[1]


@pytest.mark.representatives("0.1-0.8", "0.8-0.1")
@pytest.mark.parametrize(("s", "t"), [(0.1, 0.8), (0.8, 0.1), (0.0, 1.0)])
def test_derivatives_off_the_diagonal(s, t):
    p, s, t, x = args(s, t)
    ds, dt, dx, dtt = derivatives(p, s, t, x)
    want_ds, want_dt, want_dx, want_dtt = exact_derivatives(p, s, t, x)
    np.testing.assert_allclose(ds, want_ds, atol=1e-8)
    np.testing.assert_allclose(dt, want_dt, atol=1e-8)
    np.testing.assert_allclose(dx, want_dx, atol=1e-8)
    np.testing.assert_allclose(dtt, want_dtt, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_derivatives_on_the_diagonal(t):
    """With D = d/dt + b grad: v_{s,t} = b + (t-s) Db/2 + (t-s)^2 DDb/6 + ... about s, at x."""
    p, _, t, x = args(t, t)
    ds, dt, dx, dtt = derivatives(p, t, t, x)

    def material(f):
        return lambda t, x: jax.jvp(f, (t, x), (jnp.ones_like(t), field(t, x)))[1]

    first, second = material(field), material(material(field))
    np.testing.assert_allclose(dt, first(t, x) / 2, rtol=1e-12)
    # v_{s,t} = b_s + (t-s) (Db)_s / 2: the derivative in s also moves the point of expansion.
    np.testing.assert_allclose(ds, jax.jvp(lambda t: field(t, x), (t,), (jnp.ones_like(t),))[1] - dt, rtol=1e-12)
    np.testing.assert_allclose(dx, jax.jvp(lambda x: field(t, x), (x,), (jnp.ones_like(x),))[1], rtol=1e-12)
    np.testing.assert_allclose(dtt, second(t, x) / 3, rtol=1e-11)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(method, order):
    """Four steps over shrinking intervals: an error of order p in the step is one of order p in the interval."""
    p, s, _, x = args(0.1, 0.1)
    flow = solvers.solve(velocity, method, steps=4, adjoint="forward")
    lengths = jnp.asarray([0.02, 0.01, 0.005, 0.0025])
    values = jax.jit(jax.vmap(lambda t: flow.mean_velocity(p, s, t, x)))(s + lengths)
    want = jax.vmap(lambda t: exact_mean(p, s, t, x))(s + lengths)
    errors = np.max(np.abs(values - want), axis=1)
    slope = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.1


@pytest.mark.representatives("adaptive")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("euler", {"steps": 5}),
        ("heun", {"steps": 5}),
        ("tsit5", {"steps": 4}),
        ("tsit5", {"rtol": 1e-7, "atol": 1e-7}),
        ("dopri8", {"rtol": 1e-11, "atol": 1e-11}),
    ],
    ids=["euler", "heun", "tsit5", "adaptive", "dopri8"],
)
def test_the_count_of_evaluations_is_that_of_a_real_counter(method, options):
    calls, counting = counted_velocity()
    p, s, t, x = args(0.0, 1.0)
    _, stats = jax.jit(solvers.solve_counted(counting, method, **options))(p, s, t, x)
    jax.block_until_ready(stats)
    assert int(stats.nfe) == len(calls)
    assert bool(stats.success)
    if "steps" in options:
        assert (int(stats.steps), int(stats.rejected)) == (options["steps"], 0)
        assert int(stats.nfe) == options["steps"] * {"euler": 1, "heun": 2, "tsit5": 6}[method] + (method == "tsit5")
    else:
        assert int(stats.rejected) > 0
    # Stages stay between s and t, so that a velocity singular beyond its ends is never asked there.
    assert min(calls) >= 0.0 and max(calls) <= 1.0


def test_error_is_controlled_sample_by_sample_under_vmap():
    p, s, t, _ = args(0.0, 1.0)
    counted = solvers.solve_counted(velocity, "tsit5", rtol=1e-6, atol=1e-6)
    batch = jnp.asarray([[0.01], [0.9], [1.3]])
    v, stats = jax.jit(jax.vmap(counted, (None, None, None, 0)))(p, s, t, batch)
    one = jax.jit(counted)
    for i in range(3):
        alone, alone_stats = one(p, s, t, batch[i])
        np.testing.assert_allclose(v[i], alone, rtol=1e-12)
        assert int(stats.nfe[i]) == int(alone_stats.nfe)
    assert len(set(np.asarray(stats.nfe).tolist())) > 1
    errors = np.abs(v / exact_mean(p, s, t, batch) - 1.0)
    # The tolerance is met, and not by far: a finer solve would have cost more.
    assert np.max(errors) < 2e-5 and np.max(errors) > 1e-9


def test_too_few_steps_raise_when_eager_and_are_nan_with_a_flag_when_traced():
    p, s, t, x = args(0.0, 1.0)
    counted = solvers.solve_counted(velocity, "tsit5", rtol=1e-10, atol=1e-10, max_steps=3)
    with pytest.raises(RuntimeError, match="max_steps=3"):
        counted(p, s, t, x)

    def value_and_tangent(p, x):
        (v, stats), (tangent, _) = jax.jvp(lambda x: counted(p, s, t, x), (x,), (jnp.ones_like(x),))
        return v, tangent, stats

    rates, batch = jnp.asarray([1e-12, P]), jnp.stack([1e-9 * x, x])
    v, tangent, stats = jax.jit(jax.vmap(value_and_tangent))(rates, batch)
    assert stats.success.tolist() == [True, False] and int(stats.steps[1]) == 3
    assert np.all(np.isfinite(v[0])) and np.all(np.isfinite(tangent[0]))
    assert np.all(np.isnan(v[1])) and np.all(np.isnan(tangent[1]))


def test_no_host_callback_is_compiled_in():
    p, s, t, x = args(0.0, 1.0)
    for flow in (PRECISE, HEUN):
        assert "callback" not in str(jax.make_jaxpr(flow.mean_velocity)(p, s, t, x))
    path = solvers.sde(velocity, interpolants.linear())
    jaxpr = jax.make_jaxpr(lambda key, grid: path(p, key, grid, x))(jax.random.key(0), jnp.asarray([0.0, 0.5, 1.0]))
    assert "callback" not in str(jaxpr)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: solvers.solve(velocity, "rk5"), ValueError, "solver: expected one of 'euler'.*'rk5'"),
        (lambda: solvers.solve(velocity, "heun"), ValueError, "steps: .*'heun'.*None"),
        (lambda: solvers.solve(velocity, "heun", steps=0), ValueError, "steps: .*at least 1.*0"),
        (lambda: solvers.solve(velocity, "heun", steps=2.0), TypeError, "steps: .*whole number"),
        (lambda: solvers.solve(velocity, "tsit5", steps=2, rtol=1e-3), ValueError, "rtol: .*fixed steps"),
        (lambda: solvers.solve(velocity, "tsit5", rtol=0.0), ValueError, "rtol: "),
        (lambda: solvers.solve(velocity, "tsit5", atol=-1.0), ValueError, "atol: "),
        (lambda: solvers.solve(velocity, "tsit5", atol="fine"), TypeError, "atol: "),
        (lambda: solvers.solve(velocity, max_steps=0), ValueError, "max_steps: "),
        (lambda: solvers.solve(velocity, adjoint="reverse"), ValueError, "adjoint: .*'forward'"),
        (lambda: solvers.solve(3.0), TypeError, "velocity: expected a function"),
        (lambda: PRECISE.mean_velocity(P, jnp.zeros(3), 1.0, X), ValueError, r"s: expected a scalar.*\(3,\)"),
        (lambda: PRECISE.mean_velocity(P, 0.0, jnp.ones((2, 1)), X), ValueError, "t: expected a scalar"),
        (lambda: PRECISE.mean_velocity(P, 0.0, 1.5, X), ValueError, r"t: expected a time in \[0, 1\], got 1.5"),
        (lambda: PRECISE.mean_velocity(P, -0.1, 1.0, X), ValueError, r"s: expected a time in \[0, 1\]"),
        (lambda: PRECISE.mean_velocity(P, 0.0, float("nan"), X), ValueError, "t: expected a time"),
        (lambda: PRECISE.mean_velocity(P, 0.0, 1.0, np.arange(3)), TypeError, "x: expected floating.*int"),
        (lambda: PRECISE.mean_velocity(P, 0.0, 1.0, X.astype(np.float32)), ValueError, "rtol: .*float32"),
        (lambda: solvers.trajectory(velocity, P, np.array([0.0]), X), ValueError, "times: .*at least two"),
        (lambda: solvers.trajectory(velocity, P, np.array([0.0, 0.5, 0.5]), X), ValueError, "times: .*strictly"),
        (lambda: solvers.trajectory(velocity, P, np.array([0.0, 2.0]), X), ValueError, r"times: .*\[0, 1\]"),
        (lambda: solvers.solve(interpolants.linear()), TypeError, "velocity: expected a function .*Interpolant"),
        (
            lambda: solvers.solve_counted(lambda p, s, t, x, cond=None, *, key=None: x),
            TypeError,
            r"velocity: expected a function \(params, t, x, .*got one of \(p, s, t, x",
        ),
        (lambda: solvers.trajectory(P, velocity, np.array([0.0, 0.5]), X), TypeError, "velocity: expected a function"),
        (
            lambda: solvers.sde(interpolants.linear(), velocity),
            TypeError,
            "velocity: expected a function .*Interpolant",
        ),
        (
            lambda: solvers.sde(PRECISE, interpolants.linear()),
            TypeError,
            "velocity: .*method velocity of a FlowMap.*got",
        ),
        (lambda: solvers.sde(velocity, "linear"), TypeError, "interpolant: expected an Interpolant.*got str 'linear'"),
        (lambda: solvers.sde_step(velocity, interpolants.linear), TypeError, "interpolant: .*got function linear"),
        (
            lambda: solvers.sde(velocity, interpolants.linear())(P, np.array([0.0, 1.0]), jax.random.key(0), X),
            TypeError,
            "key: expected a PRNG key",
        ),
        (lambda: solvers.sde(velocity, interpolants.linear(), method="milstein"), ValueError, "method: "),
        (lambda: solvers.sde(velocity, interpolants.linear(), diffusion=-1.0), ValueError, "diffusion: "),
        (lambda: solvers.sde(velocity, interpolants.linear(), diffusion="c"), TypeError, "diffusion: "),
        (
            lambda: solvers.sde(velocity, interpolants.linear())(P, jax.random.key(0), np.array([1.0, 0.0]), X),
            ValueError,
            "grid: expected strictly increasing",
        ),
        (
            lambda: solvers.sde(velocity, interpolants.linear())(
                P, jax.random.key(0), np.array([0, 1.0]), np.arange(2)
            ),
            TypeError,
            "x0: ",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.representatives("forward")
@pytest.mark.parametrize(
    ("flow", "forward", "reverse"),
    [
        (HEUN, True, True),
        (solvers.solve(velocity, "rk4", steps=64, adjoint="forward"), True, False),
        pytest.param(
            solvers.solve(velocity, "tsit5", rtol=1e-9, adjoint="direct", max_steps=32),
            True,
            True,
            marks=pytest.mark.slow,
        ),
        # Its gradient is the next test's, its refusal test_adjoints's.
        pytest.param(
            solvers.solve(velocity, "tsit5", rtol=1e-9, adjoint="recursive"), False, True, marks=pytest.mark.slow
        ),
        pytest.param(
            solvers.solve(velocity, "tsit5", rtol=1e-9, adjoint="backsolve"), False, True, marks=pytest.mark.slow
        ),
    ],
    ids=["fixed", "forward", "direct", "recursive", "backsolve"],
)
def test_modes_of_differentiation_by_adjoint(flow, forward, reverse):
    p, s, t, x = args(0.1, 0.8)

    def loss(p):
        return jnp.sum(flow.mean_velocity(p, s, t, x) ** 2)

    want = jax.jit(jax.grad(lambda p: jnp.sum(exact_mean(p, s, t, x) ** 2)))(p)
    along = jax.jit(lambda p: jax.jvp(loss, (p,), (jnp.ones_like(p),))[1])
    back = jax.jit(jax.grad(loss))
    for ok, derivative in ((forward, along), (reverse, back)):
        if ok:
            np.testing.assert_allclose(derivative(p), want, rtol=2e-3 if flow is HEUN else 1e-7)
        else:
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                derivative(p)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["recursive", "backsolve"])
def test_one_key_serves_a_whole_solve_and_its_gradient(adjoint):
    """The noise is the same at every stage, and drawing it there is no reuse of the key."""
    p, s, t, x = args(0.1, 0.8)

    def noisy(params, t, x, cond=None, *, key=None):
        return velocity(params * (1.0 + jax.random.uniform(key)), t, x)

    # The way back has an error of its own, so that it is solved to a tolerance.
    choices = {"solver": "tsit5", "rtol": 1e-9} if adjoint == "backsolve" else {"solver": "rk4", "steps": 64}
    flow = solvers.solve(noisy, adjoint=adjoint, **choices)
    total = lambda p, key: jnp.sum(flow.mean_velocity(p, s, t, x, key=key))  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(total))(p, jax.random.key(3))
    rate = 1.0 + jax.random.uniform(jax.random.key(3))
    want, want_slope = jax.jit(jax.value_and_grad(lambda p: jnp.sum(exact_mean(rate * p, s, t, x))))(p)
    np.testing.assert_allclose([value, slope], [want, want_slope], rtol=1e-7)


@pytest.mark.slow
def test_a_way_back_that_fails_raises_and_gives_no_wrong_gradient():
    def stiffer_back(params, t, x, cond=None, *, key=None):
        return jnp.sin(params * x + 3.0 * t)

    x = jnp.asarray([0.4, -1.0])
    options = {"rtol": 1e-8, "adjoint": "backsolve"}
    counted = solvers.solve_counted(stiffer_back, **options)
    steps = int(jax.jit(lambda p: counted(p, 1.0, 0.0, x)[1].steps)(3.0))
    flow = solvers.solve(stiffer_back, max_steps=steps, **options)
    loss = lambda p: jnp.sum(flow.mean_velocity(p, 1.0, 0.0, x))  # noqa: E731
    assert np.isfinite(jax.jit(loss)(3.0))
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        jax.block_until_ready(jax.jit(jax.grad(loss))(3.0))


def test_x_may_be_a_pytree_of_dtypes_and_cond_and_key_reach_the_velocity():
    p, s, t, x = args(0.1, 0.8, jnp.float32)
    seen = []

    def spying(params, t, x, cond=None, *, key=None):
        assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        seen.append((t.dtype, *(leaf.dtype for leaf in jax.tree.leaves(x))))
        return velocity(params, t, x, cond)

    flow = solvers.solve(spying, domain=FORWARD)
    assert flow.domain is FORWARD
    tree = {"a": x, "b": (x[:1].astype(jnp.bfloat16), x[2])}
    cond, key = jnp.asarray(1.5, jnp.float32), jax.random.key(0)
    v = jax.jit(lambda tree, key: flow.mean_velocity(p, s, t, tree, cond, key=key))(tree, key)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), v) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    assert set(seen) == {tuple(map(jnp.dtype, (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32)))}
    want = exact_mean(1.5 * P, 0.1, 0.8, jnp.asarray(X))
    np.testing.assert_allclose(v["a"], want, rtol=1e-4)
    np.testing.assert_allclose(v["b"][0].astype(jnp.float32), want[:1], rtol=2e-2)
    np.testing.assert_allclose(v["b"][1], want[2], rtol=1e-4)


@pytest.mark.slow
def test_eager_calls_compile_once():
    traces = []

    def traced(params, t, x, cond=None, *, key=None):
        traces.append(1)
        return velocity(params, t, x)

    flow = solvers.solve(traced)
    p, s, t, x = args(0.1, 0.8)
    flow.mean_velocity(p, s, t, x)
    once = len(traces)
    flow.mean_velocity(p, t, s, 2 * x)
    assert len(traces) == once


@pytest.mark.representatives("tsit5")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"solver": "tsit5", "rtol": 1e-9}, 1e-7),
        ({"solver": "dopri8", "rtol": 1e-11}, 1e-10),
        ({"solver": "midpoint", "steps": 20, "adjoint": "forward"}, 1e-3),
    ],
    ids=["tsit5", "dopri8", "midpoint"],
)
def test_a_trajectory_passes_through_the_exact_states(options, tolerance):
    p, _, _, x = args(0.0, 1.0)
    forward = jnp.asarray([0.05, 0.3, 0.35, 0.8, 1.0])
    run = jax.jit(lambda times, tree: solvers.trajectory(velocity, p, times, tree, **options))
    for times in (forward, forward[::-1]):
        states = run(times, {"a": x, "b": x[0]})
        want = jax.vmap(lambda t, start=times[0]: exact_jump(p, start, t, x))(times)
        np.testing.assert_array_equal(states["a"][0], x)
        np.testing.assert_allclose(states["a"], want, atol=tolerance)
        np.testing.assert_allclose(states["b"], want[:, 0], atol=tolerance)
