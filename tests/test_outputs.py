"""Outputs of plain functions that become a Velocity or a FlowMap: cast leaf by leaf, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import conventions, interpolants, objectives, parameterizations, samplers, types
from jflow.likelihood import head

PATH = interpolants.linear()
V = parameterizations.mean_velocity_form()
STARTED = parameterizations.from_velocity


def of_two(out):
    return lambda p, s, t, x, cond=None, *, key=None: out(x)


def of_one(out):
    return lambda p, t, x, cond=None, *, key=None: out(x)


def diagonal(velocity):
    return lambda x: velocity(None, 0.4, x)


# name -> the result of a function x -> output at x, through each wrapper
MAKERS = {
    "flow_map, v": lambda f: lambda x: parameterizations.flow_map(of_two(f), V).mean_velocity(None, 0.2, 0.6, x),
    "flow_map, x": lambda f: (
        lambda x: parameterizations.flow_map(of_two(f), parameterizations.data_form(PATH)).jump(None, 0.2, 0.6, x)
    ),
    "FlowMap": lambda f: lambda x: types.FlowMap(of_two(f)).mean_velocity(None, 0.2, 0.6, x),
    "FlowMap's jump": lambda f: lambda x: types.FlowMap(of_two(f), jump_override=of_two(f)).jump(None, 0.2, 0.6, x),
    "FlowMap's velocity": lambda f: (
        lambda x: types.FlowMap(of_two(f), velocity_override=of_one(f)).velocity(None, 0.2, x)
    ),
    "as_velocity": lambda f: diagonal(types.as_velocity("velocity", of_one(f))),
    "as_flow_map": lambda f: diagonal(types.as_flow_map("velocity", of_one(f)).velocity),
    "from_velocity, velocity": lambda f: (
        lambda x: STARTED(of_one(f), of_two(lambda x: x)).jump(parameterizations.Started(None, None), 0.2, 0.6, x)
    ),
    "from_velocity, network": lambda f: (
        lambda x: STARTED(of_one(lambda x: x), of_two(f)).jump(parameterizations.Started(None, None), 0.2, 0.6, x)
    ),
    "from_reversed_time": lambda f: lambda x: conventions.from_reversed_time(of_two(f)).jump(None, 0.2, 0.6, x),
    "velocity_from_reversed_time": lambda f: diagonal(conventions.velocity_from_reversed_time(of_one(f))),
    "from_scm": lambda f: lambda x: conventions.from_scm(of_one(f)).jump(None, 0.2, 1.0, x),
    "velocity_from_edm": lambda f: diagonal(conventions.velocity_from_edm(of_one(f), PATH)),
    "with_head": lambda f: (
        lambda x: (
            head.with_head(types.FlowMap(of_two(f)), lambda p, s, t, x, cond=None, *, key=None: jnp.float32(0.0))
            .jump(head.Headed(None, None), 0.2, 0.6, head.WithLogDensity(x, jnp.float64(0.0)))
            .x
        )
    ),
}
# A tree of events in two dtypes: each leaf is cast to its own.
X = {"a": jnp.asarray([0.5, -1.0], jnp.float32), "b": jnp.asarray(0.25, jnp.bfloat16)}


@pytest.mark.parametrize("name", MAKERS)
def test_outputs_are_cast_to_the_dtypes_of_x(name):
    def wide(x):
        return jax.tree.map(lambda leaf: 2.0 * leaf.astype(jnp.float64), x)

    def narrow(x):
        return jax.tree.map(lambda leaf: 2.0 * leaf.astype(jnp.float16), x)

    expected = MAKERS[name](lambda x: jax.tree.map(lambda leaf: 2.0 * leaf, x))(X)
    for f in (wide, narrow, lambda x: jax.tree.map(np.asarray, wide(x))):
        for out in (MAKERS[name](f)(X), jax.eval_shape(MAKERS[name](wide), X)):
            assert (out["a"].dtype, out["b"].dtype) == (jnp.float32, jnp.bfloat16)
        jax.tree.map(np.testing.assert_array_equal, MAKERS[name](f)(X), expected)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x.astype(jnp.complex64), TypeError, "output: expected floating-point arrays, got dtype complex64"),
        (lambda x: x.astype(jnp.int32), TypeError, "output: expected floating-point arrays, got dtype int32"),
        (lambda x: x > 0, TypeError, "output: expected floating-point arrays, got dtype bool"),
        (lambda x: x[:1], ValueError, r"output: expected the shape of x, \(2,\), got \(1,\)"),
        (lambda x: x[None], ValueError, r"output: expected the shape of x, \(2,\), got \(1, 2\)"),
        (lambda x: (x, x), ValueError, "output: expected the pytree structure of x"),
        (lambda x: None, ValueError, "output: expected the pytree structure of x"),
    ],
)
def test_other_outputs_are_refused_by_name(name, f, error, message):
    with pytest.raises(error, match=message):
        MAKERS[name](f)(X["a"])
    with pytest.raises(error, match=message):
        jax.eval_shape(MAKERS[name](f), X["a"])


@pytest.mark.representatives("psd_m-float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["improved_mean_flow", "esd", "lsd", "psd_m"])
def test_a_network_of_another_dtype_samples_and_trains_as_one_of_the_same(method, dtype):
    def net(out):
        def apply(params, s, t, x, cond=None, *, key=None):
            return (params.astype(x.dtype) * x * (s + t).astype(x.dtype)).astype(out)

        return apply

    x = jnp.asarray([[0.5, -1.0], [1.5, 0.25]], dtype)
    batch = types.Batch(jnp.tile(x, (4, 1)))
    results = []
    for out in (dtype, "float64"):
        flow_map = parameterizations.flow_map(net(out), V)
        objective = objectives.METHODS[method].constructor(flow_map, PATH)

        @jax.jit
        def run(params, key, flow_map=flow_map, objective=objective):
            sampled = samplers.jumps(flow_map.bind(params), x[0], jnp.asarray([0.0, 0.5, 1.0], jnp.float32))
            loss = lambda p: jnp.mean(objective(p, key, batch)[0]).astype(jnp.float32)  # noqa: E731
            return sampled, jax.grad(loss)(params)

        results.append(run(jnp.float32(1.1), jax.random.key(0)))
    assert results[1][0].dtype == dtype
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), *results)


def test_a_coercion_is_equal_for_equal_models_and_names_what_is_no_model():
    velocity = of_one(lambda x: x)
    one, other = types.as_velocity("velocity", velocity), types.as_velocity("velocity", velocity)
    assert one == other and hash(one) == hash(other) and types.as_velocity("velocity", one) is one
    flow_map = types.FlowMap(of_two(lambda x: x))
    assert types.as_flow_map("model", flow_map) is flow_map
    assert types.as_velocity("model", flow_map) == flow_map.velocity
    with pytest.raises(ValueError, match="model: expected a FlowMap, whose jumps are needed"):
        types.as_flow_map("model", velocity).jump(None, 0.1, 0.2, X["a"])
    wrong = {"dict": {}, "NoneType": None, "BoundFlowMap": flow_map.bind(None), "FlowMap": types.FlowMap}
    for name, value in wrong.items():
        for coerce in (types.as_velocity, types.as_flow_map):
            with pytest.raises(TypeError, match=f"model: expected a Velocity or a FlowMap, got (a )?{name}"):
                coerce("model", value)
