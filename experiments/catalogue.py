"""Every method of the catalogue on the mixture of ``experiments.mixture``, side by side: error against the exact map, and cost.

    python -m experiments.catalogue --out runs/catalogue

All methods are trained with the same network, optimizer and number of samples, for three seeds, in about an hour and a half
on two CPU cores. ``--methods lsd mean_flow`` runs only these two. Rows that exist already are kept, so the command may be
stopped and repeated, or run at the same time on different methods. The teacher of a distillation is the flow-matching row
of the same seed, and the student starts from its weights. With ``--budget flops`` each method trains for as many FLOPs, by
XLA's count, as the flow-matching row. ``--quick`` shows that everything works; its numbers mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, mixture
from jflow import (
    couplings,
    datasets,
    diagnostics,
    interpolants,
    metrics,
    objectives,
    oracles,
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
# Methods whose objective takes a step of Heun's method by Diffrax.
SOLVED = ("consistency_distillation", "ctm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Training):
    """Options of the catalogue."""

    methods: tuple[str, ...] = ()
    """Names of the rows to run; all if none is given."""
    seeds: int = 3
    """Number of seeds (0, 1, ...) for each row."""
    budget: Literal["samples", "flops"] = "samples"
    """What all methods have in common: the number of samples, or the FLOPs of the flow-matching row."""
    steps: int = 3000
    learning_rate: float = 3e-3
    features: int = 128
    depth: int = 4
    residual: bool = False
    samples: int = 8192
    log_every: int = 250
    compared: int = 4096
    """Noise points from which the maps are compared."""
    pool: int = 65536
    """Pairs made before the training, for reflow and optimal transport."""
    timed: int = 11
    """How many times each step is timed, in turns with the others; 0 measures neither times nor FLOPs."""

    def check(self) -> None:
        """As ``Training.check``, and the names of the methods."""
        super().check()
        unknown = sorted(set(self.methods) - set(ROWS))
        if unknown:
            raise ValueError(f"--methods: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(ROWS))}")
        if self.seeds < 1 or self.pool < self.batch or self.compared < 1 or self.timed < 0:
            raise ValueError(
                "--seeds, --pool, --compared, --timed: expected positive numbers, a pool of one batch at least"
            )

    def kept(self) -> dict[str, Any]:
        """As ``Training.kept``, without what chooses and measures rows and does not change one."""
        return {k: v for k, v in super().kept().items() if k not in ("methods", "seeds", "compared", "timed")}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      method: of ``objectives.METHODS``.
      path, parameterization: of the map.
      pairs: "data" (independent noise), "reflow" (from a solve of the teacher) or "ot" (minibatch optimal transport).
      teacher: the row whose velocity is distilled, or whose solve makes the pairs.
      start: whether the student starts from the teacher's weights.
      choices: ``config -> choices`` for the constructor; a function, because some depend on the number of steps.
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
    choices: Callable[[Config], dict[str, Any]] = lambda config: {}
    domain: Domain = FORWARD
    trained: Domain | None = None
    decoupled: int = 0


def _fall(first: float, last: float) -> Callable[[Config], dict[str, Any]]:
    """A share that falls geometrically during the whole of the training."""
    return lambda config: {"fraction": optax.exponential_decay(first, config.steps, last / first)}


def _stairs(first: float, last: float, every: int) -> optax.Schedule:
    """From the first to the last value by doubling or halving, ``every`` steps each."""
    return optax.exponential_decay(first, max(every, 1), 2.0 if last > first else 0.5, staircase=True, end_value=last)


def _warmup(config: Config) -> dict[str, Any]:
    return {"warmup": optax.linear_schedule(0.0, 0.99, max(config.steps // 4, 1))}


def _stage(config: Config) -> int:
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
        steps = config.steps
        if config.budget == "flops" and name != BASELINE:
            steps = max(round(steps / read(config, name, seed, "samples")["flops"]), 2)
        self.config = dataclasses.replace(
            config,
            out=out,
            seed=seed,
            path=row.path,
            parameterization=row.parameterization,
            steps=steps,
            warmup=min(config.warmup, steps - 1),
            log_every=min(config.log_every, steps),
        )
        self.method = objectives.METHODS[row.method]
        self.model = model_of(config, row)
        self.problem = mixture.problem(self.config)
        self.teacher = None
        if row.teacher:
            teacher_dir = directory(dataclasses.replace(config, budget="samples"), row.teacher, seed)
            self.teacher, _ = training.restore_params(teacher_dir, common.AVERAGE)
        self.cost = None
        if row.pairs != "data":
            self.problem = self.problem._replace(dataset=self._pairs())

    def _pairs(self) -> datasets.ArrayDataset:
        config = self.config
        if self.row.pairs == "reflow":
            solved = solvers.solve(self.model.flow_map.velocity, "heun", steps=32).bind(self.teacher)
            key = jax.random.key(10_000 + self.seed)
            batch = couplings.reflow(solved, key, jax.ShapeDtypeStruct(self.problem.event, jnp.float32), config.pool)
            return datasets.ArrayDataset(batch, config.batch, self.seed)
        pool = datasets.coupled(self.problem.dataset, config.pool // config.batch, seed=self.seed)
        self.cost = {"transport_cost": pool.cost, "independent_cost": pool.independent_cost}
        return pool

    def objective(self) -> tuple[Callable[..., Any], Domain]:
        """The objective, and the domain in which the map is trained."""
        row, flow_map, path = self.row, self.model.flow_map, self.model.interpolant
        choices = row.choices(self.config)
        if row.method == "progressive_distillation":
            return self._progressive(), ONE_JUMP
        if row.teacher and row.pairs == "data" and row.method != "ect":
            choices["teacher"] = flow_map.velocity
        made = self.method.constructor(flow_map, path, **choices)
        # Pairs made before the training are not independent, so the batch's velocity would be wrong for them.
        if row.pairs == "data" and not row.teacher and "velocity" in made.reads:
            estimate = objectives.velocity_estimates.ESTIMATES[self.config.velocity]
            made = dataclasses.replace(made, velocity=estimate)
        return made, row.trained or made.domain

    def _progressive(self) -> Callable[..., Any]:
        """A sequence of stages: Euler steps of the velocity teach the first, and each stage teaches the next."""
        stage = _stage(self.config)
        cells = curriculum.halving(FIRST_CELLS, stage)
        make = functools.partial(self.method.constructor, self.model.flow_map, self.model.interpolant, cells=cells)
        first = make(solver="heun", teacher=self.model.flow_map.velocity)
        return objectives.sequence([(0, first), (stage, make())])

    def trainer(self) -> common.Trainer:
        """The training at its start."""
        updates = ()
        if self.row.method == "progressive_distillation":
            updates = curriculum.halvings(FIRST_CELLS, _stage(self.config))
        objective, _ = self.objective()
        return common.trainer(
            self.config,
            self.problem,
            self.model,
            objective,
            params=self.teacher if self.row.start else None,
            teacher=self.teacher,
            teacher_updates=updates,
        )

    def run(self) -> None:
        """Trains and measures; writes row.json."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        held = (self.config.out / "checkpoints").is_dir() and any((self.config.out / "checkpoints").iterdir())
        config = dataclasses.replace(self.config, resume="yes" if held else "no", overwrite=not held)
        this = self.trainer()
        bound, seconds = common.train(config, self.problem, self.model, this)
        row: dict[str, Any] = {"name": self.name, "seed": self.seed, "steps": config.steps, "training_seconds": seconds}
        row |= measure(self, bound) | (self.cost or {})
        if self.seed == 0 and config.budget == "samples" and config.timed:
            row |= price(self.whole, self)
        warned = [r["warning"] for r in metrics_log.read(config.out / "metrics.jsonl") if r.get("warning")]
        row["warnings"] = len(warned)
        common.write_json(config.out / "row.json", row)


@functools.cache
def _model(
    path: str, parameterization: str, domain: Domain, features: int, depth: int, residual: bool, decoupled: int
) -> common.Model:
    config = Config(
        out=pathlib.Path(),
        path=path,
        parameterization=parameterization,
        features=features,
        depth=depth,
        residual=residual,
        decoupled=decoupled,
    )
    return common.build(config, mixture.problem(config), domain)


def model_of(config: Config, row: Row) -> common.Model:
    """The network of a row; one object for all that share it, so that what evaluates it is compiled once."""
    decoupled = min(row.decoupled, config.depth - 1)
    return _model(row.path, row.parameterization, row.domain, config.features, config.depth, config.residual, decoupled)


@functools.cache
def _solved(flow_map: FlowMap, method: str, steps: int | None) -> FlowMap:
    return solvers.solve(flow_map.velocity, method, steps=steps)


@functools.cache
def _exact(path: str) -> FlowMap:
    return oracles.mixture(interpolants.INTERPOLANTS[path]()).flow_map


def measure(job: Job, bound: BoundFlowMap) -> dict[str, Any]:
    """Errors against the exact map of the row's own coupling and path, distances between samples, residuals."""
    config, row, flow_map = job.config, job.row, job.model.flow_map
    _, domain = job.objective()
    alone = not job.method.cost
    if alone:
        # Without an off-diagonal term K jumps are K Euler steps of the velocity.
        bound = _solved(flow_map, "euler", 1).bind(bound.params)
    elif domain != flow_map.domain:
        bound = dataclasses.replace(flow_map, domain=domain).bind(bound.params)
    exact = _exact(row.path).bind(mixture.target())
    if row.pairs != "data":
        exact = _solved(flow_map, "tsit5", None).bind(bound.params)
    x0_key, x1_key, noise_key, times_key = jax.random.split(jax.random.key(config.seed + 2), 4)
    x0 = common.noise(x0_key, config.compared, (2,))
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
def _baseline(config: Config) -> tuple[common.Trainer, Any, float]:
    """The flow-matching row's training, its data and the FLOPs of a step."""
    job = Job(config, BASELINE, 0)
    trainer, dataset = job.trainer(), job.problem.dataset
    return trainer, dataset.data, _flops(trainer.step, trainer.state, dataset.batch(dataset.data, jnp.int32(0)))


def _flops(function: Callable[..., Any], *args: Any) -> float:
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def price(config: Config, job: Job) -> dict[str, Any]:
    """FLOPs and time of a step over those of flow matching, the times interleaved; medians."""
    this, dataset = job.trainer(), job.problem.dataset
    other, other_data, base = _baseline(config)
    batch = dataset.batch(dataset.data, jnp.int32(0))
    flops = _flops(this.step, this.state, batch)
    if job.row.method in SOLVED:
        # XLA counts the body of Diffrax's loop over the two stages of Heun's step once.
        rows = job.objective()[0].rows(len(batch.x1))[1]
        zeros = jnp.zeros((rows,), jnp.float32)
        network = jax.vmap(job.model.flow_map.mean_velocity, (None, 0, 0, 0))
        flops += _flops(network, this.state.params, zeros, zeros, batch.x1[:rows])
    priced = {"flops": flops / base}
    # A chunk donates its state, but the baseline's is needed again.
    states, data = [this.state, jax.tree.map(jnp.copy, other.state)], [dataset.data, other_data]
    chunks, spent = [this.chunk, other.chunk], ([], [])
    for repeat in range(config.timed + 1):
        for i in range(2):
            began = time.perf_counter()
            states[i], _ = jax.block_until_ready(chunks[i](states[i], data[i], 20))
            if repeat:
                spent[i].append(time.perf_counter() - began)
    return priced | {"time": statistics.median(spent[0]) / statistics.median(spent[1])}


# --- The table -------------------------------------------------------------------------------------------------------


def directory(config: Config, name: str, seed: int) -> pathlib.Path:
    """Where a row's files are."""
    return config.out / config.budget / name.replace(", ", "-").replace(" ", "_") / str(seed)


def read(config: Config, name: str, seed: int, budget: str | None = None) -> dict[str, Any] | None:
    """A row that has been written, or None. The costs, measured at seed 0, are those of every seed."""
    config = dataclasses.replace(config, budget=budget or config.budget)
    path = directory(config, name, seed) / "row.json"
    if not path.is_file():
        return None
    row = json.loads(path.read_text())
    if "flops" not in row:
        first = directory(dataclasses.replace(config, budget="samples"), name, 0) / "row.json"
        if first.is_file():
            row |= {key: value for key, value in json.loads(first.read_text()).items() if key in ("flops", "time")}
    return row


def order(config: Config) -> list[tuple[str, int]]:
    """The rows to run, teachers first."""
    chosen = list(config.methods or ROWS)
    needed = [ROWS[name].teacher for name in chosen if ROWS[name].teacher]
    names = dict.fromkeys([BASELINE, *needed, *chosen])
    return [(name, seed) for seed in range(config.seeds) for name in names]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's rows at several seeds as means; for the error of one jump with the largest deviation from it."""

    def mean(*path: str) -> float | None:
        values = []
        for row in rows:
            for key in path:
                row = row.get(key) if isinstance(row, dict) else None
            if row is not None:
                values.append(row)
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
    return common.markdown(header, lines)


def quick(config: Config) -> Config:
    """A small run of every row."""
    small = common.QUICK | {"steps": 6, "log_every": 6, "warmup": 2, "samples": 64, "features": 8}
    return dataclasses.replace(config, **small, seeds=1, compared=64, pool=128, timed=0)


def run(config: Config) -> None:
    """Runs what is missing, and writes the table of all that is there to ``config.out``.

    Raises:
      ValueError: with several processes.
    """
    common.one_process()
    if config.quick:
        config = quick(config)
    for name, seed in order(config):
        if read(config, name, seed) is None:
            print(f"--- {name}, seed {seed}", flush=True)
            try:
                Job(config, name, seed).run()
            except training.NonFiniteError as error:
                common.write_json(
                    directory(config, name, seed) / "row.json",
                    {"name": name, "seed": seed, "table": {}, "residuals": {}, "diverged": str(error)},
                )
                print(f"{name}: {error}", flush=True)
    found = collect(config)
    text = table(found)
    print(text)
    (config.out / "table.md").write_text(text + "\n")
    common.write_json(
        config.out / "results.json",
        {"rows": found, "config": config.kept(), **common.environment()},
    )
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
    common.main(Config, run)
