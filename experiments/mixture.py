"""An asymmetric mixture of Gaussians in the plane: the learned flow map against the exact one.

    python -m experiments.mixture --out runs/mixture

The training takes about four minutes on two CPU cores. K jumps of the map are compared with K Euler steps of the same
network's diagonal. The errors of both are against the exact flow, a solve of the closed-form velocity with a small
tolerance. Expected: the jumps have the smaller error at every K, and one jump has a smaller error than eight Euler steps.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from jflow import datasets, diagnostics, interpolants, metrics, oracles, plots, solvers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Options of the mixture experiment."""

    velocity: Literal["pair", "batch"] = "batch"
    learning_rate: float = 3e-3
    features: int = 256
    depth: int = 4
    residual: bool = False
    compared: int = 4096
    """Noise points from which the maps are compared."""


def target() -> oracles.MixtureParams:
    """Three components of unequal weight, place and shape: no symmetry."""
    return oracles.mixture_params(
        jnp.array([0.5, 0.3, 0.2]),
        jnp.array([[-1.0, 0.3], [1.1, 0.9], [0.4, -1.3]]),
        jnp.array([[[0.12, 0.05], [0.05, 0.08]], [[0.05, -0.02], [-0.02, 0.12]], [[0.2, 0.0], [0.0, 0.03]]]),
    )


def oracle_of(config: common.Config) -> oracles.Oracle:
    """The exact velocity and map on the experiment's path; in float32 its solve has a tolerance of 1e-5."""
    return oracles.mixture(interpolants.INTERPOLANTS[config.path]())


def problem(config: common.Config) -> common.Problem:
    """The data and how samples are compared."""
    oracle, params = oracle_of(config), target()

    def sample(key: jax.Array, n: int) -> jax.Array:
        return oracle.sample(params, key, n).astype(jnp.float32)

    return common.Problem(
        dataset=datasets.SampledDataset(sample, config.batch, config.seed),
        event=(2,),
        scale=1.0,
        reference=lambda key, n: np.asarray(sample(key, n)),
    )


def run(config: Config) -> None:
    """Trains, compares and writes everything to ``config.out``."""
    if config.quick:
        config = dataclasses.replace(config, **common.QUICK, compared=256)
    this = problem(config)
    model = common.build(config, this)
    bound, seconds = common.train(config, this, model)
    drawn = common.write_samples(config, this, bound)

    # One Euler step of the diagonal is a flow map too: K jumps of it are K Euler steps.
    exact = oracle_of(config).flow_map.bind(target())
    euler = solvers.solve(model.flow_map.velocity, "euler", steps=1).bind(bound.params)
    x0_key, x1_key, noise_key, times_key = jax.random.split(jax.random.key(config.seed + 2), 4)
    x0 = common.noise(x0_key, config.compared, (2,))
    errors = diagnostics.compare({"map": bound, "euler": euler}, exact, x0, common.JUMPS)
    reference = this.reference(x1_key, config.samples)
    table = {}
    for jumps in common.JUMPS:
        found = {row["map"]: row for row in errors.rows() if row["jumps"] == jumps}
        entry = {f"{name}_{what}": found[name][what] for what in ("rmse", "median") for name in ("map", "euler")}
        distance = metrics.sliced_wasserstein(jax.random.key(0), jnp.asarray(drawn[jumps]), jnp.asarray(reference))
        table[jumps] = {**entry, "sliced_wasserstein": float(distance)}
    x1 = jnp.asarray(this.reference(noise_key, config.compared))
    residuals = diagnostics.consistency_report(bound, model.interpolant, times_key, x0, x1, reference=exact)

    text = common.markdown(["jumps or steps", *table[1]], [[jumps, *row.values()] for jumps, row in table.items()])
    print(text)
    common.write_json(
        config.out / "results.json",
        {
            "table": table,
            "residuals": residuals,
            **common.timing(config, seconds),
            "config": config.kept(),
            **common.environment(),
        },
    )
    (config.out / "table.md").write_text(text + "\n")
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
    common.main(Config, run)
