"""The main experiment: a flow map of handwritten digits (8x8, scikit-learn), compared with the ODE solves that it replaces.

    python -m experiments.digits --out runs/digits

It trains a class-conditional flow map and draws digits in one to sixteen jumps. The score is the energy distance to
held-out digits in the features of a small classifier; the distance between two sets of real digits is its floor. At the end
it prints the table of ``benchmarks.solver_vs_map``. On two shared CPU cores it took 11 minutes. Expected: one jump
scores about as well as a 100-step Euler solve of the same network's diagonal, and is more than 50 times faster.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import drawing, options, results, run, solver_table
from experiments.shared.model import Problem, build, objective_of
from experiments.shared.options import Flat, Optimizer
from jflow import datasets, metrics, plots, solvers
from jflow.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.MapTraining):
    """Options of the digits experiment."""

    optimizer: Flat[Optimizer] = dataclasses.field(default=Optimizer(steps=5000, batch=256))
    samples: int = 2000


@functools.cache
def classifier_features() -> Callable[[jax.Array], jax.Array]:
    """The hidden layer (64 rectified units) of a perceptron trained to tell the digits of the training split apart."""
    from sklearn.neural_network import MLPClassifier

    train = datasets.digits().train
    classifier = MLPClassifier((64,), alpha=1e-3, max_iter=300, random_state=0)
    classifier.fit(train.x1.reshape(len(train.x1), -1), train.cond)
    weights = jnp.asarray(classifier.coefs_[0], jnp.float32)
    bias = jnp.asarray(classifier.intercepts_[0], jnp.float32)
    return lambda x: jax.nn.relu(x.reshape(x.shape[0], -1) @ weights + bias[None])


def problem(config: options.MapTraining) -> Problem:
    """The data and how samples are compared."""
    split = datasets.digits()
    classes = jnp.asarray(split.train.cond)
    dataset = datasets.ArrayDataset(
        Batch(jnp.asarray(split.train.x1), cond=classes), config.optimizer.batch, config.seed
    )
    return Problem(
        dataset=dataset,
        event=(8, 8, 1),
        scale=1.0,
        reference=lambda key, n: split.held_out.x1[:n],
        labels=lambda key, n: jax.random.choice(key, classes, (n,)),
        classes=10,
        features=classifier_features(),
    )


def main(config: Config) -> None:
    """Trains, scores, draws, benchmarks, and writes everything to ``config.out``."""
    if config.output.quick:
        config = options.quick(config, samples=options.QUICK_SAMPLES)
    this = problem(config)
    model = build(config.model, this)
    bound, seconds = run.train(config, this, model, run.trainer(config, this, model, objective_of(config, model)))
    drawn = drawing.write_samples(config, this, bound)

    # The 100-step Euler solve of the same diagonal, from the same noise and labels.
    noise_key, _ = jax.random.split(jax.random.key(config.seed + 1))
    labels = jnp.asarray(np.load(config.out / "labels.npy"))
    euler = solvers.solve(model.flow_map.velocity, "euler", steps=100).bind(bound.params)
    solved = drawing.draw(euler, noise_key, 1, config.samples, this.event, labels)

    held_out = this.features(jnp.asarray(this.reference(jax.random.key(0), 10**6)))
    train = datasets.digits().train.x1

    def score(samples: np.ndarray) -> list[float]:
        estimate = metrics.energy_distance(this.features(jnp.asarray(samples)), held_out)
        return [float(estimate.value), float(estimate.standard_error)]

    table = {
        **{drawing.named(jumps): score(x) for jumps, x in drawn.items()},
        "100 Euler steps": score(solved),
        "real digits (floor)": score(train),
    }
    text = results.markdown(["digits", "energy distance", "standard error"], [[k, *v] for k, v in table.items()])
    values = {"energy_distance": table, **run.speed(config, seconds), "config": config.kept()}
    results.write(config.out, values, text)
    _figure(config, drawn, solved, np.asarray(labels))
    solver_table.write(config.out, config.out / "solver_vs_map", quick=config.output.quick)
    print(f"pictures: {config.out / 'digits.png'}, {config.out / 'solver_vs_map' / 'solver_vs_map.png'}")


def _figure(config: Config, drawn: dict[int, np.ndarray], solved: np.ndarray, labels: np.ndarray) -> None:
    real = datasets.digits().held_out
    shown = {
        "real, held out": (real.x1, real.cond),
        "one jump": (drawn[1], labels),
        "four jumps": (drawn[4], labels),
        "100 Euler steps": (solved, labels),
    }
    columns = 8
    figure, axes = plots.panels(1, len(shown), size=(3.2, 4.2))
    for axis, (title, (images, classes)) in zip(axes[0], shown.items(), strict=True):
        # One row for each class; the paper is white (-1) where a class has fewer digits.
        grid = np.full((10, columns, 8, 8), -1.0)
        for row in range(10):
            found = images[np.flatnonzero(classes == row)[:columns], :, :, 0]
            grid[row, : len(found)] = found
        plots.image_grid(grid.reshape(-1, 8, 8), columns=columns, vmin=1.0, vmax=-1.0, ax=axis)
        axis.set(title=title)
        axis.set_yticks(9 * np.arange(10) + 3.5, map(str, range(10)))
    axes[0, 0].set(ylabel="class")
    figure.savefig(config.out / "digits.png", dpi=130)


if __name__ == "__main__":
    run.main(Config, main)
