"""The function ``compare``, which runs all rows of the entries and measures errors, distances, cost and time."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, solvers, trees
from jflow.comparison import distances as distances_
from jflow.comparison.distances import Distance, DistanceFn, Features
from jflow.comparison.entries import Entry
from jflow.comparison.programs import Program, flops, interleaved_seconds
from jflow.comparison.table import Comparison, Row
from jflow.named import described
from jflow.types import Array, Cond, Event

REFERENCE_SOLVER = "dopri8"


def compare(
    entries: Entry | Sequence[Entry],
    x0: Event,
    *,
    cond: Cond = None,
    reference: Entry | Event | None = None,
    data: Event | None = None,
    features: Features | None = None,
    distances: Sequence[str] | Mapping[str, DistanceFn] = ("energy",),
    scale: float = 1.0,
    batch: int = 256,
    repeats: int = 11,
) -> Comparison:
    """Measures error, sample distances, cost and time for every row of the entries, all from the same x0.

    The samples of a block are computed together, so an adaptive solve takes as many steps as its hardest sample needs. The
    number of function evaluations (NFE) is the mean over samples of what each one needs. Time is measured on the first block.
    The timed calls of all rows are interleaved, so a temporary slowdown of the machine affects all rows. The NFE and the FLOPs
    do not depend on the machine.

    Args:
      entries: the models, each with the ways in which it is run.
      x0: states at time 0, ``[N, ...]`` (or a pytree of such arrays).
      cond: conditioning of each sample, leaves ``[N, ...]``, for entries without their own.
      reference: the reference for errors: an entry with one row, such as an exact map in one jump, or end points shaped like
        x0; by default a solve of the first entry's velocity by Dopri8 at tolerance 1e-5 (1e-8 in float64).
      data: samples ``[M, ...]``, in units of the data, to which the distances are measured; by default the reference's end
        points. These share x0 with the samples, so standard errors, which assume independent sets, are then too large.
      features: ``samples [N, ...] -> [N, d]``, on which distances are measured; by default the entries of x.
      distances: names in ``DISTANCES``, or a mapping of names to functions ``(x, y) -> Estimate or scalar`` of features.
      scale: units of the data per unit of x. It multiplies the errors, and the samples before ``features``.
      batch: the number of samples of a block, and of a timed call; at most N.
      repeats: the number of timed calls of each row, after one that is not timed.

    Returns:
      The Comparison.

    Raises:
      ValueError: if rows have the same name, a reference has several rows or other shapes than x0 or is not finite, leaves of
        cond have another length than N, or a number is out of range. The message names the argument.
      TypeError: if an argument has the wrong type.
    """
    entries = [entries] if isinstance(entries, Entry) else list(entries)
    _check_entries(entries)
    n = checks.rows("x0", x0)
    checks.floating("x0", x0)
    checks.fits("x0", x0)
    x0 = jax.tree.map(jnp.asarray, x0)
    batch = min(checks.integer("batch", batch, low=1), n)
    checks.integer("repeats", repeats, low=1)
    scale = checks.number("scale", scale, low=0.0, open_low=True)
    functions = distances_.chosen(distances)
    if data is not None:
        checks.floating("data", data)
    if features is not None:
        checks.function("features", features, "samples [N, ...] -> [N, d]")
    to_features = distances_.flatten if features is None else features
    for entry in entries:
        _check_cond(entry, cond, n)

    truth, said = _truth(reference, entries[0], x0, cond, batch)
    true_samples = trees.scale(scale, truth)

    def features_of(samples: Event) -> Array:
        return to_features(jax.tree.map(jnp.asarray, samples))

    compared = features_of(true_samples if data is None else data) if functions else None

    def distances_of(samples: Event) -> dict[str, Distance]:
        return {} if compared is None else distances_.measured(functions, features_of(samples), compared)

    floor = {} if data is None else distances_of(true_samples)
    rows, programs = [], {}
    for entry in entries:
        for way in entry.ways():
            programs[way.name] = program = Program.of(entry, way, x0, cond, batch)
            rows.append(_row(entry.name, program, truth, scale, distances_of))
    times = interleaved_seconds(programs, repeats)
    rows = [dataclasses.replace(row, **_per_sample(times[row.name], batch)) for row in rows]
    return Comparison(
        rows=_with_speedups(rows),
        reference=said,
        samples=n,
        batch=batch,
        repeats=repeats,
        floor=floor,
        **_environment(),
    )


def _truth(reference: Entry | Event | None, first: Entry, x0: Event, cond: Cond, batch: int) -> tuple[Event, str]:
    """The end points of the reference, and their description."""
    if reference is not None and not isinstance(reference, Entry):
        checks.same_structure("reference", reference, "x0", x0)
        checks.floating("reference", reference)
        return jax.tree.map(np.asarray, reference), "given end points"
    if reference is None:
        tol = 1e-8 if trees.at_least_float32(x0) == jnp.float64 else 1e-5
        options = solvers.Options(REFERENCE_SOLVER, rtol=tol, atol=tol)
        name = f"{REFERENCE_SOLVER}, tolerance {tol:g}, of the velocity of {first.name}"
        reference = Entry(name, first.model, first.params, solver=options, cond=first.cond, key=first.key)
    _check_cond(reference, cond, checks.rows("x0", x0))
    ways = reference.ways()
    if len(ways) != 1:
        raise ValueError(f"reference: expected an entry of one row, got {len(ways)}: {[way.name for way in ways]}")
    truth, _ = Program.of(reference, ways[0], x0, cond, batch).run_all()
    if not all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(truth)):
        raise ValueError(f"reference: expected finite end points, got NaN or infinity from {ways[0].name}")
    return truth, ways[0].name


def _row(
    entry: str, program: Program, truth: Event, scale: float, distances_of: Callable[[Event], dict[str, Distance]]
) -> Row:
    """The row of a program; its times are NaN."""
    ends, nfe = program.run_all()
    errors, failed = _errors(ends, truth, scale)
    way = program.way
    calls, each = nfe if way.units is None else way.units, flops(way.unit, program.sample())
    return Row(
        name=way.name,
        entry=entry,
        kind=way.kind,
        nfe=nfe,
        flops=None if each is None or calls is None else each * calls,
        **_summary(errors),
        distances=distances_of(trees.scale(scale, ends)),
        failed=failed,
        compile_seconds=program.seconds,
        seconds=np.nan,
        seconds_low=np.nan,
        seconds_high=np.nan,
    )


def _check_entries(entries: list[Entry]) -> None:
    if not entries:
        raise ValueError("entries: expected at least one entry, got none")
    for entry in entries:
        if not isinstance(entry, Entry):
            raise TypeError(f"entries: expected comparison.Entry, got {described(entry)}")
    names = [way.name for entry in entries for way in entry.ways()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"entries: expected rows of different names, got {twice} more than once; name the entries")


def _check_cond(entry: Entry, cond: Cond, n: int) -> None:
    name, given = ("cond", cond) if entry.cond is None else (f"entry {entry.name!r}: cond", entry.cond)
    if any(np.shape(leaf)[:1] != (n,) for leaf in jax.tree.leaves(given)):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(given)]
        raise ValueError(f"{name}: expected leaves with a leading axis of N = {n}, as x0 has, got shapes {shapes}")


def _errors(ends: Event, truth: Event, scale: float) -> tuple[np.ndarray, int]:
    """The root-mean-square error of each sample over its entries, ``[N]``, float64, and how many are not finite."""
    differences = [
        np.asarray(a, np.float64).reshape(len(a), -1) - np.asarray(b, np.float64).reshape(len(b), -1)
        for a, b in zip(jax.tree.leaves(ends), jax.tree.leaves(truth), strict=True)
    ]
    errors = scale * np.sqrt(np.mean(np.square(np.concatenate(differences, axis=1)), axis=1))
    return errors, int(np.sum(~np.isfinite(errors)))


def _summary(errors: np.ndarray) -> dict[str, float]:
    squares = np.square(errors)
    rmse = float(np.sqrt(np.mean(squares)))
    # The delta method: the standard error of the mean square, divided by the derivative of the square.
    spread = float(np.std(squares, ddof=1)) / len(errors) ** 0.5 if len(errors) > 1 else np.nan
    return {
        "rmse": rmse,
        "rmse_error": spread / (2.0 * rmse) if rmse else 0.0,
        "median_error": float(np.median(errors)),
    }


def _per_sample(seconds: np.ndarray, batch: int) -> dict[str, float]:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)) / batch
    return {"seconds": float(middle), "seconds_low": float(low), "seconds_high": float(high)}


def _with_speedups(rows: list[Row]) -> tuple[Row, ...]:
    solved = [row for row in rows if row.kind == "solver"]

    def speedup(row: Row) -> float | None:
        as_good = [each.seconds for each in solved if each.rmse <= row.rmse]
        return min(as_good) / row.seconds if as_good else None

    return tuple(dataclasses.replace(row, speedup=speedup(row)) for row in rows)


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}, {device.device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
