"""Averages against the closed form of their weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.training import ema
from tests.training import runs

ROWS = np.random.default_rng(0).normal(size=(12, 3))


def run(schedule, first, rows):
    average = first
    for n, row in enumerate(rows):
        average = ema.update(average, {"w": jnp.asarray(row)}, schedule(jnp.int32(n)))
    return np.asarray(average["w"])


def test_constant_decay_is_the_geometric_sum():
    first = np.array([1.0, -2.0, 0.5])
    expected = 0.8**12 * first + sum(0.2 * 0.8 ** (11 - k) * ROWS[k] for k in range(12))
    got = run(ema.constant(0.8), ema.init({"w": jnp.asarray(first)}), ROWS)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_unbiased_decay_is_the_normalised_sum_and_forgets_the_start():
    weights = 0.8 ** np.arange(11, -1, -1)
    expected = (weights[:, None] * ROWS).sum(0) / weights.sum()
    got = run(ema.unbiased(0.8), ema.init({"w": jnp.full(3, 1e3)}), ROWS)
    # The weights are computed in float32, and the first, 1 to rounding, has to remove the start of 1e3.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_power_is_the_sum_with_its_weights_and_forgets_the_start():
    k = np.arange(1, 13)
    weights = (k / 12) ** 5 - ((k - 1) / 12) ** 5
    got = run(ema.power(4.0), ema.init({"w": jnp.full(3, 1e3)}), ROWS)
    np.testing.assert_allclose(got, (weights[:, None] * ROWS).sum(0), rtol=1e-5, atol=1e-6)
    # After many steps the weights are still right: n/(n + 1) alone would have lost them in float32.
    assert float(ema.power(16.0)(jnp.int32(10**7))) == pytest.approx(17e-7, rel=1e-6)


def test_warmup_follows_its_formula_and_then_the_decay():
    n = jnp.arange(20000)
    expected = 1 - np.minimum(0.999, (1 + np.arange(20000)) / (10 + np.arange(20000)))
    np.testing.assert_allclose(ema.warmup(0.999)(n), expected, rtol=1e-6, atol=1e-9)
    assert float(ema.warmup(0.999)(jnp.int32(0))) == pytest.approx(0.9)


def test_weights_keep_their_digits_near_one():
    # 1 - float32(0.99999) would be wrong by 1e-3 of its value.
    assert float(ema.constant(0.99999)(jnp.int32(5))) == pytest.approx(1e-5, rel=1e-6)
    assert float(ema.unbiased(0.99999)(jnp.int32(10**7))) == pytest.approx(1e-5, rel=1e-6)
    assert float(ema.unbiased(0.99999)(jnp.int32(1))) == pytest.approx(1e-5 / (1 - 0.99999**2), rel=1e-6)


def test_bfloat16_parameters_are_averaged_in_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)}
    average = ema.init(params)
    assert average["w"].dtype == jnp.float32
    moved = ema.update(average, {"w": 2 * params["w"], "n": jnp.int32(4)}, 0.001)
    np.testing.assert_allclose(moved["w"], 1.001, rtol=1e-6)
    assert int(moved["n"]) == 4
    assert ema.as_params(moved, params)["w"].dtype == jnp.bfloat16


def test_half_life():
    decay = ema.decay_of_half_life(5000.0, 100)
    assert decay**50 == pytest.approx(0.5)
    assert ema.half_life_of_decay(decay, 100) == pytest.approx(5000.0)


def test_names():
    assert list(ema.resolve((0.999, 0.9999))) == ["0.999", "0.9999"]
    assert list(ema.resolve({"slow": ema.warmup(0.9)})) == ["slow"]
    assert jax.tree.leaves(ema.resolve(())) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema.constant(1.5), "decay"),
        (lambda: ema.unbiased(1.0), "decay"),
        (lambda: ema.resolve(0.9), "ema"),
        (lambda: ema.resolve({"a/b": ema.constant(0.9)}), "ema"),
        (lambda: ema.decay_of_half_life(0.0, 1), "half_life"),
        (lambda: ema.half_life_of_decay(1.0, 1), "decay"),
        (lambda: ema.update({"w": jnp.ones(2)}, {"v": jnp.ones(2)}, 0.1), "average"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda p: runs.state(p, ema=("slow",)),
            TypeError,
            "^decay: expected a number, got str 'slow'$",
            id="an average by name alone",
        ),
        pytest.param(
            lambda p: runs.state(p, ema=0.999),
            TypeError,
            r"^ema: expected a mapping of names to schedules or a tuple of decays, got 0\.999$",
            id="an average that is no tuple",
        ),
        pytest.param(
            lambda p: runs.state(p, ema={"slow": 0.999}),
            TypeError,
            r"^ema: expected names without '/' and callable schedules, got 'slow': 0\.999$",
            id="a decay beside its name",
        ),
        pytest.param(
            lambda p: runs.state(p, ema=(99.9,)),
            ValueError,
            r"^decay: expected a number in \[0, 1\], got 99\.9$",
            id="a decay in percent",
        ),
        pytest.param(
            lambda p: ema.warmup("0.999"),
            TypeError,
            "^decay: expected a number, got str '0.999'$",
            id="a warm-up to no decay",
        ),
        pytest.param(
            lambda p: ema.unbiased(1),
            ValueError,
            r"^decay: expected a number strictly between 0 and 1, got 1\.0$",
            id="a bias corrected for ever",
        ),
        pytest.param(
            lambda p: ema.power(-2.0),
            ValueError,
            r"^gamma: expected a number in \[0, inf\], got -2\.0$",
            id="a negative exponent",
        ),
        pytest.param(
            lambda p: ema.decay_of_half_life(0, 256),
            ValueError,
            r"^half_life: expected a number in \(0, inf\], got 0$",
            id="a half-life of no samples",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
