"""Parameters made of parts: functions get their part, derivatives are of the whole, and other types are refused."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import parts, types


class Two(NamedTuple):
    left: float
    right: float


def test_a_function_of_one_part_is_one_of_the_whole():
    times = parts.on_part(Two, "right", lambda p, x, *, scale=1.0: p * x * scale)
    assert times(Two(2.0, 3.0), 5.0, scale=7.0) == 105.0
    assert jax.grad(times)(Two(2.0, 3.0), 5.0) == Two(0.0, 5.0)
    with pytest.raises(TypeError, match=r"params: expected Two\(left, right\), got tuple"):
        times((2.0, 3.0), 5.0)


def test_a_map_on_a_part_keeps_its_domain_form_and_overrides():
    def scaled(p, *args, key=None):
        return p * args[-2]

    whole = types.FlowMap(
        scaled,
        types.TO_DATA,
        jump_override=lambda p, s, t, x, cond=None, *, key=None: 10 * p * x,
        velocity_override=lambda p, t, x, cond=None, *, key=None: 100 * p * x,
        form="x",
    )
    routed = parts.map_on_part(Two, "left", whole)
    params, x = Two(jnp.asarray(2.0), jnp.asarray(3.0)), jnp.asarray([1.0, -1.0])
    assert (routed.domain, routed.form) == (types.TO_DATA, "x")
    np.testing.assert_array_equal(routed.mean_velocity(params, 0.1, 1.0, x), 2 * x)
    np.testing.assert_array_equal(routed.jump(params, 0.1, 1.0, x), 20 * x)
    np.testing.assert_array_equal(routed.velocity(params, 0.1, x), 200 * x)
    bare = parts.map_on_part(Two, "left", types.FlowMap(scaled))
    assert bare.jump_override is None and bare.velocity_override is None
    for call in (routed.mean_velocity, routed.jump):
        with pytest.raises(TypeError, match=r"params: expected Two\(left, right\), got dict"):
            call({}, 0.1, 1.0, x)
