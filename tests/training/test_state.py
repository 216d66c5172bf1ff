"""The state of a training run."""

from __future__ import annotations

import jax
import pytest

from tests.training import runs


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda p: runs.state(p, optimizer=1e-3),
            TypeError,
            "^optimizer: expected an optax GradientTransformation, .*got float$",
            id="a learning rate as the optimizer",
        ),
        pytest.param(
            lambda p: runs.state(p._replace(params={"net": {"act": jax.nn.gelu}})),
            TypeError,
            r"^params\['net'\]\['act'\]: expected an array, got .*; pass the arrays of a module alone",
            id="a function among the parameters",
        ),
        pytest.param(
            lambda p: runs.state(p, key=0),
            TypeError,
            r"^key: expected one typed PRNG key from jax\.random\.key, got int 0$",
            id="a number as the key",
        ),
        pytest.param(
            lambda p: runs.state(p, key=jax.random.PRNGKey(0)),
            TypeError,
            r"^key: expected one typed PRNG key from jax\.random\.key, got ArrayImpl \[0 0\]$",
            id="a raw key",
        ),
        pytest.param(
            lambda p: runs.state(p, key=jax.random.split(jax.random.key(0), 8)),
            TypeError,
            r"^key: expected one typed PRNG key from jax\.random\.key, got PRNGKeyArray Array\(\(8,\)",
            id="a key for each device",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
