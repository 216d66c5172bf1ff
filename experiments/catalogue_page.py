"""Writes docs/catalogue.md from the registry and the results of ``experiments.catalogue``.

    python -m experiments.catalogue_page --results runs/catalogue/results.json

copies the results to docs/catalogue.json and writes docs/catalogue.md; without ``--results`` the page is written from the
existing copy.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import re
from typing import Any

from experiments import catalogue
from experiments.shared import reduction_table, results, run
from jflow import objectives

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
LEAST = 5.0
# The reasons why a row's error is above a fifth of one Euler step's error.
_CHAIN = (
    "with only t = 1 the map is learned backward from t = 1, through a chain of steps. The noise of the pair biases each "
    "step in proportion to its length (order 1), and with shorter steps the chain does not reach s = 0 within this training. "
    "Distillation has no such noise."
)
WHY: dict[str, str] = {
    "consistency_training": _CHAIN,
    "ict": _CHAIN,
    "ect": _CHAIN + " This method also begins as a regression of the data, which contracts, and must unlearn this.",
    "facm": "with only t = 1 the map is learned backward from t = 1, here by infinitely small steps along the noise of the "
    "pair. With the same residual and a law of all t, which is flow matching for t near s, the error is smaller "
    "(`mean_flow`).",
    "ctm": "the jump to t = 1 is not compared directly. It is the limit of jumps to t < 1, which are compared after the map's "
    "own jump from t to 1. With two jumps or more the error is below the threshold.",
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

A method is a choice of an identity, a velocity, a stop-gradient, a derivative, a law of times and a reduction
({py:mod}`jflow.objectives`). Times run from 0 (noise) to 1 (data); s is the source time and t the target time. In the
formulas, R is the reduction (|.|^2 by default), sg the stop-gradient, and x = I_s. "Stationary: exact" means that the
expected gradient vanishes at the exact map under the squared reduction. "Order p" means that it is of order p in the
method's small number, and "limit" that it vanishes with this number. Tests check these declarations on two paths and in
two parameterizations (`tests/objectives/test_catalogue.py`). Passes are forward passes of the network for one
off-diagonal sample, where a backward pass counts as two. A test compares the FLOPs of every method with its passes to
within 2 % (`tests/objectives/test_cost.py`). LSD, ESD and PSD are Lagrangian, Eulerian and progressive
self-distillation; LMD and EMD are Lagrangian and Eulerian map distillation.

This page is written by `python -m experiments.catalogue_page`.
"""

MEASURED = """## Measured side by side

`{command}` (commit {commit}, {date}, {device}): the mixture of `experiments.mixture`, {steps} steps of {batch}
samples, a {depth} x {features} network, means over {seeds} seeds. RMSE is the root-mean-square error of K jumps against
the exact map of the row's pairs and path. For a method without an off-diagonal term it is that of K Euler steps of its
velocity. "Euler / jump" is the error of one Euler step of flow matching, divided by the error of one jump. Methods that
are defined only at t = 1 have an error at one jump only; with more jumps they re-noise, and the energy distance compares
their samples with the data. For reflow and optimal transport the exact map is another one. Their reference is an accurate
solve of the learned velocity, so their error is that of the integration. The squared energy distance is unbiased, so it may
be negative. Residuals are root mean squares at the exact velocity. FLOPs and time are those of one step, relative to flow
matching, without the training of a teacher; times are interleaved medians. The published count is that of passes if every
term is evaluated on the whole batch. The last column, where available, is from `--budget flops` at one seed.
"""

FIGURE = """
![one jump's error against the FLOPs of a step](catalogue.png)
"""

NOISE = """## The noise of MeanFlow and improved MeanFlow

At the exact map, MeanFlow's gradient for one pair is the Jacobian of the map, $\\nabla X_{s,t}(x)$, times that of improved
MeanFlow. The noise of the pair, $c - b$, enters the target of MeanFlow as $\\nabla X_{s,t}(x)\\,(c - b)$, and that of
improved MeanFlow as $c - b$. Improved MeanFlow therefore has the smaller variance where the map expands, and the larger
one where it contracts. On the flow of the tests, from s = 0.2 to t = 0.9, the ratio of the variances, improved to plain,
is 0.44 over the points at which the map expands, and 2.7 over those at which it contracts
(`tests/objectives/test_catalogue.py`). This holds at the exact map only. For other maps the derivative along the pair's
velocity also contains the error of the network.
"""

BIAS = """## What a reduction does to the exact map

If the target contains the velocity of the pair (MeanFlow and related methods, consistency training, flow matching), a weight
that depends on the residual moves the stationary point wherever x1 given x is skewed. `python -m benchmarks.reduction_bias`
computes, by quadrature, the shift m of the mean velocity at which MeanFlow's expected gradient vanishes at each point. The
derivative in the target is kept at that of the exact map. The table has the root mean square of m divided by that of v, and
the largest |m|. In training the derivative changes with the shift and makes it smaller, so these are upper estimates that
give the order of magnitude. With the squared reduction there is no shift. If the residual is zero for every sample at the
exact map (all methods that take their velocity from themselves or from a teacher), no reduction moves the stationary point.
"""


# Methods that have changed since their rows were measured, and the change.
OLDER = {
    "shortcut": "at the time of the measurement, the legs used the smallest gap of the grid, which was never trained.",
}


def formula(constructor: Any) -> str:
    """The first paragraph of a constructor's docstring and the displayed formulas that follow it, as a Markdown quotation."""
    first, *rest = inspect.getdoc(constructor).split("\n\n")
    lines = [re.sub(r":math:`([^`]*)`", r"$\1$", " ".join(first.split()))]
    while rest and rest[0].startswith(".. math::"):
        displayed = rest.pop(0).removeprefix(".. math::").strip() or rest.pop(0)
        body = [line.strip() for line in displayed.splitlines() if line.strip()]
        if any("&" in line or line.endswith(r"\\") for line in body):
            body = [r"\begin{aligned}", *body, r"\end{aligned}"]
        lines += ["", "$$", *body, "$$"]
    return "\n".join(f"> {line}".rstrip() for line in lines)


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
        formula(method.constructor),
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
        lines.append(f"Defined in {' and '.join(limits)} only; anything else raises an error.")
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
