"""Assertions for the checks, whose messages have the value, its limit and its meaning."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def require_x64() -> None:
    """Checks that jax computes in float64.

    Raises:
      RuntimeError: if ``jax_enable_x64`` is off.
    """
    if jax.dtypes.result_type(float) != np.float64:
        raise RuntimeError(
            "jax_enable_x64: expected True, got False: the checks compare to float64's rounding; call "
            'jax.config.update("jax_enable_x64", True) before any array is made'
        )


def true(condition: Any, message: str) -> None:
    """Expects the condition to be true.

    Raises:
      AssertionError: if the condition is false, with the message.
    """
    if not condition:
        raise AssertionError(message)


def at_most(name: str, value: Any, limit: Any, meaning: str) -> None:
    """Expects every entry of ``value`` to be at most ``limit``, which broadcasts; NaN fails.

    Args:
      name: the name of the value in the message.
      value: an array.
      limit: the largest values that pass.
      meaning: the meaning of a failure.

    Raises:
      AssertionError: if an entry exceeds its limit; the message has the entry that does so by the largest factor.
    """
    value, limit = np.broadcast_arrays(np.asarray(value, np.float64), np.asarray(limit, np.float64))
    if np.all(value <= limit):
        return
    excess = np.where(np.isnan(value), np.inf, value / np.maximum(limit, 1e-300))
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    raise AssertionError(f"{name}: got {value[worst]:.3g}, expected at most {limit[worst]:.3g}: {meaning}")


def above(name: str, value: Any, limit: float, meaning: str) -> None:
    """Expects every entry of ``value`` to be larger than ``limit``; NaN fails.

    Raises:
      AssertionError: if an entry is not larger; the message has the smallest entry.
    """
    value = np.asarray(value, np.float64)
    if not np.all(value > limit):
        raise AssertionError(f"{name}: got {np.min(value):.3g}, expected more than {limit:.3g}: {meaning}")


def close(name: str, value: Any, expected: Any, *, meaning: str, rtol: float, atol: float) -> None:
    """Expects ``|value - expected| <= atol + rtol |expected|`` in every entry, and both finite.

    Raises:
      AssertionError: if an entry differs; the message has the one with the largest excess.
    """
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    # inf - inf is NaN, which fails.
    with np.errstate(invalid="ignore"):
        error = np.abs(value - expected)
    at_most(f"{name}: error", error, atol + rtol * np.abs(expected), meaning)


def finite(name: str, tree: Any, meaning: str) -> None:
    """Expects every entry of every leaf to be finite.

    Raises:
      AssertionError: if an entry is not finite; the message has their number in the first such leaf.
    """
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
        bad = ~np.isfinite(np.asarray(leaf, np.float64))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise AssertionError(
                f"{name}{jax.tree_util.keystr(place)}: got {bad.sum()} of {bad.size} entries that are not finite, "
                f"the first at {first}, expected none: {meaning}"
            )
