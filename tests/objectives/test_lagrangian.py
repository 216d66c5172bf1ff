"""Lagrangian self-distillation by finite differences."""

import jax
import numpy as np

from tests.objectives.cases import PARAMS, batch_of, make

clone = jax.random.clone


def test_the_finite_difference_of_lsd_tends_to_its_derivative(key):
    from jflow import identities

    batch = batch_of(8)
    run = lambda **choices: jax.jit(make("lsd", diagonal=0.0, **choices))(PARAMS, clone(key), batch)[0]  # noqa: E731
    exact = run()
    errors = [np.abs(run(derivative=identities.finite_difference(h)) - exact).max() for h in (1e-2, 1e-3)]
    assert 8 < errors[0] / errors[1] < 12  # first order
