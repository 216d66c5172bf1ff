"""The arrays of a checkpoint against those that are expected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from jflow.training import restore_params
from tests.training import runs


def restored(problem, out, *arguments, **options):
    runs.train(problem, out)
    return restore_params(out, *arguments, **options)


# Reads that fail leave others under way, which report to an event loop that has ended.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.again(
                p,
                d,
                state=runs.state(
                    p,
                    params={**p.params, "out": jax.tree.map(jnp.ones_like, p.params["out"])}
                    | {"hidden": {"kernel": jnp.zeros((3, 9), jnp.float32), "bias": jnp.zeros((8,), jnp.float32)}},
                ),
            ),
            ValueError,
            r"nothing is cast\): params/hidden/kernel is float32\[3, 8\], expected float32\[3, 9\]",
            id="resumed with another network",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, state=runs.state(p, optimizer=optax.sgd(0.1))),
            ValueError,
            r"^the checkpoint has another structure: it lacks \[\] and has beside \['opt_state/",
            id="resumed with another optimizer",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, state=runs.state(p, ema=(0.999,))),
            ValueError,
            r"another structure: it lacks \['ema/0\.999/hidden/bias'.* has beside \['ema/0\.9/hidden/bias'",
            id="resumed with another average",
        ),
        pytest.param(
            lambda d, p: runs.saved(d, runs.state(p, params={"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})),
            ValueError,
            "^state: two leaves are called params/a/b; keys must not contain '/'$",
            id="names that run together",
        ),
        pytest.param(
            lambda d, p: restored(p, d, template=p.params["out"]),
            ValueError,
            r"another structure: it lacks \['params/bias', 'params/kernel'\] and has beside \['params/hidden/bias'",
            id="parameters of another network",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
