"""Checks of arguments, shared by every public function: the message names the argument, what came, what was expected.

Static values (shapes, dtypes, Python numbers) are checked while tracing. Values of arrays are checked where they are
concrete; ``concrete`` returns None for a traced array, and the caller then skips the check.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np


def concrete(value: Any) -> np.ndarray | None:
    """The value as a numpy array, or None while it is being traced."""
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return None


def number(name: str, value: Any, *, low: float = -np.inf, high: float = np.inf, open_low: bool = False) -> float:
    """A concrete finite number in [low, high] (or in (low, high] with ``open_low``).

    Raises:
      TypeError: when it is no number.
      ValueError: when it is not finite or outside.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    inside = np.isfinite(value) and (value > low if open_low else value >= low) and value <= high
    if not inside:
        raise ValueError(f"{name}: expected a number in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")
    return float(value)


def integer(name: str, value: Any, *, low: int = 0, high: int | None = None) -> int:
    """A concrete whole number of at least ``low`` and at most ``high``.

    Raises:
      TypeError: when it is no whole number.
      ValueError: when it is outside.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {value!r}")
    if value < low or (high is not None and value > high):
        above = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name}: expected a whole number of at least {low}{above}, got {value}")
    return int(value)


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """One of the allowed values.

    Raises:
      ValueError: when it is none of them; the message lists them.
    """
    # True is not 1 here.
    if not any(isinstance(value, bool) is isinstance(each, bool) and value == each for each in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def function(name: str, value: Any, what: str) -> None:
    """Something that can be called.

    Args:
      name: the argument.
      value: the function.
      what: what it is expected to do, for the message.

    Raises:
      TypeError: when it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name}: expected a function {what}, got {type(value).__name__}")


def shape(name: str, value: Any, expected: Sequence[int | None]) -> None:
    """An array of the expected shape, in which None stands for any length.

    Raises:
      ValueError: when the shape is another.
    """
    got = np.shape(value)
    if len(got) != len(expected) or any(e is not None and g != e for g, e in zip(got, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected an array of shape ({wanted}), got {got}")


def scalar(name: str, value: Any) -> None:
    """A scalar: the library's functions take one sample, and batches come through ``jax.vmap``.

    Raises:
      ValueError: when it has axes.
    """
    if np.shape(value) != ():
        raise ValueError(f"{name}: expected a scalar (one sample; jax.vmap over a batch), got shape {np.shape(value)}")


def floating(name: str, value: Any) -> None:
    """A pytree whose leaves are all floating-point arrays.

    Raises:
      TypeError: naming the dtype that came.
    """
    for leaf in jax.tree.leaves(value):
        dtype = jax.dtypes.result_type(leaf)
        if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
            raise TypeError(f"{name}: expected floating-point arrays, got dtype {dtype}")


def same_structure(name: str, value: Any, like_name: str, like: Any) -> None:
    """Two pytrees of the same structure and leaf shapes.

    Raises:
      ValueError: naming both.
    """
    if jax.tree.structure(value) != jax.tree.structure(like):
        raise ValueError(
            f"{name}: expected the pytree structure of {like_name}, {jax.tree.structure(like)}, "
            f"got {jax.tree.structure(value)}"
        )
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(like), strict=True):
        if np.shape(a) != np.shape(b):
            raise ValueError(f"{name}: expected the shape of {like_name}, {np.shape(b)}, got {np.shape(a)}")


def output(name: str, value: Any, x: Any) -> Any:
    """What a function of events returned, cast leaf by leaf to the dtypes of the event x that it was given.

    Args:
      name: how messages call the value.
      value: a pytree of floating-point arrays, shaped like x.
      x: a pytree of floating-point arrays.

    Returns:
      The value in the dtypes of x.

    Raises:
      ValueError: for another structure or other shapes than those of x.
      TypeError: for leaves that are not floating-point: casting complex numbers or integers would lose or hide something.
    """
    floating("x", x)
    same_structure(name, value, "x", x)
    floating(name, value)
    return jax.tree.map(lambda leaf, like: jax.numpy.asarray(leaf).astype(jax.numpy.asarray(like).dtype), value, x)
