r"""From anyone's network to the function of one sample that the library takes.

    apply(params, s, t, x, cond=None, *, key=None) -> shaped like x     a network of two times
    velocity(params, t, x, cond=None, *, key=None) -> shaped like x     a ``jflow.types.Velocity``

Which is made, and how the network is called, is said by ``signature``: its arguments, in its own order.

    "s t x cond"    net(s, t, x, cond)      two times, so ``apply``; the default
    "x t s y=cond"  net(x, t, s, y=cond)    any order, and keywords
    "x t"           net(x, t)               one time, so a velocity

``cond=None`` is not passed on where it comes last or by keyword, so a network without that argument needs no
other signature. Another convention (time reversed, a gap instead of s) is a lambda for ``from_function``. For
MeanFlow's u(z, r, t), whose time 0 is the data:

    from_function(lambda params, s, t, x: -u(params, x, 1 - t, 1 - s))

Networks that take a batch, [B] times and [B, ...] points, are wrapped with ``batched=True``: each sample is a
batch of one, and ``jax.vmap`` of that costs what a batch does. Layers that mix samples (batch normalisation)
are refused.

Dropout: ``key`` is passed at the call, and None means none. An argument ``deterministic``, ``inference``,
``train``, ``training`` or ``is_training`` of the network is set accordingly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import MeanVelocity, Params, PyTree, Velocity

DEFAULT_SIGNATURE = "s t x cond"
NAMES = ("s", "t", "x", "cond")
MIXES = "mixes the samples of a batch, and a function of one sample cannot: use group or layer normalisation"


def from_linen(
    module: nn.Module,
    *,
    signature: str = DEFAULT_SIGNATURE,
    batched: bool = False,
    rngs: Sequence[str] = ("dropout",),
    constants: Mapping[str, PyTree] | None = None,
) -> MeanVelocity | Velocity:
    """A flax.linen module as ``apply`` or ``velocity``; its params are ``module.init(...)['params']``.

    Args:
      module: the module.
      signature: how its ``__call__`` takes (s, t, x, cond); without ``s`` a velocity is made. See the module
        above.
      batched: whether it takes a batch.
      rngs: the random streams that it draws from; ``key`` is split among them.
      constants: its other variable collections, which are not trained.

    Returns:
      ``apply(params, s, t, x, cond=None, *, key=None)``, or ``velocity(params, t, x, cond=None, *,
      key=None)``. They raise TypeError for a layer that mixes samples, or when the module's ``__call__`` does
      not take the signature; ValueError for an output not shaped like x, times with axes, or when random
      numbers are drawn and no key came.

    Raises:
      ValueError: for a signature that cannot be read.
      TypeError: when the constants hold batch statistics.
    """
    constants = dict(constants or {})
    _refuse_statistics("constants", constants)

    def refuse(following: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            raise TypeError(f"net: {'/'.join(context.module.path)} is a BatchNorm, which {MIXES}")
        return following(*args, **kwargs)

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        _refuse_statistics("params", params)
        if isinstance(params, Mapping) and "params" in params:
            raise ValueError("params: expected the collection variables['params'], got all variables")
        keys = None if key is None else dict(zip(rngs, _split(key, len(rngs)), strict=True))
        try:
            with nn.intercept_methods(refuse):
                return module.apply({"params": params, **constants}, *args, rngs=keys, **kwargs)
        except flax.errors.InvalidRngError as error:
            raise ValueError(f"key: the network draws random numbers that no key was given for: {error}") from error

    return _wrap(run, inspect.signature(module.__call__), signature, batched)


def from_nnx(
    module: Any, *, signature: str = DEFAULT_SIGNATURE, batched: bool = False
) -> tuple[MeanVelocity | Velocity, Params]:
    """A flax.nnx module as ``apply`` or ``velocity``, and its parameters as nested dicts with string keys.

    The parameters are the variables of type ``nnx.Param``; all others stay as they are. Without a key the
    module runs as after ``module.eval()``, with one as after ``module.train()`` with its random streams
    reseeded from the key.

    Args:
      module: the module; it is left untouched.
      signature: how its ``__call__`` takes (s, t, x, cond); without ``s`` a velocity is made. See the module
        above.
      batched: whether it takes a batch.

    Returns:
      (apply or velocity, params), as of ``from_linen``.

    Raises:
      ValueError: for a signature that cannot be read.
      TypeError: for a layer that mixes samples.
    """
    from flax import nnx

    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.BatchNorm):
            raise TypeError(f"net: {'/'.join(map(str, path)) or 'the module'} is a BatchNorm, which {MIXES}")
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    tags = sorted({v.tag for v in jax.tree.leaves(rest, is_leaf=_is(nnx.RngKey)) if isinstance(v, nnx.RngKey)})

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        # Mapping the states copies their variables into the present trace, where they may be changed.
        filled = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(filled, params)
        copy = nnx.merge(graph, filled, jax.tree.map(lambda leaf: leaf, rest))
        if key is None:
            copy.eval()
        else:
            copy.train()
            nnx.reseed(copy, **dict(zip(tags, _split(key, len(tags)), strict=True)))
        return copy(*args, **kwargs)

    apply = _wrap(run, inspect.signature(module.__call__), signature, batched)
    return apply, _string_keys(nnx.to_pure_dict(state))


def from_equinox(
    module: Any, *, signature: str = DEFAULT_SIGNATURE, batched: bool = False
) -> tuple[MeanVelocity | Velocity, Params]:
    """An equinox module as ``apply`` or ``velocity``, and its floating-point arrays as the parameters.

    The parameters have the module's own structure (``eqx.partition``). Without a key the module runs in
    inference mode; with one, in training mode, and the key goes to its argument ``key``.

    Args:
      module: the module.
      signature: how its ``__call__`` takes (s, t, x, cond); without ``s`` a velocity is made. See the module
        above.
      batched: whether it takes a batch.

    Returns:
      (apply or velocity, params), as of ``from_linen``.

    Raises:
      ValueError: for a signature that cannot be read.
      TypeError: for a layer that mixes samples, or keeps other state between calls.
    """
    import equinox as eqx

    for node in jax.tree.leaves(module, is_leaf=_is((eqx.nn.BatchNorm, eqx.nn.StateIndex))):
        if isinstance(node, eqx.nn.BatchNorm):
            raise TypeError(f"net: holds an equinox BatchNorm, which {MIXES}")
        if isinstance(node, eqx.nn.StateIndex):
            raise TypeError("net: holds an equinox layer with state, and the library's functions are pure")
    parameters, static = eqx.partition(module, eqx.is_inexact_array)
    takes = inspect.signature(module.__call__)

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        whole = eqx.nn.inference_mode(eqx.combine(params, static), value=key is None)
        return whole(*args, **kwargs, **({"key": key} if "key" in takes.parameters else {}))

    return _wrap(run, takes, signature, batched), parameters


def from_function(
    function: Callable[..., PyTree], *, signature: str = DEFAULT_SIGNATURE, batched: bool = False
) -> MeanVelocity | Velocity:
    """A function (params, then the signature's arguments) as ``apply`` or ``velocity``.

    Args:
      function: ``function(params, s, t, x)`` with the default signature, or with ``cond`` after x. If it has
        an argument ``key``, it gets the key.
      signature: how it takes (s, t, x, cond) after params; without ``s`` a velocity is made. See the module
        above.
      batched: whether it takes a batch.

    Returns:
      ``apply`` or ``velocity``, as of ``from_linen``.

    Raises:
      ValueError: for a signature that cannot be read.
    """
    takes = inspect.signature(function)
    names = list(takes.parameters.values())
    if names and names[0].kind in (names[0].POSITIONAL_ONLY, names[0].POSITIONAL_OR_KEYWORD):
        takes = takes.replace(parameters=names[1:])

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        return function(params, *args, **kwargs, **({"key": key} if "key" in takes.parameters else {}))

    return _wrap(run, takes, signature, batched)


def check_independent(function: Callable[..., PyTree], *batch: PyTree, rtol: float = 1e-5) -> None:
    """Refuses a function of a batch that mixes samples: changes all rows but the first and looks at that.

    Args:
      function: takes ``*batch`` and returns arrays with the same leading axis. Close over the parameters;
        they must not be those of a zero-initialised output layer.
      *batch: concrete pytrees of arrays ``[B, ...]``, B of 2 at least; integer leaves are left as they are.
      rtol: how far the first row may move, relative to the largest output.

    Raises:
      ValueError: when the first row moves, when the others do not (then nothing was tried), or for fewer than
        two rows.
    """
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] < 2:
            raise ValueError(f"batch: expected arrays [B, ...] with B of 2 or more, got shape {np.shape(leaf)}")

    def change(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        # 1 - a keeps times within [0, 1].
        return leaf.at[1:].set(1 - leaf[1:]) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def rows(out: PyTree) -> np.ndarray:
        leaves = jax.tree.leaves(out)
        return np.concatenate([np.asarray(a, np.float64).reshape(len(a), -1) for a in leaves], axis=1)

    before, after = rows(function(*batch)), rows(function(*jax.tree.map(change, batch)))
    size, moved = np.abs(before).max(), np.abs(after - before)
    first, others = moved[0].max(), moved[1:].max()
    if not others > rtol * size:
        raise ValueError("function: its output does not depend on its input: is its output layer still zero?")
    if not first <= rtol * size:
        raise ValueError(f"function: {MIXES}; other rows changed, and the first row's output by {first:.2g}")


class _Call(NamedTuple):
    """A signature, read: names passed by position, and keyword -> name."""

    positional: tuple[str, ...]
    keywords: dict[str, str]

    def fill(self, values: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        positional = self.positional
        if values["cond"] is None and positional[-1:] == ("cond",):
            positional = positional[:-1]
        keywords = {k: name for k, name in self.keywords.items() if not (name == "cond" and values["cond"] is None)}
        return tuple(values[name] for name in positional), {k: values[name] for k, name in keywords.items()}


def _read(signature: str) -> _Call:
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
    return _Call(tuple(positional), keywords)


def _wrap(
    run: Callable[[Params, tuple, dict, Any], PyTree], takes: inspect.Signature, signature: str, batched: bool
) -> MeanVelocity | Velocity:
    """The function of one sample around ``run(params, args, kwargs, key)``, with its checks."""
    call = _read(signature)
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
        return _shaped_like(run(params, args, kwargs, key), x, batched)

    if "s" not in names:

        def velocity(params: Params, t: Any, x: PyTree, cond: Any = None, *, key: Any = None) -> PyTree:
            return evaluate(params, t, t, x, cond, key)

        return velocity

    def apply(params: Params, s: Any, t: Any, x: PyTree, cond: Any = None, *, key: Any = None) -> PyTree:
        return evaluate(params, s, t, x, cond, key)

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
    """The output without the batch axis, in the dtypes of x; refuses another structure or shape."""
    lead = (1,) if batched else ()
    expected = jax.tree.map(lambda leaf: lead + jnp.shape(leaf), x)
    got = jax.tree.map(jnp.shape, out)
    if jax.tree.structure(out) != jax.tree.structure(x) or got != expected:
        what = f"x with a batch axis, {expected}" if batched else f"x, {expected}"
        raise ValueError(f"net: expected output shaped like {what}, got {got}")
    checks.floating("net: output", out)
    return jax.tree.map(lambda o, leaf: (o[0] if batched else o).astype(jnp.asarray(leaf).dtype), out, x)


def _refuse_statistics(name: str, collections: Any) -> None:
    if isinstance(collections, Mapping) and "batch_stats" in collections:
        raise TypeError(f"{name}: holds 'batch_stats', so the network {MIXES}")


def _split(key: Any, number: int) -> Sequence[Any]:
    return (key,) if number == 1 else jax.random.split(key, number)


def _is(kinds: Any) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, kinds)


def _string_keys(tree: Any) -> Any:
    """Checkpoints keep dicts with string keys only; nnx gives lists whole numbers."""
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
