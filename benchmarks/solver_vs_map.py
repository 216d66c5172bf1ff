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
import json
import pathlib

import jax

from experiments import common
from jflow import comparison
from jflow.comparison import shell

STEPS = {"euler": (1, 2, 4, 8, 16, 32, 100), "heun": (1, 2, 4, 8, 16)}
TOLERANCES = {"tsit5": (1e-1, 1e-2, 1e-3), "dopri8": (1e-1, 1e-3)}
QUICK_STEPS = {"euler": (1, 8, 100), "heun": (4,)}
QUICK_TOLERANCES = {"tsit5": (1e-2,), "dopri8": (1e-2,)}


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
        if (self.out / "results.json").exists() and not self.overwrite:
            raise FileExistsError(f"--out: {self.out} holds results already; pass --overwrite or another directory")


def entries(subject: comparison.Subject, quick: bool) -> list[comparison.Entry]:
    """Everything that is compared; the first is the map."""
    steps, tolerances = (QUICK_STEPS, QUICK_TOLERANCES) if quick else (STEPS, TOLERANCES)
    model, params = subject.model, subject.params
    return [
        comparison.Entry("map", model, params),
        *[comparison.Entry(name, model, params, solver=name, steps=numbers) for name, numbers in steps.items()],
        *[comparison.Entry(name, model, params, solver=name, tolerances=tols) for name, tols in tolerances.items()],
    ]


def run(config: Config) -> None:
    """Measures and writes everything to ``config.out``."""
    config.check()
    if config.quick:
        config = dataclasses.replace(config, samples=64, batch=32, repeats=3)
    subject = comparison.from_run(config.checkpoint, make=common.MAKE, average=common.AVERAGE)
    table = shell.compare_subject(
        subject,
        entries(subject, config.quick),
        jax.random.key(config.seed),
        samples=config.samples,
        batch=config.batch,
        repeats=config.repeats,
    )
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.md").write_text(table.markdown() + "\n")
    values = json.loads(table.to_json())
    by_name = {row["name"]: row for row in values.pop("rows")}
    common.write_json(config.out / "results.json", {"table": by_name, **values, **common.environment()})
    table.save_figure(config.out / "solver_vs_map.png")
    print(table.markdown())


if __name__ == "__main__":
    common.main(Config, run)
