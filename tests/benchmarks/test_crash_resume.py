"""A run that is killed, also during a save, resumes to the same end: five of the benchmark's hundred runs."""

from __future__ import annotations

import pytest

from benchmarks import crash_resume


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    found = crash_resume.run(5, tmp_path, steps=100, seed=3)
    assert found["differ"] == []
    # Two of the five are killed during a save, if it lasts until the signal comes.
    assert sum(found["killed"].values()) == 5
