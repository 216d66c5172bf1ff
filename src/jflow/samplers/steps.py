"""Samplers as steps: a state, ``step(key, state, t) -> (state, info)``, and one ``run`` along a grid for all of them.

A sampler works on one sample; callers ``jax.vmap``. Its state is a pytree of arrays, so a batch of states can be weighted,
resampled or changed between two steps::

    sampler = samplers.Renoise(bound, interpolant, kappa=0.5)
    states = jax.vmap(lambda x: sampler.init(x, grid[0]))(x0)
    for k, t in enumerate(grid[1:]):
        keys = jax.random.split(jax.random.fold_in(key, k), n)
        states, info = jax.vmap(sampler.step, (0, 0, None))(keys, states, t)
        # A particle method resamples here, with the indices that it draws:
        # states = jax.tree.map(lambda leaf: leaf[indices], states)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees
from jflow.named import described
from jflow.types import Array, BoundFlowMap, Cond, Event, Key, Time

Grid = Sequence[float] | np.ndarray | Array
# The type of a sampler's keys: Key, or Key | None for a sampler that can step without one.
KeyLike = TypeVar("KeyLike", bound=Key | None)
KeyTaken = TypeVar("KeyTaken", bound=Key | None, contravariant=True)
Kept = TypeVar("Kept")


class State(NamedTuple):
    """Where a sampler is.

    Attributes:
      x: the sample, in the dtypes of x0.
      t: its time, a scalar of at least float32.
      cond: conditioning of the sample, or None.
      wide: x before it was rounded to its own dtype, where a sampler of many small steps needs it (``SDE`` of narrow
        dtypes), else None. To go on from another x, make a state with ``init``.
    """

    x: Event
    t: Array
    cond: Cond = None
    wide: Event | None = None


class Info(NamedTuple):
    """What a step reports, to look at.

    Attributes:
      target: the time that the map jumped to, a scalar; the time of the new state where no jump goes beyond it.
      noise: standard deviation of the noise that was added, in units of x: for each leaf a scalar, or an array like it
        where the entries differ.
      calls: calls of the map or of its velocity, an int32 scalar.
      centre: the new x without the noise that was added, where it is added at the end of the step (``Renoise``), else None.
    """

    target: Array
    noise: Event
    calls: Array
    centre: Event | None = None


class Sampler(Protocol[KeyTaken]):
    """A sampler, as ``run`` and ``draw`` accept it. For ``draw`` it must also be a pytree.

    Its parameter is what ``step`` takes as a key: ``Sampler[Key]`` draws random numbers, and ``Sampler[Key | None]`` also
    steps without a key.
    """

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """The state of a sample x0 at time t."""
        ...

    def step(self, key: KeyTaken, state: State, t: Time) -> tuple[State, Info]:
        """One step from ``state.t`` to t, both of which may be traced; the key is for this step alone."""
        ...

    def check(self, grid: Grid) -> None:
        """Refuses a concrete grid that the sampler cannot follow; a traced one passes."""
        ...


def uniform_grid(steps: int, *, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """``steps`` equal jumps from ``start`` to ``end``: float64 ``[steps + 1]``, concrete even under ``jit``.

    Raises:
      ValueError: for no steps or times outside [0, 1]; TypeError for numbers of the wrong type.

    Example:
      >>> from jflow import samplers
      >>> samplers.uniform_grid(4).tolist()
      [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    checks.integer("steps", steps, low=1)
    return np.linspace(
        checks.number("start", start, low=0.0, high=1.0),
        checks.number("end", end, low=0.0, high=1.0),
        steps + 1,
    )


def run(sampler: Sampler[KeyLike], key: KeyLike, x0: Event, grid: Grid, cond: Cond = None) -> Event:
    """The sample at grid[-1], one step of the sampler between each two times of the grid; shaped like x0.

    Args:
      sampler: an object with ``init``, ``step`` and ``check``, such as ``Jumps``, ``Renoise``, ``SDE``.
      key: folded with the number of each step; None for a sampler that needs none.
      x0: the state at grid[0], a pytree of floating-point arrays.
      grid: the times, ``[K + 1]``.
      cond: conditioning of the sample.

    Raises:
      ValueError: for a grid that is not one-dimensional with two entries or more, for more than one key, and as
        ``sampler.check``.
      TypeError: for anything but a sampler, a key that is not a PRNG key (or None where the sampler needs one), or x0 that
        is not floating-point.
    """
    end, _ = _scan(sampler, key, x0, grid, cond, lambda state, info: None)
    return end.x


def run_path(sampler: Sampler[KeyLike], key: KeyLike, x0: Event, grid: Grid, cond: Cond = None) -> tuple[Event, Info]:
    """All samples on the way, and what each step reports.

    Args and errors: as ``run``.

    Returns:
      (x, info): x like x0 with a leading axis K + 1, of which the first is x0; info with a leading axis K.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> states, info = samplers.run_path(samplers.Jumps(bound), None, x0, samplers.uniform_grid(2))
      >>> states.tolist()
      [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    """
    _, (states, info) = _scan(sampler, key, x0, grid, cond, lambda state, info: (state.x, info))
    first = jax.tree.map(jnp.asarray, x0)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), first, states), info


def _scan(
    sampler: Sampler[KeyLike],
    key: KeyLike,
    x0: Event,
    grid: Grid,
    cond: Cond,
    keep: Callable[[State, Info], Kept],
) -> tuple[State, Kept]:
    check_sampler(sampler)
    if key is not None:
        check_key(key)
    check_length(grid)
    sampler.check(grid)
    times = times_of(x0, grid)

    def leg(state: State, inputs: tuple[Array, Array]) -> tuple[State, Kept]:
        index, t = inputs
        # Keys split beforehand and scanned over trip jax's check for key reuse under vmap. None is a tree without keys.
        state, info = sampler.step(jax.tree.map(lambda key: jax.random.fold_in(key, index), key), state, t)
        return state, keep(state, info)

    indices = jnp.arange(times.shape[0] - 1, dtype=jnp.uint32)
    return jax.lax.scan(leg, sampler.init(x0, times[0], cond), (indices, times[1:]))


def times_of(x0: Event, grid: Grid) -> Array:
    """The grid as an array: a floating jax array as it is, numbers in the widest dtype of x0 or float32.

    Raises:
      ValueError: for a grid that is not one-dimensional with two entries or more.
      TypeError: for x0 that is not floating-point.
    """
    checks.floating("x0", x0)
    check_length(grid)
    return time_of(jax.tree.map(jnp.asarray, x0), grid)


def time_of(x: Event, t: Any) -> Array:
    """A time, or times, as an array: a floating jax array as it is, numbers in the widest dtype of x or float32."""
    if isinstance(t, jax.Array) and jnp.issubdtype(t.dtype, jnp.floating):
        return t
    return jnp.asarray(t, trees.at_least_float32(x))


def check_length(grid: Grid) -> None:
    """Refuses a grid that is not one-dimensional with two entries or more.

    Raises:
      ValueError: naming its shape.
    """
    shape = np.shape(grid)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"grid: expected at least two times in one dimension, got shape {shape}")


def check_sampler(sampler: Any) -> None:
    """Refuses anything but a sampler.

    Raises:
      TypeError: naming what came.
    """
    methods = (getattr(sampler, name, None) for name in ("init", "step", "check"))
    if isinstance(sampler, type) or not all(map(callable, methods)):
        raise TypeError(f"sampler: expected a sampler, such as samplers.Jumps(bound), got {described(sampler)}")


def check_bound(bound: BoundFlowMap) -> None:
    """Refuses anything but a flow map with its parameters.

    Raises:
      TypeError: naming what came.
    """
    if not isinstance(bound, BoundFlowMap):
        raise TypeError(f"bound: expected a BoundFlowMap, made by flow_map.bind(params), got {type(bound).__name__}")


def check_key(key: Any) -> None:
    """Refuses anything but one PRNG key.

    Raises:
      TypeError: for another type, None included; ValueError for an array of typed keys.
    """
    checks.key("key", key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape != ():
        raise ValueError(f"key: expected one key (jax.vmap over samples), got an array of keys of shape {key.shape}")


def start(x0: Event, t: Time, cond: Cond) -> State:
    """The state of a sample, checked.

    Raises:
      TypeError: for x0 that is not floating-point; ValueError for a t that is not a scalar.
    """
    checks.floating("x0", x0)
    checks.scalar("t", t)
    x0 = jax.tree.map(jnp.asarray, x0)
    return State(x0, time_of(x0, t), cond)


def next_time(state: State, t: Time) -> Array:
    """The time of the next state, in the dtype of the last: a loop needs them equal.

    Raises:
      ValueError: for a t that is not a scalar.
    """
    checks.scalar("t", t)
    return jnp.asarray(t).astype(state.t.dtype)


def no_noise(state: State) -> Event:
    """Zeros, one for each leaf of x."""
    return jax.tree.map(lambda leaf: jnp.zeros((), trees.at_least_float32(leaf)), state.x)
