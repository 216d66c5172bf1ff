"""The published recipes: the same weight and the right times on both kinds of rows; and a shortcut's smallest gap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, objectives, reductions, times, types

clone = jax.random.clone
DIM = 784
WEIGHTED = ["mean_flow", "improved_mean_flow", "pixel_mean_flow", "decoupled_mean_flow", "facm"]
MEAN_FLOWS = WEIGHTED[:3]


def published(name, flow_map=None, **choices):
    flow_map = still() if flow_map is None else flow_map
    recipe = objectives.METHODS[name].published()
    return objectives.METHODS[name].constructor(flow_map, interpolants.linear(), **{**recipe, **choices})


def still():
    """v = theta for all points and times: its derivatives vanish, and every residual is theta - (x1 - x0)."""
    return types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * jnp.ones_like(x), types.BOTH)


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
    for drawn in (objective.times(law_key, n), objective.pairs(pair_key, n)[0]):
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


def test_easy_consistency_tuning_has_the_norm_of_the_residual_and_a_gradient_at_zero(key):
    """sqrt(|D|^2 + c^2) - c with c = 0, over the step u - s = 1 - s: |X_{s,1} - x1|/(1 - s)."""
    s = 0.25
    law = times.independent(times.constant(s), times.constant(1.0))
    flow_map = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * jnp.ones_like(x), types.FORWARD)
    objective = published("ect", flow_map, pairs=law)
    x0 = jnp.zeros((2, 4))
    batch = types.Batch(jnp.array([[1.0] * 4, [3.0] * 4]), x0)
    # D = (1-s)(theta - x1): over the step, |theta - x1| 2 for four entries.
    one = types.Batch(batch.x1[:1], batch.x0[:1])
    run = jax.jit(lambda p, k, b: objective(p, k, b)[0])
    slope = jax.jit(jax.grad(lambda p, k, b: objective(p, k, b)[0].sum()))
    np.testing.assert_allclose(run(1.5, clone(key), batch), [1.0, 3.0], rtol=1e-12)
    np.testing.assert_allclose(slope(1.5, clone(key), one), 2.0, rtol=1e-12)
    # At D = 0 the loss and its gradient are zero; that of the other row stays.
    np.testing.assert_allclose(run(1.0, clone(key), batch), [0.0, 4.0], atol=1e-15)
    np.testing.assert_allclose(slope(1.0, clone(key), one), 0.0, atol=1e-15)
    np.testing.assert_allclose(slope(1.0, clone(key), batch), -2.0, atol=1e-15)


def test_improved_consistency_training_has_its_width_at_784_entries(key):
    """c = 0.00054 sqrt(784) = 0.01512, in the units of X."""
    reduction, c = objectives.METHODS["ict"].published()["reduction"], 0.00054 * 28.0
    for norm in (0.0, 1e-3, 0.01512, 1.0):
        d = jnp.full((28, 28), norm / 28.0)
        value, slope = jax.value_and_grad(lambda d: reduction(None, 0.0, 1.0, d))(d)
        np.testing.assert_allclose(value, np.sqrt(norm**2 + c**2) - c, rtol=1e-9, atol=1e-16)
        np.testing.assert_allclose(slope, d / np.sqrt(norm**2 + c**2), rtol=1e-12)
    # Through the objective: D = (1 - s)(theta - (x1 - x0)), here of norm (1 - s) 28 |theta - 0.1|.
    s, cells = 0.5, 4.0
    law = times.independent(times.constant(s), times.constant(1.0))
    objective = published("ict", still(), pairs=law, cells=cells)
    batch = types.Batch(jnp.full((2, DIM), 0.1), jnp.zeros((2, DIM)))
    # v = theta at both points: X_{s,1}(I_s) - X_{u,1}(I_u) = (u - s)(theta - (x1 - x0)), and the weight is 1/(u - s).
    step = 1 / cells
    norm = step * 28.0 * 0.2
    loss, _ = jax.jit(objective)(jnp.float64(0.3), key, batch)
    np.testing.assert_allclose(loss, (np.sqrt(norm**2 + c**2) - c) / step, rtol=1e-9)


# --- Shortcut's smallest gap -----------------------------------------------------------------------------------------


LEVELS = 3
CELL = 2.0**-LEVELS


def ramp(params, s, t, x, cond=None, *, key=None):
    """theta min((t - s)/cell, 1): nothing at s = t, and theta at every gap of the grid."""
    return params * jnp.minimum(jnp.abs(t - s) / CELL, 1.0) * jnp.ones_like(x)


def test_every_gap_of_a_shortcut_is_trained_down_to_the_smallest(key):
    """x1 = x0: the velocity is zero, and so is the exact map's. With the smallest gap left out theta is never touched."""
    objective = objectives.shortcut(types.FlowMap(ramp), interpolants.linear(), levels=LEVELS, leg="own")
    x = jax.random.normal(jax.random.key(1), (512, 1))
    batch = types.Batch(x, x)

    @jax.jit
    def descend(theta, k):
        def step(theta, k):
            value, slope = jax.value_and_grad(lambda p: objective(p, k, batch)[0].mean())(theta)
            return theta - 4.0 * slope, value

        return jax.lax.scan(step, theta, jax.random.split(k, 200))

    theta, losses = descend(jnp.float64(1.0), key)
    assert losses[0] > 1e-3
    assert abs(theta) < 1e-3
    for gap in (CELL, 2 * CELL, 4 * CELL, 1.0):
        jumped = types.FlowMap(ramp).jump(theta, 0.0, gap, jnp.ones(1))
        np.testing.assert_allclose(jumped, 1.0, atol=1e-3)


def test_a_parameter_of_the_smallest_gap_alone_gets_a_gradient(key):
    def bump(params, s, t, x, cond=None, *, key=None):
        return jnp.where(jnp.abs(jnp.abs(t - s) - CELL) < 0.1 * CELL, params, 0.0) * jnp.ones_like(x)

    objective = objectives.shortcut(types.FlowMap(bump), interpolants.linear(), levels=LEVELS, leg="own")
    x = jnp.zeros((256, 1))
    slope = jax.jit(jax.grad(lambda p: objective(p, key, types.Batch(x, x))[0].mean()))(jnp.float64(0.5))
    # An eighth of the rows, a quarter of them of the smallest gap: about 2 theta/32, its legs asked at s = t.
    assert 0.5 / 32 < slope < 2.0 / 32


@pytest.mark.parametrize("gap", [CELL, 2 * CELL, 0.5, 1.0])
@pytest.mark.parametrize("width", [jnp.float32, jnp.float64])
def test_the_legs_of_a_shortcut_follow_the_formula(gap, width, key):
    """Two Euler steps of the diagonal over a cell; two jumps over half the gap where it is longer."""

    def v(p, s, t, x, cond=None, *, key=None):
        return jnp.sin(p * x + s) + (t - s) * x + 0.5 * t

    p, s = width(0.8), width(0.0 if gap == 1.0 else gap)
    law = times.independent(times.constant(float(s)), times.constant(float(s) + gap))
    objective = objectives.shortcut(
        types.FlowMap(v), interpolants.linear(), levels=LEVELS, pairs=law, domain=types.dyadic(LEVELS), diagonal=0.0
    )
    batch = types.Batch(jnp.array([[0.4], [-1.0]], width), jnp.array([[1.0], [0.3]], width))
    ema = width(-0.5)
    loss, _ = jax.jit(objective)(p, key, batch, types.Context(ema=ema))
    x, t, half = (1 - s) * batch.x0 + s * batch.x1, s + width(gap), width(gap / 2)
    u = s + half
    asked = (lambda a, b, z: v(ema, a, a, z)) if gap == CELL else (lambda a, b, z: v(ema, a, b, z))
    first = asked(s, u, x)
    second = asked(u, t, x + half * first)
    expected = jnp.sum((v(p, s, t, x) - width(0.5) * (first + second)) ** 2, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5 if width is jnp.float32 else 1e-12)


def test_every_gap_is_drawn_as_often(key):
    n = 20_000
    s, t = times.dyadic(LEVELS)(key, n)
    levels = np.round(-np.log2(np.asarray(t - s))).astype(int)
    counts = np.bincount(levels, minlength=LEVELS + 1)
    share = 1 / (LEVELS + 1)
    assert len(counts) == LEVELS + 1
    assert np.all(np.abs(counts / n - share) < 4 * np.sqrt(share * (1 - share) / n))
