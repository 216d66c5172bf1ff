"""The directory of a run: metrics, checkpoints and snapshots, and how an earlier run in it is treated."""

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
    """Where ``fit`` keeps a run, what it keeps, and what happens to an earlier run there.

    The files::

        PATH/metrics.jsonl        rows of metrics (``metrics_log.read``)
        PATH/checkpoints/STEP     checkpoints of the whole state (``restore_params`` reads the parameters)
        PATH/averages/STEP        snapshots of the averages alone (``training.ema_posthoc`` recombines them)

    Of several processes each gives the same directory, which all of them can see.

    Attributes:
      path: the directory; made if it is missing. Other files in it are left alone.
      checkpoint_every: steps per checkpoint, a multiple of ``log_every``; also at the end. None for no checkpoints.
      snapshot_every: steps per snapshot of the averages, likewise; all snapshots are kept.
      resume: True to continue from the newest checkpoint that is whole; later rows of metrics are dropped. "auto" to start
        anew if there is no checkpoint, so that one command serves a machine that may be taken away.
      overwrite: whether to delete the metrics, checkpoints and snapshots of an earlier run.
      keep: the number of newest checkpoints to keep.
      keep_best: the number of further checkpoints to keep, those of the lowest ``best``.
      best: the name of an entry that the evaluation returns. Checkpoints of steps with an evaluation are compared.
      config: JSON values that are kept in the checkpoints. On resume they must be the same.
      ignore: entries of ``config``, by dotted name, that may differ on resume.

    Raises:
      ValueError, TypeError: for numbers out of range, values that JSON cannot hold, or choices that exclude each other.
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
          state: the first state; for a resumed run, an example of the restored one and its layout.
          chunk_steps: the length of a chunk, which checkpoints record.

        Yields:
          The open files, and the state to begin with.

        Raises:
          FileExistsError: if the directory holds a run, and neither ``resume`` nor ``overwrite`` is set.
          FileNotFoundError: if there is nothing to resume, or no checkpoint is whole.
          ValueError: for a checkpoint of another config or kind.
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
            # A run that was killed before its first checkpoint begins anew, and its rows are dropped.
            kept = (int(state.step) if resumed else 0) if self.resume else None
            if self.snapshot_every is not None:
                snapshots = Checkpoints(out / "averages", config=self.config, keep=None, resume=bool(self.resume))
                stack.enter_context(snapshots)
                snapshots.drop_after(int(state.step))
            if first_process():
                log = stack.enter_context(MetricsLog(out / "metrics.jsonl", kept))
            if resumed:
                # Every process has the same alarms, for a hook may act on them.
                barrier("dropped the later rows")
                watch = Watch(rows=read(out / "metrics.jsonl"))
            yield Opened(state, position, resumed, checkpoints, snapshots, log, watch)

    def _prepare(self) -> pathlib.Path:
        """Makes the directory; an earlier run is refused, kept or deleted."""
        out = absolute("path", self.path)
        out.mkdir(parents=True, exist_ok=True)
        folders = [out / "checkpoints", out / "averages"]
        metrics = out / "metrics.jsonl"
        used = metrics.exists() or any(folder.exists() and any(folder.iterdir()) for folder in folders)
        if used and not (self.resume or self.overwrite):
            raise FileExistsError(f"{out} holds a run already; resume it, overwrite it, or choose another directory")
        barrier("looked at the run's directory")
        if used and self.overwrite and first_process():
            metrics.unlink(missing_ok=True)
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        barrier("emptied the run's directory")
        return out


class Averages(NamedTuple):
    """What a snapshot keeps: the step and the averages of a state."""

    step: Array
    ema: dict[str, Params]


class Opened(NamedTuple):
    """An open run directory, or the lack of one.

    Attributes:
      state: the state to begin with.
      position: the restored position of a feed, or None.
      resumed: whether the state was restored.
      checkpoints, snapshots, log: where to write; None for not at all.
      watch: looks at rows for alarms; it has seen the rows of a resumed run.
    """

    state: TrainState
    position: Any
    resumed: bool
    checkpoints: Checkpoints | None
    snapshots: Checkpoints | None
    log: MetricsLog | None
    watch: Watch
