"""The published recipes of consistency training: the norm of the residual, its gradient at zero, and its width."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import objectives, times, types
from tests.objectives.cases import DIM, published, still

clone = jax.random.clone


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
