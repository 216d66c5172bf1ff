"""The named solvers: their orders, the classical Runge-Kutta method, and what a tableau says of the cost."""

from __future__ import annotations

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.solvers.cases import P, X, exact_mean, solved, velocity


@pytest.mark.parametrize(
    ("solver", "order", "counts", "evaluations"),
    [
        ("rk4", 4, (8, 16, 32), lambda steps: 4 * steps),
        pytest.param("dopri5", 5, (16, 20, 24, 28, 32), lambda steps: 6 * steps + 1, marks=pytest.mark.slow),
        pytest.param("midpoint", 2, (8, 12, 16, 24, 32), lambda steps: 2 * steps, marks=pytest.mark.slow),
    ],
)
def test_order_of_convergence_in_the_number_of_steps(solver, order, counts, evaluations):
    want = exact_mean(P, 0.8, 0.1, X)
    errors = []
    for steps in counts:
        v, stats = solved(solver, steps=steps)(P, 0.8, 0.1, X)
        errors.append(float(jnp.max(jnp.abs(v - want))))
        assert int(stats.nfe) == evaluations(steps)
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.2, slope


def test_rk4_is_the_classical_method():
    f = lambda t, x: velocity(P, t, x)  # noqa: E731
    h, t, x = 0.35, 0.1, X
    for _ in range(2):
        k1 = f(t, x)
        k2 = f(t + h / 2, x + h / 2 * k1)
        k3 = f(t + h / 2, x + h / 2 * k2)
        k4 = f(t + h, x + h * k3)
        t, x = t + h, x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    v, _ = solved("rk4", steps=2)(P, 0.1, 0.8, X)
    np.testing.assert_allclose(X + 0.7 * v, x, rtol=1e-14)


def test_solvers_that_users_write_are_counted_by_their_tableau_or_not_at_all():
    class Heun3(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([1 / 3, 2 / 3]),
            b_sol=np.array([0.25, 0.0, 0.75]),
            b_error=np.zeros(3),
            a_lower=(np.array([1 / 3]), np.array([0.0, 2 / 3])),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    class Twice(diffrax.Euler):
        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            half = t0 + 0.5 * (t1 - t0)
            middle = super().step(terms, t0, half, y0, args, solver_state, made_jump)[0]
            return super().step(terms, half, t1, middle, args, solver_state, made_jump)

    v, stats = solved(Heun3(), steps=40)(P, 0.1, 0.8, X)
    assert int(stats.nfe) == 120
    np.testing.assert_allclose(v, exact_mean(P, 0.1, 0.8, X), rtol=1e-5)
    v, stats = solved(Twice(), steps=20)(P, 0.1, 0.8, X)
    assert stats.nfe is None and int(stats.steps) == 20
    np.testing.assert_allclose(v, solved("euler", steps=40)(P, 0.1, 0.8, X)[0], rtol=1e-12)
