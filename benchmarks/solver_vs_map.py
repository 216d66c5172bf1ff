"""The error and time of a learned flow map, beside those of ODE solves of the same network.

    python -m benchmarks.solver_vs_map --checkpoint runs/digits --out runs/digits/solver_vs_map

It reads the output of any experiment that trains a map. The map at 1, 2, 4 and 8 jumps is compared with Euler, Heun, Tsit5
and Dopri8 on the same network's diagonal, from the same noise, by ``jflow.comparison``. The table has the error against a
reference solve with a small tolerance, the distance of the samples from the data, the mean number of network calls per sample
(NFE), FLOPs and time per sample, and the speed-up over the cheapest solve that is as accurate. Times are medians of
interleaved runs, without compilation. The benchmark writes table.md, solver_vs_map.png and results.json.
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments.shared import results, solver_table
from experiments.shared.run import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    checkpoint: pathlib.Path
    """Directory of the trained run: the --out of an experiment."""
    out: pathlib.Path
    """Directory for table.md, solver_vs_map.png and results.json."""
    batch: int = 256
    """Samples per timed call."""
    samples: int = 1024
    """Samples from which errors and distances are measured."""
    repeats: int = 11
    """Timed calls of each method, interleaved."""
    seed: int = 0
    """Seed of the noise."""
    quick: bool = False
    """A few methods, samples and repeats, to show that everything works."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range, and an output that is there.

        Raises:
          ValueError: naming the option, what came and what was expected.
          FileExistsError: without --overwrite.
        """
        for name in ("batch", "samples", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected a positive whole number, got {getattr(self, name)}")
        results.refuse_existing(self.out, self.overwrite)


def run(config: Config) -> None:
    """Measures and writes everything to ``config.out``."""
    solver_table.write(
        config.checkpoint,
        config.out,
        samples=config.samples,
        batch=config.batch,
        repeats=config.repeats,
        seed=config.seed,
        quick=config.quick,
    )


if __name__ == "__main__":
    main(Config, run)
