"""The result of a comparison: rows, as Markdown, as a figure, as JSON."""

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
    """One way from noise to data, measured.

    Attributes:
      name: of the row.
      entry: the name of its entry, a line of the figure.
      kind: "map", "solver" or "sampler".
      nfe: calls of the model per sample, the mean; None where the solver does not count.
      flops: XLA's count of one call of the model times the number of calls, per sample. The solver's own arithmetic is not
        in it, a jump's is. None where XLA does not count, or the model has a loop in it, whose body XLA counts once.
      rmse: root mean square over samples of the error, itself the root mean square over the entries of a sample's
        difference to the reference's end point, in units of the data; NaN where a sample is not finite.
      rmse_error: the standard error of ``rmse``.
      median_error: the median over samples.
      distances: of the samples to the data, by name.
      failed: samples that are not finite, as of a solve that did not end.
      compile_seconds: for tracing and compiling a block, or for reading it from jax's compilation cache.
      seconds: per sample, the median of the timed calls.
      seconds_low: the first quartile of the same.
      seconds_high: the third.
      speedup: the time of the cheapest solver's row whose rmse is at most this one's, over the time of this one; None where no
        solver's row is as accurate. For a solver's own row it is at most 1.
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
        """The time of one sample."""
        return self.seconds * 1e6

    @property
    def samples_per_second(self) -> float:
        """How many samples a device makes in a second."""
        return 1.0 / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties as JSON values; None for what is unknown or not finite."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["distances"] = {name: distance._asdict() for name, distance in self.distances.items()}
        fields["microseconds_per_sample"] = self.microseconds_per_sample
        fields["samples_per_second"] = self.samples_per_second
        return _finite(fields)


# Fields in which None means unknown; in the others JSON's null is a number that is not finite.
_MAY_BE_NONE = ("nfe", "flops", "speedup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table that ``compare`` measured.

    Attributes:
      rows: in the order of the entries.
      reference: what errors are measured against, in words.
      samples: how many samples errors and distances are measured on.
      batch: samples per timed call.
      repeats: timed calls per row.
      floor: distances of the reference's samples to the data; empty where there is no data beside the reference.
      device: what the times were measured on.
      versions: of python and jax.
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
        """The row of a name.

        Raises:
          KeyError: for an unknown name; the message lists the names.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"name: expected one of {', '.join(repr(row.name) for row in self.rows)}, got {name!r}")

    def markdown(self) -> str:
        """The table in Markdown, numbers with three significant digits; blank where a number is unknown."""
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
        """Error against the NFE and against the time per sample, one line for each entry.

        Args:
          axes: two Matplotlib Axes; by default those of a new figure.

        Returns:
          The Matplotlib Figure.

        Raises:
          ImportError: without Matplotlib, which comes with ``jflow[experiments]``.
          ValueError: for another number of axes than two.
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
            # A logarithmic axis warns where it has nothing to show.
            scale = "log" if any(row.rmse > 0.0 for row in self.rows) else "linear"
            axis.set(xlabel=label, xscale="log", yscale=scale)
            axis.grid(alpha=0.3)
        axes[0].set(ylabel="RMSE against the reference")
        axes[1].legend()
        return axes[0].figure

    def save_figure(self, path: str | os.PathLike[str]) -> None:
        """Writes the figure of ``plot`` to a file; errors as ``plot``."""
        figure = _matplotlib("figure").Figure(figsize=SIZE, layout="constrained")
        self.plot(figure.subplots(1, 2, sharey=True))
        figure.savefig(path, dpi=130)

    def to_json(self) -> str:
        """The comparison as JSON; ``from_json`` reads it. null stands for what is unknown or not finite."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rows"] = [row.as_dict() for row in self.rows]
        fields["floor"] = {name: distance._asdict() for name, distance in self.floor.items()}
        return json.dumps({"format": FORMAT, **_finite(fields)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that ``to_json`` wrote.

        Raises:
          ValueError: for other JSON.
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
    """The value with None in place of numbers that are not finite, which JSON does not have."""
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
        raise ImportError("plot needs Matplotlib, which is missing: pip install 'jflow[experiments]'") from error
    return getattr(matplotlib, module)
