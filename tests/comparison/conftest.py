"""A module that makes subjects, and a run whose config names it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from jflow import training

TINY = """
import jax, jax.numpy as jnp
from jflow import FlowMap, comparison

def mean_velocity(params, s, t, x, cond=None, *, key=None):
    return jnp.broadcast_to(params["shift"] + cond.astype(x.dtype), x.shape)

EVENT = jax.ShapeDtypeStruct((2,), jnp.float32)

def of_run(config):
    return comparison.Subject(
        FlowMap(mean_velocity), None, EVENT, scale=config["scale"],
        cond=lambda key, n: jnp.arange(n) % 3, data=lambda key, n: jnp.ones((n, 2)),
    )

def make():
    import dataclasses
    return dataclasses.replace(of_run({"scale": 1.0}), params={"shift": jnp.float32(0.5)})

def velocity():
    return comparison.Subject(lambda params, t, x, cond=None, *, key=None: -x, None, EVENT)

def wrong():
    return 3
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The module ``tiny_subject``."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tiny_subject.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def a_run(tiny, tmp_path):
    """A directory as ``training.fit`` leaves it: parameters 1, their average 2."""
    optimizer, averages = optax.sgd(0.1), {"slow": training.ema.constant(0.5)}
    state = training.init_state({"shift": jnp.float32(1.0)}, optimizer, jax.random.key(0), ema=averages)
    state = state._replace(ema=jax.tree.map(lambda leaf: 2 * leaf, state.ema))
    config = {"make": "tiny_subject:of_run", "average": "slow", "scale": 10.0}
    with training.Checkpoints(tmp_path / "run" / "checkpoints", config=config) as checkpoints:
        checkpoints.save(state)
    return tmp_path / "run"
