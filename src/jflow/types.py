"""The two types of the library, and the time convention that everything shares.

Time runs from t = 0, the base (noise), to t = 1, the data. ``s`` is the source time and ``t`` the target:
generation has s < t, encoding s > t. All functions work on one sample: ``s`` and ``t`` are scalars, ``x`` is a
pytree of arrays of any event shape, and callers ``jax.vmap``.

The types::

    Velocity:  (params, t, x, cond=None, *, key=None)     -> b_t(x)
    FlowMap:   (params, s, t, x, cond=None, *, key=None)  -> v_{s,t}(x),  the mean velocity
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees

Array = jax.Array
# jax has no type for pytrees. A time is a scalar, a number or an array; functions that callers write, such as a Velocity,
# may annotate theirs as they like, which a union here would forbid.
PyTree = Any
Params = Any
Event = Any
Cond = Any
Key = Array
Time = Any
# jaxlib comes without types, so that to a type checker the class is a variable.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]


class Velocity(Protocol):
    """The velocity b_t(x) of a probability-flow ODE dx/dt = b_t(x), of one sample; shaped like x."""

    def __call__(self, params: Params, t: Time, x: Event, /, cond: Cond = None, *, key: Key | None = None) -> Event: ...


class MeanVelocity(Protocol):
    """The mean velocity v_{s,t}(x) = (X_{s,t}(x) - x)/(t - s) of one sample; shaped like x."""

    def __call__(
        self, params: Params, s: Time, t: Time, x: Event, /, cond: Cond = None, *, key: Key | None = None
    ) -> Event: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Domain:
    """The pairs (s, t) at which a flow map is defined, all within [0, 1].

    Attributes:
      name: how error messages call it.
      backward: whether s > t is inside (encoding, data to noise).
      target: the one target time allowed, or None for any.
      source: the one source time allowed, or None for any.
      levels: for a dyadic grid, s and t must be multiples of 2^-levels and their gap a power of two; else None.
    """

    name: str
    backward: bool = False
    target: float | None = None
    levels: int | None = None
    source: float | None = None

    def __repr__(self) -> str:
        return f"Domain({self.name!r})"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {type(self.name).__name__}")

    def contains(self, s: float, t: float) -> bool:
        """Whether the pair of concrete times (s, t) lies in the domain; the diagonal s = t always does.

        Times that differ by less than ``checks.ROUNDING`` count as equal: 0.1 + 0.2 is 0.3 here, and a float32 sum of
        steps that ends at 1.0000001 ends at 1.
        """
        return bool(self.contains_all(np.asarray(s, np.float64), np.asarray(t, np.float64)))

    def contains_all(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """``contains`` for arrays of concrete times, entry by entry."""
        rounding = checks.ROUNDING
        inside = (np.minimum(s, t) >= -rounding) & (np.maximum(s, t) <= 1.0 + rounding)
        allowed = np.ones_like(inside)
        if not self.backward:
            allowed &= s <= t
        if self.target is not None:
            allowed &= np.abs(t - self.target) <= rounding
        if self.source is not None:
            allowed &= np.abs(s - self.source) <= rounding
        if self.levels is not None:
            cells = 2**self.levels
            # float32 grids hold a dyadic number exactly only up to rounding of the caller's own arithmetic.
            start, gap = s * cells, np.abs(t - s) * cells
            power = np.log2(np.maximum(gap, 1e-30))
            allowed &= (np.abs(start - np.round(start)) < 1e-3) & (np.abs(power - np.round(power)) < 1e-3)
            allowed &= power > -0.5
        return inside & (allowed | (np.abs(t - s) <= rounding))

    def check_times(self, s: Time, t: Time) -> None:
        """Raises an error for times outside [0, 1] or a jump outside the domain. Traced times are not checked.

        Raises:
          ValueError: if a time is not a scalar or outside [0, 1], or the jump is outside the domain.
        """
        checks.time("s", s)
        checks.time("t", t)
        source, target = checks.concrete(s), checks.concrete(t)
        if source is None or target is None:
            return
        if not self.contains(float(source), float(target)):
            raise ValueError(
                f"s, t: the jump from {float(source):.9g} to {float(target):.9g} is outside the map's domain, {self.name}"
            )

    def check_grid(self, grid: Sequence[float] | Array | np.ndarray) -> None:
        """Raises an error for a grid of times with a jump outside the domain.

        Traced grids are not checked; check them before ``jit``.

        Raises:
          ValueError: if a jump is outside the domain, or the grid is not one-dimensional with at least two entries.
        """
        values = checks.concrete(grid)
        if values is None:
            return
        if values.ndim != 1 or values.size < 2:
            raise ValueError(f"grid: expected at least two times in one dimension, got shape {values.shape}")
        for s, t in itertools.pairwise(values):
            if not self.contains(s, t):
                raise ValueError(
                    f"grid: the jump from {float(s):.9g} to {float(t):.9g} is outside the map's domain, {self.name}"
                )


# The signatures of the library's two types, for messages.
_ONE_TIME = "(params, t, x, cond=None, *, key=None) -> b_t(x)"
_TWO_TIMES = "(params, s, t, x, cond=None, *, key=None) -> v_{s,t}(x)"

FORWARD = Domain("0 <= s <= t <= 1")
BOTH = Domain("0 <= s, t <= 1, both directions", backward=True)
TO_DATA = Domain("t = 1 only", target=1.0)
FROM_NOISE = Domain("s = 0 only", source=0.0)


# A finer dyadic grid has neighbours near t = 1 that float32 cannot tell apart.
FINEST_LEVELS = 23


def dyadic(levels: int) -> Domain:
    """The dyadic grid of the shortcut model: multiples of 2^-levels, gaps that are powers of two.

    Raises:
      ValueError: if ``levels`` is not between 1 and ``FINEST_LEVELS``.
      TypeError: if ``levels`` is not an integer.
    """
    checks.integer("levels", levels, low=1, high=FINEST_LEVELS)
    return Domain(f"dyadic grid of {2**levels} cells, s <= t", levels=levels)


@dataclasses.dataclass(frozen=True)
class FlowMap:
    r"""A flow map, given by its mean velocity v. Its jump X and its velocity b are

    .. math:: X_{s,t}(x) = x + (t - s)\, v_{s,t}(x), \qquad b_t(x) = v_{t,t}(x).

    Attributes:
      mean_velocity: ``(params, s, t, x, cond=None, *, key=None) -> v_{s,t}(x)``, of one sample.
      domain: where the map is defined.
      jump_override: a more accurate X_{s,t}, where one exists (an oracle's closed form).
      velocity_override: a more accurate or cheaper v_{t,t} (a closed form, or a head of its own).
      form: the name of the parameterization that made the map, or "". Some methods require a form.

    Its functions raise ValueError for times that are not scalars, and for concrete times outside [0, 1] or a jump outside
    the domain. Traced times are not checked.

    Outputs are cast to the dtypes of x, leaf by leaf. The functions raise ValueError if the shapes differ from those of x,
    and TypeError if a leaf is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap
      >>> flow_map = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x))
      >>> x = jnp.zeros(2, jnp.float32)
      >>> print(flow_map.jump(jnp.float32(3.0), 0.0, 0.5, x))
      [1.5 1.5]
      >>> print(flow_map.velocity(jnp.float32(3.0), 0.5, x))
      [3. 3.]
    """

    mean_velocity: MeanVelocity
    domain: Domain = FORWARD
    jump_override: MeanVelocity | None = None
    velocity_override: Velocity | None = None
    form: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.domain, Domain):
            raise TypeError(f"domain: expected a Domain, such as types.FORWARD, got {type(self.domain).__name__}")
        # Anew at every ``dataclasses.replace``, which may have changed the domain.
        for field, name in (("mean_velocity", "mean velocity"), ("jump_override", "jump")):
            if (function := getattr(self, field)) is not None:
                inner = function.function if isinstance(function, _Checked) else function
                checks.accepts(field, inner, _TWO_TIMES, 5)
                object.__setattr__(self, field, _Checked(inner, name, self.domain))
        velocity = self.velocity_override
        if velocity is not None and not isinstance(velocity, _CheckedVelocity):
            checks.accepts("velocity_override", velocity, _ONE_TIME, 4)
            object.__setattr__(self, "velocity_override", _CheckedVelocity(velocity, "velocity"))

    def jump(self, params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """X_{s,t}(x), shaped like x."""
        if self.jump_override is not None:
            return self.jump_override(params, s, t, x, cond, key=key)
        v = self.mean_velocity(params, s, t, x, cond, key=key)
        return move(x, s, t, v)

    def velocity(self, params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """b_t(x) = v_{t,t}(x), shaped like x."""
        if self.velocity_override is not None:
            return self.velocity_override(params, t, x, cond, key=key)
        return self.mean_velocity(params, t, t, x, cond, key=key)

    def bind(self, params: Params) -> BoundFlowMap:
        """The same map with its first argument filled in.

        Example:
          >>> import jax.numpy as jnp
          >>> from jflow import FlowMap
          >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * x).bind(jnp.float32(2.0))
          >>> print(bound.jump(0.0, 1.0, jnp.ones(2, jnp.float32)))
          [3. 3.]
        """
        return BoundFlowMap(self, params)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A function of two times: concrete times are checked, its output is checked and cast to the dtypes of x.

    Equal functions on equal domains make equal ones.
    """

    function: MeanVelocity
    name: str
    domain: Domain

    def __call__(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        self.domain.check_times(s, t)
        with checks.of_one_sample(x):
            output = self.function(params, s, t, x, cond, key=key)
        return checks.output(f"{self.name}'s output", output, x)


@dataclasses.dataclass(frozen=True)
class _CheckedVelocity:
    """A velocity: a concrete time is checked, its output is checked and cast to the dtypes of x.

    Equal functions make equal ones.
    """

    function: Velocity
    name: str

    def __call__(self, params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        checks.time("t", t)
        with checks.of_one_sample(x):
            output = self.function(params, t, x, cond, key=key)
        return checks.output(f"{self.name}'s output", output, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundFlowMap:
    """A flow map with its parameters: the same methods without the first argument.

    It is a pytree whose leaves are the parameters, so it can be passed through ``jax.jit``.
    """

    flow_map: FlowMap = dataclasses.field(metadata={"static": True})
    params: Params

    @property
    def domain(self) -> Domain:
        """Where the map is defined."""
        return self.flow_map.domain

    def mean_velocity(self, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """v_{s,t}(x), shaped like x."""
        return self.flow_map.mean_velocity(self.params, s, t, x, cond, key=key)

    def jump(self, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """X_{s,t}(x), shaped like x."""
        return self.flow_map.jump(self.params, s, t, x, cond, key=key)

    def velocity(self, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """b_t(x) = v_{t,t}(x), shaped like x."""
        return self.flow_map.velocity(self.params, t, x, cond, key=key)


def move(x: Event, s: Time, t: Time, v: Event) -> Event:
    """x + (t - s) v, leaf by leaf: the jump of mean velocity v."""
    return trees.axpy(jnp.asarray(t) - jnp.asarray(s), v, x)


def as_velocity(name: str, model: Velocity | FlowMap) -> Velocity:
    """The velocity of a model: v_{t,t} of a FlowMap, or a Velocity itself, whose output is cast to the dtypes of x.

    Args:
      name: the argument, for messages.
      model: a FlowMap, or ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample.

    Returns:
      The Velocity; equal models give equal ones, which jit compiles once. Called, it raises ValueError for a concrete time
      outside [0, 1] or an output that is not shaped like x, and TypeError for an output that is not floating-point.

    Raises:
      TypeError: if ``model`` is neither, for example a network of two times.
    """
    if isinstance(model, FlowMap):
        return model.velocity
    if isinstance(model, _CheckedVelocity):
        return model
    if isinstance(model, BoundFlowMap):
        raise TypeError(
            f"{name}: expected a Velocity or a FlowMap, got a BoundFlowMap: pass its flow_map, and its params"
        )
    if not callable(model) or isinstance(model, type):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{name}: expected a Velocity or a FlowMap, got {kind}")
    checks.accepts(name, model, f"{_ONE_TIME}, or a FlowMap (jflow.flow_map makes one of a network of two times)", 4)
    return _CheckedVelocity(model, name)


def as_flow_map(name: str, model: Velocity | FlowMap) -> FlowMap:
    """Converts a model to a FlowMap. A FlowMap is returned unchanged.

    The FlowMap of a Velocity is defined for s = t only; its jumps raise ValueError.

    Raises:
      TypeError: if ``model`` is neither a Velocity nor a FlowMap.
    """
    if isinstance(model, FlowMap):
        return model
    velocity = as_velocity(name, model)

    def refuse(*args: Any, **kwargs: Any) -> Event:
        raise ValueError(f"{name}: expected a FlowMap, whose jumps are needed here, got a Velocity")

    return FlowMap(refuse, velocity_override=velocity)


class Batch(NamedTuple):
    """What an objective learns from, with a leading batch axis everywhere.

    Attributes:
      x1: data, ``[B, ...]`` (a pytree of such).
      x0: base points paired with x1, ``[B, ...]``. If None, the objective draws them independently.
      cond: conditioning, ``[B, ...]`` leaves, or None.
    """

    x1: Event
    x0: Event | None = None
    cond: Cond = None


# What an objective accepts as its batch: see ``as_batch``.
BatchLike: TypeAlias = Batch | Array | np.ndarray | dict[str, Any]


def as_batch(batch: BatchLike, name: str = "batch") -> Batch:
    """Converts a batch: an array is its data, and a dictionary has the keys x1, x0 and cond, at least x1 or x0.

    Raises:
      TypeError: if ``batch`` is of another type. A plain tuple could mean (data, labels) as well as (data, base points).
      ValueError: for values of a host array that do not fit the dtype that jax makes of them (``checks.fits``).
    """
    if isinstance(batch, (jax.Array, np.ndarray)):
        batch = Batch(batch)
    elif isinstance(batch, dict) and set(batch) <= set(Batch._fields) and {"x1", "x0"} & set(batch):
        batch = Batch(batch.get("x1"), batch.get("x0"), batch.get("cond"))
    if isinstance(batch, Batch):
        for field, tree in zip(Batch._fields, batch, strict=True):
            checks.fits(f"{name}.{field}", tree)
        return batch
    keys = f" with the keys {sorted(map(str, batch))}" if isinstance(batch, dict) else ""
    raise TypeError(
        f"{name}: expected a Batch(x1=..., x0=..., cond=...), an array of data, or a dictionary with the keys x1, x0 and "
        f"cond, got {type(batch).__name__}{keys}"
    )


class Context(NamedTuple):
    """What a method needs beside parameters and data, and a checkpoint keeps: traced pytrees only.

    Attributes:
      step: the number of optimizer steps taken, an int32 scalar (curricula).
      ema: exponential moving average of the parameters, or None.
      teacher: frozen parameters of the teacher, or None.
      state: the objective's own state, ``()`` for an objective without one (``objectives.init``).
    """

    step: Array | int = 0
    ema: Params = None
    teacher: Params = None
    state: PyTree = ()


def as_context(context: Context | None) -> Context:
    """A Context as it is; ``Context()`` for None.

    Raises:
      TypeError: for anything else.
    """
    if context is None:
        return Context()
    if not isinstance(context, Context):
        raise TypeError(
            f"context: expected a Context(step=..., ema=..., teacher=..., state=...), got {type(context).__name__}"
        )
    return context


class Aux(NamedTuple):
    """What an objective returns beside the loss.

    Attributes:
      state: the objective's next state, of the structure, shapes and dtypes of ``context.state``.
      metrics: reports by name (``jflow.reports``): what a person wants to look at.
    """

    state: PyTree = ()
    metrics: dict[str, Any] = {}  # noqa: RUF012


class ObjectiveFn(Protocol):
    """What is trained: the loss of each row of a batch, ``[B]``; the caller averages.

    An objective with a state of its own also has ``init(key, params) -> state``; see ``objectives.init``.
    """

    def __call__(self, params: Params, key: Key, batch: Batch, context: Context) -> tuple[Array, Aux]: ...
