"""Densities, likelihood objectives and encoding take the options of a solve, and pass them on."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, likelihood, samplers, solvers, types

RATE, X = jnp.asarray(0.7), jnp.asarray([0.3, -1.2])
PID = diffrax.PIDController(1e-9, 1e-9)


def linear(params, t, x, cond=None, *, key=None):
    return params * x


@pytest.mark.representatives("options")
@pytest.mark.parametrize(
    "choices",
    [
        {"solver": "rk4", "steps": 32},
        {"solver": diffrax.Dopri5(), "stepsize_controller": PID},
        pytest.param({"solver": diffrax.Kvaerno5(), "rtol": 1e-8}, marks=pytest.mark.slow),
        {"options": solvers.Options("tsit5", rtol=1e-9)},
    ],
    ids=["rk4", "controller", "implicit", "options"],
)
def test_a_density_along_any_solver(choices):
    density = likelihood.along_ode(linear, **choices)
    found = jax.jit(density.log_density)(RATE, X)
    np.testing.assert_allclose(found.x0, X * jnp.exp(-RATE), rtol=1e-6)
    want = bases.STANDARD_NORMAL.log_density(X * jnp.exp(-RATE)) - 2 * RATE
    np.testing.assert_allclose(found.log_density, want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "counted"),
    [
        pytest.param({"solver": "rk4", "steps": 16}, True, marks=pytest.mark.slow),
        pytest.param(
            {"solver": diffrax.Dopri5(), "adjoint": diffrax.RecursiveCheckpointAdjoint(), "rtol": 1e-7},
            True,
            marks=pytest.mark.slow,
        ),
        ({"options": solvers.Options("heun", steps=64, adjoint="recursive")}, True),
        pytest.param({"solver": diffrax.Kvaerno3(), "rtol": 1e-5}, False, marks=pytest.mark.slow),
    ],
    ids=["rk4", "adjoint", "options", "implicit"],
)
def test_a_likelihood_objective_with_any_solver(choices, counted):
    objective = likelihood.maximum_likelihood(linear, **choices)
    batch = types.Batch(jnp.stack([X, 2 * X]))

    def mean(rate):
        loss, info = objective(rate, jax.random.key(0), batch)
        return jnp.mean(loss), info

    slope, info = jax.jit(jax.grad(mean, has_aux=True))(RATE)
    # Of the mean of 2 rate + |x|^2 exp(-2 rate) / 2, over x and twice x.
    want = 2.0 - 2.5 * np.sum(np.square(X)) * np.exp(-2 * RATE)
    np.testing.assert_allclose(slope, want, rtol=1e-3)
    assert ("likelihood/nfe" in info.metrics) == counted


@pytest.mark.parametrize("adjoint", [diffrax.ForwardMode(), "forward"])
def test_a_likelihood_objective_refuses_an_adjoint_without_reverse_mode(adjoint):
    with pytest.raises(ValueError, match=r"adjoint: .*reverse mode.*'recursive'"):
        likelihood.maximum_likelihood(linear, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"adjoint: .*reverse mode"):
        likelihood.maximum_likelihood(linear, options=solvers.Options(adjoint=adjoint))


def test_encoding_solves_as_it_is_told():
    bound = types.FlowMap(lambda p, s, t, x, c=None, *, key=None: p * x, types.FORWARD, velocity_override=linear).bind(
        RATE
    )
    with pytest.warns(UserWarning, match="no backward direction"):
        back = samplers.encode(bound, X, [1.0, 0.0], solver="euler", steps=4)
    np.testing.assert_allclose(back, X * (1.0 - RATE / 4) ** 4, rtol=1e-12)


@pytest.mark.slow
def test_the_gradient_through_a_default_density_names_adjoint():
    density = likelihood.along_ode(linear)
    with pytest.raises(ValueError, match=r"^adjoint: .*no reverse mode"):
        jax.jit(jax.grad(lambda rate: density.log_density(rate, X).log_density))(RATE)
    density = likelihood.along_ode(linear, solver="rk4", steps=32, adjoint="recursive")
    slope = jax.jit(jax.grad(lambda rate: density.log_density(rate, X).log_density))(RATE)
    np.testing.assert_allclose(slope, jnp.sum((X * jnp.exp(-RATE)) ** 2) - 2.0, rtol=1e-6)
