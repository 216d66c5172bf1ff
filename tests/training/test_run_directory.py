"""The directory of a run: what it keeps, and what may be written over."""

from __future__ import annotations

import pytest

from tests.training import runs


def kept(problem, out, **options):
    """An earlier run, which a call that is refused must not have touched."""
    runs.train(problem, out)
    before = (out / "metrics.jsonl").read_text()
    try:
        runs.train(problem, out, overwrite=True, **options)
    finally:
        assert (out / "metrics.jsonl").read_text() == before and (out / "checkpoints" / "8").exists()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: kept(p, d, keep=0),
            ValueError,
            "^keep: expected a whole number of at least 1, got 0$",
            id="an old run deleted for nothing",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, best="fid", keep_best=-1),
            ValueError,
            "^keep_best: expected a whole number of at least 0, got -1$",
            id="fewer than no best",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, keep=0),
            ValueError,
            "^keep: expected a whole number of at least 1, got 0$",
            id="no checkpoint kept",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, resume=1),
            ValueError,
            "^resume: expected one of False, True, 'auto', got 1$",
            id="resumed by a number",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, resume="yes"),
            ValueError,
            "^resume: expected one of False, True, 'auto', got 'yes'$",
            id="resumed by a word of its own",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, overwrite=True),
            ValueError,
            "^resume, overwrite: expected at most one of them$",
            id="resumed and overwritten",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, resume=False),
            FileExistsError,
            "holds a run already; resume it .*, overwrite it .*, or choose another directory$",
            id="a directory with another run",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
