"""Crash and resume: whether a run that is killed and started again ends bit for bit as an undisturbed one.

    python -m benchmarks.crash_resume [--runs 100] [--out runs/crash_resume]

A small flow map is trained by LSD in its own process, on arrays in memory or on a feed of batches from the host. The first
run is undisturbed; each of the next ``--runs`` is killed by SIGKILL and then resumed by the same command. Every other kill
is at a random step (up to 50 ms after its row of metrics, or for the first step up to 5 s after the start). The others are
during a save (at the first file of an unfinished checkpoint, or up to 30 ms later). The resumed run must equal the
undisturbed one in the final parameters, optimizer state, average, key and step, and in every row of metrics. One of the
metrics is a sum that depends on the order of the data. A hundred runs take about half an hour on one CPU core. The exit
code is 1 if a run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMES = ("seconds", "steps_per_second")
KINDS = ("arrays", "feed")
LIMIT = 300.0


def train(out: pathlib.Path, kind: str, steps: int) -> None:
    """The process that is killed: trains from the newest checkpoint in ``out``; writes the final state to ``final.npz``."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jflow
    from jflow import interpolants, nets, objectives, parameterizations, training
    from jflow.datasets import ArrayDataset
    from jflow.training import prefetch
    from jflow.types import Batch

    rows = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    module = nets.MLP.plain(features=64, depth=2)
    flow_map = jflow.flow_map(nets.from_linen(module), parameterizations.mean_velocity_form())
    method = objectives.lsd(flow_map, interpolants.linear())

    def objective(params: Any, key: Any, batch: Batch, context: Any) -> Any:
        loss, aux = method(params, key, batch, context)
        place = jnp.arange(1, len(loss) + 1, dtype=jnp.float32)[:, None]
        return loss, aux._replace(metrics={**aux.metrics, "order": jnp.sum(batch.x1 * place)})

    dataset = ArrayDataset(Batch(rows), batch_size=32, seed=1)
    data, batch_fn = dataset.data, dataset.batch
    if kind == "feed":
        data, batch_fn = prefetch.Feed(Batches(rows, 32)), prefetch.batch
    optimizer, averages = optax.adam(1e-3), (0.99,)
    params = module.init(jax.random.key(0), jnp.float32(0), jnp.float32(1), jnp.zeros(4))["params"]
    state = training.init_state(params, optimizer, jax.random.key(1), ema=averages)
    state = training.fit(
        state,
        training.make_chunk(training.make_step(objective, optimizer, ema=averages), batch_fn),
        data,
        total_steps=steps,
        log_every=5,
        run=training.RunDirectory(out, checkpoint_every=10, config={"kind": kind, "steps": steps}, resume="auto"),
        hooks=(),
    )
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    with (out / "final.tmp").open("wb") as file:
        np.savez(file, *leaves)
    os.replace(out / "final.tmp", out / "final.npz")


class Batches:
    """Random rows, batch after batch, from a numpy generator whose state is the position."""

    def __init__(self, rows: Any, size: int) -> None:
        import numpy as np

        self._rows, self._size, self._random = rows, size, np.random.default_rng(2)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        from jflow.types import Batch

        return Batch(self._rows[self._random.integers(len(self._rows), size=self._size)])

    def get_state(self) -> dict[str, Any]:
        """The position, of JSON types."""
        return self._random.bit_generator.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._random.bit_generator.state = state


def start(out: pathlib.Path, kind: str, steps: int, cache: pathlib.Path) -> subprocess.Popen[bytes]:
    """The training in a process of its own; what it says is added to ``OUT.log``."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "benchmarks.crash_resume", "--train", str(out), kind, str(steps)]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], out: pathlib.Path) -> None:
    """Waits for the end.

    Raises:
      RuntimeError: when it is not a good one.
    """
    if process.wait(LIMIT) != 0:
        raise RuntimeError(f"exit code {process.returncode}: {out.with_suffix('.log').read_text()[-2000:]}")


def unfinished(out: pathlib.Path) -> bool:
    """Whether a checkpoint is being written."""
    folder = out / "checkpoints"
    try:
        return any("tmp" in path.name for path in folder.iterdir())
    except FileNotFoundError:
        return False


def result(out: pathlib.Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The final state as bytes, and the rows of metrics without their times."""
    import numpy as np

    arrays = [f"{array.dtype}{array.shape}".encode() + array.tobytes() for array in np.load(out / "final.npz").values()]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return arrays, [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def rows_of(out: pathlib.Path) -> int:
    """The number of rows of metrics so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(out: pathlib.Path, kind: str, steps: int, cache: pathlib.Path, row: int | None, fraction: float) -> str:
    """Kills a training after a row of metrics, or during a save, and resumes it; returns what the kill interrupted.

    ``row`` None means a save, and 0 the start. ``fraction`` in [0, 1) is the share of the longest delay of the kill.
    """
    process, began = start(out, kind, steps, cache), time.monotonic()
    # One or two saves are let pass; no more, because a run keeps only three checkpoints.
    passes = 1 + int(fraction * 1e3) % 2
    while process.poll() is None and time.monotonic() - began < LIMIT:
        done = len([path for path in (out / "checkpoints").glob("*") if path.name.isdigit()])
        if (done >= passes and unfinished(out)) if row is None else rows_of(out) >= row:
            break
        time.sleep(0.0005)
    time.sleep(fraction * (0.03 if row is None else 0.05 if row else 5.0))
    alive, saving = process.poll() is None, unfinished(out)
    process.kill()
    process.wait()
    # Seen after the kill as well: a save that ended in between does not count.
    saving = saving and unfinished(out)
    checkpoints = [path for path in (out / "checkpoints").glob("*") if path.name.isdigit()]
    finish(start(out, kind, steps, cache), out)
    if not alive:
        return "after its end"
    return "during a save" if saving else "between saves" if checkpoints else "before the first checkpoint"


def run(runs: int, out: pathlib.Path, steps: int, seed: int) -> dict[str, Any]:
    """The comparison; what differed, and what the killed runs were doing."""
    draw, cache = random.Random(seed), out / "cache"
    expected = {}
    for kind in KINDS:
        finish(start(out / kind, kind, steps, cache), out / kind)
        expected[kind] = result(out / kind)
    doing: dict[str, int] = {}
    wrong = []
    for number in range(runs):
        kind = KINDS[number // 2 % 2]
        row = draw.randrange(steps // 5) if number % 2 == 0 else None
        folder = out / f"run_{number}"
        what = kill(folder, kind, steps, cache, row, draw.random())
        doing[what] = doing.get(what, 0) + 1
        state, rows = result(folder)
        same = {"state": state == expected[kind][0], "rows": rows == expected[kind][1]}
        verdict = "same" if all(same.values()) else "DIFFERS"
        if verdict == "same":
            shutil.rmtree(folder)
        else:
            wrong.append({"run": number, "kind": kind, "killed": what, **same})
        print(f"run {number + 1:3d}/{runs}  {kind:6s}  killed {what:27s}  {verdict}", flush=True)
    return {"benchmark": "crash_resume", "runs": runs, "steps": steps, "seed": seed, "killed": doing, "differ": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crash_resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=100, help="number of runs that are killed (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=200, help="optimizer steps of each run, a multiple of 10 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/crash_resume"),
        help="an empty directory for the runs and result.json (default: %(default)s)",
    )
    parser.add_argument("--train", nargs=3, metavar=("OUT", "KIND", "STEPS"), help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    if arguments["train"] is not None:
        out, kind, steps = arguments["train"]
        train(pathlib.Path(out), kind, int(steps))
        return
    out = arguments["out"].absolute()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out: {out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    found = run(arguments["runs"], out, arguments["steps"], arguments["seed"])
    (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    sys.exit(bool(found["differ"]))


if __name__ == "__main__":
    main()
