"""The result of a comparison: its rows, which can be written as Markdown, as a figure and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jflow.comparison.distances import Distance

FORMAT = 1
SIZE = (11.0, 4.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of one way from noise to data.

    Attributes:
      name: the name of the row.
      entry: the name of its entry, which is a line of the figure.
      kind: "map", "solver" or "sampler".
      nfe: the mean number of calls of the model per sample; None if the solver does not count them.
      flops: the FLOPs per sample: XLA's count for one call of the model, times the number of calls. This includes the
        arithmetic of a jump, but not that of a solver. None if XLA gives no count, or the model has a loop.
      rmse: the root-mean-square error over all entries of all samples, against the reference's end points, in units of the
        data; NaN if a sample is not finite.
      rmse_error: the standard error of ``rmse``.
      median_error: the median over samples of the root-mean-square error of a sample.
      distances: the distances of the samples to the data, by name.
      failed: the number of samples that are not finite, for example because a solve did not end.
      compile_seconds: the time of tracing and compiling a block, or of reading it from jax's compilation cache.
      seconds: the time per sample, the median of the timed calls.
      seconds_low: the first quartile of the time per sample.
      seconds_high: the third quartile of the time per sample.
      speedup: the time of the fastest solver row whose rmse is at most that of this row, divided by the time of this row;
        None if no solver row is as accurate. For a solver row it is at most 1.
    """

    name: str
    entry: str
    kind: str
    nfe: float | None
    flops: float | None
    rmse: float
    rmse_error: float
    median_error: float
    distances: Mapping[str, Distance]
    failed: int
    compile_seconds: float
    seconds: float
    seconds_low: float
    seconds_high: float
    speedup: float | None = None

    @property
    def microseconds_per_sample(self) -> float:
        """The time per sample in microseconds."""
        return self.seconds * 1e6

    @property
    def samples_per_second(self) -> float:
        """The number of samples per second."""
        return 1.0 / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties as JSON values; None for values that are unknown or not finite."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["distances"] = {name: distance._asdict() for name, distance in self.distances.items()}
        fields["microseconds_per_sample"] = self.microseconds_per_sample
        fields["samples_per_second"] = self.samples_per_second
        return _finite(fields)


# Fields in which None means unknown; in the other fields null in JSON stands for NaN.
_MAY_BE_NONE = ("nfe", "flops", "speedup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of ``compare``.

    Attributes:
      rows: the rows, in the order of the entries.
      reference: a description of the reference for errors.
      samples: the number of samples for errors and distances.
      batch: the number of samples per timed call.
      repeats: the number of timed calls per row.
      floor: the distances of the reference's samples to the data; empty if no data were given.
      device: the device on which the times were measured.
      versions: the versions of python and jax.
    """

    rows: tuple[Row, ...]
    reference: str
    samples: int
    batch: int
    repeats: int
    floor: Mapping[str, Distance]
    device: str
    versions: Mapping[str, str]

    def row(self, name: str) -> Row:
        """The row with this name.

        Raises:
          KeyError: if the name is unknown; the message lists the names.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"name: expected one of {', '.join(repr(row.name) for row in self.rows)}, got {name!r}")

    def markdown(self) -> str:
        """The table in Markdown, with three significant digits; cells of unknown numbers are blank."""
        names = list(self.rows[0].distances) if self.rows else []
        failed = any(row.failed for row in self.rows)
        header = ["", "NFE", "MFLOP/sample", "RMSE", "+-", "median error"]
        header += [cell for name in names for cell in (name, "+-")]
        header += ["us/sample", "samples/s", "speed-up", "compile s"] + ["failed"] * failed
        lines = [header, ["---"] * len(header)]
        for row in self.rows:
            flops = None if row.flops is None else row.flops / 1e6
            cells = [row.name, row.nfe, flops, row.rmse, row.rmse_error, row.median_error]
            cells += [cell for name in names for cell in row.distances[name]]
            cells += [row.microseconds_per_sample, row.samples_per_second, row.speedup, row.compile_seconds]
            lines.append([_cell(cell) for cell in cells + [row.failed] * failed])
        if self.floor:
            cells = ["reference", *[None] * 5, *[cell for name in names for cell in self.floor[name]]]
            lines.append([_cell(cell) for cell in cells + [None] * (len(header) - len(cells))])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def plot(self, axes: Sequence[Any] | None = None) -> Any:
        """Plots the error against the NFE and against the time per sample, with one line for each entry.

        Args:
          axes: two Matplotlib Axes; by default those of a new figure.

        Returns:
          The Matplotlib Figure.

        Raises:
          ImportError: if Matplotlib is not installed; it comes with ``jflow[plots]``.
          ValueError: if the number of axes is not two.
        """
        if axes is None:
            figure = _matplotlib("pyplot").figure(figsize=SIZE, layout="constrained")
            axes = list(figure.subplots(1, 2, sharey=True))
        if len(axes) != 2:
            raise ValueError(f"axes: expected two axes, for NFE and time, got {len(axes)}")
        for axis, column, label in (
            (axes[0], "nfe", "calls of the model per sample (NFE)"),
            (axes[1], "microseconds_per_sample", "time per sample, microseconds"),
        ):
            for entry in dict.fromkeys(row.entry for row in self.rows):
                rows = [row for row in self.rows if row.entry == entry and getattr(row, column) is not None]
                solver = bool(rows) and rows[0].kind == "solver"
                axis.errorbar(
                    [getattr(row, column) for row in rows],
                    [row.rmse for row in rows],
                    yerr=[row.rmse_error for row in rows],
                    fmt="s--" if solver else "o-",
                    linewidth=1.0 if solver else 2.5,
                    label=entry,
                )
            # A logarithmic axis without positive values would warn.
            scale = "log" if any(row.rmse > 0.0 for row in self.rows) else "linear"
            axis.set(xlabel=label, xscale="log", yscale=scale)
            axis.grid(alpha=0.3)
        axes[0].set(ylabel="RMSE against the reference")
        axes[1].legend()
        return axes[0].figure

    def save_figure(self, path: str | os.PathLike[str]) -> None:
        """Writes the figure of ``plot`` to a file.

        Raises:
          ImportError: if Matplotlib is not installed.
        """
        figure = _matplotlib("figure").Figure(figsize=SIZE, layout="constrained")
        self.plot(figure.subplots(1, 2, sharey=True))
        figure.savefig(path, dpi=130)

    def to_json(self) -> str:
        """The comparison as JSON, which ``from_json`` reads; null stands for values that are unknown or not finite."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rows"] = [row.as_dict() for row in self.rows]
        fields["floor"] = {name: distance._asdict() for name, distance in self.floor.items()}
        return json.dumps({"format": FORMAT, **_finite(fields)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Reads a comparison that ``to_json`` wrote.

        Raises:
          ValueError: if the text is not JSON of this format.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"text: expected what Comparison.to_json writes, of format {FORMAT}")
        names = [field.name for field in dataclasses.fields(Row)]
        rows = []
        for row in values.pop("rows"):
            kept = {name: row[name] for name in names}
            kept = {k: math.nan if v is None and k not in _MAY_BE_NONE else v for k, v in kept.items()}
            rows.append(Row(**{**kept, "distances": _distances(row["distances"])}))
        return cls(**{**values, "rows": tuple(rows), "floor": _distances(values["floor"])})


def _distances(values: Mapping[str, Mapping[str, float | None]]) -> dict[str, Distance]:
    return {
        name: Distance(math.nan if each["value"] is None else each["value"], each["standard_error"])
        for name, each in values.items()
    }


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that are not finite, which JSON cannot represent."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _matplotlib(module: str) -> Any:
    try:
        import matplotlib.figure
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError("plot needs Matplotlib, which is missing: pip install 'jflow[plots]'") from error
    return getattr(matplotlib, module)
