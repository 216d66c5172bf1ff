"""Velocities from a teacher: of every kind, each against its formula; and a coupling given by the caller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import couplings, guidance, interpolants, objectives, oracles, parameterizations, times, types

clone = jax.random.clone
PATH = interpolants.trigonometric()
ORACLE = oracles.gaussian(PATH)
TRUTH = oracles.gaussian_params(jnp.array([0.6, -0.3]), jnp.array([[0.5, 0.2], [0.2, 0.3]]))
STILL = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: 0.0 * p * x)
T = 0.35


def velocity(params, t, x, cond=None, *, key=None):
    """A smooth field with one parameter, which sees its condition."""
    return jnp.sin(params * x[::-1] + t) + (0.0 if cond is None else cond * x)


def mean_velocity(params, s, t, x, cond=None, *, key=None):
    """Another field off the diagonal than on it."""
    return velocity(params, t, x, cond) + (t - s) * 10.0


def batch_of(n, cond=None):
    x = np.random.default_rng(0).normal(size=(2, n, 2))
    return types.Batch(jnp.asarray(x[0] + 0.5), jnp.asarray(x[1]), cond)


MAP = types.FlowMap(mean_velocity)
WITH_HEAD = types.FlowMap(
    mean_velocity, velocity_override=lambda p, t, x, cond=None, *, key=None: velocity(p, t, x, cond) - 3.0 * x
)
GUIDED = guidance.autoguided(velocity, MAP, 2.5)
# Name: the teacher, its parameters, and its velocity (t, x, cond) written out.
TEACHERS = {
    "velocity": (velocity, 0.7, lambda t, x, c: velocity(0.7, t, x, c)),
    "flow map": (MAP, 0.7, lambda t, x, c: velocity(0.7, t, x, c)),
    "flow map with a head": (WITH_HEAD, 0.7, lambda t, x, c: velocity(0.7, t, x, c) - 3.0 * x),
    "guided pair": (
        GUIDED,
        guidance.Guided(0.7, -0.4),
        lambda t, x, c: 2.5 * velocity(0.7, t, x, c) - 1.5 * velocity(-0.4, t, x, c),
    ),
    "oracle": (ORACLE.velocity, TRUTH, lambda t, x, c: ORACLE.velocity(TRUTH, t, x)),
    "oracle's map": (ORACLE.flow_map, TRUTH, lambda t, x, c: ORACLE.velocity(TRUTH, t, x)),
}


@pytest.mark.representatives("flow map with a head", "oracle")
@pytest.mark.parametrize("name", TEACHERS)
def test_the_diagonal_learns_the_velocity_of_the_teacher_at_the_point(name, key):
    """A student that stands still has the loss |b_t(I_t)|^2, of the teacher and not of the pair."""
    teacher, params, formula = TEACHERS[name]
    batch = batch_of(6, jnp.linspace(-1.0, 1.0, 6))
    objective = objectives.flow_matching(STILL, PATH, teacher=teacher, times=times.constant(T))
    loss, _ = jax.jit(objective)(jnp.float64(1.0), key, batch, types.Context(teacher=params))

    @jax.jit
    @jax.vmap
    def by_hand(x0, x1, cond):
        expected = jnp.sum(formula(T, PATH.interpolate(T, x0, x1), cond) ** 2)
        return expected, jnp.sum(PATH.derivative(T, x0, x1) ** 2)

    expected, pair = by_hand(batch.x0, batch.x1, batch.cond)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert np.abs(loss - pair).min() > 1e-3


@pytest.mark.parametrize("name", ["velocity", "flow map with a head", "guided pair", "oracle"])
def test_off_the_diagonal_the_teacher_takes_the_place_of_the_pair(name, key):
    """MeanFlow of a student that stands still: v - c - (t-s)(d/ds v + grad v c) = -c, with c the teacher's at (s, I_s)."""
    teacher, params, formula = TEACHERS[name]
    batch = batch_of(6, jnp.linspace(-1.0, 1.0, 6))
    pairs = times.independent(times.constant(T), times.constant(0.9))
    objective = objectives.mean_flow(STILL, PATH, teacher=teacher, diagonal=0.0, pairs=pairs)
    loss, _ = jax.jit(objective)(jnp.float64(1.0), key, batch, types.Context(teacher=params))
    x = jax.vmap(lambda a, b: PATH.interpolate(T, a, b))(batch.x0, batch.x1)
    expected = jax.vmap(lambda x_, c: jnp.sum(formula(T, x_, c) ** 2))(x, batch.cond)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_parameters_of_a_teacher_alone_are_those_of_the_map_itself(key):
    """``context.teacher`` without ``teacher``: the student's own function; it is asked only where the estimate says so."""
    batch, context = batch_of(6), types.Context(teacher=jnp.float64(0.7))
    make = functools.partial(objectives.flow_matching, MAP, PATH, times=times.constant(T))
    run = lambda objective, params: objective(params, clone(key), batch, context)[0]  # noqa: E731
    taught = make(velocity=objectives.velocity_estimates.teacher)
    np.testing.assert_array_equal(run(taught, jnp.float64(0.7)), 0.0)
    x = jax.vmap(lambda a, b: PATH.interpolate(T, a, b))(batch.x0, batch.x1)
    apart = jax.vmap(lambda z: jnp.sum((velocity(1.2, T, z) - velocity(0.7, T, z)) ** 2))(x)
    np.testing.assert_allclose(run(taught, jnp.float64(1.2)), apart, rtol=1e-12)
    v = jax.vmap(lambda z: velocity(0.7, T, z))(x)
    pair = jax.vmap(lambda a, b: PATH.derivative(T, a, b))(batch.x0, batch.x1)
    np.testing.assert_allclose(run(make(), jnp.float64(0.7)), jnp.sum((v - pair) ** 2, 1), rtol=1e-12)


def test_an_exact_teacher_has_the_expected_gradient_of_the_pairs_and_less_variance(key):
    """E[I_t' | I_t] = b_t(I_t), so that flow matching on the oracle's velocity is flow matching on pairs, averaged."""

    def gradients(**choices):
        objective = objectives.flow_matching(MAP, PATH, **choices)

        def one(k):
            first, second = jax.random.split(k)
            batch = types.Batch(ORACLE.sample(TRUTH, first, 64))
            return jax.grad(lambda p: objective(p, second, batch, types.Context(teacher=TRUTH))[0].mean())(0.8)

        return np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=50))(jax.random.split(clone(key), 1000)))

    pair, taught = gradients(), gradients(teacher=ORACLE.velocity)
    assert abs((pair - taught).mean()) < 4 * (pair - taught).std() / np.sqrt(1000)
    assert taught.var() < 0.5 * pair.var()
    assert abs(taught.mean()) > 10 * taught.std() / np.sqrt(1000)  # nor are both zero


DISTILLED = {
    "lmd": {},
    "ayf_lmd": {},
    "emd": {},
    "ayf_emd": {},
    "progressive_distillation": {"cells": 4},
    "psd_m": {"leg": "teacher", "diagonal": 0.5},
}


@pytest.mark.representatives("lmd")
@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_from_an_oracle_drives_nothing_at_the_exact_map(name, key):
    """The loss and its gradient vanish at the exact Gaussian map, row by row, and at no map beside it."""

    def student(eps, s, t, x, cond=None, *, key=None):
        return ORACLE.flow_map.mean_velocity(TRUTH, s, t, x) + eps * (jnp.sin(3.0 * x + s) + t * x)

    def run(eps, teacher):
        choices = {"teacher": teacher, **DISTILLED[name]}
        objective = objectives.METHODS[name].constructor(types.FlowMap(student), PATH, **choices)
        loss, _ = objective(eps, clone(key), batch_of(32), types.Context(teacher=TRUTH))
        return loss.mean(), loss

    jumps = name in ("progressive_distillation", "psd_m")  # these ask for the teacher's jumps
    for teacher in (ORACLE.flow_map,) if jumps else (ORACLE.flow_map, ORACLE.velocity):
        step = jax.jit(jax.value_and_grad(functools.partial(run, teacher=teacher), has_aux=True))
        (_, loss), slope = step(0.0)
        assert loss.max() < 1e-12 and abs(slope) < 1e-6
        (mean, _), slope = step(1e-2)
        assert mean > 1e-6 and slope > 1e-4


def test_a_teacher_gives_its_velocity_at_the_points(key):
    """The estimate by itself: b_t(I_t), at each row's own time and with the path's own point."""
    t, batch, cond = jnp.array([0.0, 0.3, 0.8, 1.0]), batch_of(4), jnp.array([0.4, -0.2, 0.1, 0.9])
    estimate = objectives.velocity_estimates.teacher
    for i in range(4):
        x = PATH.alpha(t[i]) * batch.x0[i] + PATH.beta(t[i]) * batch.x1[i]
        own, of_teacher = (objectives.Leg(MAP, jnp.float64(p), cond[i], None) for p in (-1.3, 0.7))
        legs = {"own": own, "frozen": own, "ema": None, "teacher": of_teacher._replace(model=velocity)}
        drawn = {"s": t[i], "t": t[i], "x0": batch.x0[i], "x1": batch.x1[i], "x": x, "cond": cond[i]}
        rest = {"key": None, "gamma": None, "step": jnp.int32(0), "data": batch.x1, "interpolant": PATH, "base": None}
        row = objectives.Row(**drawn, **legs, **rest, estimate=estimate)
        np.testing.assert_allclose(row.conditional, velocity(0.7, t[i], x, cond[i]), rtol=1e-12)
        with pytest.raises(ValueError, match=r"context\.teacher: expected parameters, got None"):
            estimate(row._replace(teacher=None))
    objective = objectives.flow_matching(MAP, PATH, velocity=estimate)
    with pytest.raises(ValueError, match=r"context\.teacher: expected parameters, got None"):
        objective(jnp.float64(0.7), key, batch)


@pytest.mark.slow
def test_teachers_that_do_not_fit_are_refused(key):
    context = types.Context(teacher=jnp.float64(0.7))
    guided = objectives.lmd(MAP, PATH, teacher=GUIDED)
    with pytest.raises(TypeError, match=r"expected Guided\(strong, weak\)"):
        guided(jnp.float64(1.0), clone(key), batch_of(4), context)
    # A Velocity is no map; with legs of a teacher its jumps are needed.
    split = objectives.psd_m(MAP, PATH, leg="teacher", teacher=velocity, diagonal=0.5)
    with pytest.raises(ValueError, match="expected a FlowMap, whose jumps"):
        split(jnp.float64(1.0), clone(key), batch_of(4), context)


# ---- couplings ----


def test_a_coupling_receives_the_data_its_key_and_the_condition(key):
    """x0 = x1 - cond z with z from the key: on the linear path the pair's velocity is cond z, and so is the loss's root."""
    seen = []

    def coupling(k, x1, cond):
        seen.append((x1.shape, cond.shape))
        return x1 - cond[:, None] * jax.random.normal(k, x1.shape)

    cond = jnp.linspace(0.5, 4.0, 8)
    batch = batch_of(8, cond)._replace(x0=None)
    run = jax.jit(objectives.flow_matching(STILL, interpolants.linear(), coupling=coupling))
    one, two = jax.random.split(key)
    loss = run(jnp.float64(1.0), one, batch)[0]
    assert seen == [((8, 2), (8,))]
    half = run(jnp.float64(1.0), clone(one), batch._replace(cond=cond / 2))[0]
    np.testing.assert_allclose(half, loss / 4, rtol=1e-12)
    np.testing.assert_array_equal(run(jnp.float64(1.0), clone(one), batch._replace(cond=0.0 * cond))[0], 0.0)
    assert np.abs(run(jnp.float64(1.0), two, batch)[0] - loss).min() > 1e-6
    # Pairs made beforehand are taken as they are: the coupling is not asked.
    paired = batch_of(8, cond)
    np.testing.assert_allclose(
        run(jnp.float64(1.0), clone(one), paired)[0], jnp.sum((paired.x1 - paired.x0) ** 2, 1), rtol=1e-12
    )
    assert len(seen) == 1


def test_a_coupling_within_labels_pairs_equal_labels_alone(key):
    """A Sinkhorn-like coupling: base points at 10 + 100 label, permuted among rows of equal labels by a plan of the batch."""

    def coupling(k, x1, cond):
        base = 10.0 + 100.0 * cond[:, None] + 0.0 * x1
        plan = jnp.where(cond[:, None] == cond[None], 0.0, -jnp.inf)
        return base[jax.random.categorical(k, plan, axis=1)]

    labels = jnp.array([0, 1, 2, 1, 0, 2, 1, 1]).astype(float)
    batch = types.Batch(jnp.zeros((8, 2)), cond=labels)
    objective = objectives.lsd(STILL, interpolants.linear(), coupling=coupling, diagonal=0.5)
    loss, aux = jax.jit(objective)(jnp.float64(1.0), key, batch)
    # The pair's velocity is -x0 on the diagonal, and a map that stands still has no Lagrangian residual.
    np.testing.assert_allclose(
        loss, np.where(aux.metrics["diagonal_rows"].values, 2 * (10.0 + 100.0 * labels) ** 2, 0.0), rtol=1e-12
    )


def test_the_batch_velocity_refuses_every_coupling_but_the_independent_one():
    """Its probabilities are those of independent pairs; a coupling would change them."""
    batch = objectives.velocity_estimates.batch
    for name in ("flow_matching", "mean_flow"):
        make = functools.partial(objectives.METHODS[name].constructor, MAP, PATH, velocity=batch)
        assert make().velocity is make(coupling=couplings.independent).velocity is batch
        with pytest.raises(ValueError, match="velocity: expected an independent coupling"):
            make(coupling=lambda key, x1, cond: x1)


def test_a_form_that_is_singular_where_a_method_starts_is_refused():
    net = lambda p, s, t, x, cond=None, *, key=None: p * x  # noqa: E731
    linear = interpolants.linear()
    for form in ("v", "x", "noise", "gaussian"):
        flow_map = parameterizations.flow_map(net, parameterizations.PARAMETERIZATIONS[form](linear))
        # The noise form divides by beta_0 = 0, and its jump from noise is the clamp's and not the network's.
        if form == "noise":
            with pytest.raises(ValueError, match="where the noise form is singular"):
                objectives.pid(flow_map, linear, teacher=velocity)
        else:
            assert objectives.pid(flow_map, linear, teacher=velocity).domain is types.FROM_NOISE
