"""The progress of a run: lines, and the bar in a terminal."""

from __future__ import annotations

from tests.training import runs


def test_lines_where_there_is_no_terminal(problem, capsys):
    runs.train(problem, None, 16, hooks=None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step 16/16  loss ") and lines[1].endswith("left")


def test_the_bar_in_a_terminal(problem, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    runs.train(problem, None, 16, hooks=None)
    shown = capsys.readouterr().out
    assert "16/16" in shown and "steps/s" in shown
