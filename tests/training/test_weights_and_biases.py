"""Rows in Weights & Biases; a real run, offline, where wandb is installed."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from jflow.training import Wandb, fit
from jflow.training.hooks import Started

STARTED = Started(0, 8, None, None, None)


class Run:
    """Records what a run of wandb would."""

    def __init__(self):
        self.logged, self.finished = [], []

    def log(self, data, step):
        self.logged.append((step, data))

    def finish(self, exit_code=None):
        self.finished.append(exit_code)


def test_numbers_vectors_and_texts_at_their_steps():
    run = Run()
    row = {
        "kind": "train",
        "step": 8,
        "loss": np.float32(0.25),
        "finite": np.True_,
        "fit/raw_by_t": np.asarray([1.5, np.nan]),
        "matrix": np.ones((2, 2)),
        "warning": "a tangent has exploded",
    }
    with Wandb(run) as hook:
        hook.row(row)
        assert run.logged == []
        hook.start(STARTED)
        hook.row(row)
        hook.row({"kind": "eval", "step": 8, "distance": 3})
    expected = {"loss": 0.25, "finite": 1.0, "fit/raw_by_t/0": 1.5, "warning": "a tangent has exploded"}
    assert run.logged == [
        (8, {f"train/{name}": value for name, value in expected.items()}),
        (8, {"eval/distance": 3.0}),
    ]
    # A run that was passed in is its owner's to finish.
    assert run.finished == []


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_run_of_its_own_begins_with_the_training_and_is_finished(monkeypatch, error):
    run, made = Run(), []
    monkeypatch.setitem(
        sys.modules, "wandb", type("wandb", (), {"init": lambda **settings: made.append(settings) or run})
    )
    hook = Wandb(project="digits", mode="offline")
    assert made == []
    try:
        with hook:
            hook.start(STARTED)
            if error is not None:
                raise error
    except RuntimeError:
        pass
    assert made == [{"project": "digits", "mode": "offline"}] and run.finished == [int(error is not None)]


def test_every_row_of_a_training_run_is_there(problem):
    run, rows = Run(), []
    fit(
        problem.state(),
        problem.chunk,
        problem.dataset.data,
        total_steps=4,
        log_every=2,
        hooks=[rows.append, Wandb(run)],
    )
    assert [step for step, _ in run.logged] == [row["step"] for row in rows] == [2, 4]
    assert [data["train/loss"] for _, data in run.logged] == [float(row["loss"]) for row in rows]


def test_refusals(monkeypatch):
    with pytest.raises(TypeError, match=r"run\.log: expected a function \(data, step\) -> None"):
        Wandb("digits")
    with pytest.raises(TypeError, match="run: expected no settings with a run, got project"):
        Wandb(Run(), project="digits")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'jflow\[wandb\]'"):
        Wandb(project="digits")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="pip install 'jflow[wandb]'")
def test_a_real_run_offline(tmp_path):
    with Wandb(project="jflow", mode="offline", dir=tmp_path) as hook:
        hook.start(STARTED)
        hook.row({"kind": "train", "step": 2, "loss": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
