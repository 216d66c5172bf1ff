"""Every row pays only for what it needs: XLA FLOPs of a method's gradient over those of its parts, compiled apart, and
of a training step over those of a flow-matching step.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from jflow import interpolants, nets, objectives, parameterizations, testing, training, types
from jflow.objectives import batch_split
from jflow.testing import methods as testing_methods

# Passes: 0.75 x 3 + 0.25 x (7, 5, 5, 8, 4, 5) over 3; the derivative's own elementwise work is the rest.
PLAIN = {"lsd": 1.34, "psd_m": 1.17, "psd_u": 1.17, "esd": 1.43, "mean_flow": 1.09, "improved_mean_flow": 1.17}
EMBEDDED = {"lsd": 1.35, "psd_m": 1.19, "esd": 1.44, "mean_flow": 1.10}
BATCH, DIM = 512, 2
# Both ways: a declared pass too many shows as one too few does, even on the eighth of a batch (4 % of a step).
PARTS = 0.02
# Diffrax loops over the stages of a step, and XLA's analysis counts the body of a loop once; jflow.flops corrects it.
IN_LOOP = ("consistency_distillation", "ctm")
# What a teacher given to the constructor adds to an off-diagonal sample, in forward passes: its velocity, where the
# method has a conditional one, and nothing where it has none or asks the teacher at that point anyway.
TAUGHT = {"lsd": 0, "mean_flow": 1, "split_mean_flow": 0, "emd": 0, "lmd": 0, "ctm": 0}


def networks():
    return {"plain": nets.MLP.plain(features=512, depth=5), "embedded": nets.MLP(features=512, depth=5)}


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def flops(network, method):
    module = networks()[network]
    flow_map = parameterizations.flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    objective = objectives.METHODS[method].constructor(flow_map, interpolants.linear())
    optimizer = optax.adam(1e-3)
    step = training.make_step(objective, optimizer)
    zero = jnp.zeros((), jnp.float32)

    def init(key):
        params = module.init(key, zero, zero, jnp.zeros((DIM,), jnp.float32))["params"]
        return training.init_state(params, optimizer, jax.random.key(1))

    state = jax.eval_shape(init, jax.random.key(0))
    return testing_methods.flops(step, state, types.Batch(floats(BATCH, DIM)))


def build(name, apply, **choices):
    """The method on its first path and in its first form, with maps of both directions."""
    method = objectives.METHODS[name]
    path = interpolants.INTERPOLANTS[(method.paths or ("linear",))[0]]()
    form = parameterizations.PARAMETERIZATIONS[(method.forms or ("v",))[0]](path)
    flow_map = parameterizations.flow_map(apply, form, domain=types.BOTH)
    if choices.pop("teacher", False):
        choices["teacher"] = flow_map
    return method, method.constructor(flow_map, path, **choices)


def data_of(method, params, step, points, *, teacher=False):
    """(batch, context): averaged and teacher parameters are other arguments than the trained ones."""
    taught = teacher or set(method.needs) & {"teacher", "map teacher"}
    context = types.Context(step, ema=params if "ema" in method.needs else None, teacher=params if taught else None)
    return types.Batch(points, x0=points if "pairs" in method.needs else None), context


def rows_of(objective, size):
    """The numbers of diagonal and off-diagonal rows."""
    return batch_split.split_batch(jax.random.key(0), size, objective.diagonal, objective.blocks).counts


@pytest.mark.parametrize("piece", objectives.PASSES)
def test_a_piece_costs_its_passes(piece):
    assert testing_methods.pieces()[piece] / testing_methods.pieces()["forward"] == pytest.approx(
        objectives.PASSES[piece], rel=PARTS
    )


@pytest.mark.representatives("mean_flow")
@pytest.mark.parametrize("name", objectives.METHODS)
def test_a_method_costs_the_sum_of_its_parts(name):
    testing.check_cost(objectives.METHODS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_is_paid_for_where_it_is_asked(name):
    testing.check_cost(objectives.METHODS[name], on_extra=1, off_extra=TAUGHT[name], teacher=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(PLAIN))
def test_plain_mlp(method):
    assert flops("plain", method) / flops("plain", "flow_matching") <= PLAIN[method]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(EMBEDDED))
def test_default_embeddings(method):
    assert flops("embedded", method) / flops("embedded", "flow_matching") <= EMBEDDED[method]


def test_the_counts_are_those_of_the_passes():
    """A sanity check from below: the plain network's flow-matching step is three passes over the batch."""
    forward = BATCH * 2 * (4 * 512 + 4 * 512 * 512 + 512 * DIM)
    assert 0.95 < flops("plain", "flow_matching") / (3 * forward) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_LOOP)
def test_the_network_is_called_as_often_as_declared(name):
    """At run time, loops and all: on every row once for each forward pass of the registry."""
    calls = collections.Counter()

    def network(params, s, t, x, cond=None, *, key=None):
        # Of x, which every row has its own of: a callback of a constant would come once for all rows.
        jax.debug.callback(lambda _: calls.update(["network"]), x)
        return params * x

    method, objective = build(name, network)
    params, size = jnp.float32(0.5), 8
    batch, context = data_of(method, params, jnp.int32(0), jnp.ones((size, DIM), jnp.float32))
    jax.block_until_ready(jax.jit(objective)(params, jax.random.key(0), batch, context))
    jax.effects_barrier()
    on, off = rows_of(objective, size)
    assert calls["network"] == on + off * method.cost["forward"]
