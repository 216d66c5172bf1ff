"""The checkerboard of 2505.18825 in the plane: how well few jumps fill a discontinuous density.

    python -m experiments.checkerboard --objective lsd --steps 9000 --batch 512 --out runs/checkerboard

It takes about five minutes on two CPU cores. The score is KL(rho_1 || histogram) in nats, from 100,000 samples and by
quadrature on [-1,1]^2, at 64x64 bins, and at 50x50 for comparison with published numbers. The table also has the score of
exact samples, which is the floor, the mass off the support and the sliced Wasserstein distance. The data are divided by
their standard deviation, because the base is N(0, I).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import drawing, options, results, run
from experiments.shared.model import Problem, build, objective_of
from experiments.shared.options import Flat, Method, Network, Optimizer
from jflow import datasets, metrics, plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.MapTraining):
    """Options of the checkerboard experiment."""

    model: Flat[Network] = dataclasses.field(default=Network(features=256, residual=False, octaves=3))
    optimizer: Flat[Optimizer] = dataclasses.field(default=Optimizer(learning_rate=3e-3))
    method: Flat[Method] = dataclasses.field(default=Method(velocity="batch"))


def problem(config: options.MapTraining) -> Problem:
    """The data and how samples are compared."""

    def sample(key: jax.Array, n: int) -> jax.Array:
        return datasets.checkerboard(key, n) / datasets.CHECKERBOARD_STD

    return Problem(
        dataset=datasets.SampledDataset(sample, config.optimizer.batch, config.seed),
        event=(2,),
        scale=datasets.CHECKERBOARD_STD,
        reference=lambda key, n: np.asarray(datasets.checkerboard(key, n)),
    )


def density(x: jax.Array) -> jax.Array:
    """The density of the board at one point."""
    return jnp.exp(datasets.checkerboard_log_density(x))


def scores(samples: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """All scores of one set of samples, in data units."""
    points = jnp.asarray(samples)
    return {
        "kl_64": float(metrics.histogram_kl(points, density, bins=64)),
        "kl_50": float(metrics.histogram_kl(points, density, bins=50)),
        "off_support": float(metrics.mass_off_support(points, lambda x: density(x) > 0).value),
        "sliced_wasserstein": float(metrics.sliced_wasserstein(jax.random.key(0), points, jnp.asarray(exact))),
    }


def main(config: Config) -> None:
    """Trains, scores and writes everything to ``config.out``."""
    if config.output.quick:
        config = options.quick(config, samples=options.QUICK_SAMPLES)
    this = problem(config)
    model = build(config.model, this)
    bound, seconds = run.train(config, this, model, run.trainer(config, this, model, objective_of(config, model)))
    drawn = drawing.write_samples(config, this, bound)
    exact = this.reference(jax.random.key(config.seed + 3), config.samples)
    table = {str(jumps): scores(points, exact) for jumps, points in drawn.items()}
    table["exact samples"] = scores(this.reference(jax.random.key(config.seed + 4), config.samples), exact)
    values = {"table": table, **run.speed(config, seconds), "config": config.kept()}
    results.write(config.out, values, results.labelled("jumps", table))
    _figure(config, drawn, exact)


def _figure(config: Config, drawn: dict[int, np.ndarray], exact: np.ndarray) -> None:
    shown = {"exact": exact, **{drawing.named(jumps): x for jumps, x in drawn.items()}}
    figure, axes = plots.panels(1, len(shown), size=(3.1, 3.2), sharey=True)
    for axis, (title, points) in zip(axes[0], shown.items(), strict=True):
        box, last = (-1.1, 1.1, -1.1, 1.1), axis is axes[0, -1]
        plots.samples_in_plane(points, extent=box, bins=128, vmax=1.0, colorbar=last, ax=axis)
        axis.set(title=title)
        axis.label_outer()
    figure.savefig(config.out / "checkerboard.png", dpi=120)


if __name__ == "__main__":
    run.main(Config, main)
