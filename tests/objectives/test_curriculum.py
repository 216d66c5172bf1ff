"""Curricula against whole-number arithmetic and closed forms, far steps included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import interpolants, objectives, types
from jflow.objectives import curriculum

FAR = 2_000_000_000


def values(schedule, steps):
    """The schedule at each step, as a training step asks for it: the step is a traced int32."""
    return np.asarray(
        jax.jit(jax.vmap(lambda step: curriculum.value_at(schedule, step)))(jnp.asarray(steps, jnp.int32))
    )


@pytest.mark.parametrize("number", [3, 0.25, np.float32(0.25), jnp.float32(0.25), jnp.int32(3)])
def test_a_number_is_its_own_value_at_every_step(number):
    for step in (0, 7, jnp.int32(7)):
        value = curriculum.value_at(number, step)
        assert value.shape == () and jnp.issubdtype(value.dtype, jnp.floating) and value == float(number)
    np.testing.assert_array_equal(values(number, [0, FAR]), float(number))
    # Traced as well: a schedule's value may itself be an argument.
    assert jax.jit(lambda n: curriculum.value_at(n, 0))(jnp.asarray(number)) == float(number)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (optax.linear_schedule(0.0, 0.99, 40), lambda k: 0.99 * np.minimum(k / 40, 1.0)),
        (optax.exponential_decay(0.8, 10, 0.5), lambda k: 0.8 * 0.5 ** (k / 10)),
        (optax.cosine_decay_schedule(2.0, 50), lambda k: 1.0 + np.cos(np.pi * np.minimum(k / 50, 1.0))),
        (optax.piecewise_constant_schedule(4.0, {20: 0.5, 40: 0.1}), lambda k: 4.0 * 0.5 ** (k > 20) * 0.1 ** (k > 40)),
        (lambda step: step**2, lambda k: k**2),
    ],
)
def test_schedules_of_optax_under_strict_promotion(schedule, expected):
    steps = np.array([0, 1, 19, 21, 39, 41, 60])
    np.testing.assert_allclose(values(schedule, steps), expected(steps), rtol=1e-6)
    for step in (21, jnp.int32(21)):
        value = curriculum.value_at(schedule, step)
        assert jnp.issubdtype(value.dtype, jnp.floating)
        np.testing.assert_allclose(value, expected(np.array(21)), rtol=1e-6)
    # The relaxed promotion ends with the call.
    with pytest.raises(Exception, match="promotion"):
        jnp.int32(1) + jnp.float32(1.0)


@pytest.mark.parametrize(
    ("first", "last", "every"), [(10, 1280, 7), (10, 1000, 7), (3, 3, 1), (1, 2**20, 2), (5, 9, 4)]
)
def test_numbers_that_double_are_optax_s_exponential_decay(first, last, every):
    """The schedule that ``curriculum`` names for ``ict``; whole numbers, far steps included."""
    steps = [*range(25 * every), 10**6, FAR]
    expected = [min(first * 2 ** min(step // every, 64), last) for step in steps]
    doubling = optax.exponential_decay(float(first), every, 2.0, staircase=True, end_value=float(last))
    np.testing.assert_array_equal(values(doubling, steps), expected)
    assert expected[-1] == last


@pytest.mark.parametrize("first", [1, 2, 3, 5, 16, 1000, 2**20])
@pytest.mark.parametrize("every", [1, 6])
def test_halving_changes_at_halvings_and_nowhere_else(first, every):
    steps = [*range(24 * every), 10**6, FAR]
    got = values(curriculum.halving(first, every), steps)
    np.testing.assert_array_equal(got, [max(first >> min(step // every, 64), 1) for step in steps])
    changes = [steps[i] for i in range(1, len(steps)) if got[i] != got[i - 1]]
    assert curriculum.halvings(first, every) == tuple(changes)
    assert got[-1] == 1


@pytest.mark.representatives("999-1.0", "1000-0.5", "7000-0.01")
@pytest.mark.parametrize(
    ("step", "share"), [(0, 1.0), (999, 1.0), (1000, 0.5), (6999, 2.0**-6), (7000, 0.01), (FAR, 0.01)]
)
def test_the_share_of_easy_consistency_tuning_halves_every_thousand_steps_down_to_a_hundredth(step, share):
    """Through the loss: at each step that of a constant share. Optax computes in float32, where 0.01 is rounded."""
    flow_map = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: jnp.sin(p * x + s) + t * x)
    batch = types.Batch(jnp.array([[0.4, 1.0], [-0.3, 0.2]]), jnp.array([[0.1, -1.0], [0.8, 0.5]]))

    def loss(**choices):
        objective = objectives.ect(flow_map, interpolants.linear(), **choices)
        context = types.Context(step=jnp.int32(step))
        return objective(jnp.float64(0.7), jax.random.key(0), batch, context)[0]

    got, expected = jax.jit(lambda: (loss(), loss(fraction=share)))()
    np.testing.assert_allclose(got, expected, rtol=1e-12 if share > 0.01 else 1e-5)


@pytest.mark.parametrize(("middle", "width", "least"), [(100.0, 12.0, 5e-3), (40.5, 3.0, 0.1)])
def test_falling_sigmoid(middle, width, least):
    alpha = curriculum.falling_sigmoid(middle, width, least)
    steps = np.arange(200)
    got = values(alpha, steps)
    reach = width * np.log((1 - least) / least)  # where the sigmoid is 1 - least before the middle, least after it
    before, after = steps < middle - reach, steps > middle + reach
    assert before.any() and after.any()
    np.testing.assert_array_equal(got[before], 1.0)
    np.testing.assert_array_equal(got[after], least)
    between = ~before & ~after
    # Its logit is a line of slope -1/width through zero at the middle.
    slope, start = np.polyfit(steps[between], np.log(got[between] / (1 - got[between])), 1)
    np.testing.assert_allclose([slope, -start / slope], [-1 / width, middle], rtol=1e-9)
    assert np.all(np.diff(got) <= 0)
    np.testing.assert_array_equal(values(alpha, [0, FAR]), [1.0, least])


def test_falling_sigmoid_with_the_greatest_least_is_a_step():
    """least = 1/2 leaves 1 before the middle and 1/2 from there on."""
    got = values(curriculum.falling_sigmoid(10.0, 4.0, 0.5), np.arange(20))
    np.testing.assert_array_equal(got, np.where(np.arange(20) < 10, 1.0, 0.5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: curriculum.halving(0, 1), ValueError, "first"),
        (lambda: curriculum.halving(4, 0), ValueError, "every"),
        (lambda: curriculum.halving(4, 10.0), TypeError, "every"),
        (lambda: curriculum.falling_sigmoid(10.0, 0.0), ValueError, "width"),
        (lambda: curriculum.falling_sigmoid(10.0, 1.0, least=0.0), ValueError, "least"),
        (lambda: curriculum.falling_sigmoid(10.0, 1.0, least=0.6), ValueError, "least"),
        (lambda: curriculum.falling_sigmoid(np.inf, 1.0), ValueError, "middle"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
