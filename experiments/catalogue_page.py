"""docs/catalogue.md from the registry and the results of ``experiments.catalogue``.

    python -m experiments.catalogue_page --results runs/catalogue/results.json

copies the results to docs/catalogue.json and writes docs/catalogue.md beside it; without ``--results`` the page is written
anew from the copy that is there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
from typing import Any

from experiments import catalogue
from experiments.shared import reduction_table, results, run
from jflow import objectives

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
LEAST = 5.0
# Why a row misses the mark of a fifth of one Euler step's error.
_CHAIN = (
    "with t = 1 alone the map is learned from t = 1 backwards, through a chain of steps whose length is a compromise: the "
    "pair's noise biases each by its length (order 1), and shorter ones take longer to reach s = 0 than this training lasts. "
    "Distillation, whose steps have no such noise, passes the mark."
)
WHY: dict[str, str] = {
    "consistency_training": _CHAIN,
    "ict": _CHAIN,
    "ect": _CHAIN + " This one begins, besides, as a regression of the data, whose contraction has to be unlearned.",
    "facm": "with t = 1 alone the map is learned from t = 1 backwards, and here by infinitely small steps along the pair's "
    "noise; in this training, a law with every t, which is flow matching for t near s, gets further with the same "
    "residual (`mean_flow`).",
    "ctm": "the jump to t = 1 is not compared itself, but as the limit of jumps to t < 1, seen through the map's own jump "
    "from there; two jumps and more are within the mark.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the page."""

    results: pathlib.Path | None = None
    """results.json of ``experiments.catalogue``; by default the copy in docs."""

    def check(self) -> None:
        """Refuses a file that is not there."""
        if self.results is not None and not self.results.is_file():
            raise FileNotFoundError(f"{self.results}: no such file")


INTRO = """# The catalogue

Every method is a choice of parts: an identity, a velocity, a stop-gradient, a derivative, a law of times, a reduction
({py:mod}`jflow.objectives`). Times run from 0 (noise) to 1 (data), s the source and t the target; in the formulas R
is |.|^2 under the reduction, sg the stop-gradient, x = I_s. "Stationary: exact" means that the expected gradient
vanishes at the exact map under the squared reduction; "order p" that it is of the p-th order in the method's own
small number, "limit" that it vanishes as that number does. Each of these is a test, on two paths and in two
parameterizations (`tests/objectives/test_catalogue.py`). Passes are forward passes of the network for one
off-diagonal sample, a backward pass counting two; a test holds every method's FLOPs against them within 2 %.

This page is written by `python -m experiments.catalogue_page`.
"""

MEASURED = """## Measured side by side

`{command}` (commit {commit}, {date}, {device}): the mixture of `experiments.mixture`, {steps} steps of {batch}
samples, a {depth} x {features} network, means over {seeds} seeds. RMSE is the error of K jumps against the exact map
of the row's own pairs and path; for a method without an off-diagonal term, K Euler steps of its velocity. "Euler /
jump" is the error of one Euler step of flow matching over that of one jump. Methods that are defined at t = 1 alone
have one jump, and beyond it distances of samples after re-noising. Rows of reflow and optimal transport have another
flow as their truth, a tight solve of the velocity that was learned, so that their error is that of the integration
alone. The squared energy distance is unbiased: it may be negative. Residuals are root mean squares at the exact
velocity. FLOPs and time are of one step, over those of flow matching, the times interleaved medians; a teacher's own
training is not in them. The published count is of passes with every term on the whole batch. The last column, where it was
run, is of `--budget flops` at one seed.
"""

FIGURE = """
![one jump's error against the FLOPs of a step](catalogue.png)
"""

NOISE = """## What the noise of MeanFlow and improved MeanFlow is

At the exact map, MeanFlow's gradient for one pair is the Jacobian of the map, grad X_{s,t}(x), times that of improved
MeanFlow: the pair's noise, c - b, enters the target as grad X (c - b) in the one and as c - b in the other. So
improved MeanFlow has the smaller variance where the map expands and the larger where it contracts. On the mixture of
the tests, from s = 0.2 to t = 0.9, the ratio of the variances, improved over plain, is 1.02 for data about as wide as
the noise, and below a half for data twice as wide (`tests/objectives/test_catalogue.py`). That is a statement about
the exact map alone: away from it the derivative along the pair's velocity carries the network's error too.
"""

BIAS = """## What a reduction does to the exact map

With a velocity from the pair in the target (MeanFlow and its kin, consistency training, flow matching itself), a weight that
depends on the residual moves the stationary point wherever x1 given x is skewed. `python -m benchmarks.reduction_bias`
solves, by quadrature, for the shift m of the mean velocity at which MeanFlow's expected gradient vanishes at each point, with
the derivative in the target held at that of the exact map: the root mean square of m over that of v, and the largest |m|. The
derivative follows the shift in a training and lessens it, so that these are estimates from above: take the order of
magnitude from them. With the squared reduction there is no shift. In the methods whose residual is zero for every sample at
the exact map (all that take their velocity from themselves or from a teacher) no reduction moves anything.
"""


# Methods that have changed since their rows were measured, and how.
OLDER = {
    "shortcut": "when they were measured, the smallest gap of the grid was used by its legs and never trained.",
}


def formula(constructor: Any) -> str:
    """The first paragraph of a constructor's docstring."""
    return " ".join(inspect.getdoc(constructor).split("\n\n")[0].split())


def cell(value: Any) -> str:
    """A number with three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def measured(found: dict[str, Any]) -> str:
    """The table of all rows."""
    euler = found[catalogue.BASELINE]["rmse_1"]
    jumps = catalogue.JUMPS
    header = ["row", *(f"RMSE, {k}" for k in jumps), "Euler / jump", *(f"energy, {k}" for k in jumps)]
    header += ["Eulerian", "Lagrangian", "semigroup", "FLOPs", "time", "published", "RMSE, 1, at equal FLOPs"]
    lines = []
    for name, row in found.items():
        passes = objectives.METHODS[row["method"]].published_passes
        one = row.get("rmse_1")
        spread = f" ± {row['rmse_1_spread']:.1g}" if row.get("rmse_1_spread") else ""
        values = [
            f"{cell(one)}{spread}",
            *(cell(row.get(f"rmse_{k}")) for k in jumps[1:]),
            cell(euler / one if one else None),
        ]
        values += [cell(row.get(f"energy_distance_{k}")) for k in jumps]
        values += [cell(row.get(key)) for key in ("eulerian", "lagrangian", "semigroup", "flops", "time")]
        values += [cell(passes / 3 if passes else None), cell(row.get("equal_flops", {}).get("rmse_1"))]
        lines.append([name, *values])
    return results.markdown(header, lines)


def section(name: str, found: dict[str, Any]) -> str:
    """One method: formula, parts, source, when to use it, what was measured."""
    method = objectives.METHODS[name]
    row, euler = found[name], found[catalogue.BASELINE]["rmse_1"]
    stationary = {"exact": "exact", "order": f"order {method.order}", "limit": f"at a limit, order {method.order}"}
    needs = {
        "map teacher": "a FlowMap as teacher",
        "teacher": "a teacher",
        "ema": "an average",
        "pairs": "pairs with x0",
    }
    needs["backward"] = "a map of both directions"
    lines = [
        f"### {name}",
        f"{method.title} ({', '.join(f'[{i}](https://arxiv.org/abs/{i})' for i in method.source.split(', '))}): {method.when}.",
        f"> {formula(method.constructor)}",
        results.markdown(
            ["identity", "velocity", "stop-gradient", "derivative", "stationary", "passes", "needs"],
            [
                [
                    method.identity,
                    method.velocity,
                    method.stop_gradient,
                    method.derivative,
                    stationary[method.stationary],
                    method.off_diagonal_passes or 3,
                    ", ".join(needs[need] for need in method.needs) or "-",
                ]
            ],
        ),
    ]
    if published := ", ".join(sorted(method.published())):
        lines.append(f'The paper\'s own choices, where they differ: `METHODS["{name}"].published()` ({published}).')
    limits = [f"the {path} path" for path in method.paths] + [f"the {form}-formulation" for form in method.forms]
    if limits:
        lines.append(f"Defined in {' and '.join(limits)} alone; anything else is refused.")
    if "rmse_1" not in row:
        lines.append(f"Measured: it diverged. {WHY.get(name, '')}".strip())
    elif name in (catalogue.BASELINE, "reflow"):
        lines.append(f"Measured: RMSE of one Euler step {cell(row['rmse_1'])}, of eight {cell(row['rmse_8'])}.")
    else:
        times = euler / row["rmse_1"]
        text = f"Measured: RMSE of one jump {cell(row['rmse_1'])}, {times:.3g} times below one Euler step's; "
        text += f"a step costs {cell(row['flops'])} of flow matching's FLOPs."
        if times < LEAST:
            text += f" **Less than {LEAST:g} times below**: {WHY[name]}"
        lines.append(text)
    if name in OLDER:
        lines.append(f"**The numbers are older than the method**: {OLDER[name]}")
    return "\n\n".join(lines)


def page(record: dict[str, Any], bias: dict[str, Any] | None) -> str:
    """The whole page.

    Raises:
      KeyError: for a registered method without a measured row, or one below the mark without a reason in ``WHY``.
    """
    found, config = record["rows"], record["config"]
    facts = {key: record[key] for key in ("command", "commit", "date", "device")}
    seeds = min(row["seeds"] for row in found.values())
    head = MEASURED.format(**facts, **{k: config[k] for k in ("steps", "batch", "depth", "features")}, seeds=seeds)
    parts = [INTRO, head, measured(found), FIGURE, "## Method by method"]
    parts += [section(name, found) for name in objectives.METHODS]
    parts += [NOISE]
    if bias is not None:
        parts += [BIAS, reduction_table.table(bias["rows"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(config: Config) -> None:
    """Writes the page."""
    copy = DOCS / "catalogue.json"
    if config.results is not None:
        copy.write_text(json.dumps(json.loads(config.results.read_text()), indent=1) + "\n")
        picture = config.results.with_name("catalogue.png")
        if picture.is_file():
            (DOCS / "catalogue.png").write_bytes(picture.read_bytes())
    (DOCS / "catalogue.md").write_text(read_page())


def read_page() -> str:
    """The page, from what is in docs."""
    bias = DOCS / "reduction_bias.json"
    return page(
        json.loads((DOCS / "catalogue.json").read_text()), json.loads(bias.read_text()) if bias.is_file() else None
    )


if __name__ == "__main__":
    run.main(Config, main)
