"""Prefetching: reads batches from a host iterator and transfers them to the devices, one chunk of steps at a time.

For example::

    feed = Feed(datasets.pipeline(source, batch_size=256), sharding=rows)
    chunk = make_chunk(step, prefetch.batch, batch_sharding=rows)
    with feed:
        feed.start(0, None, plan.length, total_steps)
        state, metrics = chunk(state, feed.take(), steps)

A thread reads, stacks and transfers chunks of steps while the devices compute. ``feed.position`` is the iterator's state
after the chunks that were taken, even if the thread has read further. When it is saved with a checkpoint, a resumed run
sees the same batches as an uninterrupted one.
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

# The longest time in seconds that close() waits for the iterator to return the batch that it is reading.
PATIENCE = 5.0
# The key that marks a position whose iterator state is bytes.
BYTES = "jflow.bytes"


class BatchIterator(Protocol):
    """An iterator over batches whose state can be saved and restored, such as those of Grain."""

    def __next__(self) -> PyTree:
        """This process's rows of the next batch, numpy arrays with leading axis B / processes; raises StopIteration."""
        ...

    def get_state(self) -> Any:
        """The iterator's state: bytes, or a JSON value other than None."""
        ...

    def set_state(self, state: Any) -> None:
        """Restores a state that ``get_state`` returned."""
        ...


class Stacked(NamedTuple):
    """The batches of a chunk of K steps.

    Attributes:
      first: the step of the first batch, an int32 scalar.
      batches: the batches, leaves ``[K, B, ...]``.
    """

    first: Array
    batches: PyTree


def batch(data: Stacked, step: Array) -> PyTree:
    """The batch of a step, leaves ``[B, ...]``. It is the ``batch_fn`` of ``make_chunk`` for the data of ``Feed.take``.

    The function is traced. ``step`` is an int32 scalar from ``data.first`` to ``data.first + K - 1``.
    """
    place = step - data.first
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), data.batches)


class Feed:
    """Chunks of batches from an iterator, transferred to the devices by a separate thread.

    No other code may use the iterator while the feed is in use. Its arrays are copied, so it may reuse its buffers. If
    ``jax_enable_x64`` is off when the feed is started, float64 is rounded to float32 and int64 becomes int32; a value that
    does not fit raises an error.

    With a ``sharding``, row i of the B/P rows of process p is row p B/P + i of the batch of B. The batch does not depend on
    the number of devices. It does not depend on the number of processes P either, if the iterator's rows do not.

    Args:
      iterator: a BatchIterator. All its batches must have the same structure, shapes and dtypes.
      sharding: the sharding of the rows (the leading axis of a batch) over a mesh; None for the default device.
      convert: a function of each batch of the iterator, called in the thread, on the host, before the batch is checked and
        stacked. A batch may be any object that it understands, such as a Grain dictionary of images and labels:
        ``convert=lambda row: Batch(x1=row["image"], cond=row["label"])``. It must be deterministic, because a resumed run
        calls it again. None passes the batches on.
      ahead: the number of chunks that may be on the devices, or in transfer, before they are taken. A chunk that was taken
        stays on the devices until it has been used, so up to ``ahead`` + 2 chunks are held in all.

    Raises:
      ValueError: if ``ahead`` is below 1.
      TypeError: if ``ahead`` is not a whole number, ``sharding`` is not a NamedSharding, the iterator lacks a method, or
        ``convert`` is not a function.
    """

    def __init__(
        self,
        iterator: BatchIterator,
        *,
        sharding: NamedSharding | None = None,
        convert: Callable[[Any], PyTree] | None = None,
        ahead: int = 2,
    ) -> None:
        missing = [name for name in ("__next__", "get_state", "set_state") if not hasattr(iterator, name)]
        if missing:
            raise TypeError(f"iterator: expected one with {', '.join(missing)}, got {type(iterator).__name__}")
        if sharding is not None and not isinstance(sharding, NamedSharding):
            raise TypeError(f"sharding: expected a NamedSharding or None, got {type(sharding).__name__}")
        if convert is not None:
            checks.accepts("convert", convert, "(batch) -> batch", 1, model=False)
        self._iterator, self._sharding, self._convert = iterator, sharding, convert
        self._ahead = checks.integer("ahead", ahead, low=1)
        self._position: Any = None
        self._shelf: _Shelf | None = None
        self._thread: threading.Thread | None = None

    @property
    def position(self) -> Any:
        """The iterator's state after the chunks that were taken, as a JSON value; a state of bytes is encoded.

        Raises:
          TypeError: if the iterator's state is neither bytes nor a JSON value (lists, dicts with string keys, strings and
            finite numbers).
        """
        return _encode(self._iterator.get_state()) if self._position is None else self._position

    def start(self, step: int, position: Any, length: Callable[[int], int], total_steps: int) -> None:
        """Starts to read the chunks that begin at ``step``, ``step + length(step)``, ... and end at ``total_steps``.

        A feed may be started again; chunks that were read but not taken are then dropped.

        Args:
          step: the step of the first batch.
          position: the ``position`` of a feed that has taken the chunks before ``step``. With None the iterator continues
            from its current state, or, if this feed was started before, from the feed's position.
          length: returns the number of steps, at least 1, of the chunk that begins at a step. It is called in the thread.
          total_steps: the step at which to end.

        Raises:
          ValueError: if step > 0 and there is no position, the iterator rejects the position, or a number is below 0.
          TypeError: if a number is not whole, or the iterator's state is neither bytes nor a JSON value.
          RuntimeError: if the iterator is still reading a batch for an earlier start.
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
        # When the feed is garbage-collected its thread ends, so the thread must not hold a reference to the feed.
        weakref.finalize(self, self._shelf.close)
        # Pass both options to the thread, since they may be set for the caller's thread only.
        # jax adds the options to its config class at import, so type checkers do not see them.
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        spans = _spans(step, length, total_steps)
        arguments = (
            self._shelf,
            self._iterator,
            self._convert,
            _placing(self._sharding),
            spans,
            total_steps,
            x64,
            device,
        )
        self._thread = threading.Thread(target=_fill, args=arguments, name="jflow-feed", daemon=True)
        self._thread.start()

    def take(self) -> Stacked:
        """Waits for the next chunk and returns it.

        Raises:
          ValueError: if the data ended, no chunk is left before ``total_steps``, a batch differs from the first in structure,
            shapes or dtypes, its leaves have different numbers of rows, the sharding does not divide the rows or places
            them on another process, or a value does not fit its dtype on the device (an int64 beyond int32, a finite
            float64 beyond float32).
          TypeError: if a batch holds something other than numbers.
          RuntimeError: if the feed was not started, or was closed.
          Exception: any other error of the iterator, of ``convert`` or of ``length``, after the earlier chunks were taken.
        """
        if self._shelf is None:
            raise RuntimeError("Feed: expected start() before take()")
        data, self._position = self._shelf.take()
        return data

    def close(self) -> None:
        """Ends the thread and drops the chunks that were not taken; ``position`` is unchanged.

        If the iterator is reading a batch, this waits for at most 5 s; the thread ends after that batch.
        """
        if self._shelf is not None and self._thread is not None:
            self._shelf.close()
            self._thread.join(PATIENCE)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Shelf:
    """A queue between the two threads: at most ``size`` chunks with the position after each, and an error at the end.

    Its lock is reentrant, because the garbage collector may call ``close`` in a thread that holds it.
    """

    def __init__(self, size: int) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._size = size
        self._chunks: collections.deque[tuple[Stacked, Any]] = collections.deque()
        self._error: BaseException | None = None
        self.closed = False

    def room(self) -> bool:
        """Waits until there is room for another chunk; returns False if the queue was closed."""
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
                # The wait above ended without a chunk, so there is an error.
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
    convert: Callable[[Any], PyTree] | None,
    place: Place,
    spans: Iterator[tuple[int, int]],
    total_steps: int,
    x64: bool,
    device: Any,
) -> None:
    """The thread's function: reads and transfers chunks until the queue is closed or an error is raised."""
    try:
        with jax.enable_x64(x64), jax.default_device(device):
            for first, chunk in _chunks(shelf, iterator, convert, spans, total_steps):
                position = _encode(iterator.get_state())
                shelf.put(Stacked(place(np.asarray(first, np.int32)), jax.tree.map(place, chunk)), position)
                # Free the host's copy before the thread waits.
                del chunk
    except BaseException as error:
        # Propagate every error; otherwise the consumer deadlocks.
        shelf.fail(error)


def _spans(step: int, length: Callable[[int], int], total_steps: int) -> Iterator[tuple[int, int]]:
    """Yields the first step and the length of each chunk."""
    while step < total_steps:
        count = checks.integer(f"length({step})", length(step), low=1)
        yield step, count
        step += count


def _chunks(
    shelf: _Shelf,
    iterator: BatchIterator,
    convert: Callable[[Any], PyTree] | None,
    spans: Iterator[tuple[int, int]],
    total_steps: int,
) -> Iterator[tuple[int, PyTree]]:
    """Yields the first step and the batches, numpy arrays [K, rows, ...], of each chunk, until the queue is closed."""
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
            if convert is not None:
                values = convert(values)
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
            # Copy each batch at once, since the iterator may reuse its buffers for the next one.
            for whole, leaf in zip(jax.tree.leaves(chunk), jax.tree.leaves(values), strict=True):
                whole[step - first] = leaf
        yield first, chunk
    raise ValueError(f"Feed: no chunk is left, those before step {total_steps} were taken")


def _check(values: PyTree, step: int) -> None:
    """Checks that a batch holds numbers only, with the same number of rows in each leaf."""
    for leaf in jax.tree.leaves(values):
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise TypeError(f"iterator: expected arrays of numbers, got dtype {leaf.dtype} at step {step}")
    checks.rows(f"iterator: step {step}", values)


def _placing(sharding: NamedSharding | None) -> Place:
    """A function that puts this process's part [K, B/P, ...] of a chunk, or a scalar, on the devices."""
    if sharding is None:
        return jax.device_put
    # If the mesh has only devices of this process, so does the batch.
    alone = sharding.is_fully_addressable
    processes, process = (1, 0) if alone else (jax.process_count(), jax.process_index())
    stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def place(local: np.ndarray) -> Array:
        # Neither branch may communicate between processes: this thread would break the order of their other collectives.
        if local.ndim == 0:
            return jax.make_array_from_callback((), everywhere, lambda _: local)
        rows = local.shape[1]
        shape = (local.shape[0], rows * processes, *local.shape[2:])

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            # jax's type allows None, for a shard without rows; with a NamedSharding there is always an index.
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
        # This also copies the state, which the iterator may change later.
        plain = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"iterator.get_state: expected bytes or a JSON value, got {state!r}") from error
    if plain is None or plain != state:
        raise TypeError(f"iterator.get_state: expected bytes or a JSON value that is read back as it is, got {state!r}")
    return plain


def _decode(position: Any) -> Any:
    if isinstance(position, dict) and set(position) == {BYTES}:
        return base64.b64decode(position[BYTES])
    # Pass a copy, since the iterator may keep and change it.
    return json.loads(json.dumps(position))
