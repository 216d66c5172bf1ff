"""Writes the rows of a run to Weights & Biases."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from jflow import checks
from jflow.training.hooks import Hook, Row, Started


class Run(Protocol):
    """The part of ``wandb.sdk.wandb_run.Run`` that the hook uses."""

    def log(self, data: dict[str, Any], step: int) -> object:
        """Records values at a step."""
        ...


class Wandb(Hook):
    """A hook that writes every row to a run of Weights & Biases.

    For example::

        fit(state, chunk, data, hooks=[Wandb(project="digits", config={"lr": 1e-3}), Progress()], ...)

    A number is written as ``KIND/NAME`` ("train/loss"). A vector (means by bins) is written as one number per entry,
    ``KIND/NAME/0`` and so on, without entries that are not finite. A string, such as ``warning``, is written as text. With
    several processes only the first writes.

    To continue a wandb run after a restart, pass ``id="..."`` and ``resume="allow"``. Wandb ignores values at steps before
    the last one that it has.

    Args:
      run: a run returned by ``wandb.init``, which the hook does not finish; by default the hook makes a run when training
        starts, and finishes it at the end.
      settings: arguments of ``wandb.init``, such as ``project``, ``name``, ``config``, ``dir`` and ``mode``.

    Raises:
      ImportError: if no run is given and wandb is not installed; it comes with ``jflow[wandb]``.
      TypeError: if the run has no ``log``, or settings are given together with a run.
    """

    def __init__(self, run: Run | None = None, **settings: Any) -> None:
        if run is not None:
            checks.function("run.log", getattr(run, "log", None), "(data, step) -> None, as a run of wandb has")
            if settings:
                raise TypeError(f"run: expected no settings with a run, got {', '.join(sorted(settings))}")
        self._given, self._settings = run, settings
        self._init = _init() if run is None else None
        self._run: Any = None

    def start(self, started: Started) -> None:
        """Makes the run, unless one was given."""
        del started
        if jax.process_index() == 0:
            self._run = self._given if self._init is None else self._init(**self._settings)

    def row(self, row: Row) -> None:
        """Writes every entry of rank 0 or 1, except ``kind`` and ``step``."""
        if self._run is None:
            return
        values: dict[str, Any] = {}
        for name, value in row.items():
            tag = f"{row['kind']}/{name}"
            if name in ("kind", "step"):
                continue
            if isinstance(value, str):
                values[tag] = value
                continue
            value = np.asarray(value, np.float64)
            if value.ndim == 0:
                values[tag] = float(value)
            elif value.ndim == 1:
                values |= {f"{tag}/{place}": float(entry) for place, entry in enumerate(value) if np.isfinite(entry)}
        self._run.log(values, step=row["step"])

    def __exit__(self, *error: object) -> None:
        """Finishes the run if the hook made it, and marks it as failed after an error."""
        run, self._run = self._run, None
        if run is not None and self._given is None:
            run.finish(exit_code=int(error[:1] not in ((), (None,))))


def _init() -> Any:
    try:
        from wandb import init  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("Wandb: rows are written with wandb, which is missing: pip install 'jflow[wandb]'") from error
    return init
