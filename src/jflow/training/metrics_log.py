"""A file of metrics in JSON lines that a resumed run continues."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jflow import checks


class MetricsLog:
    """A file of JSON lines, one per row. Each row is flushed at once, so a killed process loses at most one line.

    Every row holds ``step``, the number of steps taken. Numbers that are not finite are written as null.

    Args:
      path: the file; its directory must exist.
      after: on resume, the restored step. Rows of later steps, and an incomplete last line, are removed, so that no row
        occurs twice. None to start a new file.

    Raises:
      FileExistsError: if the file exists and ``after`` is None.
      ValueError: if ``after`` is negative, or a line of the file is not a row.
      TypeError: if ``after`` is not a whole number.
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
    """The rows of a metrics file, oldest first; an incomplete last line is left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line is not JSON (other than an incomplete last line), or not a row with a step.
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
    # Write a new file and replace the old one in one step, so that a killed process leaves a complete file.
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
