"""Batches from a host iterator: exact resume however far the thread has read, and no thread left behind."""

from __future__ import annotations

import gc
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow import sharding
from jflow.training import Feed, make_chunk, prefetch
from jflow.types import Batch
from tests.training import runs

BATCH = 16
TOTAL = 10
RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(50, 3)).astype(np.float32), RANDOM.normal(size=(50, 2)).astype(np.float32)


def rows(step):
    return (step * BATCH + np.arange(BATCH)) % len(X)


def length(step):
    return 4 if step % 4 == 0 and step + 4 <= TOTAL else 1


class Reader:
    """As awkward as is allowed: it uses its buffers again, and its state is the one that it goes on to change."""

    def __init__(self, stop=10**9, error=StopIteration):
        self.state = {"next": 0, "seen": []}
        self.buffer = Batch(x1=np.empty((BATCH, 3), np.float32), cond=np.empty((BATCH, 2), np.float32))
        self.stop, self.error = stop, error

    def __next__(self):
        step = self.state["next"]
        if step >= self.stop:
            raise self.error
        self.state["next"] += 1
        self.state["seen"].append(step)
        self.buffer.x1[:], self.buffer.cond[:] = X[rows(step)], Y[rows(step)]
        return self.buffer

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


class Given:
    """One batch after another, of whatever kind; its state is bytes, or what it is given."""

    def __init__(self, *batches, state=None):
        self.batches, self.place, self.state = batches, 0, state

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        return self.batches[self.place - 1]

    def get_state(self):
        return b"\xff%d" % self.place if self.state is None else self.state

    def set_state(self, state):
        self.place = int(state[1:])


def running():
    return [thread for thread in threading.enumerate() if thread.name == "jflow-feed"]


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_for(lambda: not running())


@pytest.fixture(scope="module")
def chunk(problem):
    return make_chunk(problem.step, prefetch.batch)


def train(state, chunk, feed, step, stop):
    while step < stop:
        state, metrics = chunk(state, feed.take(), length(step))
        step += length(step)
    return state, metrics


@pytest.fixture(scope="module")
def unbroken(problem, chunk):
    with Feed(Reader()) as feed:
        feed.start(0, None, length, TOTAL)
        return train(problem.state(), chunk, feed, 0, TOTAL)


@pytest.mark.slow
def test_training_sees_the_batches_of_the_iterator(problem, unbroken):
    def take(data, step):
        index = (step * BATCH + jnp.arange(BATCH, dtype=jnp.int32)) % len(X)
        return Batch(x1=data[0][index], cond=data[1][index])

    state, metrics = make_chunk(problem.step, take)(problem.state(), (X, Y), TOTAL)
    for got, expected in zip(jax.tree.leaves(unbroken[0].params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unbroken[1]["last_loss"].value(), metrics["last_loss"].value(), rtol=1e-5)


@pytest.mark.parametrize("stop", [4, 8, 9])
def test_a_resumed_run_is_the_unbroken_one(problem, chunk, unbroken, assert_same, stop):
    reader = Reader()
    with Feed(reader) as feed:
        feed.start(0, None, length, TOTAL)
        state, _ = train(problem.state(), chunk, feed, 0, stop)
        # The thread has read on, and the position has not moved with it.
        wait_for(lambda: reader.state["next"] > stop)
        position = json.dumps(feed.position)
    assert json.loads(position) == {"next": stop, "seen": list(range(stop))}
    with Feed(Reader()) as feed:
        feed.start(stop, json.loads(position), length, TOTAL)
        assert feed.position == json.loads(position)
        assert_same(train(state, chunk, feed, stop, TOTAL), unbroken)


def test_started_again_it_goes_on_after_what_was_taken():
    feed = Feed(Reader())
    feed.start(0, None, length, TOTAL)
    feed.take()
    first = feed.position
    feed.start(8, feed.position, length, TOTAL)
    assert feed.position == first
    data = feed.take()
    assert data.first == 8 and data.batches.x1.shape == (1, BATCH, 3)
    np.testing.assert_array_equal(data.batches.x1[0], X[rows(4)])
    feed.start(0, None, length, TOTAL)
    np.testing.assert_array_equal(feed.take().batches.x1, X[np.stack([rows(step) for step in range(5, 9)])])
    feed.close()
    assert feed.position["next"] == 9


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_reads_no_further_than_it_may(ahead):
    reader = Reader()
    with Feed(reader, ahead=ahead) as feed:
        feed.start(0, None, lambda step: 2, 100)
        for taken in range(3):
            wait_for(lambda: reader.state["next"] == 2 * (taken + ahead))  # noqa: B023
            time.sleep(0.02)
            assert reader.state["next"] == 2 * (taken + ahead) and feed.position["next"] == 2 * taken
            feed.take()


@pytest.mark.parametrize(
    ("shape", "spec"), [((8,), "data"), ((2, 4), ("data", "fsdp")), ((2, 4), "fsdp"), ((8,), None)]
)
def test_batches_do_not_depend_on_the_devices(shape, spec):
    mesh = jax.make_mesh(shape, ("data", "fsdp")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
    sharding = NamedSharding(mesh, PartitionSpec(spec))
    with Feed(Reader(), sharding=sharding) as feed:
        feed.start(0, None, length, TOTAL)
        data = feed.take()
    expected = [X[rows(step)] for step in range(4)]
    assert data.first.dtype == np.int32 and data.first.sharding.is_fully_replicated
    assert data.first.sharding.device_set == sharding.device_set
    for leaf in jax.tree.leaves(data.batches):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, spec)), 3)
    np.testing.assert_array_equal(data.batches.x1, expected)
    take = jax.jit(prefetch.batch, out_shardings=sharding)
    np.testing.assert_array_equal(take(data, np.int32(2)).x1, expected[2])
    assert take(data, np.int32(2)).cond.sharding.is_equivalent_to(sharding, 2)


def test_the_thread_has_the_callers_settings():
    device = jax.devices()[3]
    batch = {"wide": np.ones((2, 1)), "mask": np.ones(2, bool), "half": np.ones(2, jnp.bfloat16)}
    feed = Feed(Given(batch, batch))
    with jax.enable_x64(False), jax.default_device(device):
        feed.start(0, None, lambda step: 1, 2)
        narrow = feed.take()
    assert narrow.batches["wide"].dtype == np.float32 and narrow.batches["wide"].devices() == {device}
    assert narrow.batches["mask"].dtype == bool and narrow.batches["half"].dtype == jnp.bfloat16
    feed.start(1, feed.position, lambda step: 1, 2)
    wide = feed.take().batches["wide"]
    assert wide.dtype == np.float64 and wide.devices() == {jax.devices()[0]} and not wide.committed
    feed.close()


def test_states_that_are_bytes_are_kept_as_json():
    batches = [np.full((2, 1), step) for step in range(4)]
    with Feed(Given(*batches)) as feed:
        assert feed.position == {"jflow.bytes": "/zA="}
        feed.start(0, None, lambda step: 1, 4)
        feed.take(), feed.take()
        position = json.loads(json.dumps(feed.position))
    with Feed(Given(*batches)) as feed:
        feed.start(2, position, lambda step: 1, 4)
        np.testing.assert_array_equal(feed.take().batches, [batches[2]])


@pytest.mark.parametrize("state", [{1: 2}, (1, 2), {"a": np.int64(3)}, np.arange(2), float("nan"), {"a": {3}}])
def test_states_that_json_does_not_keep_are_refused(state):
    with pytest.raises(TypeError, match=r"iterator.get_state: expected bytes or a JSON value"):
        Feed(Given(np.ones((2, 1)), state=state)).start(0, None, length, TOTAL)


def test_the_end_of_the_data_is_named():
    with Feed(Reader(stop=6)) as feed:
        feed.start(0, None, length, TOTAL)
        assert feed.take().first == 0
        for _ in range(2):
            with pytest.raises(ValueError, match=r"the data ended at step 6, .* total_steps = 10"):
                feed.take()
        assert feed.position["next"] == 4 and not running()


def test_the_end_of_the_run_is_named():
    with Feed(Reader()) as feed:
        feed.start(8, {"next": 8, "seen": []}, length, TOTAL)
        assert [int(feed.take().first) for _ in range(2)] == [8, 9]
        with pytest.raises(ValueError, match="no chunk is left, those before step 10"):
            feed.take()


@pytest.mark.parametrize("error", [OSError("disk"), SystemExit(3)])
def test_what_the_iterator_raises_comes_in_its_turn(error):
    with Feed(Reader(stop=9, error=error), ahead=4) as feed:
        feed.start(0, None, length, TOTAL)
        wait_for(lambda: not running())
        assert [int(feed.take().first) for _ in range(3)] == [0, 4, 8]
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                feed.take()
            assert caught.value is error


ONE = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("expected", "batches", "message"),
    [
        (ValueError, [ONE, ONE[:3]], r"like the first, float32\[4, 2\], got float32\[3, 2\] at step 1"),
        (ValueError, [ONE, ONE.astype(np.float16)], "got float16"),
        (ValueError, [Batch(ONE), Batch(ONE, cond=ONE)], "like the first"),
        (ValueError, [Batch(ONE, cond=ONE[:2])], "one common leading axis"),
        (ValueError, [np.float32(1)], "one common leading axis"),
        (ValueError, [()], "one common leading axis"),
        (TypeError, [np.array(["a", "b"])], "expected arrays of numbers, got dtype <U1 at step 0"),
        (TypeError, [np.array([{}, {}])], "expected arrays of numbers"),
    ],
)
def test_batches_that_are_none_are_refused(expected, batches, message):
    with Feed(Given(*batches)) as feed:
        feed.start(0, None, lambda step: 2, 2)
        with pytest.raises(expected, match=message):
            feed.take()


def sharded(size):
    return NamedSharding(jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))


@pytest.mark.parametrize("size", [None, 4])
def test_values_that_do_not_fit_on_the_device_are_refused(size):
    """At the batch that has them; those that fit are narrowed."""
    good = Batch(np.full((4, 2), 0.1), cond=np.array([0, 1, -(2**31), 2**31 - 1]))
    cases = [
        (good._replace(cond=good.cond + 2**32 + 1), r"step 2: batch.cond: expected values that fit int32.* 4294967297"),
        (good._replace(x1=good.x1 * 1e40), r"step 2: batch.x1: expected values that fit float32"),
    ]
    for bad, message in cases:
        with jax.enable_x64(False), Feed(Given(good, good, bad), sharding=size and sharded(size)) as feed:
            feed.start(0, None, lambda step: 2 if step == 0 else 1, 3)
            taken = feed.take().batches
            assert taken.x1.dtype == jnp.float32 and taken.cond.dtype == jnp.int32
            np.testing.assert_array_equal(taken.x1[1], good.x1.astype(np.float32))
            np.testing.assert_array_equal(taken.cond[1], good.cond)
            with pytest.raises(ValueError, match=message):
                feed.take()


def test_other_refusals():
    feed = Feed(Reader())
    with pytest.raises(RuntimeError, match="start"):
        feed.take()
    for error, step, position, total in [
        (ValueError, 3, None, 4),
        (ValueError, -1, None, 4),
        (TypeError, 0, None, 4.0),
    ]:
        with pytest.raises(error, match=r"position|step"):
            feed.start(step, position, length, total)
    with pytest.raises(RuntimeError, match="start"):
        feed.take()
    for wrong in (lambda step: 0, lambda step: 1 / 0):
        feed.start(0, None, wrong, 4)
        with pytest.raises((ValueError, ZeroDivisionError), match=r"length|division"):
            feed.take()
    feed.close()
    with pytest.raises(RuntimeError, match="closed"):
        feed.take()
    with pytest.raises(TypeError, match="get_state, set_state"):
        Feed(iter([]))
    with pytest.raises(TypeError, match="sharding"):
        Feed(Reader(), sharding=PartitionSpec("data"))
    with pytest.raises(ValueError, match="ahead"):
        Feed(Reader(), ahead=0)
    with Feed(Given(np.ones((6, 1))), sharding=sharded(4)) as feed:
        feed.start(0, None, lambda step: 1, 1)
        with pytest.raises(ValueError, match="6"):
            feed.take()


@pytest.mark.slow
def test_the_thread_ends_with_its_feed():
    for ahead in (1, 2):
        feed = Feed(Reader(), ahead=ahead)
        feed.start(0, None, length, TOTAL)
        feed.take()
        feed.close()
        feed.close()
        assert not running(), "closed"
    with pytest.raises(KeyError), Feed(Reader()) as feed:
        feed.start(0, None, length, TOTAL)
        raise KeyError("the consumer")
    assert not running(), "an exception"
    feed = Feed(Reader())
    feed.start(0, None, length, TOTAL)
    assert running()
    del feed
    gc.collect()
    wait_for(lambda: not running())


def test_closing_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(prefetch, "PATIENCE", 0.05)
    asked, gate = threading.Event(), threading.Event()

    class Slow(Reader):
        def __next__(self):
            asked.set()
            gate.wait()
            return super().__next__()

    feed = Feed(Slow())
    feed.start(0, None, length, TOTAL)
    assert asked.wait(10)
    feed.close()
    with pytest.raises(RuntimeError, match="has not come back"):
        feed.start(0, None, length, TOTAL)
    gate.set()
    wait_for(lambda: not running())
    feed.start(0, None, length, TOTAL)
    np.testing.assert_array_equal(feed.take().batches.x1[0], X[rows(0)])
    feed.close()


def test_closing_wakes_the_one_who_waits():
    gate = threading.Event()

    class Slow(Reader):
        def __next__(self):
            gate.wait()
            return super().__next__()

    feed, raised = Feed(Slow()), []
    feed.start(0, None, length, TOTAL)

    def consume():
        with pytest.raises(RuntimeError, match="closed") as caught:
            feed.take()
        raised.append(caught)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.02)
    threading.Timer(0.05, gate.set).start()
    feed.close()
    consumer.join(10)
    assert raised and not consumer.is_alive()


class Unkept(runs.Batches):
    """Its state is no JSON value."""

    def get_state(self):
        return np.random.default_rng(0)


def fed(iterator, step=0, position=None, total_steps=10, **options):
    with Feed(iterator, **options) as feed:
        feed.start(step, position, lambda step: 2, total_steps)
        for _ in range(step, total_steps + 2, 2):
            feed.take()


def took_after_close():
    feed = Feed(runs.Batches(*[runs.ROWS] * 9))
    feed.start(0, None, lambda step: 2, 4)
    feed.close()
    feed.take()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.again(p, d, data=Feed(runs.Batches(runs.ROWS)), chunk=make_chunk(p.step, prefetch.batch)),
            ValueError,
            r"^position: expected the data's position at step 8, as Feed\.position was there, got None$",
            id="resumed with data from the host",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(runs.ROWS), step=4, position={"next_index": 4}),
            ValueError,
            r"^position: expected one of this iterator's, got \{'next_index': 4\}$",
            id="the position of another iterator",
        ),
        pytest.param(
            lambda d, p: Feed(batch for batch in [runs.ROWS]),
            TypeError,
            "^iterator: expected one with get_state, set_state, got generator$",
            id="a generator",
        ),
        pytest.param(
            lambda d, p: Feed(runs.Batches(), sharding=sharding.mesh()),
            TypeError,
            "^sharding: expected a NamedSharding or None, got Mesh$",
            id="a mesh instead of a sharding",
        ),
        pytest.param(
            lambda d, p: Feed(runs.Batches(), ahead=0),
            ValueError,
            "^ahead: expected a whole number of at least 1, got 0$",
            id="nothing read ahead",
        ),
        pytest.param(
            lambda d, p: Feed(runs.Batches(runs.ROWS)).take(),
            RuntimeError,
            r"^Feed: expected start\(\) before take\(\)$",
            id="taken before the start",
        ),
        pytest.param(
            lambda d, p: took_after_close(),
            RuntimeError,
            r"^Feed: expected start\(\) before take\(\), it is closed$",
            id="taken after the end",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(*[runs.ROWS] * 20)),
            ValueError,
            "^Feed: no chunk is left, those before step 10 were taken$",
            id="taken past the last step",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(runs.ROWS, runs.ROWS, runs.ROWS)),
            ValueError,
            "^iterator: the data ended at step 3, expected batches up to total_steps = 10$",
            id="data that end",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(runs.ROWS, runs.ROWS, OSError("shard 7 is gone"))),
            OSError,
            "^shard 7 is gone$",
            id="data that cannot be read",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(runs.ROWS, runs.ROWS[:5])),
            ValueError,
            r"^iterator: expected batches like the first, float32\[16, 3\], got float32\[5, 3\] at step 1$",
            id="a last batch that is shorter",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches({"x1": runs.ROWS, "cond": runs.ROWS[:4]})),
            ValueError,
            r"^iterator: step 0: expected arrays with one common leading axis of rows, got \[\(4,\), \(16,\)\]$",
            id="labels too few",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(np.array(["a.png", "b.png"]))),
            TypeError,
            "^iterator: expected arrays of numbers, got dtype <U5 at step 0$",
            id="names of files",
        ),
        pytest.param(
            lambda d, p: fed(Unkept(runs.ROWS)),
            TypeError,
            r"^iterator\.get_state: expected bytes or a JSON value, got Generator",
            id="a state that JSON does not keep",
        ),
        pytest.param(
            lambda d, p: fed(runs.Batches(runs.ROWS), step=4),
            ValueError,
            r"^position: expected the data's position at step 4, as Feed\.position was there, got None$",
            id="begun in the middle",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error


def to_batch(row):
    return Batch(x1=row["image"], cond=row["label"])


def test_dictionaries_of_grain_are_converted_and_resumed():
    """Grain's own pipelines yield dictionaries; a position taken in the middle gives the same batches again."""
    grain = pytest.importorskip("grain")
    source = [{"image": x, "label": np.int32(place), "name": str(place)} for place, x in enumerate(X)]

    def feed():
        data = grain.MapDataset.source(source).seed(3).shuffle().repeat().batch(BATCH)
        return Feed(iter(data.to_iter_dataset()), convert=to_batch)

    def taken(feed, step, position):
        with feed:
            feed.start(step, position, lambda _: 2, 6)
            found = []
            for _ in range(step, 6, 2):
                found.append((jax.tree.map(np.asarray, feed.take().batches), feed.position))
        return found

    whole = taken(feed(), 0, None)
    assert isinstance(whole[0][0], Batch) and whole[0][0].x1.shape == (2, BATCH, 3)
    for batches, _ in whole:
        np.testing.assert_array_equal(batches.x1, X[batches.cond])
    resumed = taken(feed(), 2, json.loads(json.dumps(whole[0][1])))
    for (batches, position), (expected, at) in zip(resumed, whole[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, batches, expected)
        assert position == at


def test_what_convert_raises_comes_in_its_turn_and_it_must_be_a_function():
    good, bad = {"image": X[:4], "label": np.arange(4)}, {"image": X[:4]}
    with Feed(Given(good, bad), convert=to_batch) as feed:
        feed.start(0, None, lambda _: 1, 2)
        np.testing.assert_array_equal(feed.take().batches.x1[0], X[:4])
        with pytest.raises(KeyError, match="label"):
            feed.take()
    with pytest.raises(TypeError, match=r"^convert: expected a function"):
        Feed(Given(good), convert=lambda: None)
