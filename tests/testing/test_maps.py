"""The checks of an exact map and of an oracle: they pass for right ones (tests/oracles), and fail for planted faults."""

import dataclasses

import jax
import numpy as np
import pytest

from jflow import bases, interpolants, oracles, testing, types

PATH = interpolants.linear()
ORACLE = oracles.gaussian(PATH)
PARAMS = oracles.gaussian_params(np.array([0.7, -1.1]), np.array([[0.6, 0.25], [0.25, 0.3]]))


def test_an_oracle_with_a_base_of_its_own_passes():
    base = bases.Normal(0.4, 1.5)
    testing.check_oracle(oracles.gaussian(PATH, base=base), PARAMS, solve_tolerance=None)


def off_by_one_per_cent(params, s, t, x, cond=None, *, key=None):
    return 1.01 * ORACLE.flow_map.mean_velocity(params, s, t, x)


def off_beside_the_diagonal(params, s, t, x, cond=None, *, key=None):
    return ORACLE.flow_map.mean_velocity(params, s, t, x) + 1e-3 * (t - s) * np.ones(2)


class WrongScore(oracles.Oracle):
    def score(self, params, t, x):
        return 1.01 * super().score(params, t, x)


class WrongVelocity(oracles.Oracle):
    def velocity(self, params, t, x, cond=None, *, key=None):
        return super().velocity(params, t, x) + 1e-3


def of(kind=oracles.Oracle, mean_velocity=None):
    flow_map = ORACLE.flow_map if mean_velocity is None else types.FlowMap(mean_velocity, types.BOTH)
    return kind("own", PATH, flow_map)


@pytest.mark.representatives("1 %", "velocity")
@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (of(mean_velocity=off_by_one_per_cent), "error of velocity: .*not that of the flow"),
        (of(mean_velocity=off_beside_the_diagonal), "residual: .*the map is not the flow of the velocity"),
        (of(WrongScore), "the score is not the gradient of the log-density"),
        (of(WrongVelocity), "the velocity does not carry the density"),
    ],
    ids=["1 %", "off the diagonal", "score", "velocity"],
)
def test_a_wrong_oracle_fails(oracle, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_oracle(oracle, PARAMS, solve_tolerance=None)


def test_a_map_with_a_wrong_jump_or_of_another_velocity_fails():
    rows = np.array([0.2, 0.5, 0.0]), np.array([0.7, 0.5, 1.0]), np.array([[0.3, 0.1], [-1.0, 0.4], [0.2, 0.9]])
    wrong = dataclasses.replace(
        ORACLE.flow_map, jump_override=lambda p, s, t, x, cond=None, *, key=None: x + 1.01 * (t - s)
    )
    with pytest.raises(AssertionError, match="jump is not x"):
        testing.check_flow_map(wrong, PARAMS, *rows, solve_tolerance=None)
    # The identity is a flow, of the velocity zero.
    still = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: 0.0 * x, types.BOTH)
    testing.check_flow_map(still, PARAMS, *rows, solve_tolerance=None)
    with pytest.raises(AssertionError, match="the map's velocity is not that of the flow"):
        testing.check_flow_map(still, PARAMS, *rows, velocity=ORACLE.velocity, solve_tolerance=None)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"oracle: expected an oracles\.Oracle"):
        testing.check_oracle("gaussian", PARAMS)
    forward = dataclasses.replace(ORACLE.flow_map, domain=types.FORWARD)
    with pytest.raises(ValueError, match=r"s, t: expected times within the domain, 0 <= s <= t <= 1, got 0.7, 0.2"):
        testing.check_flow_map(forward, PARAMS, [0.7], [0.2], np.ones((1, 2)))
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="jax_enable_x64"):
        testing.check_oracle(ORACLE, PARAMS)
