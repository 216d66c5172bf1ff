"""The tables and figures of ``experiments.bias``."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import common

EXACT = "exact samples"


def average(rows: list[dict[str, Any]], *path: str) -> float:
    """A number's mean over the seeds; NaN where there is none."""
    values = []
    for row in rows:
        for key in path:
            row = row.get(key) if isinstance(row, dict) else None
        if row is not None and np.isfinite(row):
            values.append(row)
    return float(np.mean(values)) if values else float("nan")


def tables(found: dict[str, Any]) -> str:
    """By dimension, the samplers without and with weights, and the errors of the estimators, as Markdown."""
    text = []
    for dim, this in found.items():
        entropy = f"Entropy {this['floor']['entropy']:.4g} +- {this['floor']['entropy_error']:.2g} nats."
        exact_samples = [{"samples": {"-": this["floor"]["samples"]}, "estimates": {}}]
        header = ["sampler", "jumps", "KL(q, rho)", "KL(rho, q)", "nats of data", "nats of samples", "folded"]
        moments_ = ["mean (z)", "cov (z)", "distance"]
        header += [*moments_, "ESS", "log Z", "without sign", *(f"weighted {name}" for name in moments_)]
        lines = [
            _line(name, jumps, rows)
            for name, rows in [*this["rows"].items(), (EXACT, exact_samples)]
            for jumps in rows[0]["samples"]
        ]
        text += [f"### {dim} dimensions\n\n{entropy}", common.markdown(header, lines)]
        jumps = [k for k in next(iter(this["rows"].values()))[0]["samples"] if k != "solve"]
        lines = [
            [name, estimator, *(_errors(rows, f"{estimator}, {k}") for k in jumps)]
            for name, rows in this["rows"].items()
            for estimator in ("determinant", "head")
            if f"{estimator}, {jumps[0]}" in rows[0]["estimates"]
        ]
        lines += [
            [name, estimator, _errors(rows, estimator), *["" for _ in jumps[1:]]]
            for name, rows in this["rows"].items()
            for estimator in ("solve", "solve, one probe")
            if estimator in rows[0]["estimates"]
        ]
        names = ["jumps: " + jumps[0], *jumps[1:]] if jumps else []
        said = "Errors at data, in nats: bias, median, root mean square, 95 % below; (share of points with a value)."
        text += [said, common.markdown(["sampler", "estimator", *names], lines)]
    return "\n\n".join(text)


def _line(name: str, jumps: str, rows: list[dict[str, Any]]) -> list[str]:
    def number(*path: str) -> str:
        return _said(average(rows, *path))

    def both(*path: str, second: str, form: str) -> str:
        first = number(*path)
        return first if first == "-" else form.format(first, number(*path[:-1], second))

    def moments_of(*path: str) -> list[str]:
        z = [both(*path, key, second=f"{key}_z", form="{} ({})") for key in ("mean", "cov")]
        return [*z, number(*path, "energy")]

    at, weighted = ("samples", jumps), ("samples", jumps, "weighted")
    estimate = ("estimates", jumps if jumps == "solve" else f"determinant, {jumps}")
    back, valid = average(rows, *estimate, "bias"), average(rows, *estimate, "valid")
    share = "" if valid == 1.0 or not np.isfinite(back) else f" ({valid:.3g})"
    return [
        name,
        jumps,
        both(*at, "kl", second="kl_error", form="{} +- {}"),
        _said(-back) if not np.isfinite(back) else f"{_said(-back)} +- {number(*estimate, 'bias_error')}{share}",
        number(*estimate, "nats") + share,
        number(*at, "nats"),
        number(*at, "folded"),
        *moments_of(*at),
        number(*weighted, "ess"),
        both(*weighted, "log_z", second="log_z_error", form="{} +- {}"),
        number(*at, "without_sign", "log_z"),
        *moments_of(*weighted),
    ]


def _errors(rows: list[dict[str, Any]], estimate: str) -> str:
    keys = ("bias", "median", "rmse", "worst_5_percent")
    bias, *rest = (average(rows, "estimates", estimate, key) for key in keys)
    valid = average(rows, "estimates", estimate, "valid")
    text = ", ".join([f"{bias:+.2g}", *(f"{value:.2g}" for value in rest)]) if np.isfinite(bias) else "-"
    return text if valid == 1.0 else f"{text} ({valid:.3g})"


def _said(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "-"


def bias_figure(path: pathlib.Path, dim: int, found: dict[str, Any]) -> None:
    """Divergence, biases and effective sample sizes by the number of jumps, without weights and with them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        ("kl",): "KL(q | rho), nats",
        ("mean_z",): "bias of the mean, in standard errors",
        ("cov_z",): "bias of the covariance, in standard errors",
        ("weighted", "ess"): "effective sample size / N",
        ("weighted", "mean_z"): "the mean, weighted",
        ("weighted", "cov_z"): "the covariance, weighted",
    }
    jumps = [int(k) for k in next(iter(found["rows"].values()))[0]["samples"] if k != "solve"]
    last = max(jumps)
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (at, title) in zip(axes.flat, panels.items(), strict=True):
        for name, rows in found["rows"].items():
            values = [average(rows, "samples", str(k), *at) for k in jumps]
            known = [(k, v) for k, v in zip(jumps, values, strict=True) if np.isfinite(v)]
            (line,) = axis.plot(*zip(*known, strict=True), "o-", label=name) if known else axis.plot([], label=name)
            solve = average(rows, "samples", "solve", *at)
            if np.isfinite(solve):
                axis.plot([2 * last], [solve], "D", color=line.get_color())
        logarithmic = at[-1] != "ess"
        axis.set(title=title, xscale="log", yscale="log" if logarithmic else "linear")
        axis.set_xticks([*jumps, 2 * last], [*map(str, jumps), "solve"])
        axis.minorticks_off()
        if at[-1].endswith("_z"):
            axis.axhline(1.0, color="grey", linestyle=":")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].set(xlabel="jumps")
    figure.suptitle(f"{dim} dimensions")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scatter(path: pathlib.Path, title: str, jumps: Sequence[int], kept: dict[str, np.ndarray]) -> None:
    """Estimates against the truth, sample by sample: the determinants above, the head below, the solve at the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    truth = kept["truth"]
    grid = [[f"{what}, {k}" for k in jumps] + [last] for what, last in DRAWN]
    columns = len(jumps) + 1
    figure, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 7), layout="constrained", sharex=True, sharey=True)
    low, high = np.quantile(truth, [0.001, 1.0])
    room = 0.08 * (high - low)
    for axis, estimate in zip(axes.flat, [key for line in grid for key in line], strict=True):
        error = kept[estimate] - truth
        axis.plot([low, high], [low, high], color="black", linewidth=0.8)
        axis.plot(truth, kept[estimate], ".", markersize=2, alpha=0.5)
        axis.set(xlim=(low - room, high + room), ylim=(low - room, high + room))
        axis.set_title(f"{estimate}: median error {np.nanmedian(np.abs(error)):.3f}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set(ylabel="estimate, nats")
    for axis in axes[1]:
        axis.set(xlabel="exact log-density, nats")
    figure.suptitle(f"{title}: log-density at {len(truth):,} data points")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The lines of the scatter figure, with what closes each.
DRAWN = (("determinant", "solve"), ("head", "solve, one probe"))
