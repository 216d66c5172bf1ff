"""Modules of flax.nnx and equinox from trained and restored parameters."""

from __future__ import annotations

import doctest

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jflow import interpolants, nets, objectives, parameterizations, training
from jflow.datasets import ArrayDataset
from jflow.nets import unwrap

X = np.random.RandomState(0).normal(size=(8, 2)).astype(np.float32)


class Nnx(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        # A variable that is not a parameter, and that the module's output depends on.
        self.norm.mean.set_value(jnp.full(6, 0.5))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, s, t, x):
        h = self.norm(self.layers[0](jnp.concatenate([jnp.stack([s, t]), x])))
        return self.layers[1](self.dropout(jnp.tanh(h)))


class Eqx(eqx.Module):
    layers: list
    activation: object
    dropout: eqx.nn.Dropout

    def __init__(self, seed):
        first, second = jax.random.split(jax.random.key(seed))
        self.layers = [
            eqx.nn.Linear(4, 6, key=first, dtype=jnp.float32),
            eqx.nn.Linear(6, 2, key=second, dtype=jnp.float32),
        ]
        # Each module has its own function, which compares unequal to that of another module.
        self.activation = lambda h: jnp.tanh(h)
        self.dropout = eqx.nn.Dropout(0.0)

    def __call__(self, s, t, x, *, key=None):
        h = self.activation(self.layers[0](jnp.concatenate([jnp.stack([s, t]), x])))
        return self.layers[1](self.dropout(h, key=key))


KINDS = {"nnx": (Nnx, nets.from_nnx, nets.to_nnx), "equinox": (Eqx, nets.from_equinox, nets.to_equinox)}


def evaluating(kind, module):
    if kind == "equinox":
        return eqx.nn.inference_mode(module)
    module.eval()
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_module_is_the_trained_network(kind, tmp_path):
    make, from_module, to_module = KINDS[kind]
    network, params = from_module(make(0))
    flow_map = parameterizations.flow_map(network, parameterizations.mean_velocity_form())
    objective = objectives.flow_matching(flow_map, interpolants.linear())
    trained = training.train(
        objective, optax.adam(1e-2), params, ArrayDataset(X, 8), steps=2, out_dir=tmp_path, ema=(), hooks=[]
    ).params
    # A new session: only the code that makes the module and the directory are left.
    fresh = make(1)
    template = from_module(fresh)[1] if kind == "equinox" else None
    restored, _ = training.restore_params(tmp_path, template=template)
    initial = evaluating(kind, make(1))(jnp.float32(0.25), jnp.float32(0.5), X[0])
    # As numpy arrays, too, for example after ``jax.device_get``.
    for found in (restored, jax.device_get(restored)):
        module = evaluating(kind, to_module(fresh, found))
        assert type(module) is make
        arguments = (jnp.float32(0.25), jnp.float32(0.5), X[0])
        expected = network(jax.device_get(trained), *arguments)
        np.testing.assert_array_equal(module(*arguments), expected)
        assert not np.array_equal(expected, initial)
    # The module that was passed in holds what it held.
    np.testing.assert_array_equal(evaluating(kind, fresh)(*arguments), initial)


def without(tree):
    return {name: value for name, value in tree.items() if name != "norm"}


def replaced(leaf):
    return lambda tree: tree | {"norm": tree["norm"] | {"bias": leaf}}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (without, ValueError, "params: expected the parameters of the module, got none of norm/bias, norm/scale"),
        (lambda tree: tree | {"head": np.ones(2)}, ValueError, "params: .*, got also head"),
        (replaced(np.zeros(5, np.float32)), ValueError, r"params: expected shape \(6,\) for norm/bias, got \(5,\)"),
        (replaced(np.zeros(6, np.float16)), TypeError, "params: expected dtype float32 for norm/bias, got float16"),
        (replaced("zeros"), TypeError, "params: expected an array for norm/bias, got str"),
    ],
)
def test_parameters_that_do_not_fit(change, error, match):
    module = Nnx(0)
    with pytest.raises(error, match=match):
        nets.to_nnx(module, change(nets.from_nnx(module)[1]))


def test_equinox_parameters_that_do_not_fit():
    module, params = Eqx(0), nets.from_equinox(Eqx(0))[1]
    with pytest.raises(ValueError, match=r"params: .*, got none of layers/1/bias, layers/1/weight"):
        nets.to_equinox(module, eqx.tree_at(lambda tree: tree.layers, params, params.layers[:1]))
    with pytest.raises(TypeError, match="params: expected dtype float32 for layers/0/weight, got bfloat16"):
        nets.to_equinox(module, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    with pytest.raises(ValueError, match=r"params: expected shape \(6, 4\) for layers/0/weight, got \(\)"):
        nets.to_equinox(module, jax.tree.map(lambda leaf: leaf.ravel()[0], params))


def test_averages_of_narrow_parameters_are_rounded_to_the_dtype_of_the_module():
    """They are float32, because bfloat16 would round away the update of an average."""
    narrow = eqx.tree_at(lambda tree: tree.layers[0].bias, Eqx(0), jnp.asarray(np.zeros(6, jnp.bfloat16)))
    average = np.full(6, 1.0 + 2.0**-10, np.float32)
    params = eqx.tree_at(lambda tree: tree.layers[0].bias, nets.from_equinox(narrow)[1], jnp.asarray(average))
    found = nets.to_equinox(narrow, params).layers[0].bias
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1.0)
    module = nnx.Linear(1, 1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    found = nets.to_nnx(module, {"kernel": np.ones((1, 1), np.float32), "bias": average[:1]}).bias
    assert found.get_raw_value().dtype == jnp.bfloat16


def test_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"module: expected a flax\.nnx module, got Eqx"):
        nets.to_nnx(Eqx(0), {})
    with pytest.raises(
        TypeError, match="module: expected an equinox module with floating-point arrays, got PjitFunction sin"
    ):
        nets.to_equinox(jnp.sin, {})


def test_the_examples_run():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        failed, attempted = doctest.testmod(unwrap)
    assert attempted >= 10 and failed == 0
