"""The file of metrics of a run."""

from __future__ import annotations

import json

import pytest

from jflow.training import MetricsLog, metrics_log
from tests.training import runs


def with_torn_metrics(problem, out):
    runs.train(problem, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write("half a li\n{}\n")
    return runs.train(problem, out, 16, resume=True)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: metrics_log.read(runs.text(d / "metrics.jsonl", json.dumps({"loss": 1}))),
            ValueError,
            r"metrics\.jsonl: line 1 is no row with a step: ",
            id="metrics of another kind",
        ),
        pytest.param(
            lambda d, p: with_torn_metrics(p, d),
            ValueError,
            "metrics.jsonl: line 2 is no JSON: 'half a li'$",
            id="metrics damaged",
        ),
        pytest.param(
            lambda d, p: MetricsLog(runs.text(d / "metrics.jsonl", json.dumps({"step": 1}))),
            FileExistsError,
            "metrics.jsonl exists already; resume the run or overwrite it$",
            id="metrics written over",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
