"""A trained map beside ODE solves of the same network: error, sample distance, cost and time."""

from __future__ import annotations

import json
import pathlib

import jax

from experiments.shared import results
from experiments.shared.run import AVERAGE, MAKE
from jflow import comparison
from jflow.comparison import shell

STEPS = {"euler": (1, 2, 4, 8, 16, 32, 100), "heun": (1, 2, 4, 8, 16)}
TOLERANCES = {"tsit5": (1e-1, 1e-2, 1e-3), "dopri8": (1e-1, 1e-3)}
QUICK_STEPS = {"euler": (1, 8, 100), "heun": (4,)}
QUICK_TOLERANCES = {"tsit5": (1e-2,), "dopri8": (1e-2,)}


def entries(subject: comparison.Subject, quick: bool) -> list[comparison.Entry]:
    """Everything that is compared; the first is the map."""
    steps, tolerances = (QUICK_STEPS, QUICK_TOLERANCES) if quick else (STEPS, TOLERANCES)
    model, params = subject.model, subject.params
    return [
        comparison.Entry("map", model, params),
        *[comparison.Entry(name, model, params, solver=name, steps=numbers) for name, numbers in steps.items()],
        *[comparison.Entry(name, model, params, solver=name, tolerances=tols) for name, tols in tolerances.items()],
    ]


def write(
    checkpoint: pathlib.Path,
    out: pathlib.Path,
    *,
    samples: int = 1024,
    batch: int = 256,
    repeats: int = 11,
    seed: int = 0,
    quick: bool = False,
) -> None:
    """Compares the map of a run with its solves; writes table.md, solver_vs_map.png and results.json to ``out``."""
    if quick:
        samples, batch, repeats = 64, 32, 3
    subject = comparison.from_run(checkpoint, make=MAKE, average=AVERAGE)
    table = shell.compare_subject(
        subject, entries(subject, quick), jax.random.key(seed), samples=samples, batch=batch, repeats=repeats
    )
    values = json.loads(table.to_json())
    by_name = {row["name"]: row for row in values.pop("rows")}
    results.write(out, {"table": by_name, **values}, table.markdown())
    table.save_figure(out / "solver_vs_map.png")
