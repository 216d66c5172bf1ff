"""The perceptrons of the registry, then tests of one of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import flops as jflow_flops
from jflow import nets, parameterizations, testing
from jflow.nets import MLP

NETS = {name: nets.NETS[name] for name in ("mlp", "mlp_plain")}
SMALL = {"features": 8, "depth": 2, "time_features": 4, "trunk": 4}
VARIANTS = {
    "silu-rms-octaves": {"activation": "silu", "norm": "rms", "points": "octaves", "point_frequencies": 2},
    "layer-fourier": {"norm": "layer", "residual": False, "points": "fourier", "times": "raw"},
    "concat": {"conditioning": "concat"},
    "decoupled": {"decoupled": 1},
}
CASES = {name: (maker, {}) for name, maker in NETS.items()} | {
    f"mlp-{name}": (MLP, fields) for name, fields in VARIANTS.items()
}
EDGES = jnp.asarray([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.4, 0.4), (0.2, 0.7)])


def random_params(net, *args):
    """Random parameters everywhere, because the initialisers are slow to compile."""
    rng = np.random.RandomState(0)
    like = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0]), leaf.dtype), like
    )


def build(name, shape=(2,), dtype="float64", **fields):
    """(apply, params, x) of a case."""
    maker, more = CASES[name]
    net = maker(**{**SMALL, "param_dtype": jnp.dtype(dtype), **more, **fields})
    x, time = jnp.asarray(np.random.RandomState(1).normal(size=shape), dtype), jnp.asarray(0.5, dtype)

    def apply(params, s, t, x, cond=None):
        return net.apply({"params": params}, s, t, x, cond)

    return apply, random_params(net, time, time, x), x


# The plain network concatenates its conditions; the decoupled one has tests of its own below.
@pytest.mark.representatives("mlp-silu-rms-octaves")
@pytest.mark.parametrize("name", CASES)
def test_derivatives_dtypes_edges_and_vmap(name):
    maker, more = CASES[name]
    net, x = maker(**{**SMALL, "param_dtype": jnp.float64, **more}), np.random.RandomState(1).normal(size=2)
    testing.check_network(nets.from_linen(net), random_params(net, 0.5, 0.5, x), x)


@pytest.mark.parametrize("name", NETS)
def test_jit_agrees_and_traces_once(name):
    apply, params, x = build(name)
    traces = []

    def counted(p, s, t, x):
        traces.append(1)
        return apply(p, s, t, x)

    f = jax.jit(counted)
    outs = [f(params, float(s), float(t), x) for s, t in EDGES]
    np.testing.assert_allclose(outs[-1], apply(params, 0.2, 0.7, x), rtol=1e-10, atol=1e-12)
    assert len(traces) == 1


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("shape", "dtype"), [((), "float16"), ((3,), "bfloat16"), ((2, 3, 1), "float32")])
def test_event_shapes_and_dtypes(name, shape, dtype):
    apply, params, x = build(name, shape, "float32")
    f = jax.jit(lambda x: apply(params, jnp.float32(0.2), jnp.float32(0.7), x))
    out, wide = f(x.astype(dtype)), f(x)
    assert out.shape == shape and out.dtype == jnp.dtype(dtype)
    scale = max(np.abs(wide).max(), 1.0)
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=20 * float(jnp.finfo(dtype).eps) * scale)


@pytest.mark.parametrize("name", NETS)
def test_starts_at_zero_and_learns_everywhere(name):
    maker, _ = CASES[name]
    net, x = maker(**SMALL, param_dtype=jnp.float64), jnp.asarray([0.3, -1.2])
    params = jax.jit(net.init)(jax.random.key(0), 0.5, 0.5, x)
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum((net.apply(p, 0.2, 0.7, x) - jnp.asarray([1.0, 2.0])) ** 2))
    )
    value, first = value_and_grad(params)
    assert value == 5.0  # the output is zero
    moving = {name for name, layer in first["params"].items() if np.abs(layer["bias"]).max() > 0}
    assert moving == {"output"}
    _, second = value_and_grad(jax.tree.map(lambda p, g: p - 0.1 * g, params, first))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(second))
    params = jax.eval_shape(maker(**SMALL).init, jax.random.key(0), 0.5, 0.5, x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", NETS)
def test_two_times_are_told_apart(name):
    apply, params, x = build(name)
    f = jax.jit(lambda s, t: apply(params, s, t, x))
    a, b, c = f(0.2, 0.7), f(0.7, 0.2), f(0.2, 0.2)
    assert min(np.abs(a - b).max(), np.abs(a - c).max(), np.abs(b - c).max()) > 1e-3


@pytest.mark.parametrize(("name", "layer"), [("mlp", "trunk"), ("mlp_plain", "input")])
def test_time_embeddings_are_float32_under_bfloat16(name, layer):
    maker, _ = CASES[name]
    net = maker(**SMALL, dtype=jnp.bfloat16)
    x = jnp.ones(2, jnp.bfloat16)
    params = random_params(net, jnp.float32(0.5), jnp.float32(0.5), x)

    @jax.jit
    def seen(t):
        _, state = net.apply({"params": params}, jnp.float32(0.0), t, x, capture_intermediates=True)
        return state["intermediates"]

    near = jnp.float32(0.5 + 2.0**-11)
    assert near.astype(jnp.bfloat16) == 0.5
    a, b = seen(jnp.float32(0.5)), seen(near)
    assert a[layer]["__call__"][0].dtype == jnp.float32
    assert np.abs(a[layer]["__call__"][0] - b[layer]["__call__"][0]).max() > 0
    assert a["hidden_0"]["__call__"][0].dtype == jnp.bfloat16
    assert a["__call__"][0].dtype == jnp.bfloat16


def test_formula_of_plain():
    apply, params, x = build("mlp_plain")
    h = jnp.concatenate([x, jnp.asarray([0.2, 0.7])])
    for layer in ("input", "hidden_0"):
        h = jax.nn.gelu(h @ params[layer]["kernel"] + params[layer]["bias"])
    expected = h @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(apply(params, 0.2, 0.7, x), expected, rtol=1e-12)
    assert sorted(params) == ["hidden_0", "input", "output"]


def test_formula_of_default():
    apply, params, x = build("mlp")

    def dense(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"]

    def waves(t):
        return [np.sin(2 * np.pi * f * t), np.cos(2 * np.pi * f * t)]

    f = 0.125 * (2.0 / 0.125) ** np.arange(2)
    c = jax.nn.gelu(dense("trunk", jnp.concatenate([*waves(0.2), *waves(0.5)])))

    def g(i, h):
        a, d = jnp.split(dense(f"film_{i}", c), 2)
        return jax.nn.gelu((1 + a) * h + d)

    h = dense("input", x)
    h = h + dense("hidden_0", g(0, h))
    np.testing.assert_allclose(apply(params, 0.2, 0.7, x), dense("output", g(1, h)), rtol=1e-10)


def test_formula_of_decoupled():
    apply, params, x = build("mlp-decoupled", depth=3, decoupled=2)

    def dense(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"]

    def waves(t):
        return [f(2 * np.pi * w * t) for f in (np.sin, np.cos) for w in 0.125 * (2.0 / 0.125) ** np.arange(2)]

    def g(i, time, h):
        c = jax.nn.gelu(dense("trunk", np.array([*waves(time), *waves(0.0)])))
        a, d = jnp.split(dense(f"film_{i}", c), 2)
        return jax.nn.gelu((1 + a) * h + d)

    h = dense("input", x)
    for i, time in ((0, 0.2), (1, 0.7)):
        h = h + dense(f"hidden_{i}", g(i, time, h))
    np.testing.assert_allclose(apply(params, 0.2, 0.7, x), dense("output", g(2, 0.7, h)), rtol=1e-10)


@pytest.mark.representatives("raw")
@pytest.mark.parametrize("fields", [{}, {"times": "raw", "norm": "rms", "num_classes": 3}], ids=["default", "raw"])
def test_decoupled_a_velocity_network_loads_unchanged_and_is_the_diagonal(fields):
    """Whatever ``decoupled`` it was trained with: parameters and diagonal are the same, off the diagonal it is a map."""
    x, times = jnp.asarray([0.3, -1.2]), jnp.asarray([0.0, 0.35, 1.0])
    modules = [MLP(**{**SMALL, **fields, "depth": 3, "decoupled": k}) for k in range(3)]
    like = [jax.eval_shape(module.init, jax.random.key(0), 0.0, 0.0, x) for module in modules]
    assert like[0] == like[1] == like[2]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_params(modules[0], 0.0, 0.0, x))
    plain, *decoupled = (
        parameterizations.flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
        for module in modules
    )
    expected = jax.jit(jax.vmap(lambda t: plain.velocity(params, t, x)))(times)
    assert np.abs(expected).min() > 1e-3
    maps = []
    for flow_map in decoupled:
        velocity = jax.jit(jax.vmap(lambda t, f=flow_map: f.velocity(params, t, x)))
        np.testing.assert_allclose(velocity(times), expected, rtol=1e-14, atol=1e-15)
        along = lambda t, f=flow_map: jax.jvp(lambda t: f.mean_velocity(params, 0.2, t, x), (t,), (1.0,))  # noqa: E731
        v, slope = jax.jit(along)(0.7)
        assert np.abs(v[None] - velocity(jnp.array([0.2, 0.7]))).max(axis=1).min() > 1e-3
        assert np.abs(slope).max() > 1e-3
        maps.append(v)
    assert np.abs(maps[0] - maps[1]).max() > 1e-3


@pytest.mark.parametrize("name", NETS)
def test_labels(name):
    apply, params, x = build(name, num_classes=3)
    run = jax.jit(lambda cond: apply(params, 0.2, 0.7, x, cond))
    outs = [run(jnp.int32(c)) for c in range(4)]
    for i in range(4):
        for j in range(i):
            assert np.abs(outs[i] - outs[j]).max() > 1e-6
    np.testing.assert_allclose(run(None), outs[3], rtol=1e-12)
    np.testing.assert_allclose(run({"label": jnp.uint8(1)}), outs[1], rtol=1e-12)
    for outside in (-1, 4):
        assert np.all(np.isnan(run(jnp.int32(outside))))
        with pytest.raises(ValueError, match=f"label from 0 to 3 .*got {outside}"):
            apply(params, 0.2, 0.7, x, outside)
    vmapped = jax.jit(jax.vmap(lambda c: apply(params, 0.2, 0.7, x, c)))(jnp.arange(4))
    np.testing.assert_allclose(vmapped, jnp.stack(outs), rtol=1e-10)


def test_conditions_that_jax_would_cut_are_refused():
    net = MLP(**SMALL, num_classes=300, cond_features=1)
    x, times = jnp.ones(2, jnp.float32), (jnp.float32(0.2), jnp.float32(0.7))
    with jax.enable_x64(False):
        params = random_params(net, *times, x, 0.5)
        run = lambda label, y: net.apply({"params": params}, *times, x, {"label": label, "y": y})  # noqa: E731
        # 300 classes and a null: their number wraps around in uint8.
        np.testing.assert_array_equal(run(jnp.uint8(7), 0.5), run(7, np.float64(0.5)))
        assert np.abs(run(7, 0.5) - run(8, 0.5)).max() > 1e-6
        with pytest.raises(ValueError, match=r"cond\['label'\]: expected values that fit int32"):
            run(np.int64(2**32 + 1), 0.5)
        with pytest.raises(ValueError, match=r"cond\['y'\]: expected values that fit float32.* got 1e\+40"):
            run(1, np.float64(1e40))


def test_floating_conditions():
    net = MLP(**SMALL, zero_init=False, cond_features=3, num_classes=2)
    x, cond = jnp.ones(2), {"y": jnp.asarray([0.1, 0.2]), "scale": jnp.asarray(1.5), "label": 1}
    params = random_params(net, 0.2, 0.7, x, cond)
    f = jax.jit(lambda cond: net.apply({"params": params}, 0.2, 0.7, x, cond))
    for other in ({"scale": jnp.asarray(1.6)}, {"y": jnp.asarray([0.2, 0.1])}, {"label": 0}):
        assert np.abs(f(cond) - f({**cond, **other})).max() > 1e-5
    with pytest.raises(ValueError, match=r"cond: expected 3 floating-point numbers \(cond_features\), got 0"):
        net.apply({"params": params}, 0.2, 0.7, x)
    with pytest.raises(ValueError, match="cond: expected at most one label, got 2"):
        net.apply({"params": params}, 0.2, 0.7, x, {**cond, "other": 0})


def flops(net, transform=lambda f: f):
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.float32(0), jnp.float32(0), jnp.zeros(2, jnp.float32))
    f = jax.vmap(transform(net.apply), (None, 0, 0, 0))
    time, x = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((64, 2), jnp.float32)
    return jflow_flops.compiled(f, params, time, time, x) / 64


def test_cost():
    plain, default = flops(MLP.plain()), flops(MLP())
    matmuls = 2 * (4 * 512 + 4 * 512**2 + 512 * 2)
    assert matmuls <= plain < 1.05 * matmuls
    # The scales and shifts of 5 layers from a trunk of 64: 5 x 64 x 1024 beside 4 x 512 x 512.
    assert 1.25 < default / plain < 1.40
    assert flops(MLP(decoupled=2)) < 1.01 * default  # another pass of the trunk

    def jvp(f):
        return lambda p, s, t, x: jax.jvp(lambda s, t, x: f(p, s, t, x), (s, t, x), (s, t, x))

    assert flops(MLP(), jvp) < 2.1 * default


def test_refusals():
    with pytest.raises(ValueError, match="activation: expected one of 'gelu', 'silu', got 'relu'"):
        MLP(activation="relu")
    with pytest.raises(ValueError, match="features: expected a whole number of at least 1, got 0"):
        MLP(features=0)
    with pytest.raises(ValueError, match="norm"):
        MLP(norm="batch")
    with pytest.raises(ValueError, match="decoupled: expected a whole number of at least 0 and at most 4, got 5"):
        MLP(decoupled=5)
    with pytest.raises(ValueError, match="decoupled: expected 0 with conditioning='concat', got 1"):
        MLP.plain(decoupled=1)
    apply, params, x = build("mlp")
    with pytest.raises(ValueError, match=r"s: expected a scalar .*jax.vmap"):
        apply(params, jnp.zeros(2), 0.1, x)
    with pytest.raises(ValueError, match=r"t: expected a scalar"):
        apply(params, 0.1, jnp.zeros((1,)), x)
    with pytest.raises(TypeError, match="x: expected floating-point arrays, got dtype int"):
        apply(params, 0.1, 0.2, jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match="x: expected one floating-point array, got tuple"):
        apply(params, 0.1, 0.2, (x, x))
    with pytest.raises(ValueError, match=r"cond: expected no label \(num_classes=0\)"):
        apply(params, 0.1, 0.2, x, 1)
    with pytest.raises(ValueError, match="got 2"):
        apply(params, 0.1, 0.2, x, jnp.ones(2))


def test_damped_octaves_vanish_where_noise_washes_them_out():
    """Octave k carries exp(-(0.3 pi 2^k (1 - s))^2 / 2): all of it at the data, little at the noise, x itself untouched."""
    module = MLP(points="octaves", point_frequencies=2, point_damping=0.3)
    x = jnp.array([0.2, -0.7])
    for s in (0.0, 0.6, 1.0):
        got = module._points(s, x)
        np.testing.assert_allclose(got[:2], x)
        for k in range(2):
            factor = np.exp(-0.5 * (0.3 * np.pi * 2**k * (1 - s)) ** 2)
            np.testing.assert_allclose(got[2 + 2 * k : 4 + 2 * k], factor * np.sin(2**k * np.pi * x), rtol=1e-12)
            np.testing.assert_allclose(got[6 + 2 * k : 8 + 2 * k], factor * np.cos(2**k * np.pi * x), rtol=1e-12)
