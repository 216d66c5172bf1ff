"""The tables and figures of ``experiments.bias``."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.shared import results, sweep
from jflow import plots

EXACT = "exact samples"


def average(rows: list[dict[str, Any]], *path: str) -> float:
    """A number's mean over the seeds; NaN where there is none."""
    values = [value for value in sweep.values(rows, *path) if np.isfinite(value)]
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
        text += [f"### {dim} dimensions\n\n{entropy}", results.markdown(header, lines)]
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
        text += [said, results.markdown(["sampler", "estimator", *names], lines)]
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
    shown = {
        ("kl",): "KL(q | rho), nats",
        ("mean_z",): "bias of the mean, in standard errors",
        ("cov_z",): "bias of the covariance, in standard errors",
        ("weighted", "ess"): "effective sample size / N, weighted",
        ("weighted", "mean_z"): "bias of the weighted mean, in standard errors",
        ("weighted", "cov_z"): "bias of the weighted covariance, in standard errors",
    }
    jumps = [int(k) for k in next(iter(found["rows"].values()))[0]["samples"] if k != "solve"]
    last = max(jumps)
    figure, axes = plots.panels(2, 3, size=(5.0, 4.0))
    for axis, (at, title) in zip(axes.flat, shown.items(), strict=True):
        lines = {
            name: (jumps, [average(rows, "samples", str(k), *at) for k in jumps])
            for name, rows in found["rows"].items()
        }
        plots.curves(lines, legend=False, ax=axis)
        for index, rows in enumerate(found["rows"].values()):
            axis.plot([2 * last], [average(rows, "samples", "solve", *at)], "D", color=f"C{index}")
        axis.set(title=title, xscale="log", yscale="linear" if at[-1] == "ess" else "log")
        axis.set(xlim=(0.85 * min(jumps), 2.35 * last))
        axis.set_xticks([*jumps, 2 * last], [*map(str, jumps), "solve"])
        axis.set_xticks([], minor=True)
        if at[-1].endswith("_z"):
            axis.axhline(1.0, color="grey", linestyle=":")
    axes[0, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set(xlabel="jumps")
    figure.suptitle(f"{dim} dimensions")
    figure.savefig(path, dpi=110)


def scatter(path: pathlib.Path, title: str, jumps: Sequence[int], kept: dict[str, np.ndarray]) -> None:
    """Estimates against the truth, sample by sample: the determinants above, the head below, the solve at the right."""
    truth = kept["truth"]
    grid = [[f"{what}, {k}" for k in jumps] + [last] for what, last in DRAWN]
    figure, axes = plots.panels(2, len(jumps) + 1, size=(3.4, 3.5), sharex=True, sharey=True)
    low, high = np.quantile(truth, [0.001, 1.0])
    room = 0.08 * (high - low)
    for axis, estimate in zip(axes.flat, [key for line in grid for key in line], strict=True):
        error = kept[estimate] - truth
        plots.against(truth, kept[estimate], ax=axis)
        axis.set(xlim=(low - room, high + room), ylim=(low - room, high + room))
        axis.set(xlabel="exact log-density, nats", ylabel="estimate, nats")
        axis.label_outer()
        axis.set_title(f"{estimate}: median error {np.nanmedian(np.abs(error)):.3f}", fontsize=9)
    figure.suptitle(f"{title}: log-density at {len(truth):,} data points")
    figure.savefig(path, dpi=110)


# The lines of the scatter figure, with what closes each.
DRAWN = (("determinant", "solve"), ("head", "solve, one probe"))
