"""Metrics of a run: averages over steps, and a file of JSON lines that outlives the process and is resumed."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jflow import checks

# Metrics of which something else than a mean is taken over steps.
TAKEN: dict[str, Callable[[Any], Any]] = {
    "finite": lambda values: values.all(0),
    "broken_steps": lambda values: values.sum(0),
    "broken_run": lambda values: values.max(0),
    "updates": lambda values: values[-1],
    "first_loss": lambda values: values[0],
    "last_loss": lambda values: values[-1],
}


def average(stacked: Mapping[str, Any], weights: Any) -> dict[str, Any]:
    """Metrics of many steps, ``[K, ...]`` each, as one: means with weights ``[K]``.

    ``finite`` is true when all are, ``broken_steps`` the sum, ``broken_run`` the largest, ``updates`` and ``last_loss`` the
    last one, ``first_loss`` the first. Broken steps, of which there are ``broken_steps`` [K], are left out of the means
    unless all are broken. A mean by bins, ``NAME/raw_by_...``, has one weight per bin, ``NAME/count_by_...``, where there is
    one, since an empty bin says nothing; ``update_norm`` is the mean over the steps that made an update, with
    ``updated`` [K]. Works on numpy and on jax arrays.
    """
    sound = _sound(weights, stacked.get("broken_steps"))
    result = {}
    for name, values in stacked.items():
        counts = stacked.get("updated" if name == "update_norm" else name.replace("/raw_by_", "/count_by_"))
        if name in TAKEN:
            result[name] = TAKEN[name](values)
        elif counts is not None and counts is not values:
            result[name] = _mean(values, counts.astype(values.dtype) * _column(sound, values))
        else:
            result[name] = _mean(values, _column(sound, values))
    return result


def _sound(weights: Any, broken: Any) -> Any:
    """The weights without the broken steps; as they were where no other step is left."""
    if broken is None:
        return weights
    left = weights - broken.astype(weights.dtype)
    return left + weights * (left.sum(0) == 0).astype(weights.dtype)


def _column(weights: Any, values: Any) -> Any:
    return weights.reshape((-1,) + (1,) * (values.ndim - 1)).astype(values.dtype)


def _mean(values: Any, weights: Any) -> Any:
    total = weights.sum(0)
    module = np if isinstance(values, np.ndarray) else jnp
    # What has no weight may be not a number: zero times that would not be zero.
    weighed = module.where(weights == 0, module.zeros_like(values), values * weights)
    return weighed.sum(0) / (total + (total == 0).astype(total.dtype))


class MetricsLog:
    """A file of JSON lines, one row each, written through at once: a killed process loses at most the line it was in.

    Every row holds ``step``, the number of steps taken. Numbers that are not finite are written as null.

    Args:
      path: the file; its directory must exist.
      after: on resume, the step restored: rows past it, and a torn last line, are dropped, so that none comes twice.
        None to start a new file.

    Raises:
      FileExistsError: when the file exists and ``after`` is None.
      ValueError, TypeError: when ``after`` is no whole number from 0, or a line is no row.
    """

    def __init__(self, path: str | os.PathLike[str], after: int | None = None) -> None:
        self.path = pathlib.Path(path).absolute()
        if after is not None:
            checks.integer("after", after)
        if after is None and self.path.exists():
            raise FileExistsError(f"{self.path} exists already; resume the run or overwrite it")
        if after is not None:
            _drop(self.path, after)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row; arrays become numbers or lists."""
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; a torn last line is left out.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: for a line, other than a torn last one, that is no JSON.
    """
    rows = []
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is no JSON: {line!r}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path}: line {number} is no row with a step: {line!r}")
        rows.append(row)
    return rows


def _drop(path: pathlib.Path, after: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read(path) if row["step"] <= after]
    # In a new file that takes the old one's place at once: killed in between, either is whole.
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool)) or value is None:
        return value
    value = np.asarray(value).tolist()
    return _nullify(value)


def _nullify(value: Any) -> Any:
    if isinstance(value, list):
        return [_nullify(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
