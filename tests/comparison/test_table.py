"""The table as Markdown, as JSON and as a figure, of rows that are written out here."""

from __future__ import annotations

import numpy as np
import pytest

from jflow import comparison
from jflow.comparison.distances import Distance
from jflow.comparison.table import Row

ROWS = [
    # Name, kind, NFE, RMSE, seconds per sample; the last solve has failed.
    ("exact, 1 jump", "map", 1.0, 1e-16, 1e-6),
    ("exact, 2 jumps", "map", 2.0, 1e-16, 2e-6),
    ("euler, 32 steps", "solver", 32.0, 0.0123456, 4e-6),
    ("euler, 128 steps", "solver", 128.0, 0.0031, 1.6e-5),
    ("tsit5, tolerance 0.0001", "solver", 27.5, 2e-5, 1e-5),
    ("cut short", "solver", 6.0, np.nan, 1e-6),
]


def measured(name, kind, nfe, rmse, seconds):
    failed = bool(np.isnan(rmse))
    return Row(
        name=name,
        entry=name.partition(", ")[0],
        kind=kind,
        nfe=nfe,
        flops=None if failed else 10.0 * nfe,
        rmse=rmse,
        rmse_error=rmse / 10,
        median_error=rmse,
        distances={"energy": Distance(rmse, None if failed else 0.5)},
        failed=21 if failed else 0,
        compile_seconds=0.25,
        seconds=seconds,
        seconds_low=0.9 * seconds,
        seconds_high=1.1 * seconds,
    )


@pytest.fixture
def table():
    return comparison.Comparison(
        rows=tuple(measured(*row) for row in ROWS),
        reference="truth, 1 jump",
        samples=21,
        batch=8,
        repeats=2,
        floor={},
        device="cpu, cpu",
        versions={"python": "3", "jax": "0"},
    )


def test_markdown_and_json(table):
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1
    row = next(line for line in lines if line.startswith("| euler, 32 steps | 32 |"))
    assert f"| {table.row('euler, 32 steps').rmse:.3g} |" in row
    again = comparison.Comparison.from_json(table.to_json())
    assert again.to_json() == table.to_json() and "NaN" not in table.to_json()
    assert again.rows[:4] == table.rows[:4] and np.isnan(again.row("cut short").rmse)
    with pytest.raises(ValueError, match="of format 1"):
        comparison.Comparison.from_json("{}")
    with pytest.raises(KeyError, match="expected one of 'exact, 1 jump'"):
        table.row("exact")


def test_the_plot_is_drawn_on_the_given_axes(table, tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(1, 2)
    assert table.plot(axes) is figure
    labels = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert labels == ["exact", "euler", "tsit5", "cut short"]
    np.testing.assert_array_equal(axes[0].containers[1].lines[0].get_xdata(), [32, 128])
    assert axes[1].get_xlabel().startswith("time per sample")
    table.save_figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    with pytest.raises(ValueError, match="axes: expected two"):
        table.plot(axes[:1])
