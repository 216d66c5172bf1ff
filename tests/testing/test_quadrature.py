"""The pairs, against their exact map; and the student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, objectives, types
from jflow.testing import quadrature

LINEAR = interpolants.linear()


@pytest.mark.parametrize("name", interpolants.INTERPOLANTS)
def test_the_mean_of_the_noisy_slopes_is_the_velocity(name):
    path = interpolants.INTERPOLANTS[name]()
    this = quadrature.noisy_pairs(path, 1.5)
    np.testing.assert_allclose(this.weights.sum(), 1.0, rtol=1e-15)

    @jax.jit
    def run(s):
        batch = this.batch(s)
        x, slope = (jax.vmap(f, (None, 0, 0))(s, batch.x0, batch.x1) for f in (path.interpolate, path.derivative))
        return x, slope, jax.vmap(lambda x: this.exact.velocity(None, s, x))(x)

    for s in (0.125, 0.2):
        x, slope, velocity = (np.asarray(leaf).reshape(-1, 2) for leaf in run(s))
        np.testing.assert_allclose(x, quadrature.POINTS[:, None] + np.zeros(2), rtol=1e-12, atol=1e-12)
        weights = this.weights.reshape(-1, 2)
        np.testing.assert_allclose((weights * (slope - velocity)).sum(1), 0.0, atol=1e-12)
        assert np.abs(slope - velocity).min() > 0.1


def test_the_map_of_noisy_pairs_is_the_flow_of_their_velocity():
    """By its identities, each over a grid: the tangent, the Lagrangian, and the inverse."""
    exact = quadrature.noisy_pairs(LINEAR, -2.0).exact
    s, t, x = (jnp.asarray(leaf.ravel()) for leaf in np.meshgrid([0.0, 0.3, 0.8], [0.0, 0.4, 1.0], [-2.0, 0.1, 1.5]))

    @jax.jit
    @jax.vmap
    def errors(s, t, x):
        x = x[None]
        end, slope = jax.jvp(lambda t: exact.jump(None, s, t, x), (t,), (jnp.ones_like(t),))
        diagonal = exact.mean_velocity(None, s, s, x) - exact.velocity(None, s, x)
        return slope - exact.velocity(None, t, end), diagonal, exact.jump(None, t, s, end) - x

    assert max(np.abs(error).max() for error in errors(s, t, x)) < 1e-13


@pytest.mark.parametrize("name", ["linear", "trigonometric"])
def test_the_map_of_solved_pairs_carries_each_pair(name):
    path = interpolants.INTERPOLANTS[name]()
    this = quadrature.solved_pairs(path)

    @jax.jit
    @jax.vmap
    def errors(x0, x1):
        here, there = path.interpolate(0.2, x0, x1), path.interpolate(0.7, x0, x1)
        slope = path.derivative(0.2, x0, x1)
        return this.exact.jump(None, 0.2, 0.7, here) - there, this.exact.velocity(None, 0.2, here) - slope

    batch = this.batch(0.2)
    assert max(np.abs(error).max() for error in errors(batch.x0, batch.x1)) < 1e-12


def test_the_student_is_exact_at_zero_alone():
    this = quadrature.solved_pairs(LINEAR)
    x = jnp.array([0.4])

    @jax.jit
    def error(theta, s, by_x, on_diagonal):
        student = quadrature.student(this, LINEAR, by_x, on_diagonal=True)
        quiet = quadrature.student(this, LINEAR, by_x, on_diagonal=False)
        found = [
            m.mean_velocity(theta, s, 0.7, x) - this.exact.mean_velocity(None, s, 0.7, x) for m in (student, quiet)
        ]
        return jnp.where(on_diagonal, *found)[0]

    for by_x in (0.0, 1.0):
        assert error(np.zeros(quadrature.FEATURES), 0.2, by_x, True) == 0.0
        assert abs(error(quadrature.OFF, 0.2, by_x, True)) > 1e-2
        np.testing.assert_allclose(error(quadrature.OFF, 0.7, by_x, False), 0.0, atol=1e-15)
    v, x_form = (error(quadrature.OFF, 0.2, by_x, True) for by_x in (0.0, 1.0))
    # v = (x1 - x)/(1 - s): an error of the predicted data counts 1/(1 - s) times.
    np.testing.assert_allclose(x_form, v / 0.8, rtol=1e-12)


def test_times_lie_within_the_domain():
    for domain in (types.FORWARD, types.BOTH, types.TO_DATA, types.FROM_NOISE, types.dyadic(3)):
        pairs = quadrature.times_within(domain)
        if domain.levels is None:
            assert all(domain.contains(s, t) for s, t in pairs)


def test_a_teacher_is_given_where_it_is_needed():
    this = quadrature.noisy_pairs(LINEAR)
    student = quadrature.student(this, LINEAR, False)
    for name in ("lmd", "lsd"):
        objective = quadrature.objective_of(objectives.METHODS[name], student, LINEAR, this.exact)
        assert objective.teacher is (this.exact if name == "lmd" else None)
