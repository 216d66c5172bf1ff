"""Rows of metrics: read from the device, judged, written and shown."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jflow import reports
from jflow.training.hooks import Hook, Row
from jflow.training.run_directory import Opened
from jflow.training.step import Metrics

# The steps taken before a chunk and after it, and its metrics, still on the device.
Interval = list[tuple[int, int, Metrics]]


class NonFiniteError(RuntimeError):
    """More steps than are forgiven had a loss, gradient or update that was not finite, or the parameters are not.

    Attributes:
      first_step, last_step: the steps among which it happened, both counted from 1.
      checkpoint: the step of the newest checkpoint, from before it happened, or None.
    """

    def __init__(self, first_step: int, last_step: int, checkpoint: int | None, metrics: Mapping[str, Any]) -> None:
        self.first_step, self.last_step, self.checkpoint = first_step, last_step, checkpoint
        numbers = ", ".join(
            f"{name} {np.asarray(metrics[name]):.4g}"
            for name in ("loss", "grad_norm", "update_norm")
            if name in metrics
        )
        good = "there is no checkpoint" if checkpoint is None else f"the last good checkpoint is of step {checkpoint}"
        super().__init__(
            f"not finite within steps {first_step} to {last_step} (means: {numbers}){_survivors(metrics)}; {good}"
        )


def _survivors(metrics: Mapping[str, Any]) -> str:
    """What an error says of the broken steps that the parameters survived."""
    broken = int(metrics.get("broken_steps", 0))
    if not broken:
        return ""
    return (
        f", without {broken} broken step{'s' * (broken > 1)}, up to {int(metrics['broken_run'])} in a row, after which the "
        "parameters were finite (fit's forgive is how many in a row are passed over)"
    )


class Recorder:
    """Reads metrics from the device, writes rows, and ends a run whose numbers are not finite.

    Args:
      opened: the files of the run.
      hooks: called with every row.
      forgive: the number of broken steps in a row after which the run may go on.
    """

    def __init__(self, opened: Opened, hooks: Sequence[Hook], forgive: int = 0) -> None:
        self._forgive, self._hooks = forgive, hooks
        self._checkpoints, self._log, self._watch = opened.checkpoints, opened.log, opened.watch
        self._evaluated: tuple[int, Mapping[str, Any]] = (-1, {})
        self._began = self._last = time.perf_counter()

    def train(self, interval: Interval) -> None:
        """One row for the chunks of an interval; waits until they are done."""
        if not interval:
            return
        chunks = jax.device_get([metrics for _, _, metrics in interval])
        now = time.perf_counter()
        first, last = interval[0][0], interval[-1][1]
        found = reports.merged(jax.tree.map(lambda *leaves: np.stack([_wide(leaf) for leaf in leaves]), *chunks))
        self._watch.expect(found)
        row = {
            "kind": "train",
            "step": last,
            "steps": last - first,
            **reports.values(found),
            "steps_per_second": (last - first) / (now - self._last),
            "seconds": now - self._began,
        }
        self._last = now
        for hook in self._hooks:
            hook.complete(row)
        warning = self._watch(row)
        self._write(row if warning is None else {**row, "warning": warning})
        for (start, stop, _), metrics in zip(interval, chunks, strict=True):
            if not self._forgiven(reports.values(metrics)):
                raise NonFiniteError(start + 1, stop, self._last_good(), reports.values(metrics))

    def eval(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of what an evaluation found; TypeError if that is not a mapping."""
        if not isinstance(values, Mapping):
            raise TypeError(f"evaluation: expected a mapping of names to numbers, it returned {type(values).__name__}")
        values = jax.device_get(dict(values))
        self._evaluated = step, values
        self._write({"kind": "eval", "step": step, **values})
        # The time it took is not the training's.
        self._last = time.perf_counter()

    def score(self, step: int, name: str) -> float | None:
        """What the evaluation at this step found under this name; None where there was none.

        Raises:
          ValueError: when it found nothing of that name.
        """
        at, values = self._evaluated
        if at != step:
            return None
        if name not in values:
            raise ValueError(f"best: expected an entry of what the evaluation returns, {sorted(values)}, got {name!r}")
        return float(values[name])

    def _forgiven(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the run may go on after a chunk."""
        if metrics["finite"] or not self._forgive:
            return bool(metrics["finite"])
        # Parameters that are not finite stay so: those after the last step tell of all.
        return bool(np.isfinite(metrics["param_norm"]) and metrics["broken_run"] <= self._forgive)

    def _write(self, row: Row) -> None:
        if self._log is not None:
            self._log.write(row)
        for hook in self._hooks:
            hook.row(row)

    def _last_good(self) -> int | None:
        if self._checkpoints is None:
            return None
        self._checkpoints.wait()
        return max(self._checkpoints.steps(), default=None)


def _wide(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(np.float64) if np.issubdtype(value.dtype, np.inexact) else value
