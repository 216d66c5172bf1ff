"""An asymmetric mixture of Gaussians in the plane: the learned flow map against the exact one.

    python -m experiments.mixture --out runs/mixture

The training takes about four minutes on two CPU cores. K jumps of the map are compared with K Euler steps of the same
network's diagonal. The errors of both are against the exact flow, a solve of the closed-form velocity with a small
tolerance. Expected: the jumps have the smaller error at every K, and one jump has a smaller error than eight Euler steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import drawing, mixtures, options, results, run
from experiments.shared.model import Problem, build, objective_of
from experiments.shared.options import Flat, Method, Network, Optimizer
from jflow import diagnostics, metrics, plots, solvers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.MapTraining):
    """Options of the mixture experiment."""

    model: Flat[Network] = dataclasses.field(default=Network(features=256, depth=4, residual=False))
    optimizer: Flat[Optimizer] = dataclasses.field(default=Optimizer(learning_rate=3e-3))
    method: Flat[Method] = dataclasses.field(default=Method(velocity="batch"))
    compared: int = 4096
    """Noise points from which the maps are compared."""


def problem(config: options.MapTraining) -> Problem:
    """The data and how samples are compared."""
    return mixtures.problem(config.model.path, config.optimizer.batch, config.seed)


def main(config: Config) -> None:
    """Trains, compares and writes everything to ``config.out``."""
    if config.output.quick:
        config = options.quick(config, samples=options.QUICK_SAMPLES, compared=256)
    this = problem(config)
    model = build(config.model, this)
    bound, seconds = run.train(config, this, model, run.trainer(config, this, model, objective_of(config, model)))
    drawn = drawing.write_samples(config, this, bound)

    # One Euler step of the diagonal is a flow map too: K jumps of it are K Euler steps.
    exact = mixtures.oracle(config.model.path).flow_map.bind(mixtures.target())
    euler = solvers.solve(model.flow_map.velocity, "euler", steps=1).bind(bound.params)
    x0_key, x1_key, noise_key, times_key = jax.random.split(jax.random.key(config.seed + 2), 4)
    x0 = drawing.noise(x0_key, config.compared, (2,))
    errors = diagnostics.compare({"map": bound, "euler": euler}, exact, x0, drawing.JUMPS)
    reference = this.reference(x1_key, config.samples)
    table = {}
    for jumps in drawing.JUMPS:
        found = {row["map"]: row for row in errors.rows() if row["jumps"] == jumps}
        entry = {f"{name}_{what}": found[name][what] for what in ("rmse", "median") for name in ("map", "euler")}
        distance = metrics.sliced_wasserstein(jax.random.key(0), jnp.asarray(drawn[jumps]), jnp.asarray(reference))
        table[jumps] = {**entry, "sliced_wasserstein": float(distance)}
    x1 = jnp.asarray(this.reference(noise_key, config.compared))
    residuals = diagnostics.consistency_report(bound, model.interpolant, times_key, x0, x1, reference=exact)

    values = {"table": table, "residuals": residuals, **run.speed(config, seconds), "config": config.kept()}
    results.write(config.out, values, results.labelled("jumps or steps", table))
    _figure(config, table, drawn, reference)


def _figure(config: Config, table: dict, drawn: dict, exact: np.ndarray) -> None:
    figure, axes = plots.panels(1, 4, size=(4.0, 3.8))
    lines = {
        f"{name}, {label}": (list(table), [row[f"{name}_{what}"] for row in table.values()])
        for what, label in (("rmse", "RMSE"), ("median", "median"))
        for name in ("map", "euler")
    }
    formats = {"map, RMSE": "C0o-", "euler, RMSE": "C1s-", "map, median": "C0o:", "euler, median": "C1s:"}
    plots.curves(lines, formats=formats, ax=axes[0, 0])
    axes[0, 0].set(xscale="log", yscale="log", xlabel="jumps, or Euler steps", ylabel="error against the exact map")
    axes[0, 0].set_xticks(list(table), map(str, table))
    axes[0, 0].set_xticks([], minor=True)
    shown = {"exact": exact, "one jump": drawn[1], "four jumps": drawn[4]}
    vmax = None
    for axis, (title, points) in zip(axes[0, 1:], shown.items(), strict=True):
        box, last = (-3.0, 3.0, -3.0, 3.0), axis is axes[0, -1]
        plots.samples_in_plane(points, extent=box, vmax=vmax, colorbar=last, ax=axis)
        axis.set(title=title)
        # All have the colours of the exact samples.
        vmax = axis.images[0].get_clim()[1]
    figure.savefig(config.out / "mixture.png", dpi=120)


if __name__ == "__main__":
    run.main(Config, main)
