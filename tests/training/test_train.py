"""``train``: the parts of the loop in one call."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import datasets, interpolants, objectives, sharding
from jflow.training import (
    Evaluation,
    Feed,
    RunDirectory,
    ema,
    fit,
    init_state,
    make_chunk,
    make_step,
    restore_params,
    train,
)
from jflow.training.metrics_log import read
from jflow.types import Batch, FlowMap


def call(problem, **options):
    optimizer = optax.adam(1e-2)
    options = {"steps": 12, "log_every": 4, "hooks": (), "ema": (0.9, 0.99), **options}
    return train(problem.objective, optimizer, options.pop("params", problem.params), problem.dataset, **options)


@pytest.mark.slow
def test_it_is_fit_with_the_usual_choices(problem, assert_same):
    mesh = sharding.mesh(devices=jax.devices()[:1])
    found = call(problem, mesh=mesh, seed=3)
    optimizer = optax.adam(1e-2)
    step = make_step(problem.objective, optimizer, ema=(0.9, 0.99))
    state = init_state(problem.params, optimizer, jax.random.split(jax.random.key(3))[1], ema=(0.9, 0.99))
    chunk = make_chunk(step, problem.dataset.batch, batch_sharding=sharding.rows(mesh))
    state, data = jax.device_put((state, problem.dataset.data), sharding.whole(mesh))
    assert_same(found, fit(state, chunk, data, total_steps=12, log_every=4, hooks=()))
    averaged = ema.as_params(found.ema["0.9"], found.params)
    assert_same(found.averaged(), averaged)
    assert_same(found.averaged("0.9"), averaged)
    with pytest.raises(ValueError, match=r"^name: expected an average of this state, \['0.9', '0.99'\], got 'a'$"):
        found.averaged("a")
    with pytest.raises(ValueError, match=r"^name: .*got None$"):
        found._replace(ema={}).averaged()


def test_a_teacher_that_the_loss_does_not_read_is_refused():
    """Otherwise a run that should distil learns from the data."""
    model = FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * x)
    dataset = datasets.ArrayDataset(jnp.ones((8, 2)), 8)
    run = functools.partial(train, optimizer=optax.sgd(0.1), dataset=dataset, steps=1, hooks=())
    for params in (jnp.float64(0.5), lambda key: jnp.float64(0.5)):
        with pytest.raises(
            ValueError, match=r"^teacher: expected None, because the loss of flow_matching does not depend"
        ):
            run(objectives.flow_matching(model, interpolants.linear()), params=params, teacher=jnp.float64(0.3))
    distilled = objectives.flow_matching(model, interpolants.linear(), teacher=model.velocity)
    assert run(distilled, params=jnp.float64(0.5), teacher=jnp.float64(0.3)).step == 1
    with pytest.raises(TypeError) as caught:
        run(distilled, params=jnp.float64(0.5))
    assert any(note.startswith("teacher: called with params None") for note in caught.value.__notes__)


@pytest.mark.slow
def test_all_devices_and_one_agree(problem):
    def params(key):
        shift = jax.random.normal(key) / 4
        return jax.tree.map(lambda leaf: leaf + shift.astype(leaf.dtype), problem.params)

    many = call(problem, params=params)
    one = call(problem, params=params, mesh=sharding.mesh(devices=jax.devices()[:1]))
    assert all(len(leaf.sharding.device_set) == jax.device_count() for leaf in jax.tree.leaves(many.params))
    for a, b in zip(jax.tree.leaves((many.params, many.ema)), jax.tree.leaves((one.params, one.ema)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_directory_keeps_metrics_and_checkpoints_and_resumes(problem, tmp_path, assert_same):
    score = Evaluation(lambda state: {"size": jnp.sum(state.params["out"]["bias"] ** 2)}, 4)
    whole = call(problem, out_dir=tmp_path / "whole", evaluate=score)
    assert_same(restore_params(tmp_path / "whole", "0.9")[0], whole.averaged("0.9"))
    rows = read(tmp_path / "whole" / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [(k, s) for s in (4, 8, 12) for k in ("train", "eval")]
    with pytest.raises(FileExistsError, match="holds a run already"):
        call(problem, out_dir=tmp_path / "whole")
    keep = RunDirectory(tmp_path / "broken", checkpoint_every=4, resume="auto")
    call(problem, steps=8, out_dir=keep)
    assert_same(call(problem, out_dir=keep), whole)


def test_the_parameters_of_an_equinox_module_are_no_function(problem):
    eqx = pytest.importorskip("equinox")
    arrays, static = eqx.partition(eqx.nn.Linear(3, 2, dtype=jnp.float32, key=jax.random.key(0)), eqx.is_inexact_array)

    def objective(params, key, batch, context):
        return jnp.sum((jax.vmap(eqx.combine(params, static))(batch.x1) - batch.cond) ** 2, axis=1), {}

    mesh = sharding.mesh(devices=jax.devices()[:1])
    state = train(objective, optax.sgd(0.1), arrays, problem.dataset, steps=2, mesh=mesh, hooks=())
    assert isinstance(state.averaged(), eqx.nn.Linear) and np.any(state.params.weight != arrays.weight)


@pytest.mark.slow
def test_rows_come_at_a_divisor_of_what_else_is_due(problem, tmp_path):
    run = RunDirectory(tmp_path, checkpoint_every=10, snapshot_every=4)
    call(problem, steps=20, log_every=None, out_dir=run, evaluate=Evaluation(lambda state: {}, 6), ema=(0.9,))
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"] == list(range(2, 21, 2))
    restore_params(tmp_path / "averages", "0.9", step=16)


class Rows:
    """The same rows again and again, from the host."""

    def __next__(self):
        return Batch(x1=np.ones((16, 3), np.float32), cond=np.zeros((16, 2), np.float32))

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def test_batches_from_a_feed(problem):
    mesh = sharding.mesh(devices=jax.devices()[:1])
    feed = Feed(Rows(), sharding=sharding.rows(mesh))
    assert int(train(problem.objective, optax.sgd(0.1), problem.params, feed, steps=4, mesh=mesh, hooks=()).step) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "^steps: expected a whole number"),
        ({"seed": -1}, ValueError, "^seed: expected a whole number"),
        ({"log_every": 0}, ValueError, "^log_every: expected a whole number"),
        ({"evaluate": lambda state: {}}, TypeError, "^evaluation: expected an Evaluation"),
        ({"dataset": np.ones((16, 3))}, TypeError, "^dataset: expected one with data and batch"),
        ({"objective": 3}, TypeError, "^objective: expected a function"),
        ({"optimizer": 0.1}, TypeError, "^optimizer: "),
        ({"mesh": 8}, TypeError, "^mesh: expected a jax.sharding.Mesh"),
        ({"hooks": print}, TypeError, "^hooks: expected a sequence"),
        ({"forgive": -1}, ValueError, "^forgive: expected a whole number"),
    ],
)
def test_arguments_are_refused_before_an_earlier_run_is_touched(problem, tmp_path, options, error, message):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    given = {
        "objective": problem.objective,
        "optimizer": optax.sgd(0.1),
        "params": problem.params,
        "dataset": problem.dataset,
        "steps": 4,
        "out_dir": RunDirectory(tmp_path, overwrite=True),
        **options,
    }
    with pytest.raises(error, match=message):
        train(given.pop("objective"), given.pop("optimizer"), given.pop("params"), given.pop("dataset"), **given)
    assert (tmp_path / "metrics.jsonl").exists()
