"""The check of a path: it passes for a right one (tests/test_interpolants.py), and fails for planted faults."""

import dataclasses

import jax
import pytest

from jflow import interpolants, testing
from jflow.interpolants import Interpolant

LINEAR = interpolants.linear()


class WrongSlope(Interpolant):
    """beta_dot is off by one per cent."""

    def beta_dot(self, t):
        return 1.01 * super().beta_dot(t)


WRONG = {
    "beta_dot": (WrongSlope(LINEAR.name, LINEAR.alpha, LINEAR.beta, LINEAR.alpha_dd, LINEAR.beta_dd), "beta_dot: "),
    "beta_dd": (dataclasses.replace(LINEAR, beta_dd=lambda s, t: 1.01 + 0.0 * (t - s)), "beta_dd: "),
    "a quotient": (
        dataclasses.replace(LINEAR, beta_dd=lambda s, t: (LINEAR.beta(t) - LINEAR.beta(s)) / (t - s)),
        "beta_dd.*: .*nan",
    ),
    "ends": (dataclasses.replace(LINEAR, endpoints=(1.0, 0.1, 0.0, 1.0)), "alpha_0, beta_0, alpha_1, beta_1"),
    "a singular end": (interpolants.cosine(epsilon=0.0), None),
    "an undeclared singular end": (
        dataclasses.replace(interpolants.cosine(epsilon=0.0), singular=()),
        "got nan|got inf|not finite",
    ),
}


@pytest.mark.representatives("beta_dd", "a singular end", "ends")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_path_fails(name):
    path, message = WRONG[name]
    if message is None:
        testing.check_interpolant(path)
        return
    with pytest.raises(AssertionError, match=message):
        testing.check_interpolant(path)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="interpolant: expected an Interpolant"):
        testing.check_interpolant("linear")
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="jax_enable_x64"):
        testing.check_interpolant(LINEAR)
