"""The checks of a method: they pass for a right one, and fail for planted faults with a message that says why."""

import dataclasses
import re

import jax
import pytest

from jflow import identities, interpolants, objectives, testing

LINEAR = interpolants.linear()


def of(residual, like="mean_flow", **declared):
    """The row of another method, with this residual."""

    def constructor(flow_map, interpolant, **choices):
        term = objectives.Term("own", residual, ("velocity",))
        return objectives.Objective("own", flow_map, interpolant, term, **choices)

    return dataclasses.replace(objectives.METHODS[like], constructor=constructor, **declared)


def eulerian(stop="target", factor=1.0):
    def residual(row):
        derivative = identities.scaled(identities.forward_mode, factor)
        return identities.eulerian(row.own.v, row.s, row.t, row.x, row.conditional, stop=stop, derivative=derivative)

    return of(residual)


def test_a_right_method_passes():
    testing.check_stationary(eulerian(), LINEAR)


@pytest.mark.parametrize(
    "method",
    [
        eulerian(factor=-1.0),
        eulerian(stop="none"),
        # The pair's velocity at s is not the velocity of the flow at t.
        of(lambda row: identities.lagrangian(row.own.v, row.s, row.t, row.x, lambda t, x: row.conditional)),
    ],
    ids=["wrong sign of the time derivative", "no stop-gradient", "conditional velocity in the Lagrangian identity"],
)
def test_a_wrong_method_is_not_stationary(method):
    with pytest.raises(AssertionError, match="expected at most 1e-12: the exact map is not stationary"):
        testing.check_stationary(method, LINEAR, forms=("v",))


def test_a_method_that_declares_too_much_fails():
    """Consistency training at a finite step is not exact."""
    wrong = dataclasses.replace(objectives.METHODS["consistency_training"], stationary="exact", at=None)
    with pytest.raises(AssertionError, match="should declare stationary"):
        testing.check_stationary(wrong, LINEAR, forms=("v",))
    wrong = dataclasses.replace(objectives.METHODS["consistency_training"], order=2)
    with pytest.raises(AssertionError, match="not of the declared order 2"):
        testing.check_stationary(wrong, LINEAR, forms=("v",))


def test_a_residual_that_is_always_zero_fails():
    method = of(lambda row: identities.Residual(row.own.v(row.s, row.t, row.x), row.own.v(row.s, row.t, row.x)))
    with pytest.raises(AssertionError, match="the loss does not notice an error of the map"):
        testing.check_stationary(method, LINEAR, forms=("v",))


def test_a_report_without_a_tangent_fails():
    def residual(row):
        return identities.semigroup(row.own.v, row.s, row.t, row.x, 0.5)._replace(tangent=0.0 * row.x)

    with pytest.raises(AssertionError, match="own/tangent_norm: got 0, expected more than 0"):
        testing.check_report(of(residual))


@pytest.mark.representatives("less")
@pytest.mark.parametrize("cost", [{"forward": 2, "backward": 1}, {"forward": 4, "backward": 1}], ids=["less", "more"])
def test_a_wrong_cost_fails(cost):
    wrong = dataclasses.replace(objectives.METHODS["psd_m"], cost=cost)
    with pytest.raises(AssertionError, match=re.escape(f"times the declared {cost}")):
        testing.check_cost(wrong)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"method: expected an objectives\.Method"):
        testing.check_method("lsd")
    with pytest.raises(TypeError, match="interpolant: expected an Interpolant"):
        testing.check_stationary(objectives.METHODS["lsd"], "linear")
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="jax_enable_x64: expected True, got False"):
        testing.check_method(objectives.METHODS["lsd"])
