r"""Held-out log-likelihood on real data: flows and few-step maps beside classical density models.

    python -m experiments.density --data digits --out runs/density_digits
    python -m experiments.density --data breast_cancer --steps 1000 --jitter 0.2 --out runs/density_breast_cancer

The data are split into training, validation and held-out parts. The validation part chooses how long to train, the
bandwidth and the number of components. The data come from scikit-learn: 8x8 digits of 17 levels with uniform dequantisation
noise, new in every batch (x = 2(q+u)/17 - 1, ``jflow.likelihood.dequantise``), or a table with standardised columns. All
models are models of z = diag(lambda)^(-1/2) U'(x - m), where m and U diag(lambda) U' are the mean and the covariance of the
training data. Hence log rho(x) = log rho(z) - 1/2 sum log lambda.

    gaussian            z ~ N(0, I): one fitted Gaussian, which is also the base of every flow
    kernel density      normal kernels on the training data, with the bandwidth that validates best
    Gaussian mixture    full covariances, with the number and the variance floor that validate best
    flow matching       the solve of the learned velocity with the exact divergence, and with one probe of Hutchinson's
    maximum likelihood  the same network, trained from those weights on -log rho through the solve's adjoint
    map                 LSD distilled from the velocity of flow matching: the solve of the map's own diagonal
    k jumps             the map's k jumps, inverted at the data, with their determinants
    head, k jumps       the map's divergence head at the same base points, one network call per jump

Log-densities are in nats per event, with the standard error over events, and for digits also in bits per dimension. The
few-step estimates approximate flow matching's own solve, so the table has their median distance from it. The defaults of
the options, and the options of the second command, were chosen with the validation data. The digits take about twenty
minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import densities, drawing, options, results, run, sweep
from experiments.shared.model import Problem, build
from experiments.shared.options import Flat, Network, Optimizer
from jflow import bases, datasets, likelihood, objectives, plots
from jflow.types import BoundFlowMap

LEVELS = 17
TABLES = ("breast_cancer", "wine")
BANDWIDTHS = tuple(np.geomspace(0.1, 1.5, 28).tolist())
COMPONENTS = (1, 4, 16, 32)
FLOORS = (0.05, 0.1, 0.2, 0.4)
# Dequantised copies of each training image to which the classical models are fitted.
FITTED = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Training):
    """Options of the experiment."""

    out: pathlib.Path
    """Directory for table.md, results.json, density.png and the trainings."""
    data: Literal["digits", "breast_cancer", "wine"] = "digits"
    """The data set."""
    model: Flat[Network] = dataclasses.field(default=Network(features=256, depth=3, residual=False))
    optimizer: Flat[Optimizer] = dataclasses.field(default=Optimizer(steps=4000, batch=256, learning_rate=1e-3))
    looks: int = 20
    """How many times each training is evaluated on the validation data."""
    jitter: float = 0.05
    """Standard deviation of normal noise added to z in training."""
    likelihood_steps: int = 400
    """Steps of maximum likelihood."""
    likelihood_batch: int = 128
    """Samples per step of maximum likelihood."""
    likelihood_rate: float = 2e-4
    """Peak of the learning rate of maximum likelihood."""
    map_steps: int = 4000
    """Optimizer steps for the distillation of the map, and then as many for its head."""
    jumps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of jumps of the few-step estimates."""
    noises: int = 4
    """Dequantised copies of each held-out image."""

    def check(self) -> None:
        """As ``Training.check``."""
        super().check()
        options.positive(self, "looks", "likelihood_steps", "likelihood_batch", "map_steps", "noises")
        if not self.jumps or min(self.jumps) < 1:
            raise ValueError(f"--jumps: expected positive numbers, got {self.jumps}")
        if not 0.0 <= self.jitter < float("inf"):
            raise ValueError(f"--jitter: expected a number from 0, got {self.jitter}")

    def kept(self) -> dict[str, Any]:
        """As ``Training.kept``, without what measures and does not train. The velocity is estimated from each pair."""
        kept = {k: v for k, v in super().kept().items() if k not in ("jumps", "noises")}
        return kept | {"velocity": "pair"}


# --- data -------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """A data set in three parts, as z.

    Attributes:
      sample: ``(key, n) -> z [n, d]``: training rows, dequantised anew; traced.
      train: ``[N, d]``; of images a few dequantisations each.
      validation: ``[V, d]``.
      held_out: ``[M, d]``, where ``noises`` rows in turn are of one event.
      noises: how many.
      log_volume: log rho(x) - log rho(z).
      levels: of the pixels, 0 for a table.
    """

    sample: Callable[[jax.Array, int], jax.Array]
    train: jax.Array
    validation: jax.Array
    held_out: jax.Array
    noises: int
    log_volume: float
    levels: int


def load(config: Config) -> Data:
    """The data set of the configuration; the split depends on nothing but its name."""
    levels = LEVELS if config.data == "digits" else 0
    if levels:
        split = datasets.digits()
        rest, out = (np.rint((part.x1.reshape(-1, 64) + 1.0) * 8.0).astype(np.int32) for part in split)
    else:
        from sklearn import datasets as tables

        values = getattr(tables, f"load_{config.data}")().data
        order = np.random.default_rng(0).permutation(len(values))
        out, rest = np.split(values[order], [len(values) // 5])
    order = np.random.default_rng(1).permutation(len(rest))
    validation, train = np.split(rest[order], [len(rest) // 8])
    if not levels:
        middle, scale = train.mean(axis=0), train.std(axis=0)
        train, validation, out = ((part - middle) / scale for part in (train, validation, out))
    noises = config.noises if levels else 1

    def continuous(key: jax.Array, rows: jax.Array) -> jax.Array:
        return likelihood.dequantise(key, rows, levels, dtype=jnp.float32) if levels else rows

    dtype = np.int32 if levels else np.float32
    fitted = np.repeat(train, FITTED if levels else 1, axis=0)
    parts = [jnp.asarray(part.astype(dtype)) for part in (fitted, validation, np.repeat(out, noises, axis=0))]
    keys = jax.random.split(jax.random.key(2), 3)
    fixed = [continuous(key, part) for key, part in zip(keys, parts, strict=True)]
    mean = np.asarray(fixed[0], np.float64).mean(axis=0)
    variances, basis = np.linalg.eigh(np.cov(np.asarray(fixed[0], np.float64).T))
    turn = jnp.asarray(basis / np.sqrt(variances)[None], jnp.float32)

    def whiten(x: jax.Array) -> jax.Array:
        return jnp.matmul(x - jnp.asarray(mean, jnp.float32)[None], turn, precision=jax.lax.Precision.HIGHEST)

    def sample(key: jax.Array, n: int) -> jax.Array:
        row_key, noise_key, jitter_key = jax.random.split(key, 3)
        rows = parts[0][jax.random.randint(row_key, (n,), 0, len(parts[0]))]
        z = whiten(continuous(noise_key, rows))
        return z + config.jitter * jax.random.normal(jitter_key, z.shape, z.dtype)

    log_volume = float(-0.5 * np.log(variances).sum())
    return Data(sample, *(whiten(part) for part in fixed), noises, log_volume, levels)


# --- the classics -----------------------------------------------------------------------------------------------------


def kernel_density(data: Data) -> tuple[np.ndarray, dict[str, float]]:
    """The log-density of the held-out z under normal kernels, and the bandwidth."""
    from sklearn.neighbors import KernelDensity

    fits = [KernelDensity(bandwidth=h).fit(np.asarray(data.train)) for h in BANDWIDTHS]
    best = max(range(len(fits)), key=lambda i: fits[i].score(np.asarray(data.validation)))
    return fits[best].score_samples(np.asarray(data.held_out)), {"bandwidth": BANDWIDTHS[best]}


def gaussian_mixture(data: Data, components: Sequence[int]) -> tuple[np.ndarray, dict[str, float]]:
    """The log-density of the held-out z under a mixture of full covariances, and what was chosen."""
    from sklearn.mixture import GaussianMixture

    points = np.asarray(data.train, np.float64)
    best, chosen = None, {}
    for count in components:
        for floor in FLOORS:
            fit = GaussianMixture(count, reg_covar=floor, random_state=0).fit(points)
            score = fit.score(np.asarray(data.validation))
            if best is None or score > best[0]:
                best, chosen = (score, fit), {"components": count, "floor": floor}
    return best[1].score_samples(np.asarray(data.held_out)), chosen


# --- the flows --------------------------------------------------------------------------------------------------------


class Flows(NamedTuple):
    """What was trained.

    Attributes:
      velocity: by flow matching.
      likely: by maximum likelihood.
      few_steps: the distilled map.
      headed: the same with its head.
    """

    velocity: BoundFlowMap
    likely: BoundFlowMap
    few_steps: BoundFlowMap
    headed: BoundFlowMap


def score_of(data: Data) -> Callable[[BoundFlowMap], float]:
    """Nats per validation event by the solve."""

    def score(bound: BoundFlowMap) -> float:
        return -float(jnp.mean(densities.solved_at_data(bound, data.validation).log_density))

    return score


def score_every(config: Config) -> int:
    """Steps between two scores: ``looks`` of them in a training, at rows of metrics."""
    steps, log_every = config.optimizer.steps, config.output.log_every
    return log_every * max(1, steps // (config.looks * log_every))


def train(config: Config, data: Data) -> Flows:
    """All trainings; the velocities are those of the lowest validation score."""
    dim = data.train.shape[1]
    score, first = score_of(data), config.optimizer

    def stage(name: str, steps: int, rate: float, batch: int) -> tuple[Config, Problem]:
        there = options.replace(
            config,
            out=config.out / name,
            # A run that was stopped has some of its stages and not others.
            resume="auto" if config.output.resume == "yes" else config.output.resume,
            steps=steps,
            learning_rate=rate,
            batch=batch,
            warmup=min(config.optimizer.warmup, steps // 10),
            log_every=max(1, min(config.output.log_every, steps // config.looks)),
        )
        dataset = datasets.SampledDataset(data.sample, batch, config.seed)
        return there, Problem(dataset, (dim,), 1.0, lambda key, n: np.asarray(data.held_out[:n]))

    there, problem = stage("flow_matching", first.steps, first.learning_rate, first.batch)
    model = build(config.model, problem)
    flow_map, path = model.flow_map, model.interpolant
    every = score_every(there)
    this = run.trainer(there, problem, model, objectives.flow_matching(flow_map, path))
    velocity, _ = run.train(there, problem, model, this, score=score, score_every=every)

    there, problem = stage(
        "maximum_likelihood", config.likelihood_steps, config.likelihood_rate, config.likelihood_batch
    )
    every = score_every(there)
    objective = densities.maximum_likelihood(flow_map, likelihood.hutchinson())
    this = run.trainer(there, problem, model, objective, params=velocity.params)
    likely, _ = run.train(there, problem, model, this, score=score, score_every=every)

    there, problem = stage("map", config.map_steps, first.learning_rate, first.batch)
    objective = objectives.lsd(flow_map, path, teacher=flow_map.velocity)
    this = run.trainer(there, problem, model, objective, params=velocity.params, teacher=velocity.params)
    few_steps, _ = run.train(there, problem, model, this)
    headed = densities.train_head(there, problem, few_steps, path, divergence=likelihood.hutchinson())
    return Flows(velocity, likely, few_steps, headed)


def flow_densities(flows: Flows, z: jax.Array, jumps: Sequence[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each estimator (log rho(z), whether it is valid), in the order of the table."""
    keys = jax.random.split(jax.random.key(8), len(z))
    found = {
        "flow matching": densities.solved_at_data(flows.velocity, z),
        "flow matching, one probe": densities.solved_at_data(flows.velocity, z, keys, 1),
        "maximum likelihood": densities.solved_at_data(flows.likely, z),
        "map, its own solve": densities.solved_at_data(flows.few_steps, z),
    }
    for k in jumps:
        grid = densities.grid_of(k)
        at = densities.at_data(flows.few_steps, z, grid)
        name = drawing.named(k)
        found[name] = at
        found[f"head, {name}"] = at._replace(log_density=densities.head_at(flows.headed, at.x0, grid))
    return {name: (np.asarray(at.log_density, np.float64), np.asarray(at.valid)) for name, at in found.items()}


# --- the table --------------------------------------------------------------------------------------------------------


def summary(log_density: np.ndarray, valid: np.ndarray, solve: np.ndarray, data: Data) -> dict[str, float]:
    """Nats per held-out event, with the standard error over events, and the distance from a solve's."""
    valid = valid & np.isfinite(log_density)
    events = np.where(valid, log_density, np.nan).reshape(-1, data.noises)
    seen = valid.reshape(-1, data.noises).all(axis=1)
    nats = -(events[seen].mean(axis=1) + data.log_volume)
    found = {
        "nats": float(nats.mean()) if len(nats) else float("nan"),
        "error": float(nats.std(ddof=1) / np.sqrt(len(nats))) if len(nats) > 1 else float("nan"),
        "valid": float(seen.mean()),
        "from_solve": float(np.nanmedian(np.abs(log_density - solve)[valid])) if valid.any() else float("nan"),
    }
    if data.levels:
        bits = likelihood.bits_per_dim(-nats, data.train.shape[1], levels=data.levels)
        found["bits"] = float(np.mean(bits)) if len(nats) else float("nan")
    return found


def quick(config: Config) -> Config:
    """A small run."""
    small = {"steps": 8, "log_every": 4, "warmup": 1, "features": 16, "depth": 1, "batch": 32}
    few = {"looks": 2, "likelihood_steps": 4, "likelihood_batch": 16, "map_steps": 8, "noises": 1, "jumps": (1,)}
    return options.quick(config, **small, **few)


def main(config: Config) -> None:
    """Trains, compares and writes everything to ``config.out``.

    Raises:
      ValueError: with several processes.
    """
    sweep.one_process()
    if config.output.quick:
        config = quick(config)
    data = load(config)
    if config.output.quick:
        data = data._replace(held_out=data.held_out[:16], validation=data.validation[:8])
    flows = train(config, data)
    gaussian = np.asarray(jax.vmap(bases.STANDARD_NORMAL.log_density)(data.held_out), np.float64)
    components = COMPONENTS[:2] if config.output.quick else COMPONENTS
    (kernels, bandwidth), (mixture, chosen) = kernel_density(data), gaussian_mixture(data, components)
    sure = np.ones(len(gaussian), bool)
    found = {
        "gaussian": (gaussian, sure),
        f"kernel density, bandwidth {bandwidth['bandwidth']:.2g}": (kernels, sure),
        f"Gaussian mixture, {chosen['components']} components, floor {chosen['floor']:g}": (mixture, sure),
        **flow_densities(flows, data.held_out, config.jumps),
    }
    solve = found["flow matching"][0]
    table = {name: summary(*both, solve, data) for name, both in found.items()}
    bits = ["bits"] if data.levels else []
    header = [
        "model",
        "nats",
        "+-",
        *(["bits per dimension"] if bits else []),
        "valid",
        "median distance from the solve",
    ]
    lines = [
        [name, *(row[key] for key in ("nats", "error", *bits, "valid", "from_solve"))] for name, row in table.items()
    ]
    kept = {name: np.where(valid, log_density, np.nan) for name, (log_density, valid) in found.items()}
    np.savez(config.out / "densities.npz", **kept)
    values = {
        "table": table,
        "chosen": {**bandwidth, **chosen},
        "rows": {name: len(getattr(data, name)) for name in ("train", "validation", "held_out")},
        "config": config.kept(),
    }
    results.write(config.out, values, results.markdown(header, lines, digits=5))
    _figure(config, table, found)


def _figure(config: Config, table: dict[str, Any], found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    figure, axes = plots.panels(1, 3, size=(5.6, 5.0))
    left, *others = axes[0]
    nats, errors = ([row[key] for row in table.values()] for key in ("nats", "error"))
    left.errorbar(nats, range(len(table)), xerr=errors, fmt="o", capsize=3)
    left.set_yticks(range(len(table)), list(table))
    left.invert_yaxis()
    left.set(xlabel="nats per held-out event (lower is better)", title=config.data)
    solve = found["flow matching"][0]
    for axis, prefix in zip(others, ("", "head, "), strict=True):
        names = [prefix + drawing.named(k) for k in config.jumps[::2]]
        plots.against(solve, {name: np.where(found[name][1], found[name][0], np.nan) for name in names}, ax=axis)
        axis.set(xlabel="log rho(z) by flow matching's solve, nats", ylabel="estimate, nats")
    figure.savefig(config.out / "density.png", dpi=110)


if __name__ == "__main__":
    run.main(Config, main)
