"""Options for where an experiment runs and what it reports; they do not change what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from jflow import sharding, training
from jflow.sample import picture
from jflow.training import distributed, image_grids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices and processes."""

    fsdp: int = 1
    """Number of parts into which every large array of the state is divided; it must divide the number of devices."""
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
    stall_seconds: float | None = None
    """Seconds without a finished chunk of --log-every steps, compilation included, after which the run exits with 77."""

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the processes of the run are connected."""
        return distributed.processes(
            self.coordinator,
            self.processes,
            self.index,
            automatic=self.cluster == "auto",
            heartbeat_seconds=self.heartbeat_seconds,
        )

    def hooks(self) -> list[training.Hook]:
        """The hooks of ``fit``."""
        return [] if self.stall_seconds is None else [training.Watchdog(self.stall_seconds)]

    def mesh(self) -> jax.sharding.Mesh | None:
        """All devices; None for a single one, which needs no layout."""
        return sharding.mesh(self.fsdp) if jax.device_count() > 1 or self.fsdp > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """Outputs of a run beside its metrics and checkpoints."""

    tensorboard: bool = False
    """Also write the metrics as events for TensorBoard, to OUT/tensorboard."""
    grids: int = 0
    """Steps between pictures of one-jump samples, OUT/grids/STEP.png; a multiple of --log-every, 0 for none."""
    snapshots: int = 0
    """Steps between copies of the averaged parameters, OUT/averages/STEP; a multiple of --log-every, 0 for none."""
    flops: bool = False
    """Report floating-point operations per second and, if the devices' peak is known, the share of it."""
    profile: tuple[int, int] | None = None
    """First and last step of a profile, which is written to OUT/profile."""

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


def grid_writer(
    out: pathlib.Path, draw: Callable[[Any], np.ndarray], average: str
) -> Callable[[training.TrainState], dict[str, float]]:
    """A function for ``training.Evaluation`` that writes the picture ``draw(params)`` of the averaged parameters."""

    def write(state: training.TrainState) -> dict[str, float]:
        params = sharding.local(training.ema.as_params(state.ema[average], state.params))
        if distributed.first_process():
            (out / "grids").mkdir(exist_ok=True)
            image_grids.write_png(out / "grids" / f"{int(state.step)}.png", picture(draw(params)))
        return {}

    return write
