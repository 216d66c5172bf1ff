"""The table of ``benchmarks.reduction_bias``, which the page of the catalogue shows as well."""

from __future__ import annotations

from typing import Any

from experiments.shared import results

# A shift below this is rounding error.
UNBIASED = 1e-10


def table(rows: list[dict[str, Any]]) -> str:
    """Relative bias and largest shift of every mixture and reduction, a column for each pair of times."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reduction"] == "squared":
            cells.setdefault((row["mixture"], "RMS of v"), []).append(f"{row['rms_velocity']:.3f}")
        biased = row["largest_shift"] > UNBIASED
        cell = f"{row['relative_bias']:.3f}, {row['largest_shift']:.3f}" if biased else "0"
        cells.setdefault((row["mixture"], row["reduction"]), []).append(cell)
    pairs = dict.fromkeys((row["s"], row["t"]) for row in rows)
    header = ["mixture", "reduction", *(f"({s:g}, {t:g})" for s, t in pairs)]
    return results.markdown(header, [[*names, *found] for names, found in cells.items()])
