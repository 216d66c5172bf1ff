"""The directory of a run: its metrics, checkpoints and snapshots, and resuming or replacing an earlier run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from jflow import checks
from jflow.training.alarms import Watch
from jflow.training.checkpoint_config import as_json
from jflow.training.checkpoints import Checkpoints, absolute
from jflow.training.distributed import barrier, first_process
from jflow.training.metrics_log import MetricsLog, read
from jflow.training.state import TrainState
from jflow.types import Array, Params


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The directory in which ``fit`` keeps a run, with the choice of what to keep and of what to do with an earlier run.

    It contains::

        PATH/metrics.jsonl        rows of metrics (``metrics_log.read``)
        PATH/checkpoints/STEP     checkpoints of the whole state (``restore_params`` reads the parameters)
        PATH/averages/STEP        snapshots of the averages alone (``training.ema_posthoc`` recombines them)

    With several processes, all must use the same directory on a shared file system.

    Attributes:
      path: the directory; created if it is missing. Other files in it are not touched.
      checkpoint_every: steps per checkpoint, a multiple of ``log_every``; one is also made at the end. None for no
        checkpoints.
      snapshot_every: steps per snapshot of the averages, a multiple of ``log_every``; one is also made at the end, and all
        are kept. None for no snapshots.
      resume: True to continue from the newest checkpoint that is not damaged; later rows of metrics are removed. "auto" does
        the same, but starts a new run if there is no checkpoint, so that the same command starts and resumes a run.
      overwrite: whether to delete the metrics, checkpoints and snapshots of an earlier run.
      keep: the number of newest checkpoints to keep.
      keep_best: the number of further checkpoints to keep, those with the lowest value of ``best``.
      best: the name of an entry that the evaluation returns. Only checkpoints of steps with an evaluation are compared.
      config: JSON values to save in the checkpoints. On resume they must be the same.
      ignore: dotted names of entries of ``config`` that may differ on resume.

    Raises:
      ValueError: if a number is out of range, both ``resume`` and ``overwrite`` are set, ``resume`` is "auto" without
        checkpoints, or only one of ``best`` and ``keep_best`` is given or both without checkpoints.
      TypeError: if a number is not a whole number, or ``config`` is not made of JSON types.
    """

    path: str | os.PathLike[str]
    checkpoint_every: int | None = None
    snapshot_every: int | None = None
    resume: bool | Literal["auto"] = False
    overwrite: bool = False
    keep: int = 3
    keep_best: int = 0
    best: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignore: Collection[str] = ()

    def __post_init__(self) -> None:
        absolute("path", self.path)
        checks.choice("resume", self.resume, (False, True, "auto"))
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of them")
        if self.resume == "auto" and self.checkpoint_every is None:
            raise ValueError(
                "resume, checkpoint_every: expected checkpoints to resume from with resume='auto', got None"
            )
        if (self.best is None) != (self.keep_best == 0) or (self.best is not None and self.checkpoint_every is None):
            raise ValueError("best, keep_best, checkpoint_every: expected all, or neither of the first two")
        checks.integer("keep", self.keep, low=1)
        checks.integer("keep_best", self.keep_best)
        as_json("config", self.config)

    @contextlib.contextmanager
    def opened(self, state: TrainState, chunk_steps: int) -> Iterator[Opened]:
        """Opens the directory and finds where the run begins.

        Args:
          state: the initial state. For a resumed run it gives the structure, shapes, dtypes and shardings of the restored one.
          chunk_steps: the length of a chunk, which checkpoints record.

        Yields:
          The open files, and the state to begin with.

        Raises:
          FileExistsError: if the directory holds a run, and neither ``resume`` nor ``overwrite`` is set.
          FileNotFoundError: if there is no checkpoint to resume from, or every one is damaged.
          ValueError: if the checkpoint has another config, structure, shape or dtype.
        """
        with contextlib.ExitStack() as stack:
            out = self._prepare()
            checkpoints = snapshots = log = position = None
            watch, resumed = Watch(), False
            if self.resume or self.checkpoint_every is not None:
                checkpoints = Checkpoints(
                    out / "checkpoints",
                    config=self.config,
                    notes={"chunk_steps": chunk_steps},
                    keep=self.keep,
                    keep_best=self.keep_best,
                    resume=bool(self.resume),
                )
                stack.enter_context(checkpoints)
                if self.resume is True or (self.resume == "auto" and checkpoints.steps()):
                    resumed = True
                    state, position = checkpoints.restore_latest(state, ignore=self.ignore)
            # A run that was killed before its first checkpoint starts again, and its rows are removed.
            kept = (int(state.step) if resumed else 0) if self.resume else None
            if self.snapshot_every is not None:
                snapshots = Checkpoints(out / "averages", config=self.config, keep=None, resume=bool(self.resume))
                stack.enter_context(snapshots)
                snapshots.drop_after(int(state.step))
            if first_process():
                log = stack.enter_context(MetricsLog(out / "metrics.jsonl", kept))
            if resumed:
                # Give every process the same alarms, since a hook may act on them.
                barrier("dropped the later rows")
                watch = Watch(rows=read(out / "metrics.jsonl"))
            yield Opened(state, position, resumed, checkpoints, snapshots, log, watch)

    def _prepare(self) -> pathlib.Path:
        """Creates the directory, and rejects, keeps or deletes an earlier run in it."""
        out = absolute("path", self.path)
        out.mkdir(parents=True, exist_ok=True)
        folders = [out / "checkpoints", out / "averages"]
        metrics = out / "metrics.jsonl"
        used = metrics.exists() or any(folder.exists() and any(folder.iterdir()) for folder in folders)
        if used and not (self.resume or self.overwrite):
            raise FileExistsError(
                f"{out} holds a run already; resume it (RunDirectory's resume=True), overwrite it (overwrite=True), or choose "
                "another directory"
            )
        barrier("looked at the run's directory")
        if used and self.overwrite and first_process():
            metrics.unlink(missing_ok=True)
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        barrier("emptied the run's directory")
        return out


class Averages(NamedTuple):
    """The content of a snapshot: the step and the averages of a state."""

    step: Array
    ema: dict[str, Params]


class Opened(NamedTuple):
    """The open files of a run, and the state to begin with.

    Attributes:
      state: the state to begin with.
      position: the restored position of a feed, or None.
      resumed: whether the state was restored.
      checkpoints, snapshots, log: the files to write to; None to write nothing.
      watch: the alarms; in a resumed run they have seen the earlier rows.
    """

    state: TrainState
    position: Any
    resumed: bool
    checkpoints: Checkpoints | None
    snapshots: Checkpoints | None
    log: MetricsLog | None
    watch: Watch
