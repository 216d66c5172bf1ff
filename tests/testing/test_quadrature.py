"""The quadrature: its weights, its pairs against the exact map, and the student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import interpolants, objectives, types
from jflow.testing import quadrature

LINEAR = interpolants.linear()


def test_the_nodes_have_the_moments_of_the_target():
    this = quadrature.independent_pairs(LINEAR, scale=2.0)
    x0, x1 = np.asarray(this.batch.x0)[:, 0], np.asarray(this.batch.x1)[:, 0]
    shares, means, variances = np.array([0.65, 0.35]), 2.0 * np.array([-0.4, 0.7]), 4.0 * np.array([0.35, 0.7])
    moments = [1.0, 0.0, 1.0, shares @ means, shares @ (variances + means**2), 0.0]
    found = [np.ones_like(x0), x0, x0**2, x1, x1**2, x0 * x1]
    np.testing.assert_allclose([this.weights @ value for value in found], moments, atol=1e-12)


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

    assert max(np.abs(error).max() for error in errors(this.batch.x0, this.batch.x1)) < 1e-12


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
    this = quadrature.independent_pairs(LINEAR)
    student = quadrature.student(this, LINEAR, False)
    for name in ("lmd", "lsd"):
        objective = quadrature.objective_of(objectives.METHODS[name], student, LINEAR, this.exact)
        assert objective.teacher is (this.exact if name == "lmd" else None)
