r"""Wrappers that turn networks of other libraries into the functions of one sample that jflow takes.

They make functions of two kinds::

    apply(params, s, t, x, cond=None, *, key=None) -> shaped like x     a ``Network`` of two times
    velocity(params, t, x, cond=None, *, key=None) -> shaped like x     a ``jflow.types.Velocity``

``parameterizations.flow_map`` makes a FlowMap of a ``Network``, and ``solvers.solve`` makes one of a ``Velocity``.

``signature`` lists the network's arguments in their order. It determines the kind of the result and how the network is
called::

    "s t x cond"    net(s, t, x, cond)      two times, so ``apply``; the default
    "x t s y=cond"  net(x, t, s, y=cond)    any order, and keywords
    "x t"           net(x, t)               one time, so a velocity

``cond=None`` is not passed on if it is last or passed by keyword, so the default signature also fits a network without that
argument. For another convention (reversed time, a gap instead of s) pass a lambda to ``from_function``. For MeanFlow's
u(z, r, t), whose time 0 is the data::

    from_function(lambda params, s, t, x: -u(params, x, 1 - t, 1 - s))

``to_nnx`` and ``to_equinox`` make a module that holds trained parameters.

Networks that take a batch ([B] times and [B, ...] points) are wrapped with ``batched=True``. Each sample is then passed as a
batch of one, which ``jax.vmap`` turns into one batch. Layers that mix samples (batch normalisation with the statistics of the
batch) raise a TypeError; layers that use fixed running averages are accepted.

The functions are pure, so a layer cannot keep a value from one call to the next. Variables that a call changes (running
averages, the vectors of spectral normalisation, caches) raise a TypeError that names them. The counters of random streams
may change. Freeze such layers, or keep the changing values in the state of an objective.

For dropout, pass ``key`` at the call; without a key there is no dropout. If the network has an argument ``deterministic``,
``inference``, ``train``, ``training`` or ``is_training``, it is set accordingly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.nets import signatures
from jflow.nets.signatures import Network, OneTime, TwoTimes
from jflow.types import Key, Params, PyTree, Velocity

if TYPE_CHECKING:
    from flax import nnx

MIXES = (
    "mixes the samples of a batch, and a function of one sample cannot: use group or layer normalisation, or freeze its "
    "statistics (use_running_average=True)"
)
STATE = (
    "in a call, and the library's functions are pure, so the change would be lost: freeze the layer "
    "(use_running_average=True, update_stats=False; nnx: module.eval() before it is wrapped), or keep the variable in the "
    "state of an objective"
)
FROZEN_EQUINOX = (
    "a frozen equinox module goes through from_function, as "
    "lambda params, s, t, x: eqx.nn.inference_mode(eqx.combine(params, static))(s, t, x, state)[0]"
)


@overload
def from_linen(
    module: nn.Module,
    *,
    signature: TwoTimes = ...,
    batched: bool = ...,
    rngs: Sequence[str] = ...,
    constants: Mapping[str, PyTree] | None = ...,
) -> Network: ...
@overload
def from_linen(
    module: nn.Module,
    *,
    signature: OneTime,
    batched: bool = ...,
    rngs: Sequence[str] = ...,
    constants: Mapping[str, PyTree] | None = ...,
) -> Velocity: ...
@overload
def from_linen(
    module: nn.Module,
    *,
    signature: str,
    batched: bool = ...,
    rngs: Sequence[str] = ...,
    constants: Mapping[str, PyTree] | None = ...,
) -> Network | Velocity: ...
def from_linen(
    module: nn.Module,
    *,
    signature: str = signatures.DEFAULT,
    batched: bool = False,
    rngs: Sequence[str] = ("dropout",),
    constants: Mapping[str, PyTree] | None = None,
) -> Network | Velocity:
    """Wraps a flax.linen module as a network of two times, or as a Velocity. Its params are ``module.init(...)['params']``.

    Args:
      module: the module.
      signature: how its ``__call__`` takes (s, t, x, cond); a signature with ``s`` gives a ``Network``,
        one without ``s`` a ``Velocity``. See the module docstring.
      batched: whether it takes a batch.
      rngs: the random streams that it draws from; ``key`` is split among them.
      constants: its other variable collections, which are neither trained nor changed, such as ``{"batch_stats": ...}`` for
        a frozen layer.

    Returns:
      ``apply(params, s, t, x, cond=None, *, key=None)``, a ``Network``, for a signature with ``s`` (the default); else
      ``velocity(params, t, x, cond=None, *, key=None)``, a ``Velocity``. It raises TypeError if a layer mixes samples or
      changes a variable, or if the module's ``__call__`` does not take the signature. It raises ValueError if the output is
      not shaped like x, a time has axes, a collection is missing, or random numbers are drawn without a key.

    Raises:
      ValueError: if the signature cannot be parsed.
      TypeError: if a collection of constants has no variables.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> net, x = nets.MLP(features=8, depth=1), jnp.zeros(2, jnp.float32)
      >>> apply = nets.from_linen(net)
      >>> params = net.init(jax.random.key(0), 0.0, 1.0, x)["params"]
      >>> apply(params, 0.0, 1.0, x).shape
      (2,)
    """
    constants = dict(constants or {})
    for name, collection in constants.items():
        if not jax.tree.leaves(collection):
            raise TypeError(f"constants: holds {name!r} without variables, expected those of the trained network")

    def refuse(following: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            frozen = context.module.use_running_average
            if frozen is None:
                frozen = kwargs.get("use_running_average", args[1] if len(args) > 1 else False)
            if not frozen:
                raise TypeError(f"net: {'/'.join(context.module.path)} is a BatchNorm, which {MIXES}")
        return following(*args, **kwargs)

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        _refuse_all_variables(params)
        keys = None if key is None else dict(zip(rngs, _split(key, len(rngs)), strict=True))
        try:
            with nn.intercept_methods(refuse):
                return module.apply({"params": params, **constants}, *args, rngs=keys, **kwargs)
        except flax.errors.InvalidRngError as error:
            raise ValueError(f"key: the network draws random numbers that no key was given for: {error}") from error
        except flax.errors.ModifyScopeVariableError as error:
            raise TypeError(f"net: a variable changes {STATE}: {error}") from error
        except flax.errors.ScopeCollectionNotFound as error:
            raise ValueError(
                f"constants: expected every collection but 'params' that the network reads: {error}"
            ) from error

    return signatures.wrap(run, inspect.signature(module.__call__), signature, batched, _null(module))


def _null(module: Any) -> int | None:
    """The null label of a module that has the attribute ``null_label``, as the networks of ``jflow.nets``."""
    return getattr(module, "null_label", None)


@overload
def from_nnx(module: nnx.Module, *, signature: TwoTimes = ..., batched: bool = ...) -> tuple[Network, Params]: ...
@overload
def from_nnx(module: nnx.Module, *, signature: OneTime, batched: bool = ...) -> tuple[Velocity, Params]: ...
@overload
def from_nnx(module: nnx.Module, *, signature: str, batched: bool = ...) -> tuple[Network | Velocity, Params]: ...
def from_nnx(
    module: nnx.Module, *, signature: str = signatures.DEFAULT, batched: bool = False
) -> tuple[Network | Velocity, Params]:
    """Wraps a flax.nnx module as a network of two times, or as a Velocity. Its params are nested dicts with string keys.

    The parameters are the variables of type ``nnx.Param``; all other variables are constant. Without a key the module runs
    with ``deterministic=True``. With a key it runs with ``deterministic=False``, and its random streams are reseeded from the
    key. ``use_running_average`` is not changed; call ``module.eval()`` before wrapping to freeze layers with state.

    If a call writes to parameters, as weight normalisation does, the change lasts for that call only.

    Args:
      module: the module; it is not changed.
      signature: how its ``__call__`` takes (s, t, x, cond); a signature with ``s`` gives a ``Network``,
        one without ``s`` a ``Velocity``. See the module docstring.
      batched: whether it takes a batch.

    Returns:
      (network or velocity, params), as of ``from_linen``. At a call it raises TypeError if the call changes or creates a
      variable other than parameters, random streams and intermediates.

    Raises:
      ValueError: if the signature cannot be parsed.
      TypeError: if the module has a BatchNorm that uses the statistics of the batch.
    """
    from flax import nnx

    frozen = {}
    for path, layer in nnx.iter_modules(module):
        frozen[path] = getattr(layer, "use_running_average", None)
        if isinstance(layer, nnx.BatchNorm) and not frozen[path]:
            raise TypeError(f"net: {'/'.join(map(str, path)) or 'the module'} is a BatchNorm, which {MIXES}")
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    tags = sorted({v.tag for v in jax.tree.leaves(rest, is_leaf=_is(nnx.RngKey)) if isinstance(v, nnx.RngKey)})

    def call(params: Any, args: tuple, kwargs: dict, key: Any) -> tuple[PyTree, dict[str, jax.Array]]:
        """The output, and the variables other than parameters that hold new arrays after the call."""
        # Mapping over the states copies their variables into the current trace, where they may be changed.
        copy = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, params), jax.tree.map(lambda leaf: leaf, rest))
        copy.eval() if key is None else copy.train()
        for path, layer in nnx.iter_modules(copy):
            if frozen.get(path) is not None:
                setattr(layer, "use_running_average", frozen[path])  # noqa: B010, it is not a field of every module
        if key is not None:
            streams: dict[str, Any] = dict(zip(tags, _split(key, len(tags)), strict=True))
            nnx.reseed(copy, **streams)
        before = _variables(copy)
        out = copy(*args, **kwargs)
        after = _variables(copy)
        return out, {name: leaf for name, leaf in after.items() if leaf is not before.get(name)}

    stored = _variables(module)

    def unchanged(names: frozenset[str], args: tuple, kwargs: dict, key: Any) -> bool:
        """Whether these variables have the same values after a call; scans and remat return equal values in new arrays."""
        if not names <= stored.keys():
            return False
        with jax.ensure_compile_time_eval():
            args, kwargs = jax.tree.map(_example, (args, kwargs))
            seed = None if key is None else jax.random.key(0)
            after = jax.jit(lambda: call(state, args, kwargs, seed)[1])()
            return all(_equal(after.get(name, stored[name]), stored[name]) for name in names)

    harmless: set[frozenset[str]] = {frozenset()}

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        filled = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(filled, params)
        out, written = call(filled, args, kwargs, key)
        names = frozenset(written)
        if names not in harmless:
            if not unchanged(names, args, kwargs, key):
                raise TypeError(f"net: {', '.join(sorted(names))} changes {STATE}")
            harmless.add(names)
        return out

    apply = signatures.wrap(run, inspect.signature(module.__call__), signature, batched, _null(module))
    return apply, _string_keys(nnx.to_pure_dict(state))


@overload
def from_equinox(
    module: Callable[..., PyTree], *, signature: TwoTimes = ..., batched: bool = ...
) -> tuple[Network, Params]: ...
@overload
def from_equinox(
    module: Callable[..., PyTree], *, signature: OneTime, batched: bool = ...
) -> tuple[Velocity, Params]: ...
@overload
def from_equinox(
    module: Callable[..., PyTree], *, signature: str, batched: bool = ...
) -> tuple[Network | Velocity, Params]: ...
def from_equinox(
    module: Callable[..., PyTree], *, signature: str = signatures.DEFAULT, batched: bool = False
) -> tuple[Network | Velocity, Params]:
    """Wraps an equinox module as a network of two times, or as a Velocity. Its params are its floating-point arrays.

    The parameters have the structure of the module (``eqx.partition``). Without a key the module runs in inference mode. With
    a key it runs in training mode, and the key is passed to its argument ``key``.

    Args:
      module: the module.
      signature: how its ``__call__`` takes (s, t, x, cond); a signature with ``s`` gives a ``Network``,
        one without ``s`` a ``Velocity``. See the module docstring.
      batched: whether it takes a batch.

    Returns:
      (network or velocity, params), as of ``from_linen``.

    Raises:
      ValueError: if the signature cannot be parsed.
      TypeError: if a layer mixes samples or keeps state between calls (``eqx.nn.SpectralNorm``, or any layer with an
        ``eqx.nn.StateIndex`` or an ``eqx.nn.State``).
        Freeze such a module and pass it to ``from_function`` as
        ``lambda params, s, t, x: eqx.nn.inference_mode(eqx.combine(params, static))(s, t, x, state)[0]``.
    """
    import equinox as eqx

    kinds = (eqx.nn.BatchNorm, eqx.nn.SpectralNorm, eqx.nn.StateIndex, eqx.nn.State)
    for node in jax.tree.leaves(module, is_leaf=_is(kinds)):
        if isinstance(node, eqx.nn.BatchNorm):
            raise TypeError(f"net: holds an equinox BatchNorm, which {MIXES}; {FROZEN_EQUINOX}")
        if isinstance(node, kinds):
            raise TypeError(
                f"net: holds an equinox {type(node).__name__}, whose state changes {STATE}; {FROZEN_EQUINOX}"
            )
    parameters, static = eqx.partition(module, eqx.is_inexact_array)
    takes = inspect.signature(module.__call__)

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        whole = eqx.nn.inference_mode(eqx.combine(params, static), value=key is None)
        return whole(*args, **kwargs, **({"key": key} if "key" in takes.parameters else {}))

    return signatures.wrap(run, takes, signature, batched, _null(module)), parameters


@overload
def from_function(function: Callable[..., PyTree], *, signature: TwoTimes = ..., batched: bool = ...) -> Network: ...
@overload
def from_function(function: Callable[..., PyTree], *, signature: OneTime, batched: bool = ...) -> Velocity: ...
@overload
def from_function(function: Callable[..., PyTree], *, signature: str, batched: bool = ...) -> Network | Velocity: ...
def from_function(
    function: Callable[..., PyTree], *, signature: str = signatures.DEFAULT, batched: bool = False
) -> Network | Velocity:
    """Wraps a function of params and the signature's arguments as a network of two times, or as a Velocity.

    Args:
      function: for the default signature, ``function(params, s, t, x)`` or ``function(params, s, t, x, cond)``. If it has
        an argument ``key``, the key is passed to it.
      signature: how it takes (s, t, x, cond) after params; a signature with ``s`` gives a ``Network``,
        one without ``s`` a ``Velocity``. See the module docstring.
      batched: whether it takes a batch.

    Returns:
      A ``Network`` or a ``Velocity``, as of ``from_linen``.

    Raises:
      ValueError: if the signature cannot be parsed.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> apply = nets.from_function(lambda params, x, s, t: params * x, signature="x s t")
      >>> print(apply(jnp.float32(2.0), 0.0, 1.0, jnp.ones(2, jnp.float32)))
      [2. 2.]
    """
    takes = inspect.signature(function)
    names = list(takes.parameters.values())
    if names and names[0].kind in (names[0].POSITIONAL_ONLY, names[0].POSITIONAL_OR_KEYWORD):
        takes = takes.replace(parameters=names[1:])

    def run(params: Params, args: tuple, kwargs: dict, key: Any) -> PyTree:
        return function(params, *args, **kwargs, **({"key": key} if "key" in takes.parameters else {}))

    return signatures.wrap(run, takes, signature, batched, getattr(function, "null", None))


def check_independent(function: Callable[..., PyTree], *batch: PyTree, rtol: float = 1e-5) -> None:
    """Checks that a function of a batch does not mix samples.

    It changes all rows of the batch except the first, and checks that the first output stays the same.

    Args:
      function: takes ``*batch`` and returns arrays with the same leading axis. It closes over the parameters, which must not
        be those of a zero-initialised output layer.
      *batch: concrete pytrees of arrays ``[B, ...]`` with B at least 2. Integer leaves are not changed.
      rtol: the tolerance for the first output, relative to the largest output.

    Raises:
      ValueError: if the first output changes, the other outputs do not change (the check is then inconclusive), or there are
        fewer than two rows.
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


def _refuse_all_variables(params: Any) -> None:
    if not isinstance(params, Mapping):
        return
    if "batch_stats" in params:
        raise TypeError("params: holds 'batch_stats': expected variables['params'] alone, the others go to constants")
    if "params" in params:
        raise ValueError("params: expected the collection variables['params'], got all variables")


def _split(key: Key, number: int) -> list[Key]:
    return [key] if number == 1 else list(jax.random.split(key, number))


def _is(kinds: Any) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, kinds)


def _variables(module: Any) -> dict[str, jax.Array]:
    """The arrays of an nnx module's state by path and type, except parameters, random streams and intermediates."""
    from flax import nnx

    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        name = "/".join(map(str, path))
        if not isinstance(leaf, nnx.Variable):
            found[name] = leaf
        elif not isinstance(leaf, (nnx.Param, nnx.RngState, nnx.Intermediate)):
            found[f"{name} ({type(leaf).__name__})"] = leaf.get_raw_value()
    return found


def _equal(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same values, or two PRNG keys the same data."""
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(a, b, equal_nan=True)


def _example(leaf: Any) -> Any:
    """Concrete values for an array that may be traced: numbers in (0, 1) if it is floating-point, else zeros."""
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, leaf.shape), leaf.dtype)


def _string_keys(tree: Any) -> Any:
    """Replaces integer keys, which nnx uses for lists, by strings, because checkpoints allow only string keys."""
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
