"""The error and time of a learned flow map, beside those of ODE solves of the same network.

    python -m benchmarks.solver_vs_map --checkpoint runs/digits --out runs/digits/solver_vs_map

It reads the output of any experiment that trains a map. The map at 1, 2, 4 and 8 jumps is compared with Euler, Heun, Tsit5
and Dopri8 on the same network's diagonal, from the same noise. The table has the error against a reference solve with a
small tolerance, the distance of the samples from the reference samples, the mean number of network calls per sample (NFE),
the time per sample in microseconds, and the speed-up over 100 Euler steps. Times are medians of interleaved runs, without
compilation. The benchmark writes table.md, solver_vs_map.png and results.json.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from jflow import metrics, samplers, solvers, training
from jflow.types import BoundFlowMap

REFERENCE = ("dopri8", 1e-5)
BASELINE = "euler, 100 steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    checkpoint: pathlib.Path
    """Directory of the trained run: the --out of an experiment."""
    out: pathlib.Path
    """Directory for table.md, solver_vs_map.png and results.json."""
    batch: int = 256
    """Samples per timed call."""
    samples: int = 1024
    """Samples from which errors and distances are measured, in whole batches."""
    repeats: int = 11
    """Timed calls of each method, interleaved."""
    seed: int = 0
    """Seed of the noise."""
    quick: bool = False
    """A few methods, samples and repeats, to show that everything works."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range, and an output that is there.

        Raises:
          ValueError: naming the option, what came and what was expected.
          FileExistsError: without --overwrite.
        """
        for name in ("batch", "samples", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected a positive whole number, got {getattr(self, name)}")
        if self.samples % self.batch:
            raise ValueError(f"--samples: expected a multiple of --batch {self.batch}, got {self.samples}")
        if (self.out / "results.json").exists() and not self.overwrite:
            raise FileExistsError(f"--out: {self.out} holds results already; pass --overwrite or another directory")


class Contender(NamedTuple):
    """One way to get from noise to data.

    Attributes:
      name: as in the table.
      family: the line in the figure that it belongs to.
      run: ``(params, x0, cond) -> (x1, nfe)``, of one sample.
    """

    name: str
    family: str
    run: Any


def load(checkpoint: pathlib.Path) -> tuple[common.Config, common.Problem, common.Model, BoundFlowMap]:
    """The experiment's configuration and the map that it trained.

    Raises:
      FileNotFoundError: when there is no checkpoint.
      ValueError: when the checkpoint names no experiment of this version.
    """
    params, kept = training.restore_params(checkpoint, common.AVERAGE)
    values = dict(kept)
    name = values.pop("experiment", None)
    try:
        module = importlib.import_module(f"experiments.{name}")
        config = module.Config(out=checkpoint, **values)
    except (ImportError, TypeError) as error:
        raise ValueError(f"--checkpoint: {checkpoint} was written by no experiment of this version: {error}") from error
    problem = module.problem(config)
    model = common.build(config, problem)
    params = jax.tree.map(jnp.asarray, params)
    return config, problem, model, model.flow_map.bind(params)


def contenders(model: common.Model, quick: bool) -> list[Contender]:
    """Everything that is compared; the first is the one-jump map."""

    def mapped(jumps: int) -> Contender:
        grid = samplers.uniform_grid(jumps)

        def run(params: Any, x0: jax.Array, cond: Any) -> tuple[jax.Array, int]:
            return samplers.jumps(model.flow_map.bind(params), x0, grid, cond), jumps

        return Contender(f"map, {jumps} jump{'s' if jumps > 1 else ''}", "map", run)

    def solved(method: str, label: str, **choices: Any) -> Contender:
        count = solvers.solve_counted(model.flow_map.velocity, method, **choices)

        def run(params: Any, x0: jax.Array, cond: Any) -> tuple[jax.Array, jax.Array]:
            v, stats = count(params, 0.0, 1.0, x0, cond)
            return x0 + v, stats.nfe

        return Contender(f"{method}, {label}", method, run)

    steps = {"euler": (1, 2, 4, 8, 16, 32, 100), "heun": (1, 2, 4, 8, 16)}
    tolerances = {"tsit5": (1e-1, 1e-2, 1e-3), "dopri8": (1e-1, 1e-3)}
    if quick:
        steps, tolerances = {"euler": (1, 8, 100), "heun": (4,)}, {"tsit5": (1e-2,), "dopri8": (1e-2,)}
    return [
        *[mapped(jumps) for jumps in (1, 2, 4, 8)],
        *[solved(m, f"{n} step{'s' if n > 1 else ''}", steps=n) for m, ns in steps.items() for n in ns],
        *[solved(m, f"tolerance {tol:g}", rtol=tol, atol=tol) for m, tols in tolerances.items() for tol in tols],
    ]


def run(config: Config) -> None:
    """Measures and writes everything to ``config.out``."""
    config.check()
    if config.quick:
        config = dataclasses.replace(config, samples=64, batch=32, repeats=3)
    _, problem, model, bound = load(config.checkpoint)
    noise_key, label_key, data_key = jax.random.split(jax.random.key(config.seed), 3)
    x0 = common.noise(noise_key, config.samples, problem.event)
    labels = None if problem.labels is None else problem.labels(label_key, config.samples)
    data = problem.features(jnp.asarray(problem.reference(data_key, config.samples)))
    method, tolerance = REFERENCE
    tight = solvers.solve(model.flow_map.velocity, method, rtol=tolerance, atol=tolerance).bind(bound.params)
    truth = samplers.draw(
        samplers.Jumps(tight), noise_key, config.samples, samplers.uniform_grid(1), labels, x0=x0, block=256
    )

    entries = contenders(model, config.quick)
    cut = [slice(start, start + config.batch) for start in range(0, config.samples, config.batch)]
    blocks = [(bound.params, x0[rows], None if labels is None else labels[rows]) for rows in cut]
    timed, table = {}, {}
    for entry in entries:
        # Under jit the batch is mapped as a whole: an adaptive solve takes the steps of its hardest sample.
        function = jax.jit(jax.vmap(entry.run, in_axes=(None, 0, 0)))
        began = time.perf_counter()
        compiled = function.lower(*blocks[0]).compile()
        seconds = time.perf_counter() - began
        timed[entry.name] = compiled
        ends = [compiled(*block) for block in blocks]
        samples, nfe = jnp.concatenate([x for x, _ in ends]), jnp.stack([n for _, n in ends])
        error = jnp.sqrt(jnp.mean((samples - truth).reshape(config.samples, -1) ** 2, axis=1)) * problem.scale
        quality = metrics.energy_distance(problem.features(samples * problem.scale), data)
        table[entry.name] = {
            "family": entry.family,
            "nfe": float(jnp.mean(nfe)),
            "rmse": float(jnp.sqrt(jnp.mean(error**2))),
            "median_error": float(jnp.median(error)),
            "energy_distance": float(quality.value),
            "energy_distance_error": float(quality.standard_error),
            "compile_seconds": seconds,
        }
    times = _times(timed, blocks[0], config.repeats)
    for name, row in table.items():
        row["seconds_per_batch"] = times[name]
        row["microseconds_per_sample"] = times[name] / config.batch * 1e6
        row["speedup"] = times[BASELINE] / times[name]

    header = ["", "NFE", "RMSE", "median error", "energy distance", "+-", "us/sample", "speed-up", "compile s"]
    columns = [
        "nfe",
        "rmse",
        "median_error",
        "energy_distance",
        "energy_distance_error",
        "microseconds_per_sample",
        "speedup",
        "compile_seconds",
    ]
    text = common.markdown(header, [[name, *(row[c] for c in columns)] for name, row in table.items()])
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.md").write_text(text + "\n")
    common.write_json(
        config.out / "results.json",
        {
            "table": table,
            "reference": f"{method}, tolerance {tolerance:g}",
            "batch": config.batch,
            **common.environment(),
        },
    )
    _figure(config, table)
    print(text)


def _times(compiled: dict[str, Any], arguments: tuple, repeats: int) -> dict[str, float]:
    """Median seconds of a call of each, interleaved, so that a slow moment of the machine falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for function in compiled.values():
        jax.block_until_ready(function(*arguments))
    for _ in range(repeats):
        for name, function in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _figure(config: Config, table: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, column, label in (
        (axes[0], "nfe", "network calls per sample"),
        (axes[1], "microseconds_per_sample", "time per sample, microseconds"),
    ):
        for family in dict.fromkeys(row["family"] for row in table.values()):
            rows = [row for row in table.values() if row["family"] == family]
            axis.loglog(
                [row[column] for row in rows],
                [row["rmse"] for row in rows],
                "o-" if family == "map" else "s--",
                linewidth=2.5 if family == "map" else 1,
                label=family,
            )
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="RMSE against the tight solve")
    axes[1].legend()
    figure.savefig(config.out / "solver_vs_map.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    common.main(Config, run)
