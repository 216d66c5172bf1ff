"""The cost of the training loop beside that of the steps that it runs.

    python -m benchmarks.loop_overhead [--out runs/loop_overhead.json]

An MLP of 4 hidden layers of 512 units learns velocities by regression at batch 32, with Adam and one average. Four loops
are timed in turns, so that other programs on the machine slow all of them alike. Wall time and processor time are measured;
other programs distort the latter less. The result has the median over the rounds, in milliseconds per step:

    bare    gradient and optimizer alone on a fixed batch, in a scan: no batches, average, norms or metrics
    plain   the jitted chunk of ``make_chunk`` in a bare Python loop
    fit     the same chunk in ``fit``, with its file of metrics
    saves   the same with a checkpoint every 5 chunks

The loop's overhead is fit/plain - 1, the median of the ratios within a round; the goal is at most 5 %. The benchmark takes
about three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared import timing
from jflow.datasets import ArrayDataset
from jflow.training import RunDirectory, TrainState, fit, init_state, make_chunk, make_step
from jflow.types import Batch, Context

SIZE = 64


def init_params(key: jax.Array, width: int, layers: int) -> list[dict[str, jax.Array]]:
    sizes = [SIZE + 1, *[width] * layers, SIZE]
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(k, (a, b)) / np.sqrt(a), "bias": jnp.zeros((b,))}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def objective(params: Any, key: jax.Array, batch: Batch, context: Context) -> tuple[jax.Array, dict[str, Any]]:
    """Flow matching on the linear path."""
    del context
    time_key, noise_key = jax.random.split(key)
    t = jax.random.uniform(time_key, (len(batch.x1), 1))
    x0 = jax.random.normal(noise_key, batch.x1.shape)
    h = jnp.concatenate([t, (1 - t) * x0 + t * batch.x1], axis=1)
    for layer in params[:-1]:
        h = jax.nn.gelu(h @ layer["kernel"] + layer["bias"])
    velocity = h @ params[-1]["kernel"] + params[-1]["bias"]
    loss = jnp.sum((velocity - (batch.x1 - x0)) ** 2, axis=1)
    return loss, {"tangent/raw": jnp.mean(loss)}


def bare_chunk(optimizer: Any, batch: Batch, steps: int) -> Callable[[TrainState], TrainState]:
    """``steps`` steps of the least that training can be."""

    def body(carry: Any, _: None) -> Any:
        params, opt_state, key, step = carry
        grads = jax.grad(lambda p: objective(p, jax.random.fold_in(key, step), batch, Context())[0].mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key, step + 1), None

    def chunk(state: TrainState) -> TrainState:
        carry = (state.params, state.opt_state, state.key, state.step)
        params, opt_state, key, step = jax.lax.scan(body, carry, None, length=steps)[0]
        return state._replace(params=params, opt_state=opt_state, key=key, step=step)

    return jax.jit(chunk, donate_argnums=0)


def measure(batch: int, width: int, layers: int, steps: int, chunks: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per step of each variant, and the ratios."""
    rows = np.random.default_rng(0).normal(size=(1797, SIZE)).astype(np.float32)
    dataset = ArrayDataset(Batch(rows), batch)
    optimizer = optax.adam(1e-4)
    params = init_params(jax.random.key(0), width, layers)
    chunk = make_chunk(make_step(objective, optimizer, ema=(0.999,)), dataset.batch)
    bare = bare_chunk(optimizer, dataset.batch(dataset.data, jnp.int32(0)), steps)

    def run_bare(state: TrainState) -> Any:
        for _ in range(chunks):
            state = bare(state)
        return state

    def run_plain(state: TrainState) -> Any:
        for _ in range(chunks):
            state, _ = chunk(state, dataset.data, steps)
        return state

    def run_fit(state: TrainState, **kwargs: Any) -> Any:
        with tempfile.TemporaryDirectory() as out:
            return fit(
                state,
                chunk,
                dataset.data,
                total_steps=steps * chunks,
                log_every=steps,
                run=RunDirectory(out, **kwargs),
                hooks=(),
            )

    variants = {
        "bare": run_bare,
        "plain": run_plain,
        "fit": run_fit,
        "saves": lambda state: run_fit(state, checkpoint_every=5 * steps),
    }

    def start(name: str, number: int) -> TrainState:
        return init_state(params, optimizer, jax.random.key(1), ema=(0.999,))

    # The first round compiles.
    times = timing.interleaved(variants, rounds, start)

    def summary(clock: str) -> dict[str, Any]:
        def over(a: str, b: str) -> float:
            return times.ratio(a, b, clock) - 1

        return {
            "ms_per_step": {name: 1e3 * times.median(name, clock) / (steps * chunks) for name in variants},
            "loop_overhead": over("fit", "plain"),
            "loop_and_saves_overhead": over("saves", "plain"),
            "batches_average_metrics_overhead": over("plain", "bare"),
            "loop_over_bare": over("fit", "bare"),
        }

    return {
        "batch": batch,
        "width": width,
        "layers": layers,
        "steps_per_chunk": steps,
        "chunks": chunks,
        "rounds": rounds,
        **{clock: summary(clock) for clock in timing.CLOCKS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=32, help="samples per step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="width of the network (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="hidden layers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps per chunk (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=10, help="chunks per timed run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each loop (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="file for the result as JSON (default: only printed)")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    device = jax.devices()[0]
    result = {
        "benchmark": "loop_overhead",
        **measure(**arguments),
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }
    rows = {f"{name}, ms per step": ("ms_per_step", name) for name in result["wall"]["ms_per_step"]}
    print(f"{'':45s} {'wall':>10s} {'processor':>10s}")
    for label, (table, name) in rows.items():
        print(f"{label:45s} {result['wall'][table][name]:10.3f} {result['processor'][table][name]:10.3f}")
    for label, name in {
        "loop over the same chunk in a plain loop": "loop_overhead",
        "  with a checkpoint every 5 chunks": "loop_and_saves_overhead",
        "batches, average and metrics over bare": "batches_average_metrics_overhead",
        "loop over bare": "loop_over_bare",
    }.items():
        print(f"{label:45s} {result['wall'][name]:10.1%} {result['processor'][name]:10.1%}")
    print(json.dumps(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
