"""The interface of samplers, ``init`` and ``step(key, state, t) -> (state, info)``, and ``run``, which applies it to a grid.

A sampler works on one sample; use ``jax.vmap`` for batches. Its state is a pytree of arrays, so a batch of states can be
weighted, resampled or changed between two steps::

    sampler = samplers.Renoise(bound, interpolant, kappa=0.5)
    states = jax.vmap(lambda x: sampler.init(x, grid[0]))(x0)
    for k, t in enumerate(grid[1:]):
        keys = jax.random.split(jax.random.fold_in(key, k), n)
        states, info = jax.vmap(sampler.step, (0, 0, None))(keys, states, t)
        # A particle method would resample here:
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
# The type of a sampler's keys: Key, or Key | None for a sampler that can step without a key.
KeyLike = TypeVar("KeyLike", bound=Key | None)
KeyTaken = TypeVar("KeyTaken", bound=Key | None, contravariant=True)
Kept = TypeVar("Kept")


class State(NamedTuple):
    """The state of a sampler.

    Attributes:
      x: the sample, in the dtypes of x0.
      t: its time, a scalar of at least float32.
      cond: conditioning of the sample, or None.
      wide: x before rounding to its own dtype, if the sampler makes many small steps (``SDE`` of narrow dtypes), else None.
        To continue from another x, make a new state with ``init``.
    """

    x: Event
    t: Array
    cond: Cond = None
    wide: Event | None = None


class Info(NamedTuple):
    """Diagnostics of a step.

    Attributes:
      target: the target time of the map's jump, a scalar; for samplers without such a jump, the time of the new state.
      noise: the standard deviation of the added noise, in units of x: for each leaf a scalar, or an array if it differs
        between entries.
      calls: the number of calls of the map or its velocity, an int32 scalar.
      centre: the new x without its noise if the noise is added at the end of the step (``Renoise``), else None.
    """

    target: Array
    noise: Event
    calls: Array
    centre: Event | None = None


class Sampler(Protocol[KeyTaken]):
    """The interface of a sampler for ``run`` and ``draw``. For ``draw`` it must also be a pytree.

    The type parameter is the type of the key: ``Sampler[Key]`` requires a key, and ``Sampler[Key | None]`` also steps without
    one.
    """

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """Returns the state of a sample x0 at time t."""
        ...

    def step(self, key: KeyTaken, state: State, t: Time) -> tuple[State, Info]:
        """Makes one step from ``state.t`` to t. Both may be traced. The key is used for this step only."""
        ...

    def check(self, grid: Grid) -> None:
        """Raises an error if a concrete grid is not valid for the sampler. Traced grids are not checked."""
        ...


def uniform_grid(steps: int, *, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """Returns a grid of ``steps`` equal jumps from ``start`` to ``end``, float64 ``[steps + 1]``, concrete even under ``jit``.

    Raises:
      ValueError: if ``steps`` is not positive, or a time is outside [0, 1].
      TypeError: if an argument has a wrong type.

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
    """Runs a sampler along a grid, one step for each interval. Returns the sample at grid[-1], shaped like x0.

    Args:
      sampler: an object with ``init``, ``step`` and ``check``, such as ``Jumps``, ``Renoise`` or ``SDE``.
      key: a PRNG key, folded with the index of each step; None for a sampler that needs no key.
      x0: the state at grid[0], a pytree of floating-point arrays.
      grid: the times, ``[K + 1]``.
      cond: conditioning of the sample.

    Raises:
      ValueError: if the grid is not one-dimensional with at least two entries, ``key`` is an array of several keys, or
        ``sampler.check`` raises it.
      TypeError: if ``sampler`` is not a sampler, ``key`` is not a PRNG key (or None for a sampler that needs a key), or x0
        is not floating-point.
    """
    end, _ = _scan(sampler, key, x0, grid, cond, lambda state, info: None)
    return end.x


def run_path(sampler: Sampler[KeyLike], key: KeyLike, x0: Event, grid: Grid, cond: Cond = None) -> tuple[Event, Info]:
    """Runs a sampler along a grid, and returns the samples at all times and the diagnostics of all steps.

    The arguments and errors are those of ``run``.

    Returns:
      (x, info). x is shaped like x0 with a leading axis K + 1, and its first entry is x0. info has a leading axis K.

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
        # Scanning over an array of split keys would fail jax's key-reuse check under vmap, so fold in the index. A key of
        # None is an empty tree.
        state, info = sampler.step(jax.tree.map(lambda key: jax.random.fold_in(key, index), key), state, t)
        return state, keep(state, info)

    indices = jnp.arange(times.shape[0] - 1, dtype=jnp.uint32)
    return jax.lax.scan(leg, sampler.init(x0, times[0], cond), (indices, times[1:]))


def times_of(x0: Event, grid: Grid) -> Array:
    """Converts the grid to an array as ``time_of`` does.

    Raises:
      ValueError: if the grid is not one-dimensional with at least two entries.
      TypeError: if x0 is not floating-point.
    """
    checks.floating("x0", x0)
    check_length(grid)
    return time_of(jax.tree.map(jnp.asarray, x0), grid)


def time_of(x: Event, t: Any) -> Array:
    """Converts times to an array. A floating-point jax array is unchanged; numbers get the widest dtype of x and float32."""
    if isinstance(t, jax.Array) and jnp.issubdtype(t.dtype, jnp.floating):
        return t
    return jnp.asarray(t, trees.at_least_float32(x))


def check_length(grid: Grid) -> None:
    """Checks the shape of a grid.

    Raises:
      ValueError: if the grid is not one-dimensional with at least two entries.
    """
    shape = np.shape(grid)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"grid: expected at least two times in one dimension, got shape {shape}")


def check_sampler(sampler: Any) -> None:
    """Checks that an argument is a sampler.

    Raises:
      TypeError: if the argument is not a sampler.
    """
    methods = (getattr(sampler, name, None) for name in ("init", "step", "check"))
    if isinstance(sampler, type) or not all(map(callable, methods)):
        raise TypeError(f"sampler: expected a sampler, such as samplers.Jumps(bound), got {described(sampler)}")


def check_bound(bound: BoundFlowMap) -> None:
    """Checks that an argument is a flow map with its parameters.

    Raises:
      TypeError: if the argument is not a BoundFlowMap.
    """
    if not isinstance(bound, BoundFlowMap):
        raise TypeError(f"bound: expected a BoundFlowMap, made by flow_map.bind(params), got {type(bound).__name__}")


def check_key(key: Any) -> None:
    """Checks that an argument is one PRNG key.

    Raises:
      TypeError: if the argument is not a PRNG key, for example None.
      ValueError: if the argument is an array of several keys.
    """
    checks.key("key", key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape != ():
        raise ValueError(f"key: expected one key (jax.vmap over samples), got an array of keys of shape {key.shape}")


def start(x0: Event, t: Time, cond: Cond) -> State:
    """Checks a sample and its time, and returns the initial state.

    Raises:
      TypeError: if x0 is not floating-point.
      ValueError: if t is not a scalar.
    """
    checks.floating("x0", x0)
    checks.scalar("t", t)
    x0 = jax.tree.map(jnp.asarray, x0)
    return State(x0, time_of(x0, t), cond)


def next_time(state: State, t: Time) -> Array:
    """Casts the next time to the dtype of the state's time, because a loop requires equal dtypes.

    Raises:
      ValueError: if t is not a scalar.
    """
    checks.scalar("t", t)
    return jnp.asarray(t).astype(state.t.dtype)


def no_noise(state: State) -> Event:
    """Returns a scalar zero for each leaf of x."""
    return jax.tree.map(lambda leaf: jnp.zeros((), trees.at_least_float32(leaf)), state.x)
