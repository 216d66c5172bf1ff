"""Couplings: the time to pair a minibatch, and the transport cost that this saves.

    python -m benchmarks.couplings [--out runs/couplings]

Minibatches of 128, 256 and 512 points of N(0, I) in the plane are paired with points of the checkerboard, scaled to unit
deviation: independently, by the exact assignment (scipy, on the host), and by Sinkhorn (ott-jax, jitted) at several
strengths of entropy. The times are in milliseconds per minibatch, medians of interleaved calls without compilation. Those
of Sinkhorn include drawing the base points; those of the assignment do not. The cost is the mean |x1 - x0|^2 over all
minibatches, with its standard error, in squared units of the data; it is 4 for independent pairs. Sinkhorn is left out if
ott-jax is not installed. The benchmark takes less than a minute and writes table.md and results.json.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.shared import results, timing
from experiments.shared.run import main
from jflow import couplings, datasets

EPSILONS = (0.2, 0.05, 0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    out: pathlib.Path = pathlib.Path("runs/couplings")
    """Directory for table.md and results.json."""
    sizes: tuple[int, ...] = (128, 256, 512)
    """Points per minibatch."""
    repeats: int = 15
    """Minibatches of each size."""
    seed: int = 0
    """Seed of the points."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range, and an output that is there.

        Raises:
          ValueError: naming the option, what came and what was expected.
          FileExistsError: without --overwrite.
        """
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"--sizes: expected positive whole numbers, got {self.sizes}")
        if self.repeats < 2:
            raise ValueError(f"--repeats: expected at least 2, got {self.repeats}")
        results.refuse_existing(self.out, self.overwrite)


def contenders() -> dict[str, Callable[..., Any]]:
    """name -> (key, x0, x1) -> x0 paired with x1; the exact assignment takes the given x0, the others draw their own."""
    found = {
        "independent": jax.jit(lambda key, x0, x1: couplings.independent(key, x1)),
        "assignment": lambda key, x0, x1: couplings.assignment(x0, x1).x0,
    }
    for epsilon in EPSILONS:
        try:
            coupling = couplings.sinkhorn(epsilon)
        except ImportError as error:
            print(error)
            break
        found[f"sinkhorn, epsilon {epsilon:g}"] = jax.jit(lambda key, x0, x1, pair=coupling: pair(key, x1))
    return found


def measure(size: int, repeats: int, key: jax.Array) -> dict[str, dict[str, float]]:
    """Times and costs at one size."""
    functions, keys = contenders(), jax.random.split(key, repeats + 1)
    costs: dict[str, list[float]] = {name: [] for name in functions}

    def minibatch(number: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        data_key, base_key, coupling_key = jax.random.split(keys[number], 3)
        x1 = datasets.checkerboard(data_key, size) / datasets.CHECKERBOARD_STD
        return coupling_key, couplings.independent(base_key, x1), x1

    def call(name: str, batch: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        pairs[name] = functions[name](*batch), batch[2]
        return pairs[name][0]

    def prepare(name: str, number: int) -> Any:
        note(name)
        return minibatch(number)

    def note(name: str) -> None:
        if name in pairs:
            costs[name].append(float(couplings.transport_cost(*pairs.pop(name))))

    pairs: dict[str, tuple[Any, jax.Array]] = {}
    times = timing.interleaved({name: functools.partial(call, name) for name in functions}, repeats, prepare)
    for name in functions:
        note(name)
    # The first round compiles; its pairs are not counted.
    costs = {name: values[1:] for name, values in costs.items()}
    return {
        name: {
            "milliseconds": 1e3 * times.median(name),
            "cost": float(np.mean(costs[name])),
            "cost_error": float(np.std(costs[name], ddof=1) / np.sqrt(repeats)),
            "first_call_seconds": times.first[name],
        }
        for name in functions
    }


def run(config: Config) -> None:
    """Measures and writes everything to ``config.out``."""
    config.check()
    keys = jax.random.split(jax.random.key(config.seed), len(config.sizes))
    table = {size: measure(size, config.repeats, key) for size, key in zip(config.sizes, keys, strict=True)}
    header = ["points", "coupling", "ms per minibatch", "cost", "+-", "first call, s"]
    rows = [[size, name, *numbers.values()] for size, found in table.items() for name, numbers in found.items()]
    text = results.markdown(header, rows)
    results.write(config.out, {"table": table, "repeats": config.repeats}, text)


if __name__ == "__main__":
    main(Config, run)
