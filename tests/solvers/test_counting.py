"""Counts of evaluations against a counter in the velocity, each sample's own under vmap."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import pytest

from jflow import solvers
from tests.solvers.cases import CLIPPED, GRID, P, X, counted_velocity, velocity


@pytest.mark.representatives("heun-choices3-True")
@pytest.mark.parametrize(
    ("solver", "choices", "counted"),
    [
        # Of fixed steps: test_methods counts those of rk4, and test_ode those of tsit5.
        pytest.param("rk4", {"steps": 5}, True, marks=pytest.mark.slow),
        pytest.param("dopri5", {"steps": 5}, True, marks=pytest.mark.slow),
        pytest.param("dopri5", {"rtol": 1e-7}, True, marks=pytest.mark.slow),
        ("heun", {"stepsize_controller": diffrax.PIDController(1e-3, 1e-3)}, True),
        pytest.param(diffrax.Bosh3(), {"rtol": 1e-4}, True, marks=pytest.mark.slow),
        pytest.param(
            diffrax.Tsit5(),
            {"stepsize_controller": diffrax.PIDController(1e-7, 1e-7, pcoeff=0.3, icoeff=0.4, dtmax=0.05)},
            True,
            marks=pytest.mark.slow,
        ),
        (diffrax.Tsit5(), {"stepsize_controller": CLIPPED}, True),
        pytest.param("dopri8", {"stepsize_controller": CLIPPED}, True, marks=pytest.mark.slow),
        pytest.param("tsit5", {"stepsize_controller": GRID}, True, marks=pytest.mark.slow),
        (diffrax.LeapfrogMidpoint(), {"steps": 6}, True),
        pytest.param(diffrax.ReversibleHeun(), {"steps": 6}, True, marks=pytest.mark.slow),
        pytest.param(
            diffrax.ReversibleHeun(),
            {"stepsize_controller": diffrax.ClipStepSizeController(diffrax.PIDController(1e-3, 1e-3), jump_ts=[0.5])},
            True,
            marks=pytest.mark.slow,
        ),
        (diffrax.HalfSolver(diffrax.Euler()), {"rtol": 1e-2}, True),
        pytest.param(
            diffrax.HalfSolver(diffrax.Tsit5()),
            {"stepsize_controller": CLIPPED, "adjoint": "recursive"},
            True,
            marks=pytest.mark.slow,
        ),
        (diffrax.Kvaerno3(), {"rtol": 1e-4}, False),
    ],
)
def test_evaluations_are_counted_exactly_or_not_at_all(solver, choices, counted):
    """Against a counter in the velocity, which is stiff enough for rejections from the first step on."""
    calls, counting = counted_velocity()
    _, stats = jax.jit(solvers.solve_counted(counting, solver, **choices))(P, jnp.asarray(0.0), jnp.asarray(1.0), X)
    jax.block_until_ready(stats)
    assert bool(stats.success)
    assert (stats.nfe is not None) == counted
    if counted:
        assert int(stats.nfe) == len(calls)
    fixed = "steps" in choices or choices.get("stepsize_controller") is GRID
    assert (int(stats.rejected) == 0) == fixed


@pytest.mark.slow
def test_counts_are_each_samples_own_under_vmap():
    counted = solvers.solve_counted(velocity, diffrax.Dopri5(), stepsize_controller=CLIPPED)
    batch = jnp.asarray([[0.01], [0.9], [1.3]])
    _, stats = jax.jit(jax.vmap(counted, (None, None, None, 0)))(P, 0.0, 1.0, batch)
    one = jax.jit(counted)
    alone = [int(one(P, 0.0, 1.0, x)[1].nfe) for x in batch]
    assert stats.nfe.tolist() == alone and len(set(alone)) > 1
