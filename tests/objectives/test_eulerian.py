"""The published recipes of MeanFlow and its relatives: the same weight and the right times on both kinds of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import reductions, types
from tests.objectives.cases import DIM, published

clone = jax.random.clone
WEIGHTED = ["mean_flow", "improved_mean_flow", "pixel_mean_flow", "decoupled_mean_flow", "facm"]
MEAN_FLOWS = WEIGHTED[:3]


def far(dim, rows, scale):
    """Pairs with x1 - x0 = scale e / sqrt(dim) for e of ones: |D|^2 is (theta sqrt(dim) - scale)^2 for every row."""
    x0 = jax.random.normal(jax.random.key(7), (rows, dim))
    return types.Batch(x0 + scale / np.sqrt(dim), x0)


@pytest.mark.representatives("28.0-facm")
@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("scale", [28.0, 3.0])
def test_both_kinds_of_rows_weigh_the_same_at_784_entries(name, scale, key):
    """Equal residuals have equal losses and equal gradients, whichever kind the row is of.

    With weights on the off-diagonal rows alone a diagonal row of |D|^2 = 784 weighs 784 times as much. FACM's recipe is
    the paper's: means over entries on the anchor, and (mean + 1e-3)^-1/2 times that mean on the shortcut.
    """
    objective, batch, theta = published(name, diagonal=0.5), far(DIM, 8, scale), jnp.float64(0.0)

    @jax.jit
    def run(k):
        slopes, aux = jax.jacrev(lambda p: objective(p, k, batch), has_aux=True)(theta)
        return objective(theta, clone(k), batch)[0], slopes, aux.metrics["diagonal_rows"].values

    loss, slopes, mask = map(np.asarray, run(key))
    assert mask.sum() == 4
    mean = scale**2 / DIM
    if name == "facm":
        # Every entry of D is scale/28: below the clamp of 1, or at it.
        weight = (mean + 1e-3) ** -0.5
        np.testing.assert_allclose(loss, np.where(mask, mean, weight * mean), rtol=1e-9)
        np.testing.assert_allclose(slopes, np.where(mask, 1.0, weight) * -2 * scale / np.sqrt(DIM), rtol=1e-9)
        assert 0.3 < weight < 10.0  # of the order of one: no kind drowns the other
        return
    np.testing.assert_allclose(loss, loss[0], rtol=1e-9)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-9)
    if name == "decoupled_mean_flow":
        np.testing.assert_allclose(loss[0], np.log1p(mean / 0.01), rtol=1e-9)
        np.testing.assert_allclose(slopes[0], -2 * scale / np.sqrt(DIM) / (mean + 0.01), rtol=1e-9)
    else:
        square = scale**2
        np.testing.assert_allclose(loss[0], square / (square + 0.01), rtol=1e-9)
        np.testing.assert_allclose(slopes[0], -2 * scale * np.sqrt(DIM) / (square + 0.01), rtol=1e-9)


@pytest.mark.representatives("mean_flow")
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_gradients_of_both_kinds_of_rows_are_in_balance(name, key):
    """On data of 784 entries and a map that is not trained: the norms of the two terms' gradients are of one order."""
    batch = types.Batch(jnp.sign(jax.random.normal(jax.random.key(1), (64, DIM))))
    flow_map = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * jnp.tanh(x) * (1 + t - s), types.BOTH)
    objective = published(name, flow_map, diagonal=0.5)

    @jax.jit
    def norms(k):
        def kind(p, on):
            loss, aux = objective(p, clone(k), batch)
            return jnp.sum(jnp.where(aux.metrics["diagonal_rows"].values == on, loss, 0.0))

        return jnp.stack([jnp.linalg.norm(jax.grad(kind)(jnp.zeros(DIM), on)) for on in (True, False)])

    on, off = norms(key)
    assert 0.2 < on / off < 5.0, (on, off)


def smaller_of_two(t):
    """1 - (1 - F)^2, with F the distribution function of a logit-normal(0.4, 1) time."""
    z = np.log(t) - np.log1p(-t) - 0.4
    return 1.0 - (1.0 - np.asarray(jax.scipy.stats.norm.cdf(z))) ** 2


@pytest.mark.representatives("mean_flow")
@pytest.mark.parametrize("name", MEAN_FLOWS)
def test_the_diagonal_of_mean_flow_has_the_smaller_of_two_logit_normal_times(name, key):
    """The papers' larger time t of (t, r): the source, in our direction the smaller. Kolmogorov's distance at n = 20,000 is
    below 1.95/sqrt(n) in 999 of 1000 samples; the law of one time is 0.25 away, and that of the larger one 0.5."""
    objective, n = published(name), 20_000
    law_key, pair_key = jax.random.split(key)
    draw = jax.jit(lambda one, other: (objective.times(one, n), objective.pairs(other, n)[0]))
    for drawn in draw(law_key, pair_key):
        t = np.sort(np.asarray(drawn))
        steps = np.arange(n + 1) / n
        off = np.maximum(np.abs(smaller_of_two(t) - steps[1:]), np.abs(smaller_of_two(t) - steps[:-1])).max()
        assert off < 1.95 / np.sqrt(n), off
    # And the rows get it: the mean of t over the diagonal rows of many batches.
    seen = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: t + 0.0 * x, types.BOTH)
    zero = types.Batch(jnp.zeros((512, 1)), jnp.zeros((512, 1)))
    loss, _ = jax.jit(published(name, seen, diagonal=1.0 - 1 / 512, diagonal_reduction=reductions.squared))(
        None, jax.random.key(3), zero
    )
    on = np.sort(np.sqrt(np.asarray(loss)))[1:]
    off = np.abs(smaller_of_two(np.clip(on, 1e-9, 1 - 1e-9)) - np.arange(len(on)) / len(on)).max()
    assert off < 1.95 / np.sqrt(len(on)) + 2 / len(on), off


def test_decoupled_mean_flow_has_a_law_of_its_own_on_the_diagonal(key):
    objective, n = published("decoupled_mean_flow"), 20_000
    t = np.asarray(objective.times(key, n))
    z = np.log(t) - np.log1p(-t)
    assert abs(z.mean() - 0.4) < 4 / np.sqrt(n) and abs(z.std() - 1.0) < 4 / np.sqrt(2 * n)
