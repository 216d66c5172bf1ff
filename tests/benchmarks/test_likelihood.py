"""The benchmark of log-densities: its counts, its refusals, and the agreement of both packages if the other is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import likelihood as bench

SMALL = bench.Config(dims=(3,), steps=3, batch=5, features=8, depth=2)


def test_the_network_is_the_documented_one():
    layers = bench.network(SMALL, 3)
    x, h = np.array([0.3, -1.0, 2.0], np.float32), np.array([0.7, 0.3, -1.0, 2.0], np.float32)
    for w, b in layers[:-1]:
        h = h @ w + b
        h = h / (1.0 + np.exp(-h))
    want = h @ layers[-1][0] + layers[-1][1]
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(bench.velocity(layers, np.float32(0.7), x), want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "divergence"), [("euler", "exact"), ("midpoint", "hutchinson")])
def test_jflow_evaluates_the_velocity_as_often_as_its_steps_have_stages(method, divergence):
    assert bench.Case(SMALL, method, divergence, 3).evaluations() == bench.STAGES[method] * SMALL.steps


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_both_packages_agree(divergence):
    pytest.importorskip("flow_matching")
    case = bench.Case(SMALL, "midpoint", divergence, 3)
    found = case.agree(case.ours())
    assert set(found) - {"mean"} == {"velocity", "x0", "log_density"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps: .*from 1, got 0"),
        ({"batch": 1}, "--batch: .*from 2, got 1"),
        ({"seed": -1}, "--seed: .*got -1"),
        ({"dims": ()}, r"--dims: .*got \(\)"),
        ({"dims": (2, 0)}, r"--dims: .*got \(2, 0\)"),
        ({"threads": 100_000}, "--threads: .*cores of this process, got 100000"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bench.Config(**options).check()


def test_results_are_not_replaced_unasked(tmp_path):
    (tmp_path / "results.json").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        bench.Config(out=tmp_path).check()
    bench.Config(out=tmp_path, overwrite=True).check()


@pytest.mark.slow
def test_without_torch_the_command_says_what_to_install(tmp_path):
    # This mistake is reported first, whether torch is installed or not.
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(tmp_path), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.likelihood", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "pip install 'jflow[flow-matching]'" in done.stderr
    assert not (tmp_path / "out").exists()
