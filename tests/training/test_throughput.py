"""Arithmetic counted by hand, rates of made-up rows."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow.datasets import ArrayDataset
from jflow.training import CountFlops, fit, init_state, make_chunk, make_step, metrics_log, throughput
from jflow.training import throughput as speed
from jflow.types import Batch
from tests.training import runs

SIZE, ROWS, LAYERS = 128, 256, 3
# A product of [ROWS, SIZE] and [SIZE, SIZE] per layer, and two more backwards, but for the first layer's input.
BY_HAND = (3 * LAYERS - 1) * 2 * ROWS * SIZE**2


def objective(params, key, batch, context):
    h = batch.x1
    for w in params:
        h = jnp.tanh(h @ w)
    return jnp.sum(h**2, axis=1), {}


def problem(devices=None):
    """State, chunk and data; on a mesh of so many devices, or on none."""
    random = np.random.default_rng(0)
    optimizer = optax.sgd(1e-3)
    params = [jnp.asarray(random.normal(size=(SIZE, SIZE)) / SIZE**0.5, jnp.float32) for _ in range(LAYERS)]
    state = init_state(params, optimizer, jax.random.key(0))
    dataset = ArrayDataset(Batch(random.normal(size=(ROWS, SIZE)).astype(np.float32)), ROWS)
    step = make_step(objective, optimizer)
    if devices is None:
        return state, make_chunk(step, dataset.batch), dataset.data
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    chunk = make_chunk(step, dataset.batch, batch_sharding=rows)
    return jax.device_put(state, whole), chunk, jax.device_put(dataset.data, whole)


def test_flops_are_those_counted_by_hand():
    state, chunk, data = problem()
    flops = speed.flops_per_step(chunk, state, data)
    assert BY_HAND < flops < 1.02 * BY_HAND
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert speed.flops_per_step(chunk, *jax.eval_shape(lambda *trees: trees, state, data)) == flops


def test_flops_are_those_of_all_devices_together():
    counts = [speed.flops_per_step(chunk, state, data) for state, chunk, data in map(problem, (None, 1, 8))]
    assert counts[0] == counts[1] == counts[2]


def test_flops_need_a_jitted_function_and_loops_of_known_length():
    state, chunk, data = problem()
    with pytest.raises(TypeError, match="chunk"):
        speed.flops_per_step(lambda *arguments: chunk(*arguments), state, data)

    def endless(state, data, steps):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x - 1, jnp.ones(3)), steps

    assert speed.flops_per_step(jax.jit(endless, static_argnums=2), state, data) is None


def test_flops_of_scanned_layers_are_those_of_layers_written_out():
    def scanned(params, key, batch, context):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch.x1, jnp.stack(params))[0]
        return jnp.sum(h**2, axis=1), {}

    state, chunk, data = problem()
    dataset = ArrayDataset(Batch(np.zeros((ROWS, SIZE), np.float32)), ROWS)
    looped = make_chunk(make_step(scanned, optax.sgd(1e-3)), dataset.batch)
    expected = speed.flops_per_step(chunk, state, data)
    # The scan also computes the gradient of its first input.
    by_hand = 2 * ROWS * SIZE**2
    assert speed.flops_per_step(looped, state, data) == pytest.approx(expected + by_hand, rel=0.01)


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def test_utilisation():
    h100 = device("NVIDIA H100 80GB HBM3")
    assert speed.peak_flops(h100) == 989e12
    assert speed.peak_flops(device("TPU v5 lite")) == 197e12
    assert speed.peak_flops(device("a device of the future")) is None
    # The session runs on processors.
    assert speed.peak_flops() is None
    assert speed.utilisation(989e12, 2.0, [h100] * 4) == pytest.approx(0.5)
    assert speed.utilisation(1e9, 3.0, peak=6e9) == pytest.approx(0.5 / len(jax.devices()))
    assert speed.utilisation(1e9, 3.0, [device("a device of the future")]) is None
    assert speed.utilisation(None, 3.0, [h100]) is None
    with pytest.raises(ValueError, match="devices"):
        speed.utilisation(1e9, 3.0, [])


def rows_of(*times):
    """Rows of one call of fit, 100 steps each, that took these seconds."""
    return [
        {"kind": "train", "steps": 100, "seconds": seconds, "steps_per_second": 100 / time}
        for time, seconds in zip(times, np.cumsum(times).tolist(), strict=True)
    ]


def test_steady_rate_leaves_out_compilation_and_is_no_mean():
    rows = [*rows_of(20.0, 1.0, 0.99, 5.0), {"kind": "eval", "distance": 1.0}]
    assert speed.steady_rate(rows) == pytest.approx(100.0)
    # Resumed twice, compiling longer than the calls before had taken in all.
    rows += [*rows_of(50.0), *rows_of(90.0, 0.8, 0.9)]
    assert speed.steady_rate(rows) == pytest.approx(100 / 0.99)
    for few in ([], rows_of(20.0), rows_of(20.0) + rows_of(30.0)):
        with pytest.raises(ValueError, match="rows"):
            speed.steady_rate(few)


def test_steady_rate_of_a_run():
    state, chunk, data = problem()
    rows = []
    fit(state, chunk, data, total_steps=20, log_every=4, hooks=[rows.append])
    rates = [row["steps_per_second"] for row in rows]
    assert min(rates[1:]) <= speed.steady_rate(rows) <= max(rates[1:])


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.train(p, chunk=lambda *arguments: p.chunk(*arguments), hooks=[CountFlops()]),
            TypeError,
            "^chunk: expected a jitted function, as make_chunk returns, got function$",
            id="FLOPs of a plain function",
        ),
        pytest.param(
            lambda d, p: [runs.train(p, d), throughput.steady_rate(metrics_log.read(d / "metrics.jsonl"))],
            ValueError,
            "^rows: expected a second row of training from one call of fit, got 1 first ones$",
            id="the rate of a run too short",
        ),
        pytest.param(
            lambda d, p: throughput.utilisation(1e9, 10.0, devices=[]),
            ValueError,
            "^devices: expected at least one, got none$",
            id="the share of no devices",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
