"""What cannot be trained is refused at once, in words that name the argument, what came and what was expected."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import catalogue, mixture
from experiments.shared import options as shared_options
from experiments.shared import run as shared_run
from experiments.shared.options import Machine
from experiments.shared.options import WatchingSamples as Watching
from jflow import datasets, sharding
from jflow.sample import picture
from jflow.training import (
    Checkpoints,
    CountFlops,
    Evaluation,
    Feed,
    MetricsLog,
    NonFiniteError,
    Profile,
    RunDirectory,
    distributed,
    ema,
    ema_posthoc,
    fit,
    image_grids,
    init_state,
    make_chunk,
    make_step,
    metrics_log,
    prefetch,
    restore_params,
    throughput,
)
from jflow.types import Aux, Batch

# Reads of a damaged checkpoint that fail leave others under way, which report to an event loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROWS = np.ones((16, 3), np.float32)
PIXELS = np.zeros((4, 8, 8, 1), np.float32)
DECAYS = (0.9, 0.99)
HERE = "localhost:12345"


def train(problem, out=None, steps=8, **options):
    """A run with checkpoints, if ``out`` is given, at steps 8, 16, ..."""
    loop = {"log_every": 8, "chunk_steps": 4, "total_steps": steps, "hooks": ()}
    loop |= {name: options.pop(name) for name in (*loop, "evaluation", "forgive") if name in options}
    state, chunk = options.pop("state", problem.state()), options.pop("chunk", problem.chunk)
    data = options.pop("data", problem.dataset.data)
    options = {"checkpoint_every": 8, "config": {"rate": 1e-2}, **options}
    return fit(state, chunk, data, run=None if out is None else RunDirectory(out, **options), **loop)


def again(problem, out, **options):
    """A run of 8 steps, and another call in its directory."""
    train(problem, out)
    return train(problem, out, **{"steps": 16, "resume": True, **options})


def kept(problem, out, **options):
    """An earlier run, which a call that is refused must not have touched."""
    train(problem, out)
    before = (out / "metrics.jsonl").read_text()
    try:
        train(problem, out, overwrite=True, **options)
    finally:
        assert (out / "metrics.jsonl").read_text() == before and (out / "checkpoints" / "8").exists()


def restored(problem, out, *arguments, **options):
    train(problem, out)
    return restore_params(out, *arguments, **options)


def with_damage(problem, out):
    train(problem, out)
    shutil.rmtree(out / "checkpoints" / "8" / "state")
    return train(problem, out, 16, resume="auto")


def with_torn_metrics(problem, out):
    train(problem, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write("half a li\n{}\n")
    return train(problem, out, 16, resume=True)


def with_nan(problem, out, first=True):
    broken = problem.dataset.data._replace(x1=jnp.full_like(problem.dataset.data.x1, jnp.nan))
    return train(problem, out, data=broken) if first else again(problem, out, data=broken)


def state(problem, **options):
    given = {"params": problem.params, "optimizer": problem.optimizer, "key": jax.random.key(1), "ema": DECAYS}
    return init_state(**{**given, **options})


class Growing:
    """An objective whose state grows."""

    def init(self, key, params):
        return jnp.zeros((1,), jnp.float32)

    def __call__(self, params, key, batch, context):
        return batch.x1[:, 0], Aux(jnp.zeros((2,), jnp.float32))


def traced(problem, objective=None, start=None, **options):
    """A step, traced but not compiled."""
    step = make_step(objective or problem.objective, problem.optimizer, **{"ema": DECAYS, **options})
    return jax.eval_shape(step, start or problem.state(), problem.dataset.batch(problem.dataset.data, jnp.int32(0)))


def saved(out, *states, position=None, **options):
    with Checkpoints(out, **options) as checkpoints:
        for each in states:
            checkpoints.save(each, position=position)


def at(problem, step):
    return problem.state()._replace(step=jnp.int32(step))


def joined(*arguments, **options):
    with distributed.processes(*arguments, **options):
        pass


def row_map(*rows, in_axes=0):
    return sharding.vmap(lambda *x: x[0], sharding.mesh(), in_axes)(*rows)


class Batches:
    """Some batches, then the end; an error among them is raised."""

    def __init__(self, *batches):
        self.batches, self.place = batches, 0

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        if isinstance(self.batches[self.place - 1], Exception):
            raise self.batches[self.place - 1]
        return self.batches[self.place - 1]

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


class Unkept(Batches):
    """Its state is no JSON value."""

    def get_state(self):
        return np.random.default_rng(0)


def fed(iterator, step=0, position=None, total_steps=10, **options):
    with Feed(iterator, **options) as feed:
        feed.start(step, position, lambda step: 2, total_steps)
        for _ in range(step, total_steps + 2, 2):
            feed.take()


def took_after_close():
    feed = Feed(Batches(*[ROWS] * 9))
    feed.start(0, None, lambda step: 2, 4)
    feed.close()
    feed.take()


def npz(folder, arrays, **names):
    np.savez(folder / "data.npz", **arrays)
    return datasets.npz(folder / "data.npz", **names)


def npy(folder, **arrays):
    """The files of a folder; __ stands for a dot."""
    for name, array in arrays.items():
        np.save(folder / f"{name.replace('__', '.')}.npy", array)
    return datasets.array_folder(folder)


def images(folder, sizes, **options):
    pytest.importorskip("PIL")
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        image_grids.write_png(folder / name, np.zeros((*size, 3), np.uint8))
    return datasets.images(folder, **options)


def text(path, content):
    path.write_text(content)
    return path


def batches(source, *arguments, **options):
    pytest.importorskip("grain")
    return datasets.pipeline(source, *arguments, **options)


def option(tmp_path, **options):
    return shared_options.make(mixture.Config, out=tmp_path, **options).check()


def experiment(tmp_path, **options):
    """The trainer of an experiment, on the eight devices."""
    config = shared_options.make(mixture.Config, out=tmp_path, **options)
    config.check()
    return shared_run.trainer(config, mixture.problem(config), None, lambda *_: None, params={"w": jnp.zeros(2)})


# What is done with (a new directory, the problem), the error, and what it must say. In the order in which a user meets them:
# the run's numbers, what it is resumed from, state and step, files on disk, devices, processes, data, reading a run.
CASES = {
    # The numbers of a run.
    "a trace of one step": (
        lambda d, p: train(p, d, hooks=[Profile(d, 8, 8)]),
        ValueError,
        "^last: expected a step after first = 8, got 8$",
    ),
    "an evaluation that finds a number": (
        lambda d, p: train(p, evaluation=Evaluation(lambda state: 1.0, 8)),
        TypeError,
        "^evaluation: expected a mapping of names to numbers, it returned float$",
    ),
    "a callback that is not in a list": (
        lambda d, p: train(p, hooks=print),
        TypeError,
        "^hooks: expected a sequence of hooks or functions of a row, got builtin_function_or_method$",
    ),
    "the dataset instead of its data": (
        lambda d, p: train(p, data=p.dataset),
        TypeError,
        r"^data: expected arrays, such as dataset\.data, or a Feed of an iterator, got ArrayDataset$",
    ),
    "an iterator without a feed": (
        lambda d, p: train(p, data=Batches(ROWS)),
        TypeError,
        r"^data: expected arrays, such as dataset\.data, or a Feed of an iterator, got Batches$",
    ),
    "a bucket": (
        lambda d, p: train(p, "gs://bucket/run"),
        ValueError,
        "^path: expected a path of a mounted file system, got 'gs://bucket/run'$",
    ),
    "a file in the run's place": (
        lambda d, p: train(p, text(d / "run", "mine")),
        NotADirectoryError,
        "^path: .*run is a file; expected a directory$",
    ),
    "an old run deleted for nothing": (
        lambda d, p: kept(p, d, keep=0),
        ValueError,
        "^keep: expected a whole number of at least 1, got 0$",
    ),
    "steps that are a float": (
        lambda d, p: train(p, steps=1e4),
        TypeError,
        r"^total_steps: expected a whole number, got float 10000\.0$",
    ),
    "no steps": (
        lambda d, p: train(p, steps=0),
        ValueError,
        "^total_steps: expected a whole number of at least 1, got 0$",
    ),
    "rows never": (
        lambda d, p: train(p, log_every=0),
        ValueError,
        "^log_every: expected a whole number of at least 1, got 0$",
    ),
    "chunks longer than rows": (
        lambda d, p: train(p, chunk_steps=100),
        ValueError,
        "^log_every: expected a multiple of chunk_steps = 100, got 8",
    ),
    "checkpoints between rows": (
        lambda d, p: train(p, d, checkpoint_every=12),
        ValueError,
        "^checkpoint_every: expected a multiple of log_every = 8, got 12",
    ),
    "evaluations between rows": (
        lambda d, p: train(p, evaluation=Evaluation(lambda state: {}, 9)),
        ValueError,
        "^eval_every: expected a multiple of log_every = 8, got 9",
    ),
    "snapshots between rows": (
        lambda d, p: train(p, d, snapshot_every=4),
        ValueError,
        "^snapshot_every: expected a multiple of log_every = 8, got 4",
    ),
    "an evaluation that never comes": (
        lambda d, p: Evaluation(lambda state: {}, 0),
        ValueError,
        "^every: expected a whole number of at least 1, got 0$",
    ),
    "the best of no evaluations": (
        lambda d, p: train(p, d, best="fid", keep_best=1),
        ValueError,
        r"^evaluation: expected one with run\.best, got None$",
    ),
    "the best of another name": (
        lambda d, p: train(p, d, best="loss", keep_best=1, evaluation=Evaluation(lambda state: {"fid": 1.0}, 8)),
        ValueError,
        r"^best: expected an entry of what the evaluation returns, \['fid'\], got 'loss'$",
    ),
    "fewer than no best": (
        lambda d, p: train(p, d, best="fid", keep_best=-1),
        ValueError,
        "^keep_best: expected a whole number of at least 0, got -1$",
    ),
    "no checkpoint kept": (
        lambda d, p: train(p, d, keep=0),
        ValueError,
        "^keep: expected a whole number of at least 1, got 0$",
    ),
    "a trace that ends before it begins": (
        lambda d, p: train(p, d, hooks=[Profile(d, 4, 12)]),
        ValueError,
        "^last: expected at most total_steps = 8, got 12$",
    ),
    "a trace of half steps": (
        lambda d, p: Profile(d, 0.5, 4),
        TypeError,
        r"^first: expected a whole number, got float 0\.5$",
    ),
    "no patience": (
        lambda d, p: distributed.Watchdog(0),
        ValueError,
        r"^seconds: expected a number in \(0, inf\], got 0$",
    ),
    "patience in words": (
        lambda d, p: distributed.Watchdog("10m"),
        TypeError,
        "^seconds: expected a number, got str '10m'$",
    ),
    "a path in place of a run directory": (
        lambda d, p: fit(p.state(), p.chunk, p.dataset.data, total_steps=8, run=d),
        TypeError,
        "^run: expected a RunDirectory, got PosixPath$",
    ),
    "FLOPs of a plain function": (
        lambda d, p: train(p, chunk=lambda *arguments: p.chunk(*arguments), hooks=[CountFlops()]),
        TypeError,
        "^chunk: expected a jitted function, as make_chunk returns, got function$",
    ),
    "a config with a path": (
        lambda d, p: train(p, d, config={"data": d}),
        TypeError,
        "^config: expected dictionaries, lists, strings, finite numbers and None only: .*PosixPath",
    ),
    # What a run goes on from.
    "resumed by a number": (
        lambda d, p: again(p, d, resume=1),
        ValueError,
        "^resume: expected one of False, True, 'auto', got 1$",
    ),
    "one name of many": (
        lambda d, p: again(p, d, config={"rate": 3e-3}, ignore="rate"),
        TypeError,
        "^ignore: expected a collection of names, got the string 'rate'$",
    ),
    "metrics of another kind": (
        lambda d, p: metrics_log.read(text(d / "metrics.jsonl", json.dumps({"loss": 1}))),
        ValueError,
        r"metrics\.jsonl: line 1 is no row with a step: ",
    ),
    "resumed by a word of its own": (
        lambda d, p: train(p, d, resume="yes"),
        ValueError,
        "^resume: expected one of False, True, 'auto', got 'yes'$",
    ),
    "resumed and overwritten": (
        lambda d, p: again(p, d, overwrite=True),
        ValueError,
        "^resume, overwrite: expected at most one of them$",
    ),
    "resumed from nothing": (
        lambda d, p: train(p, d / "new", resume=True),
        FileNotFoundError,
        "new/checkpoints: there is no checkpoint$",
    ),
    "a directory with another run": (
        lambda d, p: again(p, d, resume=False),
        FileExistsError,
        "holds a run already; resume it, overwrite it, or choose another directory$",
    ),
    "an end already passed": (
        lambda d, p: again(p, d, steps=4),
        ValueError,
        "^total_steps: expected at least the 8 steps that the state has taken, got 4$",
    ),
    "resumed with another config": (
        lambda d, p: again(p, d, config={"rate": 3e-3}),
        ValueError,
        r"^config: it differs from the checkpoint's:\n  rate: checkpoint 0\.01, now 0\.003$",
    ),
    "resumed with another network": (
        lambda d, p: again(
            p,
            d,
            state=state(
                p,
                params={**p.params, "out": jax.tree.map(jnp.ones_like, p.params["out"])}
                | {"hidden": {"kernel": jnp.zeros((3, 9), jnp.float32), "bias": jnp.zeros((8,), jnp.float32)}},
            ),
        ),
        ValueError,
        r"nothing is cast\): params/hidden/kernel is float32\[3, 8\], expected float32\[3, 9\]",
    ),
    "resumed with another optimizer": (
        lambda d, p: again(p, d, state=state(p, optimizer=optax.sgd(0.1))),
        ValueError,
        r"^the checkpoint has another structure: it lacks \[\] and has beside \['opt_state/",
    ),
    "resumed with another average": (
        lambda d, p: again(p, d, state=state(p, ema=(0.999,))),
        ValueError,
        r"another structure: it lacks \['ema/0\.999/hidden/bias'.* has beside \['ema/0\.9/hidden/bias'",
    ),
    "resumed with data from the host": (
        lambda d, p: again(p, d, data=Feed(Batches(ROWS)), chunk=make_chunk(p.step, prefetch.batch)),
        ValueError,
        r"^position: expected the data's position at step 8, as Feed\.position was there, got None$",
    ),
    "all checkpoints damaged": (
        lambda d, p: with_damage(p, d),
        FileNotFoundError,
        r"no checkpoint is whole; damaged: steps \[8\]$",
    ),
    "metrics damaged": (
        lambda d, p: with_torn_metrics(p, d),
        ValueError,
        "metrics.jsonl: line 2 is no JSON: 'half a li'$",
    ),
    # The state and the step.
    "parameters as the state": (
        lambda d, p: train(p, state=p.params),
        TypeError,
        "^state: expected a TrainState, from init_state, got dict$",
    ),
    "a state used twice": (
        lambda d, p: [train(p, state=(used := p.state())), train(p, state=used)],
        ValueError,
        "^state: its arrays are gone, donated to an earlier call; make it anew with init_state$",
    ),
    "a learning rate as the optimizer": (
        lambda d, p: state(p, optimizer=1e-3),
        TypeError,
        "^optimizer: expected an optax GradientTransformation, .*got float$",
    ),
    "an optimizer without its numbers": (
        lambda d, p: make_step(p.objective, optax.adam),
        TypeError,
        "^optimizer: expected an optax GradientTransformation, .*got function$",
    ),
    "the state of another optimizer": (
        lambda d, p: traced(p, start=state(p, optimizer=optax.sgd(0.1))),
        ValueError,
        r"^state\.opt_state: expected that of this optimizer, .*got ",
    ),
    "an average by name alone": (
        lambda d, p: state(p, ema=("slow",)),
        TypeError,
        "^decay: expected a number, got str 'slow'$",
    ),
    "updates at one step": (
        lambda d, p: make_step(p.objective, p.optimizer, teacher_updates=100),
        TypeError,
        "^teacher_updates: expected a sequence of steps, or a function of the step, got 100$",
    ),
    "a loss without an aux": (
        lambda d, p: traced(p, lambda params, key, batch, context: batch.x1[:, 0]),
        TypeError,
        r"^objective: expected it to return \(loss \[B\], Aux\) or \(loss \[B\], a mapping of metrics\), got ",
    ),
    "the dataset instead of its batches": (
        lambda d, p: make_chunk(p.step, p.dataset),
        TypeError,
        r"^batch_fn: expected a function \(data, step\) -> batch, as dataset\.batch, got ArrayDataset$",
    ),
    "a mesh for the batches": (
        lambda d, p: make_chunk(p.step, p.dataset.batch, batch_sharding=sharding.mesh()),
        TypeError,
        "^batch_sharding: expected a NamedSharding, got Mesh$",
    ),
    "a number as the key": (
        lambda d, p: state(p, key=0),
        TypeError,
        r"^key: expected one typed PRNG key from jax\.random\.key, got int 0$",
    ),
    "a raw key": (
        lambda d, p: state(p, key=jax.random.PRNGKey(0)),
        TypeError,
        r"^key: expected one typed PRNG key from jax\.random\.key, got ArrayImpl \[0 0\]$",
    ),
    "a key for each device": (
        lambda d, p: state(p, key=jax.random.split(jax.random.key(0), 8)),
        TypeError,
        r"^key: expected one typed PRNG key from jax\.random\.key, got PRNGKeyArray Array\(\(8,\)",
    ),
    "an average that is no tuple": (
        lambda d, p: state(p, ema=0.999),
        TypeError,
        r"^ema: expected a mapping of names to schedules or a tuple of decays, got 0\.999$",
    ),
    "a decay beside its name": (
        lambda d, p: state(p, ema={"slow": 0.999}),
        TypeError,
        r"^ema: expected names without '/' and callable schedules, got 'slow': 0\.999$",
    ),
    "a decay in percent": (
        lambda d, p: state(p, ema=(99.9,)),
        ValueError,
        r"^decay: expected a number in \[0, 1\], got 99\.9$",
    ),
    "a warm-up to no decay": (
        lambda d, p: ema.warmup("0.999"),
        TypeError,
        "^decay: expected a number, got str '0.999'$",
    ),
    "a bias corrected for ever": (
        lambda d, p: ema.unbiased(1),
        ValueError,
        r"^decay: expected a number strictly between 0 and 1, got 1\.0$",
    ),
    "a negative exponent": (
        lambda d, p: ema.power(-2.0),
        ValueError,
        r"^gamma: expected a number in \[0, inf\], got -2\.0$",
    ),
    "a half-life of no samples": (
        lambda d, p: ema.decay_of_half_life(0, 256),
        ValueError,
        r"^half_life: expected a number in \(0, inf\], got 0$",
    ),
    "a state with other averages": (
        lambda d, p: train(p, state=state(p, ema=(0.999,))),
        ValueError,
        r"^state\.ema: expected the averages \['0\.9', '0\.99'\], got \['0\.999'\]",
    ),
    "an average that is not there for the objective": (
        lambda d, p: make_step(p.objective, p.optimizer, ema=DECAYS, context_ema="0.999"),
        ValueError,
        r"^context_ema: expected one of '0\.9', '0\.99', got '0\.999'$",
    ),
    "updates of no teacher": (
        lambda d, p: traced(p, teacher_updates=(100,)),
        ValueError,
        r"^teacher_updates: expected a teacher in the state \(init_state\(\.\.\., teacher=\.\.\.\)\), got None",
    ),
    "updates of another network": (
        lambda d, p: traced(p, teacher_updates=(100,), start=p.state(teacher=p.params["out"])),
        ValueError,
        r"^state\.teacher: expected the pytree structure of the parameters, .*got .*'bias'",
    ),
    "updates before the start": (
        lambda d, p: make_step(p.objective, p.optimizer, teacher_updates=(-1,)),
        ValueError,
        "^teacher_updates: expected a whole number of at least 0, got -1$",
    ),
    "updates by a number": (
        lambda d, p: traced(p, teacher_updates=lambda step: step % 100, start=p.state(teacher=p.params)),
        TypeError,
        r"^teacher_updates: expected a function step -> scalar bool, it returned .*int32\[\]",
    ),
    "a mean as the loss": (
        lambda d, p: traced(p, lambda *_: (jnp.float32(0.0), {})),
        ValueError,
        r"^objective: expected a loss of shape \[B\], got \(\)",
    ),
    "a state that grows": (
        lambda d, p: traced(p, Growing(), p.state(objective=Growing())),
        ValueError,
        r"^aux\.state: expected the state's own kind, float32\[1\], got float32\[2\]",
    ),
    "a state that was not made": (
        lambda d, p: traced(p, Growing()),
        ValueError,
        r"^state\.objective_state: expected what the objective's init makes, .* make the state with init_state\(",
    ),
    "a metric that is not a number": (
        lambda d, p: traced(p, lambda params, key, batch, context: (batch.x1[:, 0], {"name": "text"})),
        TypeError,
        "^metrics: expected a report or a number under 'name', got str",
    ),
    "a loss that is nan": (
        lambda d, p: with_nan(p, d),
        NonFiniteError,
        r"^not finite within steps 1 to 4 \(means: loss nan, .*\); there is no checkpoint$",
    ),
    "a loss that is nan later": (
        lambda d, p: with_nan(p, d, first=False),
        NonFiniteError,
        r"^not finite within steps 9 to 12 \(means: loss nan, .*\); the last good checkpoint is of step 8$",
    ),
    # Checkpoints, and reading them.
    "the start saved twice": (
        lambda d, p: saved(d, at(p, 0), at(p, 0)),
        ValueError,
        "^step: .* holds step 0, not before 0$",
    ),
    "a step by another name": (
        lambda d, p: restored(p, d, step="latest"),
        TypeError,
        "^step: expected a whole number, got str 'latest'$",
    ),
    "a file in the directory's place": (
        lambda d, p: Checkpoints(text(d / "file", "mine")),
        NotADirectoryError,
        "^directory: .*file is a file; expected a directory$",
    ),
    "a directory in use": (
        lambda d, p: [saved(d, at(p, 4)), Checkpoints(d)],
        FileExistsError,
        "is not empty; resume the run or overwrite it$",
    ),
    "notes that are a set": (
        lambda d, p: Checkpoints(d, notes={"tags": {"a"}}),
        TypeError,
        "^notes: expected dictionaries, lists, .*Object of type set",
    ),
    "a step saved twice": (
        lambda d, p: saved(d, at(p, 4), at(p, 4)),
        ValueError,
        "^step: .* holds step 4, not before 4$",
    ),
    "a position of numpy": (
        lambda d, p: saved(d, at(p, 4), position=np.int64(3)),
        TypeError,
        "^position: expected dictionaries, lists, .*Object of type int64",
    ),
    "names that run together": (
        lambda d, p: saved(d, state(p, params={"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})),
        ValueError,
        "^state: two leaves are called params/a/b; keys must not contain '/'$",
    ),
    "a run that is not there": (
        lambda d, p: restore_params(d / "runs" / "lost"),
        FileNotFoundError,
        "runs/lost: no such directory, so no checkpoint$",
    ),
    "a directory without checkpoints": (lambda d, p: restore_params(d), FileNotFoundError, ": there is no checkpoint$"),
    "a step that was not kept": (
        lambda d, p: restored(p, d, step=5),
        FileNotFoundError,
        r"no checkpoint of step 5; there are \[8\]$",
    ),
    "the best of those without scores": (
        lambda d, p: restored(p, d, step="best"),
        FileNotFoundError,
        "checkpoints: no checkpoint has a score$",
    ),
    "an average that was not kept": (
        lambda d, p: restored(p, d, "0.999"),
        ValueError,
        r"^which: expected one of 'params', '0\.9', '0\.99', got '0\.999'$",
    ),
    "parameters of another network": (
        lambda d, p: restored(p, d, template=p.params["out"]),
        ValueError,
        r"another structure: it lacks \['params/bias', 'params/kernel'\] and has beside \['params/hidden/bias'",
    ),
    # Devices.
    "no devices": (lambda d, p: sharding.mesh(devices=[]), ValueError, "^devices: expected at least one, got none$"),
    "another mesh": (
        lambda d, p: sharding.parts(p.params, jax.make_mesh((8,), ("model",))),
        ValueError,
        r"^mesh: expected the axes \('data', 'fsdp'\), as sharding\.mesh makes them, got \('model',\)$",
    ),
    "a layout of another state": (
        lambda d, p: sharding.place(p.params, sharding.parts(p.params["out"], sharding.mesh())),
        ValueError,
        "^shardings: expected one, or the pytree structure of the arrays, .*got ",
    ),
    "a number to split": (
        lambda d, p: sharding.split({"x1": ROWS, "scale": 2.0}, sharding.mesh()),
        ValueError,
        r"^tree: expected arrays \[N, \.\.\.\], got float without a leading axis$",
    ),
    "parts that do not divide": (
        lambda d, p: sharding.mesh(fsdp=3),
        ValueError,
        "^fsdp: expected a divisor of the number of devices, 8, got 3$",
    ),
    "half as many parts": (
        lambda d, p: sharding.mesh(0.5),
        TypeError,
        r"^fsdp: expected a whole number, got float 0\.5$",
    ),
    "rows that do not divide": (
        lambda d, p: row_map(jnp.zeros(12)),
        ValueError,
        r"^rows: expected one number of rows, a multiple of 8 devices, got \[\(12,\)\]$",
    ),
    "rows of different number": (
        lambda d, p: row_map(jnp.zeros(8), jnp.zeros(16)),
        ValueError,
        r"^rows: expected one number of rows, a multiple of 8 devices, got \[\(8,\), \(16,\)\]$",
    ),
    "columns": (
        lambda d, p: row_map(jnp.zeros((8, 8)), in_axes=1),
        ValueError,
        "^in_axes: expected 0 or None for each of 1 arguments, and one 0, got 1$",
    ),
    "an axis too few": (
        lambda d, p: row_map(jnp.zeros(8), 1.0, in_axes=(0,)),
        ValueError,
        r"^in_axes: expected 0 or None for each of 2 arguments, and one 0, got \(0,\)$",
    ),
    # Processes.
    "a coordinator alone": (
        lambda d, p: joined(HERE),
        ValueError,
        "^coordinator, count, index: expected all three or none, got .*12345', None, None",
    ),
    "a host without a port": (
        lambda d, p: joined("node1", 2, 0),
        ValueError,
        "^coordinator: expected HOST:PORT, got 'node1'$",
    ),
    "a port in words": (
        lambda d, p: joined("node1:http", 2, 0),
        ValueError,
        "^coordinator: expected HOST:PORT, got 'node1:http'$",
    ),
    "a port without a host": (
        lambda d, p: joined(":1234", 2, 0),
        ValueError,
        "^coordinator: expected HOST:PORT, got ':1234'$",
    ),
    "a port too high": (
        lambda d, p: joined("node1:70000", 2, 0),
        ValueError,
        "^coordinator: expected HOST:PORT, got 'node1:70000'$",
    ),
    "a port alone": (lambda d, p: joined(1234, 2, 0), ValueError, "^coordinator: expected HOST:PORT, got 1234$"),
    "processes counted from one": (
        lambda d, p: joined(HERE, 2, 2),
        ValueError,
        "^index: expected a whole number of at least 0 and at most 1, got 2$",
    ),
    "no processes": (
        lambda d, p: joined(HERE, 0, 0),
        ValueError,
        "^count: expected a whole number of at least 1, got 0$",
    ),
    "a number from the environment": (
        lambda d, p: joined(HERE, "2", 0),
        TypeError,
        "^count: expected a whole number, got str '2'$",
    ),
    "no heartbeat": (
        lambda d, p: joined(heartbeat_seconds=0),
        ValueError,
        "^heartbeat_seconds: expected a whole number of at least 1, got 0$",
    ),
    "half a second to start": (
        lambda d, p: joined(start_seconds=0.5),
        TypeError,
        r"^start_seconds: expected a whole number, got float 0\.5$",
    ),
    "joined too late": (
        lambda d, p: [jax.devices(), joined(HERE, 1, 0)],
        RuntimeError,
        "must be called before any JAX calls that might initiali",
    ),
    "a watchdog that never waits": (
        lambda d, p: distributed.Watchdog(float("nan")),
        ValueError,
        r"^seconds: expected a number in \(0, inf\], got nan$",
    ),
    # Data from the host.
    "the position of another iterator": (
        lambda d, p: fed(Batches(ROWS), step=4, position={"next_index": 4}),
        ValueError,
        r"^position: expected one of this iterator's, got \{'next_index': 4\}$",
    ),
    "a generator": (
        lambda d, p: Feed(batch for batch in [ROWS]),
        TypeError,
        "^iterator: expected one with get_state, set_state, got generator$",
    ),
    "a mesh instead of a sharding": (
        lambda d, p: Feed(Batches(), sharding=sharding.mesh()),
        TypeError,
        "^sharding: expected a NamedSharding or None, got Mesh$",
    ),
    "nothing read ahead": (
        lambda d, p: Feed(Batches(), ahead=0),
        ValueError,
        "^ahead: expected a whole number of at least 1, got 0$",
    ),
    "taken before the start": (
        lambda d, p: Feed(Batches(ROWS)).take(),
        RuntimeError,
        r"^Feed: expected start\(\) before take\(\)$",
    ),
    "taken after the end": (
        lambda d, p: took_after_close(),
        RuntimeError,
        r"^Feed: expected start\(\) before take\(\), it is closed$",
    ),
    "taken past the last step": (
        lambda d, p: fed(Batches(*[ROWS] * 20)),
        ValueError,
        "^Feed: no chunk is left, those before step 10 were taken$",
    ),
    "data that end": (
        lambda d, p: fed(Batches(ROWS, ROWS, ROWS)),
        ValueError,
        "^iterator: the data ended at step 3, expected batches up to total_steps = 10$",
    ),
    "data that cannot be read": (
        lambda d, p: fed(Batches(ROWS, ROWS, OSError("shard 7 is gone"))),
        OSError,
        "^shard 7 is gone$",
    ),
    "a last batch that is shorter": (
        lambda d, p: fed(Batches(ROWS, ROWS[:5])),
        ValueError,
        r"^iterator: expected batches like the first, float32\[16, 3\], got float32\[5, 3\] at step 1$",
    ),
    "labels too few": (
        lambda d, p: fed(Batches({"x1": ROWS, "cond": ROWS[:4]})),
        ValueError,
        r"^iterator: step 0: expected arrays with one common leading axis of rows, got \[\(4,\), \(16,\)\]$",
    ),
    "names of files": (
        lambda d, p: fed(Batches(np.array(["a.png", "b.png"]))),
        TypeError,
        "^iterator: expected arrays of numbers, got dtype <U5 at step 0$",
    ),
    "a state that JSON does not keep": (
        lambda d, p: fed(Unkept(ROWS)),
        TypeError,
        r"^iterator\.get_state: expected bytes or a JSON value, got Generator",
    ),
    "begun in the middle": (
        lambda d, p: fed(Batches(ROWS), step=4),
        ValueError,
        r"^position: expected the data's position at step 4, as Feed\.position was there, got None$",
    ),
    # Data in memory and in files.
    "rows of words": (
        lambda d, p: datasets.ArrayDataset(np.array(["cat", "dog"]), 4),
        TypeError,
        "^data: expected arrays of numbers, got dtype <U3$",
    ),
    "a path as the source": (
        lambda d, p: batches("images/train", 8),
        TypeError,
        r"^source: expected rows with len\(\) and \[i\], as images\(path\), got str$",
    ),
    "rows of different numbers": (
        lambda d, p: datasets.ArrayDataset(Batch(x1=ROWS, cond=ROWS[:3]), 4),
        ValueError,
        r"^data: expected arrays with one common leading axis of rows, got \[\(3,\), \(16,\)\]$",
    ),
    "no rows": (
        lambda d, p: datasets.ArrayDataset(ROWS[:0], 4),
        ValueError,
        r"^data: expected arrays with one common leading axis of rows, got \[\(0,\)\]$",
    ),
    "an empty batch": (
        lambda d, p: datasets.ArrayDataset(ROWS, 0),
        ValueError,
        "^batch_size: expected a whole number of at least 1 and at most 268435455, got 0$",
    ),
    "a key as the seed": (
        lambda d, p: datasets.SampledDataset(jax.random.normal, 4, jax.random.key(0)),
        TypeError,
        "^seed: expected a whole number, got PRNGKeyArray",
    ),
    "pairs paired again": (
        lambda d, p: datasets.coupled(datasets.ArrayDataset(Batch(x1=ROWS, x0=ROWS), 4), 1),
        ValueError,
        "^dataset: expected batches that are a Batch without x0",
    ),
    "all held out and more": (
        lambda d, p: datasets.digits(held_out=20),
        ValueError,
        r"^held_out: expected a number in \[0, 1\], got 20$",
    ),
    "a file that is not there": (
        lambda d, p: datasets.npz(d / "data.npz"),
        FileNotFoundError,
        "^npz: .*data.npz does not exist; jflow brings no data sets, pass the path of an .npz file",
    ),
    "a folder instead of a file": (
        lambda d, p: datasets.npz(d),
        ValueError,
        r"^npz: expected an \.npz file, as numpy\.savez writes it, got the folder ",
    ),
    "a file of another kind": (
        lambda d, p: datasets.npz(text(d / "data.npz", "x,y\n1,2\n")),
        ValueError,
        r"^npz: .*data\.npz cannot be read as an \.npz file: File is not a zip file$",
    ),
    "arrays of another name": (
        lambda d, p: npz(d, {"x": ROWS, "y": ROWS}, x1="images"),
        ValueError,
        r"^npz: .*data\.npz has no array 'images', expected one of x, y$",
    ),
    "labels of other rows": (
        lambda d, p: npz(d, {"x1": ROWS, "y": ROWS[:7]}, cond="y"),
        ValueError,
        r"^npz: .*expected arrays \[n, \.\.\.\] with one n, got shapes Batch\(x1=\(16, 3\), x0=None, cond=\(7, 3\)\)$",
    ),
    "a folder with no arrays": (
        lambda d, p: datasets.array_folder(d),
        ValueError,
        r"^array_folder: expected files NAME\.npy in .*, found none$",
    ),
    "a part without labels": (
        lambda d, p: npy(d, a=ROWS, a__cond=ROWS, b=ROWS),
        ValueError,
        r"^array_folder: .*b\.cond\.npy is missing, while other files have theirs$",
    ),
    "parts of different shapes": (
        lambda d, p: npy(d, a=ROWS, b=ROWS[:, :2]),
        ValueError,
        r"^array_folder: .*b\.npy: expected rows like those of a\.npy, .*float32\[3\].*, got .*float32\[2\]",
    ),
    "a folder with no images": (
        lambda d, p: images(d, {}),
        ValueError,
        "^images: expected images .* in .*, found none$",
    ),
    "images of two sizes": (
        lambda d, p: images(d, {"a.png": (4, 4), "b.png": (4, 5)}),
        ValueError,
        r"^images: expected one size of image, or size=\.\.\., .*a\.png is 4x4 pixels, .*b\.png is 5x4$",
    ),
    "images of four channels": (
        lambda d, p: images(d, {"a.png": (4, 4)}, channels=4),
        ValueError,
        "^channels: expected one of 1, 3, got 4$",
    ),
    "a size for each side": (
        lambda d, p: images(d, {"a.png": (4, 4)}, size=(32, 32)),
        TypeError,
        r"^size: expected a whole number, got tuple \(32, 32\)$",
    ),
    "a class without images": (
        lambda d, p: [(d / "cat").mkdir(), images(d, {"dog/a.png": (4, 4)})],
        ValueError,
        "^images: expected images in every sub-folder, .*cat has none$",
    ),
    "a batch that processes do not share": (
        lambda d, p: batches(ROWS, 8, process_index=0, process_count=3),
        ValueError,
        "^batch_size: expected a multiple of the number of processes, 3, got 8$",
    ),
    "one process of none": (
        lambda d, p: batches(ROWS, 8, process_index=0),
        ValueError,
        "^process_index, process_count: expected both or neither$",
    ),
    "a source without rows": (
        lambda d, p: batches([], 8),
        ValueError,
        r"^source: expected at least one row, and at most 2\^32, got 0$",
    ),
    "less than no threads": (
        lambda d, p: batches(ROWS, 8, threads=-1),
        ValueError,
        "^threads: expected a whole number of at least 0, got -1$",
    ),
    # After training.
    "snapshots by name": (
        lambda d, p: ema_posthoc.fit_profile(["0.9", "0.99"], 100, 6.94),
        TypeError,
        r"^snapshots: expected pairs \(step, gamma\), got \['0\.9', '0\.99'\]$",
    ),
    "a width wider than all": (
        lambda d, p: ema_posthoc.gamma_of_width(0.5),
        ValueError,
        r"^width: expected a number in \(0, 0\.288675\], got 0\.5$",
    ),
    "one snapshot": (
        lambda d, p: ema_posthoc.fit_profile([(100, 16.0)], 100, 6.94),
        ValueError,
        "^snapshots: expected at least two stored averages to combine, got 1$",
    ),
    "a snapshot twice": (
        lambda d, p: ema_posthoc.fit_profile([(100, 16.0), (100, 16.0)], 100, 6.94),
        ValueError,
        r"^snapshots: expected each \(step, gamma\) once, got more of \[\(100, 16\.0\)\]$",
    ),
    "a snapshot before the start": (
        lambda d, p: ema_posthoc.fit_profile([(0, 16.0), (100, 16.0)], 100, 6.94),
        ValueError,
        "^snapshots: step: expected a whole number of at least 1, got 0$",
    ),
    "a coefficient too many": (
        lambda d, p: ema_posthoc.combine([p.params], [0.5, 0.5]),
        ValueError,
        "^averages, coefficients: expected as many of the one as of the other$",
    ),
    "averages of different networks": (
        lambda d, p: ema_posthoc.combine([p.params, p.params["out"]], [0.5, 0.5]),
        ValueError,
        "^averages: expected the pytree structure of the first, .*got ",
    ),
    "pixels as bytes": (
        lambda d, p: image_grids.tile(np.zeros((4, 8, 8, 3), np.uint8)),
        TypeError,
        "^images: expected floating-point arrays, got dtype uint8$",
    ),
    "one image": (
        lambda d, p: image_grids.tile(PIXELS[0]),
        ValueError,
        r"^images: expected an array of shape \(any, any, any, any\), got \(8, 8, 1\)$",
    ),
    "images of two channels": (
        lambda d, p: image_grids.tile(np.repeat(PIXELS, 2, axis=3)),
        ValueError,
        r"^images: expected \[N, H, W, C\] with C = 1 or 3 .*, got \(4, 8, 8, 2\)$",
    ),
    "a picture of floats": (
        lambda d, p: image_grids.write_png(d / "a.png", PIXELS[0].repeat(3, axis=2)),
        TypeError,
        "^image: expected uint8, got float32$",
    ),
    "samples in three dimensions": (
        lambda d, p: picture(ROWS),
        ValueError,
        r"^samples: expected images \[N, H, W, C\] or points \[N, 2\] for a picture, got \(16, 3\)",
    ),
    "the rate of a run too short": (
        lambda d, p: [train(p, d), throughput.steady_rate(metrics_log.read(d / "metrics.jsonl"))],
        ValueError,
        "^rows: expected a second row of training from one call of fit, got 1 first ones$",
    ),
    "the share of no devices": (
        lambda d, p: throughput.utilisation(1e9, 10.0, devices=[]),
        ValueError,
        "^devices: expected at least one, got none$",
    ),
    "metrics written over": (
        lambda d, p: MetricsLog(text(d / "metrics.jsonl", json.dumps({"step": 1}))),
        FileExistsError,
        "metrics.jsonl exists already; resume the run or overwrite it$",
    ),
    # The experiments' command line.
    "--steps 0": (lambda d, p: option(d, steps=0), ValueError, "^--steps: expected a positive whole number, got 0$"),
    "--warmup as long as the run": (
        lambda d, p: option(d, steps=200),
        ValueError,
        "^--warmup: expected at least 0 and less than --steps 200, got 200$",
    ),
    "--learning-rate nan": (
        lambda d, p: option(d, learning_rate=float("nan")),
        ValueError,
        "^--learning-rate: expected a positive number, got nan$",
    ),
    "--beta2 1.5": (
        lambda d, p: option(d, beta2=1.5),
        ValueError,
        r"^--beta2: expected a number from 0 to 1, got 1\.5$",
    ),
    "--diagonal 1": (
        lambda d, p: option(d, diagonal=1.0),
        ValueError,
        "^--diagonal: expected less than 1: a flow map is learned on the off-diagonal rows$",
    ),
    "--decoupled as deep as the network": (
        lambda d, p: option(d, decoupled=4),
        ValueError,
        "^--decoupled: expected a whole number from 0 to --depth - 1, got 4$",
    ),
    "--seed -1": (lambda d, p: option(d, seed=-1), ValueError, "^--seed: expected a whole number from 0, got -1$"),
    "--resume --overwrite": (
        lambda d, p: option(d, resume="auto", overwrite=True),
        ValueError,
        "^--resume, --overwrite: expected at most one of them$",
    ),
    "--watch.grids between rows": (
        lambda d, p: option(d, watch=Watching(grids=150)),
        ValueError,
        r"^--watch\.grids: expected 0 or a multiple of --log-every 100, got 150$",
    ),
    "--machine.fsdp 3 of 8 devices": (
        lambda d, p: experiment(d, machine=Machine(fsdp=3)),
        ValueError,
        "^fsdp: expected a divisor of the number of devices, 8, got 3$",
    ),
    "--batch 12 on 8 devices": (
        lambda d, p: experiment(d, batch=12),
        ValueError,
        "^--batch: expected a multiple of the 8 devices, got 12$",
    ),
    "--methods with a misprint": (
        lambda d, p: catalogue.Config(out=d, methods=("lsd", "esdd")).check(),
        ValueError,
        "^--methods: unknown esdd; expected some of .*esd, ",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_words(name, tmp_path, problem):
    attempt, error, message = CASES[name]
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
