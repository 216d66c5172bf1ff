"""The command line, ``python -m jflow.comparison``."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from jflow import checks
from jflow.comparison.entries import Entry, solved
from jflow.comparison.measure import compare
from jflow.comparison.subjects import Subject, find
from jflow.comparison.table import Comparison
from jflow.types import FlowMap, Key

FILES = ("results.json", "table.md", "comparison.png")


def entries_of(
    subject: Subject, *, steps: Sequence[int], solvers: Sequence[str], tolerances: Sequence[float]
) -> list[Entry]:
    """The entries for a Subject: jumps of its FlowMap, solves of its velocity, and its further entries.

    Args:
      subject: the subject.
      steps: the numbers of jumps, and of fixed steps for solvers without an error estimate.
      solvers, tolerances: as in ``solved``.

    Raises:
      ValueError, TypeError: as ``Entry`` and ``solved``.
    """
    entries = []
    if isinstance(subject.model, FlowMap):
        entries.append(Entry("map", subject.model, subject.params, steps=steps, key=subject.key))
    entries += solved(
        subject.model, subject.params, solvers=solvers, steps=steps, tolerances=tolerances, key=subject.key
    )
    return [*entries, *subject.entries]


def compare_subject(
    subject: Subject, entries: Sequence[Entry], key: Key, *, samples: int, **choices: Any
) -> Comparison:
    """Calls ``compare`` with noise, conditioning and data drawn from a Subject.

    Args:
      subject: the Subject.
      entries: the entries to compare.
      key: the PRNG key of the noise, the conditioning and the data.
      samples: the number of samples for errors and distances.
      **choices: distances, batch and repeats of ``compare``.

    Raises:
      ValueError, TypeError: as ``compare``.
    """
    n = checks.integer("samples", samples, low=1)
    noise_key, cond_key, data_key = jax.random.split(key, 3)
    return compare(
        entries,
        subject.noise(noise_key, n),
        cond=None if subject.cond is None else subject.cond(cond_key, n),
        reference=subject.reference,
        data=None if subject.data is None else subject.data(data_key, n),
        features=subject.features,
        scale=subject.scale,
        **choices,
    )


def report(
    source: str,
    /,
    *,
    steps: tuple[int, ...] = (1, 2, 4, 8),
    solvers: tuple[str, ...] = ("euler", "heun", "tsit5"),
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3),
    samples: int = 1024,
    batch: int = 256,
    repeats: int = 11,
    distances: tuple[str, ...] = ("energy",),
    seed: int = 0,
    out: pathlib.Path | None = None,
    overwrite: bool = False,
    make: str | None = None,
    average: str | None = None,
) -> None:
    """Compares the jumps of a flow map with ODE solves of its velocity: error, sample distances, cost and time.

    Args:
        source: A function "module:function" that returns a jflow.comparison.Subject, or the directory of a run.
        steps: Numbers of jumps, and of steps of the solvers without an error estimate.
        solvers: Names of solvers; tsit5, dopri5 and dopri8 are adaptive.
        tolerances: Tolerances of the adaptive solvers.
        samples: Samples from which errors and distances are measured.
        batch: Samples per timed call.
        repeats: Timed calls of each row, interleaved.
        distances: Sample distances: energy, mmd, kernel, frechet, sliced_wasserstein.
        seed: Seed of the noise, the conditioning and the data.
        out: Directory for table.md, comparison.png and results.json; by default the table is only printed.
        overwrite: Replace earlier results in --out.
        make: For a run: "module:function" that makes its Subject from its config; by default the config names it.
        average: For a run: the average of the parameters, or "params"; by default the config names it.
    """
    checks.integer("seed", seed)
    if out is not None and not overwrite and (there := [name for name in FILES if (out / name).exists()]):
        raise ValueError(f"out: expected a directory without {there[0]}, got {out}; pass --overwrite to replace it")
    subject = find(source, make=make, average=average)
    table = compare_subject(
        subject,
        entries_of(subject, steps=steps, solvers=solvers, tolerances=tolerances),
        jax.random.key(seed),
        samples=samples,
        batch=batch,
        repeats=repeats,
        distances=distances,
    )
    print(
        f"errors against {table.reference}; {table.samples} samples; times in batches of {table.batch}, {table.device}\n"
    )
    print(table.markdown())
    if out is not None:
        write(table, out)


def write(table: Comparison, out: pathlib.Path) -> None:
    """Writes table.md, results.json and comparison.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(table.to_json() + "\n")
    (out / "table.md").write_text(table.markdown() + "\n")
    table.save_figure(out / "comparison.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; an error of the user is printed, and ends the process with exit code 2."""
    run_cli(report, argv, "python -m jflow.comparison")


def run_cli(function: Callable[..., None], argv: Sequence[str] | None, program: str) -> None:
    """Calls a function with the arguments of a command line.

    Raises:
      SystemExit: with code 2, if the function raises ValueError, TypeError, OSError or ImportError, or tyro is not installed.
        The message is printed.
    """
    try:
        import tyro
    except ImportError:
        _refuse("the command line needs tyro, which is missing: pip install 'jflow[experiments]'")
    try:
        tyro.cli(function, args=None if argv is None else list(argv), prog=program)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
