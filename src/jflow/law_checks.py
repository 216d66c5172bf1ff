"""Checks of laws of times: that an argument is a law, and that the times which it draws lie in the map's domain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.named import shown
from jflow.types import Array, Domain, Key

Law = Callable[[Key, int], Array]
PairLaw = Callable[[Key, int], tuple[Array, Array]]

# The number of times drawn to check a law.
DRAWN = 256

_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
# The signatures of laws, for error messages.
_ONE = "(key, n) -> times, a law of jflow.times such as uniform()"
_PAIR = "(key, n) -> (s, t), a law of pairs of jflow.times such as triangle()"


def check_law(name: str, law: Law) -> np.ndarray | None:
    """Draws from a law of one time, and checks that it returns times in [0, 1] of shape ``[n]``.

    The drawn times are concrete, also under ``jit``, unless the law closes over traced values. The values of traced times
    are not checked.

    Args:
      name: the law's name in error messages.
      law: ``(key, n) -> [n]``.

    Returns:
      The drawn times in float64, or None if they are traced.

    Raises:
      ValueError: if the times do not have shape ``[n]``, or a time is outside [0, 1] or not finite.
      TypeError: if ``law`` is not a law, or the times are not floating-point.
    """
    return _check_values(name, _draw(name, law, _ONE), "times")


def check_pairs(name: str, law: PairLaw, domain: Domain) -> tuple[np.ndarray, np.ndarray] | None:
    """Draws from a law of pairs, and checks that it returns a tuple (s, t) of times ``[n]`` inside the domain.

    The drawn times are concrete, also under ``jit``, unless the law closes over traced values. The values of traced times
    are not checked.

    Args:
      name: the law's name in error messages.
      law: ``(key, n) -> (s [n], t [n])``.
      domain: the domain of the map that is trained at these times.

    Returns:
      The drawn pairs (s, t) in float64, or None if they are traced.

    Raises:
      ValueError: if the law does not return a tuple of two arrays of shape ``[n]``, a time is outside [0, 1] or not finite,
        or a pair is outside the domain. A list is not accepted.
      TypeError: if ``law`` is not a law, or the times are not floating-point.
    """
    first, second = _as_pair(name, _draw(name, law, _PAIR))
    s, t = _check_values(name, first, "s"), _check_values(name, second, "t")
    if s is None or t is None:
        return None
    outside = np.flatnonzero(~domain.contains_all(s, t))
    if outside.size:
        place = outside[0]
        raise ValueError(
            f"{name}: expected pairs (s, t) within the domain, {domain.name}; the law drew ({s[place]:g}, {t[place]:g})"
        )
    return s, t


def check_one(name: str, law: Any) -> None:
    """Raises an error if the argument is not a law of one time. The law is only traced."""
    _check_array(name, _shapes(name, law, _ONE), "times")


def check_pair(name: str, law: Any) -> None:
    """Raises an error if the argument is not a law of pairs. The law is only traced."""
    for drawn, which in zip(_as_pair(name, _shapes(name, law, _PAIR)), ("s", "t"), strict=True):
        _check_array(name, drawn, which)


def _shapes(name: str, law: Any, what: str) -> Any:
    """Returns the shapes and dtypes of a law's output."""
    _check_is_law(name, law, what)
    # Make the key inside the trace: laws are also made at import, when jax must not initialise its backend.
    return jax.eval_shape(lambda: law(jax.random.key(0), DRAWN))


def _draw(name: str, law: Any, what: str) -> Any:
    """Draws from a law; the times are concrete if possible."""
    _check_is_law(name, law, what)
    # Otherwise the times would be traced under jit, and their values could not be checked.
    with jax.ensure_compile_time_eval():
        return law(jax.random.key(0), DRAWN)


def _check_is_law(name: str, law: Any, what: str) -> None:
    """Raises TypeError if the argument is not a function of a key and a number."""
    checks.function(name, law, what)
    if makes_laws(law):
        raise TypeError(
            f"{name}: expected a function {what}, got the function {shown(law)}, which makes one: {shown(law)}(...)"
        )
    checks.accepts(name, law, what, 2, model=False)


def makes_laws(law: Any) -> bool:
    """Returns whether the argument is a function of ``jflow.times``, which makes laws, and not a law."""
    return inspect.isfunction(law) and law.__module__ == "jflow.times"


def _as_pair(name: str, drawn: Any) -> tuple[Any, Any]:
    if not isinstance(drawn, tuple) or len(drawn) != 2:
        raise ValueError(f"{name}: expected a law that returns a tuple (s [n], t [n]), it returned {_kind(drawn)}")
    return drawn


def _check_array(name: str, drawn: Any, which: str) -> None:
    """Raises an error if a drawn value is not a floating-point array ``[n]``."""
    if not isinstance(drawn, _ARRAYS):
        raise ValueError(f"{name}: expected a law that returns an array of {which}, it returned {_kind(drawn)}")
    shape, dtype = drawn.shape, drawn.dtype
    if shape != (DRAWN,):
        raise ValueError(f"{name}: expected a law that returns {which} of shape [n], got {shape} for n = {DRAWN}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: expected a law that returns floating-point {which}, got {dtype}")


def _kind(drawn: Any) -> str:
    """Describes what a law returned, for error messages."""
    if isinstance(drawn, _ARRAYS):
        return "one array"
    return f"a {type(drawn).__name__}" + (f" of {len(drawn)}" if isinstance(drawn, tuple | list) else "")


def _check_values(name: str, drawn: Any, which: str) -> np.ndarray | None:
    """Checks the drawn times, and returns them as a numpy array, or None if they are traced."""
    _check_array(name, drawn, which)
    values = checks.concrete(drawn)
    if values is None:
        return None
    values = values.astype(np.float64)
    wrong = values[~((values >= 0.0) & (values <= 1.0))]
    if wrong.size:
        raise ValueError(f"{name}: expected a law of times in [0, 1], it drew {which} = {wrong[0]:g}")
    return values
