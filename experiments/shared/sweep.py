"""Sweeps over methods and seeds: each job writes a row.json of its own, and a row that exists is not computed again.

A sweep may therefore be stopped and repeated, or run at the same time on different jobs.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.shared import results


class Job(NamedTuple):
    """One row to compute.

    Attributes:
      title: what is printed when it starts.
      directory: where its row.json is written.
      run: ``() -> row``.
    """

    title: str
    directory: pathlib.Path
    run: Callable[[], dict[str, Any]]


def directory(out: pathlib.Path, *names: Any) -> pathlib.Path:
    """The directory of a row below ``out``: its names without commas and spaces."""
    return out.joinpath(*(str(name).replace(", ", "-").replace(" ", "_") for name in names))


def read(there: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row that has been written, or None.

    Args:
      there: the directory of the row.
      config: what all rows of the sweep have in common; a row that was written without it is not compared.

    Raises:
      ValueError: for a row of another configuration.
    """
    path = there / "row.json"
    if not path.is_file():
        return None
    row = json.loads(path.read_text())
    wanted = _as_json(config)
    found = row.get("config", wanted)
    if found != wanted:
        other = sorted(k for k in {*wanted, *found} if k not in found or k not in wanted or found[k] != wanted[k])
        raise ValueError(f"--out: {path} was written with another {', '.join(other)}; choose another directory")
    return row


def run_missing(jobs: Iterable[Job], config: Mapping[str, Any]) -> None:
    """Runs the jobs whose rows are missing, in their order, and writes their rows.

    Raises:
      ValueError: as ``read``, and with several processes, because one process measures each row.
    """
    one_process()
    for job in jobs:
        if read(job.directory, config) is None:
            print(f"--- {job.title}", flush=True)
            row = job.run()
            job.directory.mkdir(parents=True, exist_ok=True)
            results.write_json(job.directory / "row.json", {**row, "config": _as_json(config)})


def one_process() -> None:
    """Refuses several processes.

    Raises:
      ValueError: if there are several.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--machine.processes: expected one process, got {jax.process_count()}")


def values(rows: Sequence[Any], *path: str) -> list[float]:
    """The number at a path of keys in each row; rows without it are left out."""
    found = []
    for row in rows:
        for key in path:
            row = row.get(key) if isinstance(row, dict) else None
        if row is not None:
            found.append(row)
    return found


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    # In the form in which JSON returns it: tuples become lists.
    return json.loads(json.dumps(config, default=str))
