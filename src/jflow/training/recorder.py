"""The recorder: reads metrics from the device, checks them, and passes rows to the log and the hooks."""

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

# For each chunk the steps taken before it and after it, and its metrics, which are still on the device.
Interval = list[tuple[int, int, Metrics]]


class NonFiniteError(RuntimeError):
    """More consecutive steps than allowed had a loss, gradient or update that was not finite, or the parameters are not finite.

    Attributes:
      first_step, last_step: the range of steps in which it happened, counted from 1.
      checkpoint: the step of the newest checkpoint, saved before it happened, or None.
    """

    def __init__(self, first_step: int, last_step: int, checkpoint: int | None, metrics: Mapping[str, Any]) -> None:
        self.first_step, self.last_step, self.checkpoint = first_step, last_step, checkpoint
        numbers = ", ".join(
            f"{name} {np.asarray(metrics[name]):.4g}"
            for name in ("loss", "grad_norm", "update_norm")
            if name in metrics
        )
        if first_step == 1:
            numbers += "; if the first steps fail, look for values in the data that are not finite"
        good = "there is no checkpoint" if checkpoint is None else f"the last good checkpoint is of step {checkpoint}"
        super().__init__(
            f"not finite within steps {first_step} to {last_step} (means: {numbers}){_survivors(metrics)}; {good}"
        )


def _survivors(metrics: Mapping[str, Any]) -> str:
    """The part of the error message about broken steps after which the parameters were finite."""
    broken = int(metrics.get("broken_steps", 0))
    if not broken:
        return ""
    return (
        f", without {broken} broken step{'s' * (broken > 1)}, up to {int(metrics['broken_run'])} in a row, after which the "
        "parameters were finite (fit's forgive is how many in a row are passed over)"
    )


class Recorder:
    """Reads metrics from the device, writes rows, and raises an error if values are not finite.

    Args:
      opened: the files of the run.
      hooks: the hooks to call with every row.
      forgive: the largest number of consecutive broken steps after which the run continues.
    """

    def __init__(self, opened: Opened, hooks: Sequence[Hook], forgive: int = 0) -> None:
        self._forgive, self._hooks = forgive, hooks
        self._checkpoints, self._log, self._watch = opened.checkpoints, opened.log, opened.watch
        self._evaluated: tuple[int, Mapping[str, Any]] = (-1, {})
        self._began = self._last = time.perf_counter()

    def train(self, interval: Interval) -> None:
        """Waits for the chunks of an interval and writes one row for them."""
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
        """Writes one row with the result of an evaluation; raises TypeError if it is not a mapping."""
        if not isinstance(values, Mapping):
            raise TypeError(f"evaluation: expected a mapping of names to numbers, it returned {type(values).__name__}")
        values = jax.device_get(dict(values))
        self._evaluated = step, values
        self._write({"kind": "eval", "step": step, **values})
        # Exclude the time of the evaluation from the rate of training.
        self._last = time.perf_counter()

    def score(self, step: int, name: str) -> float | None:
        """The entry of this name in the evaluation at this step; None if there was no evaluation.

        Raises:
          ValueError: if the evaluation has no entry of this name.
        """
        at, values = self._evaluated
        if at != step:
            return None
        if name not in values:
            raise ValueError(f"best: expected an entry of what the evaluation returns, {sorted(values)}, got {name!r}")
        return float(values[name])

    def _forgiven(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the run may continue after a chunk."""
        if metrics["finite"] or not self._forgive:
            return bool(metrics["finite"])
        # Parameters that are not finite stay so, so it suffices to check them after the last step.
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
