"""The options of experiments, as parts: network, optimizer, method, output, machine and watching.

A configuration is a frozen dataclass whose fields are parts, with the defaults of its experiment. It takes only the parts that
it uses. The command line has the options of a ``Flat`` part under their own names (``--features``), and those of the others
after the name of the part (``--watch.grids``). A checkpoint keeps them under their own names as well (``Training.kept``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import jax
import tyro

from jflow import sharding, training
from jflow.training import distributed

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
# Parts and options that may differ when a run is resumed; they do not belong to the model.
NOT_KEPT = ("out", "quick", "resume", "overwrite", "samples", "machine", "watch", "of_sweep")
QUICK = {"steps": 40, "log_every": 20, "warmup": 10, "batch": 64, "features": 32, "depth": 2}
QUICK_SAMPLES = 300


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a network."""

    features: int = 512
    """Width of the network."""
    depth: int = 5
    """Hidden layers."""
    residual: bool = True
    """Whether each layer of the embedded network adds its output to its input."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        positive(self, "features", "depth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(Size):
    """The network, and the flow map that it becomes."""

    path: Literal["linear", "trigonometric", "cosine", "variance_preserving", "variance_exploding"] = "linear"
    """The interpolant."""
    parameterization: Literal["v", "x", "gaussian"] = "gaussian"
    """What the network predicts: the mean velocity, the data end, or the mean velocity beyond a Gaussian's."""
    network: Literal["plain", "embedded"] = "embedded"
    """plain: s, t and x enter plain layers as they are. embedded: features of the times modulate every layer."""
    decoupled: int = 0
    """Number of last layers of the embedded network that see t alone; the others see s alone. 0: all see both times."""
    octaves: int = 0
    """Octaves of sines and cosines of x as further inputs, damped where the noise would hide them; 0 for none."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        super().check()
        if not 0 <= self.decoupled < self.depth:
            raise ValueError(f"--decoupled: expected a whole number from 0 to --depth - 1, got {self.decoupled}")
        if self.decoupled and self.network == "plain":
            raise ValueError("--decoupled: expected the embedded network, got --network plain")
        natural(self, "octaves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer, and how long it runs."""

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

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        positive(self, "steps", "batch")
        if self.warmup < 0 or self.warmup >= self.steps:
            raise ValueError(f"--warmup: expected at least 0 and less than --steps {self.steps}, got {self.warmup}")
        between(self, 0.0, 1.0, "beta2")
        between(self, 0.0, float("inf"), "ema")
        for name in ("learning_rate", "clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{flag(name)}: expected a positive number, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The objective, and how it draws its times."""

    objective: Literal["lsd", "esd", "psd_m", "psd_u", "mean_flow", "improved_mean_flow"] = "lsd"
    """The training method (docs: jflow.objectives)."""
    reduction: Literal["squared", "adaptive"] = "squared"
    """Residual to loss off the diagonal; with the squared one MeanFlow diverged here (see docs/results.md)."""
    velocity: Literal["pair", "batch"] = "pair"
    """The estimate of the velocity: from each pair, or its mean over the data of the batch (few dimensions)."""
    diagonal: float = 0.65
    """Share of each batch with s = t."""
    diagonal_start: float = 0.3
    """Share of the steps, at the beginning, in which the diagonal alone is trained."""
    full_jumps: float = 0.5
    """Share of the off-diagonal rows that start at s = 0; the others are uniform on the triangle."""
    stratified: bool = True
    """Spread the times of a batch evenly over their law."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        between(self, 0.0, 1.0, "diagonal", "diagonal_start", "full_jumps")
        if self.diagonal == 1.0:
            raise ValueError("--diagonal: expected less than 1: a flow map is learned on the off-diagonal rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How often a training reports."""

    log_every: int = 100
    """Steps per row of metrics; they run as one compiled program."""
    quick: bool = False
    """A small run that shows that everything works, for a laptop or a test; its numbers mean nothing."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        positive(self, "log_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Report):
    """How often a training reports, and what becomes of an earlier run."""

    resume: Literal["no", "yes", "auto"] = "no"
    """yes: continue from the newest whole checkpoint in --out. auto: the same, or start a run if there is none."""
    overwrite: bool = False
    """Replace an earlier run in --out."""

    def check(self) -> None:
        """Raises ValueError for values that exclude each other."""
        super().check()
        if self.resume != "no" and self.overwrite:
            raise ValueError("--resume, --overwrite: expected at most one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of one process."""

    fsdp: int = 1
    """Number of parts into which every large array of the state is divided; it must divide the number of devices."""
    stall_seconds: float | None = None
    """Seconds without a finished chunk of --log-every steps, compilation included, after which the run exits with 77."""

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the processes of a cluster are connected, if there are any."""
        return distributed.processes()

    def hooks(self) -> list[training.Hook]:
        """The hooks of ``fit``."""
        return [] if self.stall_seconds is None else [training.Watchdog(self.stall_seconds)]

    def mesh(self) -> jax.sharding.Mesh | None:
        """All devices; None for a single one, which needs no layout."""
        return sharding.mesh(self.fsdp) if jax.device_count() > 1 or self.fsdp > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine(Devices):
    """The devices and processes."""

    cluster: Literal["auto", "off"] = "auto"
    """Whether to look for a TPU pod, SLURM, Open MPI or Kubernetes, and join the processes found."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if no cluster is detected; needs --machine.processes and --machine.index."""
    processes: int | None = None
    """Number of processes."""
    index: int | None = None
    """Index of this process, from 0."""
    heartbeat_seconds: int = 30
    """Seconds without a sign of life after which another process counts as dead."""

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the processes of the run are connected."""
        return distributed.processes(
            self.coordinator,
            self.processes,
            self.index,
            automatic=self.cluster == "auto",
            heartbeat_seconds=self.heartbeat_seconds,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """Outputs of a run beside its metrics and checkpoints."""

    tensorboard: bool = False
    """Also write the metrics as events for TensorBoard, to OUT/tensorboard."""
    snapshots: int = 0
    """Steps between copies of the averaged parameters, OUT/averages/STEP; a multiple of --log-every, 0 for none."""
    flops: bool = False
    """Report floating-point operations per second and, if the devices' peak is known, the share of it."""
    profile: tuple[int, int] | None = None
    """First and last step of a profile, which is written to OUT/profile."""

    def check(self, log_every: int, steps: int) -> None:
        """Raises ValueError for intervals that do not fit the rows of metrics."""
        for name in ("grids", "snapshots"):
            every = getattr(self, name, 0)
            if every < 0 or every % min(log_every, steps):
                raise ValueError(f"--watch.{name}: expected 0 or a multiple of --log-every {log_every}, got {every}")

    def hooks(self, out: pathlib.Path) -> list[training.Hook]:
        """The hooks of ``fit``."""
        found: list[training.Hook] = [training.Progress()]
        if self.tensorboard:
            found.append(training.TensorBoard(out / "tensorboard"))
        if self.flops:
            found.append(training.CountFlops())
        if self.profile is not None:
            found.append(training.Profile(out / "profile", *self.profile))
        return found

    def picture_every(self) -> int:
        """Steps between pictures of samples; 0 for none."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchingSamples(Watching):
    """Outputs of a run beside its metrics and checkpoints, with pictures of samples."""

    grids: int = 0
    """Steps between pictures of one-jump samples, OUT/grids/STEP.png; a multiple of --log-every, 0 for none."""

    def picture_every(self) -> int:
        """Steps between pictures of samples; 0 for none."""
        return self.grids


# --- configurations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What one training needs, whatever its objective."""

    out: pathlib.Path
    """Directory for results.json, figures, samples, metrics and checkpoints."""
    model: Flat[Network] = Network()
    optimizer: Flat[Optimizer] = Optimizer()
    output: Flat[Output] = Output()
    seed: int = 0
    """Seed of the weights, the data and the noise."""
    machine: Devices = Devices()
    watch: Watching = Watching()

    def check(self) -> None:
        """Refuses values out of range.

        Raises:
          ValueError: naming the option, what came and what was expected.
        """
        check_parts(self)
        natural(self, "seed")

    def kept(self) -> dict[str, Any]:
        """The entries that a checkpoint keeps, enough to build the model again, as JSON values."""
        values = {name: value for name, value in flat(self).items() if name not in NOT_KEPT}
        return {"experiment": experiment_of(self), **values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapTraining(Training):
    """The choices of an experiment that trains one flow map by one objective and draws from it."""

    method: Flat[Method] = Method()
    samples: int = 100_000
    """Samples drawn with each number of jumps K; they are scored, and written to samples_K.npy."""
    machine: Machine = Machine()
    watch: WatchingSamples = WatchingSamples()

    def check(self) -> None:
        """As ``Training.check``."""
        super().check()
        positive(self, "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTraining(Training):
    """A training of a sweep; ``of_sweep`` are the entries of the checkpoint's config that all its rows have in common."""

    of_sweep: Mapping[str, Any]

    def kept(self) -> dict[str, Any]:
        """As ``Training.kept``, with those of the sweep."""
        return {**super().kept(), **self.of_sweep}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The choices of an experiment that trains many methods alike."""

    out: pathlib.Path
    """Directory for results.json, figures, metrics and checkpoints."""
    methods: tuple[str, ...] = ()
    """Names of the methods to run; all if none is given."""
    model: Flat[Size] = Size()
    optimizer: Flat[Optimizer] = Optimizer()
    output: Flat[Report] = Report()
    samples: int = 8192
    """Samples drawn from each method."""
    machine: Devices = Devices()
    watch: Watching = Watching()

    def check(self) -> None:
        """As ``Training.check``."""
        check_parts(self)
        positive(self, "samples")

    def check_methods(self, known: Mapping[str, Any]) -> None:
        """Raises ValueError for a method that is not among the known ones."""
        if unknown := sorted(set(self.methods) - set(known)):
            raise ValueError(f"--methods: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")

    def training(self, out: pathlib.Path, seed: int, network: Mapping[str, Any], **of_sweep: Any) -> RowTraining:
        """The training of one row; ``network`` are its further choices of ``Network``."""
        return RowTraining(
            out=out,
            model=Network(**vars(self.model), **network),
            optimizer=self.optimizer,
            output=Output(**vars(self.output)),
            seed=seed,
            machine=self.machine,
            watch=self.watch,
            of_sweep={"experiment": experiment_of(self), **of_sweep},
        )


# --- functions of configurations --------------------------------------------------------------------------------------


def check_parts(config: Any) -> None:
    """Checks every part of a configuration, and the intervals of its ``watch``."""
    for field in dataclasses.fields(config):
        if field.name != "watch" and hasattr(value := getattr(config, field.name), "check"):
            value.check()
    config.watch.check(config.output.log_every, config.optimizer.steps)


def flat(config: Any) -> dict[str, Any]:
    """All options by their own names; ``machine`` and ``watch`` as they are."""
    found = {}
    for name, value in vars(config).items():
        found |= flat(value) if _is_flat(name, value) else {name: value}
    return found


def replace(config: T, **values: Any) -> T:
    """The configuration with other values of some options, which are named as in ``flat``.

    Raises:
      TypeError: for an option that it does not have.
    """
    if unknown := sorted(set(values) - set(flat(config)) - set(vars(config))):
        raise TypeError(f"{type(config).__name__}: expected options that it has, got {', '.join(unknown)}")
    own = {name: value for name, value in values.items() if name in vars(config)}
    for name, part in vars(config).items():
        if _is_flat(name, part) and (of_part := {k: v for k, v in values.items() if k in vars(part)}):
            own[name] = replace(part, **of_part)
    return dataclasses.replace(config, **own)  # pyright: ignore[reportArgumentType]


def make(config_type: Callable[..., T], **values: Any) -> T:
    """A configuration from options that are named as in ``flat``; the others have their defaults.

    Raises:
      TypeError: as ``replace``.
    """
    names = {field.name for field in dataclasses.fields(config_type)}  # pyright: ignore[reportArgumentType]
    own = {name: value for name, value in values.items() if name in names}
    return replace(config_type(**own), **{name: value for name, value in values.items() if name not in names})


def quick(config: T, **values: Any) -> T:
    """The configuration of a small run."""
    return replace(config, **(QUICK | values))


def experiment_of(config: Any) -> str:
    """The name of the experiment whose module defines the configuration."""
    name = type(config).__module__.split(".")[-1]
    return pathlib.Path(sys.modules["__main__"].__file__ or "").stem if name == "__main__" else name


def _is_flat(name: str, value: Any) -> bool:
    return dataclasses.is_dataclass(value) and name not in ("machine", "watch")


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return name.replace("_", "-")


def positive(config: Any, *names: str) -> None:
    """Raises ValueError for options that are not positive."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{flag(name)}: expected a positive whole number, got {getattr(config, name)}")


def natural(config: Any, *names: str) -> None:
    """Raises ValueError for options that are negative."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"--{flag(name)}: expected a whole number from 0, got {getattr(config, name)}")


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Raises ValueError for options outside of an interval."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            value = getattr(config, name)
            raise ValueError(f"--{flag(name)}: expected a number from {low:g} to {high:g}, got {value}")
