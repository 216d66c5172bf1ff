"""The files of results: results.json with the environment, Markdown tables, and the refusal of earlier results."""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax


def refuse_existing(out: pathlib.Path, overwrite: bool) -> None:
    """Refuses a directory with earlier results.

    Raises:
      FileExistsError: if it holds results.json, without ``overwrite``.
    """
    if (out / "results.json").exists() and not overwrite:
        raise FileExistsError(f"--out: {out} holds results already; pass --overwrite or another directory")


def write(out: pathlib.Path, values: Mapping[str, Any], table: str | None = None) -> dict[str, Any]:
    """Writes ``values`` and the environment to results.json, and the table, which it prints, to table.md.

    Args:
      out: the directory; made if it is missing.
      values: the results; an entry of the same name replaces that of the environment.
      table: Markdown, or None.

    Returns:
      What was written to results.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = {**environment(), **values}
    record = {**values, **{name: record[name] for name in record if name not in values}}
    write_json(out / "results.json", record)
    if table is not None:
        (out / "table.md").write_text(table + "\n")
        print(table)
    return record


def environment() -> dict[str, Any]:
    """Where a result comes from: command, commit, date, device and versions."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        revision = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    device = jax.devices()[0]
    import diffrax
    import flax

    return {
        "command": " ".join(["python", "-m", program(), *sys.argv[1:]]),
        "commit": revision,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{device.platform}, {device.device_kind}, {len(jax.devices())} device(s)",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "diffrax": diffrax.__version__,
        },
    }


def program() -> str:
    """The module that runs as the main program."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else "experiments"


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes JSON, arrays as numbers and lists."""

    def plain(value: Any) -> Any:
        array = np.asarray(value)
        return array.tolist() if array.dtype != object else str(value)

    path.write_text(json.dumps(values, indent=2, default=plain) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 3) -> str:
    """A Markdown table; floating-point numbers have so many significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *[[cell(v) for v in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def labelled(label: str, rows: Mapping[Any, Mapping[str, Any]]) -> str:
    """A Markdown table of rows by name; its first column has the names, and the first row names the other columns."""
    columns = list(next(iter(rows.values())))
    return markdown([label, *columns], [[name, *(row[column] for column in columns)] for name, row in rows.items()])
