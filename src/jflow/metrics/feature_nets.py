"""Feature networks: functions of batches of images with parameters, a name and a hash, whose features the scores compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jflow.types import Array, Params


class Outputs(NamedTuple):
    """What a feature network computes of a batch.

    Attributes:
      features: ``[B, d]``.
      logits: unnormalised log-probabilities of classes, ``[B, K]``; None if the network does not classify.
    """

    features: Array
    logits: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNet:
    """A feature network.

    Attributes:
      name: a name, which every score repeats.
      params: its parameters, a pytree of arrays.
      apply: ``(params, images) -> Outputs`` for a batch ``[B, ...]`` of floating-point images; traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import metrics
      >>> net = metrics.FeatureNet("mean", jnp.float32(2.0), lambda p, x: metrics.Outputs(p * x.mean(axis=(1, 2))))
      >>> net.apply(net.params, jnp.ones((5, 8, 8, 3), jnp.float32)).features.shape
      (5, 3)
    """

    name: str
    params: Params
    apply: Callable[[Params, Array], Outputs]

    @property
    def hash(self) -> str:
        """A hash of the name and the parameters, 64 hexadecimal digits. It does not see the code of ``apply``."""
        return digest({"name": self.name}, named_arrays(self.params))


def named_arrays(tree: Params) -> dict[str, np.ndarray]:
    """The leaves of a pytree as numpy arrays, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(jax.device_get(leaf)) for path, leaf in leaves}


def digest(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of JSON values and of arrays, with their names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        order = array.dtype.newbyteorder("<")
        found.update(json.dumps([name, order.str, list(array.shape)]).encode())
        # Read memory-mapped arrays in parts of about 64 MB.
        rows = max(1, 2**26 // max(1, array[:1].nbytes)) if array.ndim else 1
        for start in range(0, len(array) if array.ndim else 1, rows):
            part = array[start : start + rows] if array.ndim else array
            found.update(np.ascontiguousarray(part, order).tobytes())
    return found.hexdigest()
