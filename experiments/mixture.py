"""An asymmetric mixture of Gaussians in the plane: the learned flow map against the exact one.

    python -m experiments.mixture --out runs/mixture

trains the default in about four minutes on two CPU cores. K jumps of the map are compared with K Euler steps of the same
network's diagonal, both against the exact flow (a tight solve of the closed-form velocity). Expected: the jumps win at every
K, and one jump beats eight Euler steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from jflow import datasets, diagnostics, interpolants, metrics, oracles, solvers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Options of the mixture experiment."""

    steps: int = 12_000
    features: int = 256
    depth: int = 4
    diagonal_start: float = 0.2
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
    """The exact velocity and map on the experiment's path."""
    return oracles.mixture(interpolants.INTERPOLANTS[config.path](), rtol=1e-5, atol=1e-6)


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
        config = dataclasses.replace(config, steps=200, features=64, warmup=20, samples=2000, compared=256)
    this = problem(config)
    model = common.build(config, this)
    bound, seconds = common.train(config, this, model)
    drawn = common.write_samples(config, this, bound)

    oracle, params = oracle_of(config), target()
    x0 = jax.random.normal(jax.random.key(config.seed + 2), (config.compared, 2), jnp.float32)
    exact = oracle.flow_map.bind(params)
    rows = []
    table = {}
    truth = jax.jit(jax.vmap(lambda x: exact.jump(0.0, 1.0, x)))(x0)
    for jumps in common.JUMPS:
        euler = solvers.solve(model.flow_map.velocity, "euler", steps=jumps).bind(bound.params)
        errors = {
            "map": jnp.linalg.norm(common.draw(bound, x0, jumps) - truth, axis=1),
            "euler": jnp.linalg.norm(common.draw(euler, x0, 1) - truth, axis=1),
        }
        entry = {
            f"{name}_{what}": float(value)
            for name, e in errors.items()
            for what, value in (("rmse", jnp.sqrt(jnp.mean(e**2))), ("median", jnp.median(e)))
        }
        exact_samples = this.reference(jax.random.key(config.seed + 3), config.samples)
        entry["sliced_wasserstein"] = float(
            metrics.sliced_wasserstein(jax.random.key(4), jnp.asarray(drawn[jumps]), jnp.asarray(exact_samples))
        )
        table[jumps] = entry
        rows.append([jumps, *entry.values()])
    residuals = diagnostics.consistency_report(
        model.flow_map,
        bound.params,
        jax.random.key(5),
        jnp.asarray(this.reference(jax.random.key(6), 256)),
        model.interpolant,
    )
    header = ["jumps or steps", *next(iter(table.values()))]
    text = common.markdown(header, rows)
    print(text)
    common.write_json(
        config.out / "results.json",
        {
            "table": table,
            "residuals": residuals,
            "training_seconds": seconds,
            "config": config.kept(),
            **common.environment(),
        },
    )
    (config.out / "table.md").write_text(text + "\n")
    _figure(config, table, drawn, np.asarray(exact_samples))


def _figure(config: Config, table: dict, drawn: dict, exact: np.ndarray) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for name, style in (("map", "o-"), ("euler", "s--")):
        axes[0].loglog(list(table), [row[f"{name}_rmse"] for row in table.values()], style, label=f"{name}, RMSE")
        axes[0].loglog(
            list(table), [row[f"{name}_median"] for row in table.values()], style, alpha=0.4, label=f"{name}, median"
        )
    axes[0].set(xlabel="jumps, or Euler steps", ylabel="error against the exact map")
    axes[0].legend()
    box = [[-3, 3], [-3, 3]]
    for axis, points, title in (
        (axes[1], exact, "exact"),
        (axes[2], drawn[1], "one jump"),
        (axes[3], drawn[4], "four jumps"),
    ):
        axis.hist2d(points[:, 0], points[:, 1], bins=120, range=box, cmap="magma")
        axis.set(title=title, aspect="equal")
    figure.savefig(config.out / "mixture.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    common.main(Config, run)
