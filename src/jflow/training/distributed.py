"""Training with several processes, and the end of a run when a machine is preempted or fails.

For example::

    with distributed.processes():          # on a TPU pod, under SLURM, Open MPI or Kubernetes; no effect on one machine
        ...                                # jax.devices() are those of all processes

The exit code tells a script how a process ended: 75 if it was asked to stop, 76 if it lost another process, 77 if it stalled.
After these the same command may be started again; after any other code, read the message.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from jflow import checks
from jflow.training.hooks import Hook

_log = logging.getLogger(__name__)

# 75 is EX_TEMPFAIL of sysexits.h, "try again"; 76 and 77 are our own choice.
EXIT_PREEMPTED = 75
EXIT_PEER_LOST = 76
EXIT_STALLED = 77
# Words in the messages of jax when a collective fails because another process is gone.
LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "Gloo", "NCCL", "heartbeat")


class PreemptedError(RuntimeError):
    """The machine is about to be preempted, and the run has saved its state.

    Attributes:
      step: the step of the saved checkpoint, from which the run can be resumed.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"asked to stop: saved step {step}; start the run again to go on from there")


@contextlib.contextmanager
def processes(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    automatic: bool = True,
    heartbeat_seconds: int = 30,
    start_seconds: int = 300,
) -> Iterator[None]:
    """Initialises ``jax.distributed`` for the body of a with statement. Enter it before any call that uses jax's devices.

    Without arguments jax looks for a TPU pod, SLURM, Open MPI or Kubernetes; if it finds none, the run has one process. If
    another process dies, jax aborts this one within about ``heartbeat_seconds``, and it ends with a message and
    ``EXIT_PEER_LOST``. If the body raises, the process ends within seconds and does not wait for the others.

    Args:
      coordinator: HOST:PORT of the process with index 0. Give ``coordinator``, ``count`` and ``index``, or none of them.
      count: the number of processes.
      index: the index of this process, from 0.
      automatic: whether to look for a cluster if no coordinator is given.
      heartbeat_seconds: seconds without a sign of life after which a process counts as dead.
      start_seconds: how long to wait for all processes to connect.

    Raises:
      ValueError: if only some of ``coordinator``, ``count`` and ``index`` are given, the coordinator is not HOST:PORT, or a
        number is out of range.
      TypeError: if a number is not a whole number.
      RuntimeError: if jax has already initialised its devices, or the processes do not connect in time.
    """
    checks.integer("heartbeat_seconds", heartbeat_seconds, low=1)
    checks.integer("start_seconds", start_seconds, low=1)
    given = (coordinator, count, index)
    if any(value is not None for value in given):
        if coordinator is None or count is None or index is None:
            raise ValueError(f"coordinator, count, index: expected all three or none, got {given}")
        _check_address(coordinator)
        checks.integer("count", count, low=1)
        checks.integer("index", index, high=count - 1)
    elif not automatic:
        yield
        return
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            # At the end the other processes wait for the first, which may still be evaluating.
            shutdown_timeout_seconds=24 * 3600,
        )
    except ValueError as error:
        # The only sign that jax gives for a machine outside a cluster.
        if coordinator is not None or "should be defined" not in str(error):
            raise
        yield
        return
    _log.info("process %d of %d", jax.process_index(), jax.process_count())
    code = [EXIT_PEER_LOST]
    with _abort_exits_with(code):
        try:
            yield
        except BaseException as error:
            _leave(error, code)
        jax.distributed.shutdown()


def first_process() -> bool:
    """Whether this process is the one that deletes, renames and prints."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Waits until every process has called it; ``what`` names the barrier, and must be the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Notice:
    """A context manager that detects a preemption notice: SIGTERM on any of the processes.

    With several processes, jax sends the notice to all, and they agree on the step at which to stop. With one process, a
    signal handler is installed in the main thread while the context lasts. A second SIGTERM is handled as before the context.
    """

    def __init__(self) -> None:
        self._seen = threading.Event()
        self._before: Any = None
        self._asked: int | None = None

    def __enter__(self) -> Notice:
        # With jax.distributed a handler of ours would replace the one of jax, which notifies the other processes.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def seen(self, step: int) -> bool:
        """Whether to stop after ``step`` steps. All processes must call it, with increasing steps; all get the same answer."""
        if not jax.distributed.is_initialized():
            return self._seen.is_set()
        # The processes agree on one step number, and Orbax queries steps too, so query every step since the last call.
        steps = range(step if self._asked is None else self._asked + 1, step + 1)
        self._asked = step
        return any([multihost_utils.reached_preemption_sync_point(each) for each in steps])

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self._seen.set()
        signal.signal(number, self._before)


class Watchdog(Hook):
    """A hook that ends the process if a chunk takes too long. It is meant for runs of several processes.

    A step that waits for a lost device never ends. The watchdog measures the time from the start of the run, or of a chunk,
    to the next event; this includes compilation. After ``seconds`` it prints a message and ends the process with exit code
    ``EXIT_STALLED``.

    Args:
      seconds: the longest time for a chunk.
      end: called with the exit code; by default ``os._exit``, because an ordinary exit would wait for the device as well.

    Raises:
      ValueError: if ``seconds`` is not positive.
      TypeError: if ``seconds`` is not a number.
    """

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit) -> None:
        self._seconds = checks.number("seconds", seconds, low=0.0, open_low=True)
        self._end = end
        self._doing, self._deadline, self._over = "", float("inf"), False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._over, self._doing, self._deadline = False, "the first data", time.monotonic() + self._seconds
        self._thread = threading.Thread(target=self._watch, name="jflow watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def before_chunk(self, step: int, length: int) -> None:
        """Starts the timer for this chunk."""
        with self._changed:
            self._doing, self._deadline = f"steps {step + 1} to {step + length}", time.monotonic() + self._seconds
            self._changed.notify()

    def pause(self) -> None:
        """Stops the timer until the next chunk."""
        with self._changed:
            self._deadline = float("inf")

    def _watch(self) -> None:
        with self._changed:
            while not self._over:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            if self._over:
                return
        _say(f"no sign of life for {self._seconds:g} s: {self._doing}; ending with exit code {EXIT_STALLED}")
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(all_threads=True)
        self._end(EXIT_STALLED)


def _check_address(coordinator: Any) -> None:
    host, _, port = str(coordinator).rpartition(":")
    if not (isinstance(coordinator, str) and host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator: expected HOST:PORT, got {coordinator!r}")


@contextlib.contextmanager
def _abort_exits_with(code: list[int]) -> Iterator[None]:
    """While the context lasts, abort() ends the process with this code and a message.

    When another process is lost, jax calls abort() from one of its threads and offers no callback. A Python signal handler
    would not run, because abort() does not return to the interpreter, so the handler is a C function.
    """
    if os.name != "posix":
        yield
        return

    def handle(number: int) -> None:
        del number
        _say_lost(code[0])
        os._exit(code[0])

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


def _leave(error: BaseException, code: list[int]) -> None:
    """Ends this process after an error. It waits for the other processes to end as well, but for at most 10 seconds."""
    if isinstance(error, SystemExit):
        code[0] = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        traceback.print_exception(error)
        lost = isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in LOST)
        code[0] = EXIT_PEER_LOST if lost else 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code[0] == EXIT_PEER_LOST:
        # A collective may fail before jax notices and aborts.
        _say_lost(code[0])
    # An ordinary shutdown is a barrier of all processes, and jax aborts if one of them does not arrive.
    patience = threading.Timer(10.0, os._exit, code)
    patience.daemon = True
    patience.start()
    if code[0] != EXIT_PEER_LOST:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(code[0])


def _say_lost(code: int) -> None:
    _say(f"another process of this run has died (see above); ending with exit code {code}")


def _say(message: str) -> None:
    # Do not use print: another thread may hold its lock and never release it.
    with contextlib.suppress(OSError):
        os.write(2, f"jflow: {message}\n".encode())
