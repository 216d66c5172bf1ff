"""Times of several functions: interleaved calls, by the wall clock and by processor time, and compilation apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jflow import flops as counter

# Other programs on the machine distort processor time less than wall time.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Times(NamedTuple):
    """Seconds of the calls of each function.

    Attributes:
      seconds: ``seconds[clock][name]`` of each round, ``[rounds]``; the first round is not among them.
      first: wall seconds of the first call of each, which compiles what is not compiled yet.
    """

    seconds: dict[str, dict[str, np.ndarray]]
    first: dict[str, float]

    def median(self, name: str, clock: str = "wall") -> float:
        """The median seconds of a call."""
        return float(np.median(self.seconds[clock][name]))

    def ratios(self, name: str, other: str, clock: str = "wall") -> np.ndarray:
        """The time of ``name`` over that of ``other`` within each round, ``[rounds]``."""
        return self.seconds[clock][name] / self.seconds[clock][other]

    def ratio(self, name: str, other: str, clock: str = "wall") -> float:
        """The median of ``ratios``."""
        return float(np.median(self.ratios(name, other, clock)))


def interleaved(
    calls: Mapping[str, Callable[[Any], Any]],
    rounds: int,
    prepare: Callable[[str, int], Any] = lambda name, round: None,
) -> Times:
    """Calls every function once in each round, so that a slow moment of the machine falls on all of them.

    Args:
      calls: functions of what ``prepare`` returned. The time of a call includes that of computing the arrays of its result.
      rounds: rounds that are counted, after one that is not.
      prepare: ``(name, round) -> argument`` before each call; it is not timed.
    """
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in calls} for clock in CLOCKS}
    for number in range(rounds + 1):
        for name, call in calls.items():
            argument = jax.block_until_ready(prepare(name, number))
            began = {clock: read() for clock, read in CLOCKS.items()}
            jax.block_until_ready(call(argument))
            for clock, read in CLOCKS.items():
                seconds[clock][name].append(read() - began[clock])
    return Times(
        {clock: {name: np.asarray(spent[1:]) for name, spent in found.items()} for clock, found in seconds.items()},
        {name: spent[0] for name, spent in seconds["wall"].items()},
    )


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The compiled program of a function (jitted already, or not), and the seconds of tracing and compiling it."""
    began = time.perf_counter()
    program = (function if hasattr(function, "lower") else jax.jit(function)).lower(*args).compile()
    return program, time.perf_counter() - began


def flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the compiled program, with the bodies of loops multiplied by their numbers of iterations (``jflow.flops``)."""
    return counter.compiled(function, *args)
