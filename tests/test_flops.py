"""Counts against XLA's on programs without loops, and against the program written out with loops."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jflow import flops, nets

LAYERS, ROWS, SIZE = 6, 32, 64
WEIGHTS = [jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)] * LAYERS
X = jax.ShapeDtypeStruct((ROWS, SIZE), jnp.float32)
MATMUL = 2 * ROWS * SIZE**2


def xla(function, *args):
    """XLA's count of the program before optimisation."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def layer(h, w):
    return jnp.tanh(h @ w) + 2 * h


def written_out(step):
    def run(weights, x):
        for w in weights:
            x = step(x, w)
        return jnp.sum(x)

    return run


def scanned(step):
    return lambda weights, x: jnp.sum(jax.lax.scan(lambda h, w: (step(h, w), None), x, jnp.stack(weights))[0])


def tangent(f):
    return lambda w, x: jax.jvp(f, (w, x), (w, x))


def by_both(f):
    # With the value: written out, the last layer would not be evaluated for the gradient alone.
    return jax.value_and_grad(f, (0, 1))


TRANSFORMS = {
    "value": lambda f: f,
    "jvp": tangent,
    "grad": by_both,
    "grad of jvp": lambda f: by_both(lambda w, x: sum(tangent(f)(w, x))),
    "vmap": lambda f: jax.vmap(lambda w, x: f(w, x[None]), (None, 0)),
}


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_scan_counts_as_the_program_written_out(name, remat):
    step, transform = jax.checkpoint(layer) if remat else layer, TRANSFORMS[name]
    expected = xla(transform(written_out(step)), WEIGHTS, X)
    looped = transform(scanned(step))
    assert flops.count(looped, WEIGHTS, X) == pytest.approx(expected, rel=0.01)
    # XLA counts one layer.
    assert xla(looped, WEIGHTS, X) < 1.2 / LAYERS * expected


NET = nets.MLP(features=16, depth=2, norm="layer", num_classes=3)


def mlp(params, s, x):
    return jax.vmap(NET.apply, (None, 0, 0, 0))(params, s, s, x)


def convolution(stride, padding, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")

    def run(x, k):
        return jax.lax.conv_general_dilated(
            x, k, stride, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    return run


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


MLP_PARAMS = jax.eval_shape(NET.init, jax.random.key(0), 0.0, 0.0, jnp.zeros(2, jnp.float32))
IMAGE, KERNEL = floats(4, 9, 7, 3), floats(3, 3, 3, 5)
PROGRAMS = {
    "mlp": (mlp, (MLP_PARAMS, floats(32), floats(32, 2))),
    "convolution": (convolution((2, 2), "SAME"), (IMAGE, KERNEL)),
    "gradient of a convolution": (
        jax.grad(lambda *args: jnp.sum(convolution((1, 2), "VALID")(*args) ** 2), (0, 1)),
        (IMAGE, KERNEL),
    ),
    "softmax": (jax.nn.softmax, (floats(100, 50),)),
    "attention": (lambda x: jax.nn.dot_product_attention(x, x, x, implementation="xla"), (floats(64, 4, 8),)),
    "powers and a conditional": (
        lambda x: jax.lax.cond(x[0] > 0, lambda x: x**5 / x**-2, lambda x: x, x),
        (floats(100),),
    ),
    "scatter, sort, reductions": (
        lambda x, i: jnp.sort(x).at[i].add(1.0, mode="promise_in_bounds").max() + jnp.prod(x),
        (floats(1000), jax.ShapeDtypeStruct((500,), jnp.uint32)),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_without_loops_counts_as_xla_counts(name):
    function, args = PROGRAMS[name]
    assert flops.count(function, *args) == pytest.approx(xla(function, *args), rel=0.01)


def test_by_primitive_splits_the_count():
    found = flops.by_primitive(scanned(layer), WEIGHTS, X)
    assert found["dot_general"] == LAYERS * MATMUL
    assert sum(found.values()) == flops.count(scanned(layer), WEIGHTS, X)


def test_nested_loops_multiply():
    def inner(h, w):
        return jax.lax.fori_loop(0, 3, lambda _, h: h @ w, h)

    def outer(weights, x):
        return jax.lax.map(lambda shift: scanned(inner)(weights, x + shift), jnp.arange(5.0, dtype=jnp.float32))

    assert flops.by_primitive(outer, WEIGHTS, X)["dot_general"] == 5 * LAYERS * 3 * MATMUL
    # A Python number as the bound of a loop that is traced as a while loop.
    assert flops.by_primitive(lambda w, x: inner(x, w[0]), WEIGHTS, X)["dot_general"] == 3 * MATMUL


@pytest.mark.parametrize(("start", "step", "limit", "trips"), [(0, 1, 7, 7), (10, -3, 1, 3), (5, 1, 5, 0)])
def test_while_loops_with_counters(start, step, limit, trips):
    def run(w, x):
        more = (lambda c: c[0] < limit) if step > 0 else (lambda c: c[0] > limit)
        return jax.lax.while_loop(more, lambda c: (c[0] + step, c[1] @ w), (jnp.int32(start), x))

    # Also inside of jit, and where the counter is handed in.
    found = flops.by_primitive(lambda w, x: jax.jit(run)(w, x), WEIGHTS[0], X)
    assert found.get("dot_general", 0.0) == trips * MATMUL


def test_counters_wrap_around_in_their_dtype():
    def run(w, x):
        return jax.lax.while_loop(lambda c: c[0] != 0, lambda c: (c[0] + jnp.uint8(1), c[1] @ w), (jnp.uint8(250), x))[
            1
        ]

    assert flops.by_primitive(run, WEIGHTS[0], X)["dot_general"] == 6 * MATMUL


def test_unknown_while_loops_are_refused_or_assumed():
    def run(w, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ w, x)

    with pytest.raises(flops.UnknownTripCountError, match="pass while_trips="):
        flops.count(run, WEIGHTS[0], X)
    assert flops.by_primitive(run, WEIGHTS[0], X, while_trips=4)["dot_general"] == 4 * MATMUL
    with pytest.raises(flops.UnknownTripCountError):
        flops.count(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x * x, x), jnp.int32(3), X)


def test_the_stages_of_a_solver_are_counted():
    def one_step(w, x):
        term = diffrax.ODETerm(lambda t, y, _: y @ w)
        return diffrax.Dopri5().step(term, jnp.float32(0), jnp.float32(1), x, None, (False, x), made_jump=False)[0]

    found = flops.by_primitive(one_step, WEIGHTS[0], X)["dot_general"]
    assert MATMUL * 6 <= found <= MATMUL * 7 + 1e4


def test_unused_work_does_not_count_and_shards_count_together():
    def wasteful(w, x):
        return jax.lax.scan(lambda c, _: ((c[0] + 1.0, c[1] @ w), None), (x, x), None, length=4)[0][0]

    assert "dot_general" not in flops.by_primitive(wasteful, WEIGHTS[0], X)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows = PartitionSpec("data")
    shards = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    assert flops.by_primitive(shards, WEIGHTS[0], X)["dot_general"] == MATMUL


def test_compiled_is_xlas_count_without_loops_and_adds_the_iterations_with():
    plain, looped = written_out(layer), scanned(layer)
    expected = jax.jit(plain).lower(WEIGHTS, X).compile().cost_analysis()["flops"]
    assert flops.compiled(plain, WEIGHTS, X) == expected
    assert flops.compiled(looped, WEIGHTS, X) == pytest.approx(expected, rel=0.01)


def test_static_arguments_and_arrays():
    power = jax.jit(lambda x, n: x @ np.eye(4, dtype=np.float32) if n else x, static_argnums=1)
    assert flops.count(power, np.ones(4, np.float32), 1) == 32
    assert flops.count(power, np.ones(4, np.float32), 0) == 0
