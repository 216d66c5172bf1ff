"""Training from a configuration, and the command line of an experiment."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared import drawing, results
from experiments.shared.model import Model, Problem
from experiments.shared.options import Training
from jflow import reports, sharding, training
from jflow.training import distributed, metrics_log, throughput
from jflow.types import BoundFlowMap

AVERAGE = "ema"
# The function that rebuilds the model of a checkpoint from its config, for `python -m jflow.sample` and `jflow.comparison`.
MAKE = "experiments.loading:make"
MISTAKES = (ValueError, TypeError, OSError, training.NonFiniteError)


class Trainer(NamedTuple):
    """A training that has not begun.

    Attributes:
      state: the first state, laid out over the devices.
      step: ``(state, batch) -> (state, metrics)``, not jitted.
      chunk: many steps in one compiled program.
      data: the chunk's second argument.
    """

    state: training.TrainState
    step: Callable[..., Any]
    chunk: Callable[..., Any]
    data: Any


def trainer(
    config: Training,
    problem: Problem,
    model: Model,
    objective: Callable[..., Any],
    *,
    params: Any = None,
    teacher: Any = None,
    teacher_updates: Sequence[int] = (),
) -> Trainer:
    """The optimizer, the average and the state of a configuration; from ``params`` where they are given."""
    choices = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(0.0, choices.learning_rate, choices.warmup, choices.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(choices.clip), optax.radam(schedule, b2=choices.beta2))
    averages = {AVERAGE: training.ema.power(choices.ema)}
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = model.init(init_key) if params is None else params
    state = training.init_state(params, optimizer, train_key, ema=averages, teacher=teacher)
    step = _with_clips(
        training.make_step(objective, optimizer, ema=averages, teacher_updates=teacher_updates), choices.clip
    )
    mesh, data = config.machine.mesh(), problem.dataset.data
    if mesh is None:
        return Trainer(state, step, training.make_chunk(step, problem.dataset.batch), data)
    if choices.batch % mesh.size:
        raise ValueError(f"--batch: expected a multiple of the {mesh.size} devices, got {choices.batch}")
    shardings = sharding.parts(state, mesh)
    chunk = training.make_chunk(
        step, problem.dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=shardings
    )
    return Trainer(sharding.place(state, shardings), step, chunk, sharding.place(data, sharding.whole(mesh)))


def _with_clips(step: Callable[..., Any], clip: float) -> Callable[..., Any]:
    """The step with the share of gradients that the clip scaled down among its metrics."""

    def counted(state: training.TrainState, batch: Any) -> tuple[training.TrainState, dict[str, Any]]:
        state, metrics = step(state, batch)
        norm = metrics["grad_norm"]
        acted = (norm.total > clip * norm.count).astype(norm.total.dtype)
        return state, metrics | {"clipped": reports.Mean(acted, norm.count)}

    return counted


class FirstProcessOnly(Exception):
    """Raised after the training in every process but the first, which alone evaluates and writes results."""


def train(
    config: Training,
    problem: Problem,
    model: Model,
    this: Trainer,
    *,
    score: Callable[[BoundFlowMap], float] | None = None,
    score_every: int = 0,
    evaluation: training.Evaluation | None = None,
) -> tuple[BoundFlowMap, float]:
    """Trains, writing metrics and checkpoints to ``config.out``. Of several processes only the first returns.

    Args:
      config, problem, model, this: what is trained.
      score: a function of the map at the averaged parameters. The parameters of the lowest score are returned in place of
        the last ones. A score that is not finite is never the lowest.
      score_every: steps between two scores, a multiple of ``log_every``; pictures are then not drawn.
      evaluation: what is evaluated during the training, in place of the pictures that ``watch`` asks for.

    Returns:
      (the map at the averaged parameters, seconds that the training took, compilation included).

    Raises:
      FirstProcessOnly: in the other processes.
      ValueError: for a score without ``score_every``, or the reverse.
    """
    if (score is None) != (score_every == 0):
        raise ValueError("score, score_every: expected both or neither")
    steps, watch = config.optimizer.steps, config.watch
    log_every = min(config.output.log_every, steps)
    shown = 64 if len(problem.event) == 3 else 4096
    labels = None if problem.labels is None else problem.labels(jax.random.key(config.seed + 4), shown)

    def picture(params: Any) -> np.ndarray:
        key = jax.random.key(config.seed + 3)
        return drawing.draw(model.flow_map.bind(params), key, 1, shown, problem.event, labels)

    grid = drawing.grid_writer(config.out, picture, AVERAGE)

    def scored(state: training.TrainState) -> dict[str, float]:
        params = sharding.local(training.ema.as_params(state.ema[AVERAGE], state.params))
        return {"score": score(model.flow_map.bind(params))}

    checkpoint_every = log_every * max(1, steps // (4 * log_every))
    if evaluation is None and watch.picture_every():
        evaluation = training.Evaluation(grid, watch.picture_every())
    if score is not None:
        checkpoint_every, evaluation = score_every, training.Evaluation(scored, score_every)
    run = training.RunDirectory(
        config.out,
        checkpoint_every=checkpoint_every,
        snapshot_every=watch.snapshots or None,
        resume={"no": False, "yes": True, "auto": "auto"}[config.output.resume],
        overwrite=config.output.overwrite,
        keep_best=0 if score is None else 1,
        best=None if score is None else "score",
        config=config.kept() | {"make": MAKE, "average": AVERAGE},
    )
    began = time.perf_counter()
    state = training.fit(
        this.state,
        this.chunk,
        this.data,
        total_steps=steps,
        log_every=log_every,
        run=run,
        evaluation=evaluation,
        hooks=[*config.machine.hooks(), *watch.hooks(config.out)],
    )
    seconds = time.perf_counter() - began
    params = sharding.local(training.ema.as_params(state.ema[AVERAGE], state.params))
    if not distributed.first_process():
        raise FirstProcessOnly
    if score is not None:
        params, _ = training.restore_params(config.out, AVERAGE, step="best")
    return model.flow_map.bind(jax.tree.map(jnp.asarray, params)), seconds


def speed(config: Training, seconds: float) -> dict[str, float | None]:
    """How long the training took, and its steps per second without compilation, None where it was too short to tell."""
    try:
        rate = throughput.steady_rate(metrics_log.read(config.out / "metrics.jsonl"))
    except ValueError:
        rate = None
    return {"training_seconds": seconds, "steps_per_second": rate}


def main(config_type: type, run: Callable[[Any], None]) -> None:
    """Reads the command line and runs.

    A mistake that can be named ends with its message and exit code 2; other codes are those of ``training.distributed``.
    """
    import tyro

    description = sys.modules[config_type.__module__].__doc__
    config = tyro.cli(config_type, prog=f"python -m {results.program()}", description=description)
    try:
        config.check()
        if hasattr(config, "output") and config.output.quick:
            # A quick run compiles for longer than it computes.
            jax.config.update("jax_disable_most_optimizations", True)
        with config.machine.joined() if hasattr(config, "machine") else contextlib.nullcontext():
            try:
                run(config)
            except FirstProcessOnly:
                pass
            except training.PreemptedError as error:
                print(error, file=sys.stderr)
                sys.exit(distributed.EXIT_PREEMPTED)
            except MISTAKES as error:
                # Refused here, because with several processes an error does not leave the context.
                _refuse(error)
    except MISTAKES as error:
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
