"""The experiment on held-out densities: its change of variables, its units, and a small run."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import density
from experiments.shared import options, run
from experiments.shared.model import Problem, build
from jflow import bases, datasets, likelihood, objectives, training

ROOT = pathlib.Path(__file__).resolve().parents[2]


def config(data, **choices):
    return options.make(density.Config, **{"out": pathlib.Path("unused"), "data": data, **choices})


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "wine"])
def test_one_gaussian_in_z_is_the_gaussian_of_the_training_data(data):
    """log N(x; m, C) by the log-volume is that of a Gaussian fitted to x, in x's own units."""
    found = density.load(config(data))
    z = np.asarray(found.train, np.float64)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(np.cov(z.T), np.eye(z.shape[1]), atol=1e-3)
    dim = z.shape[1]
    nats = -(np.mean(-0.5 * np.sum(z**2, axis=1)) - 0.5 * dim * np.log(2 * np.pi) + found.log_volume)
    # The entropy of N(m, C); C is the covariance of x, which for standardised columns is their correlation.
    if data == "wine":
        from sklearn.datasets import load_wine

        rows = load_wine().data
        rows = rows[np.random.default_rng(0).permutation(len(rows))][len(rows) // 5 :]
        rows = rows[np.random.default_rng(1).permutation(len(rows))][len(rows) // 8 :]
        covariance = np.corrcoef(rows.T) * len(rows) / (len(rows) - 1)
    else:
        assert found.held_out.shape == (4 * 359, 64) and found.levels == 17
        levels = np.rint((datasets.digits().train.x1.reshape(-1, 64) + 1) * 8).astype(np.int32)
        levels = levels[np.random.default_rng(1).permutation(len(levels))][len(levels) // 8 :]
        x = likelihood.dequantise(jax.random.key(9), jnp.tile(jnp.asarray(levels), (density.FITTED, 1)), 17)
        covariance = np.cov(np.asarray(x, np.float64).T)
    # The mean of |z|^2 is that of a covariance that divides by N - 1.
    entropy = 0.5 * (dim * np.log(2 * np.pi * np.e) + np.linalg.slogdet(covariance)[1] - dim / len(z))
    # Another dequantisation noise changes each of 64 nearly independent variances by about a percent.
    np.testing.assert_allclose(nats, entropy, atol=0.02 if data == "wine" else 0.5)


def test_training_rows_are_drawn_anew_and_jitter_widens_them():
    plain, wide = (density.load(config("wine", jitter=jitter)) for jitter in (0.0, 0.5))
    drawn = np.asarray(plain.sample(jax.random.key(0), 4000))
    rows = np.asarray(plain.train)
    assert all(np.abs(rows - row[None]).max(axis=1).min() < 1e-6 for row in drawn[:20])
    more = np.asarray(wide.sample(jax.random.key(0), 4000))
    assert abs(np.var(more - drawn) - 0.25) < 0.01


def test_the_summary_is_in_nats_of_x_and_in_bits():
    data = density.load(config("digits"))
    events = len(data.held_out) // data.noises
    log_density = np.full(len(data.held_out), -80.0)
    valid = np.ones(len(log_density), bool)
    # An event is valid if all of its dequantised copies are.
    valid[0] = False
    found = density.summary(log_density, valid, log_density + 0.25, data)
    assert found["nats"] == pytest.approx(80.0 - data.log_volume) and found["error"] == pytest.approx(0.0, abs=1e-12)
    assert found["bits"] == pytest.approx(found["nats"] / (64 * np.log(2)) + np.log2(17 / 2))
    assert found["valid"] == pytest.approx(1 - 1 / events) and found["from_solve"] == pytest.approx(0.25)


@pytest.mark.slow
def test_the_classics_are_densities_and_choose_by_the_validation_data():
    """On normal data in the plane they are near the exact density."""
    keys = jax.random.split(jax.random.key(1), 3)
    train, validation, held_out = (jax.random.normal(k, (n, 2)) for k, n in zip(keys, (2000, 500, 300), strict=True))
    data = density.Data(None, train, validation, held_out, 1, 0.0, 0)
    exact = np.asarray(jax.vmap(bases.STANDARD_NORMAL.log_density)(held_out))
    kernels, bandwidth = density.kernel_density(data)
    mixture, chosen = density.gaussian_mixture(data, (1, 4))
    assert 0.15 < bandwidth["bandwidth"] < 0.7 and chosen["components"] in (1, 4)
    assert np.median(np.abs(kernels - exact)) < 0.15 and np.median(np.abs(mixture - exact)) < 0.1


@pytest.mark.slow
def test_training_with_a_score_ends_at_the_lowest_and_not_at_the_last(tmp_path):
    this = config("wine", steps=8, log_every=4, warmup=1, features=8, depth=2, batch=16, ema=0.5, out=tmp_path)
    data = density.load(this)
    problem = Problem(datasets.SampledDataset(data.sample, this.optimizer.batch), (13,), 1.0, None)
    model = build(this.model, problem)
    made = run.trainer(this, problem, model, objectives.flow_matching(model.flow_map, model.interpolant))
    scores = iter([1.0, 2.0])
    bound, _ = run.train(this, problem, model, made, score=lambda bound: next(scores), score_every=4)
    at = {step: training.restore_params(tmp_path, run.AVERAGE, step=step)[0] for step in (4, 8)}
    same = {step: jax.tree.map(np.array_equal, bound.params, params) for step, params in at.items()}
    assert all(jax.tree.leaves(same[4])) and not all(jax.tree.leaves(same[8]))
    with pytest.raises(ValueError, match="score, score_every: expected both"):
        run.train(this, problem, model, made, score_every=4)


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "experiments.density", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@pytest.mark.slow
def test_a_quick_run_writes_its_table_and_figure(tmp_path):
    done = start("--quick", "--data", "wine", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name).stat().st_size > 0 for name in ("table.md", "density.png"))
    table = json.loads((tmp_path / "results.json").read_text())["table"]
    # After almost no training every flow is still the Gaussian, for every estimator of its density.
    for name in ("flow matching", "flow matching, one probe", "maximum likelihood", "1 jump", "head, 1 jump"):
        assert table[name]["valid"] == 1.0 and abs(table[name]["nats"] - table["gaussian"]["nats"]) < 0.2
