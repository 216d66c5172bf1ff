"""Flow matching against its formula."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import interpolants, objectives, times
from tests.objectives.cases import FLOW_MAP, PARAMS, batch_of, mean_velocity

clone = jax.random.clone


def test_flow_matching_follows_its_formula(key):
    path = interpolants.trigonometric()
    batch = batch_of(3)
    objective = objectives.flow_matching(FLOW_MAP, path, times=times.constant(0.3))
    loss, aux = jax.jit(objective)(PARAMS, clone(key), batch)

    @jax.jit
    @jax.vmap
    def formula(x0, x1):
        v = mean_velocity(PARAMS, 0.3, 0.3, path.interpolate(0.3, x0, x1))
        return jnp.sum((v - path.derivative(0.3, x0, x1)) ** 2)

    np.testing.assert_allclose(loss, formula(batch.x0, batch.x1), rtol=1e-12)
    assert np.all(aux.metrics["diagonal_rows"].values)
    velocity = lambda p, t, x, cond=None, *, key=None: mean_velocity(p, t, t, x)  # noqa: E731
    bare = objectives.flow_matching(velocity, path, times=times.constant(0.3))
    np.testing.assert_array_equal(jax.jit(bare)(PARAMS, clone(key), batch)[0], loss)
