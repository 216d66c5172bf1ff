r"""The bias ledger: what each fast method gives up against the exact density, and what importance weights give back.

    python -m experiments.bias --out runs/bias

The targets are Gaussian mixtures in 2 and 16 dimensions, whose density rho is known. The methods are flow matching, maximum
likelihood (from flow matching's weights), consistency training, MeanFlow, LSD, and LSD distilled from flow matching. Each
draws samples in 1, 2, 4 and 8 jumps: Euler steps for the first two, jumps with new noise between them for the consistency
model. Methods that learn a velocity also draw by solving its ODE. Rows that exist already are kept, so the command may be
stopped and repeated. It takes about an hour and a half on two CPU cores, most of it in 16 dimensions.

The table has, for N samples x ~ q of each sampler, where q is the density of the sampler that ran (``jflow.likelihood``):

    KL(q, rho)    E_q[log q - log rho], in nats
    KL(rho, q)    E_rho[log rho - log q], in nats, at data, with the jumps inverted
    nats          of data, E_rho[-log q], to compare with the entropy E_rho[-log rho]; of samples, E_q[-log rho]
    mean, cov     |E_q x - m|/sqrt(tr C) and |E_q (x-m)(x-m)' - C|_F/|C|_F, with the exact mean m and covariance C
    z             the root mean square of these differences in units of their standard errors: about 1 without bias
    distance      the energy distance to exact samples

Mean, cov, z and distance are given a second time under the self-normalised weights rho/q, with the effective sample size
(ESS). The weights remove the bias, so z is about 1, provided that q covers all of rho.

Where a map folds, the computed density is that of one branch, which is less than q. KL(q, rho) is then a lower bound.
KL(rho, q) and nats of data are upper bounds, taken over the data whose preimage was found; the share of these is in
brackets. The column "folded" is the share of samples with a negative determinant. The weights carry the sign of the
determinant; log Z, whose exact value is 0, is also given without the sign.

For the consistency model with more than one jump, q is the density given the batch. Both KLs and nats are then upper
bounds. Its samples are one from each component of a mixture, so z of the weighted moments is below 1.

A second table has the errors of each estimator of the log-density, at data x ~ rho, against log rho: the determinants of
the jumps, the divergence head, the solve with the exact divergence, and the solve with one probe of Hutchinson's estimator.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import bias_tables
from experiments.shared import densities, drawing, mixtures, options, results, run, sweep
from experiments.shared.model import Model, Problem, build
from experiments.shared.options import Flat, Optimizer, Report, Size
from jflow import datasets, interpolants, likelihood, objectives, oracles, training
from jflow.likelihood import LogDensity
from jflow.types import BoundFlowMap

BASELINE = "flow_matching"
# One draws by Euler steps, the other by jumps; the second has a teacher and a head.
QUICK_ROWS = (BASELINE, "lsd, distilled")
# Samples for the entropies of the targets.
ENTROPY = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Sweep):
    """Options of the ledger."""

    out: pathlib.Path = pathlib.Path("runs/bias")
    dims: tuple[int, ...] = (2, 16)
    """Dimensions of the mixtures."""
    seeds: int = 1
    """Number of seeds (0, 1, ...) for each method."""
    model: Flat[Size] = dataclasses.field(default=Size(features=128, depth=4, residual=False))
    """In two dimensions; above that the networks are twice as wide."""
    optimizer: Flat[Optimizer] = dataclasses.field(default=Optimizer(steps=6000, learning_rate=3e-3))
    output: Flat[Report] = dataclasses.field(default=Report(log_every=250))
    points: int = 2048
    """Data points at which the log-densities are compared."""
    jumps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of jumps with which each method draws."""
    likelihood_steps: int = 400
    """Steps of maximum likelihood."""
    likelihood_batch: int = 128
    """Samples per step of maximum likelihood."""
    likelihood_rate: float = 5e-4
    """Peak of the learning rate of maximum likelihood."""
    head_steps: int = 3000
    """Optimizer steps for each divergence head."""

    def check(self) -> None:
        """As ``Training.check``, and the names of the rows."""
        super().check()
        self.check_methods(ROWS)
        options.positive(self, "seeds", "points", "likelihood_steps", "likelihood_batch", "head_steps")
        for name, low in (("dims", 2), ("jumps", 1)):
            values = getattr(self, name)
            if min(values, default=0) < low:
                raise ValueError(f"--{name}: expected whole numbers from {low}, got {values}")

    def row(self, out: pathlib.Path, dim: int = 2, seed: int = 0) -> options.RowTraining:
        """The training of a row. Every method but consistency training's estimates the velocity from each pair."""
        names = ("likelihood_steps", "likelihood_batch", "likelihood_rate", "head_steps")
        of_sweep = {"velocity": "pair"} | {name: getattr(self, name) for name in names}
        training = self.training(out, seed, {}, **of_sweep)
        return options.replace(training, features=self.model.features * (1 if dim == 2 else 2))

    def kept(self) -> dict[str, Any]:
        """The options that change a row: what its checkpoint keeps."""
        return self.row(self.out).kept()

    def of_rows(self) -> dict[str, Any]:
        """What all rows of a table have alike: a row of another configuration is refused."""
        measured = {"samples": self.samples, "points": self.points, "jumps": list(self.jumps)}
        return {k: v for k, v in self.kept().items() if k != "seed"} | measured


class Row(NamedTuple):
    """A method of the ledger.

    Attributes:
      method: of ``objectives.METHODS``; None for maximum likelihood.
      sampler: how it draws in K jumps.
      velocity: whether its diagonal is a velocity, so that it can be solved.
      taught: whether it starts from flow matching's weights, and is taught by its velocity.
      choices: ``steps -> choices`` for the method's constructor.
    """

    method: str | None
    sampler: Literal["euler", "renoised", "jumps"]
    velocity: bool = True
    taught: bool = False
    choices: Callable[[int], dict[str, Any]] = lambda steps: {}


def _shorter_steps(steps: int) -> dict[str, Any]:
    """Of half of the remaining time at first, and of a tenth at last; a chain of smaller ones would not carry to s = 0."""
    return {"fraction": optax.exponential_decay(0.5, steps, 0.1 / 0.5)}


ROWS = {
    BASELINE: Row("flow_matching", "euler"),
    "maximum_likelihood": Row(None, "euler", taught=True),
    "consistency_training": Row("consistency_training", "renoised", velocity=False, choices=_shorter_steps),
    "mean_flow": Row("mean_flow", "jumps"),
    "lsd": Row("lsd", "jumps"),
    "lsd, distilled": Row("lsd", "jumps", taught=True),
}


def target(dim: int) -> oracles.MixtureParams:
    """The plane's is that of ``experiments.mixture``; above, four components of unequal weight, place, and shape."""
    if dim == 2:
        return mixtures.target()
    random = np.random.default_rng(dim)
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    means = random.normal(size=(4, dim))
    bases = [np.linalg.qr(random.normal(size=(dim, dim)))[0] for _ in weights]
    variances = [np.exp(random.uniform(np.log(0.03), np.log(0.6), dim)) for _ in weights]
    covs = np.stack([q @ np.diag(v) @ q.T for q, v in zip(bases, variances, strict=True)])
    return oracles.mixture_params(weights, means, 0.5 * (covs + covs.swapaxes(1, 2)))


class Exact(NamedTuple):
    """The target, with what is known of it.

    Attributes:
      params: of the oracle.
      log_density: ``[N, d] -> [N]``.
      sample: ``(key, n) -> [n, d]`` float32.
      mean: ``[d]``.
      cov: ``[d, d]``.
    """

    params: oracles.MixtureParams
    log_density: Callable[[jax.Array], jax.Array]
    sample: Callable[[jax.Array, int], jax.Array]
    mean: jax.Array
    cov: jax.Array


@functools.cache
def exact(dim: int) -> Exact:
    """The target of a dimension."""
    oracle, params = oracles.mixture(interpolants.linear()), target(dim)
    weights = jnp.exp(params.log_weights)
    mean = weights @ params.means
    spread = jnp.einsum("kij,kj,klj->kil", params.bases, params.variances, params.bases)
    away = params.means - mean[None]
    cov = jnp.einsum("k,kij->ij", weights, spread + away[:, :, None] * away[:, None, :])
    return Exact(
        params,
        jax.jit(jax.vmap(lambda x: oracle.log_density(params, 1.0, x))),
        lambda key, n: oracle.sample(params, key, n).astype(jnp.float32),
        mean,
        cov,
    )


def problem(config: options.Training, dim: int) -> Problem:
    """The data of a dimension."""
    this = exact(dim)
    return Problem(
        dataset=datasets.SampledDataset(this.sample, config.optimizer.batch, config.seed),
        event=(dim,),
        scale=1.0,
        reference=lambda key, n: np.asarray(this.sample(key, n)),
    )


@functools.cache
def model_of(dim: int, network: options.Network) -> Model:
    """One object for all rows of a dimension, so that what evaluates it is compiled once."""
    return build(network, problem(options.Training(out=pathlib.Path("unused")), dim))


# --- measures ---------------------------------------------------------------------------------------------------------


# Compiled, so that weights without a positive sum give NaN and do not raise; a singular sampler has only such weights.
_expectation = jax.jit(likelihood.expectation)
_normalised = jax.jit(likelihood.normalised)
_effective = jax.jit(likelihood.effective_sample_size)


def moments(x: jax.Array, weights: jax.Array, this: Exact) -> dict[str, float]:
    """The bias of the mean and of the covariance under weights, relative, and in standard errors."""
    mean, cov = this.mean.astype(x.dtype), this.cov.astype(x.dtype)
    away = x - mean[None]
    values = {"mean": away, "cov": away[:, :, None] * away[:, None, :] - cov[None]}
    units = {"mean": jnp.sqrt(jnp.trace(cov)), "cov": jnp.linalg.norm(cov)}
    found = {}
    for name, value in values.items():
        bias, error = _expectation(weights, value)
        found[name] = float(jnp.linalg.norm(bias) / units[name])
        found[f"{name}_z"] = float(jnp.sqrt(jnp.mean((bias / error) ** 2)))
    return found


@jax.jit
def weighted_energy_distance(x: jax.Array, weights: jax.Array, y: jax.Array) -> jax.Array:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| of samples x with weights of sum 1 and exact samples y; pairs of one sample left out.

    NaN where signed weights are worth less than one sample, and pairs have no law.
    """

    def distances(a: jax.Array) -> jax.Array:
        return jax.lax.map(lambda p: jnp.sqrt(jnp.sum((p[None] - a) ** 2, axis=1)), x, batch_size=64)

    pairs = 1.0 - jnp.sum(weights**2)
    between = jnp.sum(weights * jnp.mean(distances(y), axis=1))
    within = jnp.sum(weights * jnp.sum(distances(x) * weights[None], axis=1)) / jnp.where(pairs > 0, pairs, jnp.nan)
    own = jax.lax.map(lambda p: jnp.sum(jnp.sqrt(jnp.sum((p[None] - y) ** 2, axis=1))), y, batch_size=64)
    return 2.0 * between - within - jnp.sum(own) / (len(y) * (len(y) - 1))


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean with its standard error; NaN of nothing."""
    if len(values) < 2:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def of_samples(found: LogDensity, this: Exact, key: jax.Array) -> dict[str, Any]:
    """What the samples of one sampler say, without and with weights."""
    # A singular sample has no density and no weight, but counts as drawn.
    usable = np.isfinite(found.log_density) & np.all(np.isfinite(found.x), axis=1)
    x = jnp.where(usable[:, None], found.x, 0.0)
    log_p = this.log_density(x)
    log_q, sign = jnp.where(usable, found.log_density, 0.0), jnp.where(usable, found.sign, 0.0)
    kl, error = _mean(np.asarray(log_q - log_p, np.float64)[usable])
    reference = this.sample(key, len(x)).astype(x.dtype)
    equal = (usable / np.sum(usable)).astype(x.dtype)

    def weighted(sign: jax.Array) -> dict[str, float]:
        weights, log_z, log_z_error = _normalised(log_p, log_q, sign)
        return {
            **moments(x, weights, this),
            "energy": float(weighted_energy_distance(x, weights, reference)),
            "ess": float(_effective(weights)) / len(x),
            "log_z": float(log_z),
            "log_z_error": float(log_z_error),
        }

    return {
        "kl": kl,
        "kl_error": error,
        "singular": float(1.0 - np.mean(usable)),
        "folded": float(1.0 - np.mean(found.valid)),
        "nats": float(-np.mean(np.asarray(log_p)[usable])),
        **moments(x, equal, this),
        "energy": float(weighted_energy_distance(x, equal, reference)),
        "weighted": weighted(sign),
        "without_sign": weighted(jnp.abs(sign)),
    }


def of_estimates(estimate: np.ndarray, valid: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The errors of an estimate of the log-density at data, sample by sample, in nats."""
    valid = np.asarray(valid) & np.isfinite(estimate)
    error = (np.asarray(estimate, np.float64) - truth)[valid]
    mean, standard_error = _mean(error)
    size = np.abs(error)
    return {
        "valid": float(np.mean(valid)),
        "nats": float(-np.mean(truth[valid] + error)) if len(error) else float("nan"),
        "bias": mean,
        "bias_error": standard_error,
        "rmse": float(np.sqrt(np.mean(error**2))) if len(error) else float("nan"),
        "median": float(np.median(size)) if len(error) else float("nan"),
        "worst_5_percent": float(np.quantile(size, 0.95)) if len(error) else float("nan"),
    }


# --- one row ----------------------------------------------------------------------------------------------------------


class Job:
    """One method in one dimension at one seed: its training, its head, and its measures."""

    def __init__(self, config: Config, dim: int, name: str, seed: int) -> None:
        self.name, self.row, self.dim = name, ROWS[name], dim
        out = directory(config, dim, name, seed)
        self.sweep, self.config = config, options.replace(config.row(out, dim, seed), resume="auto")
        self.this = exact(dim)
        self.model = model_of(dim, self.config.model)
        self.problem = problem(self.config, dim)
        self.teacher = None
        if self.row.taught:
            self.teacher, _ = training.restore_params(directory(config, dim, BASELINE, seed) / "map", run.AVERAGE)

    def train(self) -> BoundFlowMap:
        """The map."""
        config = options.replace(self.config, out=self.config.out / "map")
        flow_map, path, problem_, start = self.model.flow_map, self.model.interpolant, self.problem, self.teacher
        if self.row.method is None:
            config = options.replace(
                config,
                steps=self.sweep.likelihood_steps,
                batch=self.sweep.likelihood_batch,
                learning_rate=self.sweep.likelihood_rate,
                warmup=min(config.optimizer.warmup, self.sweep.likelihood_steps // 10),
                log_every=min(config.output.log_every, self.sweep.likelihood_steps),
            )
            problem_ = problem(config, self.dim)
            divergence = likelihood.exact_divergence() if self.dim == 2 else likelihood.hutchinson()
            objective = densities.maximum_likelihood(flow_map, divergence)
        else:
            choices = self.row.choices(config.optimizer.steps)
            if self.row.taught:
                choices["teacher"] = flow_map.velocity
            objective = objectives.METHODS[self.row.method].constructor(flow_map, path, **choices)
        teacher = start if self.row.method is not None else None
        this = run.trainer(config, problem_, self.model, objective, params=start, teacher=teacher)
        return run.train(config, problem_, self.model, this)[0]

    def with_head(self, bound: BoundFlowMap) -> BoundFlowMap:
        """The map of points with log-densities, with its trained head."""
        config = options.replace(self.config, steps=self.sweep.head_steps)
        divergence = likelihood.exact_divergence() if self.dim == 2 else likelihood.hutchinson()
        return densities.train_head(config, self.problem, bound, self.model.interpolant, divergence=divergence)

    def run(self) -> dict[str, Any]:
        """Trains and measures; writes estimates.npz and returns the row."""
        bound = self.train()
        headed = self.with_head(bound) if self.row.sampler == "jumps" else None
        n, dim = self.sweep.samples, self.dim
        noise_key, data_key, probe_key, again_key, exact_key = jax.random.split(jax.random.key(self.config.seed + 7), 5)
        x0 = drawing.noise(noise_key, n, (dim,))
        x = self.this.sample(data_key, self.sweep.points)
        truth = np.asarray(self.this.log_density(x), np.float64)
        samples, estimates, kept = {}, {}, {"truth": truth}

        def note(name: str, at: LogDensity | jax.Array, valid: Any = True) -> None:
            log_density = at.log_density if isinstance(at, LogDensity) else at
            valid = at.valid if isinstance(at, LogDensity) else valid
            kept[name] = np.where(np.asarray(valid), np.asarray(log_density, np.float64), np.nan)
            estimates[name] = of_estimates(kept[name], np.asarray(valid), truth)

        for jumps in self.sweep.jumps:
            there, at = self._through(bound, jumps, x0, x, again_key)
            samples[str(jumps)] = of_samples(there, self.this, exact_key)
            note(f"determinant, {jumps}", at)
            if headed is not None:
                note(f"head, {jumps}", densities.head_at(headed, at.x0, densities.grid_of(jumps)), at.valid)
        if self.row.velocity:
            samples["solve"] = of_samples(densities.solved_samples(bound, x0), self.this, exact_key)
            note("solve", densities.solved_at_data(bound, x))
            keys = jax.random.split(probe_key, len(x))
            note("solve, one probe", densities.solved_at_data(bound, x, keys, 1))
        np.savez(self.config.out / "estimates.npz", **kept)
        return {"name": self.name, "dim": dim, "seed": self.config.seed, "samples": samples, "estimates": estimates}

    def _through(
        self, bound: BoundFlowMap, jumps: int, x0: jax.Array, x: jax.Array, key: jax.Array
    ) -> tuple[LogDensity, LogDensity]:
        """The samples of K jumps and the density at data."""
        grid = densities.grid_of(jumps)
        if self.row.sampler == "renoised" and jumps > 1:
            keys = jax.random.split(key, len(x0))
            return densities.renoised(bound, self.model.interpolant, keys, x0, x, grid)
        if self.row.sampler == "euler":
            bound = densities.euler(self.model.flow_map).bind(bound.params)
        return densities.pushed(bound, x0, grid), densities.at_data(bound, x, grid)


# --- the tables -------------------------------------------------------------------------------------------------------


def directory(config: Config, dim: int, name: str, seed: int) -> pathlib.Path:
    """Where a row's files are."""
    return sweep.directory(config.out, f"{dim}d", name, seed)


def jobs(config: Config) -> list[sweep.Job]:
    """The rows to run, the teacher first."""
    names = dict.fromkeys([BASELINE, *(config.methods or ROWS)])
    return [
        sweep.Job(
            f"{name}, {dim} dimensions, seed {seed}",
            directory(config, dim, name, seed),
            lambda dim=dim, name=name, seed=seed: Job(config, dim, name, seed).run(),
        )
        for dim in config.dims
        for seed in range(config.seeds)
        for name in names
    ]


def floor(config: Config, dim: int) -> dict[str, Any]:
    """The measures of exact samples, and the entropy with its standard error."""
    this = exact(dim)
    key, again = jax.random.split(jax.random.key(77))
    x = this.sample(key, config.samples)
    log_p = this.log_density(x)
    found = of_samples(LogDensity(log_p, x, x, jnp.ones(len(x), bool), jnp.ones(len(x))), this, again)
    entropy, error = _mean(-np.asarray(this.log_density(this.sample(jax.random.key(78), ENTROPY)), np.float64))
    return {"samples": found, "entropy": entropy, "entropy_error": error}


def read(config: Config, dim: int, name: str, seed: int) -> dict[str, Any] | None:
    """A row that has been written, or None; ValueError for one of another configuration."""
    return sweep.read(directory(config, dim, name, seed), config.of_rows())


def collect(config: Config) -> dict[str, Any]:
    """All rows that have been written, by dimension and name; of several seeds a list."""
    found: dict[str, Any] = {}
    for dim in config.dims:
        rows = {}
        for name in ROWS:
            rows[name] = [row for seed in range(config.seeds) if (row := read(config, dim, name, seed))]
        found[str(dim)] = {"rows": {name: row for name, row in rows.items() if row}, "floor": floor(config, dim)}
    return found


def quick(config: Config) -> Config:
    """A small run in the first dimension, of a few rows unless others are named."""
    few = {"dims": config.dims[:1], "methods": config.methods or QUICK_ROWS}
    few |= {"points": 32, "likelihood_steps": 3, "likelihood_batch": 16, "head_steps": 6, "jumps": (2,), "seeds": 1}
    return options.quick(config, steps=6, log_every=6, warmup=2, samples=128, features=8, depth=1, **few)


def main(config: Config) -> None:
    """Runs what is missing, and writes the tables and figures of all that is there to ``config.out``.

    Raises:
      ValueError: with several processes.
    """
    if config.output.quick:
        config = quick(config)
    sweep.run_missing(jobs(config), config.of_rows())
    found = collect(config)
    results.write(config.out, {"dims": found, "config": config.kept()}, bias_tables.tables(found))
    for dim in config.dims:
        bias_tables.bias_figure(config.out / f"bias_{dim}d.png", dim, found[str(dim)])
        for name in ROWS:
            path = directory(config, dim, name, 0) / "estimates.npz"
            if ROWS[name].sampler == "jumps" and path.is_file():
                picture = config.out / f"scatter_{dim}d_{name.replace(', ', '-')}.png"
                bias_tables.scatter(picture, f"{name}, {dim} dimensions", config.jumps, dict(np.load(path)))


if __name__ == "__main__":
    run.main(Config, main)
