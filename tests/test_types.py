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


@pytest.mark.parametrize("domain", [types.FORWARD, types.TO_DATA, types.FROM_NOISE, types.dyadic(2)], ids=repr)
def test_rounding_is_no_step_out_of_a_domain(domain):
    """What arithmetic leaves of equal times, and of the ends, is inside; what is further is not."""
    one = np.float32(1.0) + np.finfo(np.float32).eps
    for s, t in ((0.0, one), (one, 1.0), (-1e-9, 1.0), (0.75 + 1e-9, 0.75), (0.0, 1.0 - 1e-8)):
        assert domain.contains(s, t), (s, t)
        assert domain.contains_all(np.array([s]), np.array([t])).all()
    for s, t in ((0.0, 1.0 + 1e-4), (-1e-4, 1.0), (0.75 + 1e-4, 0.75), (1.0001, 1.0001)):
        assert not domain.contains(s, t), (s, t)


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
        (lambda: types.Domain(True), "^name: expected a string"),
        (lambda: types.dyadic(2.5), "^levels: expected a whole number"),
        (lambda: types.dyadic(24), "^levels: expected a whole number"),
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
