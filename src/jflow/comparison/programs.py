"""The compiled program of a row, its FLOPs, and interleaved timing of several programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import flops as counter
from jflow.comparison.entries import Entry, Way
from jflow.types import Cond, Event, Key, Params


class Program(NamedTuple):
    """The compiled program of a row, which computes the samples in blocks.

    Attributes:
      compiled: ``(params, key, rows, x0, cond) -> (x1, nfe or None)``, for blocks of one size.
      seconds: the time of tracing and compiling, in seconds.
      way, params, key, x0, cond: what it runs; x0 and cond are those of all samples.
      batch: the size of a block.
    """

    compiled: Callable[..., tuple[Event, Any]]
    seconds: float
    way: Way
    params: Params
    key: Key | None
    x0: Event
    cond: Cond
    batch: int

    @classmethod
    def of(cls, entry: Entry, way: Way, x0: Event, cond: Cond, batch: int) -> Program:
        """Compiles a row of an entry; ``cond`` is used if the entry has none."""
        cond = jax.tree.map(jnp.asarray, cond if entry.cond is None else entry.cond)

        def block(params: Params, key: Key | None, rows: jax.Array, x0: Event, cond: Cond) -> tuple[Event, Any]:
            def one(row: jax.Array, x0: Event, cond: Cond) -> tuple[Event, Any]:
                return way.run(params, None if key is None else jax.random.fold_in(key, row), x0, cond)

            return jax.vmap(one)(rows, x0, cond)

        program = cls(lambda *_: (None, None), 0.0, way, entry.params, entry.key, x0, cond, batch)
        arguments = program.arguments(0)
        began = time.perf_counter()
        compiled = jax.jit(block).lower(*arguments).compile()
        return program._replace(compiled=compiled, seconds=time.perf_counter() - began)

    def arguments(self, first: int) -> tuple[Any, ...]:
        """The arguments for the block that begins at sample ``first``; the last block is padded with the last sample."""
        rows = np.minimum(np.arange(first, first + self.batch), self.total() - 1).astype(np.uint32)
        x0, cond = jax.tree.map(lambda leaf: leaf[rows], (self.x0, self.cond))
        return self.params, self.key, jnp.asarray(rows), x0, cond

    def total(self) -> int:
        """The number of samples."""
        return jax.tree.leaves(self.x0)[0].shape[0]

    def sample(self) -> tuple[Any, ...]:
        """The (params, key, x0, cond) of the first sample."""
        x0, cond = jax.tree.map(lambda leaf: leaf[0], (self.x0, self.cond))
        return self.params, None if self.key is None else jax.random.fold_in(self.key, 0), x0, cond

    def run_all(self) -> tuple[Event, float | None]:
        """The end points of all samples, on the host, and the mean number of calls of the model."""
        ends, counts = [], []
        for first in range(0, self.total(), self.batch):
            end, nfe = jax.device_get(self.compiled(*self.arguments(first)))
            kept = self.total() - first
            ends.append(jax.tree.map(lambda leaf, kept=kept: leaf[:kept], end))
            counts += [] if nfe is None else [nfe[:kept]]
        x1 = jax.tree.map(lambda *leaves: np.concatenate(leaves), *ends)
        if self.way.calls is not None:
            return x1, float(self.way.calls(*self.sample()))
        return x1, float(np.mean(np.concatenate(counts))) if counts else None


def flops(unit: Callable[..., Any], arguments: tuple[Any, ...]) -> float | None:
    """The FLOPs of a program for one sample before optimisation, loops included (``jflow.flops``).

    The result is None if a while loop has a number of iterations that is not known while tracing.
    """
    try:
        return counter.count(unit, *arguments) or None
    except counter.UnknownTripCountError:
        return None


def interleaved_seconds(programs: Mapping[str, Program], repeats: int) -> dict[str, np.ndarray]:
    """The times of interleaved calls in seconds: each round calls every program once. The first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    arguments = {name: jax.block_until_ready(program.arguments(0)) for name, program in programs.items()}
    for _ in range(repeats + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program.compiled(*arguments[name]))
            seconds[name].append(time.perf_counter() - began)
    return {name: np.asarray(values[1:]) for name, values in seconds.items()}
