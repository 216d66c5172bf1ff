"""Every method of the catalogue on the mixture of ``experiments.mixture``, side by side: error against the exact map, and cost.

    python -m experiments.catalogue --out runs/catalogue

All methods are trained with the same network, optimizer and number of samples, for three seeds, in about an hour and a half
on two CPU cores. ``--methods lsd mean_flow`` runs only these two. Rows that exist already are kept, so the command may be
stopped and repeated, or run at the same time on different methods. The teacher of a distillation is the flow-matching row
of the same seed, and the student starts from its weights. With ``--budget flops`` each method trains for as many FLOPs, by
XLA's count, as the flow-matching row. ``--quick`` shows in half a minute that
everything works, with a few methods unless ``--methods`` names others; its numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared import drawing, mixtures, options, results, run, sweep, timing
from experiments.shared.model import Model, build
from experiments.shared.options import Flat, Optimizer, Report, Size
from jflow import (
    couplings,
    datasets,
    diagnostics,
    metrics,
    objectives,
    plots,
    samplers,
    solvers,
    times,
    training,
)
from jflow.objectives import curriculum
from jflow.training import metrics_log
from jflow.types import BOTH, FORWARD, TO_DATA, BoundFlowMap, Domain, FlowMap

JUMPS = (1, 2, 4, 8)
BASELINE = "flow_matching"
ONE_JUMP = Domain("one jump, from 0 to 1", source=0.0, target=1.0)
FIRST_CELLS = 16
# One without and one with a teacher.
QUICK_ROWS = ("flow_matching", "lsd", "lsd, taught")
# Methods whose objective takes a step of Heun's method by Diffrax.
SOLVED = ("consistency_distillation", "ctm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Sweep):
    """Options of the catalogue."""

    seeds: int = 3
    """Number of seeds (0, 1, ...) for each row."""
    budget: Literal["samples", "flops"] = "samples"
    """What all methods have in common: the number of samples, or the FLOPs of the flow-matching row."""
    model: Flat[Size] = dataclasses.field(default=Size(features=128, depth=4, residual=False))
    optimizer: Flat[Optimizer] = dataclasses.field(default=Optimizer(steps=3000, learning_rate=3e-3))
    output: Flat[Report] = dataclasses.field(default=Report(log_every=250))
    watch: options.WatchingSamples = dataclasses.field(default=options.WatchingSamples())
    velocity: Literal["pair", "batch"] = "pair"
    """The estimate of the velocity of methods without a teacher, on independent pairs of noise and data."""
    compared: int = 4096
    """Noise points from which the maps are compared."""
    pool: int = 65536
    """Pairs made before the training, for reflow and optimal transport."""
    timed: int = 11
    """How many times each step is timed, in turns with the others; 0 measures neither times nor FLOPs."""

    def check(self) -> None:
        """As ``Training.check``, and the names of the methods."""
        super().check()
        self.check_methods(ROWS)
        if self.seeds < 1 or self.pool < self.optimizer.batch or self.compared < 1 or self.timed < 0:
            raise ValueError(
                "--seeds, --pool, --compared, --timed: expected positive numbers, a pool of one batch at least"
            )

    def row(self, out: pathlib.Path, seed: int = 0, **network: Any) -> options.RowTraining:
        """The training of a row; ``network`` are its choices of path and parameterization."""
        return self.training(out, seed, network, velocity=self.velocity, budget=self.budget, pool=self.pool)

    def kept(self) -> dict[str, Any]:
        """The options that change a row: what its checkpoint keeps."""
        return self.row(self.out).kept()

    def of_rows(self) -> dict[str, Any]:
        """What all rows of a table have alike: a row of another configuration is refused."""
        measured = {"samples": self.samples, "compared": self.compared}
        return {k: v for k, v in self.kept().items() if k != "seed"} | measured


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      method: of ``objectives.METHODS``.
      path, parameterization: of the map.
      pairs: "data" (independent noise), "reflow" (from a solve of the teacher) or "ot" (minibatch optimal transport).
      teacher: the row whose velocity is distilled, or whose solve makes the pairs.
      start: whether the student starts from the teacher's weights.
      choices: ``optimizer -> choices`` for the constructor; a function, because some depend on the number of steps.
      domain: the domain of the map.
      decoupled: number of last layers that see t alone; it does not change the parameters.
      trained: the domain in which the map is trained and measured, if it is not that of its objective.
    """

    method: str
    path: str = "linear"
    parameterization: str = "gaussian"
    pairs: str = "data"
    teacher: str = ""
    start: bool = False
    choices: Callable[[Optimizer], dict[str, Any]] = lambda optimizer: {}
    domain: Domain = FORWARD
    trained: Domain | None = None
    decoupled: int = 0


def _fall(first: float, last: float) -> Callable[[Optimizer], dict[str, Any]]:
    """A share that falls geometrically during the whole of the training."""
    return lambda config: {"fraction": optax.exponential_decay(first, config.steps, last / first)}


def _stairs(first: float, last: float, every: int) -> optax.Schedule:
    """From the first to the last value by doubling or halving, ``every`` steps each."""
    return optax.exponential_decay(first, max(every, 1), 2.0 if last > first else 0.5, staircase=True, end_value=last)


def _warmup(config: Optimizer) -> dict[str, Any]:
    return {"warmup": optax.linear_schedule(0.0, 0.99, max(config.steps // 4, 1))}


def _stage(config: Optimizer) -> int:
    return max(config.steps // FIRST_CELLS.bit_length(), 1)


def _rows() -> dict[str, Row]:
    taught = {"teacher": BASELINE, "start": True}
    special = {
        "reflow": Row("reflow", pairs="reflow", **taught),
        "progressive_distillation": Row("progressive_distillation", trained=ONE_JUMP, **taught),
        "fmm": Row("fmm", domain=BOTH),
        "shortcut": Row("shortcut", choices=lambda config: {"levels": 5}),
        # Steps of at least a tenth of the remaining time. In a training this short, a chain of smaller steps would not
        # carry to s = 0 what is learned near t = 1.
        "consistency_training": Row("consistency_training", choices=_fall(0.5, 0.1)),
        "consistency_distillation": Row("consistency_distillation", choices=lambda c: {"fraction": 0.2}, **taught),
        "ict": Row("ict", choices=lambda c: {"cells": _stairs(4.0, 16.0, c.steps // 4)}),
        "ect": Row("ect", choices=lambda c: {"fraction": _stairs(1.0, 0.1, c.steps // 6)}, **taught),
        # Most of its residual is near the data, where consistency models put most of their samples (2310.14189).
        "facm": Row("facm", choices=lambda c: {"pairs": times.to_data(times.logit_normal(1.1, 2.0))}, trained=TO_DATA),
        "sct": Row("sct", path="trigonometric", parameterization="trigonometric"),
        "scd": Row(
            "scd",
            path="trigonometric",
            parameterization="trigonometric",
            teacher=f"{BASELINE}, trigonometric",
            start=True,
        ),
        "pixel_mean_flow": Row("pixel_mean_flow", parameterization="x"),
        "alpha_flow": Row(
            "alpha_flow",
            choices=lambda c: {"alpha": curriculum.falling_sigmoid(0.4 * c.steps, 0.06 * c.steps, 0.01)},
        ),
        "soflow": Row("soflow", choices=_fall(0.5, 0.02)),
        "decoupled_mean_flow": Row("decoupled_mean_flow", decoupled=2, **taught),
        "ayf_emd": Row("ayf_emd", choices=_warmup, **taught),
        "ayf_lmd": Row("ayf_lmd", choices=_warmup, **taught),
    }
    rows = {}
    for name, method in objectives.METHODS.items():
        rows[name] = special.get(name) or Row(name, **(taught if "teacher" in method.needs else {}))
    extra = {
        f"{BASELINE}, trigonometric": Row(BASELINE, path="trigonometric", parameterization="trigonometric"),
        f"{BASELINE}, optimal transport": Row(BASELINE, pairs="ot"),
        "lsd, optimal transport": Row("lsd", pairs="ot"),
        "lsd, taught": Row("lsd", **taught),
        "mean_flow, taught": Row("mean_flow", **taught),
    }
    return {**rows, **extra}


ROWS = _rows()


# --- One row ---------------------------------------------------------------------------------------------------------


class Job:
    """One row at one seed: what it learns from, its objective, its training and its measures."""

    def __init__(self, config: Config, name: str, seed: int) -> None:
        row = ROWS[name]
        self.whole, self.name, self.row, self.seed = config, name, row, seed
        out = directory(config, name, seed)
        steps = config.optimizer.steps
        if config.budget == "flops" and name != BASELINE:
            steps = max(round(steps / read(config, name, seed, "samples")["flops"]), 2)
        self.config = options.replace(
            config.row(out, seed, path=row.path, parameterization=row.parameterization),
            steps=steps,
            warmup=min(config.optimizer.warmup, steps - 1),
            log_every=min(config.output.log_every, steps),
        )
        self.method = objectives.METHODS[row.method]
        self.model = model_of(config, row)
        self.problem = mixtures.problem(row.path, self.config.optimizer.batch, seed)
        self.teacher = None
        if row.teacher:
            teacher_dir = directory(dataclasses.replace(config, budget="samples"), row.teacher, seed)
            self.teacher, _ = training.restore_params(teacher_dir, run.AVERAGE)
        self.cost = None
        if row.pairs != "data":
            self.problem = self.problem._replace(dataset=self._pairs())

    def _pairs(self) -> datasets.ArrayDataset:
        pool, batch_size = self.whole.pool, self.config.optimizer.batch
        if self.row.pairs == "reflow":
            solved = solvers.solve(self.model.flow_map.velocity, "heun", steps=32).bind(self.teacher)
            key = jax.random.key(10_000 + self.seed)
            batch = couplings.reflow(solved, key, jax.ShapeDtypeStruct(self.problem.event, jnp.float32), pool)
            return datasets.ArrayDataset(batch, batch_size, self.seed)
        paired = datasets.coupled(self.problem.dataset, pool // batch_size, seed=self.seed)
        self.cost = {"transport_cost": paired.cost, "independent_cost": paired.independent_cost}
        return paired

    def objective(self) -> tuple[Callable[..., Any], Domain]:
        """The objective, and the domain in which the map is trained."""
        row, flow_map, path = self.row, self.model.flow_map, self.model.interpolant
        choices = row.choices(self.config.optimizer)
        if row.method == "progressive_distillation":
            return self._progressive(), ONE_JUMP
        if row.teacher and row.pairs == "data" and row.method != "ect":
            choices["teacher"] = flow_map.velocity
        made = self.method.constructor(flow_map, path, **choices)
        # Pairs made before the training are not independent, so the batch's velocity would be wrong for them.
        if row.pairs == "data" and not row.teacher and "velocity" in made.reads:
            estimate = objectives.velocity_estimates.ESTIMATES[self.whole.velocity]
            made = dataclasses.replace(made, velocity=estimate)
        return made, row.trained or made.domain

    def _progressive(self) -> Callable[..., Any]:
        """A sequence of stages: Euler steps of the velocity teach the first, and each stage teaches the next."""
        stage = _stage(self.config.optimizer)
        cells = curriculum.halving(FIRST_CELLS, stage)
        make = functools.partial(self.method.constructor, self.model.flow_map, self.model.interpolant, cells=cells)
        first = make(solver="heun", teacher=self.model.flow_map.velocity)
        return objectives.sequence([(0, first), (stage, make())])

    def trainer(self) -> run.Trainer:
        """The training at its start."""
        updates = ()
        if self.row.method == "progressive_distillation":
            updates = curriculum.halvings(FIRST_CELLS, _stage(self.config.optimizer))
        objective, _ = self.objective()
        return run.trainer(
            self.config,
            self.problem,
            self.model,
            objective,
            params=self.teacher if self.row.start else None,
            teacher=self.teacher,
            teacher_updates=updates,
        )

    def run(self) -> dict[str, Any]:
        """Trains and measures; a training that diverges has a row without numbers."""
        try:
            return self._measured()
        except training.NonFiniteError as error:
            print(f"{self.name}: {error}", flush=True)
            return {"name": self.name, "seed": self.seed, "table": {}, "residuals": {}, "diverged": str(error)}

    def _measured(self) -> dict[str, Any]:
        held = (self.config.out / "checkpoints").is_dir() and any((self.config.out / "checkpoints").iterdir())
        config = options.replace(self.config, resume="yes" if held else "no", overwrite=not held)
        this = self.trainer()
        bound, seconds = run.train(config, self.problem, self.model, this)
        row: dict[str, Any] = {
            "name": self.name,
            "seed": self.seed,
            "steps": config.optimizer.steps,
            "training_seconds": seconds,
        }
        row |= measure(self, bound) | (self.cost or {})
        if self.seed == 0 and self.whole.budget == "samples" and self.whole.timed:
            row |= price(self.whole, self)
        warned = [r["warning"] for r in metrics_log.read(config.out / "metrics.jsonl") if r.get("warning")]
        return row | {"warnings": len(warned)}


@functools.cache
def _model(network: options.Network, domain: Domain) -> Model:
    return build(network, mixtures.problem(network.path, 1, 0), domain)


def model_of(config: Config, row: Row) -> Model:
    """The network of a row; one object for all that share it, so that what evaluates it is compiled once."""
    form: dict[str, Any] = {"path": row.path, "parameterization": row.parameterization}
    size, decoupled = vars(config.model), min(row.decoupled, config.model.depth - 1)
    return _model(options.Network(**size, **form, decoupled=decoupled), row.domain)


@functools.cache
def _solved(flow_map: FlowMap, method: str, steps: int | None) -> FlowMap:
    return solvers.solve(flow_map.velocity, method, steps=steps)


@functools.cache
def _exact(path: str) -> FlowMap:
    return mixtures.oracle(path).flow_map


def measure(job: Job, bound: BoundFlowMap) -> dict[str, Any]:
    """Errors against the exact map of the row's own coupling and path, distances between samples, residuals."""
    config, row, flow_map = job.whole, job.row, job.model.flow_map
    _, domain = job.objective()
    alone = not job.method.cost
    if alone:
        # Without an off-diagonal term K jumps are K Euler steps of the velocity.
        bound = _solved(flow_map, "euler", 1).bind(bound.params)
    elif domain != flow_map.domain:
        bound = dataclasses.replace(flow_map, domain=domain).bind(bound.params)
    exact = _exact(row.path).bind(mixtures.target())
    if row.pairs != "data":
        exact = _solved(flow_map, "tsit5", None).bind(bound.params)
    x0_key, x1_key, noise_key, times_key = jax.random.split(jax.random.key(job.seed + 2), 4)
    x0 = drawing.noise(x0_key, config.compared, (2,))
    x1 = jnp.asarray(job.problem.reference(x1_key, config.samples))
    errors = diagnostics.compare({"map": bound}, exact, x0, JUMPS)
    table = {entry["jumps"]: {"rmse": entry["rmse"], "median": entry["median"]} for entry in errors.rows()}
    like = jax.ShapeDtypeStruct((2,), jnp.float32)
    for jumps in JUMPS:
        grid = samplers.uniform_grid(jumps)
        if jumps in table:
            sampler = samplers.Jumps(bound)
        elif bound.domain.target == 1.0 and bound.domain.source is None:
            # Consistency sampling: every jump goes to t = 1, and noise brings it back.
            sampler = samplers.Renoise(bound, job.model.interpolant, kappa=1.0)
        else:
            continue
        drawn = jnp.asarray(samplers.draw(sampler, noise_key, config.samples, grid, like=like, block=4096))
        distance = metrics.energy_distance(drawn, x1[: len(drawn)])
        table.setdefault(jumps, {})["energy_distance"] = float(distance.value)
    residuals = {}
    if not alone and not domain.levels and domain is not ONE_JUMP:
        report = diagnostics.consistency_report(
            bound, job.model.interpolant, times_key, x0, x1[: config.compared], reference=exact
        )
        residuals = {name: value for name, value in report.items() if name != "velocity"}
    return {"table": table, "residuals": residuals, "own_reference": row.pairs != "data"}


@functools.cache
def _baseline(config: Config) -> tuple[run.Trainer, Any, float]:
    """The flow-matching row's training, its data and the FLOPs of a step."""
    job = Job(config, BASELINE, 0)
    trainer, dataset = job.trainer(), job.problem.dataset
    return trainer, dataset.data, timing.flops(trainer.step, trainer.state, dataset.batch(dataset.data, jnp.int32(0)))


def price(config: Config, job: Job) -> dict[str, Any]:
    """FLOPs and time of a step over those of flow matching, the times interleaved; medians."""
    this, dataset = job.trainer(), job.problem.dataset
    other, other_data, base = _baseline(config)
    batch = dataset.batch(dataset.data, jnp.int32(0))
    flops = timing.flops(this.step, this.state, batch)
    if job.row.method in SOLVED:
        # XLA counts the body of Diffrax's loop over the two stages of Heun's step once.
        rows = job.objective()[0].rows(len(batch.x1))[1]
        zeros = jnp.zeros((rows,), jnp.float32)
        network = jax.vmap(job.model.flow_map.mean_velocity, (None, 0, 0, 0))
        flops += timing.flops(network, this.state.params, zeros, zeros, batch.x1[:rows])
    priced = {"flops": flops / base}
    # A chunk donates its state, but the baseline's is needed again.
    states = {"this": this.state, "baseline": jax.tree.map(jnp.copy, other.state)}

    def call(name: str, chunk: Callable[..., Any], data: Any) -> Any:
        states[name], metrics = chunk(states[name], data, 20)
        return states[name], metrics

    calls = {
        "this": lambda _: call("this", this.chunk, dataset.data),
        "baseline": lambda _: call("baseline", other.chunk, other_data),
    }
    times = timing.interleaved(calls, config.timed)
    return priced | {"time": times.median("this") / times.median("baseline")}


# --- The table -------------------------------------------------------------------------------------------------------


def directory(config: Config, name: str, seed: int) -> pathlib.Path:
    """Where a row's files are."""
    return sweep.directory(config.out, config.budget, name, seed)


def read(config: Config, name: str, seed: int, budget: str | None = None) -> dict[str, Any] | None:
    """A row that has been written, or None. The costs, measured at seed 0, are those of every seed."""
    config = dataclasses.replace(config, budget=budget or config.budget)
    row = sweep.read(directory(config, name, seed), config.of_rows())
    if row is not None and "flops" not in row:
        samples = dataclasses.replace(config, budget="samples")
        first = sweep.read(directory(samples, name, 0), samples.of_rows()) or {}
        row |= {key: value for key, value in first.items() if key in ("flops", "time")}
    return row


def jobs(config: Config) -> list[sweep.Job]:
    """The rows to run, teachers first."""
    chosen = list(config.methods or ROWS)
    needed = [ROWS[name].teacher for name in chosen if ROWS[name].teacher]
    names = dict.fromkeys([BASELINE, *needed, *chosen])
    return [
        sweep.Job(
            f"{name}, seed {seed}",
            directory(config, name, seed),
            lambda name=name, seed=seed: Job(config, name, seed).run(),
        )
        for seed in range(config.seeds)
        for name in names
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's rows at several seeds as means; for the error of one jump with the largest deviation from it."""

    def mean(*path: str) -> float | None:
        values = sweep.values(rows, *path)
        return float(np.mean(values)) if values else None

    found = {
        f"{what}_{k}": mean("table", str(k), what) for what in ("rmse", "median", "energy_distance") for k in JUMPS
    }
    found |= {name: mean("residuals", name) for name in ("tangent", "eulerian", "lagrangian", "semigroup")}
    found |= {name: mean(name) for name in ("flops", "time", "steps", "warnings", "transport_cost", "independent_cost")}
    ones = [row["table"]["1"]["rmse"] for row in rows if "rmse" in row["table"].get("1", {})]
    found["rmse_1_spread"] = float(np.ptp(ones)) / 2 if ones else None
    return {key: value for key, value in found.items() if value is not None} | {"seeds": len(rows)}


def collect(config: Config) -> dict[str, Any]:
    """All rows that have been written, summarised, with the errors at equal FLOPs where there are any."""
    found = {}
    for name, row in ROWS.items():
        rows = [r for seed in range(config.seeds) if (r := read(config, name, seed, "samples"))]
        if not rows:
            continue
        found[name] = {
            "method": row.method,
            "path": row.path,
            "pairs": row.pairs,
            "taught": bool(row.teacher),
            **summary(rows),
        }
        equal = [r for seed in range(config.seeds) if (r := read(config, name, seed, "flops"))]
        if equal:
            found[name]["equal_flops"] = summary(equal)
    return found


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    euler = found[BASELINE]["rmse_1"]
    header = ["method", *(f"RMSE {k}" for k in JUMPS), "Euler / jump", *(f"energy {k}" for k in JUMPS)]
    header += ["Eulerian", "Lagrangian", "semigroup", "FLOPs", "time", "passes / 3", "RMSE 1, equal FLOPs"]
    lines = []
    for name, row in found.items():
        published = objectives.METHODS[row["method"]].published_passes
        error = row.get("rmse_1")
        values = [row.get(f"rmse_{k}", "-") for k in JUMPS] + [euler / error if error else "-"]
        values += [row.get(f"energy_distance_{k}", "-") for k in JUMPS]
        values += [row.get(key, "-") for key in ("eulerian", "lagrangian", "semigroup", "flops", "time")]
        values += [published / 3 if published else "-", row.get("equal_flops", {}).get("rmse_1", "-")]
        lines.append([name, *values])
    return results.markdown(header, lines)


def quick(config: Config) -> Config:
    """A small run, of a few rows unless others are named."""
    few = {"methods": config.methods or QUICK_ROWS, "seeds": 1, "compared": 64, "pool": 128, "timed": 0}
    return options.quick(config, steps=6, log_every=6, warmup=2, samples=64, features=8, **few)


def main(config: Config) -> None:
    """Runs what is missing, and writes the table of all that is there to ``config.out``.

    Raises:
      ValueError: with several processes.
    """
    if config.output.quick:
        config = quick(config)
    sweep.run_missing(jobs(config), config.of_rows())
    found = collect(config)
    results.write(config.out, {"rows": found, "config": config.kept()}, table(found))
    _figure(config, found)


def _figure(config: Config, found: dict[str, Any]) -> None:
    shown = {name: row for name, row in found.items() if "rmse_1" in row and "flops" in row}
    figure, axes = plots.panels(size=(11.0, 7.0))
    axes[0, 0].set(
        yscale="log",
        xlabel="FLOPs of a step over flow matching's",
        ylabel="RMSE of one jump against the exact map (of the row's own pairs and path)",
    )
    flops, errors, spreads = ([row[key] for row in shown.values()] for key in ("flops", "rmse_1", "rmse_1_spread"))
    groups = ["with a teacher" if row["taught"] else "from data alone" for row in shown.values()]
    plots.labelled_scatter(flops, errors, list(shown), yerr=spreads, groups=groups, ax=axes[0, 0])
    figure.savefig(config.out / "catalogue.png", dpi=120)


if __name__ == "__main__":
    run.main(Config, main)
