"""Hashes of networks and of arrays."""

import jax.numpy as jnp
import numpy as np

from jflow import metrics
from jflow.metrics import feature_nets


def net(params, name="net"):
    return metrics.FeatureNet(name, params, lambda params, x: metrics.Outputs(x))


def test_a_hash_sees_names_values_shapes_and_dtypes():
    params = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1.0)}
    same = {"b": jnp.float32(1.0), "a": jnp.arange(6.0).reshape(2, 3)}
    assert net(params).hash == net(same).hash and len(net(params).hash) == 64
    others = [
        net(params, "other"),
        net(params | {"a": np.arange(6.0).reshape(3, 2)}),
        net(params | {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3)}),
        net(params | {"b": np.float32(1.0000001)}),
        net({"a": params["a"], "c": params["b"]}),
        net({}),
    ]
    assert len({each.hash for each in [net(params), *others]}) == 7


def test_a_digest_does_not_depend_on_byte_order_or_strides_or_blocks(monkeypatch):
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    found = feature_nets.digest({"k": 1}, {"a": array})
    assert found == feature_nets.digest({"k": 1}, {"a": np.asfortranarray(array)})
    assert found == feature_nets.digest({"k": 1}, {"a": array.astype(">i4")})
    assert found != feature_nets.digest({"k": 2}, {"a": array})
    assert feature_nets.digest({}, {"a": np.zeros((0, 3))}) != feature_nets.digest({}, {"a": np.zeros((0, 2))})
