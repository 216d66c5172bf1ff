"""The cost of dividing a training step over devices, communication included.

    python -m benchmarks.sharding_overhead [--out runs/sharding_overhead]

The same step, with the same global batch, runs on one virtual device and on two, both on one processor core. The second
device adds no computing power, so all the additional time is overhead. The network is an MLP of 4 x 512. The objectives are
``lsd``, with its usual share of diagonal rows, and ``flow_matching``. Every device holds the data and the state.

The calls are interleaved. A ratio (two devices over one) is the median of the ratios within a round, by the wall clock and
by processor time, which other programs on the machine distort less. The goal is at most 1.08. The column "work" is the
compiled FLOPs of one of the two devices over those of the single device: 0.5 if the batch is divided, 1 if each device does
everything.

The program restarts itself, pinned to one core. It takes about two minutes and writes table.md and results.json.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared import results, timing
from experiments.shared.run import main
from jflow import interpolants, nets, objectives, parameterizations, sharding, training
from jflow.datasets import ArrayDataset
from jflow.types import FORWARD, Batch

GOAL = 1.08
FLAG = "--xla_force_host_platform_device_count"
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    out: pathlib.Path = pathlib.Path("runs/sharding_overhead")
    """Directory for table.md and results.json."""
    methods: tuple[Literal["lsd", "flow_matching"], ...] = ("lsd", "flow_matching")
    """Objectives to be timed."""
    batch: int = 2048
    """Samples per step, over all devices."""
    size: int = 64
    """Dimensions of a sample."""
    features: int = 512
    """Width of the network."""
    depth: int = 4
    """Hidden layers."""
    steps: int = 2
    """Steps per timed call."""
    rounds: int = 11
    """Timed calls of each."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range, and an output that is there.

        Raises:
          ValueError: naming the option, what came and what was expected.
          FileExistsError: without --overwrite.
        """
        for name in ("batch", "size", "features", "depth", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected a positive whole number, got {getattr(self, name)}")
        results.refuse_existing(self.out, self.overwrite)


class Run:
    """A training on the first so many devices.

    Attributes:
      flops: what one device does in a step, as compiled.
      collectives: how many of each kind are in the compiled program.
    """

    def __init__(self, config: Config, method: str, devices: int) -> None:
        interpolant = interpolants.linear()
        module = nets.MLP.plain(features=config.features, depth=config.depth)
        form = parameterizations.PARAMETERIZATIONS["v"](interpolant)
        flow_map = parameterizations.flow_map(nets.from_linen(module), form, FORWARD)
        # The rows of either kind are chosen within each device's share of the batch, here and on a single device.
        objective = objectives.METHODS[method].constructor(flow_map, interpolant, blocks=2)
        point = jnp.zeros((config.size,), jnp.float32)
        params = jax.jit(module.init)(jax.random.key(0), jnp.float32(0.0), jnp.float32(1.0), point)["params"]

        data = np.random.default_rng(0).normal(size=(1797, config.size)).astype(np.float32)
        dataset = ArrayDataset(Batch(data), config.batch)
        optimizer = optax.adam(1e-4)
        state = training.init_state(params, optimizer, jax.random.key(1), ema=(0.999,))
        mesh = sharding.mesh(devices=jax.devices()[:devices])
        layout = sharding.parts(state, mesh)
        step = training.make_step(objective, optimizer, ema=(0.999,))
        chunk = training.make_chunk(step, dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=layout)
        self._state = sharding.place(state, layout)
        self._data = sharding.place(dataset.data, sharding.whole(mesh))
        self._chunk = chunk.lower(self._state, self._data, config.steps).compile()
        self.flops = self._chunk.cost_analysis()["flops"]
        self.collectives = dict(collections.Counter(COLLECTIVE.findall(self._chunk.as_text())))

    def call(self, _: None = None) -> training.TrainState:
        """Runs one chunk."""
        self._state, _ = self._chunk(self._state, self._data)
        return self._state


def measure(config: Config, method: str) -> dict[str, Any]:
    """Milliseconds per step on one device and on two, ratios, work and collectives."""
    runs = {devices: Run(config, method, devices) for devices in (1, 2)}
    times = timing.interleaved({str(devices): run.call for devices, run in runs.items()}, config.rounds)

    def per_step(clock: str, devices: int) -> float:
        return 1e3 * times.median(str(devices), clock) / config.steps

    return {
        "ms_per_step": {clock: {devices: per_step(clock, devices) for devices in runs} for clock in timing.CLOCKS},
        "ratio": {clock: times.ratio("2", "1", clock) for clock in timing.CLOCKS},
        "work": runs[2].flops / runs[1].flops,
        "collectives": runs[2].collectives,
    }


def run(config: Config) -> None:
    """Measures every objective, prints the table and a line of JSON, and writes both to ``config.out``."""
    if jax.device_count() < 2:
        raise ValueError(f"devices: expected two, got {jax.devices()}; run it as a program of its own")
    measured = {method: measure(config, method) for method in config.methods}
    header = ["objective", "one device, ms", "two devices, ms", "ratio", "ratio, processor", "work", "collectives"]
    table = results.markdown(
        header,
        [
            [
                method,
                *found["ms_per_step"]["wall"].values(),
                *found["ratio"].values(),
                found["work"],
                found["collectives"],
            ]
            for method, found in measured.items()
        ],
    )
    reached = all(found["ratio"]["wall"] <= GOAL for found in measured.values())
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "overwrite")}
    record = {
        "benchmark": "sharding_overhead",
        "results": measured,
        "goal": GOAL,
        "reached": reached,
        "config": options,
    }
    record = results.write(config.out, record, table)
    print(json.dumps(record))
    print(f"goal of {GOAL} " + ("reached" if reached else "missed"))


def pin() -> None:
    """Starts this program anew on one core with two virtual devices: both must be so before jax is imported."""
    if FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=2".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    pin()
    main(Config, run)
