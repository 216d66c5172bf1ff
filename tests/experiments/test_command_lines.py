"""Every experiment runs from its command line, writes its files, resumes, and explains mistakes."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import loading
from experiments.shared import run as shared_run
from jflow import comparison, objectives, sample, training

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = {
    "mixture": ["mixture.png", "table.md"],
    "checkerboard": ["checkerboard.png", "table.md"],
    "digits": ["digits.png", "table.md", "labels.npy", "solver_vs_map/solver_vs_map.png", "solver_vs_map/table.md"],
}


def run(*arguments):
    """A module and its arguments, or "-c", a program and its arguments."""
    flags = "--xla_backend_optimization_level=0"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "XLA_FLAGS": flags}
    command = [sys.executable, *(() if arguments[0] == "-c" else ("-m",)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES))
def test_quick_run(name, out):
    done = run(f"experiments.{name}", "--quick", "--out", out / name)
    assert done.returncode == 0, done.stderr
    assert all((out / name / file).stat().st_size > 0 for file in [*FILES[name], "metrics.jsonl"])
    results = json.loads((out / name / "results.json").read_text())
    assert {"command", "commit", "date", "device", "versions", "config"} <= set(results)
    for jumps in (1, 2, 4, 8, 16):
        samples = np.load(out / name / f"samples_{jumps}.npy")
        assert samples.dtype == np.float32 and samples.shape[0] == 300
        assert np.all(np.isfinite(samples))
    if name == "digits":
        assert "map, 1 jump" in done.stdout and "digits.png" in done.stdout
        # Of the benchmark, which reads the checkpoint.
        table = json.loads((out / name / "solver_vs_map" / "results.json").read_text())["table"]
        assert table["map, 1 jump"]["nfe"] == 1 and table["euler, 8 steps"]["nfe"] == 8
        assert table["euler, 100 steps"]["rmse"] < 0.1 * table["euler, 1 step"]["rmse"]


@pytest.mark.slow
def test_quick_run_of_clothes(out):
    """On drawn shapes in MNIST's format, which the results say; without its files a full run is refused."""
    done = run("experiments.fashion", "--quick", "--out", out / "fashion")
    assert done.returncode == 0, done.stderr
    files = (
        "fashion.png",
        "scores.png",
        "neighbours.png",
        "interpolation.png",
        "table.md",
        "classifier.npz",
        "grids/20.png",
    )
    assert all((out / "fashion" / file).stat().st_size > 0 for file in files)
    results = json.loads((out / "fashion" / "results.json").read_text())
    assert results["data"] == "drawn shapes" and 0.0 < results["trace"] < np.inf
    assert {"1 jump", "8 Euler steps", "training images (floor)"} <= set(results["scores"])
    assert results["scores"]["training images (floor)"]["frechet"] < results["scores"]["1 jump"]["frechet"]
    rows = [json.loads(line) for line in (out / "fashion" / "metrics.jsonl").read_text().splitlines()]
    assert any("clipped" in row for row in rows) and any("frechet_of_one_jump" in row for row in rows)
    sample.main([str(out / "fashion"), "--n", "3", "--out", str(out / "clothes.npy")])
    assert np.load(out / "clothes.npy").shape == (3, 28, 28, 1)
    refused = run("experiments.fashion", "--data", out / "nothing", "--out", out / "refused")
    assert refused.returncode == 2 and "--data" in refused.stderr


@pytest.mark.slow
def test_samples_are_drawn_from_a_run_without_code(out):
    """After the quick run of the mixture."""
    sample.main([str(out / "mixture"), "--jumps", "2", "--n", "3", "--out", str(out / "drawn.npy")])
    drawn = np.load(out / "drawn.npy")
    assert drawn.shape == (3, 2) and drawn.dtype == np.float32 and np.isfinite(drawn).all()
    subject = comparison.from_run(out / "mixture")
    average, _ = training.restore_params(out / "mixture", shared_run.AVERAGE)
    assert jax.tree.all(jax.tree.map(np.array_equal, subject.params, average))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"experiment": "nothing"}, "No module named"),
        ({"experiment": "catalogue"}, "no attribute 'problem'"),
        ({"experiment": "bias"}, "dim"),
        ({"experiment": "mixture", "colour": "red"}, "colour"),
    ],
)
def test_a_config_of_no_experiment_with_one_model_is_refused(config, message):
    with pytest.raises(ValueError, match=rf"config: expected that of an experiment of this version.*{message}"):
        loading.make(config)


# One of each kind of row: pairs of the data, of a solve, of optimal transport; a teacher, one that changes; a start from it.
ROWS = (
    "lsd",
    "flow_matching, trigonometric",
    "reflow",
    "lsd, optimal transport",
    "lsd, taught",
    "progressive_distillation",
)
# Compiling the other rows would take minutes; tests/objectives compiles their methods.
TRACE = """
import pathlib, sys, jax
from experiments import catalogue
methods = set()
config = catalogue.quick(catalogue.Config(out=pathlib.Path(sys.argv[1])))
for name, row in catalogue.ROWS.items():
    this = catalogue.Job(config, name, 0).trainer()
    jax.eval_shape(lambda state, data: this.chunk(state, data, 1), this.state, this.data)
    methods.add(row.method)
print(*sorted(methods))
"""


@pytest.mark.slow
def test_the_catalogue_runs_and_keeps_the_rows_that_are_there(out):
    there = out / "catalogue"
    done = run("experiments.catalogue", "--quick", "--methods", *ROWS, "--out", there)
    assert done.returncode == 0, done.stderr
    rows = json.loads((there / "results.json").read_text())["rows"]
    assert set(ROWS) <= set(rows)
    for row in rows.values():
        assert np.isfinite(row["rmse_1"]) and np.isfinite(row["energy_distance_1"])
    assert (there / "catalogue.png").stat().st_size > 0
    before = (there / "samples" / "lsd" / "0" / "row.json").stat().st_mtime_ns
    again = run("experiments.catalogue", "--quick", "--methods", "lsd", "--out", there)
    assert again.returncode == 0 and "---" not in again.stdout.split("| method")[0]
    assert (there / "samples" / "lsd" / "0" / "row.json").stat().st_mtime_ns == before
    traced = run("-c", TRACE, there)
    assert traced.returncode == 0, traced.stderr
    assert set(objectives.METHODS) <= set(traced.stdout.split())


@pytest.mark.slow
def test_an_earlier_run_is_not_overwritten(out):
    """After the quick run of the mixture."""
    again = run("experiments.mixture", "--quick", "--out", out / "mixture")
    assert again.returncode == 2 and "holds a run already" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiments.digits", "--out", "unused", "--steps", "0"], "--steps: expected a positive"),
        (["experiments.checkerboard", "--out", "unused", "--objective", "magic"], "magic"),
        (["experiments.mixture", "--out", "unused", "--diagonal", "1"], "--diagonal"),
        (["experiments.catalogue", "--out", "unused", "--methods", "lsd", "magic"], "unknown magic"),
        (["experiments.bias", "--methods", "magic"], "unknown magic"),
        (["experiments.bias", "--path", "cosine"], "Unrecognized"),
        (["experiments.bias", "--jumps", "0"], "--jumps: expected whole numbers from 1"),
        (["experiments.density", "--out", "unused", "--jitter", "-1"], "--jitter: expected a number from 0"),
        (["experiments.density", "--out", "unused", "--watch.grids", "100"], "Unrecognized"),
        (["benchmarks.solver_vs_map", "--checkpoint", "nowhere", "--out", "unused"], "nowhere: no such directory"),
    ],
)
def test_mistakes_end_in_a_message(arguments, message, monkeypatch, capsys):
    """The command line as ``python -m`` reads it, in this process."""
    module = importlib.import_module(arguments[0])
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        shared_run.main(module.Config, module.run if callable(module.run) else module.main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
