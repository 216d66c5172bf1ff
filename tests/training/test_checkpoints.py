"""Checkpoints: exact round trips, damage of every kind found and stepped over, refusals that say why."""

from __future__ import annotations

import json
import logging
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import sharding
from jflow.training import Checkpoints, checkpoint_arrays, init_state, restore_params
from jflow.training.checkpoint_config import difference
from tests.training import runs

# Reads of a damaged checkpoint that fail leave others under way, which report to an event loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"name": "test", "optimizer": {"learning_rate": 1e-3, "steps": [1, 2]}}


def state_of(step, value=1.0):
    """A state with leaves of many kinds; made without compiling a step."""
    params = {
        "dense": {"kernel": jnp.full((3, 2), value, jnp.float32) + jnp.arange(2, dtype=jnp.float32)[None]},
        "half": jnp.full((5,), value, jnp.bfloat16),
        "wide": jnp.full((), value, jnp.float64),
        "none": jnp.zeros((0, 3), jnp.float32),
    }
    state = init_state(params, optax.adam(1e-3), jax.random.key(5), ema=(0.9,))
    return state._replace(step=jnp.int32(step), objective_state=(jnp.ones(3, bool), None))


def write(directory, steps=(10, 20, 30), **kwargs):
    with Checkpoints(directory, config=CONFIG, **kwargs) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step, float(step)))


def files(directory, step):
    """The data files of a checkpoint, largest first."""
    found = [path for path in (directory / str(step) / "state").rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(found, key=lambda path: -path.stat().st_size)


def test_round_trip_is_exact(tmp_path, assert_same):
    write(tmp_path, steps=(10,))
    with Checkpoints(tmp_path, config=CONFIG, resume=True) as checkpoints:
        restored, _ = checkpoints.restore_latest(state_of(0))
    assert_same(restored, state_of(10, 10.0))
    assert restored.key.dtype == jax.random.key(0).dtype
    # As free to follow other arrays as a fresh state.
    assert not restored.params["wide"].committed
    assert isinstance(restored.opt_state[0], type(state_of(0).opt_state[0]))


def test_relative_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("runs/one", steps=(10,))
    params, config = restore_params("runs/one")
    assert float(params["wide"]) == 10.0 and config == CONFIG


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, keep=2)
    with Checkpoints(tmp_path, config=CONFIG, resume=True) as checkpoints:
        assert checkpoints.steps() == [20, 30]


def test_the_best_are_kept_beside_the_newest(tmp_path):
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: float("nan"), 60: 4.0}
    for steps in ((10, 20, 30), (40, 50, 60)):
        # The scores outlive the process.
        with Checkpoints(tmp_path, config=CONFIG, keep=1, keep_best=2, resume=True) as checkpoints:
            for step in steps:
                checkpoints.save(state_of(step, float(step)), score=scores[step])
    with Checkpoints(tmp_path, config=CONFIG, resume=True) as checkpoints:
        assert checkpoints.steps() == [20, 30, 60]
    assert float(restore_params(tmp_path, step="best")[0]["wide"]) == 20.0
    write(tmp_path / "without", steps=(10,))
    with pytest.raises(FileNotFoundError, match="no checkpoint has a score"):
        restore_params(tmp_path / "without", step="best")


def test_the_position_of_the_data_comes_back(tmp_path):
    position = {"next_index": 7, "inner": [1, {"a": None}]}
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state_of(10), position=position)
        with pytest.raises(TypeError, match="position: expected"):
            checkpoints.save(state_of(20), position=object())
    with Checkpoints(tmp_path, config=CONFIG, resume=True) as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[1] == position


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_saved_on_eight_devices_restored_on_fewer(fsdp, tmp_path, assert_same):
    """And the other way: values to the last bit, laid out as the template is."""
    plain = state_of(10, 3.0)

    def placed(state, devices, fsdp):
        mesh = sharding.mesh(fsdp, jax.devices()[:devices])
        return sharding.place(state, sharding.parts(state, mesh, smallest=1))

    with Checkpoints(tmp_path, config=CONFIG, keep=None) as checkpoints:
        checkpoints.save(placed(plain, 8, fsdp))
        for devices in (1, 2, 4, 8):
            template = placed(state_of(0), devices, min(fsdp, devices))
            restored, _ = checkpoints.restore_latest(template)
            assert_same(sharding.local(restored), sharding.local(plain))
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, template)
        assert_same(checkpoints.restore_latest(state_of(0))[0], plain)
        checkpoints.save(plain._replace(step=jnp.int32(11)))
        restored, _ = checkpoints.restore_latest(placed(state_of(0), 8, fsdp))
        assert_same(sharding.local(restored), sharding.local(plain._replace(step=jnp.int32(11))))


def test_checksums_do_not_depend_on_the_layout_and_see_what_moves():
    kernel = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    found = []
    for fsdp in (1, 2, 8):
        mesh = sharding.mesh(fsdp)
        found.append(
            checkpoint_arrays.checksums(sharding.place({"w": kernel}, sharding.parts({"w": kernel}, mesh, smallest=1)))
        )
    assert found[0] == found[1] == found[2] == checkpoint_arrays.checksums({"w": kernel})
    # Two rows exchanged hold the same words.
    assert checkpoint_arrays.checksums({"w": kernel[::-1]}) != found[0]
    for dtype in (np.bool_, np.int8, np.float16, jnp.bfloat16, np.float64, np.int64, np.complex64):
        value = (kernel * 100).astype(dtype)
        assert checkpoint_arrays.checksums({"w": value}) == checkpoint_arrays.checksums({"w": jnp.asarray(value)}), (
            dtype
        )


def test_a_save_does_not_see_what_later_steps_do_to_the_buffers(tmp_path, assert_same):
    double = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
    state = state_of(10)
    params = {"w": jnp.arange(300_000, dtype=jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state._replace(params=params))
        for _ in range(5):
            params = double(params)
    loaded, _ = restore_params(tmp_path)
    np.testing.assert_array_equal(loaded["w"], np.arange(300_000, dtype=np.float32))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def meta_of(directory, step):
    return directory / str(step) / "meta" / "metadata"


def edit_meta(directory, step, edit, sign=True):
    """Another record, with a checksum that is right for it, as a program with a mistake would write it."""
    path = meta_of(directory, step)
    meta = json.loads(path.read_text())
    edit(meta["body"])
    if sign:
        meta["crc32"] = zlib.crc32(json.dumps(meta["body"], sort_keys=True).encode())
    path.write_text(json.dumps(meta))


def largest(directory, step):
    return files(directory, step)[0]


def replace(path, make):
    path.unlink()
    make(path)


def copy_over(source, target):
    shutil.rmtree(target)
    shutil.copytree(source, target)


# Each is done to the newer of two checkpoints, of steps 10 and 20.
DAMAGE = {
    "a byte flipped": lambda d: flip(largest(d, 20)),
    "a byte flipped in every file": lambda d: [flip(path) for path in files(d, 20)],
    "a file truncated": lambda d: truncate(largest(d, 20)),
    "a file emptied": lambda d: largest(d, 20).write_bytes(b""),
    "a file full of zeros": lambda d: largest(d, 20).write_bytes(bytes(largest(d, 20).stat().st_size)),
    "a file deleted": lambda d: (d / "20" / "state" / "manifest.ocdbt").unlink(),
    "a file that is a directory": lambda d: replace(largest(d, 20), lambda path: path.mkdir()),
    "files that lead nowhere": lambda d: [
        replace(f, lambda path: path.symlink_to(d / "nothing")) for f in files(d, 20)
    ],
    "the state deleted": lambda d: shutil.rmtree(d / "20" / "state"),
    "the state of another step": lambda d: copy_over(d / "10" / "state", d / "20" / "state"),
    "another step altogether": lambda d: copy_over(d / "10", d / "20"),
    "the meta deleted": lambda d: shutil.rmtree(d / "20" / "meta"),
    "the meta truncated": lambda d: truncate(meta_of(d, 20)),
    "the meta emptied": lambda d: meta_of(d, 20).write_text(""),
    "the meta of another step": lambda d: copy_over(d / "10" / "meta", d / "20" / "meta"),
    "the meta another kind of JSON": lambda d: meta_of(d, 20).write_text("[1, 2]"),
    "the config changed": lambda d: edit_meta(d, 20, lambda body: body["config"].update(name="Test"), sign=False),
    "a checksum changed": lambda d: edit_meta(
        d, 20, lambda body: body["leaves"]["params/wide"].update(checksum=[1, 2])
    ),
    "nothing in it": lambda d: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in (d / "20").iterdir()
    ],
}
# What is no damage to a whole checkpoint, and restores it.
HARMLESS = {
    "half of a later step": lambda d: shutil.copytree(d / "20", d / "30.orbax-checkpoint-tmp-1"),
    "a file that belongs to nobody": lambda d: (d / "20" / "notes.txt").write_text("mine"),
    "a directory of another name": lambda d: (d / "best").mkdir(),
    "an older step damaged": lambda d: flip(largest(d, 10)),
}
# What is no damage that an older checkpoint would mend, and is refused by name.
REFUSED = {
    "another config": (
        lambda d: edit_meta(d, 20, lambda body: body["config"].update(name="other")),
        "config: it differs from the checkpoint's:\n  name: checkpoint 'other', now 'test'",
    ),
    "a leaf more": (
        lambda d: edit_meta(d, 20, lambda body: body["leaves"].update(more=body["leaves"]["step"])),
        r"another structure: it lacks \[\] and has beside \['more'\]",
    ),
    "a leaf of another dtype": (
        lambda d: edit_meta(d, 20, lambda body: body["leaves"]["params/wide"].update(dtype="float32")),
        r"nothing is cast\): params/wide is float32\[\], expected float64\[\]",
    ),
    "a leaf of another shape": (
        lambda d: edit_meta(d, 20, lambda body: body["leaves"]["params/half"].update(shape=[4])),
        r"params/half is bfloat16\[4\], expected bfloat16\[5\]",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    write(directory, steps=(10, 20))
    return directory


@pytest.fixture
def damaged(written, tmp_path):
    """Where a copy of the two checkpoints is, after one kind of damage."""

    def make(damage):
        shutil.copytree(written, tmp_path / "checkpoints")
        damage(tmp_path / "checkpoints")
        return tmp_path / "checkpoints"

    return make


@pytest.mark.representatives(
    "a byte flipped", "a file truncated", "the state deleted", "the meta of another step", "nothing in it"
)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(kind, damaged, caplog, assert_same):
    directory = damaged(DAMAGE[kind])
    caplog.set_level(logging.WARNING)
    params, _ = restore_params(directory.parent)
    assert float(params["wide"]) == 10.0
    assert "step 20 is damaged" in caplog.text
    with Checkpoints(directory, config=CONFIG, resume=True) as checkpoints:
        assert_same(checkpoints.restore_latest(state_of(0))[0], state_of(10, 10.0))
        assert caplog.text.count("step 20 is damaged") == 2
        # The step can be taken and saved again.
        checkpoints.save(state_of(20, 20.5))
    with Checkpoints(directory, config=CONFIG, resume=True) as checkpoints:
        assert float(checkpoints.restore_latest(state_of(0))[0].params["wide"]) == 20.5


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_is_no_damage_changes_nothing(kind, damaged, caplog, assert_same):
    with Checkpoints(damaged(HARMLESS[kind]), config=CONFIG, resume=True) as checkpoints:
        assert_same(checkpoints.restore_latest(state_of(0))[0], state_of(20, 20.0))
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_older_checkpoint_would_not_mend_is_refused(kind, damaged):
    damage, message = REFUSED[kind]
    directory = damaged(damage)
    with Checkpoints(directory, config=CONFIG, resume=True) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_latest(state_of(0))
        assert checkpoints.steps() == [10, 20]


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file; expected a directory"):
        Checkpoints(tmp_path / "checkpoints", resume=True)


def test_every_flip_is_found_or_harmless(written, tmp_path):
    """One byte at each of 12 places in each file: the state is either right or refused, never wrong."""
    refused = 0
    expected = np.asarray(state_of(20, 20.0).params["dense"]["kernel"])
    for number, original in enumerate(files(written, 20)[:3]):
        for place in np.linspace(0, original.stat().st_size - 1, 4).astype(int):
            directory = tmp_path / f"{number}-{place}"
            shutil.copytree(written, directory)
            path = directory / original.relative_to(written)
            data = bytearray(path.read_bytes())
            data[place] ^= 0x04
            path.write_bytes(bytes(data))
            try:
                params, _ = restore_params(directory, step=20)
            except FileNotFoundError:
                refused += 1
            else:
                np.testing.assert_array_equal(params["dense"]["kernel"], expected)
    assert refused > 0


def test_a_flipped_bit_in_a_leaf_is_found_by_its_checksum():
    """Without the storage, which may notice some flips itself."""
    arrays, records = checkpoint_arrays.copies(state_of(0))
    checkpoint_arrays.verify(arrays, records)
    flipped = np.array(arrays["params/dense/kernel"])
    flipped.view(np.uint8)[1, 2] ^= 0x04
    arrays["params/dense/kernel"] = flipped
    with pytest.raises(checkpoint_arrays.DamagedError, match="leaf params/dense/kernel has another checksum"):
        checkpoint_arrays.verify(arrays, records)


def test_nothing_to_restore(tmp_path, written):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with Checkpoints(tmp_path / "new") as checkpoints, pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoints.restore_latest(state_of(0))
    shutil.copytree(written, tmp_path / "all")
    for step in (10, 20):
        (tmp_path / "all" / str(step) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(FileNotFoundError, match=r"damaged: steps \[20, 10\]"):
        restore_params(tmp_path / "all")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 15"):
        restore_params(written, step=15)


def test_another_config_is_refused_with_the_difference(written):
    other = {"name": "test", "optimizer": {"learning_rate": 3e-4, "steps": (1, 2)}, "new": 1}
    with Checkpoints(written, config=other, resume=True) as checkpoints:
        with pytest.raises(ValueError, match="config: it differs") as error:
            checkpoints.restore_latest(state_of(0))
        assert "optimizer.learning_rate: checkpoint 0.001, now 0.0003" in str(error.value)
        assert "new: checkpoint '(absent)', now 1" in str(error.value)
        assert "steps" not in str(error.value)
        restored, _ = checkpoints.restore_latest(state_of(0), ignore=("optimizer", "new"))
        assert int(restored.step) == 20
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) == {}
    assert difference({"a": 1}, {"a": True}) == {"a": (1, True)}


def test_another_template_is_refused_and_nothing_is_cast(written):
    state = state_of(0)
    with Checkpoints(written, config=CONFIG, resume=True) as checkpoints:
        narrow = state._replace(params={**state.params, "wide": state.params["wide"].astype(jnp.float32)})
        with pytest.raises(ValueError, match=r"params/wide is float64\[\], expected float32\[\]"):
            checkpoints.restore_latest(narrow)
        more = state._replace(ema={**state.ema, "0.99": {"w": jnp.ones(1)}})
        with pytest.raises(ValueError, match=r"it lacks \['ema/0.99/w'\]"):
            checkpoints.restore_latest(more)
        rbg = state._replace(key=jax.random.key(0, impl="rbg"))
        with pytest.raises(ValueError, match="key is key"):
            checkpoints.restore_latest(rbg)
        # Not damage: the checkpoint is still there.
        assert checkpoints.steps() == [10, 20]


def test_a_directory_in_use_is_refused(tmp_path):
    write(tmp_path, steps=(10,))
    with pytest.raises(FileExistsError, match="not empty; resume the run or overwrite it"):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path, config=CONFIG, resume=True) as checkpoints, pytest.raises(ValueError, match="step"):
        checkpoints.save(state_of(10))
    write(tmp_path, steps=(5,), overwrite=True)
    with Checkpoints(tmp_path, resume=True) as checkpoints:
        assert checkpoints.steps() == [5]
    with pytest.raises(ValueError, match="at most one"):
        Checkpoints(tmp_path, resume=True, overwrite=True)
    with pytest.raises(TypeError, match="config: expected"):
        Checkpoints(tmp_path / "other", config={"f": object()})


def test_parameters_alone(written, assert_same):
    before = sorted(str(path) for path in written.rglob("*"))
    params, config = restore_params(written)
    assert_same(params, state_of(20, 20.0).params)
    assert config == CONFIG
    average, _ = restore_params(written, "0.9", step=10)
    assert_same(average, state_of(10, 10.0).ema["0.9"])
    assert average["half"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"which: expected one of 'params', '0\.9', got '0\.5'"):
        restore_params(written, "0.5")
    assert sorted(str(path) for path in written.rglob("*")) == before
    with jax.enable_x64(False), pytest.raises(ValueError, match="params/wide: expected jax_enable_x64"):
        restore_params(written)


def test_parameters_that_are_not_dictionaries(tmp_path, assert_same):
    params = (jnp.ones(2), [jnp.zeros(3)])
    bare = init_state(jnp.arange(3.0), optax.sgd(0.1), jax.random.key(0))
    with Checkpoints(tmp_path / "nested") as nested, Checkpoints(tmp_path / "bare") as single:
        nested.save(init_state(params, optax.sgd(0.1), jax.random.key(0)))
        single.save(bare)
    with pytest.raises(ValueError, match="pass template"):
        restore_params(tmp_path / "nested")
    template = jax.eval_shape(lambda: params)
    assert_same(restore_params(tmp_path / "nested", template=template)[0], params)
    assert_same(restore_params(tmp_path / "bare")[0], bare.params)


def restored(problem, out, *arguments, **options):
    runs.train(problem, out)
    return restore_params(out, *arguments, **options)


def with_damage(problem, out):
    runs.train(problem, out)
    shutil.rmtree(out / "checkpoints" / "8" / "state")
    return runs.train(problem, out, 16, resume="auto")


def at(problem, step):
    return problem.state()._replace(step=jnp.int32(step))


# Reads that fail leave others under way, which report to an event loop that has ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.train(p, "gs://bucket/run"),
            ValueError,
            "^path: expected a path of a mounted file system, got 'gs://bucket/run'$",
            id="a bucket",
        ),
        pytest.param(
            lambda d, p: runs.train(p, runs.text(d / "run", "mine")),
            NotADirectoryError,
            "^path: .*run is a file; expected a directory$",
            id="a file in the run's place",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, config={"rate": 3e-3}, ignore="rate"),
            TypeError,
            "^ignore: expected a collection of names, got the string 'rate'$",
            id="one name of many",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d / "new", resume=True),
            FileNotFoundError,
            "new/checkpoints: there is no checkpoint$",
            id="resumed from nothing",
        ),
        pytest.param(
            lambda d, p: with_damage(p, d),
            FileNotFoundError,
            r"no checkpoint is whole; damaged: steps \[8\]$",
            id="all checkpoints damaged",
        ),
        pytest.param(
            lambda d, p: runs.saved(d, at(p, 0), at(p, 0)),
            ValueError,
            "^step: .* holds step 0, not before 0$",
            id="the start saved twice",
        ),
        pytest.param(
            lambda d, p: restored(p, d, step="latest"),
            TypeError,
            "^step: expected a whole number, got str 'latest'$",
            id="a step by another name",
        ),
        pytest.param(
            lambda d, p: Checkpoints(runs.text(d / "file", "mine")),
            NotADirectoryError,
            "^directory: .*file is a file; expected a directory$",
            id="a file in the directory's place",
        ),
        pytest.param(
            lambda d, p: [runs.saved(d, at(p, 4)), Checkpoints(d)],
            FileExistsError,
            "is not empty; resume the run or overwrite it$",
            id="a directory in use",
        ),
        pytest.param(
            lambda d, p: Checkpoints(d, notes={"tags": {"a"}}),
            TypeError,
            "^notes: expected dictionaries, lists, .*Object of type set",
            id="notes that are a set",
        ),
        pytest.param(
            lambda d, p: runs.saved(d, at(p, 4), at(p, 4)),
            ValueError,
            "^step: .* holds step 4, not before 4$",
            id="a step saved twice",
        ),
        pytest.param(
            lambda d, p: runs.saved(d, at(p, 4), position=np.int64(3)),
            TypeError,
            "^position: expected dictionaries, lists, .*Object of type int64",
            id="a position of numpy",
        ),
        pytest.param(
            lambda d, p: restore_params(d / "runs" / "lost"),
            FileNotFoundError,
            "runs/lost: no such directory, so no checkpoint$",
            id="a run that is not there",
        ),
        pytest.param(
            lambda d, p: restore_params(d),
            FileNotFoundError,
            ": there is no checkpoint$",
            id="a directory without checkpoints",
        ),
        pytest.param(
            lambda d, p: restored(p, d, step=5),
            FileNotFoundError,
            r"no checkpoint of step 5; there are \[8\]$",
            id="a step that was not kept",
        ),
        pytest.param(
            lambda d, p: restored(p, d, step="best"),
            FileNotFoundError,
            "checkpoints: no checkpoint has a score$",
            id="the best of those without scores",
        ),
        pytest.param(
            lambda d, p: restored(p, d, "0.999"),
            ValueError,
            r"^which: expected one of 'params', '0\.9', '0\.99', got '0\.999'$",
            id="an average that was not kept",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
