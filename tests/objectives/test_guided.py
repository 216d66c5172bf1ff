"""Guidance in the target and label dropout.

The classes have affine velocities with one slope, so that the guided velocity is affine too, and its flow, switched on and off
at the ends of the interval, is known in closed form.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import (
    conditions,
    flow_map,
    guidance,
    interpolants,
    nets,
    objectives,
    parameterizations,
    times,
    types,
)
from jflow.objectives import Guidance, guided
from jflow.testing import methods as testing_methods

PATH = interpolants.linear()
NULL, SLOPE = 2, -0.7
# The offsets of the velocities of two classes, and of the null condition; without symmetry.
OFFSETS = np.array([[1.3, -0.4], [-0.9, 0.5], [0.2, 0.1]])
ROWS = 32
BATCH = types.Batch(jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 2))), cond=jnp.arange(ROWS) % 2)


def split_condition(cond, scale, interval):
    """(label, scale, interval) of a condition, or of the fixed ones."""
    if isinstance(cond, conditions.Scaled):
        interval = conditions.ALWAYS if cond.interval is None else cond.interval
        return cond.cond, cond.scale, interval
    return cond, scale, interval


def mean_velocity_of(scale, interval):
    """The exact map of the guided velocity a x + k: k is guided within the interval, for rows with a label."""

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        label, w, (first, last) = split_condition(cond, scale, interval)
        plain, null = jnp.asarray(OFFSETS)[label], jnp.asarray(OFFSETS[NULL])
        strong = null + jnp.where(label == NULL, 1.0, w) * (plain - null)
        s, t = jnp.asarray(s, x.dtype), jnp.asarray(t, x.dtype)
        first, last = jnp.clip(first, s, t), jnp.clip(last, s, t)
        # x(t) = e^{a(t-s)} x + int e^{a(t-u)} k(u) du; in terms of (e^{ah} - 1)/(ah), which has a limit at h = 0.
        gap = t - s
        share = jnp.where(gap == 0.0, 1.0, gap)

        def integral(start, end):
            return (jnp.exp(SLOPE * (t - start)) - jnp.exp(SLOPE * (t - end))) / SLOPE

        moved = jnp.expm1(SLOPE * gap) * x + plain * (integral(s, first) + integral(last, t))
        moved = moved + strong * integral(first, last)
        return (1.0 + params) * jnp.where(gap == 0.0, velocity(params, t, x, cond), moved / share)

    def velocity(params, t, x, cond=None, *, key=None):
        label, w, (first, last) = split_condition(cond, scale, interval)
        plain, null = jnp.asarray(OFFSETS)[label], jnp.asarray(OFFSETS[NULL])
        active = (first <= t) & (t <= last) & (label != NULL)
        return (1.0 + params) * (SLOPE * x + null + jnp.where(active, w, 1.0) * (plain - null))

    return mean_velocity, velocity


def exact(scale=1.0, interval=conditions.ALWAYS):
    mean_velocity, velocity = mean_velocity_of(scale, interval)
    return types.FlowMap(mean_velocity, velocity_override=velocity, null=NULL)


def of_class(row):
    """The exact velocity of the row's class: the mean of the pair's velocity."""
    label = row.cond.cond if isinstance(row.cond, conditions.Scaled) else row.cond
    return SLOPE * row.x + jnp.asarray(OFFSETS)[label]


GUIDANCES = {
    "fixed": Guidance(2.5),
    "mean_flow": Guidance.mean_flow(0.6, 0.7, (0.2, 0.8)),
    "kappa_0": Guidance(2.0, 0.0),
    "fed": Guidance(guided.power_law(4.0), interval=(0.3, 0.9)),
    "improved": Guidance.improved_mean_flow(),
}
# Methods of all identities that read the velocity of the data, on or off the diagonal.
METHODS = ("mean_flow", "improved_mean_flow", "lsd", "esd", "psd_m", "decoupled_mean_flow", "facm", "flow_matching")


@pytest.mark.representatives(
    "improved-improved_mean_flow", "mean_flow-mean_flow", "kappa_0-lsd", "fed-psd_m", "fixed-esd"
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", GUIDANCES)
def test_the_map_of_the_guided_velocity_is_the_fixed_point(which, method):
    """With the mean of the pair's velocity as estimate, every row's residual is zero, dropped rows included."""
    rule = GUIDANCES[which]
    model = exact(rule.scale, rule.interval)
    objective = objectives.METHODS[method].constructor(
        model,
        PATH,
        guidance=rule,
        label_dropout=0.3,
        velocity=of_class,
        **{"diagonal": 0.5} if method != "flow_matching" else {},
    )
    run = jax.jit(jax.vmap(lambda p, k: objective(p, k, BATCH)[0], (0, None)))
    zero, off = run(jnp.array([0.0, 0.1]), jax.random.key(3))
    assert zero.max() < 1e-24 and off.min() > 1e-6


def net(params, s, t, x, cond=None, *, key=None):
    """A small network that depends on every part of its input."""
    label, w, (first, last) = split_condition(cond, 1.0, conditions.ALWAYS)
    z = params[label] * (1.0 + 0.3 * w) + first - 0.5 * last
    return jnp.sin(z * x + s) + t * z


PARAMS = jnp.array([0.7, -1.1, 0.4])


@pytest.mark.parametrize("which", GUIDANCES)
def test_the_target_is_the_published_formula(which):
    """omega c + kappa v(cond) + (1 - omega - kappa) v(null), against the formulas of both papers for single rows."""
    rule, seen = GUIDANCES[which], []
    model = types.FlowMap(net, null=NULL)

    def residual(row):
        from jflow.identities import Residual

        at = lambda cond: net(PARAMS, row.s, row.s, row.x, cond)  # noqa: E731
        pair = PATH.derivative(row.s, row.x0, row.x1)
        label, w, (first, last) = split_condition(row.cond, rule.scale, rule.interval)
        null = jnp.asarray(NULL)
        if isinstance(row.cond, conditions.Scaled):
            one = jnp.ones(())
            null = conditions.Scaled(null, one, None if row.cond.interval is None else (0.0 * one, one))
        active = (first <= row.s) & (row.s <= last) & (label != NULL)
        if which in ("mean_flow", "kappa_0"):
            omega, kappa = (0.6, 0.7) if which == "mean_flow" else (2.0, 0.0)
            published = omega * pair + kappa * at(row.cond) + (1 - omega - kappa) * at(null)
        else:
            published = pair + (1 - 1 / w) * (at(row.cond) - at(null))
        return Residual(row.conditional, jnp.where(active, published, pair), None)

    seen.append(objectives.Term("probe", residual, ("velocity",)))
    objective = objectives.Objective("probe", model, PATH, seen[0], diagonal=0.0, guidance=rule, label_dropout=0.3)
    loss, aux = jax.jit(objective)(PARAMS, jax.random.key(0), BATCH)
    null = np.asarray(aux.metrics["null_rows"].values)
    assert 0 < null.sum() < ROWS
    assert loss.max() < 1e-28


def test_mean_flow_takes_its_own_numbers():
    rule = Guidance.mean_flow(0.2, 0.92)
    assert rule.scale == pytest.approx(2.5) and rule.kappa == 0.92
    np.testing.assert_allclose(Guidance.mean_flow(3.0).scale, 3.0)


def test_the_law_of_scales():
    """Quantiles against the inverse of the distribution function, for three powers."""
    for power in (0.0, 1.0, 2.5):
        drawn = np.sort(guided.power_law(8.0, power)(jax.random.key(1), 20_000))
        w = np.quantile(drawn, [0.1, 0.5, 0.9])
        below = np.log(w) / np.log(8.0) if power == 1.0 else (w ** (1 - power) - 1) / (8.0 ** (1 - power) - 1)
        np.testing.assert_allclose(below, [0.1, 0.5, 0.9], atol=4 * 0.5 / np.sqrt(20_000))


def test_the_dropped_rows_are_independent_of_the_split():
    """The masks of 200 batches: their shares, and the correlation of both."""
    objective = objectives.lsd(exact(), PATH, label_dropout=0.25, diagonal=0.5)

    def masks(key):
        metrics = objective(jnp.zeros(()), key, BATCH)[1].metrics
        return metrics["diagonal_rows"].values, metrics["null_rows"].values

    diagonal, null = map(np.asarray, jax.jit(jax.vmap(masks))(jax.random.split(jax.random.key(5), 200)))
    n = diagonal.size
    assert diagonal.mean() == 0.5
    assert abs(null.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    assert abs(np.corrcoef(np.ravel(diagonal), np.ravel(null))[0, 1]) < 4 / np.sqrt(n)
    # Each row is dropped as often as the others: not the first rows of the batch.
    assert np.abs(null.mean(0) - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 200)


@functools.cache
def label_network():
    return nets.MLP(features=16, depth=2, num_classes=NULL)


def test_the_null_label_learns_and_is_known_from_the_network():
    module, x = label_network(), jnp.ones(2, jnp.float32)
    model = flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    assert model.null == NULL == module.null_label
    params = jax.jit(module.init)(jax.random.key(0), 0.0, 1.0, x, jnp.int32(0))["params"]
    # The output layer starts at zero, and then nothing else has a gradient.
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    batch = types.Batch(jnp.ones((ROWS, 2), jnp.float32), cond=jnp.arange(ROWS, dtype=jnp.uint8) % 2)

    def table(share):
        objective = objectives.lsd(model, PATH, label_dropout=share)
        return jax.grad(lambda p: jnp.mean(objective(p, jax.random.key(0), batch)[0]))

    gradients = jax.jit(lambda p: [table(share)(p)["label"] for share in (0.0, 0.3)])(params)
    norms = np.linalg.norm(np.stack(gradients), axis=-1)
    assert norms[0, NULL] == 0.0 and norms[1, NULL] > 1e-4 and norms[:, :NULL].min() > 1e-4


def test_guidance_drops_labels_by_default_and_nothing_changes_without_it():
    assert objectives.lsd(exact(), PATH).label_dropout == 0.0
    assert objectives.lsd(exact(), PATH, guidance=Guidance(2.0)).label_dropout == 0.1
    assert objectives.lsd(exact(), PATH, guidance=Guidance(2.0), label_dropout=0.0).label_dropout == 0.0


@pytest.mark.parametrize(("choices", "error", "match"), [
    (dict(label_dropout=0.1), ValueError, "label_dropout: expected a flow map with a null"),
    (dict(guidance=Guidance(2.0), label_dropout=0.0), ValueError, "guidance: expected a flow map with a null"),
    (dict(label_dropout=1.5), ValueError, "label_dropout"),
    (dict(guidance=2.0), TypeError, "guidance: expected an objectives.Guidance"),
])  # fmt: skip
def test_refusals_of_the_objective(choices, error, match):
    with pytest.raises(error, match=match):
        objectives.lsd(types.FlowMap(net), PATH, **choices)


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (dict(scale=0.0), ValueError, "scale"),
    (dict(scale="2"), TypeError, "scale"),
    (dict(scale=lambda key, n: -jnp.ones(n)), ValueError, "positive finite scales, got values from -1 to -1$"),
    (dict(scale=lambda key, n: jnp.ones((n, 1))), ValueError, r"scales, got shape \(64, 1\) for n = 64$"),
    (dict(scale=2.0, kappa=1.0), ValueError, "kappa"),
    (dict(interval=(0.7, 0.2)), ValueError, "interval"),
    (dict(interval=0.5), TypeError, "interval"),
    (dict(interval=times.independent(times.constant(0.9), times.constant(0.1))), ValueError, "interval"),
    (dict(leg="teacher"), ValueError, "leg"),
])  # fmt: skip
def test_refusals_of_the_guidance(arguments, error, match):
    with pytest.raises(error, match=match):
        Guidance(**arguments)


def test_mean_flow_names_its_own_numbers():
    with pytest.raises(ValueError, match="omega: expected a number in"):
        Guidance.mean_flow(0.0, 0.5)


def test_guidance_is_refused_where_no_velocity_of_the_data_is_read():
    with pytest.raises(ValueError, match="guidance: expected no choice of it for lmd"):
        objectives.lmd(exact(), PATH, guidance=Guidance(2.0))
    with pytest.raises(ValueError, match="the teacher's, which must be guided itself"):
        objectives.lsd(exact(), PATH, teacher=exact(), guidance=Guidance(2.0))
    with pytest.raises(ValueError, match=r"batch\.cond: expected conditions with guidance"):
        objectives.lsd(exact(), PATH, guidance=Guidance(2.0))(jnp.zeros(()), jax.random.key(0), types.Batch(BATCH.x1))


def test_a_teacher_is_guided_by_the_scale_that_the_student_receives():
    """Distillation over a law of scales (2210.03142): the teacher reads each row's scale from the condition."""
    teacher = guidance.classifier_free(exact(), null=NULL)
    rule = Guidance(guided.power_law(4.0))
    objective = objectives.lmd(exact(), PATH, teacher=teacher, guidance=rule, label_dropout=0.0)
    context = types.Context(teacher=jnp.zeros(()))
    run = jax.jit(jax.vmap(lambda p: objective(p, jax.random.key(0), BATCH, context)[0]))
    zero, off = run(jnp.array([0.0, 0.1]))
    assert zero.max() < 1e-24 and off.min() > 1e-6


def flops_of(method, **choices):
    module = nets.MLP.plain(features=512, depth=5, num_classes=NULL, cond_features=choices.pop("features", 0))
    model = flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    objective = objectives.METHODS[method].constructor(model, PATH, **choices)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    label = jnp.zeros((), jnp.int32)
    cond = label
    if module.cond_features:
        one = jnp.ones((), jnp.float32)
        cond = conditions.Scaled(label, one, (one, one))
    params = jax.eval_shape(module.init, jax.random.key(0), 0.0, 0.0, floats(2), cond)["params"]
    batch = types.Batch(floats(512, 2), cond=jax.ShapeDtypeStruct((512,), jnp.int32))

    def loss(params, key, batch):
        return jnp.mean(objective(params, key, batch)[0])

    return testing_methods.flops(jax.value_and_grad(loss), params, jax.eval_shape(lambda: jax.random.key(0)), batch)


IMPROVED = {"guidance": Guidance.improved_mean_flow(), "features": 3}
# Passes: a diagonal row 4 (flow matching 3, the null velocity 1); off the diagonal MeanFlow 4, the null velocity 1 and, with
# kappa, the conditional one 1; improved MeanFlow 5 and the null velocity 1. Over flow matching's 3.
FLOORS = {
    "kappa": ("mean_flow", {"guidance": Guidance(2.0, 0.5)}, (0.75 * 4 + 0.25 * 6) / 3),
    "kappa_0": ("mean_flow", {"guidance": Guidance(2.0, 0.0)}, (0.75 * 4 + 0.25 * 5) / 3),
    "improved": ("improved_mean_flow", IMPROVED, (0.75 * 4 + 0.25 * 6) / 3),
    "improved_half": ("improved_mean_flow", {**IMPROVED, "diagonal": 0.5}, (0.5 * 4 + 0.5 * 6) / 3),
    "lsd": ("lsd", {"guidance": Guidance(2.0)}, (0.75 * 4 + 0.25 * 7) / 3),
}


@pytest.mark.representatives("kappa", "improved")
@pytest.mark.parametrize("which", FLOORS)
def test_a_guided_step_costs_its_floor(which):
    method, choices, floor = FLOORS[which]
    plain = flops_of("flow_matching")
    assert flops_of(method, **choices) / plain == pytest.approx(floor, rel=0.01)
