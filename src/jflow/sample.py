"""A command line for sampling, from the newest checkpoint of a run or from a model made by a function.

For example::

    python -m jflow.sample runs/digits --jumps 1 --n 64 --out grid.png
    python -m jflow.sample my_module:make --solver tsit5 --n 10000 --out samples.npy

The model is a ``comparison.Subject``. For a run, the function named in its config makes it (``comparison.from_run``).
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from jflow import checks, samplers, solvers, trees
from jflow.comparison import Subject
from jflow.comparison.shell import run_cli
from jflow.comparison.subjects import find
from jflow.training import image_grids
from jflow.types import Event, FlowMap, Key


def draw(
    subject: Subject,
    key: Key,
    n: int,
    *,
    jumps: int = 1,
    solver: str | None = None,
    steps: int | None = None,
    block: int = 1024,
) -> Event:
    """Draws n samples of a Subject in units of the data, ``[n, ...]``, as numpy arrays.

    Args:
      subject: the model, its base and its conditioning.
      key: the PRNG key of the base points, the conditioning and the model's sampling noise.
      n: the number of samples.
      jumps: the number of equal jumps of a FlowMap; must be 1 with a solver.
      solver: the name of a solver with which to solve the velocity instead.
      steps: the number of steps of the solver; None for an adaptive solver at its default tolerance.
      block: the largest number of samples computed at once.

    Raises:
      ValueError: if ``jumps`` is not 1 with a solver, ``steps`` is given without a solver, a Velocity has no solver, and as
        ``samplers.draw`` and ``solvers.Options``.
      TypeError: if an argument has the wrong type.
    """
    checks.integer("n", n, low=1)
    checks.integer("jumps", jumps, low=1)
    model = subject.model
    if solver is None:
        if steps is not None:
            raise ValueError(f"steps: expected None without a solver, got {steps}")
        if not isinstance(model, FlowMap):
            raise ValueError("solver: expected the name of a solver for a Velocity, which has no jumps, got None")
    else:
        if jumps != 1:
            raise ValueError(f"jumps: expected 1 beside a solver, got {jumps}")
        velocity = model.velocity if isinstance(model, FlowMap) else model
        model = solvers.solve(velocity, checks.choice("solver", solver, solvers.SOLVERS), steps=steps)
    draw_key, cond_key = jax.random.split(key)
    x1 = samplers.draw(
        samplers.Jumps(model.bind(subject.params), keyed=subject.key is not None),
        draw_key,
        n,
        samplers.uniform_grid(jumps),
        None if subject.cond is None else subject.cond(cond_key, n),
        like=subject.event,
        base=subject.base,
        block=block,
    )
    return jax.tree.map(np.asarray, trees.scale(subject.scale, x1))


def picture(samples: np.ndarray) -> np.ndarray:
    """A picture of samples, uint8 ``[H, W, 3]``: a grid of images, or a histogram of points in the plane on [-2, 2]².

    Args:
      samples: images ``[N, H, W, C]`` as in ``image_grids.tile``, or points ``[N, 2]``.

    Raises:
      ValueError: if the samples are neither.
    """
    if samples.ndim == 4:
        return image_grids.tile(samples)
    if samples.shape[1:] != (2,):
        raise ValueError(
            f"samples: expected images [N, H, W, C] or points [N, 2] for a picture, got {samples.shape}; write .npy instead"
        )
    counts = np.histogram2d(samples[:, 1], samples[:, 0], bins=64, range=[(-2.0, 2.0)] * 2)[0][::-1]
    return image_grids.tile(2.0 * counts[None, :, :, None] / max(counts.max(), 1.0) - 1.0)


def write(
    source: str,
    /,
    *,
    out: pathlib.Path,
    n: int = 64,
    jumps: int = 1,
    solver: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    block: int = 1024,
    make: str | None = None,
    average: str | None = None,
) -> None:
    """Draws samples from a run's newest checkpoint, or from a model that a function makes.

    Args:
        source: The directory of a run, or a function "module:function" that returns a jflow.comparison.Subject.
        out: File to write: .png, a grid of images or the density of points of the plane; or .npy, the samples themselves.
        n: Number of samples.
        jumps: Equal jumps of the flow map.
        solver: Solve the ODE of the velocity instead, by this solver.
        steps: Steps of the solver; without them an adaptive solver takes its own.
        seed: Seed of the noise and the conditioning.
        block: The most samples at once.
        make: For a run: "module:function" that makes its Subject from its config; by default the config names it.
        average: For a run: the average of the parameters, or "params"; by default the config names it.
    """
    checks.choice("out: suffix", out.suffix, (".png", ".npy"))
    checks.integer("seed", seed)
    subject = find(source, make=make, average=average)
    samples = draw(subject, jax.random.key(seed), n, jumps=jumps, solver=solver, steps=steps, block=block)
    if not isinstance(samples, np.ndarray):
        raise ValueError(f"source: expected samples that are one array for a file, got {jax.tree.structure(samples)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        np.save(out, samples)
    else:
        image_grids.write_png(out, picture(samples))
    print(f"{n} samples: {out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; an error of the user is printed, and ends the process with exit code 2."""
    run_cli(write, argv, "python -m jflow.sample")


if __name__ == "__main__":
    main()
