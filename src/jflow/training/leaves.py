"""A pytree as named arrays on the host and back, with a record of each that shows damage and refuses silent casts.

The record of a leaf is ``{"dtype", "shape", "crc32", "prng", "path"}``: the checksum is over its bytes in C order,
``prng`` the implementation of a typed PRNG key (stored as its key data) or None, ``path`` its keys from the root down
where all of them below the first are those of dictionaries, or None.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
Records = dict[str, dict[str, Any]]


class DamagedError(Exception):
    """What was read is not what was written."""


def to_host(tree: Any) -> tuple[Arrays, Records]:
    """Copies of all leaves by name ("params/Dense_0/kernel") and the record of each.

    The copies share no memory with the devices' buffers, which the next step may reuse while they are being written.

    Raises:
      ValueError: when two leaves have the same name.
    """
    # A state sharded over several processes will need its own shards copied here instead.
    arrays: Arrays = {}
    records: Records = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if name in arrays:
            raise ValueError(f"state: two leaves are called {name}; keys must not contain '/'")
        prng = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
        # np.asarray of a CPU array is a view of its buffer.
        value = np.array(jax.random.key_data(leaf) if prng else leaf, order="C", copy=True)
        keys = [getattr(entry, "key", None) for entry in path[1:]]
        arrays[name] = value
        records[name] = {
            "dtype": value.dtype.name,
            "shape": list(value.shape),
            "crc32": _checksum(value),
            "prng": prng,
            "path": [_name(path[:1]), *keys] if all(isinstance(key, str) for key in keys) else None,
        }
    return arrays, records


def verify(arrays: Mapping[str, np.ndarray], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Holds arrays to their records.

    Raises:
      DamagedError: naming the first leaf that is missing or differs.
    """
    for name, record in records.items():
        if name not in arrays:
            raise DamagedError(f"leaf {name} is missing")
        value = arrays[name]
        if value.dtype.name != record["dtype"] or list(value.shape) != record["shape"]:
            raise DamagedError(
                f"leaf {name} is {value.dtype.name}{list(value.shape)}, was {record['dtype']}{record['shape']}"
            )
        if _checksum(value) != record["crc32"]:
            raise DamagedError(f"leaf {name} has another checksum than when it was written")


def to_tree(
    arrays: Mapping[str, np.ndarray], records: Mapping[str, Mapping[str, Any]], template: Any, depth: int = 0
) -> Any:
    """The arrays in the template's structure, on its devices.

    Args:
      arrays: by name.
      records: by name.
      template: a pytree of arrays or ``jax.ShapeDtypeStruct``; those with a sharding determine where values go.
      depth: how many keys lead to the template's root.

    Raises:
      ValueError: naming the leaves that are missing, left over, or of another dtype, shape or key implementation.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
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
    return jax.tree.unflatten(
        structure, [_place(name, arrays[name], records[name], leaf) for name, leaf in wanted.items()]
    )


def to_dict(arrays: Mapping[str, np.ndarray], records: Mapping[str, Mapping[str, Any]], depth: int) -> Any:
    """The arrays as nested dictionaries, without a template; the first ``depth`` keys of each path are left out.

    Raises:
      ValueError: when a leaf lies in something other than dictionaries with string keys, or has a dtype that this
        session cannot hold (float64 without x64).
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
    # jnp.dtype knows bfloat16 and its like by name.
    return jnp.dtype(record["dtype"])


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _checksum(value: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def _kind_of_record(record: Mapping[str, Any]) -> str:
    if record["prng"] is None:
        return f"{record['dtype']}{record['shape']}"
    return _kind(jax.eval_shape(lambda: _wrap(np.zeros(record["shape"], np.uint32), record)))


def _wrap(value: np.ndarray, record: Mapping[str, Any]) -> jax.Array:
    return jax.random.wrap_key_data(jnp.array(value, copy=True), impl=record["prng"])


def _place(name: str, value: np.ndarray, record: Mapping[str, Any], leaf: Any) -> jax.Array:
    placed = _on_device(name, value) if record["prng"] is None else _wrap(value, record)
    sharding = getattr(leaf, "sharding", None)
    # An array that was free to follow others stays so: a committed one would not mix with a sharded batch.
    if sharding is None or not getattr(leaf, "committed", True):
        return placed
    return jax.device_put(placed, sharding)


def _on_device(name: str, value: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"{name}: expected jax_enable_x64 to be set, since the checkpoint holds {value.dtype.name}")
    # A copy, never an alias of numpy's memory: a donated buffer must be the array's own.
    return jnp.array(value, dtype=value.dtype, copy=True)
