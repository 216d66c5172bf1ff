"""Calls of an objective that is a plain function: its state, and the checks of what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import types
from jflow.objectives import calling

BATCH = types.Batch(np.zeros((3, 2)))


def call(result, state=()):
    key = jax.random.key(0)
    return calling.call(lambda *_: result, 1.0, key, BATCH, types.Context(state=state))


def test_the_initial_state_is_that_of_init_or_empty():
    class Stateful:
        def init(self, key, params):
            return {"key": key, "twice": 2 * params}

        def __call__(self, params, key, batch, context):
            raise AssertionError

    key = jax.random.key(3)
    assert calling.init(lambda params, key, batch, context: None, key, 2.0) == ()
    state = calling.init(Stateful(), key, 2.0)
    assert state["key"] is key and state["twice"] == 4.0


def test_a_mapping_of_metrics_keeps_the_state_and_an_aux_replaces_it():
    loss, metrics = jnp.arange(3.0), {"size": 3}
    found, aux = call((loss, metrics), state="before")
    assert found is loss and aux == types.Aux("before", metrics) and aux.metrics is not metrics
    after = types.Aux("after", metrics)
    assert call((loss, after), state="before") == (loss, after)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (np.zeros(3), TypeError, r"objective: expected it to return \(loss \[B\], Aux\) .* got ndarray"),
        ((np.zeros(3), 0.0), TypeError, r"objective: expected it to return \(loss \[B\], Aux\)"),
        ((np.zeros(3), {}, {}), TypeError, r"objective: expected it to return \(loss \[B\], Aux\)"),
        ((np.zeros(()), {}), ValueError, r"objective: expected a loss of shape \[B\], got \(\)"),
        ((np.zeros((3, 1)), {}), ValueError, r"objective: expected a loss of shape \[B\], got \(3, 1\)"),
    ],
)
def test_what_an_objective_must_not_return_is_refused(result, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(result)


def test_what_is_no_objective_or_no_key_is_refused():
    objective = lambda params, key, batch, context: (np.zeros(3), {})  # noqa: E731
    with pytest.raises(TypeError, match=r"^objective: expected"):
        calling.init(3.0, jax.random.key(0), 1.0)
    with pytest.raises(TypeError, match=r"^objective: expected"):
        calling.init(lambda params, key: None, jax.random.key(0), 1.0)
    for run in (calling.init, lambda f, key, params: calling.call(f, params, key, BATCH, types.Context())):
        with pytest.raises(TypeError, match=r"^key: expected a PRNG key"):
            run(objective, 0, 1.0)
