"""One of several processes that train together, run by test_processes.

Usage: ``python worker.py OUT INDEX COUNT PORT STEPS PAUSE [SNAPSHOT_EVERY]``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np

from jflow import sharding, training
from jflow.training import distributed
from tests.training.conftest import make_problem

ROOT = Path(__file__).resolve().parents[2]
FSDP = 4
# No array of the test problem is too small to be split.
SMALLEST = 1


def train(
    out: Path, steps: int, mesh: jax.sharding.Mesh, pause: float = 0.0, snapshot_every: int | None = None
) -> tuple[training.TrainState, list[dict]]:
    """Trains the test problem to ``steps`` steps, from where ``out`` stands; pauses after each row."""
    problem, rows = make_problem(), []

    def callback(row: dict) -> None:
        rows.append(row)
        time.sleep(pause)

    state = problem.state()
    shardings = sharding.parts(state, mesh, SMALLEST)
    chunk = training.make_chunk(
        problem.step, problem.dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=shardings
    )
    state = training.fit(
        sharding.place(state, shardings),
        chunk,
        sharding.place(jax.tree.map(np.asarray, problem.dataset.data), sharding.whole(mesh)),
        total_steps=steps,
        log_every=2,
        run=training.RunDirectory(
            out,
            checkpoint_every=4,
            snapshot_every=snapshot_every,
            config={"name": "worker"},
            resume="auto",
            ignore=("pause",),
        ),
        hooks=[callback],
    )
    return state, rows


def main() -> None:
    out, index, count, port, steps, pause, *snapshots = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    with distributed.processes(f"localhost:{port}", int(count), int(index), heartbeat_seconds=10, start_seconds=60):
        try:
            state, _ = train(Path(out), int(steps), sharding.mesh(FSDP), float(pause), *map(int, snapshots))
        except distributed.PreemptedError as error:
            print(error, file=sys.stderr)
            sys.exit(distributed.EXIT_PREEMPTED)
        leaves = jax.tree.leaves(sharding.local(state._replace(key=jax.random.key_data(state.key))))
        if distributed.first_process():
            np.savez(Path(out) / f"state_{steps}.npz", *leaves)


if __name__ == "__main__":
    main()
