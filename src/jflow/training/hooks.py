"""Hooks: objects whose methods ``fit`` calls at the events of a run."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax

from jflow import checks
from jflow.training.state import TrainState
from jflow.training.step import Chunk, Metrics
from jflow.types import PyTree

# A row of metrics, as written to the file: ``kind`` ("train" or "eval"), ``step`` and the metrics.
Row = dict[str, Any]


class Started(NamedTuple):
    """The arguments with which a run starts.

    Attributes:
      step: the number of steps taken so far; more than zero in a resumed run.
      total_steps: the step at which the run ends.
      chunk, state, data: the arguments of the first call of the chunk. That call donates the state: a hook must not keep it.
    """

    step: int
    total_steps: int
    chunk: Chunk
    state: TrainState
    data: PyTree


class Hook:
    """Base class of hooks. ``fit`` enters a hook as a context and calls one method per event; by default they do nothing.

    A subclass overrides the methods that it needs::

        class LargestGradient(Hook):
            found = 0.0

            def row(self, row):
                if row["kind"] == "train":
                    self.found = max(self.found, float(row["grad_norm"]))

    A plain function ``row -> None`` in place of a hook is called with every row. With several processes, each calls its own
    hooks.
    """

    def start(self, started: Started) -> None:
        """Called before the first chunk; not called if no steps are left to take."""

    def before_chunk(self, step: int, length: int) -> None:
        """Called before a chunk of ``length`` steps that begins after ``step`` steps."""

    def after_chunk(self, step: int, metrics: Metrics) -> None:
        """Called after the dispatch of a chunk that ends after ``step`` steps; its metrics may not be computed yet."""

    def complete(self, row: Row) -> None:
        """Called before a training row is written; may add entries to it."""

    def row(self, row: Row) -> None:
        """Called after a row has been written."""

    def pause(self) -> None:
        """Called before an evaluation, a checkpoint or a snapshot, and before the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Called at the end of the run, also after an error."""


class Call(Hook):
    """A hook that calls a function with every row."""

    def __init__(self, function: Callable[[Row], object]) -> None:
        self._function = function

    def row(self, row: Row) -> None:
        """Calls the function."""
        self._function(row)


def as_hooks(hooks: Any) -> list[Hook]:
    """Turns a sequence of hooks and functions of a row into a list of hooks.

    Raises:
      TypeError: if it is not a sequence, or an entry is neither a hook nor a function.
    """
    if not isinstance(hooks, Sequence) or isinstance(hooks, str):
        raise TypeError(f"hooks: expected a sequence of hooks or functions of a row, got {type(hooks).__name__}")
    for hook in hooks:
        if not isinstance(hook, Hook):
            checks.function("hooks", hook, "row -> None, or a Hook")
    return [hook if isinstance(hook, Hook) else Call(hook) for hook in hooks]


class Profile(Hook):
    """A hook that records a ``jax.profiler`` trace of a range of steps, in whole chunks, on the first process only.

    Args:
      directory: the directory of the trace, which TensorBoard and Perfetto can read.
      first: the trace begins with the first chunk that starts after ``first`` steps or more.
      last: the trace ends with the first chunk that ends after ``last`` steps or more.

    Raises:
      ValueError: if 0 <= first < last does not hold, or, when the run starts, if ``last`` is after its end.
      TypeError: if ``first`` or ``last`` is not a whole number.
    """

    def __init__(self, directory: str | os.PathLike[str], first: int, last: int) -> None:
        self._first, self._last = checks.integer("first", first), checks.integer("last", last)
        if first >= last:
            raise ValueError(f"last: expected a step after first = {first}, got {last}")
        self._directory = pathlib.Path(directory)
        self._running = self._over = False

    def start(self, started: Started) -> None:
        """Checks that ``last`` is not after the end."""
        if self._last > started.total_steps:
            raise ValueError(f"last: expected at most total_steps = {started.total_steps}, got {self._last}")

    def before_chunk(self, step: int, length: int) -> None:
        """Begins the trace at its first chunk."""
        del length
        if jax.process_index() == 0 and not (self._running or self._over) and self._first <= step < self._last:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after_chunk(self, step: int, metrics: Metrics) -> None:
        """Ends the trace after its last chunk."""
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._over = False, True
