"""Densities through jumps: against closed forms, against quadrature, forth and back; refinement; what is refused; cost."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, interpolants, likelihood, nets, oracles, parameterizations, samplers
from jflow.types import BOTH, FORWARD, FlowMap


def own(log_density):
    """A base of one's own, of which only the log-density is asked."""
    return SimpleNamespace(name="own", sample=jax.random.normal, log_density=log_density, score=jax.grad(log_density))


COVARIANCE = np.array([[0.2, 0.05, 0.0], [0.05, 0.1, 0.02], [0.0, 0.02, 4.0]])
GAUSSIAN = oracles.gaussian_params([0.7, -1.1, 0.2], COVARIANCE)
GRIDS = {
    "one jump": [0.0, 1.0],
    "four jumps": [0.0, 0.2, 0.5, 0.9, 1.0],
    "inside": [0.3, 0.5, 0.8],
    "back": [1.0, 0.4, 0.0],
}


def nothing(x):
    return jnp.zeros(())


# --- closed forms -----------------------------------------------------------------------------------------------------


@functools.cache
def gaussian(path):
    oracle = oracles.gaussian(interpolants.INTERPOLANTS[path]())
    return oracle, oracle.flow_map.bind(GAUSSIAN)


@functools.cache
def pushed(path):
    bound = gaussian(path)[1]
    return jax.jit(lambda x, grid: (likelihood.push(bound, x, grid, base=own(nothing)), samplers.jumps(bound, x, grid)))


# The path is the oracle's affair.
@pytest.mark.representatives(*(f"trigonometric-{grid}" for grid in GRIDS))
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_the_log_determinant_is_the_gaussians(path, grid):
    """log det grad X_{s,t} = 1/2 (log det S_t - log det S_s), whatever lies between."""
    found, by_sampler = pushed(path)(np.array([0.2, -0.4, 1.0]), np.array(grid))
    moments = [interpolants.INTERPOLANTS[path]().coefficients(jnp.asarray(t)) for t in (grid[0], grid[-1])]
    start, end = (np.linalg.slogdet(c.alpha**2 * np.eye(3) + c.beta**2 * COVARIANCE)[1] for c in moments)
    # Demanded: 1e-6. A forgotten jump or a wrong sign would show.
    np.testing.assert_allclose(found.log_density, -0.5 * (end - start), atol=1e-10)
    assert abs(end - start) > 0.1 and found.valid
    np.testing.assert_allclose(found.x, by_sampler, rtol=1e-12)


RATE = 0.8


def flow_mean(params, s, t, x, cond=None, *, key=None):
    """Of the flow x -> sinh(arcsinh(x) + RATE (t - s)), whose density from a standard normal base is known."""
    return (jnp.sinh(jnp.arcsinh(x) + RATE * (t - s)) - x) / (t - s)


FLOW = FlowMap(flow_mean, BOTH).bind(None)


def flow_density(x):
    """log rho_1(x) of an event of one entry."""
    before = np.arcsinh(np.asarray(x)[..., 0]) - RATE
    log_base = -0.5 * np.sinh(before) ** 2 - 0.5 * np.log(2 * np.pi)
    return log_base + np.log(np.cosh(before)) - 0.5 * np.log1p(np.asarray(x)[..., 0] ** 2)


@pytest.mark.parametrize("grid", ["four jumps", "back"])
def test_the_density_of_a_flow_at_its_data_by_either_way_back(grid):
    """Ascending grids are inverted by Newton's method, descending ones are the encoder; the map is exact, so both agree."""
    x = np.array([[-3.0], [-1.2], [-0.3], [0.4], [1.1], [2.3], [4.0]])
    found = jax.jit(jax.vmap(lambda x: likelihood.log_density(FLOW, x, GRIDS[grid])))(x)
    want = flow_density(x)
    np.testing.assert_allclose(found.log_density, want, rtol=0, atol=1e-8)
    assert np.all(found.valid)
    base = -0.5 * found.x0[:, 0] ** 2 - 0.5 * np.log(2 * np.pi)
    assert np.mean(np.abs(base - want)) > 0.1


# --- a learned map, which no identity holds for -----------------------------------------------------------------------

RATES = jnp.asarray([[0.9, -0.6], [0.3, -0.5]])


def warped(params, s, t, x, cond=None, *, key=None):
    """Injective, and a flow for no velocity."""
    shift = 0.0 if cond is None else cond
    noise = 0.0 if key is None else 0.1 * jax.random.normal(key, dtype=x.dtype)
    return params @ jnp.tanh(x + s) + 0.4 * (1.0 + t) * jnp.sin(x) + shift + noise


WARPED = FlowMap(warped, FORWARD).bind(RATES)
STEPS = [0.0, 0.3, 1.0]
POINTS = jnp.asarray([[0.2, -0.4], [1.5, 0.3], [-2.0, 1.0], [0.0, 3.0]])


def dense(x, grid):
    """The composition and its Jacobian's log-determinant, in reverse mode at once."""
    det = jnp.linalg.det(jax.jacrev(lambda x: samplers.jumps(WARPED, x, grid))(x))
    return samplers.jumps(WARPED, x, grid), jnp.log(jnp.abs(det))


def test_push_is_the_change_of_variables_of_the_sampler_that_ran():
    found = jax.jit(jax.vmap(lambda x: likelihood.push(WARPED, x, STEPS)))(POINTS)
    x, log_det = jax.jit(jax.vmap(lambda x: dense(x, STEPS)))(POINTS)
    np.testing.assert_allclose(found.x, x, rtol=1e-13)
    base = jax.vmap(bases.STANDARD_NORMAL.log_density)(POINTS)
    np.testing.assert_allclose(found.log_density, base - log_det, rtol=1e-12, atol=1e-12)
    assert np.all(found.valid) and np.all(np.abs(log_det) > 0.05)


@functools.cache
def inverse():
    return jax.jit(
        jax.vmap(lambda params, x: likelihood.log_density(FlowMap(warped).bind(params), x, STEPS), (None, 0))
    )


def test_the_inverse_finds_the_base_point_and_the_density_of_a_map_that_only_goes_forward():
    there = jax.jit(jax.vmap(lambda x: likelihood.push(WARPED, x, STEPS)))(POINTS)
    back = inverse()(RATES, there.x)
    np.testing.assert_allclose(back.x0, POINTS, rtol=0, atol=1e-12)
    np.testing.assert_allclose(back.log_density, there.log_density, rtol=0, atol=1e-12)
    assert np.all(back.valid)


def test_the_density_integrates_to_one():
    """Its units, nats of a density in x: by a sum over given points, through the inverse."""
    line = FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * jnp.sin(x + s) + t * x).bind(jnp.asarray(0.6))
    x = np.linspace(-12.0, 12.0, 2001)
    found = jax.jit(jax.vmap(lambda x: likelihood.log_density(line, x, [0.0, 0.5, 1.0])))(x[:, None])
    assert np.all(found.valid)
    np.testing.assert_allclose(np.sum(np.exp(found.log_density)) * (x[1] - x[0]), 1.0, atol=1e-9)


def test_derivatives_at_data_are_those_of_the_implicit_function():
    x = jax.jit(lambda x: samplers.jumps(WARPED, x, STEPS))(POINTS[0])[None]

    def log_rho(params, x):
        return inverse()(params, x).log_density[0]

    directions = (jnp.asarray([[0.3, 0.1], [-0.2, 0.5]]), jnp.asarray([[1.0, -0.7]]))
    step = 1e-5

    @jax.jit
    def slopes(params, x):
        gradients = jax.grad(log_rho, (0, 1))(params, x)
        along = sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))
        return along, jax.jvp(log_rho, (params, x), directions)[1]

    ahead, behind = (log_rho(*(a + h * d for a, d in zip((RATES, x), directions, strict=True))) for h in (step, -step))
    slope = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(slopes(RATES, x), [slope, slope], rtol=1e-7)
    assert abs(slope) > 0.05


@pytest.mark.slow
def test_conditions_and_keys_are_those_of_the_sampler(key):
    other = jax.random.clone(key)

    @jax.jit
    def forth(x, key, other):
        run = samplers.jumps(WARPED, x, STEPS, jnp.asarray(0.2), key=key)
        return run, likelihood.push(WARPED, x, STEPS, jnp.asarray(0.2), key=other)

    run, there = forth(POINTS[0], key, other)
    np.testing.assert_allclose(there.x, run, rtol=1e-13)
    back = jax.jit(lambda x, key: likelihood.log_density(WARPED, x, STEPS, jnp.asarray(0.2), key=key))
    again = back(there.x, jax.random.clone(key))
    np.testing.assert_allclose(again.x0, POINTS[0], atol=1e-12)
    np.testing.assert_allclose(again.log_density, there.log_density, atol=1e-12)


@pytest.mark.slow
def test_events_are_trees_and_float32_is_inverted_to_its_rounding():
    def split(params, s, t, x, cond=None, *, key=None):
        v = warped(params, s, t, jnp.stack([x["a"], x["b"][0]]))
        return {"a": v[0], "b": v[1:]}

    bound = FlowMap(split).bind(RATES.astype(jnp.float32))
    x0 = {"a": jnp.float32(0.2), "b": jnp.asarray([-0.4], jnp.float32)}
    there = jax.jit(lambda x: likelihood.push(bound, x, STEPS))(x0)
    back = jax.jit(lambda x: likelihood.log_density(bound, x, STEPS))(there.x)
    want = jax.jit(lambda x: likelihood.push(WARPED, x, STEPS))(POINTS[0])
    for found in (there, back):
        assert found.log_density.dtype == jnp.float32 and found.valid
        np.testing.assert_allclose(found.log_density, want.log_density, atol=2e-6)
    np.testing.assert_allclose(back.x0["b"], x0["b"], atol=1e-6)


@pytest.mark.slow
def test_jit_and_no_jit_agree():
    x = samplers.jumps(WARPED, POINTS[0], STEPS)
    eager = likelihood.log_density(WARPED, x, STEPS)
    jitted = jax.tree.map(lambda leaf: leaf[0], inverse()(RATES, x[None]))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-12, atol=1e-12), eager, jitted))
    there = likelihood.push(WARPED, POINTS[0], STEPS)
    np.testing.assert_allclose(there.log_density, jitted.log_density, rtol=0, atol=1e-12)


def test_the_encoder_has_a_density_of_its_own():
    """A map trained both ways need not be its own inverse: X_{s,t} = e^{2(t-s)} x forward, but e^{t-s} x backward."""

    def v(params, s, t, x, cond=None, *, key=None):
        rate = jnp.where(t > s, 2.0, 1.0)
        return x * jnp.expm1(rate * (t - s)) / (t - s)

    bound, x = FlowMap(v, BOTH).bind(None), jnp.asarray([0.5, -1.0, 0.2])
    for grid, rate in (([0.0, 0.4, 1.0], 2.0), ([1.0, 0.4, 0.0], 1.0)):
        found = likelihood.log_density(bound, x, grid)
        np.testing.assert_allclose(found.x0, x * np.exp(-rate), rtol=1e-12)
        np.testing.assert_allclose(
            found.log_density, bases.STANDARD_NORMAL.log_density(found.x0) - 3 * rate, rtol=1e-12
        )


# --- what is no bijection ---------------------------------------------------------------------------------------------


def mirrored(params, s, t, x, cond=None, *, key=None):
    return -params * x


def folded(params, s, t, x, cond=None, *, key=None):
    return x * x


@pytest.mark.representatives("singular", "no inverse")
@pytest.mark.parametrize(
    ("call", "x", "message"),
    [
        # X_{0,1} = -x, then 0, in an odd dimension.
        (lambda x: likelihood.push(FlowMap(mirrored).bind(2.0), x, [0.0, 1.0]), [1.0], "from 0 to 1 is not invertible"),
        (
            lambda x: likelihood.push(FlowMap(mirrored).bind(4.0), x, [0.0, 0.2, 0.6]),
            [1.0],
            "from 0.2 to 0.6 is not inv",
        ),
        (lambda x: likelihood.push(FlowMap(mirrored).bind(1.0), x, [0.0, 1.0]), [1.0], "not invertible.*-inf"),
        (lambda x: likelihood.log_density(FlowMap(mirrored).bind(2.0), x, [0.0, 1.0]), [1.0], "is not invertible"),
        # x + x^2 never falls below -1/4.
        (lambda x: likelihood.log_density(FlowMap(folded).bind(None), x, [0.0, 1.0]), [-1.0], "was not inverted"),
    ],
    ids=["one jump", "negative", "singular", "back", "no inverse"],
)
def test_what_cannot_be_inverted_raises_when_eager_and_is_flagged_when_traced(call, x, message):
    x = jnp.asarray(x)
    with pytest.raises(ValueError, match=f"bound: the jump .*{message}"):
        call(x)
    assert not jax.jit(call)(x).valid


def test_flags_are_each_samples_own():
    x = jnp.asarray([[1.0], [-1.0], [0.3]])
    found = jax.jit(jax.vmap(lambda x: likelihood.push(FlowMap(folded).bind(None), x, [0.0, 1.0])))(x)
    assert found.valid.tolist() == [True, False, True]
    found = jax.jit(jax.vmap(lambda x: likelihood.log_density(FlowMap(folded).bind(None), x, [0.0, 1.0])))(x)
    assert found.valid.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: likelihood.push(WARPED, POINTS[0], [1.0, 0.0]), ValueError, "grid: the jump from 1 to 0.*domain"),
        (lambda: likelihood.push(WARPED, POINTS[0], [0.0]), ValueError, "grid: expected at least two times"),
        (lambda: likelihood.push(WARPED, np.arange(2), STEPS), TypeError, "x0: expected floating"),
        (lambda: likelihood.push(WARPED, np.array([np.nan, 0.0]), STEPS), ValueError, "x0: expected finite"),
        (
            lambda: likelihood.push(WARPED, POINTS[0], STEPS, base=own(lambda x: x)),
            ValueError,
            r"base.log_density\(x\): expected a scalar",
        ),
        (
            lambda: likelihood.push(WARPED, POINTS[0], STEPS, base=own(lambda x: jnp.nan * x[0])),
            ValueError,
            r"base.log_density\(x\): expected a number of nats, got nan",
        ),
        (
            lambda: likelihood.push(
                FlowMap(warped, jump_override=lambda p, s, t, x, cond=None, *, key=None: x[:1]).bind(RATES),
                POINTS[0],
                STEPS,
            ),
            ValueError,
            r"jump.s output: expected the shape of x, \(2,\), got \(1,\)",
        ),
        (lambda: likelihood.log_density(WARPED, POINTS[0], [1.0, 0.0]), ValueError, "grid: the jump from 1 to 0"),
        (lambda: likelihood.log_density(WARPED, POINTS[0], [0.0, 0.5, 0.5]), ValueError, "grid: expected strictly"),
        (lambda: likelihood.log_density(WARPED, POINTS[0], [0.0, 0.6, 0.5]), ValueError, "grid: expected strictly"),
        (lambda: likelihood.log_density(WARPED, POINTS[0], 1.0), ValueError, "grid: expected"),
        (
            lambda: jax.jit(lambda g: likelihood.log_density(WARPED, POINTS[0], g))(np.array(STEPS)),
            ValueError,
            "grid: expected concrete times.*traced",
        ),
        (lambda: likelihood.log_density(WARPED, POINTS[0], STEPS, iterations=0), ValueError, "iterations: "),
        (lambda: likelihood.refine(WARPED, POINTS[0], STEPS, step_size=-0.1), ValueError, "step_size: "),
        (lambda: likelihood.refine(WARPED, POINTS[0], STEPS, step_size="big"), TypeError, "step_size: "),
        (lambda: likelihood.refine(WARPED, POINTS[0], STEPS, step_size=np.ones(2)), ValueError, "step_size: .*scalar"),
        (lambda: likelihood.refine(WARPED, POINTS[0], STEPS, step_size=0.1, steps=0), ValueError, "steps: "),
        (lambda: likelihood.refine(WARPED, POINTS[0], [1.0, 0.0], step_size=0.1), ValueError, "grid: the jump"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- refinement -------------------------------------------------------------------------------------------------------


def test_refinement_is_a_gradient_step_on_the_log_density():
    one = jax.jit(lambda x: likelihood.refine(WARPED, x, STEPS, step_size=0.1))(POINTS[0])
    gradient = jax.jit(jax.grad(lambda x: likelihood.push(WARPED, x, STEPS).log_density))
    np.testing.assert_allclose(one, POINTS[0] + 0.1 * gradient(POINTS[0]), rtol=1e-12)
    two = jax.jit(lambda x, size: likelihood.refine(WARPED, x, STEPS, step_size=size, steps=2))(POINTS[0], 0.1)
    np.testing.assert_allclose(two, one + 0.1 * gradient(one), rtol=1e-12)


def test_refinement_raises_the_exact_density_of_samples():
    """What rises is the model's own density at its samples, whose mean is fixed for samples of the model."""
    x0 = np.random.default_rng(5).normal(size=(400, 1))

    @jax.jit
    @jax.vmap
    def moved(x0):
        refined = likelihood.refine(FLOW, x0, [0.0, 1.0], step_size=0.02)
        return tuple(samplers.jumps(FLOW, point, [0.0, 1.0]) for point in (x0, refined))

    x, better = moved(x0)
    gains = flow_density(better) - flow_density(x)
    assert gains.mean() > 8 * gains.std() / np.sqrt(len(gains))
    assert np.mean(gains > 0) > 0.8


# --- cost -------------------------------------------------------------------------------------------------------------

DIM = 8


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@functools.cache
def network():
    """The map of a plain network, its parameters, one event and the FLOPs of a jump."""
    module = nets.MLP.plain(features=256, depth=2)
    zero, x = jnp.zeros((), jnp.float32), jnp.zeros((DIM,), jnp.float32)
    params = jax.eval_shape(lambda key: module.init(key, zero, zero, x)["params"], jax.random.key(0))
    flow_map = parameterizations.flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    one = flops(lambda params, x: flow_map.bind(params).jump(jnp.float32(0.0), jnp.float32(1.0), x), params, x)
    return flow_map, params, x, one


@pytest.mark.parametrize("count", [1, 4])
def test_a_jump_costs_its_passes_and_a_determinant(count):
    """XLA counts the body of the loop over jumps once; that it calls the map once for each is the next test's."""
    flow_map, params, x, one = network()
    grid = np.linspace(0.0, 1.0, count + 1)
    found = flops(lambda params, x: likelihood.push(flow_map.bind(params), x, grid).log_density, params, x)
    determinant = flops(lambda a: jnp.linalg.slogdet(a), jnp.zeros((DIM, DIM), jnp.float32))
    assert 0.98 * (1 + DIM) < (found - determinant) / one <= 1.02 * (1 + DIM)


def test_the_map_is_evaluated_once_in_each_jump():
    calls = []

    def counted(params, s, t, x, cond=None, *, key=None):
        jax.debug.callback(lambda s: calls.append(float(s)), s)
        return warped(params, s, t, x)

    bound = dataclasses.replace(WARPED, flow_map=FlowMap(counted))
    jax.block_until_ready(jax.jit(lambda x: likelihood.push(bound, x, STEPS))(POINTS[0]))
    jax.effects_barrier()
    assert sorted(calls) == STEPS[:-1]
