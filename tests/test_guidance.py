"""Guidance against its formulas: class-conditional Gaussians, whose unconditional velocity is a mixture's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import guidance, interpolants, oracles, parameterizations, types

PATH = interpolants.linear()
MEANS, VARIANCES = np.array([[1.0, -0.5], [-2.0, 0.3]]), np.array([[0.3, 0.6], [0.5, 0.2]])
CLASSES = [oracles.gaussian_params(m, v) for m, v in zip(MEANS, VARIANCES, strict=True)]
BOTH = oracles.mixture_params(np.array([0.4, 0.6]), MEANS, VARIANCES)
CLASS, EITHER = oracles.gaussian(PATH), oracles.mixture(PATH)
NULL, X = 2, jnp.array([0.4, -0.9])
GUIDES = ["classifier_free", "autoguided"]


def model(params, t, x, cond=None, *, key=None):
    """The exact conditional velocity of classes 0 and 1, and the unconditional one of the null label; times params."""
    velocities = [*(CLASS.velocity(p, t, x) for p in CLASSES), EITHER.velocity(BOTH, t, x)]
    return params * jnp.stack(velocities)[NULL if cond is None else cond]


def weak(params, t, x, cond=None, *, key=None):
    """A model of its own, less sure of the class."""
    return 0.5 * (model(params, t, x, cond) + EITHER.velocity(BOTH, t, x))


def make(kind, scale, **kwargs):
    """(guided velocity, its params, the strong and the weak velocity at (t, x) for class 1)."""
    if kind == "classifier_free":
        guided, params = guidance.classifier_free(model, scale, NULL, **kwargs), jnp.float64(1.3)
        return guided, params, lambda t, x: model(params, t, x, 1), lambda t, x: model(params, t, x, NULL)
    guided = guidance.autoguided(model, weak, scale, **kwargs)
    params = guidance.Guided(jnp.float64(1.3), jnp.float64(0.8))
    return guided, params, lambda t, x: model(params.strong, t, x, 1), lambda t, x: weak(params.weak, t, x, 1)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("scale", [0, 0.0, 0.5, 2.5, np.float32(3.0)])
def test_the_formula(kind, scale):
    guided, params, strong, weak = make(kind, scale)
    for t in (0.0, 1.0, 0.35):  # at t = 1 all are x
        good, bad = strong(t, X), weak(t, X)
        np.testing.assert_allclose(guided(params, t, X, 1), bad + float(scale) * (good - bad), rtol=1e-12, atol=1e-12)
    assert np.abs(good - bad).max() > 1e-2


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("interval", [guidance.ALWAYS, (0.2, 0.8)])
def test_at_scale_one_it_is_the_strong_one_to_the_bit(kind, interval):
    """Known to be 1, nothing else is evaluated; traced, the correction is zero."""
    guided, params, strong, _ = make(kind, 1, interval=interval)
    np.testing.assert_array_equal(guided(params, 0.35, X, 1), strong(0.35, X))

    def traced(scale):
        guided, params, strong, _ = make(kind, scale, interval=interval)
        return guided(params, 0.35, X, 1), strong(0.35, X)

    np.testing.assert_array_equal(*jax.jit(traced)(1.0))


@pytest.mark.parametrize("kind", GUIDES)
def test_outside_the_interval_it_is_the_strong_one(kind):
    times = jnp.array([0.0, 0.19, 0.2, 0.5, 0.8, 0.81, 1.0])
    guided, params, strong, _ = make(kind, 3.0, interval=(0.2, 0.8))
    always = make(kind, 3.0)[0]
    for dtype in (jnp.float64, jnp.float32):
        t, x = times.astype(dtype), X.astype(dtype)
        p = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), params)
        got = jax.jit(jax.vmap(lambda t, x=x, p=p: guided(p, t, x, 1)))(t)
        assert got.dtype == dtype
        rtol = 1e-12 if dtype == jnp.float64 else 1e-4
        for i, time in enumerate(times):
            expected = always(params, time, X, 1) if 0.2 <= time <= 0.8 else strong(time, X)
            np.testing.assert_allclose(got[i], expected, rtol=rtol)
    # Whole numbers are times as well.
    np.testing.assert_allclose(guided(params, 1, X, 1), strong(1.0, X), rtol=1e-12)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("interval", [guidance.ALWAYS, (0.2, 0.8)])
def test_gradients_are_those_of_the_formula(kind, interval):
    guided, params, *_ = make(kind, 2.0, interval=interval)

    def loss(params, t, x):
        value, tangent = jax.jvp(lambda t, x: guided(params, t, x, 1), (t, x), (jnp.ones_like(t), x))
        return jnp.sum(value**2) + jnp.sum(tangent**2)

    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), (None, 0, None)))
    at = gradient(params, jnp.array([0.0, 0.1, 0.5, 1.0]), X)
    assert all(np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(at))
    h, t, direction = 1e-5, 0.5, jnp.array([0.3, -0.2])
    _, tangent = jax.jvp(lambda x: guided(params, t, x, 1), (X,), (direction,))
    ends = [guided(params, t, X + sign * h * direction, 1) for sign in (1, -1)]
    np.testing.assert_allclose(tangent, (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kind", "interval", "passes"), [
    ("classifier_free", guidance.ALWAYS, 1),  # both conditions in one vmapped call
    ("classifier_free", (0.2, 0.8), 2),
    ("autoguided", guidance.ALWAYS, 2),
    ("autoguided", (0.2, 0.8), 2),
])  # fmt: skip
def test_nothing_is_evaluated_twice(kind, interval, passes):
    calls = []

    def counted(params, t, x, cond=None, *, key=None):
        calls.append(t)
        jax.debug.callback(lambda t: ran.append(float(t)), t)
        return params * x

    ran = []
    if kind == "classifier_free":
        guided, params = guidance.classifier_free(counted, 2.0, NULL, interval), jnp.float64(1.0)
    else:
        guided = guidance.autoguided(counted, counted, 2.0, interval)
        params = guidance.Guided(jnp.float64(1.0), jnp.float64(2.0))
    f = jax.jit(jax.vmap(lambda t, x: guided(params, t, x, 1), (None, 0)))
    f(0.5, jnp.ones((1, 2)))
    jax.effects_barrier()
    assert len(calls) == passes and len(ran) == passes
    f(0.1, jnp.ones((1, 2)))
    jax.effects_barrier()
    # Where t is shared by the batch, the weak one is skipped outside the interval.
    assert len(ran) == passes + (1 if interval != guidance.ALWAYS else passes)


def test_a_flow_map_gives_its_diagonal_and_a_missing_null_label_is_none():
    def net(params, s, t, x, cond=None, *, key=None):
        return params * x * (1.0 + t + 10.0 * (t - s)) + (0.0 if cond is None else cond)

    flow = parameterizations.flow_map(net, parameterizations.mean_velocity_form())
    guided = guidance.classifier_free(flow, 2.0, None)
    expected = 2.0 * X * 1.5 + 2.0 * 0.7
    np.testing.assert_allclose(guided(2.0, 0.5, X, 0.7), expected, rtol=1e-12)
    params = guidance.Guided(2.0, 1.0)
    expected = 3.0 * X * 1.5 + 0.7
    np.testing.assert_allclose(guidance.autoguided(flow, flow, 2.0)(params, 0.5, X, 0.7), expected, rtol=1e-12)


def test_events_and_conditions_may_be_trees():
    def net(params, t, x, cond=None, *, key=None):
        return jax.tree.map(lambda leaf: params * leaf * cond["y"] + cond["label"].astype(leaf.dtype), x)

    x, cond = {"a": X, "b": jnp.float64(1.0)}, {"y": jnp.float64(2.0), "label": 1}
    guided = guidance.classifier_free(net, 3.0, {"y": 0.0, "label": 0})
    np.testing.assert_allclose(guided(1.0, 0.5, x, cond)["a"], 3.0 * (2.0 * X + 1.0))
    np.testing.assert_allclose(guided(1.0, 0.5, x, cond)["b"], 9.0)


def test_refusals():
    for scale, error in (("2", TypeError), (np.nan, ValueError), (jnp.ones(2), ValueError), (True, TypeError)):
        with pytest.raises(error, match="scale"):
            guidance.classifier_free(model, scale, NULL)
        with pytest.raises(error, match="scale"):
            guidance.autoguided(model, weak, scale)
    for interval in ((0.5,), (0.8, 0.2), (-0.1, 0.5), (0.0, 1.1), 0.5):
        with pytest.raises(ValueError, match="interval"):
            guidance.classifier_free(model, 2.0, NULL, interval)
        with pytest.raises(ValueError, match="interval"):
            guidance.autoguided(model, weak, 2.0, interval)
    with pytest.raises(TypeError, match="velocity: expected a Velocity or a FlowMap, got float"):
        guidance.classifier_free(1.0, 2.0, NULL)
    with pytest.raises(TypeError, match="weak: expected a Velocity or a FlowMap, got NoneType"):
        guidance.autoguided(model, None, 2.0)
    guided = guidance.classifier_free(model, 2.0, NULL)
    with pytest.raises(ValueError, match="cond: expected the condition"):
        guided(1.0, 0.5, X)
    with pytest.raises(ValueError, match="cond: expected the pytree structure of null"):
        guided(1.0, 0.5, X, {"label": 1})
    with pytest.raises(TypeError, match=r"params: expected Guided\(strong, weak\), got tuple"):
        guidance.autoguided(model, weak, 2.0)((1.0, 1.0), 0.5, X)
    with pytest.raises(ValueError, match="t: expected a scalar"):
        guidance.classifier_free(model, 2.0, NULL, (0.2, 0.8))(jnp.float64(1.0), jnp.zeros(1), X, 1)


def test_a_guided_velocity_is_a_velocity():
    """It is solved like any other; without guidance the end is the class's own flow."""
    from jflow import solvers

    guided = guidance.classifier_free(model, jnp.float64(1.0), NULL)
    solved = solvers.solve(guided, rtol=1e-8, atol=1e-8)
    assert isinstance(solved, types.FlowMap)
    x1 = jax.jit(lambda x: solved.jump(jnp.float64(1.0), 0.0, 1.0, x, 1))(X)
    np.testing.assert_allclose(x1, CLASS.flow_map.jump(CLASSES[1], 0.0, 1.0, X), rtol=1e-6)
