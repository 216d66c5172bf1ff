"""Samples of a flow map: drawn from the same noise for every map and number of jumps, written, and shown in training."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.model import Problem
from experiments.shared.options import MapTraining
from jflow import bases, samplers, sharding, training
from jflow.sample import picture
from jflow.training import distributed, image_grids
from jflow.types import BoundFlowMap, Key

JUMPS = (1, 2, 4, 8, 16)


def noise(key: Key, n: int, event: tuple[int, ...]) -> jax.Array:
    """Base points ``[n, *event]``, float32."""
    return bases.STANDARD_NORMAL.sample(key, jax.ShapeDtypeStruct(event, jnp.float32), (n,))


def draw(
    bound: BoundFlowMap, key: Key, jumps: int, n: int, event: tuple[int, ...], labels: jax.Array | None = None
) -> np.ndarray:
    """n samples ``[n, *event]`` of equal jumps; the base points are the same for every map and number of jumps."""
    like, grid = jax.ShapeDtypeStruct(event, jnp.float32), samplers.uniform_grid(jumps)
    return samplers.draw(samplers.Jumps(bound), key, n, grid, labels, like=like, block=4096)


def write_samples(config: MapTraining, problem: Problem, bound: BoundFlowMap) -> dict[int, np.ndarray]:
    """Writes ``samples_K.npy`` (float32, N x event, data units) for K = 1, 2, 4, 8, 16 from the same noise; returns them."""
    noise_key, label_key = jax.random.split(jax.random.key(config.seed + 1))
    labels = None if problem.labels is None else problem.labels(label_key, config.samples)
    drawn = {}
    for jumps in JUMPS:
        samples = draw(bound, noise_key, jumps, config.samples, problem.event, labels)
        drawn[jumps] = np.asarray(samples * problem.scale, np.float32)
        np.save(config.out / f"samples_{jumps}.npy", drawn[jumps])
    if labels is not None:
        np.save(config.out / "labels.npy", np.asarray(labels))
    return drawn


def named(jumps: int) -> str:
    """The number of jumps in words."""
    return f"{jumps} jump{'s' if jumps > 1 else ''}"


def grid_writer(
    out: pathlib.Path, draw: Callable[[Any], np.ndarray], average: str
) -> Callable[[training.TrainState], dict[str, float]]:
    """A function for ``training.Evaluation`` that writes the picture ``draw(params)`` of the averaged parameters."""

    def write(state: training.TrainState) -> dict[str, float]:
        params = sharding.local(training.ema.as_params(state.ema[average], state.params))
        if distributed.first_process():
            (out / "grids").mkdir(exist_ok=True)
            image_grids.write_png(out / "grids" / f"{int(state.step)}.png", picture(draw(params)))
        return {}

    return write
