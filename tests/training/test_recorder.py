"""What a run writes into its rows, and the errors that it ends with."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jflow.training import Evaluation, NonFiniteError
from tests.training import runs


def with_nan(problem, out, first=True):
    broken = problem.dataset.data._replace(x1=jnp.full_like(problem.dataset.data.x1, jnp.nan))
    return runs.train(problem, out, data=broken) if first else runs.again(problem, out, data=broken)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.train(p, evaluation=Evaluation(lambda state: 1.0, 8)),
            TypeError,
            "^evaluation: expected a mapping of names to numbers, it returned float$",
            id="an evaluation that finds a number",
        ),
        pytest.param(
            lambda d, p: runs.train(
                p, d, best="loss", keep_best=1, evaluation=Evaluation(lambda state: {"fid": 1.0}, 8)
            ),
            ValueError,
            r"^best: expected an entry of what the evaluation returns, \['fid'\], got 'loss'$",
            id="the best of another name",
        ),
        pytest.param(
            lambda d, p: with_nan(p, d),
            NonFiniteError,
            r"^not finite within steps 1 to 4 \(means: loss nan, .*\); there is no checkpoint$",
            id="a loss that is nan",
        ),
        pytest.param(
            lambda d, p: with_nan(p, d, first=False),
            NonFiniteError,
            r"^not finite within steps 9 to 12 \(means: loss nan, .*\); the last good checkpoint is of step 8$",
            id="a loss that is nan later",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
