"""Code that the experiments share: their options, the model, training, sampling, and the files of results."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.running import Machine, Watching, grid_writer
from jflow import (
    bases,
    interpolants,
    nets,
    objectives,
    parameterizations,
    reductions,
    samplers,
    sharding,
    times,
    training,
)
from jflow.training import distributed, metrics_log, throughput
from jflow.types import FORWARD, BoundFlowMap, Domain, FlowMap, Key

JUMPS = (1, 2, 4, 8, 16)
AVERAGE = "ema"
# The function that rebuilds the model of a checkpoint from its config, for `python -m jflow.sample` and `jflow.comparison`.
MAKE = "experiments.loading:make"
QUICK = {"steps": 40, "log_every": 20, "warmup": 10, "batch": 64, "features": 32, "depth": 2, "samples": 300}
# Options that may differ when a run is resumed; they do not belong to the model.
NOT_KEPT = ("out", "quick", "resume", "overwrite", "samples", "machine", "watch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The choices of a network and its training; each subclass sets its own defaults."""

    out: pathlib.Path
    """Directory for results.json, figures, samples, metrics and checkpoints."""
    path: Literal["linear", "trigonometric", "cosine", "variance_preserving", "variance_exploding"] = "linear"
    """The interpolant."""
    parameterization: Literal["v", "x", "gaussian"] = "gaussian"
    """What the network predicts: the mean velocity, the data end, or the mean velocity beyond a Gaussian's."""
    velocity: Literal["pair", "batch"] = "pair"
    """The estimate of the velocity: from each pair, or its mean over the data of the batch (few dimensions)."""
    steps: int = 9000
    """Number of optimizer steps."""
    batch: int = 512
    """Samples per step, diagonal and off-diagonal together."""
    learning_rate: float = 2e-3
    """Peak of the learning rate, after a linear warm-up; it falls to zero along a cosine."""
    warmup: int = 200
    """Steps of the warm-up."""
    clip: float = 10.0
    """Largest norm of a gradient; a larger one is scaled down to it."""
    beta2: float = 0.99
    """Adam's decay of the second moment."""
    ema: float = 16.0
    """Exponent of the average of the parameters, which is evaluated; it covers about the last 1/ema of the steps."""
    features: int = 512
    """Width of the network."""
    depth: int = 5
    """Hidden layers."""
    network: Literal["plain", "embedded"] = "embedded"
    """plain: s, t and x enter plain layers as they are. embedded: features of the times modulate every layer."""
    residual: bool = True
    """Whether each layer of the embedded network adds its output to its input."""
    decoupled: int = 0
    """Number of last layers of the embedded network that see t alone; the others see s alone. 0: all see both times."""
    octaves: int = 0
    """Octaves of sines and cosines of x as further inputs, damped where the noise would hide them; 0 for none."""
    samples: int = 100_000
    """Samples drawn with each number of jumps K; they are scored, and written to samples_K.npy."""
    seed: int = 0
    """Seed of the weights, the data and the noise."""
    log_every: int = 100
    """Steps per row of metrics; they run as one compiled program."""
    quick: bool = False
    """A small run that shows that everything works, for a laptop or a test; its numbers mean nothing."""
    resume: Literal["no", "yes", "auto"] = "no"
    """yes: continue from the newest whole checkpoint in --out. auto: the same, or start a run if there is none."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    machine: Machine = dataclasses.field(default_factory=Machine)
    watch: Watching = dataclasses.field(default_factory=Watching)

    def check(self) -> None:
        """Refuses values out of range.

        Raises:
          ValueError: naming the option, what came and what was expected.
        """
        for name in ("steps", "batch", "features", "depth", "samples", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{_flag(name)}: expected a positive whole number, got {getattr(self, name)}")
        if self.warmup < 0 or self.warmup >= self.steps:
            raise ValueError(f"--warmup: expected at least 0 and less than --steps {self.steps}, got {self.warmup}")
        _between(self, "beta2", 0.0, 1.0)
        _between(self, "ema", 0.0, float("inf"))
        for name in ("learning_rate", "clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{_flag(name)}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.decoupled < self.depth:
            raise ValueError(f"--decoupled: expected a whole number from 0 to --depth - 1, got {self.decoupled}")
        if self.decoupled and self.network == "plain":
            raise ValueError("--decoupled: expected the embedded network, got --network plain")
        if self.octaves < 0:
            raise ValueError(f"--octaves: expected a whole number from 0, got {self.octaves}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected a whole number from 0, got {self.seed}")
        for name in ("grids", "snapshots"):
            every = getattr(self.watch, name)
            if every < 0 or every % min(self.log_every, self.steps):
                raise ValueError(
                    f"--watch.{name}: expected 0 or a multiple of --log-every {self.log_every}, got {every}"
                )
        if self.resume != "no" and self.overwrite:
            raise ValueError("--resume, --overwrite: expected at most one of them")

    def kept(self) -> dict[str, Any]:
        """The entries that a checkpoint keeps, enough to build the model again, as JSON values."""
        name = type(self).__module__.split(".")[-1]
        if name == "__main__":
            name = pathlib.Path(sys.modules["__main__"].__file__ or "").stem
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_KEPT}
        return {"experiment": name, **values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The choices of an experiment with one objective."""

    objective: Literal["lsd", "esd", "psd_m", "psd_u", "mean_flow", "improved_mean_flow"] = "lsd"
    """The training method (docs: jflow.objectives)."""
    reduction: Literal["squared", "adaptive"] = "squared"
    """Residual to loss off the diagonal; with the squared one MeanFlow diverged here (see docs/results.md)."""
    diagonal: float = 0.65
    """Share of each batch with s = t."""
    diagonal_start: float = 0.3
    """Share of the steps, at the beginning, in which the diagonal alone is trained."""
    full_jumps: float = 0.5
    """Share of the off-diagonal rows that start at s = 0; the others are uniform on the triangle."""
    stratified: bool = True
    """Spread the times of a batch evenly over their law."""

    def check(self) -> None:
        """As ``Training.check``."""
        super().check()
        for name in ("diagonal", "diagonal_start", "full_jumps"):
            _between(self, name, 0.0, 1.0)
        if self.diagonal == 1.0:
            raise ValueError("--diagonal: expected less than 1: a flow map is learned on the off-diagonal rows")


def refuse_unused(config: Training, *names: str) -> None:
    """Refuses options that an experiment inherits and does not look at.

    Raises:
      ValueError: for one that is not at its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if (value := getattr(config, name)) != defaults[name]:
            raise ValueError(f"--{_flag(name)}: expected {defaults[name]}, for nothing depends on it here, got {value}")


def _between(config: Training, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"--{_flag(name)}: expected a number from {low:g} to {high:g}, got {value}")


class Problem(NamedTuple):
    """What an experiment is about.

    Attributes:
      dataset: a dataset of ``jflow.datasets``: ``batch(data, step)`` and ``data``; in the model's units.
      event: the shape of one sample.
      scale: data units per model unit.
      reference: ``(key, n) -> [n, *event]``, samples to compare with, in data units; may return fewer.
      labels: ``(key, n) -> [n]`` class labels to sample with, or None.
      classes: their number, or 0.
      features: ``[N, *event] -> [N, f]``: where distances between samples are measured, on data units.
    """

    dataset: Any
    event: tuple[int, ...]
    scale: float
    reference: Callable[[Key, int], np.ndarray]
    labels: Callable[[Key, int], jax.Array] | None = None
    classes: int = 0
    features: Callable[[jax.Array], jax.Array] = lambda x: x.reshape(x.shape[0], -1)


class Model(NamedTuple):
    """A network as a flow map, with the path it was made for.

    Attributes:
      flow_map: params are the network's.
      init: ``key -> params``.
      interpolant: the path.
    """

    flow_map: FlowMap
    init: Callable[[Key], Any]
    interpolant: interpolants.Interpolant


def build(config: Training, problem: Problem, domain: Domain = FORWARD) -> Model:
    """The network of a configuration as a FlowMap."""
    fields = {"features": config.features, "depth": config.depth, "num_classes": problem.classes}
    if config.octaves:
        fields |= {"points": "octaves", "point_frequencies": config.octaves, "point_damping": 0.3}
    module = (
        nets.MLP.plain(**fields)
        if config.network == "plain"
        else nets.MLP(residual=config.residual, decoupled=config.decoupled, **fields)
    )
    interpolant = interpolants.INTERPOLANTS[config.path]()
    form = parameterizations.PARAMETERIZATIONS[config.parameterization](interpolant)

    def init(key: Key) -> Any:
        return module.init(key, jnp.float32(0.0), jnp.float32(1.0), jnp.zeros(problem.event, jnp.float32))["params"]

    return Model(parameterizations.flow_map(nets.from_linen(module), form, domain), jax.jit(init), interpolant)


def objective_of(config: Config, model: Model) -> Callable[..., Any]:
    """The objective of a configuration, with its start on the diagonal alone."""
    pairs = times.triangle(stratified=config.stratified)
    if config.full_jumps:
        from_noise = times.independent(times.constant(0.0), times.uniform(stratified=config.stratified))
        pairs = times.mixed([pairs, from_noise], [1.0 - config.full_jumps, config.full_jumps])
    single = times.uniform(stratified=config.stratified)
    estimate = objectives.velocity_estimates.ESTIMATES[config.velocity]
    method = objectives.METHODS[config.objective].constructor(
        model.flow_map,
        model.interpolant,
        diagonal=config.diagonal,
        times=single,
        pairs=pairs,
        velocity=estimate,
        reduction=reductions.REDUCTIONS[config.reduction](),
    )
    first = round(config.diagonal_start * config.steps)
    if first == 0:
        return method
    alone = objectives.flow_matching(model.flow_map, model.interpolant, times=single, velocity=estimate)
    return objectives.sequence([(0, alone), (first, method)])


class Trainer(NamedTuple):
    """A training that has not begun.

    Attributes:
      state: the first state, laid out over the devices.
      step: ``(state, batch) -> (state, metrics)``, not jitted.
      chunk: many of them.
      data: the chunk's second argument.
    """

    state: training.TrainState
    step: Callable[..., Any]
    chunk: Callable[..., Any]
    data: Any


def trainer(
    config: Training,
    problem: Problem,
    model: Model,
    objective: Callable[..., Any],
    *,
    params: Any = None,
    teacher: Any = None,
    teacher_updates: Sequence[int] = (),
) -> Trainer:
    """The optimizer, the average and the state of a configuration; from ``params`` where they are given."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.radam(schedule, b2=config.beta2))
    averages = {AVERAGE: training.ema.power(config.ema)}
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = model.init(init_key) if params is None else params
    state = training.init_state(params, optimizer, train_key, ema=averages, teacher=teacher)
    step = training.make_step(objective, optimizer, ema=averages, teacher_updates=teacher_updates)
    mesh, data = config.machine.mesh(), problem.dataset.data
    if mesh is None:
        return Trainer(state, step, training.make_chunk(step, problem.dataset.batch), data)
    if config.batch % mesh.size:
        raise ValueError(f"--batch: expected a multiple of the {mesh.size} devices, got {config.batch}")
    shardings = sharding.parts(state, mesh)
    chunk = training.make_chunk(
        step, problem.dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=shardings
    )
    return Trainer(sharding.place(state, shardings), step, chunk, sharding.place(data, sharding.whole(mesh)))


def one_process() -> None:
    """Refuses several processes, where there are many short trainings, each of which one process measures.

    Raises:
      ValueError: where there are.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--machine.processes: expected one process, got {jax.process_count()}")


class FirstProcessOnly(Exception):
    """Raised where all that is left is for the first process to do, on the others."""


def train(
    config: Training,
    problem: Problem,
    model: Model,
    this: Trainer | None = None,
    *,
    score: Callable[[BoundFlowMap], float] | None = None,
    score_every: int = 0,
) -> tuple[BoundFlowMap, float]:
    """Trains, writing metrics and checkpoints to ``config.out``; ``this`` is by default that of ``objective_of``.

    Of several processes only the first returns.

    Args:
      config, problem, model, this: what is trained.
      score: of the map at the averaged parameters, which then are those of the lowest score and not the last.
      score_every: steps between two scores, a multiple of ``config.log_every``; takes the place of the grids. A score that is
        not finite is never the lowest.

    Returns:
      (the map at the averaged parameters, seconds that the training took, compilation included).

    Raises:
      FirstProcessOnly: on the other processes.
      ValueError: for a score without ``score_every``, or the reverse.
    """
    if (score is None) != (score_every == 0):
        raise ValueError("score, score_every: expected both or neither")
    this = trainer(config, problem, model, objective_of(config, model)) if this is None else this
    log_every = min(config.log_every, config.steps)
    watch = config.watch
    shown = 64 if len(problem.event) == 3 else 4096
    labels = None if problem.labels is None else problem.labels(jax.random.key(config.seed + 4), shown)

    def picture(params: Any) -> np.ndarray:
        return draw(model.flow_map.bind(params), jax.random.key(config.seed + 3), 1, shown, problem.event, labels)

    grid = grid_writer(config.out, picture, AVERAGE)

    def scored(state: training.TrainState) -> dict[str, float]:
        params = sharding.local(training.ema.as_params(state.ema[AVERAGE], state.params))
        return {"score": score(model.flow_map.bind(params))}

    checkpoint_every = log_every * max(1, config.steps // (4 * log_every))
    evaluation = training.Evaluation(grid, watch.grids) if watch.grids else None
    if score is not None:
        checkpoint_every, evaluation = score_every, training.Evaluation(scored, score_every)
    run = training.RunDirectory(
        config.out,
        checkpoint_every=checkpoint_every,
        snapshot_every=watch.snapshots or None,
        resume={"no": False, "yes": True, "auto": "auto"}[config.resume],
        overwrite=config.overwrite,
        keep_best=0 if score is None else 1,
        best=None if score is None else "score",
        config=config.kept() | {"make": MAKE, "average": AVERAGE},
    )
    began = time.perf_counter()
    state = training.fit(
        this.state,
        this.chunk,
        this.data,
        total_steps=config.steps,
        log_every=log_every,
        run=run,
        evaluation=evaluation,
        hooks=[*config.machine.hooks(), *watch.hooks(config.out)],
    )
    seconds = time.perf_counter() - began
    params = sharding.local(training.ema.as_params(state.ema[AVERAGE], state.params))
    if not distributed.first_process():
        raise FirstProcessOnly
    if score is not None:
        params, _ = training.restore_params(config.out, AVERAGE, step="best")
    return model.flow_map.bind(jax.tree.map(jnp.asarray, params)), seconds


def timing(config: Training, seconds: float) -> dict[str, float | None]:
    """How long the training took, and its steps per second without compilation, None where it was too short to tell."""
    try:
        rate = throughput.steady_rate(metrics_log.read(config.out / "metrics.jsonl"))
    except ValueError:
        rate = None
    return {"training_seconds": seconds, "steps_per_second": rate}


def noise(key: Key, n: int, event: tuple[int, ...]) -> jax.Array:
    """Base points ``[n, *event]``, float32."""
    return bases.STANDARD_NORMAL.sample(key, jax.ShapeDtypeStruct(event, jnp.float32), (n,))


def draw(
    bound: BoundFlowMap, key: Key, jumps: int, n: int, event: tuple[int, ...], labels: jax.Array | None = None
) -> np.ndarray:
    """n samples ``[n, *event]`` of equal jumps; the base points are the same for every map and number of jumps."""
    like, grid = jax.ShapeDtypeStruct(event, jnp.float32), samplers.uniform_grid(jumps)
    return samplers.draw(samplers.Jumps(bound), key, n, grid, labels, like=like, block=4096)


def write_samples(config: Config, problem: Problem, bound: BoundFlowMap) -> dict[int, np.ndarray]:
    """Writes ``samples_K.npy`` (float32, N x event, data units) for K = 1, 2, 4, 8, 16 from the same noise; returns them."""
    noise_key, label_key = jax.random.split(jax.random.key(config.seed + 1))
    labels = None if problem.labels is None else problem.labels(label_key, config.samples)
    drawn = {}
    for jumps in JUMPS:
        samples = draw(bound, noise_key, jumps, config.samples, problem.event, labels)
        drawn[jumps] = np.asarray(samples * problem.scale, np.float32)
        np.save(config.out / f"samples_{jumps}.npy", drawn[jumps])
    if labels is not None:
        np.save(config.out / "labels.npy", np.asarray(labels))
    return drawn


def environment() -> dict[str, Any]:
    """Where a result comes from: command, commit, date, device and versions."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        revision = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    device = jax.devices()[0]
    import diffrax
    import flax

    return {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": revision,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{device.platform}, {device.device_kind}, {len(jax.devices())} device(s)",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "diffrax": diffrax.__version__,
        },
    }


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes JSON, arrays as numbers and lists."""

    def plain(value: Any) -> Any:
        array = np.asarray(value)
        return array.tolist() if array.dtype != object else str(value)

    path.write_text(json.dumps(values, indent=2, default=plain) + "\n")


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers with three significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *[[cell(v) for v in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(config_type: type, run: Callable[[Any], None]) -> None:
    """Reads the command line and runs.

    A mistake that can be named ends with its message and exit code 2; other codes are those of ``training.distributed``.
    """
    import tyro

    description = sys.modules[config_type.__module__].__doc__
    config = tyro.cli(config_type, prog=f"python -m {_module()}", description=description)
    try:
        config.check()
        with config.machine.joined() if hasattr(config, "machine") else contextlib.nullcontext():
            try:
                run(config)
            except FirstProcessOnly:
                pass
            except training.PreemptedError as error:
                print(error, file=sys.stderr)
                sys.exit(distributed.EXIT_PREEMPTED)
            except MISTAKES as error:
                # Refused here, because with several processes an error does not leave the context.
                _refuse(error)
    except MISTAKES as error:
        _refuse(error)


MISTAKES = (ValueError, TypeError, OSError, training.NonFiniteError)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else "experiments"
