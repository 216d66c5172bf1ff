"""Real processes: two of four virtual devices each train as one of eight does, lose one another, are stopped, and go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jflow import sharding
from jflow.training import Checkpoints, distributed
from jflow.training.metrics_log import read
from tests.training.conftest import make_problem
from tests.training.worker import FSDP, SMALLEST, train

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


class Run:
    """Two processes at work in one directory."""

    def __init__(self, out: Path, steps: int, pause: float = 0.0, *snapshot_every: int) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "JAX_ENABLE_X64": "1"}
        # The tests' eight devices of one process would be eight of each.
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        self.logs = [out.with_name(f"{out.name}_{steps}_{index}.log") for index in range(2)]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    WORKER,
                    out,
                    str(index),
                    "2",
                    str(port),
                    str(steps),
                    str(pause),
                    *map(str, snapshot_every),
                ],
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for index, log in enumerate(self.logs)
        ]
        self.out = out

    def until(self, step: int) -> None:
        """Waits until a row of this step is written."""
        path, began = self.out / "metrics.jsonl", time.monotonic()
        while not (path.exists() and any(row["step"] >= step for row in read(path))):
            assert time.monotonic() - began < 120, self.text()
            assert all(process.poll() is None for process in self.processes), self.text()
            time.sleep(0.05)

    def codes(self, timeout: float = 120.0) -> list[int]:
        """The exit codes."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self) -> str:
        """All that they said."""
        return "\n".join(log.read_text() for log in self.logs)


def losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read(out / "metrics.jsonl")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """One process with eight devices, never stopped."""
    out = tmp_path_factory.mktemp("one") / "run"
    state, _ = train(out, 32, sharding.mesh(FSDP))
    return state, losses(out)


@pytest.mark.slow
def test_two_processes_are_killed_stopped_and_end_as_one(unbroken, tmp_path, assert_same):
    out = tmp_path / "run"
    for victim, step in ((1, 6), (0, 12)):
        run = Run(out, 32, pause=0.3)
        run.until(step)
        run.processes[victim].kill()
        began = time.monotonic()
        assert run.codes()[1 - victim] == distributed.EXIT_PEER_LOST, run.text()
        assert time.monotonic() - began < 60
        assert "another process of this run has died" in run.logs[1 - victim].read_text()

    # Asked to stop through the one process or the other, both save the same step.
    run = Run(out, 32, pause=0.3)
    run.until(18)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.codes() == [distributed.EXIT_PREEMPTED] * 2, run.text()
    assert all("asked to stop: saved step" in log.read_text() for log in run.logs)
    with Checkpoints(out / "checkpoints", config={"name": "worker"}, resume=True) as checkpoints:
        stopped = checkpoints.steps()[-1]
    assert 18 <= stopped < 32 and f"saved step {stopped};" in run.text()

    run = Run(out, 32)
    assert run.codes() == [0, 0], run.text()
    state, expected = unbroken
    found = losses(out)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[step] for step in expected], list(expected.values()), rtol=2e-6)

    # What two processes saved is read by one, on eight devices and on two, to the last bit, and by two again.
    saved = list(np.load(out / "state_32.npz").values())
    plain = make_problem().state()
    for devices in (jax.devices(), jax.devices()[:2]):
        mesh = sharding.mesh(2, devices)
        template = sharding.place(plain, sharding.parts(plain, mesh, SMALLEST))
        with Checkpoints(out / "checkpoints", config={"name": "worker"}, resume=True) as checkpoints:
            restored, _ = checkpoints.restore_latest(template)
        local = sharding.local(restored._replace(key=jax.random.key_data(restored.key)))
        assert_same(jax.tree.leaves(local), saved)
    # One process goes on, then two, then one: it finds what they left.
    one, _ = train(out, 36, sharding.mesh(FSDP))
    run = Run(out, 40)
    assert run.codes() == [0, 0], run.text()
    again, rows = train(out, 40, sharding.mesh(FSDP))
    local = sharding.local(again._replace(key=jax.random.key_data(again.key)))
    assert_same(jax.tree.leaves(local), list(np.load(out / "state_40.npz").values()))
    assert int(one.step) == 36 and rows == []
    for got, want in zip(saved, jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_save_snapshots_and_checkpoints_at_the_same_steps(tmp_path):
    out = tmp_path / "run"
    run = Run(out, 8, 0.0, 2)
    assert run.codes() == [0, 0], run.text()
    with Checkpoints(out / "checkpoints", config={"name": "worker"}, resume=True) as checkpoints:
        assert checkpoints.steps() == [4, 8]
    # A snapshot that was begun and not finished is not listed.
    with Checkpoints(out / "averages", config={"name": "worker"}, keep=None, resume=True) as snapshots:
        assert snapshots.steps() == [2, 4, 6, 8]
