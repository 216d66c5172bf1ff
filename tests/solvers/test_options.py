"""Solvers, controllers and adjoints of Diffrax, against dx/dt = p (1 + 2t)(1 + x^2), whose solution is a tangent."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

from jflow import solvers
from tests.solvers.cases import CLIPPED, GRID, PID, P, X, exact_mean, solved, velocity

ROOT = diffrax.VeryChord(rtol=1e-4, atol=1e-4, norm=optimistix.rms_norm)


@pytest.mark.representatives("controller")
@pytest.mark.parametrize(
    ("named", "own"),
    [
        (("tsit5", {"rtol": 1e-7}), (diffrax.Tsit5(), {"stepsize_controller": PID})),
        (("dopri5", {"rtol": 1e-7}), (diffrax.Dopri5(), {"rtol": 1e-7, "adjoint": diffrax.ForwardMode()})),
        (("heun", {"steps": 8}), (diffrax.Heun(), {"steps": 8, "stepsize_controller": diffrax.ConstantStepSize()})),
        (("euler", {"steps": 8}), (diffrax.Euler(), {"steps": 8, "adjoint": diffrax.DirectAdjoint()})),
        (("tsit5", {"steps": 4}), ("tsit5", {"stepsize_controller": diffrax.StepTo(jnp.linspace(0.0, 1.0, 5))})),
        (("tsit5", {"rtol": 1e-7}), (None, {"options": solvers.Options("tsit5", rtol=1e-7)})),
    ],
    ids=["controller", "adaptive", "constant", "fixed", "grid", "options"],
)
def test_a_name_and_the_object_it_names_give_the_same(named, own):
    a, b = (solved(solver, **choices)(P, 0.1, 0.8, X) for solver, choices in (named, own))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-13)
    assert [int(each) for each in a[1]] == [int(each) for each in b[1]]


# Both go through adjoints.make, which test_adjoints tests.
@pytest.mark.slow
@pytest.mark.parametrize(
    "adjoint",
    ["direct", "recursive", "backsolve"],
)
def test_an_adjoint_and_its_name_give_the_same_gradient(adjoint):
    object_ = {
        "direct": diffrax.DirectAdjoint(),
        "recursive": diffrax.RecursiveCheckpointAdjoint(checkpoints=4),
        "backsolve": diffrax.BacksolveAdjoint(),
    }[adjoint]

    def slope(adjoint):
        flow = solvers.solve(velocity, "rk4", steps=32, adjoint=adjoint)
        return jax.jit(jax.grad(lambda p: jnp.sum(flow.mean_velocity(p, 0.1, 0.8, X))))(P)

    want = jax.jit(jax.grad(lambda p: jnp.sum(exact_mean(p, 0.1, 0.8, X))))(P)
    by_object = slope(object_)
    np.testing.assert_allclose(slope(adjoint), by_object, rtol=1e-12)
    np.testing.assert_allclose(by_object, want, rtol=1e-6)


@pytest.mark.representatives("implicit, fixed")
@pytest.mark.parametrize(
    ("solver", "choices"),
    [
        pytest.param(diffrax.Kvaerno5(), {"rtol": 1e-7}, marks=pytest.mark.slow),
        (diffrax.Kvaerno3(root_finder=ROOT), {"steps": 40}),
        pytest.param(diffrax.ReversibleHeun(), {"rtol": 1e-6}, marks=pytest.mark.slow),
        pytest.param(
            diffrax.HalfSolver(diffrax.Midpoint()), {"rtol": 1e-6, "adjoint": "recursive"}, marks=pytest.mark.slow
        ),
        ("dopri8", {"stepsize_controller": CLIPPED}),
    ],
    ids=["implicit", "implicit, fixed", "reversible", "half", "clipped"],
)
def test_other_solvers_reach_the_exact_end(solver, choices):
    solve = solved(solver, **choices)
    for s, t in ((0.1, 0.8), (0.8, 0.1)):
        v, stats = solve(P, s, t, X)
        assert bool(stats.success)
        np.testing.assert_allclose(v, exact_mean(P, s, t, X), atol=1e-4)


@pytest.mark.representatives("fixed")
@pytest.mark.parametrize(
    "choices",
    [
        {"solver": diffrax.Bosh3(), "rtol": 1e-9},
        {"solver": "rk4", "steps": 12},
        {"solver": "dopri5", "stepsize_controller": PID},
        {"solver": diffrax.Tsit5(), "rtol": 1e-8},
    ],
    ids=["bosh3", "fixed", "dopri5", "interpolated"],
)
def test_trajectories_of_objects_pass_through_the_exact_states(choices):
    times = jnp.asarray([0.05, 0.3, 0.35, 1.0])
    states = jax.jit(lambda times: solvers.trajectory(velocity, P, times, X, **choices))(times)
    want = jnp.stack([X] + [X + (t - times[0]) * exact_mean(P, times[0], t, X) for t in times[1:]])
    np.testing.assert_allclose(states, want, atol=1e-6)


def test_eager_calls_with_objects_compile_once():
    traces = []

    def traced(params, t, x, cond=None, *, key=None):
        traces.append(1)
        return velocity(params, t, x)

    flow = solvers.solve(traced, diffrax.Tsit5(), stepsize_controller=diffrax.PIDController(1e-5, 1e-5))
    flow.mean_velocity(P, 0.1, 0.8, X)
    once = len(traces)
    flow.mean_velocity(P, 0.8, 0.1, 2 * X)
    assert len(traces) == once


# ---- refusals ----

HALF = diffrax.HalfSolver(diffrax.Tsit5())


@pytest.mark.parametrize(
    ("solver", "choices", "error", "message"),
    [
        (diffrax.Tsit5, {}, TypeError, r"solver: .*instance.*the class Tsit5; an instance is Tsit5\(...\)"),
        (3.0, {}, TypeError, "solver: expected a name or an instance of diffrax.AbstractSolver, got float 3.0"),
        ("Tsit5", {}, ValueError, "solver: expected one of 'euler'.*got 'Tsit5'"),
        ("rk4", {}, ValueError, "steps: .*'rk4'.*None"),
        (diffrax.Euler(), {}, ValueError, "steps: .*'Euler'.*None"),
        ("rk4", {"stepsize_controller": PID}, ValueError, "stepsize_controller: .*'rk4'.*no error.*PIDController"),
        ("midpoint", {"stepsize_controller": PID}, ValueError, "stepsize_controller: .*'midpoint'"),
        (diffrax.Euler(), {"stepsize_controller": CLIPPED}, ValueError, "stepsize_controller: .*'Euler'"),
        (
            "tsit5",
            {"stepsize_controller": PID, "rtol": 1e-3},
            ValueError,
            "rtol: .*stepsize_controller .PIDController.",
        ),
        ("tsit5", {"stepsize_controller": PID, "atol": 1e-3}, ValueError, "atol: .*stepsize_controller"),
        ("tsit5", {"stepsize_controller": PID, "steps": 3}, ValueError, "steps: .*PIDController, got 3"),
        ("tsit5", {"stepsize_controller": GRID, "steps": 3}, ValueError, "steps: .*StepTo, got 3"),
        ("tsit5", {"stepsize_controller": GRID, "rtol": 1e-3}, ValueError, "rtol: .*StepTo"),
        ("heun", {"stepsize_controller": diffrax.ConstantStepSize()}, ValueError, "steps: .*ConstantStepSize needs"),
        (
            "tsit5",
            {"stepsize_controller": diffrax.PIDController},
            TypeError,
            "stepsize_controller: .*class PIDController",
        ),
        ("tsit5", {"stepsize_controller": "pid"}, TypeError, "stepsize_controller: .*str 'pid'"),
        (
            "euler",
            {"stepsize_controller": diffrax.StepTo(jnp.asarray([0.0, 0.5]))},
            ValueError,
            "stepsize_controller: .*StepTo.*from 0 to 1",
        ),
        (
            "euler",
            {"stepsize_controller": diffrax.StepTo(jnp.asarray([0.0, 0.5, 0.5, 1.0]))},
            ValueError,
            "stepsize_controller: .*StepTo",
        ),
        ("tsit5", {"adjoint": diffrax.DirectAdjoint}, TypeError, "adjoint: .*the class DirectAdjoint"),
        (
            "tsit5",
            {"adjoint": 1},
            TypeError,
            "adjoint: expected a name or an instance of diffrax.AbstractAdjoint, got int",
        ),
        ("tsit5", {"adjoint": "reverse"}, ValueError, "adjoint: .*'forward'"),
        ("tsit5", {"adjoint": diffrax.ImplicitAdjoint()}, ValueError, "adjoint: .*ImplicitAdjoint"),
        ("tsit5", {"adjoint": "backsolve", "stepsize_controller": GRID}, ValueError, "adjoint: .*StepTo"),
        (HALF, {"rtol": 1e-3}, ValueError, "adjoint: .*HalfSolver.*ForwardMode"),
        (HALF, {"steps": 4}, ValueError, "solver: .*HalfSolver"),
        (diffrax.SemiImplicitEuler(), {"steps": 4}, ValueError, "solver: .*one ODE term.*SemiImplicitEuler"),
        (diffrax.KenCarp3(), {"rtol": 1e-3}, ValueError, "solver: .*one ODE term.*KenCarp3"),
        (diffrax.SRA1(), {"steps": 4}, ValueError, "solver: .*one ODE term.*SRA1"),
        (diffrax.Kvaerno3(), {"steps": 4}, ValueError, "solver: .*root finder.*Kvaerno3"),
        ("tsit5", {"max_steps": None}, TypeError, "max_steps: "),
        (None, {"options": "heun"}, TypeError, "options: expected solvers.Options, got str"),
        ("heun", {"options": solvers.Options(), "steps": 3}, ValueError, "options: .*got solver, steps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(solver, choices, error, message):
    with pytest.raises(error, match=message):
        solvers.solve(velocity, solver, **choices)


def test_a_misspelt_choice_is_refused():
    with pytest.raises(TypeError, match=r"rtoll: expected one of the choices solver, steps, rtol"):
        solvers.solve(velocity, "tsit5", rtoll=1e-3)


def test_a_controllers_tolerances_are_held_against_the_dtype():
    flow = solvers.solve(velocity, stepsize_controller=diffrax.PIDController(1e-9, 1e-9))
    with pytest.raises(ValueError, match=r"rtol: .*float32"):
        flow.mean_velocity(jnp.float32(0.2), 0.0, 1.0, X.astype(jnp.float32))


def test_options_keep_defaults_of_the_caller_unless_given():
    assert solvers.choose(None, {}, max_steps=7).max_steps == 7
    assert solvers.choose(None, {"max_steps": 9}, max_steps=7).max_steps == 9
    given = solvers.Options("heun", steps=2)
    assert solvers.choose(None, {"options": given}, max_steps=7) is given
    assert given.has_reverse and not solvers.Options().has_reverse
    assert solvers.Options(adjoint="recursive").has_reverse
    assert not solvers.Options(adjoint=diffrax.ForwardMode()).has_reverse
