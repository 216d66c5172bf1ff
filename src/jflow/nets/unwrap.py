"""The inverse of ``from_nnx`` and ``from_equinox``: makes a module that holds given parameters.

Averages of bfloat16 and float16 parameters are float32 (``training.ema``); they are rounded to the module's dtype.

``params`` may hold numpy arrays or jax arrays, with any sharding. Its leaves are matched by their paths from the root, so
dictionaries in restored parameters match lists in the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow.named import described
from jflow.types import Params

if TYPE_CHECKING:
    from flax import nnx

    NnxModule = TypeVar("NnxModule", bound=nnx.Module)

Module = TypeVar("Module")
Path = tuple[str, ...]


def to_nnx(module: NnxModule, params: Params) -> NnxModule:
    """Makes a flax.nnx module that holds the given parameters: the inverse of ``from_nnx``.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from flax import nnx
        >>> from jflow import nets
        >>> class Net(nnx.Module):
        ...     def __init__(self):
        ...         self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        ...     def __call__(self, s, t, x):
        ...         return self.linear(jnp.concatenate([jnp.stack([s, t]).astype(x.dtype), x]))
        >>> network, params = nets.from_nnx(Net())
        >>> trained = nets.to_nnx(Net(), {"linear": {"kernel": np.ones((4, 2), "float32"), "bias": np.zeros(2, "float32")}})
        >>> trained(0.0, 1.0, jnp.ones(2, "float32")).tolist()
        [3.0, 3.0]

    After training the parameters are ``state.params`` or ``state.averaged()``. They can be restored from a directory with
    ``training.restore_params(directory)``, without a template, which returns them first.

    Args:
      module: a module with the same graph as the one that was wrapped; it is not changed.
      params: the parameters, nested dictionaries as returned by ``from_nnx``.

    Returns:
      A new module of the class of ``module``. Its variables of type ``nnx.Param`` hold ``params``; its other variables, its
      random streams and its mode (``train()`` or ``eval()``) are those of ``module``.

    Raises:
      TypeError: if ``module`` is not an nnx module, or a leaf is not an array or does not have the module's dtype (a
        float32 leaf is rounded for a bfloat16 or float16 parameter).
      ValueError: if ``params`` has missing or additional parameters, or a shape differs from the module's.
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(f"module: expected a flax.nnx module, got {described(module)}")
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    flat = [(path, variable) for path, variable in nnx.to_flat_state(state)]
    places: list[Path] = [tuple(map(str, path)) for path, _ in flat]
    expected = {place: variable.get_raw_value() for place, (_, variable) in zip(places, flat, strict=True)}
    values = _matched(params, expected)
    filled = nnx.from_flat_state(
        [(path, variable.replace(values[place])) for place, (path, variable) in zip(places, flat, strict=True)]
    )
    # Mapping over a state copies its variables, which the new module must not share with the old one.
    return nnx.merge(graph, filled, jax.tree.map(lambda leaf: leaf, rest))


def to_equinox(module: Module, params: Params) -> Module:
    """Makes an equinox module that holds the given parameters: the inverse of ``from_equinox``.

        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> class Net(eqx.Module):
        ...     weight: jax.Array
        ...     def __call__(self, s, t, x):
        ...         return (t - s) * self.weight * x
        >>> network, params = nets.from_equinox(Net(jnp.ones(2)))
        >>> trained = nets.to_equinox(Net(jnp.zeros(2)), params)
        >>> trained(0.0, 1.0, jnp.ones(2)).tolist()
        [1.0, 1.0]

    After training the parameters are ``state.params`` or ``state.averaged()``. They can be restored from a directory with
    ``training.restore_params(directory, template=params)``, which returns them first; ``params`` comes from ``from_equinox``.

    Args:
      module: a module with the same structure as the one that was wrapped.
      params: the parameters, a pytree with the structure that ``from_equinox`` returns.

    Returns:
      A module of the class of ``module``. Its floating-point arrays are ``params``; everything else, such as functions,
      integer arrays and the inference flags of dropout layers, is that of ``module``.

    Raises:
      TypeError: if ``module`` has no floating-point arrays, or a leaf is not an array or does not have the module's dtype (a
        float32 leaf is rounded for a bfloat16 or float16 parameter).
      ValueError: if ``params`` has missing or additional parameters, or a shape differs from the module's.
    """
    import equinox as eqx

    parameters, static = eqx.partition(module, eqx.is_inexact_array)
    leaves, structure = jax.tree_util.tree_flatten_with_path(parameters)
    if not leaves:
        raise TypeError(f"module: expected an equinox module with floating-point arrays, got {described(module)}")
    expected = {_place(path): leaf for path, leaf in leaves}
    values = _matched(params, expected)
    # Match by path, because two modules made by the same code may hold functions that do not compare equal.
    return eqx.combine(jax.tree.unflatten(structure, [values[_place(path)] for path, _ in leaves]), static)


def _place(path: tuple[Any, ...]) -> Path:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _matched(params: Params, expected: dict[Path, Any]) -> dict[Path, jax.Array]:
    """The arrays of ``params`` by path, after a check that their paths, shapes and dtypes are those of the module."""
    given = {_place(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    missing, extra = (
        sorted("/".join(path) for path in paths) for paths in (expected.keys() - given, given.keys() - expected)
    )
    if missing or extra:
        found = [f"none of {', '.join(missing)}"] * bool(missing) + [f"also {', '.join(extra)}"] * bool(extra)
        raise ValueError(f"params: expected the parameters of the module, got {' and '.join(found)}")
    values = {}
    for path, like in expected.items():
        name, value = "/".join(path), given[path]
        if not isinstance(value, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"params: expected an array for {name}, got {described(value)}")
        if value.shape != like.shape:
            raise ValueError(f"params: expected shape {like.shape} for {name}, got {value.shape}")
        if value.dtype == np.float32 and jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize < 4:
            value = value.astype(like.dtype)  # an average of it
        if value.dtype != like.dtype:
            raise TypeError(f"params: expected dtype {like.dtype} for {name}, got {value.dtype}; cast it before")
        values[path] = value if isinstance(value, jax.Array) else jnp.asarray(value)
    return values
