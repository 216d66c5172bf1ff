"""The suite of a network of images: small configurations, random parameters, and the properties that all of them have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow import flops, nets, testing

F32 = jnp.float32


def random_params(net, x, cond=None, dtype="float32", scale=1.0):
    """Random parameters everywhere, because zero-initialised layers hide faults."""
    rng = np.random.RandomState(0)
    like = jax.eval_shape(net.init, jax.random.key(0), F32(0), F32(0), x, cond)["params"]

    def draw(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 4
        return jnp.asarray(scale * rng.normal(size=leaf.shape) / np.sqrt(fan_in), dtype)

    return jax.tree.map(draw, like)


def image(*shape, dtype="float32"):
    return jnp.asarray(np.random.RandomState(1).normal(size=shape), dtype)


def check_derivatives(net, shape, cond=None):
    """``testing.check_network``: dtypes, finite gradients, forward mode against differences in float64, vmap."""
    x = image(*shape)
    testing.check_network(nets.from_linen(net), random_params(net, x, cond), x, cond)


def check_start_and_shapes(net, shape, cond=None):
    """The initial output is zero, the first gradient is that of the output layer, and jit traces once."""
    x, traces = image(*shape), []

    @jax.jit
    def run(s, t):
        traces.append(1)
        params = net.init(jax.random.key(0), s, t, x, cond)
        value, pull = jax.vjp(lambda p: net.apply(p, s, t, x, cond), params)
        return value, pull(jnp.ones_like(value))[0]["params"], params["params"]

    for s, t in ((0.1, 0.7), (0.3, 0.3)):
        value, gradient, params = run(F32(s), F32(t))
        assert value.shape == x.shape and value.dtype == x.dtype and not np.any(value)
    assert len(traces) == 1
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    moving = {name for name, tree in gradient.items() if any(np.any(leaf) for leaf in jax.tree.leaves(tree))}
    return moving


def check_bfloat16(net, shape, error, cond=None):
    """bfloat16 compute against float32, relative to the largest output; its parameters and embeddings stay in float32."""
    x = image(*shape)
    params = random_params(net, x, cond, scale=0.7)
    run = jax.jit(
        lambda dtype: net.clone(dtype=dtype).apply({"params": params}, F32(0.2), F32(0.7), x, cond), static_argnums=0
    )
    narrow, wide = np.asarray(run(jnp.bfloat16)), np.asarray(run(None))
    found = np.abs(narrow - wide).max() / np.abs(wide).max()
    assert 0 < found < error, found


def check_batch_cost(net, shape, cond=None):
    """Eight samples under vmap cost eight times the matmuls of one, and at most eight times the rest."""
    x = image(*shape)
    params = random_params(net, x, cond)
    one = flops.by_primitive(lambda p, s, t, x: net.apply({"params": p}, s, t, x, cond), params, F32(0), F32(1), x)
    times = jnp.zeros(8, jnp.float32)
    batch = jax.vmap(lambda p, s, t, x: net.apply({"params": p}, s, t, x, cond), (None, 0, 0, 0))
    found = flops.by_primitive(batch, params, times, times, jnp.stack([x] * 8))
    dots = ("dot_general", "conv_general_dilated")
    assert all(found.get(name, 0) == 8 * one.get(name, 0) for name in dots) and found["dot_general"]
    assert sum(found.values()) <= 8 * sum(one.values())


def matmul_flops(net, shape, cond=None):
    """The operations of matmuls in one forward pass."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), F32(0), F32(0), x, cond)
    found = flops.by_primitive(lambda p, s, t, x: net.apply(p, s, t, x, cond), params, F32(0), F32(1), x)
    return found["dot_general"]


def conditioning_flops(trunk, time_features=64, scalars=0):
    return 2 * trunk * (2 * time_features + scalars + trunk)


def check_devices(net, shape):
    """Value and gradient on a batch over eight devices are those on one."""
    x = image(8, *shape)
    params, times = random_params(net, x[0]), jnp.linspace(0.0, 0.9, 8, dtype=jnp.float32)

    @jax.jit
    def run(params, s, x):
        def loss(p):
            out = jax.vmap(lambda s, x: net.apply({"params": p}, s, s + F32(0.1), x))(s, x)
            return jnp.mean(out**2)

        return jax.value_and_grad(loss)(params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    one = run(params, times, x)
    eight = run(jax.device_put(params, whole), *jax.device_put((times, x), rows))
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), one, eight)


def check_decoupled(make, shape):
    """The parameters and the diagonal do not depend on ``decoupled``; off the diagonal the output does."""
    x = image(*shape, dtype="float64")
    plain, *others = (make(decoupled=k) for k in (0, 1, 2))
    params = random_params(plain, x, dtype="float64")
    for net in others:
        assert jax.eval_shape(net.init, jax.random.key(0), F32(0), F32(0), x) == jax.eval_shape(
            plain.init, jax.random.key(0), F32(0), F32(0), x
        )

    def run(net):
        f = jax.jit(jax.vmap(lambda s, t: net.apply({"params": params}, s, t, x)))
        return f(jnp.asarray([0.3, 0.3, 0.7]), jnp.asarray([0.3, 0.8, 0.7]))

    expected, *found = map(run, (plain, *others))
    for out in found:
        np.testing.assert_allclose(out[::2], expected[::2], rtol=1e-12, atol=1e-13)
        assert np.abs(out[1] - expected[1]).max() > 1e-5
        assert np.abs(out[1] - out[0]).max() > 1e-5
    assert np.abs(found[0][1] - found[1][1]).max() > 1e-5


def check_conditions(make, shape):
    """Labels, the null label, and each floating-point condition change the output; names find their leaves."""
    net, x = make(num_classes=3, cond_features={"w": 1, "interval": 2}), image(*shape)
    assert net.null_label == 3 and make().null_label is None
    cond = {"label": jnp.int32(1), "w": F32(1.5), "interval": jnp.asarray([0.2, 0.8], jnp.float32)}
    params = random_params(net, x, cond)
    run = jax.jit(lambda cond: net.apply({"params": params}, F32(0.2), F32(0.7), x, cond))
    changes = [{}, {"label": jnp.int32(3)}, {"w": F32(2.0)}, {"interval": jnp.asarray([0.2, 0.9], jnp.float32)}]
    outs = [np.asarray(run({**cond, **change})) for change in changes]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(outs) for b in outs[:i])
    without = {name: value for name, value in cond.items() if name != "label"}
    np.testing.assert_allclose(run(without), outs[1], rtol=1e-4, atol=1e-6)


def check_same_with(net, other, shape):
    """Value and gradient of two configurations that share their parameters (remat, unrolled loops) agree."""
    x = image(*shape, dtype="float64")
    params = random_params(net, x, dtype="float64")

    def run(net):
        loss = lambda p: jnp.sum(net.apply({"params": p}, 0.2, 0.7, x) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), run(net), run(other))
