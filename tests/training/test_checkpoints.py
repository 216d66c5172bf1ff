"""Checkpoints: exact round trips, damage of every kind found and stepped over, refusals that say why."""

from __future__ import annotations

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow.training import Checkpoints, init_state, leaves, restore_params
from jflow.training.checkpoints import difference

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
    state = init_state(params, optax.adam(1e-3), jax.random.key(5), ema=(0.9,), reduction=(jnp.ones(3, bool), None))
    return state._replace(step=jnp.int32(step))


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
        restored = checkpoints.restore_latest(state_of(0))
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


def lie_in_meta(directory, step):
    path = directory / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["body"]["config"]["name"] = "Test"
    path.write_text(json.dumps(meta))


DAMAGE = {
    "a byte flipped": lambda directory, step: flip(files(directory, step)[0]),
    "a byte flipped in every file": lambda directory, step: [flip(path) for path in files(directory, step)],
    "a file truncated": lambda directory, step: truncate(files(directory, step)[0]),
    "a file deleted": lambda directory, step: (directory / str(step) / "state" / "manifest.ocdbt").unlink(),
    "the state deleted": lambda directory, step: shutil.rmtree(directory / str(step) / "state"),
    "the meta deleted": lambda directory, step: shutil.rmtree(directory / str(step) / "meta"),
    "the meta truncated": lambda directory, step: truncate(directory / str(step) / "meta" / "metadata"),
    "the config changed": lie_in_meta,
    "everything deleted": lambda directory, step: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in (directory / str(step)).iterdir()
    ],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    write(directory, steps=(10, 20))
    return directory


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(kind, written, tmp_path, caplog, assert_same):
    directory = tmp_path / "checkpoints"
    shutil.copytree(written, directory)
    DAMAGE[kind](directory, 20)
    caplog.set_level(logging.WARNING)
    params, _ = restore_params(tmp_path)
    assert float(params["wide"]) == 10.0
    assert "step 20 is damaged" in caplog.text
    with Checkpoints(directory, config=CONFIG, resume=True) as checkpoints:
        assert_same(checkpoints.restore_latest(state_of(0)), state_of(10, 10.0))
        assert caplog.text.count("step 20 is damaged") == 2
        # The step can be taken and saved again.
        checkpoints.save(state_of(20, 20.5))
    with Checkpoints(directory, config=CONFIG, resume=True) as checkpoints:
        assert float(checkpoints.restore_latest(state_of(0)).params["wide"]) == 20.5


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
    arrays, records = leaves.to_host(state_of(0))
    leaves.verify(arrays, records)
    arrays["params/dense/kernel"].view(np.uint8)[1, 2] ^= 0x04
    with pytest.raises(leaves.DamagedError, match="leaf params/dense/kernel has another checksum"):
        leaves.verify(arrays, records)


def test_nothing_to_restore(tmp_path, written):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with Checkpoints(tmp_path / "new") as checkpoints, pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoints.restore_latest(state_of(0))
    shutil.copytree(written, tmp_path / "all")
    for step in (10, 20):
        DAMAGE["a file deleted"](tmp_path / "all", step)
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
        restored = checkpoints.restore_latest(state_of(0), ignore=("optimizer", "new"))
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
