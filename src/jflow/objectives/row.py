"""Row and Term: the data of one sample, and the function that computes a residual from it."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jflow import checks, identities
from jflow.bases import Base
from jflow.interpolants import Interpolant
from jflow.objectives.guided import Guidance
from jflow.types import Array, Cond, Event, FlowMap, Key, Params, Time, Velocity, as_velocity, move

# The parts of a row that a term may read in addition to the map; see ``Term.reads``.
READS = ("velocity", "pair", "gamma", "teacher")


class Leg(NamedTuple):
    """A model with its parameters, a sample's condition and a key filled in.

    ``leg._replace(cond=null)`` changes the condition; a guided target uses two such legs.

    Attributes:
      model: a FlowMap, or a Velocity, which has no jumps.
      params: the model's parameters.
      cond: the sample's condition, or None.
      key: the PRNG key passed to the network.
    """

    model: FlowMap | Velocity
    params: Params
    cond: Cond
    key: Key

    def v(self, s: Time, t: Time, x: Event) -> Event:
        """Returns v_{s,t}(x), shaped like x.

        Raises:
          ValueError: if the model is a Velocity.
        """
        if not isinstance(self.model, FlowMap):
            raise ValueError("teacher: expected a FlowMap, whose jumps the method needs, got a Velocity")
        with self._without_params():
            return self.model.mean_velocity(self.params, s, t, x, self.cond, key=self.key)

    def jump(self, s: Time, t: Time, x: Event) -> Event:
        """Returns X_{s,t}(x), shaped like x.

        Raises:
          ValueError: if the model is a Velocity.
        """
        return move(x, s, t, self.v(s, t, x))

    def velocity(self, t: Time, x: Event) -> Event:
        """Returns b_t(x) = v_{t,t}(x), shaped like x."""
        with self._without_params():
            return as_velocity("teacher", self.model)(self.params, t, x, self.cond, key=self.key)

    @contextlib.contextmanager
    def _without_params(self) -> Iterator[None]:
        """Adds to an error of a model without parameters that it has none; a forgotten teacher fails deep inside it."""
        try:
            yield
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if self.params is None:
                error.add_note(
                    "teacher: called with params None; pass its parameters as teacher= to train or init_state"
                )
            raise


class Row(NamedTuple):
    """One sample of a batch, on the diagonal (s = t) or off it, with everything that its residual may need.

    Attributes:
      s, t: source and target time, scalars; equal on the diagonal.
      x0, x1: the pair.
      x: the point I_s.
      cond: the sample's condition, or None.
      key: a PRNG key for the term's own random numbers (``key_for``); the networks get another key.
      gamma: the position of the middle time of a semigroup residual, drawn from ``gammas``; None on the diagonal or if the
        method has no middle time.
      step: the number of optimizer steps taken, an int32 scalar.
      own: the map being trained; gradients flow to its parameters.
      frozen: the same map with a stop-gradient on its parameters, but not on its inputs.
      ema: the map at the averaged parameters, or None if the context has none.
      teacher: the teacher, or None.
      data: the data of the whole batch, ``[B, ...]``.
      interpolant: the path.
      base: the law of x0.
      estimate: the objective's velocity estimate, a function of the row; ``conditional`` is its value.
      null: the null condition of the map, or None.
      guidance: the guidance of the velocity estimates, or None.
      here: the map's velocity v_{s,s}(x) under a stop-gradient, if it has been computed already; guidance uses it.
    """

    s: Array
    t: Array
    x0: Event
    x1: Event
    x: Event
    cond: Cond
    key: Key
    gamma: Array | None
    step: Array
    own: Leg
    frozen: Leg
    ema: Leg | None
    teacher: Leg | None
    data: Event
    interpolant: Interpolant
    base: Base
    estimate: Callable[[Row], Event] | None
    null: Cond = None
    guidance: Guidance | None = None
    here: Event | None = None

    @property
    def conditional(self) -> Event:
        """The objective's estimate of the velocity b_s(x) at the row's point, guided if chosen, under a stop-gradient.

        Raises:
          ValueError: if the objective has no estimate, because its term does not read "velocity".
        """
        if self.estimate is None:
            raise ValueError('term.reads: expected "velocity" in it, because the residual reads row.conditional')
        return jax.lax.stop_gradient(self._guided(self.estimate(self)))

    def pair(self, s: Time, u: Time) -> Event:
        """Returns the mean velocity of the row's own pair, (I_u - I_s)/(u - s), guided if chosen, under a stop-gradient."""
        return jax.lax.stop_gradient(self._guided(self.interpolant.mean_derivative(s, u, self.x0, self.x1)))

    def _guided(self, estimate: Event) -> Event:
        return estimate if self.guidance is None else self.guidance.velocity(self, estimate)

    def key_for(self, use: str) -> Key:
        """Returns a PRNG key for one use of random numbers; keys for different names are independent."""
        return jax.random.fold_in(self.key, zlib.crc32(use.encode()))

    def leg(self, which: str) -> Leg:
        """Returns the leg "own", "frozen", "ema" or "teacher".

        Raises:
          ValueError: if the name is another one, or the context does not hold this leg.
        """
        checks.choice("leg", which, ("own", "frozen", "ema", "teacher"))
        found = getattr(self, which)
        if found is None:
            source = "an average (make_step's ema)" if which == "ema" else "a teacher (teacher= of train or init_state)"
            raise ValueError(f"context.{which}: expected parameters, got None: the method needs {source}")
        return found


# A function that estimates b_s(x) at a row's point; its output is shaped like x.
Estimate = Callable[[Row], Event]


# ``(s, t, gamma) -> [(s, t), ...]``: the other pairs of times that a term evaluates, for arrays of times.
Asks = Callable[[np.ndarray, np.ndarray, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


def near_source(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns a pair with another source time. Terms with a derivative in s use it as their ``asks``."""
    del gamma
    return [(s + 0.3 * (t - s), t)]


def near_target(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns a pair with another target time. Terms with a derivative in t use it as their ``asks``."""
    del gamma
    return [(s, t - 0.3 * (t - s))]


def second_leg(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the pair (u, t) with the middle time u = gamma s + (1-gamma) t, for a first leg that is not the map's."""
    return both_legs(s, t, gamma)[1:]


def both_legs(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the pairs (s, u) and (u, t) with the middle time u = gamma s + (1-gamma) t."""
    u = gamma * s + (1.0 - gamma) * t
    return [(s, u), (u, t)]


@dataclasses.dataclass(frozen=True)
class Term:
    """The residual of off-diagonal rows, and what it needs.

    Attributes:
      name: the name of the term in the metrics.
      residual: ``row -> identities.Residual(prediction, target, tangent)``. ``tangent`` is the derivative term of the
        residual, whose norm is reported, or None.
      reads: the parts of the row that it reads in addition to the map: "velocity" (``row.conditional``), "pair"
        (``row.pair``), "gamma", "teacher". An objective raises an error for a choice that neither this term nor the diagonal
        reads.
      asks: a function that returns the other pairs of times at which the term evaluates the trained map, given the row's
        (s, t, gamma): ``near_source``, ``near_target``, ``second_leg``, ``both_legs`` or a custom one; None if there are no
        others. An objective draws times when it is made, and raises an error if these pairs are outside the map's domain.

    Raises:
      TypeError: if ``residual`` is not a function, ``name`` is not a string, or ``reads`` is not a tuple.
      ValueError: if an entry of ``reads`` is not in ``READS``.
    """

    name: str
    residual: Callable[[Row], identities.Residual]
    reads: tuple[str, ...] = ()
    asks: Asks | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {type(self.name).__name__}")
        checks.function("residual", self.residual, "row -> identities.Residual")
        if not isinstance(self.reads, tuple):
            raise TypeError(f"reads: expected a tuple of names, got {type(self.reads).__name__}")
        for each in self.reads:
            checks.choice("reads", each, READS)


def gamma_of(row: Row) -> Array:
    """Returns the row's gamma, which is not None for a term that reads it."""
    assert row.gamma is not None
    return row.gamma
