"""Checks of arguments, shared by all public functions. Messages name the argument, the expected value and the given one.

Static values (shapes, dtypes, Python numbers) are checked while tracing. Values of arrays are checked if they are
concrete; ``concrete`` returns None for a traced array, and the caller then skips the check.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

# Times that differ by less than this count as equal: float32 arithmetic may give 1.0000001 instead of 1.
ROUNDING = 1e-6
# The number of elements that ``fits`` reads at a time, so that little of a memory-mapped array is in memory.
_BLOCK = 2**20

PyTree = Any
Tree = TypeVar("Tree")
Choice = TypeVar("Choice")


def concrete(value: object) -> np.ndarray | None:
    """Returns the value as a numpy array, or None if it is traced."""
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return None


def number(name: str, value: object, *, low: float = -np.inf, high: float = np.inf, open_low: bool = False) -> float:
    """Checks that a value is a concrete finite number in [low, high], or in (low, high] with ``open_low``.

    Raises:
      TypeError: if it is neither a real number nor a concrete scalar array.
      ValueError: if it is not finite or outside the interval.
    """
    if isinstance(value, (np.ndarray, jax.Array)) and np.ndim(value) == 0 and (found := concrete(value)) is not None:
        value = found[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    inside = np.isfinite(value) and (value > low if open_low else value >= low) and value <= high
    if not inside:
        raise ValueError(f"{name}: expected a number in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")
    return float(value)


def integer(name: str, value: object, *, low: int = 0, high: int | None = None) -> int:
    """Checks that a value is a concrete integer in [low, high].

    Raises:
      TypeError: if it is not an integer.
      ValueError: if it is outside the interval.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {value!r}")
    if value < low or (high is not None and value > high):
        above = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name}: expected a whole number of at least {low}{above}, got {value}")
    return int(value)


def choice(name: str, value: Choice, allowed: Collection[object]) -> Choice:
    """Checks that a value is one of the allowed values, and returns it.

    Raises:
      ValueError: if it is not; the message lists the allowed values.
    """
    # Do not accept True for 1.
    if not any(isinstance(value, bool) is isinstance(each, bool) and value == each for each in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def function(name: str, value: object, what: str) -> None:
    """Checks that a value can be called and is not a class.

    Args:
      name: the argument's name in messages.
      value: the function.
      what: its expected signature, for the message.

    Raises:
      TypeError: if the value is not callable, or is a class instead of an instance.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name}: expected a function {what}, got the class {value.__name__}; make one with {value.__name__}()"
        )
    if not callable(value):
        raise TypeError(f"{name}: expected a function {what}, got {type(value).__name__}")


def accepts(name: str, value: Any, what: str, positional: int, *, model: bool = True) -> None:
    """Checks that a function accepts this number of positional arguments, and ``key=`` if it is a model.

    A function whose signature Python cannot inspect is accepted.

    Args:
      name: the argument's name in messages.
      value: the function.
      what: its expected signature, for the message.
      positional: the number of positional arguments with which it will be called.
      model: whether it is a model, such as a Velocity, whose last two positional arguments are x and cond.

    Raises:
      TypeError: if the value is not a function, or does not accept these arguments.
    """
    function(name, value, what)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [each for each in signature.parameters.values() if each.kind in places and each.name != "key"]
    # If the last argument is required, is not named cond, and is followed by another, it is x: the function takes one more
    # time than expected.
    last = parameters[positional - 1] if len(parameters) > positional else None
    shifted = model and last is not None and last.default is inspect.Parameter.empty and last.name != "cond"
    try:
        signature.bind(*[None] * positional, **({"key": None} if model else {}))
    except TypeError:
        shifted = True
    if shifted:
        raise TypeError(f"{name}: expected a function {what}, got one of {signature}")


def key(name: str, value: Any) -> None:
    """Checks that a value is a PRNG key of jax: a typed key (``jax.random.key``), or a raw key (``jax.random.PRNGKey``).

    Raises:
      TypeError: if it is not a PRNG key.
    """
    dtype = getattr(value, "dtype", None)
    typed = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == np.uint32 and np.ndim(value) == 1):
        got = type(value).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name}: expected a PRNG key, such as jax.random.key(0), got {got}")


def shape(name: str, value: Any, expected: Sequence[int | None]) -> None:
    """Checks the shape of an array; None in the expected shape stands for any length.

    Raises:
      ValueError: if the shape differs.
    """
    got = np.shape(value)
    if len(got) != len(expected) or any(e is not None and g != e for g, e in zip(got, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected an array of shape ({wanted}), got {got}")


def scalar(name: str, value: Any) -> None:
    """Checks that a value is a scalar. The library's functions take one sample; batches use ``jax.vmap``.

    Raises:
      ValueError: if the value has axes.
    """
    if np.shape(value) != ():
        raise ValueError(f"{name}: expected a scalar (one sample; jax.vmap over a batch), got shape {np.shape(value)}")


def time(name: str, value: Any) -> None:
    """Checks that a value is a scalar time in [0, 1], up to rounding. The value of a traced time is not checked.

    Raises:
      ValueError: if the value has axes, or is outside [0, 1].
    """
    scalar(name, value)
    number = concrete(value)
    if number is not None and not -ROUNDING <= float(number) <= 1.0 + ROUNDING:
        raise ValueError(f"{name}: expected a time in [0, 1], got {float(number):.9g}")


def rows(name: str, tree: PyTree) -> int:
    """Returns the number of rows of a batch: the length of the leading axis, which must be equal for all leaves.

    Raises:
      ValueError: if there are no leaves or no rows, or the lengths differ.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        got = sorted(sizes)
        raise ValueError(f"{name}: expected arrays with one common leading axis of rows, got {got}")
    return int(next(iter(sizes))[0])


def floating(name: str, value: PyTree) -> None:
    """Checks that all leaves of a pytree are floating-point arrays.

    Raises:
      TypeError: if a leaf has another dtype.
    """
    for leaf in jax.tree.leaves(value):
        dtype = jax.dtypes.result_type(leaf)
        if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
            raise TypeError(f"{name}: expected floating-point arrays, got dtype {dtype}")


def same_structure(name: str, value: PyTree, like_name: str, like: PyTree) -> None:
    """Checks that two pytrees have the same structure and leaf shapes.

    Raises:
      ValueError: if the structures or shapes differ.
    """
    if jax.tree.structure(value) != jax.tree.structure(like):
        raise ValueError(
            f"{name}: expected the pytree structure of {like_name}, {jax.tree.structure(like)}, "
            f"got {jax.tree.structure(value)}"
        )
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(like), strict=True):
        if np.shape(a) != np.shape(b):
            raise ValueError(f"{name}: expected the shape of {like_name}, {np.shape(b)}, got {np.shape(a)}")


def fits(name: str, tree: PyTree) -> None:
    """Checks that the values of host arrays fit the dtypes to which jax converts them.

    If ``jax_enable_x64`` is off, int64 becomes int32, uint64 becomes uint32, float64 becomes float32, and complex128 becomes
    complex64. Integers must not change, and finite values must stay finite. Rounding is allowed, including underflow to zero.
    NaN and infinite values are accepted. jax arrays are not checked, because they have already been converted.

    Args:
      name: the argument's name in messages.
      tree: numpy or similar arrays. They are read once, in blocks, and only if the dtype changes.

    Raises:
      ValueError: if a value does not fit. The message names the leaf, the first such value, and both dtypes.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            continue
        array = np.asanyarray(leaf)
        if (
            array.dtype.kind not in "iufc"
            or (narrow := jax.dtypes.result_type(np.empty(0, array.dtype))) == array.dtype
        ):
            continue
        for block in _blocks(array):
            lost = _lost(block, narrow)
            if lost.any():
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)}: expected values that fit {narrow}, which jax makes of "
                    f"{array.dtype} unless jax_enable_x64 is set, got {block[lost][0]}"
                )


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the array in blocks of about ``_BLOCK`` elements, each with at least one axis."""
    array = np.atleast_1d(array)
    rows = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows])


def _lost(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a mask of the values that a cast would lose: integers that change, and finite numbers that become infinite."""
    # Overflow is expected here: it is what the mask reports.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    return cast != values if values.dtype.kind in "iu" else np.isfinite(values) & ~np.isfinite(cast)


@contextlib.contextmanager
def of_one_sample(x: Any) -> Iterator[None]:
    """Adds the shapes of x to an error raised inside a model, because a batch in place of one sample fails deep inside it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(x))
        note = f"x: jflow calls a model with one sample, here of shape {shapes}; call it under jax.vmap over a batch"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def output(name: str, value: PyTree, x: Tree) -> Tree:
    """Checks the output of a function of an event x, and casts it to the dtypes of x, leaf by leaf.

    Args:
      name: the output's name in messages.
      value: the output, a pytree of floating-point arrays, shaped like x.
      x: the event, a pytree of floating-point arrays.

    Returns:
      The output in the dtypes of x.

    Raises:
      ValueError: if the structure or shapes differ from those of x.
      TypeError: if a leaf is not floating-point. Casting complex numbers or integers could hide a mistake.
    """
    same_structure(name, value, "x", x)

    def cast(leaf: Any, like: Any) -> jax.Array:
        # Skip a cast to the same dtype: called eagerly, it costs as much as a small network.
        dtype = getattr(like, "dtype", None)
        if isinstance(leaf, jax.Array) and leaf.dtype == dtype and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return leaf
        floating("x", like)
        floating(name, leaf)
        return jax.numpy.asarray(leaf).astype(jax.dtypes.result_type(like))

    return jax.tree.map(cast, value, x)
