"""Batches from a host iterator, several steps of them at once, on the devices before they are needed.

For example::

    feed = Feed(datasets.pipeline(source, batch_size=256), sharding=rows)
    chunk = make_chunk(step, prefetch.batch, batch_sharding=rows)
    with feed:
        feed.start(0, None, plan.length, total_steps)
        state, metrics = chunk(state, feed.take(), steps)

A thread reads, stacks and transfers chunks of steps while the devices compute. ``feed.position`` is where the iterator
was after the chunks that were taken, however far it has read since: kept with a checkpoint, it makes a resumed run see
the batches that it would have seen.
"""

from __future__ import annotations

import base64
import collections
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jflow import checks
from jflow.types import Array, PyTree

Place = Callable[[np.ndarray], Array]

# Seconds that close() gives the iterator to come back with the batch it is at.
PATIENCE = 5.0
# The one entry of a position that stands for bytes.
BYTES = "jflow.bytes"


class BatchIterator(Protocol):
    """What a Feed reads: one batch after another, from a state that can be kept. Grain's iterators are such."""

    def __next__(self) -> PyTree:
        """This process's rows of the next batch: numpy arrays, leading axis B / processes in all; or StopIteration."""
        ...

    def get_state(self) -> Any:
        """Where it is: bytes, or a JSON value other than None."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes where ``get_state`` once was."""
        ...


class Stacked(NamedTuple):
    """The batches of a chunk of K steps.

    Attributes:
      first: the step of the first one, an int32 scalar.
      batches: the batches, leaves ``[K, B, ...]``.
    """

    first: Array
    batches: PyTree


def batch(data: Stacked, step: Array) -> PyTree:
    """The batch of a step, leaves ``[B, ...]``: the ``batch_fn`` of ``make_chunk`` for what ``Feed.take`` returns.

    Traced; ``step`` is an int32 scalar, one of the chunk's: ``data.first``, ..., ``data.first + K - 1``.
    """
    place = step - data.first
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), data.batches)


class Feed:
    """Chunks of batches from an iterator, put on the devices by a thread of its own.

    The iterator is the caller's, and only this feed may use it. Its arrays are copied, so it may use its buffers again.
    Where jax has no 64-bit types (``jax_enable_x64`` is off when the feed is started) float64 is rounded to float32, and
    int64 becomes int32; a value that does not fit is refused.

    With a ``sharding``, row i of process p's B/P rows is row p B/P + i of the batch of B, whatever the devices: the
    batch does not depend on how many there are, nor, if the iterator's rows do not, on the number of processes P.

    Args:
      iterator: a BatchIterator. All its batches have one structure and the same shapes and dtypes.
      sharding: how the rows, the leading axis of a batch, lie on a mesh; None for the default device.
      ahead: how many chunks may be on the devices, or on their way, before they are taken. Those taken stay there until
        they have been used: up to ``ahead`` + 2 chunks in all.

    Raises:
      ValueError: for ``ahead`` below 1; TypeError if it is not a whole number, ``sharding`` is not a NamedSharding, or a method
        of the iterator is missing.
    """

    def __init__(self, iterator: BatchIterator, *, sharding: NamedSharding | None = None, ahead: int = 2) -> None:
        missing = [name for name in ("__next__", "get_state", "set_state") if not hasattr(iterator, name)]
        if missing:
            raise TypeError(f"iterator: expected one with {', '.join(missing)}, got {type(iterator).__name__}")
        if sharding is not None and not isinstance(sharding, NamedSharding):
            raise TypeError(f"sharding: expected a NamedSharding or None, got {type(sharding).__name__}")
        self._iterator, self._sharding = iterator, sharding
        self._ahead = checks.integer("ahead", ahead, low=1)
        self._position: Any = None
        self._shelf: _Shelf | None = None
        self._thread: threading.Thread | None = None

    @property
    def position(self) -> Any:
        """The iterator's state after the batches of all chunks taken, a JSON value; bytes are encoded in it.

        Raises:
          TypeError: when the iterator's state is no JSON value (lists and dicts with string keys, numbers that are
            finite) and no bytes.
        """
        return _encode(self._iterator.get_state()) if self._position is None else self._position

    def start(self, step: int, position: Any, length: Callable[[int], int], total_steps: int) -> None:
        """Begins to read the chunks ``step``, ``step + length(step)``, ... before ``total_steps``.

        A feed may be started again: what was read and not taken is then dropped.

        Args:
          step: of the first batch.
          position: the ``position`` of a feed that had taken the chunks before ``step``. With None the iterator stays
            where it is (at this feed's position, when it was started before).
          length: the number of steps of the chunk that begins at a step, at least 1; called in the thread.
          total_steps: the step before which the last chunk ends.

        Raises:
          ValueError: when step > 0 and there is no position, or for numbers below 0.
          TypeError: as ``position``, and for numbers that are not whole.
          RuntimeError: when the iterator is still busy with a batch for an earlier start.
        """
        checks.integer("step", step)
        checks.integer("total_steps", total_steps)
        if step > 0 and position is None:
            raise ValueError(
                f"position: expected the data's position at step {step}, as Feed.position was there, got None"
            )
        self.close()
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError("Feed: the iterator has not come back from a batch that it was asked for before")
        position = self._position if position is None else position
        if position is not None:
            try:
                self._iterator.set_state(_decode(position))
            except Exception as error:
                raise ValueError(f"position: expected one of this iterator's, got {position!r}") from error
        self._position = _encode(self._iterator.get_state())
        self._shelf = _Shelf(self._ahead)
        # A feed that is forgotten ends its thread, which therefore must not hold it.
        weakref.finalize(self, self._shelf.close)
        # Both may be set for the caller's thread alone.
        # jax's class for its options gets their names while jax is imported: its types do not have them.
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        spans = _spans(step, length, total_steps)
        arguments = (self._shelf, self._iterator, _placing(self._sharding), spans, total_steps, x64, device)
        self._thread = threading.Thread(target=_fill, args=arguments, name="jflow-feed", daemon=True)
        self._thread.start()

    def take(self) -> Stacked:
        """The next chunk, in order; waits for it.

        Raises:
          ValueError: naming the step, when the data ended, no chunk is left before ``total_steps``, or a batch is unlike
            the first one, has leaves of different numbers of rows, or rows that the sharding does not divide or wants
            on another process, or a value does not fit the dtype that it gets on the device (an int64 beyond int32, a
            finite float64 beyond float32); TypeError when it holds no numbers.
          RuntimeError: before ``start`` and after ``close``.
          Exception: whatever else the iterator or ``length`` raised, after the chunks before it were taken.
        """
        if self._shelf is None:
            raise RuntimeError("Feed: expected start() before take()")
        data, self._position = self._shelf.take()
        return data

    def close(self) -> None:
        """Ends the thread and drops what was not taken; ``position`` stays.

        Where the iterator is in the middle of a batch, this waits for it 5 s at most; the thread ends after that batch.
        """
        if self._shelf is not None and self._thread is not None:
            self._shelf.close()
            self._thread.join(PATIENCE)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Shelf:
    """What lies between the two threads: at most ``size`` chunks with the position after each, and an error at the end.

    Its lock may be taken again by the thread that has it, since ``close`` may come from the garbage collector.
    """

    def __init__(self, size: int) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._size = size
        self._chunks: collections.deque[tuple[Stacked, Any]] = collections.deque()
        self._error: BaseException | None = None
        self.closed = False

    def room(self) -> bool:
        """Waits until another chunk may be made; whether it is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self._chunks) < self._size)
            return not self.closed

    def put(self, data: Stacked, position: Any) -> None:
        with self._changed:
            if not self.closed:
                self._chunks.append((data, position))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self) -> tuple[Stacked, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._chunks or self._error is not None)
            if self.closed:
                raise RuntimeError("Feed: expected start() before take(), it is closed")
            if not self._chunks:
                # The wait above ended, so that without chunks there is an error.
                assert self._error is not None
                raise self._error
            self._changed.notify_all()
            return self._chunks.popleft()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._chunks.clear()
            self._changed.notify_all()


def _fill(
    shelf: _Shelf,
    iterator: BatchIterator,
    place: Place,
    spans: Iterator[tuple[int, int]],
    total_steps: int,
    x64: bool,
    device: Any,
) -> None:
    """The thread: chunk after chunk, until it is told to stop or something is raised."""
    try:
        with jax.enable_x64(x64), jax.default_device(device):
            for first, chunk in _chunks(shelf, iterator, spans, total_steps):
                position = _encode(iterator.get_state())
                shelf.put(Stacked(place(np.asarray(first, np.int32)), jax.tree.map(place, chunk)), position)
                # Free the host's copy before the thread waits.
                del chunk
    except BaseException as error:
        # Propagate every error; otherwise the consumer deadlocks.
        shelf.fail(error)


def _spans(step: int, length: Callable[[int], int], total_steps: int) -> Iterator[tuple[int, int]]:
    """The first step and the length of each chunk."""
    while step < total_steps:
        count = checks.integer(f"length({step})", length(step), low=1)
        yield step, count
        step += count


def _chunks(
    shelf: _Shelf, iterator: BatchIterator, spans: Iterator[tuple[int, int]], total_steps: int
) -> Iterator[tuple[int, PyTree]]:
    """The first step and the batches, numpy arrays [K, rows, ...], of each chunk, when there is room; until closed."""
    kind = None
    for first, count in spans:
        chunk = None
        if not shelf.room():
            return
        for step in range(first, first + count):
            if shelf.closed:
                return
            try:
                values = next(iterator)
            except StopIteration:
                raise ValueError(
                    f"iterator: the data ended at step {step}, expected batches up to total_steps = {total_steps}"
                ) from None
            values = jax.tree.map(np.asarray, values)
            got = jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", values)
            if kind is None:
                _check(values, step)
                kind = got
            elif jax.tree.flatten(got) != jax.tree.flatten(kind):
                raise ValueError(f"iterator: expected batches like the first, {kind}, got {got} at step {step}")
            checks.fits(f"iterator: step {step}: batch", values)
            if chunk is None:
                chunk = jax.tree.map(lambda leaf: np.empty((count, *leaf.shape), leaf.dtype), values)  # noqa: B023
            # Copied one by one: the iterator may use its buffers again for the next batch.
            for whole, leaf in zip(jax.tree.leaves(chunk), jax.tree.leaves(values), strict=True):
                whole[step - first] = leaf
        yield first, chunk
    raise ValueError(f"Feed: no chunk is left, those before step {total_steps} were taken")


def _check(values: PyTree, step: int) -> None:
    """Numbers, with one common leading axis of rows."""
    for leaf in jax.tree.leaves(values):
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise TypeError(f"iterator: expected arrays of numbers, got dtype {leaf.dtype} at step {step}")
    checks.rows(f"iterator: step {step}", values)


def _placing(sharding: NamedSharding | None) -> Place:
    """Puts this process's part [K, B/P, ...] of a chunk, or a scalar, on the devices."""
    if sharding is None:
        return jax.device_put
    # On a mesh of this process's own devices the batch is this process's alone.
    alone = sharding.is_fully_addressable
    processes, process = (1, 0) if alone else (jax.process_count(), jax.process_index())
    stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def place(local: np.ndarray) -> Array:
        # Neither case makes processes talk to each other: the order among their other communications would be lost.
        if local.ndim == 0:
            return jax.make_array_from_callback((), everywhere, lambda _: local)
        rows = local.shape[1]
        shape = (local.shape[0], rows * processes, *local.shape[2:])

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            # None, in jax's type, stands for a shard without rows; the rows of a NamedSharding have indices.
            assert index is not None
            start, stop, _ = index[1].indices(shape[1])
            start, stop = start - rows * process, stop - rows * process
            if start < 0 or stop > rows:
                raise ValueError(
                    f"sharding: expected one that gives process {process} rows {rows * process} to "
                    f"{rows * (process + 1) - 1} of {shape[1]}, it wants there {index[1]}; make the mesh of devices "
                    "sorted by process_index, and spread the rows over all of them"
                )
            return local[(index[0], slice(start, stop), *index[2:])]

        return jax.make_array_from_callback(shape, stacked, block)

    return place


def _encode(state: Any) -> Any:
    if isinstance(state, bytes):
        return {BYTES: base64.b64encode(state).decode("ascii")}
    try:
        # A copy as well: an iterator may return the very state that it goes on to change.
        plain = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"iterator.get_state: expected bytes or a JSON value, got {state!r}") from error
    if plain is None or plain != state:
        raise TypeError(f"iterator.get_state: expected bytes or a JSON value that is read back as it is, got {state!r}")
    return plain


def _decode(position: Any) -> Any:
    if isinstance(position, dict) and set(position) == {BYTES}:
        return base64.b64decode(position[BYTES])
    # The iterator may keep and change what it is given.
    return json.loads(json.dumps(position))
