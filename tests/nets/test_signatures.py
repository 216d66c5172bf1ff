"""The signatures that say how a network takes its arguments: names, batches of one, dtypes and structures."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jflow.nets import from_function


def test_signatures():
    got = {}

    def net(params, *args, **kwargs):
        got["args"], got["kwargs"] = args, kwargs
        return args[0]

    x = jnp.ones(2)
    apply = from_function(net, signature="x t s y=cond")
    apply(None, 0.1, 0.2, x, 5)
    assert [np.shape(a) for a in got["args"]] == [(2,), (), ()]
    assert (float(got["args"][1]), float(got["args"][2])) == (0.2, 0.1) and got["kwargs"] == {"y": 5}
    apply(None, 0.1, 0.2, x)
    assert got["kwargs"] == {}
    from_function(lambda p, c, x, t, s: x, signature="cond x t s")(None, 0.1, 0.2, x)
    velocity = from_function(net, signature="x t")
    np.testing.assert_array_equal(velocity(None, 0.3, x), x)
    assert float(got["args"][1]) == 0.3 and len(got["args"]) == 2
    with pytest.raises(TypeError):
        velocity(None, 0.1, 0.3, x, None)
    for bad in ("s x", "s t x z", "t t x", "y=cond x t", "x t 1=s", ""):
        with pytest.raises(ValueError, match="signature"):
            from_function(net, signature=bad)


def test_conditions_of_a_batched_network():
    def net(params, s, t, x, cond):
        assert s.shape == t.shape == (1,) and cond["label"].shape == (1,) and cond["y"].shape == (1, 3)
        return x + cond["y"][:, :2] + cond["label"][:, None].astype(x.dtype)

    out = from_function(net, batched=True)(None, 0.1, 0.2, jnp.zeros(2), {"label": 4, "y": jnp.arange(3.0)})
    np.testing.assert_allclose(out, [4.0, 5.0])


def test_pytree_events_and_dtypes():
    apply = from_function(lambda p, s, t, x: (x[0].astype(jnp.float32), x[1] * t))
    x = (jnp.ones(2, jnp.bfloat16), jnp.float32(2.0))
    out = apply(None, jnp.float32(0), jnp.float32(1), x)
    assert out[0].dtype == jnp.bfloat16 and out[1].dtype == jnp.float32 and out[1] == 2.0
    assert from_function(lambda p, s, t, x: x * t)(None, 0, 1, jnp.ones(2)).dtype == jnp.float64
