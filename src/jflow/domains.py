"""The pairs (s, t) at which flow maps are defined; ``jflow.types`` has the same names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jflow import checks


@dataclasses.dataclass(frozen=True, repr=False)
class Domain:
    """The pairs (s, t) at which a flow map is defined, all within [0, 1].

    Attributes:
      name: the domain's name in error messages.
      backward: whether the domain includes s > t (encoding, data to noise).
      target: the one target time allowed, or None for any.
      source: the one source time allowed, or None for any.
      levels: for a dyadic grid: s and t must be multiples of 2^-levels, and their gap must be a power of two. None for
        other domains.
    """

    name: str
    backward: bool = False
    target: float | None = None
    levels: int | None = None
    source: float | None = None

    def __repr__(self) -> str:
        return f"Domain({self.name!r})"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {type(self.name).__name__}")

    def contains(self, s: float, t: float) -> bool:
        """Returns whether the pair of concrete times (s, t) lies in the domain. Pairs with s = t always do.

        Times that differ by less than ``checks.ROUNDING`` count as equal, so that rounding in a sum of steps
        (0.1 + 0.2, or a float32 sum that ends at 1.0000001) does not leave the domain.
        """
        return bool(self.contains_all(np.asarray(s, np.float64), np.asarray(t, np.float64)))

    def contains_all(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Applies ``contains`` to arrays of concrete times, elementwise."""
        rounding = checks.ROUNDING
        inside = (np.minimum(s, t) >= -rounding) & (np.maximum(s, t) <= 1.0 + rounding)
        allowed = np.ones_like(inside)
        if not self.backward:
            allowed &= s <= t
        if self.target is not None:
            allowed &= np.abs(t - self.target) <= rounding
        if self.source is not None:
            allowed &= np.abs(s - self.source) <= rounding
        if self.levels is not None:
            cells = 2**self.levels
            # The tolerance allows for rounding in the caller's arithmetic; float32 itself holds dyadic numbers exactly.
            start, gap = s * cells, np.abs(t - s) * cells
            power = np.log2(np.maximum(gap, 1e-30))
            allowed &= (np.abs(start - np.round(start)) < 1e-3) & (np.abs(power - np.round(power)) < 1e-3)
            allowed &= power > -0.5
        return inside & (allowed | (np.abs(t - s) <= rounding))

    def check_times(self, s: Any, t: Any) -> None:
        """Raises an error for times outside [0, 1] or a jump outside the domain. Traced times are not checked.

        Raises:
          ValueError: if a time is not a scalar or outside [0, 1], or the jump is outside the domain.
        """
        checks.time("s", s)
        checks.time("t", t)
        source, target = checks.concrete(s), checks.concrete(t)
        if source is None or target is None:
            return
        if not self.contains(float(source), float(target)):
            raise ValueError(
                f"s, t: the jump from {float(source):.9g} to {float(target):.9g} is outside the map's domain, {self.name}"
            )

    def check_grid(self, grid: Sequence[float] | jax.Array | np.ndarray) -> None:
        """Raises an error for a grid of times with a jump outside the domain.

        Traced grids are not checked; check them before ``jit``.

        Raises:
          ValueError: if a jump is outside the domain, or the grid is not one-dimensional with at least two entries.
        """
        values = checks.concrete(grid)
        if values is None:
            return
        if values.ndim != 1 or values.size < 2:
            raise ValueError(f"grid: expected at least two times in one dimension, got shape {values.shape}")
        for s, t in itertools.pairwise(values):
            if not self.contains(s, t):
                raise ValueError(
                    f"grid: the jump from {float(s):.9g} to {float(t):.9g} is outside the map's domain, {self.name}"
                )


FORWARD = Domain("0 <= s <= t <= 1")
BOTH = Domain("0 <= s, t <= 1, both directions", backward=True)
TO_DATA = Domain("t = 1 only", target=1.0)
FROM_NOISE = Domain("s = 0 only", source=0.0)


# On a finer dyadic grid, float32 cannot represent neighbouring times near t = 1.
FINEST_LEVELS = 23


def dyadic(levels: int) -> Domain:
    """Returns the dyadic domain of the shortcut model: times are multiples of 2^-levels, and gaps are powers of two.

    Raises:
      ValueError: if ``levels`` is not between 1 and ``FINEST_LEVELS``.
      TypeError: if ``levels`` is not an integer.
    """
    checks.integer("levels", levels, low=1, high=FINEST_LEVELS)
    return Domain(f"dyadic grid of {2**levels} cells, s <= t", levels=levels)
