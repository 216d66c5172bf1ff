"""The row: what the residual of one sample is made of, and the term that makes a residual of it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jflow import checks, identities
from jflow.bases import Base
from jflow.interpolants import Interpolant
from jflow.types import Array, Cond, Event, FlowMap, Key, Params, Time, Velocity, as_velocity, move

# What a term may ask of a row beyond the map itself; see ``Term.reads``.
READS = ("velocity", "gamma", "teacher")


class Leg(NamedTuple):
    """A model at certain parameters, with a sample's condition and key filled in.

    Another condition is ``leg._replace(cond=null)``: a guided target is made of two such legs.

    Attributes:
      model: a FlowMap, or a Velocity, which has no jumps.
      params: its parameters.
      cond: the sample's condition, or None.
      key: the key that the network gets.
    """

    model: FlowMap | Velocity
    params: Params
    cond: Cond
    key: Key

    def v(self, s: Time, t: Time, x: Event) -> Event:
        """v_{s,t}(x), shaped like x.

        Raises:
          ValueError: for a Velocity.
        """
        if not isinstance(self.model, FlowMap):
            raise ValueError("teacher: expected a FlowMap, whose jumps the method needs, got a Velocity")
        return self.model.mean_velocity(self.params, s, t, x, self.cond, key=self.key)

    def jump(self, s: Time, t: Time, x: Event) -> Event:
        """X_{s,t}(x), shaped like x.

        Raises:
          ValueError: for a Velocity.
        """
        return move(x, s, t, self.v(s, t, x))

    def velocity(self, t: Time, x: Event) -> Event:
        """b_t(x) = v_{t,t}(x), shaped like x."""
        return as_velocity("teacher", self.model)(self.params, t, x, self.cond, key=self.key)


class Row(NamedTuple):
    """One sample of a batch, on the diagonal (s = t) or off it, and everything that its residual may be made of.

    Attributes:
      s, t: source and target time, scalars; equal on the diagonal.
      x0, x1: the pair.
      x: the point I_s.
      cond: the sample's condition, or None.
      key: for random numbers of the row's own (``key_for``); the networks get another.
      gamma: where the middle time of a semigroup residual lies, from the objective's law; None on the diagonal.
      step: the optimizer's step, an int32 scalar.
      own: the map being trained, through which gradients flow.
      frozen: the same map; its parameters get no gradient, its inputs do.
      ema: the map at the averaged parameters, or None where the context holds none.
      teacher: the teacher, or None.
      data: the data of the whole batch, ``[B, ...]``.
      interpolant: the path.
      base: the law of x0.
      estimate: the objective's choice of velocity; its value is ``conditional``.
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
    estimate: Callable[[Row], Event]

    @property
    def conditional(self) -> Event:
        """An estimate of b_s(x) whose mean, given x, is b_s(x): I_s' of the row's own pair, or better; no gradient."""
        return jax.lax.stop_gradient(self.estimate(self))

    def pair(self, s: Time, u: Time) -> Event:
        """(I_u - I_s)/(u - s), the mean velocity of the row's own pair."""
        return self.interpolant.mean_derivative(s, u, self.x0, self.x1)

    def key_for(self, use: str) -> Key:
        """A key for one use of random numbers, told by its name: a middle time, a probe."""
        return jax.random.fold_in(self.key, zlib.crc32(use.encode()))

    def leg(self, which: str) -> Leg:
        """The map "own", "frozen", "ema" or "teacher".

        Raises:
          ValueError: for another name, or one that the context does not hold.
        """
        checks.choice("leg", which, ("own", "frozen", "ema", "teacher"))
        found = getattr(self, which)
        if found is None:
            raise ValueError(
                f"context.{which}: expected parameters, got None: the method needs "
                + ("an average of its own (make_step's ema)" if which == "ema" else "a teacher (init_state's teacher)")
            )
        return found


# An estimate of b_s(x) at a row's point, shaped like x.
Estimate = Callable[[Row], Event]


# ``(s, t, gamma) -> [(s, t), ...]``, for arrays of times.
Asks = Callable[[np.ndarray, np.ndarray, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


def near_source(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Another source time: a derivative in s needs them."""
    del gamma
    return [(s + 0.3 * (t - s), t)]


def near_target(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Another target time: a derivative in t needs them."""
    del gamma
    return [(s, t - 0.3 * (t - s))]


def second_leg(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The jump from the middle time u = gamma s + (1-gamma) t to t, where the first leg is not the map's."""
    return both_legs(s, t, gamma)[1:]


def both_legs(s: np.ndarray, t: np.ndarray, gamma: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The jumps from s to the middle time u = gamma s + (1-gamma) t, and from u to t."""
    u = gamma * s + (1.0 - gamma) * t
    return [(s, u), (u, t)]


@dataclasses.dataclass(frozen=True)
class Term:
    """The residual of a row off the diagonal.

    Attributes:
      name: the label of its metrics.
      residual: ``row -> identities.Residual(prediction, target, tangent)``. ``tangent`` is the derivative that the residual
        contains, whose size is reported, or None.
      reads: what it asks of the row beyond the map: "velocity" (``row.conditional``), "gamma", "teacher". A choice of
        the objective that neither this term nor the diagonal reads is refused.
      asks: the other pairs of times at which it asks the trained map, from those of the row, or None for no others:
        ``near_source``, ``near_target``, ``second_leg``, ``both_legs``, or a function like them. An objective draws times when
        it is made, and refuses a map whose domain does not hold these pairs.

    Raises:
      TypeError: for a residual that is not a function, or another type of name or reads.
      ValueError: for an entry of ``reads`` that is none of ``READS``.
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
    """The row's gamma, for a term that reads it."""
    assert row.gamma is not None
    return row.gamma
