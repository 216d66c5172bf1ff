"""Guidance against its formulas: class-conditional Gaussians, whose unconditional velocity is a mixture's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import conditions, guidance, interpolants, nets, oracles, parameterizations, types

PATH = interpolants.linear()
MEANS, VARIANCES = np.array([[1.0, -0.5], [-2.0, 0.3]]), np.array([[0.3, 0.6], [0.5, 0.2]])
CLASSES = [oracles.gaussian_params(m, v) for m, v in zip(MEANS, VARIANCES, strict=True)]
BOTH = oracles.mixture_params(np.array([0.4, 0.6]), MEANS, VARIANCES)
CLASS, EITHER = oracles.gaussian(PATH), oracles.mixture(PATH)
NULL, X = 2, jnp.array([0.4, -0.9])
GUIDES = ["classifier_free", "autoguided"]


@jax.jit  # so that an eager call is one program
def model(params, t, x, cond=None, *, key=None):
    """The exact conditional velocity of classes 0 and 1, and the unconditional one of the null label; times params."""
    velocities = [*(CLASS.velocity(p, t, x) for p in CLASSES), EITHER.velocity(BOTH, t, x)]
    return params * jnp.stack(velocities)[NULL if cond is None else cond]


@jax.jit
def weak(params, t, x, cond=None, *, key=None):
    """A model of its own, less sure of the class."""
    return 0.5 * (model(params, t, x, cond) + EITHER.velocity(BOTH, t, x))


def waves(params, t, x, cond=None, *, key=None):
    """A smooth model that costs less than the exact velocities."""
    return params * jnp.sin(x * (1.0 + t) + jnp.asarray(cond, x.dtype))


def make(kind, scale, model=model, weak=weak, **kwargs):
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
    """If the scale is known to be 1, nothing else is evaluated; if it is traced, the correction is zero."""
    guided, params, strong, _ = make(kind, 1, interval=interval)
    np.testing.assert_array_equal(guided(params, 0.35, X, 1), strong(0.35, X))

    def traced(scale):
        guided, params, strong, _ = make(kind, scale, interval=interval)
        return guided(params, 0.35, X, 1), strong(0.35, X)

    np.testing.assert_array_equal(*jax.jit(traced)(1.0))


@pytest.mark.representatives("classifier_free")
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
    # Whole numbers are accepted as times.
    np.testing.assert_allclose(guided(params, 1, X, 1), strong(1.0, X), rtol=1e-12)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("interval", [guidance.ALWAYS, (0.2, 0.8)])
def test_gradients_are_those_of_the_formula(kind, interval):
    guided, params, *_ = make(kind, 2.0, waves, lambda *args, key=None: waves(*args) ** 2, interval=interval)

    def loss(params, t, x):
        value, tangent = jax.jvp(lambda t, x: guided(params, t, x, 1), (t, x), (jnp.ones_like(t), x))
        return jnp.sum(value**2) + jnp.sum(tangent**2)

    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), (None, 0, None)))
    at = gradient(params, jnp.array([0.0, 0.1, 0.5, 1.0]), X)
    assert all(np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(at))
    h, direction = 1e-5, jnp.array([0.3, -0.2])

    @jax.jit
    def slope(t):
        _, tangent = jax.jvp(lambda x: guided(params, t, x, 1), (X,), (direction,))
        return tangent, [guided(params, t, X + sign * h * direction, 1) for sign in (1, -1)]

    tangent, ends = slope(0.5)
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
    # If the batch shares t, the weak velocity is not evaluated outside the interval.
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


def echo(params, t, x, cond=None, *, key=None):
    """The condition itself, so that the guided value is null + w (cond - null)."""
    return jnp.asarray(cond).astype(jnp.float64) * jnp.ones_like(x)


LABELS = [
    (jnp.uint8(7), 256),
    (np.uint8(200), 255),
    (np.uint8(200), jnp.int16(-3)),
    (jnp.int8(-7), 200),
    (jnp.int8(7), jnp.uint8(200)),
    (jnp.uint32(2**32 - 1), -1),
    (7, np.int64(2**40)),
    (jnp.bool_(True), False),
]
# jax promotes these with no other dtype.
NARROW = [
    (jnp.asarray(3, jnp.int4), 200),
    (jnp.uint8(200), jnp.asarray(-3, jnp.int4)),
    (jnp.asarray(-3, jnp.int4), jnp.asarray(15, jnp.uint4)),
    (jnp.asarray(3, jnp.int4), jnp.asarray(1, jnp.int2)),
    (jnp.asarray(0.5, jnp.float8_e4m3fn), jnp.float32(1e-3)),
    (jnp.asarray(0.5, jnp.float8_e4m3fn), jnp.asarray(2.0**-15, jnp.float8_e5m2)),
    (jnp.float16(2049), jnp.asarray(0.5, jnp.float8_e5m2)),
]
FLOATS = [
    (jnp.float16(7), 1e6),
    (jnp.float16(7), np.float32(7e4)),
    (jnp.bfloat16(7), np.float32(257.0)),
    (jnp.bfloat16(256), jnp.float16(2049)),
    (jnp.float32(3), np.float64(1e-60)),
]


PAIRS = LABELS + FLOATS + NARROW


@functools.cache
def compiled(interval):
    """The guided values of all pairs, in one program each: with the nulls known, and with both traced."""
    conds, nulls = zip(*PAIRS, strict=True)

    def values(conds, nulls):
        guided = (guidance.classifier_free(echo, 2.0, null, interval) for null in nulls)
        return [f(None, 0.5, jnp.ones(2), cond) for f, cond in zip(guided, conds, strict=True)]

    return jax.jit(lambda conds: values(conds, nulls))(conds), jax.jit(values)(conds, nulls)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(PAIRS)), ids=lambda case: repr(PAIRS[case]))
@pytest.mark.parametrize("interval", [guidance.ALWAYS, (0.2, 0.8)])
def test_no_dtype_changes_the_condition_or_the_null(case, interval):
    """Eager, jitted with the null known, and with both traced."""
    cond, null = PAIRS[case]
    guided = guidance.classifier_free(echo, 2.0, null, interval)
    expected = np.full(2, 2.0 * float(cond) - float(null))
    for found in (guided(None, 0.5, jnp.ones(2), cond), *(values[case] for values in compiled(interval))):
        np.testing.assert_array_equal(found, expected)


def test_a_null_that_fits_keeps_the_dtype_of_the_condition():
    seen = []

    def net(params, t, x, cond=None, *, key=None):
        seen.append(cond.dtype)
        return x

    for cond, null, dtype in [
        (jnp.uint8(7), 255, "uint8"),
        (jnp.uint8(7), 256, "int64"),
        (jnp.uint8(7), jnp.int16(256), "int16"),
        (jnp.bfloat16(0.5), 0.1, "bfloat16"),
        (jnp.float32(0.5), np.zeros(()), "float32"),
        (jnp.float32(0.5), 0, "float32"),
        (jnp.float16(0.5), 7e4, "float64"),
        (jnp.asarray(3, jnp.int4), 7, "int4"),
        (jnp.asarray(3, jnp.int4), jnp.uint8(200), "int16"),
        (jnp.asarray(0.5, jnp.float8_e5m2), 0.5, "float8_e5m2"),
    ]:
        for wrap in (lambda f: f, jax.jit):
            seen.clear()
            wrap(guidance.classifier_free(net, 2.0, null))(None, 0.5, X, cond)
            assert set(seen) == {jnp.dtype(dtype)}, (cond, null)


@pytest.mark.parametrize(
    ("cond", "null"),
    [
        (7, 256.0),
        (jnp.uint8(7), jnp.float32(0)),
        (True, 2),
        (jnp.float32(3), True),
        (jnp.float16(3), 2049),
        (jnp.uint64(7), jnp.int64(-1)),
    ],
    ids=repr,
)
def test_kinds_that_no_dtype_holds_are_refused(cond, null):
    guided = guidance.classifier_free(echo, 2.0, {"y": null})
    for call in (guided, jax.jit(guided)):
        with pytest.raises(TypeError, match=r"null\['y'\]: expected .*kind of cond\['y'\]"):
            call(None, 0.5, X, {"y": cond})


def test_a_traced_null_is_promoted_by_its_dtype():
    seen = []

    def net(params, t, x, cond=None, *, key=None):
        seen.append(cond.dtype)
        return x

    traced = jax.jit(lambda null, cond: guidance.classifier_free(net, 2.0, null)(None, 0.5, X, cond))
    traced(jnp.int32(1), jnp.uint8(7))
    traced(jnp.uint8(1), jnp.uint8(7))
    assert seen == [jnp.int32, jnp.uint8]
    with pytest.raises(TypeError, match=r"null: expected a null condition of the kind of cond, float64, .*got int32"):
        traced(jnp.int32(0), jnp.float64(0.5))


def test_bool_labels_have_no_integer_null():
    with pytest.raises(TypeError, match=r"null: expected .*cond, bool, .*got int64 2; expected integer labels"):
        guidance.classifier_free(echo, 2.0, 2)(None, 0.5, X, True)


def test_values_that_jax_would_cut_are_refused():
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"null: expected values that fit int32.* got 4294967297"):
            guidance.classifier_free(echo, 2.0, np.int64(2**32 + 1))
        with pytest.raises(ValueError, match=r"cond: expected values that fit int32.* got 4294967297"):
            guidance.classifier_free(echo, 2.0, 3)(None, 0.5, jnp.ones(1), np.int64(2**32 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("interval", [guidance.ALWAYS, (0.2, 0.8)])
def test_labels_outside_the_classes_are_refused_by_the_network_guided_or_not(interval):
    """As uint8, int32 or a Python number; in the condition or in the null; traced, they give NaN."""
    net = nets.MLP(features=4, depth=2, trunk=4, num_classes=3, param_dtype=jnp.float64)
    params = jax.jit(net.init)(jax.random.key(0), 0.5, 0.5, X)["params"]
    flow = parameterizations.flow_map(nets.from_linen(net), parameterizations.mean_velocity_form())
    guided = guidance.classifier_free(flow, 2.0, 3, interval)
    labels = (4, jnp.uint8(255), -1, jnp.int8(-128), np.int32(2**30))
    for call in (flow.velocity, guided):
        traced = jax.jit(lambda p, labels, call=call: [call(p, 0.5, X, label) for label in labels])(params, labels)
        assert all(np.all(np.isnan(found)) for found in traced)
    for label in labels:
        for call in (flow.velocity, guided):
            with pytest.raises(ValueError, match=f"cond: expected a label from 0 to 3 .*got {int(label)}"):
                call(params, 0.5, X, label)
        with pytest.raises(ValueError, match=f"from 0 to 3 .*got {int(label)}"):
            guidance.classifier_free(flow, 2.0, label, interval)(params, 0.5, X, 1)
    for label in (0, jnp.uint8(3)):
        assert np.all(np.isfinite(guided(params, 0.5, X, label)))


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


def affine(params, s, t, x, cond=None, *, key=None):
    """A smooth map of two times that depends on the condition."""
    c = jnp.asarray(cond, x.dtype)
    return params * (jnp.sin(x + c) + (t - s) * jnp.cos(2.0 * x * c))


MAP = types.FlowMap(affine, null=NULL)


def test_the_null_condition_is_the_models():
    ours = guidance.classifier_free(MAP, 2.0)(jnp.float64(1.3), 0.3, X, 1)
    np.testing.assert_array_equal(ours, guidance.classifier_free(MAP, 2.0, NULL)(jnp.float64(1.3), 0.3, X, 1))
    for make in (guidance.classifier_free, guidance.extrapolated_jumps):
        with pytest.raises(ValueError, match="null: expected the condition that means no condition"):
            make(types.FlowMap(affine), 2.0)


@pytest.mark.parametrize("interval", [None, (0.2, 0.6)])
def test_scales_of_samples_are_read_from_their_conditions(interval):
    """Each row as with a scale and an interval of its own."""
    params, scales, labels = jnp.float64(1.3), np.array([0.0, 1.0, 3.5]), np.array([0, 1, 0])
    rows = conditions.Scaled(labels, scales, None if interval is None else tuple(np.full(3, end) for end in interval))
    for make in (guidance.classifier_free, guidance.extrapolated_jumps):
        for s, t in ((0.1, 0.1), (0.4, 0.4), (0.4, 0.9)):

            def at(guided, cond, s=s, t=t):
                if isinstance(guided, types.FlowMap):
                    return guided.mean_velocity(params, s, t, X, cond)
                return guided(params, t, X, cond)

            got = jax.jit(jax.vmap(lambda cond, make=make, at=at: at(make(MAP), cond)))(rows)
            for row, w, label in zip(got, scales, labels, strict=True):
                one = make(MAP, float(w), interval=interval or guidance.ALWAYS)
                np.testing.assert_allclose(row, at(one, int(label)), rtol=1e-12)


def test_extrapolated_jumps_are_exact_on_the_diagonal_only():
    params, w = jnp.float64(1.3), 2.5
    jumps = guidance.extrapolated_jumps(MAP, w, interval=(0.2, 0.6))
    velocity = guidance.classifier_free(MAP, w, interval=(0.2, 0.6))
    for t in (0.1, 0.2, 0.4, 0.7):
        np.testing.assert_allclose(jumps.mean_velocity(params, t, t, X, 1), velocity(params, t, X, 1), rtol=1e-13)
        np.testing.assert_allclose(jumps.velocity(params, t, X, 1), velocity(params, t, X, 1), rtol=1e-13)
    # Off it, the extrapolation of both jumps, by the share of the jump within the interval: 0.2 of 0.5 here.
    strong, weak = (affine(params, 0.4, 0.9, X, c) for c in (1, NULL))
    share = 0.4
    expected = strong + (w - 1.0) * share * (strong - weak)
    np.testing.assert_allclose(jumps.mean_velocity(params, 0.4, 0.9, X, 1), expected, rtol=1e-13)
    np.testing.assert_allclose(jumps.jump(params, 0.4, 0.9, X, 1), X + 0.5 * expected, rtol=1e-13)


def test_conditions_without_a_scale_are_refused():
    with pytest.raises(TypeError, match=r"cond: expected a conditions\.Scaled"):
        guidance.classifier_free(MAP)(1.0, 0.3, X, 1)
    with pytest.raises(ValueError, match="interval: expected none without a scale"):
        guidance.classifier_free(MAP, interval=(0.1, 0.2))
    with pytest.raises(TypeError, match="flow_map: expected a FlowMap"):
        guidance.extrapolated_jumps(affine, 2.0, NULL)


@pytest.mark.parametrize("kind", GUIDES)
def test_both_models_draw_from_the_same_key_over_a_batch_of_times(kind, key):
    """As dropout does; under a vmap over t the interval selects between operands."""

    def noisy(params, t, x, cond=None, *, key=None):
        return params * x + jax.random.normal(jax.random.clone(key), x.shape)

    guided, params = guidance.classifier_free(noisy, 3.0, NULL, (0.2, 0.8)), 1.0
    if kind == "autoguided":
        guided, params = guidance.autoguided(noisy, noisy, 3.0, (0.2, 0.8)), guidance.Guided(1.0, 1.0)
    keys = jax.random.split(key, 3)
    got = jax.jit(jax.vmap(lambda t, k: guided(params, t, X, 1, key=k)))(jnp.array([0.1, 0.5, 0.9]), keys)
    # Both draw the same numbers, so their difference is zero.
    expected = X[None] + jax.vmap(lambda k: jax.random.normal(k, X.shape))(jax.random.clone(keys))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(("scale", "interval", "error", "message"), [
    (None, None, TypeError, r"cond\.scale: expected a number, got NoneType"),
    ("2", None, TypeError, r"cond\.scale: expected a number, got str"),
    (np.nan, None, ValueError, r"cond\.scale: expected a number"),
    (2.0, 0.5, TypeError, r"cond\.interval: expected a pair \(first, last\) of times or None, got 0\.5"),
    (2.0, (0.9, 0.1), ValueError, r"cond\.interval: last: expected a number in \[0\.9, 1\], got 0\.1"),
    (2.0, (np.zeros(2), 1.0), ValueError, r"cond\.interval: first: expected a scalar"),
])  # fmt: skip
def test_the_numbers_of_a_condition_are_checked(scale, interval, error, message):
    with pytest.raises(error, match=message):
        guidance.classifier_free(MAP)(1.0, 0.3, X, conditions.Scaled(1, scale, interval))


def test_extrapolated_jumps_check_the_condition_eagerly_as_under_jit():
    with pytest.raises(ValueError, match="cond: expected the pytree structure of null"):
        guidance.extrapolated_jumps(MAP, 2.0).jump(jnp.float64(1.3), 0.2, 0.6, X, {"label": 1})
