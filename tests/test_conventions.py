"""Converters: the exact networks of a Gaussian in other papers' conventions become our exact velocity and map."""

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import conventions, interpolants, oracles

MEAN, STD = 0.7, 0.4
X = jnp.array([0.9])


def exact(path):
    return oracles.gaussian(path), oracles.gaussian_params(jnp.array([MEAN]), jnp.array([[STD**2]]))


def test_reversed_time():
    """MeanFlow: z = (1 - t') x + t' noise, u(z, r', t') the mean of dz/dt' from r' to t'; the net sees (source, target)."""
    oracle, params = exact(interpolants.linear())

    def moments(time):  # of z at their time, for this Gaussian
        return (1 - time) * MEAN, jnp.sqrt(time**2 + (1 - time) ** 2 * STD**2)

    def u(p, source, target, z, cond=None, *, key=None):
        (m_s, std_s), (m_t, std_t) = moments(source), moments(target)
        end = m_t + std_t / std_s * (z - m_s)
        return (end - z) / (target - source)

    flow_map = conventions.from_reversed_time(u)
    for s, t in ((0.1, 0.8), (0.3, 1.0)):
        np.testing.assert_allclose(flow_map.jump(None, s, t, X), oracle.flow_map.jump(params, s, t, X), rtol=1e-10)

    def instantaneous(p, time, z, cond=None, *, key=None):
        h = 1e-6
        return (u(p, time, time + h, z) + u(p, time, time - h, z)) / 2

    velocity = conventions.velocity_from_reversed_time(instantaneous)
    np.testing.assert_allclose(velocity(None, 0.4, X), oracle.velocity(params, 0.4, X), rtol=1e-6)


def test_scm():
    """sCM: x = cos(tau) data + sin(tau) noise, dx/dtau = F, f(x, tau) = cos(tau) x - sin(tau) F."""
    oracle, params = exact(interpolants.trigonometric())

    def scale(tau):
        return jnp.sqrt((jnp.cos(tau) * STD) ** 2 + jnp.sin(tau) ** 2)

    def consistency(tau, x):
        return MEAN + STD / scale(tau) * (x - jnp.cos(tau) * MEAN)

    def network(p, tau, x, cond=None, *, key=None):
        return (jnp.cos(tau) * x - consistency(tau, x)) / jnp.sin(tau)

    flow_map = conventions.from_scm(network)
    for s in (0.1, 0.6):
        np.testing.assert_allclose(flow_map.jump(None, s, 1.0, X), oracle.flow_map.jump(params, s, 1.0, X), rtol=1e-10)
    with pytest.raises(ValueError, match="t = 1 only"):
        flow_map.domain.check_grid([0.0, 0.5])

    def field(p, tau, x, cond=None, *, key=None):  # dx/dtau
        variance_slope = jnp.sin(tau) * jnp.cos(tau) * (1 - STD**2)
        return -jnp.sin(tau) * MEAN + variance_slope / scale(tau) ** 2 * (x - jnp.cos(tau) * MEAN)

    velocity = conventions.from_scm(field).velocity(None, 0.3, X)
    np.testing.assert_allclose(velocity, oracle.velocity(params, 0.3, X), rtol=1e-10)


@pytest.mark.parametrize("name", sorted(interpolants.INTERPOLANTS))
def test_edm(name):
    """EDM: D(x; sigma) = E[data | data + sigma noise = x], on every path."""
    path = interpolants.INTERPOLANTS[name]()
    oracle, params = exact(path)

    def denoiser(p, sigma, x, cond=None, *, key=None):
        return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)

    velocity = conventions.velocity_from_edm(denoiser, path)
    for t in (0.2, 0.8):
        np.testing.assert_allclose(velocity(None, t, X), oracle.velocity(params, t, X), rtol=1e-8)
