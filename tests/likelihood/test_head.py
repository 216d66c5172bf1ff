"""The divergence head: its identities at the exact map, what its loss trains, what it costs, and that it learns.

The exact head is read off the densities of the oracles, D_{s,t}(x) = (log rho_s(x) - log rho_t(X_{s,t}(x)))/(t - s), in which
no divergence is taken; for a Gaussian it is known without its map as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import (
    bases,
    identities,
    interpolants,
    nets,
    objectives,
    oracles,
    parameterizations,
    samplers,
    solvers,
    times,
    types,
)
from jflow import likelihood as lik
from jflow.likelihood import Headed, WithLogDensity

PATH = interpolants.linear()
PLANE = oracles.mixture_params(
    jnp.array([0.7, 0.3]),
    jnp.array([[-0.6, 0.2], [0.9, -0.5]]),
    jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]]),
)
LINE = oracles.mixture_params(jnp.array([0.7, 0.3]), jnp.array([[-0.8], [1.2]]), jnp.array([[[0.09]], [[0.25]]]))
BELL = oracles.gaussian_params(jnp.array([0.6, -0.3]), jnp.array([[0.5, 0.2], [0.2, 0.3]]))
TARGETS = {"gaussian": BELL, "quantile": LINE, "mixture": PLANE}


def exact_head(name):
    oracle, params = oracles.ORACLES[name](PATH), TARGETS[name]

    def head(theta, s, t, x, cond=None, *, key=None):
        gap = t - s
        there = oracle.flow_map.jump(params, s, t, x)
        lost = oracle.log_density(params, s, x) - oracle.log_density(params, t, there)
        div = jnp.trace(jax.jacfwd(lambda y: oracle.velocity(params, t, y))(x))
        return jnp.where(gap == 0.0, div, lost / jnp.where(gap == 0.0, 1.0, gap))

    return oracle, params, head


def beside(theta, s, t, x):
    """Fixed random features, which are no flow's; zero at theta = 0."""
    rng = np.random.default_rng(3)
    mix, shift = jnp.array(rng.normal(size=(4, x.size + 2))), jnp.array(rng.normal(size=4))
    return theta @ jnp.sin(mix @ jnp.concatenate([jnp.stack([s, t]), x]) + shift)


def student(name, sign=1.0):
    """The exact map, with the exact head and beside it the features; its params are (oracle's, theta)."""
    oracle, params, head = exact_head(name)
    flow = lik.with_head(
        oracle.flow_map,
        lambda theta, s, t, x, cond=None, *, key=None: sign * head(None, s, t, x) + beside(theta, s, t, x),
    )
    return flow, oracle, params


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", pytest.param("mixture", marks=pytest.mark.slow)])
def test_the_exact_map_and_head_obey_all_identities_and_no_other_head_does(name):
    """In both directions, on points with log-densities as they are; the tolerance is that of the oracle's solve."""
    tolerance = 1e-8 if name == "mixture" else 1e-12
    oracle, params, _ = exact_head(name)
    x = WithLogDensity(jnp.linspace(0.3, -0.4, params.means.shape[1]), jnp.asarray(-1.7))
    b = lik.augment(oracle.velocity)

    @jax.jit
    def residuals(theta, sign, s, t):
        flow = student(name, sign)[0]
        v = lambda s, t, y: flow.mean_velocity(Headed(params, theta), s, t, y)  # noqa: E731
        return jax.tree.map(
            jnp.abs,
            {
                "tangent": identities.tangent(v, t, x, b(params, t, x)).difference,
                "lagrangian": identities.lagrangian(v, s, t, x, lambda t, y: b(params, t, y)).difference,
                "eulerian": identities.eulerian(v, s, t, x, b(params, s, x)).difference,
                "semigroup": identities.semigroup(v, s, t, x, 0.3).difference,
            },
        )

    for s, t in ((0.2, 0.7), (0.0, 1.0), (0.8, 0.1)):
        pair = jnp.asarray(s), jnp.asarray(t)
        exact = residuals(jnp.zeros(4), jnp.asarray(1.0), *pair)
        assert all(np.all(leaf < tolerance) for leaf in jax.tree.leaves(exact)), exact
        beside_it = residuals(jnp.full(4, 0.1), jnp.asarray(1.0), *pair)
        assert all(r.log_density > 1e-4 for r in beside_it.values()), beside_it
        turned = residuals(jnp.zeros(4), jnp.asarray(-1.0), *pair)
        # The semigroup identity alone does not know the sign of D.
        assert turned.pop("semigroup").log_density < tolerance
        assert all(r.log_density > 0.1 for r in turned.values()), turned


def test_a_gaussians_head_is_the_change_of_its_log_determinant():
    flow, _, params = student("gaussian")
    s, t = jnp.asarray(0.15), jnp.asarray(0.9)
    law = lambda u: (1 - u) ** 2 * np.eye(2) + u**2 * np.array([[0.5, 0.2], [0.2, 0.3]])  # noqa: E731
    want = 0.5 * (np.linalg.slogdet(law(0.9))[1] - np.linalg.slogdet(law(0.15))[1]) / 0.75
    state = WithLogDensity(jnp.array([0.4, -1.1]), jnp.asarray(2.0))
    v = jax.jit(flow.mean_velocity)(Headed(params, jnp.zeros(4)), s, t, state)
    np.testing.assert_allclose(v.log_density, -want, rtol=1e-12)


def test_a_jump_and_a_grid_of_jumps_carry_the_log_density():
    """From the base to the data, with a closed-form density at both ends."""
    flow, oracle, params = student("quantile")
    points = lik.without_head(flow)
    assert points.domain is oracle.flow_map.domain

    @jax.jit
    def run(params, x0, grid):
        both = Headed(params, jnp.zeros(4))
        bound, start = flow.bind(both), WithLogDensity(x0, bases.STANDARD_NORMAL.log_density(x0))
        end = bound.jump(0.0, 1.0, start)
        want = oracle.log_density(params, 1.0, end.x)
        return end, samplers.jumps(bound, start, grid), points.jump(both, 0.0, 1.0, x0), want

    once, often, alone, want = run(params, np.array([0.7]), np.array([0.0, 0.3, 0.6, 1.0]))
    np.testing.assert_allclose(once.log_density, want, rtol=1e-9)
    np.testing.assert_allclose(often.log_density, want, rtol=1e-9)
    np.testing.assert_allclose(often.x, once.x, rtol=1e-9)
    np.testing.assert_allclose(alone, once.x, rtol=1e-12)


# --- stationarity -----------------------------------------------------------------------------------------------------

# A flow in closed form, which is nothing's but its own velocity's: b = R' (p (1 + 2t) sqrt(1 + y^2)), y = R x.
TURN = jnp.array([[0.8, 0.6], [-0.6, 0.8]])
RATES = jnp.array([0.5, -0.3])


def bent_jump(s, t, x):
    return TURN.T @ jnp.sinh(jnp.arcsinh(TURN @ x) + RATES * (t + t * t - s - s * s))


def bent(sign):
    """Its map with the head in closed form, and the features beside it; params ``Headed(None, theta)``."""

    def velocity(params, t, x, cond=None, *, key=None):
        return TURN.T @ (RATES * (1.0 + 2.0 * t) * jnp.sqrt(1.0 + (TURN @ x) ** 2))

    def gap(s, t):
        return jnp.where(s == t, 1.0, t - s)

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        return jnp.where(s == t, velocity(params, t, x), (bent_jump(s, t, x) - x) / gap(s, t))

    def head(theta, s, t, x, cond=None, *, key=None):
        before, after = TURN @ x, TURN @ bent_jump(s, t, x)
        off = jnp.sum(jnp.log1p(after**2) - jnp.log1p(before**2)) / (2.0 * gap(s, t))
        on = jnp.sum(RATES * (1.0 + 2.0 * t) * before / jnp.sqrt(1.0 + before**2))
        return sign * jnp.where(s == t, on, off) + beside(theta, s, t, x)

    points = types.FlowMap(mean_velocity, types.BOTH, velocity_override=velocity)
    return lik.with_head(points, head), velocity


def loss_of(identity, sign, theta, key, *, teacher=False, **choices):
    """(losses, aux) of 32 rows of asymmetric data; ``sign`` may be traced."""
    data_key, loss_key = jax.random.split(key)
    flow, velocity = bent(sign)
    z = jax.random.normal(data_key, (32, 2))
    x1 = 0.6 * z + 0.4 * z[:, ::-1] ** 2 - 0.2
    objective = lik.head_objective(flow, PATH, identity=identity, teacher=velocity if teacher else None, **choices)
    return objective(Headed(None, theta), loss_key, types.Batch(x1))


# The Eulerian loss is the next test's.
@pytest.mark.representatives("lagrangian")
@pytest.mark.parametrize(
    ("identity", "choices"),
    [
        ("lagrangian", {"along": "head", "stop": "target"}),
        ("eulerian", {"stop": "spatial", "teacher": True}),
        ("semigroup", {"gammas": times.uniform(), "teacher": True}),
    ],
    ids=["lagrangian", "eulerian", "semigroup"],
)
def test_the_exact_heads_loss_is_zero_on_every_row_and_no_others(identity, choices):
    @jax.jit
    def losses(signs, thetas, keys):
        return jax.vmap(lambda *row: loss_of(identity, *row, **choices))(signs, thetas, keys)

    thetas = jnp.array([[0.0] * 4, [0.1] * 4, [0.0] * 4])
    loss, aux = losses(jnp.array([1.0, 1.0, -1.0]), thetas, jax.random.split(jax.random.key(5), 3))
    assert loss.shape == (3, 32) and np.max(loss[0]) < 1e-20
    on = np.asarray(aux.metrics["diagonal_rows"].values)
    assert np.all(on.sum(1) == 16) and np.all(aux.metrics["nonfinite_rows"].value() == 0)
    assert {"tangent/raw", f"head_{identity}/raw", f"head_{identity}/tangent_norm"} <= set(aux.metrics)
    assert np.mean(loss[1][~on[1]]) > 1e-4
    # Where D_{t,t} stands in for the divergence, the diagonal rows alone know its sign.
    assert np.mean(loss[2][on[2]]) > 0.1
    assert np.mean(loss[2][~on[2]]) > 0.1 or identity == "semigroup" or "along" in choices


@pytest.mark.slow
@pytest.mark.parametrize("identity", ["lagrangian", "eulerian"])
def test_with_an_estimated_divergence_the_exact_head_is_stationary(identity):
    """The mean gradient vanishes within its standard error, and far from it with the sign of the head turned."""
    choices = {"divergence": lik.hutchinson(1, "gaussian"), "diagonal": 0.75}

    @jax.jit
    def gradients(signs):
        def one(sign, key):
            mean = lambda theta: loss_of(identity, sign, theta, key, **choices)[0].mean()  # noqa: E731
            return jax.value_and_grad(mean)(jnp.zeros(4))

        keys = jax.random.split(jax.random.key(11), (2, 128))
        return jax.lax.map(lambda row: jax.vmap(one, (None, 0))(*row), (signs, keys))

    loss, gradient = gradients(jnp.array([1.0, -1.0]))
    assert np.mean(loss[0]) > 0.1
    error = np.std(gradient, 1, ddof=1) / np.sqrt(gradient.shape[1])
    off = np.abs(np.mean(gradient, 1)) / error
    assert np.all(off[0] < 4) and np.max(off[1]) > 20


# --- what is trained --------------------------------------------------------------------------------------------------

NET = nets.MultiOutput(nets.MLP.plain(features=16, depth=1, zero_init=False))
APPLY = nets.from_linen(NET)
FORM = parameterizations.gaussian_form(PATH)


def initialised(module, seed, x):
    # Jitted: eager, it would compile operation by operation.
    return jax.jit(lambda key: module.init(key, 0.0, 1.0, x)["params"])(jax.random.key(seed))


def init(seed):
    return initialised(NET, seed, WithLogDensity(jnp.zeros(2), jnp.zeros(())))


def sizes(gradient):
    return np.array([np.max(np.abs(leaf)) for leaf in jax.tree.leaves(gradient)])


@pytest.mark.slow
def test_the_heads_loss_trains_the_head_alone(key):
    """By all three identities: nothing of a map with parameters of its own; of one network, not the map's output."""
    x1 = jax.random.normal(jax.random.key(1), (16, 2))
    rng = np.random.default_rng(2)

    def net(params, s, t, x, cond=None, *, key=None):
        return params[0] @ jnp.tanh(params[1] @ x + s - t)

    two = lik.with_head(parameterizations.flow_map(net, FORM), lik.scalar_head(APPLY))
    params = Headed((rng.normal(size=(2, 3)), rng.normal(size=(3, 2))), init(3))

    def gradient(flow, params, key, *names):
        terms = {name: (lik.head_objective(flow, PATH, identity=name), 1.0) for name in names}
        loss = objectives.weighted_sum(terms.pop("lagrangian")[0], **terms)
        return jax.grad(lambda p: loss(p, key, types.Batch(x1))[0].mean())(params)

    @jax.jit
    def gradients(params, shared, key):
        keys = jax.random.split(key)
        joint = lik.shared_network(APPLY, FORM)
        return gradient(two, params, keys[0], *lik.head.STOPS), gradient(joint, shared, keys[1], "lagrangian")

    apart, shared = gradients(params, init(4), key)
    assert np.all(sizes(apart.map) == 0.0) and np.all(sizes(apart.head["net"]["output"]) > 0.0)
    # The last column is D's; the network's inputs are x, the log-density, which is always 0, and the times.
    last, first = shared["net"]["output"], np.asarray(shared["net"]["input"]["kernel"])
    assert np.all(last["kernel"][:, :-1] == 0.0) and np.all(last["bias"][:-1] == 0.0)
    assert np.any(last["kernel"][:, -1] != 0.0) and np.all(np.any(first[[0, 1, 3, 4]] != 0.0, axis=1))
    assert np.all(first[2] == 0.0)


@pytest.mark.slow
def test_joint_training_is_the_sum_of_both():
    flow, x1 = lik.shared_network(APPLY, FORM), jax.random.normal(jax.random.key(1), (16, 2))
    map_alone, head_alone = objectives.lsd(lik.without_head(flow), PATH), lik.head_objective(flow, PATH)
    both = objectives.weighted_sum(map_alone, head=(head_alone, 0.5))

    @jax.jit
    def run(params, key, keys):
        batch = types.Batch(x1)
        return both(params, key, batch), map_alone(params, keys[0], batch), head_alone(params, keys[1], batch)

    total, of_map, of_head = run(init(4), jax.random.key(0), jax.random.split(jax.random.key(0)))
    np.testing.assert_allclose(total[0], of_map[0] + 0.5 * of_head[0], rtol=1e-12)
    for name, own, other in (
        ("lagrangian/raw", of_map, "lagrangian/raw"),
        ("head_tangent/raw", of_head, "tangent/raw"),
    ):
        assert total[1].metrics[name].value() == own[1].metrics[other].value()
    with pytest.raises(ValueError, match="head: expected a number"):
        objectives.weighted_sum(map_alone, head=(head_alone, -1.0))


def test_a_divergence_that_is_not_finite_is_counted(key):
    flow = lik.with_head(
        types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: jnp.where(x[0] > 0.5, jnp.sqrt(x - x), x)),
        lambda p, s, t, x, cond=None, *, key=None: p * jnp.sum(x),
    )
    objective = lik.head_objective(flow, PATH, diagonal=1.0, times=times.constant(1.0))
    x1 = jnp.array([[0.1, 0.0], [0.9, 0.0], [0.2, 0.0], [0.7, 0.0]])
    _, aux = jax.jit(objective)(Headed(None, jnp.asarray(1.0)), key, types.Batch(x1))
    assert aux.metrics["nonfinite_rows"].value() == 2


# --- cost and learning ------------------------------------------------------------------------------------------------


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_a_jump_with_its_log_density_costs_one_pass():
    """Of the joint network; which itself costs little more than the map's network without the head."""
    plain = nets.MLP.plain(features=512, depth=5)
    both = nets.MultiOutput(plain)
    apply = nets.from_linen(both)
    flow = lik.shared_network(apply, parameterizations.mean_velocity_form())
    float_ = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    size = 64
    points, states = float_(size, 2), WithLogDensity(float_(size, 2), float_(size))
    moments = (float_(size), float_(size))

    def shapes(module, one):
        return jax.eval_shape(
            lambda k: module.init(k, jnp.float32(0), jnp.float32(1), one)["params"], jax.random.key(0)
        )

    one = jnp.zeros(2, jnp.float32)
    params = shapes(both, WithLogDensity(one, jnp.float32(0)))
    jump = flops(jax.vmap(flow.jump, (None, 0, 0, 0)), params, *moments, states)
    forward = flops(jax.vmap(apply, (None, 0, 0, 0)), params, *moments, states)
    without = flops(jax.vmap(nets.from_linen(plain), (None, 0, 0, 0)), shapes(plain, one), *moments, points)
    assert 1.0 <= jump / forward <= 1.02
    assert forward / without <= 1.02


@pytest.mark.slow
def test_a_head_learns_the_log_density_of_an_exact_maps_jump():
    """Lagrangian, 250 steps of 128 rows in float32: from 0.93 nats of mean absolute error to about 0.12."""
    oracle = oracles.mixture(PATH)
    net = nets.MultiOutput(nets.MLP.plain(features=64, depth=3))
    flow = lik.with_head(solvers.solve(oracle.velocity, "midpoint", steps=8), lik.scalar_head(nets.from_linen(net)))
    plane = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PLANE)
    pairs = times.mixed([times.triangle(), times.independent(times.constant(0.0), times.uniform())], [0.5, 0.5])
    objective = lik.head_objective(flow, PATH, pairs=pairs)
    steps, size = 250, 128
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def step(carry, key):
        theta, state = carry
        data_key, loss_key = jax.random.split(key)
        batch = types.Batch(oracle.sample(plane, data_key, size))
        loss, gradient = jax.value_and_grad(lambda theta: objective(Headed(plane, theta), loss_key, batch)[0].mean())(
            theta
        )
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.update(gradient, state)
        return (optax.apply_updates(theta, update), state), loss

    @jax.jit
    def error(theta, x0):
        start = WithLogDensity(x0, oracle.log_density(plane, 0.0, x0))
        end = flow.jump(Headed(plane, theta), jnp.float32(0), jnp.float32(1), start)
        return jnp.abs(end.log_density - oracle.log_density(plane, 1.0, end.x))

    theta = initialised(net, 0, WithLogDensity(jnp.zeros(2, jnp.float32), jnp.float32(0)))
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (learned, _), _ = run((theta, optimizer.init(theta)), jax.random.split(jax.random.key(1), steps))
    x0 = jax.random.normal(jax.random.key(2), (512, 2), jnp.float32)
    before, after = (np.mean(jax.vmap(error, (None, 0))(p, x0)) for p in (theta, learned))
    print(before, after)
    assert before > 0.8 and after < 0.2, (before, after)


# --- mistakes ---------------------------------------------------------------------------------------------------------

FORWARD = lik.with_head(
    types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: x), lambda p, s, t, x, cond=None, *, key=None: x[0]
)
JOINT = lik.shared_network(APPLY, FORM)
POINT = WithLogDensity(jnp.zeros(2), jnp.zeros(()))


@pytest.mark.parametrize("identity", ["lagrangian", "eulerian"])
@pytest.mark.parametrize(("diagonal", "terms"), [(0.0, {"head"}), (1.0, {"tangent"})])
def test_a_head_learns_from_rows_of_one_kind(identity, diagonal, terms):
    still = lambda params, s, t, x, cond=None, *, key=None: params * x  # noqa: E731
    flow = lik.with_head(types.FlowMap(still), lambda params, s, t, x, cond=None, *, key=None: params * t)
    objective = lik.head_objective(flow, PATH, identity=identity, diagonal=diagonal)
    batch = types.Batch(jnp.ones((4, 2)))
    loss, aux = jax.eval_shape(objective, Headed(jnp.ones(()), jnp.ones(())), jax.random.key(0), batch)
    assert loss.shape == (4,)
    assert {name.split("/")[0].removesuffix(f"_{identity}") for name in aux.metrics if "/" in name} == terms


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lik.with_head(lambda p, s, t, x: x, lambda *a, key: 0.0), TypeError, "flow_map: expected a FlowMap"),
        (lambda: lik.with_head(FORWARD, FORWARD), TypeError, "head: expected a function"),
        (lambda: lik.head_objective(PATH, FORWARD), TypeError, "flow_map: expected a FlowMap.*got Interpolant"),
        (lambda: lik.head_objective(FORWARD, PATH, diagonal="1"), TypeError, "diagonal: expected a number"),
        (lambda: FORWARD.jump(Headed(0, 0), 0.9, 0.2, POINT), ValueError, "jump from 0.9 to 0.2 is outside .*s <= t"),
        (lambda: JOINT.jump(init(0), 0.0, 1.2, POINT), ValueError, r"t: expected a time in \[0, 1\], got 1.2"),
        (
            lambda: FORWARD.jump(Headed(0, 0), 0.0, 1.0, jnp.zeros(2)),
            TypeError,
            r"x: expected a WithLogDensity\(x, log_density\)",
        ),
        (lambda: FORWARD.jump((0, 0), 0.0, 1.0, POINT), TypeError, "params: expected Headed"),
        (
            lambda: FORWARD.jump(Headed(0, 0), 0.0, 1.0, POINT._replace(log_density=jnp.zeros(1))),
            ValueError,
            r"x.log_density: expected a scalar",
        ),
        (
            lambda: FORWARD.jump(Headed(0, 0), 0.0, 1.0, WithLogDensity(jnp.zeros((2, 2)), jnp.zeros(()))),
            ValueError,
            "head's output: expected a scalar",
        ),
        (lambda: JOINT.jump(init(0), jnp.zeros(3), 1.0, POINT), ValueError, "s: expected a scalar"),
        (
            lambda: lik.shared_network(lambda p, s, t, x, cond=None, *, key=None: x.x, FORM).jump(0, 0.0, 1.0, POINT),
            TypeError,
            "network output: expected a WithLogDensity",
        ),
        (
            lambda: lik.shared_network(
                lambda p, s, t, x, cond=None, *, key=None: WithLogDensity(x.x[:1], x[1]), FORM
            ).jump(0, 0, 1, POINT),
            ValueError,
            "network output: expected the shape",
        ),
        (lambda: lik.head_objective(FORWARD, PATH, identity="euler"), ValueError, "identity: .*'euler'"),
        (lambda: lik.head_objective(FORWARD, PATH, identity="semigroup", stop="velocity"), ValueError, "stop: "),
        (
            lambda: lik.head_objective(FORWARD, PATH, identity="semigroup", diagonal=0.0),
            ValueError,
            "diagonal: .*D = 0",
        ),
        (lambda: lik.head_objective(FORWARD, PATH, along="head", diagonal=0.0), ValueError, "diagonal: .*D = 0"),
        (
            lambda: lik.head_objective(FORWARD, PATH)(Headed(0, 0), jax.random.key(0), types.Batch(jnp.arange(4))),
            TypeError,
            "batch.x1: expected floating",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
