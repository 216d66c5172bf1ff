"""A network of one flat array as a network of pytrees."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.nets import MultiOutput

X = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array(5.0)}


class Reversed(nn.Module):
    """Its flat input in reverse order, plus s, t and cond; the inputs go to ``seen``."""

    seen: tuple = ()

    @nn.compact
    def __call__(self, s, t, x, cond=None):
        self.seen[0](x)
        return x[::-1] + s + 10 * t + (0.0 if cond is None else cond)


def call(x, *rest):
    seen = []
    return MultiOutput(Reversed((seen.append,))).apply({}, *rest[:2], x, *rest[2:]), seen


def test_one_call_gives_an_output_for_each_leaf():
    found, seen = call(X, 0.5, 0.25)
    np.testing.assert_array_equal(seen, [[1.0, 2.0, 3.0, 4.0, 5.0]])
    np.testing.assert_array_equal(found["a"], np.array([[5.0, 4.0], [3.0, 2.0]]) + 3.0)
    assert found["b"] == 4.0
    conditional, _ = call(X, 0.5, 0.25, 100.0)
    np.testing.assert_array_equal(conditional["a"], found["a"] + 100.0)


def test_each_leaf_keeps_its_dtype():
    found, _ = call(
        {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}, jnp.float32(0.0), jnp.float32(0.0)
    )
    assert found["a"].dtype == jnp.bfloat16 and found["b"].dtype == jnp.float32


def test_numbers_that_are_not_floating_point_are_refused():
    with pytest.raises(TypeError, match=r"^x: expected floating"):
        call({"a": jnp.arange(2)}, 0.0, 0.0)
