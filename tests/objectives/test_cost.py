"""Every row pays only for what it needs: XLA FLOPs of a training step over those of a flow-matching step."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from jflow import interpolants, nets, objectives, parameterizations, training, types

# Passes: 0.75 x 3 + 0.25 x (7, 5, 5, 8, 4, 5) over 3; the derivative's own elementwise work is the rest.
PLAIN = {"lsd": 1.34, "psd_m": 1.17, "psd_u": 1.17, "esd": 1.43, "mean_flow": 1.09, "improved_mean_flow": 1.17}
EMBEDDED = {"lsd": 1.35, "psd_m": 1.19, "esd": 1.44, "mean_flow": 1.10}
BATCH = 512


def networks():
    return {"plain": nets.MLP.plain(features=512, depth=5), "embedded": nets.MLP(features=512, depth=5)}


@functools.cache
def flops(network, method):
    module = networks()[network]
    flow_map = parameterizations.flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    objective = objectives.METHODS[method].constructor(flow_map, interpolants.linear())
    optimizer = optax.adam(1e-3)
    step = training.make_step(objective, optimizer)
    zero = jnp.zeros((), jnp.float32)

    def init(key):
        params = module.init(key, zero, zero, jnp.zeros((2,), jnp.float32))["params"]
        return training.init_state(params, optimizer, jax.random.key(1))

    state = jax.eval_shape(init, jax.random.key(0))
    batch = types.Batch(jax.ShapeDtypeStruct((BATCH, 2), jnp.float32))
    return jax.jit(step).lower(state, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("method", sorted(PLAIN))
def test_plain_mlp(method):
    assert flops("plain", method) / flops("plain", "flow_matching") <= PLAIN[method]


@pytest.mark.parametrize("method", sorted(EMBEDDED))
def test_default_embeddings(method):
    assert flops("embedded", method) / flops("embedded", "flow_matching") <= EMBEDDED[method]


def test_the_counts_are_those_of_the_passes():
    """A sanity check from below: the plain network's flow-matching step is three passes over the batch."""
    forward = BATCH * 2 * (4 * 512 + 4 * 512 * 512 + 512 * 2)
    assert 0.95 < flops("plain", "flow_matching") / (3 * forward) < 1.1
