"""Signatures: strings that say how a network takes (s, t, x, cond). They are used by ``nets.wrappers``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jflow import checks
from jflow.types import Cond, Event, Key, Params, PyTree, Time, Velocity

DEFAULT = "s t x cond"
NAMES = ("s", "t", "x", "cond")
# Common signatures, from which a type checker infers whether the result is a Network or a Velocity. Others work as well.
TwoTimes = Literal[
    "s t x cond",
    "s t x",
    "t s x cond",
    "t s x",
    "x s t cond",
    "x s t",
    "x t s cond",
    "x t s",
    "x s t y=cond",
    "x t s y=cond",
]
OneTime = Literal["t x cond", "t x", "t x y=cond", "x t cond", "x t", "x t y=cond"]


class Network(Protocol):
    """A network of two times, which maps (s, t, x) to an output with the shapes and dtypes of x.

    Whether the output is the mean velocity, the data or the noise depends on the parameterization with which
    ``parameterizations.flow_map`` makes a FlowMap of it.
    """

    def __call__(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        """The output at source time s and target time t."""
        ...


class Call(NamedTuple):
    """A parsed signature: the names passed by position, and those passed by keyword, as keyword -> name."""

    positional: tuple[str, ...]
    keywords: dict[str, str]

    def fill(self, values: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The (args, kwargs) of a call with these values; ``cond=None`` is omitted if it is last or a keyword."""
        positional = self.positional
        if values["cond"] is None and positional[-1:] == ("cond",):
            positional = positional[:-1]
        keywords = {k: name for k, name in self.keywords.items() if not (name == "cond" and values["cond"] is None)}
        return tuple(values[name] for name in positional), {k: values[name] for k, name in keywords.items()}


def read(signature: str) -> Call:
    """Parses a string such as "x t y=cond".

    Raises:
      ValueError: if the string cannot be parsed, or a name is unknown, missing or repeated.
    """
    positional, keywords = [], {}
    for word in signature.split():
        keyword, equals, name = word.rpartition("=")
        if not equals:
            if keywords:
                raise ValueError(f"signature: expected positional names before keywords, got {signature!r}")
            positional.append(name)
        elif not keyword.isidentifier():
            raise ValueError(f"signature: expected words such as 'x' or 'y=cond', got {word!r}")
        else:
            keywords[keyword] = name
    names = [*positional, *keywords.values()]
    if not set(names) <= set(NAMES) or len(set(names)) != len(names) or not {"t", "x"} <= set(names):
        raise ValueError(f"signature: expected each of s, t, x, cond at most once, with t and x, got {signature!r}")
    return Call(tuple(positional), keywords)


def wrap(
    run: Callable[[Params, tuple, dict, Any], PyTree],
    takes: inspect.Signature,
    signature: str,
    batched: bool,
    null: Cond = None,
) -> Network | Velocity:
    """Makes a function of one sample of ``run(params, args, kwargs, key)``, which checks its arguments and its output.

    The function has the attribute ``null``, the null condition of the network, from which ``flow_map`` takes it.

    Returns:
      A ``Network`` of two times for a signature with ``s``, else a ``Velocity``.
    """
    call = read(signature)
    names = (*call.positional, *call.keywords.values())

    def evaluate(params: Params, s: Any, t: Any, x: PyTree, cond: Any, key: Any) -> PyTree:
        checks.floating("x", x)
        if cond is not None and "cond" not in names:
            raise ValueError(f"cond: the network was wrapped with signature {signature!r}, without cond, and got one")
        values = {"s": _time("s", s), "t": _time("t", t), "x": x, "cond": cond}
        if batched:
            values = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], values)
        args, kwargs = call.fill(values)
        kwargs = {**_modes(takes, key), **kwargs}
        try:
            takes.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"signature: the network takes {takes}, not {signature!r}: {error}") from error
        # An objective evaluates a network several times with one key, and so with one dropout mask. That is intended, and
        # jax's key-reuse check must not reject a network that draws from the key itself.
        key = None if key is None else jax.random.clone(key)
        return _shaped_like(run(params, args, kwargs, key), x, batched)

    if "s" not in names:

        def velocity(params: Params, t: Any, x: PyTree, cond: Any = None, *, key: Any = None) -> PyTree:
            return evaluate(params, t, t, x, cond, key)

        velocity.null = null
        return velocity

    def apply(params: Params, s: Any, t: Any, x: PyTree, cond: Any = None, *, key: Any = None) -> PyTree:
        return evaluate(params, s, t, x, cond, key)

    apply.null = null
    return apply


def _modes(takes: inspect.Signature, key: Any) -> dict[str, bool]:
    quiet = {
        "deterministic": True,
        "inference": True,
        "train": False,
        "training": False,
        "is_training": False,
    }
    return {name: value == (key is None) for name, value in quiet.items() if name in takes.parameters}


def _time(name: str, value: Any) -> jax.Array:
    checks.scalar(name, value)
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.result_type(float))
    checks.floating(name, value)
    return value


def _shaped_like(out: PyTree, x: PyTree, batched: bool) -> PyTree:
    """The output without the batch axis, in the dtypes of x; another structure or shape raises ValueError."""
    lead = (1,) if batched else ()
    expected = jax.tree.map(lambda leaf: lead + jnp.shape(leaf), x)
    got = jax.tree.map(jnp.shape, out)
    if jax.tree.structure(out) != jax.tree.structure(x) or got != expected:
        what = f"x with a batch axis, {expected}" if batched else f"x, {expected}"
        raise ValueError(f"net: expected output shaped like {what}, got {got}")
    checks.floating("net: output", out)
    return jax.tree.map(lambda o, leaf: (o[0] if batched else o).astype(jnp.asarray(leaf).dtype), out, x)
