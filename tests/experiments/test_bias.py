"""The bias ledger: its targets, its measures on samplers whose law is known, and a small run."""

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

from experiments import bias, bias_tables
from experiments.shared import options
from jflow import metrics
from jflow.likelihood import LogDensity

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_targets_moments_are_those_of_its_samples(assert_mean):
    for dim in (2, 16):
        this = bias.exact(dim)
        away = np.asarray(this.sample(jax.random.key(0), 20_000)) - np.asarray(this.mean)[None]
        assert_mean(away, 0.0)
        assert_mean(away[:, :, None] * away[:, None, :], this.cov, errors=4.5)


def gaussian_samples(n, width):
    """Samples of a normal law ``width`` times as wide as the target: its mean is right, and no other moment."""
    this = bias.exact(2)
    z = jax.random.normal(jax.random.key(1), (n, 2))
    root = width * np.linalg.cholesky(np.asarray(this.cov))
    log_q = -0.5 * np.sum(np.square(z), axis=1) - np.log(2 * np.pi) - np.log(np.linalg.det(root))
    x = np.asarray(this.mean)[None] + np.asarray(z) @ root.T
    return this, LogDensity(jnp.asarray(log_q), jnp.asarray(x), z, np.ones(n, bool), np.ones(n))


@pytest.mark.slow
def test_weights_remove_the_bias_of_a_sampler_of_known_density():
    this, found = gaussian_samples(4096, 1.3)
    row = bias.of_samples(found, this, jax.random.key(2))
    # The covariance is 1.69 times the target's, and KL(q, rho) = E_q[-log rho] less the entropy of q.
    assert abs(row["cov"] - 0.69) < 0.08 and row["cov_z"] > 10 and row["mean_z"] < 2.5
    entropy = np.log(2 * np.pi * np.e) + 0.5 * np.linalg.slogdet(1.69 * np.asarray(this.cov))[1]
    assert abs(row["kl"] - (row["nats"] - entropy)) < 4 * np.sqrt(1.0 / 4096)
    weighted = row["weighted"]
    assert weighted["cov"] < 0.1 and max(weighted["cov_z"], weighted["mean_z"]) < 2.5
    assert abs(weighted["log_z"]) < 4 * weighted["log_z_error"] < 0.2
    assert abs(weighted["energy"]) < 0.1 * row["energy"] and 0.05 < weighted["ess"] < 0.9
    assert weighted == row["without_sign"]


@pytest.mark.slow
def test_singular_samples_are_counted_and_have_no_weight():
    this, found = gaussian_samples(4096, 1.3)
    lost = np.arange(4096) < 1024
    some = found._replace(
        log_density=jnp.where(lost, jnp.inf, found.log_density),
        x=jnp.where(lost[:, None], jnp.nan, found.x),
        sign=np.where(lost, 0.0, 1.0),
        valid=~lost,
    )
    row = bias.of_samples(some, this, jax.random.key(2))
    assert row["singular"] == row["folded"] == 0.25
    # Three quarters of the target's integral remain, and its moments are unchanged.
    assert abs(row["weighted"]["log_z"] - np.log(0.75)) < 4 * row["weighted"]["log_z_error"]
    assert row["weighted"]["cov_z"] < 2.5 and row["cov_z"] > 7


@pytest.mark.slow
def test_a_singular_sampler_has_no_weights_and_is_no_error():
    this, found = gaussian_samples(64, 1.3)
    turned = found._replace(sign=-found.sign, valid=~found.valid)
    row = bias.of_samples(turned, this, jax.random.key(2))
    assert row["folded"] == 1.0 and np.isfinite(row["kl"])
    assert np.isnan(row["weighted"]["cov"]) and np.isfinite(row["without_sign"]["cov"])


def test_the_weighted_energy_distance_with_equal_weights_is_the_metric():
    x, y = (np.random.default_rng(seed).normal(scale=scale, size=(200, 2)) for seed, scale in ((0, 1.0), (1, 1.4)))
    found = bias.weighted_energy_distance(jnp.asarray(x), jnp.full(200, 1 / 200), jnp.asarray(y))
    np.testing.assert_allclose(found, metrics.energy_distance(x, y).value, rtol=1e-9)
    # A sample of weight zero does not count.
    some = jnp.where(jnp.arange(200) < 100, 1 / 100, 0.0)
    found = bias.weighted_energy_distance(jnp.asarray(x), some, jnp.asarray(y))
    np.testing.assert_allclose(found, metrics.energy_distance(x[:100], y).value, rtol=1e-9)


def test_errors_of_estimates_have_the_sign_of_the_estimate_and_leave_out_what_is_not_valid():
    truth = np.array([-1.0, -2.0, -3.0, -4.0])
    found = bias.of_estimates(truth + np.array([0.5, -0.1, 0.2, 9.0]), np.array([True, True, True, False]), truth)
    assert found["valid"] == 0.75 and found["median"] == pytest.approx(0.2)
    assert found["bias"] == pytest.approx(0.2) and found["nats"] == pytest.approx(2.0 - 0.2)
    assert found["rmse"] == pytest.approx(np.sqrt(0.3 / 3))


@pytest.mark.slow
def test_tables_are_means_over_seeds_and_take_what_is_there():
    this, found = gaussian_samples(256, 1.3)
    row = bias.of_samples(found, this, jax.random.key(2))
    truth = np.zeros(4)
    estimates = {"determinant, 1": bias.of_estimates(truth - 0.5, truth == 0, truth)}
    other = {**estimates, "determinant, 1": bias.of_estimates(truth - 0.7, np.arange(4) < 2, truth)}
    rows = [{"samples": {"1": row, "2": row}, "estimates": kept} for kept in (estimates, other)]
    floor = {"samples": row, "entropy": 1.0, "entropy_error": 0.1}
    text = bias_tables.tables({"2": {"rows": {"lsd": rows}, "floor": floor}})
    line = next(line for line in text.splitlines() if line.startswith("| lsd | 1 "))
    assert f"| {row['kl']:.3g} +- {row['kl_error']:.3g} | 0.6 +- 0 (0.75) | 0.6 (0.75) |" in line
    assert "| lsd | determinant | -0.6, 0.6, 0.6, 0.6 (0.75) | - (nan) |" in text


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "experiments.bias", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@pytest.mark.slow
def test_a_quick_run_and_the_rows_that_are_there(tmp_path):
    arguments = ("--quick", "--dims", 2, "--methods", "consistency_training", "lsd", "--out", tmp_path)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name).stat().st_size > 0 for name in ("table.md", "bias_2d.png", "scatter_2d_lsd.png"))
    rows = json.loads((tmp_path / "results.json").read_text())["dims"]["2"]["rows"]
    assert set(rows) == {"flow_matching", "consistency_training", "lsd"}
    assert set(rows["flow_matching"][0]["samples"]) == {"2", "solve"}
    assert {"determinant, 2", "head, 2", "solve", "solve, one probe"} <= set(rows["lsd"][0]["estimates"])
    # Near the identity all estimators agree, because they estimate one density.
    kept = np.load(tmp_path / "2d" / "lsd" / "0" / "estimates.npz")
    for name in ("head, 2", "solve"):
        assert np.median(np.abs(kept[name] - kept["determinant, 2"])) < 0.1
    this = bias.quick(bias.Config(out=tmp_path, dims=(2,)))
    assert bias.read(this, 2, "lsd", 0)["samples"] == rows["lsd"][0]["samples"]
    assert bias.read(this, 2, "mean_flow", 0) is None
    other = bias.quick(options.make(bias.Config, out=tmp_path, dims=(2,), learning_rate=0.01))
    with pytest.raises(ValueError, match="another learning_rate"):
        bias.read(other, 2, "lsd", 0)
