"""The benchmark of the reductions' bias: biases that must be zero are zero, and the residual is MeanFlow's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import reduction_bias as bias
from experiments.shared.reduction_table import UNBIASED
from jflow import identities

NODES = 2048
S, T = 0.2, 0.7
SHARP = bias.mixture(*bias.MIXTURES["sharp"])
SCORES = {name: bias.score_of(reduction) for name, reduction in bias.REDUCTIONS.items()}

law_of = jax.jit(bias.residual)
shift = jax.jit(bias.shift, static_argnums=(0, 2))
expected_score = jax.jit(bias.expected_score, static_argnums=(0, 3))


def law_at(x, params=SHARP):
    return law_of(params, jnp.asarray(S), jnp.asarray(T), jnp.asarray(x))


@pytest.mark.parametrize("x", [-1.5, 0.1, 0.6])
def test_the_squared_residual_has_no_shift(x):
    law = law_at(x)
    assert abs(float(jnp.sum(law.shares * law.means))) < 1e-12
    assert abs(float(shift(SCORES["squared"], law, NODES))) < UNBIASED
    np.testing.assert_allclose(expected_score(SCORES["squared"], law, jnp.asarray(0.3), NODES), 2 * 0.3, atol=1e-12)


def test_one_gaussian_has_no_shift_by_symmetry():
    law = law_at(0.4, bias.mixture([1.0], [0.7], [0.3]))
    assert float(law.widths[0]) > 0.1
    for name, score in SCORES.items():
        assert abs(float(expected_score(score, law, jnp.asarray(0.0), NODES))) < 1e-12, name
    assert abs(float(shift(SCORES["adaptive(1, 0.01)"], law, NODES))) < UNBIASED


def test_the_shift_is_a_root_downhill_of_zero():
    score, law = SCORES["adaptive(1, 0.01)"], law_at(0.1)
    m = shift(score, law, NODES)
    assert abs(float(m)) > 0.1
    assert np.sign(m) == -np.sign(expected_score(score, law, jnp.asarray(0.0), NODES))
    assert abs(float(expected_score(score, law, m, NODES))) < 1e-8


@pytest.mark.slow
def test_against_monte_carlo_of_the_library_residual():
    # Data weighted by the density of x given it: neither the posterior nor grad X (I_s' - b) is used.
    x, score = 0.1, SCORES["adaptive(1, 0.01)"]
    x1 = bias.ORACLE.sample(SHARP, jax.random.key(1), 100_000)
    x0 = (x - S * x1) / (1 - S)
    weights = np.exp(-0.5 * np.asarray(x0)[:, 0] ** 2)

    @jax.jit
    def difference(velocity):
        v = lambda s, t, x: bias.ORACLE.flow_map.mean_velocity(SHARP, s, t, x)  # noqa: E731
        found = identities.eulerian(v, jnp.asarray(S), jnp.asarray(T), jnp.asarray([x]), velocity)
        return found.prediction - found.target

    # The residual is affine in the velocity, so two values determine it.
    zero, one = difference(jnp.zeros(1)), difference(jnp.ones(1))
    residuals = (zero[None] + (one - zero)[None] * (x1 - x0))[:, 0]
    law = law_at(x)
    for m in (jnp.asarray(0.0), shift(score, law, NODES)):
        scores = np.asarray(jax.vmap(score)(m + residuals))
        mean = np.average(scores, weights=weights)
        error = np.sqrt(np.sum((weights * (scores - mean)) ** 2)) / np.sum(weights)
        assert abs(mean - float(expected_score(score, law, m, NODES))) < 4 * error
        assert m != 0 or abs(mean) > 20 * error
