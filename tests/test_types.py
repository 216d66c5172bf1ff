"""FlowMap, its derived jump and velocity, binding, and the domains."""

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


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (types.FORWARD, [(0.0, 1.0), (0.3, 0.3)], [(0.5, 0.2), (-0.1, 0.5), (0.0, 1.2)]),
        (types.BOTH, [(0.0, 1.0), (0.9, 0.1)], [(0.0, 1.1)]),
        (types.TO_DATA, [(0.0, 1.0), (0.4, 0.4)], [(0.0, 0.5), (1.0, 0.0)]),
        (types.FROM_NOISE, [(0.0, 1.0), (0.0, 0.3), (0.4, 0.4)], [(0.2, 0.7), (0.5, 0.0), (0.0, 1.2)]),
        (types.Domain("encoder", backward=True, source=1.0), [(1.0, 0.0), (1.0, 0.4)], [(0.0, 1.0), (0.9, 0.1)]),
        (types.dyadic(3), [(0.0, 1.0), (0.25, 0.5), (0.125, 0.25)], [(0.0, 0.375), (0.1, 0.6), (0.0, 0.0625)]),
    ],
)
def test_domains(domain, inside, outside):
    for s, t in inside:
        assert domain.contains(s, t)
        domain.check_grid([s, t])
    for s, t in outside:
        assert not domain.contains(s, t)
        with pytest.raises(ValueError, match="outside the map's domain"):
            domain.check_grid(jnp.array([s, t]))


def test_a_map_from_noise_jumps_once():
    """A grid of two jumps leaves s = 0 at its middle time; the message says so."""
    types.FROM_NOISE.check_grid([0.0, 1.0])
    with pytest.raises(ValueError, match=r"from 0\.5 to 1 is outside the map's domain, s = 0 only"):
        types.FROM_NOISE.check_grid([0.0, 0.5, 1.0])


def test_grids():
    with pytest.raises(ValueError, match="at least two times"):
        types.FORWARD.check_grid([0.0])
    with pytest.raises(ValueError, match="levels"):
        types.dyadic(0)

    @jax.jit
    def traced(grid):
        types.FORWARD.check_grid(grid)  # a traced grid cannot be looked at
        return grid

    traced(jnp.array([1.0, 0.0]))
