"""FlowMap, its derived jump and velocity, and binding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import types


def mean_velocity(params, s, t, x, cond=None, *, key=None):
    shift = 0.0 if cond is None else cond
    return jax.tree.map(lambda leaf: params * leaf + (s + 2.0 * t + shift), x)


def test_jump_and_velocity_are_derived():
    flow_map = types.FlowMap(mean_velocity)
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    jump = flow_map.jump(0.5, 0.25, 0.75, x)
    v = mean_velocity(0.5, 0.25, 0.75, x)
    np.testing.assert_allclose(jump["a"], x["a"] + 0.5 * v["a"])
    np.testing.assert_allclose(jump["b"], x["b"] + 0.5 * v["b"])
    np.testing.assert_allclose(flow_map.velocity(0.5, 0.25, x)["a"], mean_velocity(0.5, 0.25, 0.25, x)["a"])


def test_overrides_are_used():
    flow_map = types.FlowMap(
        mean_velocity,
        jump_override=lambda p, s, t, x, c=None, *, key=None: x + 7.0,
        velocity_override=lambda p, t, x, c=None, *, key=None: x - 7.0,
    )
    assert flow_map.jump(0.5, 0.0, 1.0, jnp.float64(1.0)) == 8.0
    assert flow_map.velocity(0.5, 0.0, jnp.float64(1.0)) == -6.0


def test_bound_map_is_a_pytree_that_goes_through_jit():
    bound = types.FlowMap(mean_velocity).bind(jnp.float64(0.5))
    jumped = jax.jit(lambda m, x: m.jump(0.0, 1.0, x, 1.0))(bound, jnp.float64(2.0))
    assert jumped == bound.jump(0.0, 1.0, jnp.float64(2.0), 1.0)
    assert jax.tree.leaves(bound) == [0.5]
    assert bound.velocity(0.5, jnp.float64(1.0)) == 2.0


def test_moving_keeps_the_dtype_of_the_state():
    moved = types.move(jnp.ones(2, jnp.bfloat16), jnp.float32(0.0), jnp.float32(0.5), jnp.ones(2, jnp.bfloat16))
    assert moved.dtype == jnp.bfloat16


def test_times_that_differ_by_rounding_are_a_jump_of_no_length():
    flow_map = types.FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * x)
    x = jnp.ones(2)
    for s in (0.1 + 0.2, np.float32(0.3), jnp.float32(0.3)):
        np.testing.assert_allclose(flow_map.jump(0.5, s, 0.3, x), x, atol=1e-6)
    flow_map.jump(0.5, 0.0, 1.0000001, x)
    types.FORWARD.check_grid([0.0, 1.0000001])
    with pytest.raises(ValueError, match=r"the jump from 0\.3000123 to 0\.3 is outside"):
        flow_map.jump(0.5, 0.3000123, 0.3, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: types.FlowMap("a"), "^mean_velocity: expected a function"),
        (lambda: types.FlowMap(types.FORWARD, mean_velocity), "^(mean_velocity|domain): expected"),
        (lambda: types.FlowMap(mean_velocity, mean_velocity), "^domain: expected a Domain"),
        (lambda: types.FlowMap(lambda params, t, x: x), "^mean_velocity: expected a function .* got one of"),
    ],
)
def test_what_a_map_is_made_of_is_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("t", [5.0, -0.1, float("nan"), jnp.float32(2.0), jnp.ones(2) / 2])
def test_the_time_of_a_velocity_of_its_own_is_checked_too(t):
    flow_map = types.FlowMap(mean_velocity, velocity_override=lambda p, t, x, c=None, *, key=None: x)
    with pytest.raises(ValueError, match=r"^t: expected a (scalar|time)"):
        flow_map.velocity(0.5, t, jnp.ones(2))


def test_host_arrays_of_a_batch_must_fit():
    x = np.ones((4, 2), np.float32)
    with jax.enable_x64(False):
        for field, wrong in (
            ("x1", x * np.float64(1e40)),
            ("x0", x * np.float64(1e40)),
            ("cond", np.full(4, 2**32 + 1)),
        ):
            with pytest.raises(ValueError, match=rf"^batch\.{field}: expected values that fit"):
                types.as_batch({"x1": x, field: wrong})
        types.as_batch({"x1": x, "cond": np.full(4, 2**31 - 1)})
