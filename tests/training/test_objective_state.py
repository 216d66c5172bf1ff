"""Objectives with a state of their own: they train, do not depend on the layout, and resume bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import interpolants, objectives, parameterizations, reports, sharding
from jflow.datasets import ArrayDataset
from jflow.training import Checkpoints, RunDirectory, fit, init_state, make_chunk, make_step
from jflow.types import Aux, Batch, Context

MESHES = {"8 x 1": (8, 1), "4 x 2": (8, 2)}
ROWS = np.random.default_rng(0).normal(size=(96, 3)) * [1.0, 0.5, 0.2] + [0.3, 0.0, -1.0]


def net(params, s, t, x, cond=None, *, key=None):
    h = jnp.tanh(params["in"] @ jnp.concatenate([jnp.stack([s, t]), x]))
    return params["out"] @ h


FLOW_MAP = jflow.flow_map(net, parameterizations.mean_velocity_form())
PATH = interpolants.linear()


@dataclasses.dataclass(frozen=True)
class RunningScale:
    """A method divided by a running mean of its own loss."""

    objective: Any
    decay: float = 0.9

    def init(self, key, params):
        return {"scale": jnp.ones((), jnp.float64), "steps": jnp.zeros((), jnp.int32)}

    def __call__(self, params, key, batch, context=None):
        context = Context() if context is None else context
        loss, aux = self.objective(params, key, batch, context)
        mean = jax.lax.stop_gradient(loss.mean())
        scale = self.decay * context.state["scale"] + (1 - self.decay) * mean
        state = {"scale": scale, "steps": context.state["steps"] + 1}
        return loss / context.state["scale"], Aux(state, {**aux.metrics, "scale": reports.Last(scale)})


class Player(NamedTuple):
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class TwoPlayers:
    """One jump against a discriminator with its own network and optimizer, which learns in the same step."""

    optimizer: Any

    def init(self, key, params):
        first, second = jax.random.split(key)
        weights = {
            "in": 0.5 * jax.random.normal(first, (80, 3), jnp.float64),
            "out": 0.5 * jax.random.normal(second, (80,), jnp.float64),
        }
        with jax.numpy_dtype_promotion("standard"):
            return Player(weights, self.optimizer.init(weights))

    def __call__(self, params, key, batch, context=None):
        player = context.state
        z = jax.random.normal(key, batch.x1.shape, batch.x1.dtype)
        fake = jax.vmap(lambda x: FLOW_MAP.jump(params, 0.0, 1.0, x))(z)
        judge = jax.vmap(lambda d, x: d["out"] @ jnp.tanh(d["in"] @ x), (None, 0))
        own = lambda d: jnp.mean(  # noqa: E731
            jax.nn.softplus(-judge(d, batch.x1)) + jax.nn.softplus(judge(d, jax.lax.stop_gradient(fake)))
        )
        value, slope = jax.value_and_grad(own)(player.params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.optimizer.update(slope, player.opt_state, player.params)
        after = Player(optax.apply_updates(player.params, updates), opt_state)
        loss = jax.nn.softplus(-judge(player.params, fake))
        return loss, Aux(after, {"discriminator": value})


OBJECTIVES = {
    "running scale": RunningScale(objectives.lsd(FLOW_MAP, PATH)),
    "two players": TwoPlayers(optax.adam(1e-2)),
    "sequence": objectives.sequence(
        [(0, RunningScale(objectives.flow_matching(FLOW_MAP, PATH))), (3, RunningScale(objectives.lsd(FLOW_MAP, PATH)))]
    ),
    "weighted sum": objectives.weighted_sum(
        objectives.lsd(FLOW_MAP, PATH), adversary=(TwoPlayers(optax.adam(1e-2)), 0.1)
    ),
}
OPTIMIZER = optax.adam(1e-2)


def make_state(objective):
    def make():
        first, second, key = jax.random.split(jax.random.key(3), 3)
        params = {
            "in": 0.5 * jax.random.normal(first, (16, 5), jnp.float64),
            "out": 0.5 * jax.random.normal(second, (3, 16), jnp.float64),
        }
        return init_state(params, OPTIMIZER, key, ema=(0.9,), objective=objective)

    return make


@functools.cache
def parts_of(name, mesh):
    """What makes the state, the chunk, which is compiled once for all tests, and the data."""
    objective = OBJECTIVES[name]
    dataset = ArrayDataset(Batch(ROWS), 48, seed=1)
    step = make_step(objective, OPTIMIZER, ema=(0.9,))
    if mesh is None:
        return jax.jit(make_state(objective)), make_chunk(step, dataset.batch), dataset.data
    devices, fsdp = MESHES[mesh]
    mesh = sharding.mesh(fsdp, jax.devices()[:devices])
    shardings = sharding.parts(jax.eval_shape(make_state(objective)), mesh, smallest=16)
    chunk = make_chunk(step, dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=shardings)
    make = lambda: sharding.place(sharding.init(make_state(objective), mesh), shardings)  # noqa: E731
    return make, chunk, sharding.place(dataset.data, sharding.whole(mesh))


def run_of(name, mesh=None):
    make, chunk, data = parts_of(name, mesh)
    return make(), chunk, data


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_state_moves_and_does_not_depend_on_the_layout(name):
    results = {}
    for mesh in (None, *MESHES):
        state, chunk, data = run_of(name, mesh)
        start = jax.device_get(state.objective_state)
        losses = []
        for _ in range(3):
            state, metrics = chunk(state, data, 2)
            losses.append(float(metrics["loss"].value()))
        results[mesh] = (losses, jax.device_get(state))
        moved = [
            np.any(a != b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.objective_state), strict=True)
        ]
        assert any(moved)
    losses, expected = results[None]
    assert np.all(np.isfinite(losses))
    for mesh in MESHES:
        np.testing.assert_allclose(results[mesh][0], losses, rtol=1e-9)
        got = results[mesh][1]
        for part in ("params", "objective_state", "ema"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10),
                getattr(got, part),
                getattr(expected, part),
            )


# Quick in objectives/test_combine.
@pytest.mark.slow
def test_a_stage_that_is_not_in_force_keeps_its_state():
    state, chunk, data = run_of("sequence")
    state, _ = chunk(state, data, 2)
    first, second = state.objective_state
    assert int(first["steps"]) == 2 and int(second["steps"]) == 0
    for _ in range(2):
        state, _ = chunk(state, data, 2)
    first, second = state.objective_state
    assert int(first["steps"]) == 3 and int(second["steps"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["running scale", "weighted sum"])
def test_a_resumed_run_is_the_unbroken_one(name, tmp_path, assert_same):
    def run(directory, steps, **kwargs):
        state, chunk, data = run_of(name)
        return fit(
            state, chunk, data, total_steps=steps, log_every=2, hooks=(),
            run=RunDirectory(directory, checkpoint_every=2, **kwargs),
        )  # fmt: skip

    unbroken = run(tmp_path / "unbroken", 8)
    run(tmp_path / "broken", 4)
    assert_same(run(tmp_path / "broken", 8, resume=True), unbroken)


@pytest.mark.slow
def test_a_state_is_restored_on_another_layout_to_the_last_bit(tmp_path):
    state, chunk, data = run_of("two players", "4 x 2")
    state, _ = chunk(state, data, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    for mesh in (None, "8 x 1"):
        template, _, _ = run_of("two players", mesh)
        with Checkpoints(tmp_path, resume=True) as checkpoints:
            restored, _ = checkpoints.restore_latest(template)
        got, want = jax.device_get((restored.objective_state, state.objective_state))
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_it_trains():
    """The running scale: losses near one; the discriminator learns to tell the samples from the data."""
    state, chunk, data = run_of("running scale")
    for _ in range(3):
        state, metrics = chunk(state, data, 20)
    assert 0.5 < metrics["loss"].value() < 1.5
    assert float(metrics["scale"].value()) == pytest.approx(float(state.objective_state["scale"]))
    state, chunk, data = run_of("two players")
    frozen = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    _, first = chunk(state._replace(params=frozen(state.params)), data, 2)
    state, _, _ = run_of("two players")
    for _ in range(20):
        state, last = chunk(state, data, 2)
    assert last["discriminator"].value() < first["discriminator"].value()


def test_a_state_that_is_missing_or_changes_its_kind_is_refused():
    objective = OBJECTIVES["running scale"]
    dataset = ArrayDataset(Batch(ROWS), 48, seed=1)
    batch = jax.eval_shape(dataset.batch, dataset.data, jnp.int32(0))
    stateless = jax.eval_shape(make_state(objectives.lsd(FLOW_MAP, PATH)))
    with pytest.raises(
        ValueError, match=r"state\.objective_state: expected .*init_state\(\.\.\., objective=objective\)"
    ):
        jax.eval_shape(make_step(objective, OPTIMIZER, ema=(0.9,)), stateless, batch)

    class Growing(RunningScale):
        def __call__(self, params, key, batch, context=None):
            loss, aux = super().__call__(params, key, batch, context)
            return loss, aux._replace(state={"scale": jnp.zeros((2,), jnp.float64), "steps": jnp.int32(0)})

    growing = Growing(objectives.lsd(FLOW_MAP, PATH))
    with pytest.raises(ValueError, match=r"aux\.state: expected the state's own kind"):
        jax.eval_shape(make_step(growing, OPTIMIZER, ema=(0.9,)), make_state(growing)(), batch)
