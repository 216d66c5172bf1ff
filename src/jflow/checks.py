"""Checks of arguments, shared by every public function: the message names the argument, what came, what was expected.

Static values (shapes, dtypes, Python numbers) are checked while tracing. Values of arrays are checked where they are
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

# Times that differ by less are the same: arithmetic in float32 may leave 1.0000001 of a one.
ROUNDING = 1e-6
# Elements of an array that ``fits`` looks at together, so that of a memory-mapped array little is in memory.
_BLOCK = 2**20

PyTree = Any
Tree = TypeVar("Tree")
Choice = TypeVar("Choice")


def concrete(value: object) -> np.ndarray | None:
    """The value as a numpy array, or None while it is being traced."""
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return None


def number(name: str, value: object, *, low: float = -np.inf, high: float = np.inf, open_low: bool = False) -> float:
    """A concrete finite number in [low, high] (or in (low, high] with ``open_low``).

    Raises:
      TypeError: if it is not a real number, or an array of one.
      ValueError: if it is not finite or outside.
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


def choice(name: str, value: Choice, allowed: Collection[object]) -> Choice:
    """One of the allowed values.

    Raises:
      ValueError: when it is none of them; the message lists them.
    """
    # True is not 1 here.
    if not any(isinstance(value, bool) is isinstance(each, bool) and value == each for each in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def function(name: str, value: object, what: str) -> None:
    """Something that can be called.

    Args:
      name: the argument.
      value: the function.
      what: its signature, for the message.

    Raises:
      TypeError: for anything that cannot be called, and for a class, of which the caller forgot to make an instance.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name}: expected a function {what}, got the class {value.__name__}; make one with {value.__name__}()"
        )
    if not callable(value):
        raise TypeError(f"{name}: expected a function {what}, got {type(value).__name__}")


def accepts(name: str, value: Any, what: str, positional: int, *, model: bool = True) -> None:
    """A function that can be called with this many positional arguments, and with ``key=`` if it is a model.

    A function whose signature Python does not know passes.

    Args:
      name: the argument.
      value: the function.
      what: its signature, for the message.
      positional: the number of positional arguments that it will be called with.
      model: whether it is a Velocity or its like, whose last two positional arguments are x and cond.

    Raises:
      TypeError: for anything that is not a function, and for a function of other arguments.
    """
    function(name, value, what)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [each for each in signature.parameters.values() if each.kind in places and each.name != "key"]
    # If the last argument must be given, is not called cond, and another follows it, it is x: the function takes one time more.
    last = parameters[positional - 1] if len(parameters) > positional else None
    shifted = model and last is not None and last.default is inspect.Parameter.empty and last.name != "cond"
    try:
        signature.bind(*[None] * positional, **({"key": None} if model else {}))
    except TypeError:
        shifted = True
    if shifted:
        raise TypeError(f"{name}: expected a function {what}, got one of {signature}")


def key(name: str, value: Any) -> None:
    """A PRNG key of jax: a typed one (``jax.random.key``), or the raw one of ``jax.random.PRNGKey``.

    Raises:
      TypeError: for anything else.
    """
    dtype = getattr(value, "dtype", None)
    typed = dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == np.uint32 and np.ndim(value) == 1):
        got = type(value).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name}: expected a PRNG key, such as jax.random.key(0), got {got}")


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


def time(name: str, value: Any) -> None:
    """A scalar time in [0, 1], but for rounding; the value of a traced one cannot be looked at and passes.

    Raises:
      ValueError: when it has axes, or is outside.
    """
    scalar(name, value)
    number = concrete(value)
    if number is not None and not -ROUNDING <= float(number) <= 1.0 + ROUNDING:
        raise ValueError(f"{name}: expected a time in [0, 1], got {float(number):.9g}")


def rows(name: str, tree: PyTree) -> int:
    """The length of the leading axis that all leaves of a pytree share: the number of rows of a batch.

    Raises:
      ValueError: when there are no leaves or no rows, or the lengths differ.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        got = sorted(sizes)
        raise ValueError(f"{name}: expected arrays with one common leading axis of rows, got {got}")
    return int(next(iter(sizes))[0])


def floating(name: str, value: PyTree) -> None:
    """A pytree whose leaves are all floating-point arrays.

    Raises:
      TypeError: naming the dtype that came.
    """
    for leaf in jax.tree.leaves(value):
        dtype = jax.dtypes.result_type(leaf)
        if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
            raise TypeError(f"{name}: expected floating-point arrays, got dtype {dtype}")


def same_structure(name: str, value: PyTree, like_name: str, like: PyTree) -> None:
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


def fits(name: str, tree: PyTree) -> None:
    """Host arrays whose values the dtypes that jax gives them on a device can hold.

    Where jax has no 64-bit types (``jax_enable_x64`` is off) int64 becomes int32, uint64 uint32, float64 float32 and
    complex128 complex64. Whole numbers must come out unchanged, and finite ones finite: rounding is allowed, underflow to
    zero included. Values that are NaN or infinite already stay so. Arrays of jax are on a device already, and pass.

    Args:
      name: the argument.
      tree: numpy arrays or their like; read once, in blocks, and only where the dtype changes.

    Raises:
      ValueError: naming the leaf, the first value that does not fit, and both dtypes.
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
    """The array in parts of about ``_BLOCK`` elements, each with at least one axis."""
    array = np.atleast_1d(array)
    rows = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows])


def _lost(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Which values a cast would change: any whole number, and finite numbers that become infinite."""
    # What overflows is what is looked for here.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    return cast != values if values.dtype.kind in "iu" else np.isfinite(values) & ~np.isfinite(cast)


@contextlib.contextmanager
def of_one_sample(x: Any) -> Iterator[None]:
    """Adds to an error raised within what a model was given, for a batch in place of a sample fails deep inside of it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(x))
        note = f"x: jflow calls a model with one sample, here of shape {shapes}; call it under jax.vmap over a batch"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def output(name: str, value: PyTree, x: Tree) -> Tree:
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
    same_structure(name, value, "x", x)

    def cast(leaf: Any, like: Any) -> jax.Array:
        # An eager cast to the same dtype costs as much as a small network.
        dtype = getattr(like, "dtype", None)
        if isinstance(leaf, jax.Array) and leaf.dtype == dtype and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return leaf
        floating("x", like)
        floating(name, leaf)
        return jax.numpy.asarray(leaf).astype(jax.dtypes.result_type(like))

    return jax.tree.map(cast, value, x)
