"""Subjects by the name of a function and from a run's directory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import bases, comparison, training
from jflow.comparison import subjects


def test_a_run_whose_config_names_no_function(a_run):
    with training.Checkpoints(a_run / "checkpoints", config={}, overwrite=True) as checkpoints:
        state = training.init_state({"shift": jnp.float32(1.0)}, optax.sgd(0.1), jax.random.key(0))
        checkpoints.save(state)
    with pytest.raises(ValueError, match="make: expected a function 'module:function', which the config in"):
        comparison.from_run(a_run)


def test_base_points_are_those_of_the_base_shaped_like_the_event():
    event = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float64)}
    velocity = lambda params, t, x, cond=None, *, key=None: x  # noqa: E731
    noise = comparison.Subject(velocity, None, event, base=bases.Normal(5.0, 0.01)).noise(jax.random.key(0), 4)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in noise.items()} == {
        "a": ((4, 2), jnp.float32),
        "b": ((4,), jnp.float64),
    }
    np.testing.assert_allclose(noise["b"], 5.0, atol=0.1)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: subjects.load("tiny_subject"), ValueError, "make: expected a function by name, as 'module:function'"),
        (lambda: subjects.load("tiny_subject:nothing"), ValueError, "make: expected a function that can be imported"),
        (lambda: subjects.load("tiny_subject:EVENT"), TypeError, "make tiny_subject:EVENT: expected a function"),
        (lambda: subjects.load("tiny_subject:wrong"), TypeError, "make tiny_subject:wrong: .* returns comparison.Subj"),
        (lambda: subjects.find("tiny_subject:make", average="slow"), ValueError, "make, average: expected None"),
    ],
)
def test_wrong_names_are_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.usefixtures("tiny")
def test_a_function_is_found_by_its_name():
    assert subjects.find("tiny_subject:make").params == {"shift": 0.5}
    assert subjects.load("tiny_subject:of_run", {"scale": 3.0}).scale == 3.0
