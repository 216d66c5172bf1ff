"""The check of a network: it passes for a right one, and fails for planted faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import testing

PARAMS, X = {"a": np.float32(0.7)}, np.array([0.3, -1.2], np.float32)


def smooth(params, s, t, x, cond=None, *, key=None):
    return jnp.sin(params["a"].astype(x.dtype) * x + (s * t + t).astype(x.dtype))


def one_time(params, s, t, x, cond=None, *, key=None):
    """Ignores the source time, which a network may."""
    return smooth(params, 0.0 * t, t, x)


@jax.custom_jvp
def wave(t):
    return jnp.cos(t)


# The sign of the derivative is wrong.
wave.defjvp(lambda primals, tangents: (wave(*primals), jnp.sin(primals[0]) * tangents[0]))


def wrong_sign(params, s, t, x, cond=None, *, key=None):
    return smooth(params, s, t, x) * wave(t).astype(x.dtype)


def nan_on_the_diagonal(params, s, t, x, cond=None, *, key=None):
    return smooth(params, s, t, x) * (jnp.sin(t - s) / (t - s)).astype(x.dtype)


def infinite_slope_at_zero(params, s, t, x, cond=None, *, key=None):
    return smooth(params, s, t, x) * jnp.sqrt(jnp.abs(s)).astype(x.dtype)


def widened(params, s, t, x, cond=None, *, key=None):
    return smooth(params, s, t, x).astype(jnp.float32)


@jax.custom_batching.custom_vmap
def batched(t):
    return t


batched.def_vmap(lambda size, mapped, t: (jnp.broadcast_to(jnp.mean(t), (size,)), True))


@jax.custom_jvp
def over_the_batch(t):
    return batched(t)


over_the_batch.defjvp(lambda primals, tangents: (over_the_batch(*primals), tangents[0]))


def mean_over_the_batch(params, s, t, x, cond=None, *, key=None):
    return smooth(params, s, over_the_batch(t), x)


@pytest.mark.parametrize("network", [smooth, one_time])
def test_a_right_network_passes(network):
    testing.check_network(network, PARAMS, X)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (wrong_sign, "the forward-mode derivative is wrong"),
        (nan_on_the_diagonal, "are not finite, .* the network fails at these times"),
        (infinite_slope_at_zero, "are not finite"),
        (widened, "network: expected the shapes and dtypes of x, .*float16"),
        (mean_over_the_batch, "jax.vmap does not give what single samples give"),
    ],
)
def test_a_wrong_network_fails(network, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_network(network, PARAMS, X)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="network: expected a function"):
        testing.check_network(lambda params, t, x: x, PARAMS, X)
    with pytest.raises(ValueError, match="params: expected finite parameters"):
        testing.check_network(smooth, {"a": np.float32(np.nan)}, X)
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="jax_enable_x64"):
        testing.check_network(smooth, PARAMS, X)
