"""The loop: resumed bit for bit, at most two compilations, rows that come once, and an end to what is not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import reports
from jflow.training import (
    Checkpoints,
    CountFlops,
    Evaluation,
    Hook,
    NonFiniteError,
    Profile,
    RunDirectory,
    distributed,
    fit,
    make_chunk,
    make_step,
    prefetch,
    restore_params,
)
from jflow.training.loop import Plan
from jflow.training.metrics_log import MetricsLog, read
from jflow.types import Batch
from tests.training import runs

TIMES = ("seconds", "steps_per_second")


def rows_of(directory):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read(directory / "metrics.jsonl")]


def run(problem, out_dir, total_steps, *, state=None, chunk=None, data=None, evaluation=None, hooks=(), **directory):
    directory = {"checkpoint_every": 8, "config": {"learning_rate": 1e-2}, **directory}
    return fit(
        problem.state() if state is None else state,
        problem.chunk if chunk is None else chunk,
        problem.dataset.data if data is None else data,
        total_steps=total_steps,
        log_every=8,
        chunk_steps=4,
        run=None if out_dir is None else RunDirectory(out_dir, **directory),
        evaluation=evaluation,
        hooks=hooks,
    )


@pytest.fixture(scope="module")
def unbroken(problem, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    return run(problem, directory, 32), directory


def test_resumed_runs_are_the_same_bit_for_bit(problem, unbroken, tmp_path, assert_same):
    state, directory = unbroken
    run(problem, tmp_path, 16)
    resumed = run(problem, tmp_path, 32, resume=True)
    assert int(resumed.step) == 32
    assert_same(resumed, state)
    assert rows_of(tmp_path) == rows_of(directory)
    assert [row["step"] for row in rows_of(directory)] == [8, 16, 24, 32]
    # What was trained is what is loaded.
    assert_same(restore_params(tmp_path)[0], state.params)
    assert_same(restore_params(tmp_path, "0.99")[0], state.ema["0.99"])


@pytest.mark.slow
def test_resumed_runs_are_the_same_where_the_teacher_changes(problem, tmp_path, assert_same):
    def objective(params, key, batch, context):
        loss, aux = problem.objective(params, key, batch, context)
        apart = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, context.teacher)
        return loss + sum(jax.tree.leaves(apart)), aux

    step = make_step(objective, problem.optimizer, ema=(0.9, 0.99), teacher_updates=(5, 16, 21))
    chunk = make_chunk(step, problem.dataset.batch)
    start = lambda: problem.state(teacher=problem.params)  # noqa: E731
    unbroken = run(problem, tmp_path / "unbroken", 24, chunk=chunk, state=start())
    run(problem, tmp_path / "broken", 16, chunk=chunk, state=start())
    resumed = run(problem, tmp_path / "broken", 24, chunk=chunk, state=start(), resume=True)
    assert_same(resumed, unbroken)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "unbroken")
    taught = jax.tree.leaves(unbroken.teacher)
    assert any(np.any(a != b) for a, b in zip(taught, jax.tree.leaves(problem.params), strict=True))


def test_asked_to_stop_it_saves_and_goes_on_the_same(problem, unbroken, tmp_path, assert_same):
    state, directory = unbroken
    before = signal.getsignal(signal.SIGTERM)

    def stop(row):
        if row["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    # The row of step 8 is read while the chunk to step 12 is under way.
    with pytest.raises(distributed.PreemptedError, match="saved step 12") as error:
        run(problem, tmp_path, 32, hooks=[stop], checkpoint_every=16, resume="auto")
    assert error.value.step == 12 and signal.getsignal(signal.SIGTERM) is before
    assert_same(run(problem, tmp_path, 32, resume="auto"), state)
    rows, whole = rows_of(tmp_path), rows_of(directory)
    assert [(row["step"], row["steps"]) for row in rows] == [(8, 8), (12, 4), (16, 4), (24, 8), (32, 8)]
    assert [rows[0], *rows[3:]] == [whole[0], *whole[2:]]
    assert (rows[1]["loss"] + rows[2]["loss"]) / 2 == pytest.approx(whole[1]["loss"], rel=1e-12)


def test_a_second_request_does_what_it_did_before(problem, tmp_path):
    class Asked(Exception):
        pass

    def handler(number, frame):
        raise Asked

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Asked), distributed.Notice() as notice:
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.seen(3)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert signal.getsignal(signal.SIGTERM) is handler
        # Without checkpoints there is nothing to save, and the signal is left alone.
        with pytest.raises(Asked):
            run(problem, None, 8, hooks=[lambda row: os.kill(os.getpid(), signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_auto_begins_where_there_is_nothing(problem, unbroken, tmp_path, assert_same):
    state, directory = unbroken
    # Killed before the first checkpoint: some rows, half a checkpoint.
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp-0").mkdir(parents=True)
    shutil.copy(directory / "metrics.jsonl", tmp_path)
    assert_same(run(problem, tmp_path, 32, resume="auto"), state)
    assert rows_of(tmp_path) == rows_of(directory)
    # Where all are damaged it does not begin again in silence.
    for meta in (tmp_path / "checkpoints").glob("*/meta"):
        shutil.rmtree(meta)
    with pytest.raises(FileNotFoundError, match="no checkpoint is whole"):
        run(problem, tmp_path, 40, resume="auto")


def test_a_save_during_later_steps_is_of_the_step_it_was_asked_for(problem, tmp_path, assert_same):
    state = problem.chunk(problem.state(), problem.dataset.data, 4)[0]
    expected = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(25):
            state, _ = problem.chunk(state, problem.dataset.data, 4)
        assert int(state.step) == 104
        assert_same(checkpoints.restore_latest(problem.state())[0], expected)


class Walk:
    """Batches from a generator on the host, whose state is the position."""

    def __init__(self):
        self.random = np.random.default_rng(5)

    def __next__(self):
        x = self.random.normal(size=(16, 3)).astype(np.float32)
        return Batch(x1=x, cond=x[:, :2] ** 2)

    def get_state(self):
        return self.random.bit_generator.state

    def set_state(self, state):
        self.random.bit_generator.state = state


@pytest.mark.slow
def test_data_from_the_host_go_on_where_they_were(problem, tmp_path, assert_same):
    chunk = make_chunk(problem.step, prefetch.batch)
    one, two = tmp_path / "one", tmp_path / "two"
    whole = run(problem, one, 21, chunk=chunk, data=prefetch.Feed(Walk()))
    run(problem, two, 16, chunk=chunk, data=prefetch.Feed(Walk()))
    assert_same(run(problem, two, 21, chunk=chunk, data=prefetch.Feed(Walk()), resume=True), whole)
    assert rows_of(two) == rows_of(one)


def test_the_best_and_the_snapshots(problem, unbroken, tmp_path, assert_same):
    state, _ = unbroken
    scores = {8: 3.0, 16: 1.0, 24: 2.0, 32: 5.0}
    options = {
        "evaluation": Evaluation(lambda state: {"score": scores[int(state.step)]}, 8),
        "best": "score",
        "keep_best": 1,
        "keep": 1,
        "snapshot_every": 16,
    }
    run(problem, tmp_path, 16, **options)
    assert_same(run(problem, tmp_path, 32, resume=True, **options), state)
    with Checkpoints(tmp_path / "checkpoints", resume=True) as checkpoints:
        assert checkpoints.steps() == [16, 32]
    assert_same(restore_params(tmp_path / "averages", "0.99")[0], state.ema["0.99"])
    assert_same(
        restore_params(tmp_path / "averages", "0.9", step=16)[0], restore_params(tmp_path, "0.9", step="best")[0]
    )
    with pytest.raises(
        ValueError, match=r"best: expected an entry of what the evaluation returns, \['score'\], got 'loss'"
    ):
        run(problem, tmp_path, 32, overwrite=True, **{**options, "best": "loss"})


@pytest.mark.slow
def test_work_and_traces(problem, tmp_path):
    run(problem, tmp_path, 24, hooks=[CountFlops(), Profile(tmp_path / "profile", 8, 12)])
    rows = rows_of(tmp_path)
    rates = [row["steps_per_second"] for row in read(tmp_path / "metrics.jsonl")]
    flops = [row["flops_per_second"] / rate for row, rate in zip(rows, rates, strict=True)]
    np.testing.assert_allclose(flops, flops[0], rtol=1e-12)
    # Forward and backward through 3 x 8 and 8 x 2 weights, twice forward: more than that, and not much more.
    assert 6 * 40 * 16 < flops[0] < 60 * 40 * 16
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_step_that_never_ends(problem, capfd):
    ended = []

    def chunk(state, data, steps):
        if int(state.step) == 8:
            time.sleep(1.0)
        return problem.chunk(state, data, steps)

    problem.chunk(problem.state(), problem.dataset.data, 4)
    run(problem, None, 16, chunk=chunk, hooks=[distributed.Watchdog(0.5, end=ended.append)])
    assert ended == [distributed.EXIT_STALLED]
    said = capfd.readouterr().err
    assert "no sign of life for 0.5 s: steps 9 to 12; ending with exit code 77" in said and "time.sleep" not in ended
    run(problem, None, 16, chunk=chunk, hooks=[distributed.Watchdog(30.0)])
    assert len(ended) == 1


def test_killed_after_a_checkpoint_no_row_comes_twice(problem, unbroken, tmp_path, assert_same):
    state, directory = unbroken
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    # As if killed past step 24, in the middle of a line, with its later checkpoints unwritten.
    shutil.rmtree(tmp_path / "checkpoints" / "32")
    shutil.rmtree(tmp_path / "checkpoints" / "24")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert_same(run(problem, tmp_path, 32, resume=True), state)
    assert rows_of(tmp_path) == rows_of(directory)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_while_saving_the_checkpoint_before_is_used(problem, unbroken, tmp_path, caplog, assert_same):
    state, directory = unbroken
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / "checkpoints" / "32" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"")
    assert_same(run(problem, tmp_path, 32, resume=True), state)
    assert "step 32 is damaged" in caplog.text
    assert rows_of(tmp_path) == rows_of(directory)
    assert_same(restore_params(tmp_path, step=32)[0], state.params)


def test_two_lengths_are_compiled_at_most(problem, compilations):
    lengths, compiled = [], set()

    def chunk(state, data, steps):
        compilations.clear()
        found = problem.chunk(state, data, steps)
        if compilations:
            compiled.add(len(lengths))
        lengths.append(steps)
        return found

    state = run(problem, None, 11, chunk=chunk, checkpoint_every=None)
    state = run(problem, None, 18, chunk=chunk, checkpoint_every=None, state=state)
    assert int(state.step) == 18
    assert lengths == [4, 4, 1, 1, 1, 1, 4, 1, 1]
    # The first call of either length; none if an earlier test has made them.
    assert compiled <= {0, 2}


def test_rows(problem, tmp_path, unbroken):
    seen = []
    run(
        problem,
        tmp_path,
        20,
        evaluation=Evaluation(lambda state: {"bias": jnp.sum(state.params["out"]["bias"]), "at": int(state.step)}, 16),
        hooks=[seen.append],
        checkpoint_every=None,
    )
    kinds = [(row["kind"], row["step"]) for row in rows_of(tmp_path)]
    assert kinds == [("train", 8), ("train", 16), ("eval", 16), ("train", 20), ("eval", 20)]
    assert [(row["kind"], row["step"]) for row in seen] == kinds
    train, evaluated = rows_of(tmp_path)[1:3]
    assert train == rows_of(unbroken[1])[1], "checkpoints and evaluation do not touch the training"
    assert train["steps"] == 8 and train["finite"] is True and len(train["fit/raw_by_t"]) == 2
    assert evaluated["at"] == 16
    assert not (tmp_path / "checkpoints").exists()


def test_rows_are_means_over_the_steps(problem, unbroken):
    state, losses = problem.state(), []
    for _ in range(8):
        state, metrics = problem.chunk(state, problem.dataset.data, 1)
        losses.append(float(metrics["loss"].value()))
    row = rows_of(unbroken[1])[0]
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert row["last_loss"] == pytest.approx(losses[-1], rel=1e-4)


@pytest.mark.parametrize("checkpoint_every", [8, None])
def test_what_is_not_finite_stops_the_run(problem, tmp_path, checkpoint_every):
    def chunk(state, data, steps):
        state, metrics = problem.chunk(state, data, steps)
        # Broken from step 21 on, so within the fifth and sixth chunk.
        sound = state.step <= 20
        loss = reports.Mean(jnp.where(sound, 1.0, jnp.nan), jnp.ones(()))
        return state, {**metrics, "finite": reports.Every(sound), "loss": loss}

    with pytest.raises(NonFiniteError, match="not finite within steps 21 to 24") as error:
        run(problem, tmp_path, 48, chunk=chunk, checkpoint_every=checkpoint_every)
    assert (error.value.first_step, error.value.last_step) == (21, 24)
    last = rows_of(tmp_path)[-1]
    assert last["step"] == 24 and last["finite"] is False and last["loss"] is None
    if checkpoint_every is None:
        assert error.value.checkpoint is None and "there is no checkpoint" in str(error.value)
        return
    assert error.value.checkpoint == 16 and "checkpoint is of step 16" in str(error.value)
    with Checkpoints(tmp_path / "checkpoints", resume=True) as checkpoints:
        assert checkpoints.steps() == [8, 16]


def test_a_run_is_not_written_over(problem, unbroken, tmp_path, assert_same):
    state, directory = unbroken
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(problem, directory, 32)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        run(problem, tmp_path, 32, resume=True)
    (tmp_path / "config.json").write_text("{}")
    run(problem, tmp_path, 8)
    assert_same(run(problem, tmp_path, 32, overwrite=True), state)
    assert rows_of(tmp_path) == rows_of(directory)
    assert (tmp_path / "config.json").exists()


def test_a_finished_run_resumes_to_its_end(problem, unbroken, tmp_path, assert_same):
    state, directory = unbroken
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    assert_same(run(problem, tmp_path, 32, resume=True), state)
    assert rows_of(tmp_path) == rows_of(directory)
    with pytest.raises(
        ValueError, match="total_steps: expected at least the 32 steps that the state has taken, got 24"
    ):
        run(problem, tmp_path, 24, resume=True)


class Recorded(Hook):
    """What a hook was called with, in order."""

    def __init__(self):
        self.seen = []

    def __enter__(self):
        self.seen.append("enter")
        return self

    def __exit__(self, *error):
        self.seen.append("exit")

    def start(self, started):
        self.seen.append(("start", started.step, started.total_steps, int(started.state.step)))

    def before_chunk(self, step, length):
        self.seen.append(("before", step, length))

    def after_chunk(self, step, metrics):
        self.seen.append(("after", step))

    def complete(self, row):
        row["mine"] = 7.0

    def row(self, row):
        self.seen.append((row["kind"], row["step"], row.get("mine")))

    def pause(self):
        self.seen.append("pause")


def test_hooks_are_called_at_their_events(problem, tmp_path):
    hook, score = Recorded(), Evaluation(lambda state: {"score": 1.0}, 16)
    run(problem, tmp_path, 16, hooks=[hook], evaluation=score, checkpoint_every=16)
    assert hook.seen == [
        "enter", ("start", 0, 16, 0), ("before", 0, 4), ("after", 4), ("before", 4, 4), ("after", 8),
        # The row of an interval is read while the next chunk runs.
        ("before", 8, 4), ("after", 12), ("train", 8, 7.0), ("before", 12, 4), ("after", 16), ("train", 16, 7.0), "pause",
        ("eval", 16, None), "exit",
    ]  # fmt: skip
    assert [row.get("mine") for row in read(tmp_path / "metrics.jsonl")] == [7.0, 7.0, None]
    hook = Recorded()
    run(problem, tmp_path, 24, hooks=[hook], resume=True, checkpoint_every=16)
    assert hook.seen[1] == ("start", 16, 24, 16)
    # A hook leaves after an error, too, and cannot hide it.
    hook = Recorded()
    hook.__class__ = type("Hides", (Recorded,), {"__exit__": lambda self, *error: self.seen.append("exit") or True})
    with pytest.raises(ZeroDivisionError):
        run(problem, None, 16, hooks=[hook, lambda row: 1 / 0])
    assert hook.seen[-1] == "exit"


def test_the_log_refuses_and_drops(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "value": jnp.float32(step), "bins": np.array([1.0, np.inf])})
    with pytest.raises(FileExistsError):
        MetricsLog(path)
    with MetricsLog(path, after=2) as log:
        log.write({"step": 3, "value": np.float64("nan"), "ok": np.bool_(True)})
    rows = read(path)
    assert rows[:2] == [{"step": n, "value": float(n), "bins": [1.0, None]} for n in (1, 2)]
    assert rows[2] == {"step": 3, "value": None, "ok": True} and len(rows) == 3
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"chunk_steps": 3}, "log_every: expected a multiple of chunk_steps = 3, got 8"),
        ({"checkpoint_every": 12}, "checkpoint_every: expected a multiple of log_every = 8, got 12"),
        ({"eval_every": 9}, "eval_every"),
    ],
)
def test_plans_are_checked(numbers, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"total_steps": 10, "chunk_steps": 4, "log_every": 8, **numbers})


def test_refusals(problem, tmp_path):
    state, data = problem.state(), problem.dataset.data
    with pytest.raises(TypeError, match=r"^evaluation: expected an Evaluation"):
        fit(state, problem.chunk, data, total_steps=1, evaluation=lambda state: {})
    with pytest.raises(TypeError, match=r"^run: expected a RunDirectory"):
        fit(state, problem.chunk, data, total_steps=1, run=tmp_path)
    with pytest.raises(TypeError, match=r"^chunk: expected a function \(state, data, steps\)"):
        fit(state, problem.step, data, total_steps=1)
    with pytest.raises(ValueError, match="at most one"):
        RunDirectory(tmp_path, resume=True, overwrite=True)


def test_the_metrics_file_is_plain_json_lines(unbroken):
    for line in (unbroken[1] / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line, parse_constant=lambda name: pytest.fail(name)), dict)
    assert jax.device_count() >= 1


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.train(p, data=p.dataset),
            TypeError,
            r"^data: expected arrays, such as dataset\.data, or a Feed of an iterator, got ArrayDataset$",
            id="the dataset instead of its data",
        ),
        pytest.param(
            lambda d, p: runs.train(p, data=runs.Batches(runs.ROWS)),
            TypeError,
            r"^data: expected arrays, such as dataset\.data, or a Feed of an iterator, got Batches$",
            id="an iterator without a feed",
        ),
        pytest.param(
            lambda d, p: runs.train(p, steps=1e4),
            TypeError,
            r"^total_steps: expected a whole number, got float 10000\.0$",
            id="steps that are a float",
        ),
        pytest.param(
            lambda d, p: runs.train(p, steps=0),
            ValueError,
            "^total_steps: expected a whole number of at least 1, got 0$",
            id="no steps",
        ),
        pytest.param(
            lambda d, p: runs.train(p, log_every=0),
            ValueError,
            "^log_every: expected a whole number of at least 1, got 0$",
            id="rows never",
        ),
        pytest.param(
            lambda d, p: runs.train(p, chunk_steps=100),
            ValueError,
            "^log_every: expected a multiple of chunk_steps = 100, got 8",
            id="chunks longer than rows",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, checkpoint_every=12),
            ValueError,
            "^checkpoint_every: expected a multiple of log_every = 8, got 12",
            id="checkpoints between rows",
        ),
        pytest.param(
            lambda d, p: runs.train(p, evaluation=Evaluation(lambda state: {}, 9)),
            ValueError,
            "^eval_every: expected a multiple of log_every = 8, got 9",
            id="evaluations between rows",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, snapshot_every=4),
            ValueError,
            "^snapshot_every: expected a multiple of log_every = 8, got 4",
            id="snapshots between rows",
        ),
        pytest.param(
            lambda d, p: Evaluation(lambda state: {}, 0),
            ValueError,
            "^every: expected a whole number of at least 1, got 0$",
            id="an evaluation that never comes",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, best="fid", keep_best=1),
            ValueError,
            r"^evaluation: expected one with run\.best, got None$",
            id="the best of no evaluations",
        ),
        pytest.param(
            lambda d, p: fit(p.state(), p.chunk, p.dataset.data, total_steps=8, run=d),
            TypeError,
            "^run: expected a RunDirectory, got PosixPath$",
            id="a path in place of a run directory",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, steps=4),
            ValueError,
            "^total_steps: expected at least the 8 steps that the state has taken, got 4$",
            id="an end already passed",
        ),
        pytest.param(
            lambda d, p: runs.train(p, state=p.params),
            TypeError,
            "^state: expected a TrainState, from init_state, got dict$",
            id="parameters as the state",
        ),
        pytest.param(
            lambda d, p: [runs.train(p, state=(used := p.state())), runs.train(p, state=used)],
            ValueError,
            "^state: its arrays are gone, donated to an earlier call; make it anew with init_state$",
            id="a state used twice",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
