r"""Converts a pytree to named arrays and back, with a record of each array that detects damage and prevents silent casts.

The record of a leaf is ``{"dtype", "shape", "checksum", "prng", "path"}``. ``prng`` is the implementation of a typed PRNG key
(stored as its key data), or None. ``path`` lists the keys from the root to the leaf if all keys below the first are
dictionary keys; otherwise it is None.

The checksum is computed on the devices that hold the array. Let w_i be the array's words (of at most 32 bits, in C order)
and h a bijective mixer of 32-bit words. The checksum is the pair

.. math::

    \sum_i h(w_i + h(2 i)), \qquad \sum_i h(w_i + h(2 i + 1)) \qquad (\mathrm{mod}\ 2^{32}).

Integer sums are associative, so the checksum does not depend on how the array is spread over devices and processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Host or device arrays by name; PRNG keys are stored as their key data.
Arrays = dict[str, Any]
Records = dict[str, dict[str, Any]]


class DamagedError(Exception):
    """The data read differ from the data written."""


def copies(tree: Any) -> tuple[Arrays, Records]:
    """Copies all leaves, with their shardings, and makes a record of each; both by name ("params/Dense_0/kernel").

    The copies share no memory with the tree, whose buffers the next step may reuse while the copies are being written.

    Raises:
      ValueError: if two leaves have the same name, or, with several processes, if a leaf lies on one process alone.
    """
    arrays: Arrays = {}
    records: Records = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if name in arrays:
            raise ValueError(f"state: two leaves are called {name}; keys must not contain '/'")
        prng = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
        value = jnp.asarray(jax.random.key_data(leaf) if prng else leaf)
        if jax.process_count() > 1 and value.is_fully_addressable:
            raise ValueError(f"state: {name} lies on one process alone; lay the state out with jflow.sharding.place")
        keys = [getattr(entry, "key", None) for entry in path[1:]]
        arrays[name] = jnp.copy(value)
        records[name] = {
            "dtype": value.dtype.name,
            "shape": list(value.shape),
            "prng": prng,
            "path": [_name(path[:1]), *keys] if all(isinstance(key, str) for key in keys) else None,
        }
    for name, checksum in checksums(arrays).items():
        records[name]["checksum"] = checksum
    return arrays, records


def checksums(arrays: Mapping[str, Any]) -> dict[str, list[int]]:
    """The checksum of each array. If arrays are spread over several processes, all of these must call it."""
    # Dispatch all computations before waiting for the first.
    pairs = {
        name: _checksum(_host_words(value) if isinstance(value, np.ndarray) else value)
        for name, value in arrays.items()
    }
    return {name: [int(half) for half in pair] for name, pair in pairs.items()}


def verify(arrays: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks arrays against their records.

    Raises:
      DamagedError: if a leaf is missing or differs from its record; the message names the first such leaf.
    """
    for name, record in records.items():
        if name not in arrays:
            raise DamagedError(f"leaf {name} is missing")
        value = arrays[name]
        if value.dtype.name != record["dtype"] or list(value.shape) != record["shape"]:
            raise DamagedError(
                f"leaf {name} is {value.dtype.name}{list(value.shape)}, was {record['dtype']}{record['shape']}"
            )
    found = checksums({name: arrays[name] for name in records})
    for name, record in records.items():
        if found[name] != record["checksum"]:
            raise DamagedError(f"leaf {name} has another checksum than when it was written")


def match(records: Mapping[str, Mapping[str, Any]], template: Any, depth: int = 0) -> dict[str, Any]:
    """The template's leaves, by the names of the records that they match.

    Args:
      records: the records by name.
      template: a pytree of arrays or ``jax.ShapeDtypeStruct``.
      depth: the number of keys of a record's name that lead to the template's root.

    Raises:
      ValueError: if leaves are missing, left over, or of another dtype, shape or key implementation; the message names them.
    """
    leaves = jax.tree_util.tree_flatten_with_path(template)[0]
    root = next(iter(records), "").split("/")[:depth]
    wanted = {"/".join([*root, *filter(None, [_name(path)])]): leaf for path, leaf in leaves}
    missing, extra = sorted(wanted.keys() - records.keys()), sorted(records.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"the checkpoint has another structure: it lacks {missing} and has beside {extra}")
    wrong = []
    for name, leaf in wanted.items():
        has, expected = _kind_of_record(records[name]), _kind(leaf)
        if has != expected:
            wrong.append(f"{name} is {has}, expected {expected}")
    if wrong:
        raise ValueError("the checkpoint's leaves are of another kind (nothing is cast): " + "; ".join(wrong))
    return wanted


def layout(leaf: Any) -> Any:
    """The sharding with which to read a leaf like this one; None for an array that is not committed to devices."""
    # If read as a committed array, an uncommitted leaf could no longer be combined with a sharded batch.
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def to_tree(arrays: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], template: Any, depth: int = 0) -> Any:
    """The arrays in the template's structure, each with the ``layout`` of the template's leaf; arguments as for ``match``.

    Raises:
      ValueError: as ``match``.
    """
    placed = []
    for name, leaf in match(records, template, depth).items():
        value, prng = _on_device(name, arrays[name]), records[name]["prng"]
        value = value if prng is None else jax.random.wrap_key_data(value, impl=prng)
        sharding = layout(leaf)
        placed.append(value if sharding is None or value.sharding == sharding else jax.device_put(value, sharding))
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def to_dict(arrays: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], depth: int) -> Any:
    """The arrays as nested dictionaries, without a template; the first ``depth`` keys of each path are omitted.

    Raises:
      ValueError: if a leaf lies in something other than dictionaries with string keys, or has a dtype that this session
        cannot hold (float64 without x64).
    """
    result: Any = {}
    for name, record in records.items():
        if record["path"] is None:
            raise ValueError(f"{name} does not lie in dictionaries only; pass template, a pytree of the same structure")
        value = _on_device(name, arrays[name])
        path = record["path"][depth:]
        if not path:
            return value
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return result


def dtype_of(record: Mapping[str, Any]) -> np.dtype:
    """The dtype in which a leaf is stored."""
    # Unlike np.dtype, jnp.dtype knows bfloat16 and similar types by name.
    return jnp.dtype(record["dtype"])


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _host_words(value: np.ndarray) -> np.ndarray:
    """The words of a host array as unsigned integers of at most 32 bits, which jax can hold without x64."""
    width = {1: np.uint8, 2: np.uint16}.get(value.dtype.itemsize, np.uint32)
    return np.ascontiguousarray(value).reshape(-1).view(width)


@jax.jit
def _checksum(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    if value.dtype == jnp.bool_:
        value = value.astype(jnp.uint8)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        value = jnp.stack([value.real, value.imag], axis=-1)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(value.dtype.itemsize, jnp.uint32)
    # An element of eight bytes becomes two words along a new last axis.
    words = jax.lax.bitcast_convert_type(value, width).astype(jnp.uint32)
    # Compute each word's index in C order from its index along each axis; flattening would gather a sharded array.
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]

    def half(which: int) -> jax.Array:
        return jnp.sum(_mix(words + _mix(2 * place + jnp.uint32(which))), dtype=jnp.uint32)

    return half(0), half(1)


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of uint32 that mixes all bits of the word."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def _kind_of_record(record: Mapping[str, Any]) -> str:
    if record["prng"] is None:
        return f"{record['dtype']}{record['shape']}"
    data = jax.ShapeDtypeStruct(tuple(record["shape"]), jnp.uint32)
    return _kind(jax.eval_shape(lambda words: jax.random.wrap_key_data(words, impl=record["prng"]), data))


def _on_device(name: str, value: Any) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"{name}: expected jax_enable_x64 to be set, since the checkpoint holds {value.dtype.name}")
    # Always copy: a buffer that will be donated must not be shared.
    return jnp.array(value, dtype=value.dtype, copy=True)
