"""The velocity with an exact solution, and the controllers, that the tests of this folder share."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jflow import solvers

P, X = jnp.asarray(0.2), jnp.asarray([-0.7, 0.2, 0.9])
PID = diffrax.PIDController(rtol=1e-7, atol=1e-7)
CLIPPED = diffrax.ClipStepSizeController(PID, step_ts=[0.3], jump_ts=[0.25, 0.5])
GRID = diffrax.StepTo(jnp.asarray([0.0, 0.1, 0.5, 1.0]))


def velocity(params, t, x, cond=None, *, key=None):
    return params * (1.0 + 2.0 * t) * (1.0 + x * x)


def exact_mean(p, s, t, x):
    return (jnp.tan(jnp.arctan(x) + p * (t + t * t - s - s * s)) - x) / (t - s)


def solved(solver=None, **choices):
    return jax.jit(solvers.solve_counted(velocity, solver, **choices))


def counted_velocity():
    """The times at which the velocity is called, and the velocity, which is stiff enough for rejections."""
    calls = []

    def count(t):
        calls.append(float(t))
        return np.zeros_like(t)

    def counting(params, t, x, cond=None, *, key=None):
        # The zero is part of the value, so that no call can be dropped.
        zero = jax.pure_callback(count, jax.ShapeDtypeStruct((), t.dtype), t)
        return 5.0 * jnp.sin(40.0 * t * t) * x + params * (1.0 + x * x) + zero

    return calls, counting
