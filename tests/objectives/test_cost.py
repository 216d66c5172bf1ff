"""Every row pays only for what it needs: XLA FLOPs of a training step over those of a flow-matching step."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from jflow import interpolants, nets, objectives, parameterizations, types

# Passes: 0.75 x 3 + 0.25 x (7, 5, 5, 8, 4, 5) over 3; the derivative's own elementwise work is the rest.
PLAIN = {"lsd": 1.34, "psd_m": 1.17, "psd_u": 1.17, "esd": 1.43, "mean_flow": 1.09, "improved_mean_flow": 1.17}
EMBEDDED = {"lsd": 1.35, "psd_m": 1.19, "psd_u": 1.19, "esd": 1.44, "mean_flow": 1.10, "improved_mean_flow": 1.19}
BATCH = 512


def networks():
    return {"plain": nets.MLP.plain(features=512, depth=5), "embedded": nets.MLP(features=512, depth=5)}


@functools.cache
def flops(network, method):
    module = networks()[network]
    flow_map = parameterizations.flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    objective = objectives.METHODS[method].constructor(flow_map, interpolants.linear())
    optimizer = optax.adam(1e-3)

    def step(params, state, key, batch):
        gradient = jax.grad(lambda p: objective(p, key, batch)[0].mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    zero = jnp.zeros((), jnp.float32)
    init = lambda k: module.init(k, zero, zero, jnp.zeros((2,), jnp.float32))["params"]  # noqa: E731
    params = jax.eval_shape(init, jax.random.key(0))
    batch = types.Batch(jax.ShapeDtypeStruct((BATCH, 2), jnp.float32))
    state = jax.eval_shape(optimizer.init, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(step).lower(params, state, key, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("method", sorted(PLAIN))
def test_plain_mlp(method):
    assert flops("plain", method) / flops("plain", "flow_matching") <= PLAIN[method]


@pytest.mark.parametrize("method", sorted(EMBEDDED))
def test_default_embeddings(method):
    assert flops("embedded", method) / flops("embedded", "flow_matching") <= EMBEDDED[method]
