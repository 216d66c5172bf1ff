r"""Velocities and flow maps, the two types of the library, and the time convention.

Time runs from t = 0, the base (noise), to t = 1, the data. ``s`` is the source time and ``t`` the target time.
Generation has s < t, encoding s > t. All functions work on one sample: ``s`` and ``t`` are scalars, and ``x`` is a
pytree of arrays of any shape. Use ``jax.vmap`` for batches.

A ``Velocity`` is the right-hand side b of a probability-flow ODE. A ``FlowMap`` holds the mean velocity v of its jumps X:

.. math:: \frac{dx}{dt} = b_t(x), \qquad v_{s,t}(x) = \frac{X_{s,t}(x) - x}{t - s}, \qquad v_{t,t}(x) = b_t(x).

The signatures of the two functions are::

    velocity(params, t, x, cond=None, *, key=None)           returns b_t(x)
    mean_velocity(params, s, t, x, cond=None, *, key=None)   returns v_{s,t}(x)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees
from jflow.domains import BOTH as BOTH
from jflow.domains import FORWARD as FORWARD
from jflow.domains import FROM_NOISE as FROM_NOISE
from jflow.domains import TO_DATA as TO_DATA
from jflow.domains import Domain as Domain
from jflow.domains import dyadic as dyadic

Array = jax.Array
# jax has no type for pytrees. A time is a Python number or a scalar array. ``Time`` is Any, not a union, so that callers
# may annotate the times of their own functions as they like.
PyTree = Any
Params = Any
Event = Any
Cond = Any
Key = Array
Time = Any
# jaxlib has no type annotations, so a type checker takes the class for a variable.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]


class Velocity(Protocol):
    """The velocity b_t(x) of a probability-flow ODE dx/dt = b_t(x), for one sample. The output is shaped like x."""

    def __call__(self, params: Params, t: Time, x: Event, /, cond: Cond = None, *, key: Key | None = None) -> Event: ...


class MeanVelocity(Protocol):
    """The mean velocity v_{s,t}(x) = (X_{s,t}(x) - x)/(t - s), for one sample. The output is shaped like x."""

    def __call__(
        self, params: Params, s: Time, t: Time, x: Event, /, cond: Cond = None, *, key: Key | None = None
    ) -> Event: ...


# The signatures of a Velocity and a mean velocity, for error messages.
_ONE_TIME = "(params, t, x, cond=None, *, key=None) -> b_t(x)"
_TWO_TIMES = "(params, s, t, x, cond=None, *, key=None) -> v_{s,t}(x)"


@dataclasses.dataclass(frozen=True)
class FlowMap:
    r"""A flow map, given by its mean velocity v.

    Its jump X and its velocity b are

    .. math:: X_{s,t}(x) = x + (t - s)\, v_{s,t}(x), \qquad b_t(x) = v_{t,t}(x).

    Attributes:
      mean_velocity: ``(params, s, t, x, cond=None, *, key=None) -> v_{s,t}(x)``, for one sample.
      domain: the pairs (s, t) at which the map is defined.
      jump_override: a more accurate X_{s,t}, where one exists (an oracle's closed form).
      velocity_override: a more accurate or cheaper v_{t,t} (a closed form, or a separate head).
      form: the name of the parameterization that made the map, or "". Some methods require a form.
      null: the null condition of one sample, which stands for "no condition", such as the label after the last class; None
        if there is none. Label dropout, guided targets and ``guidance`` read it.

    The methods raise ValueError if a time is not a scalar, if a concrete time is outside [0, 1], or if a concrete jump is
    outside the domain. Traced times are not checked.

    Outputs are cast to the dtypes of x, leaf by leaf. The methods raise ValueError if the output's shapes differ from those
    of x, and TypeError if a leaf is not floating-point.

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
    null: Cond = dataclasses.field(default=None, compare=False)
    # What equality and hash compare of ``null``, whose leaves may be arrays.
    _null: Any = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_null", _fingerprint(self.null))
        if not isinstance(self.domain, Domain):
            raise TypeError(f"domain: expected a Domain, such as types.FORWARD, got {type(self.domain).__name__}")
        # Wrap again after ``dataclasses.replace``, which may have changed the domain.
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
        """Returns X_{s,t}(x), shaped like x."""
        if self.jump_override is not None:
            return self.jump_override(params, s, t, x, cond, key=key)
        v = self.mean_velocity(params, s, t, x, cond, key=key)
        return move(x, s, t, v)

    def velocity(self, params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """Returns b_t(x) = v_{t,t}(x), shaped like x."""
        if self.velocity_override is not None:
            return self.velocity_override(params, t, x, cond, key=key)
        return self.mean_velocity(params, t, t, x, cond, key=key)

    def bind(self, params: Params) -> BoundFlowMap:
        """Returns the map with its parameters filled in.

        Example:
          >>> import jax.numpy as jnp
          >>> from jflow import FlowMap
          >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * x).bind(jnp.float32(2.0))
          >>> print(bound.jump(0.0, 1.0, jnp.ones(2, jnp.float32)))
          [3. 3.]
        """
        return BoundFlowMap(self, params)


def _fingerprint(null: Cond) -> Any:
    """Returns a hashable value that is equal for equal null conditions.

    Raises:
      TypeError: if a leaf is traced.
    """
    if null is None:
        return None
    checks.fits("null", null)
    leaves = [checks.concrete(leaf) for leaf in jax.tree.leaves(null)]
    if any(leaf is None for leaf in leaves):
        raise TypeError("null: expected a concrete condition, got a traced one")
    known = [leaf for leaf in leaves if leaf is not None]
    return jax.tree.structure(null), tuple((leaf.shape, leaf.dtype.str, leaf.tobytes()) for leaf in known)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """Wraps a function of two times: checks concrete times, and checks its output and casts it to the dtypes of x.

    Wrappers of equal functions on equal domains are equal.
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
    """Wraps a velocity: checks a concrete time, and checks its output and casts it to the dtypes of x.

    Wrappers of equal functions are equal.
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
    """A flow map with its parameters. It has the methods of FlowMap, without their first argument.

    It is a pytree whose leaves are the parameters, so it can be passed through ``jax.jit``.
    """

    flow_map: FlowMap = dataclasses.field(metadata={"static": True})
    params: Params

    @property
    def domain(self) -> Domain:
        """The pairs (s, t) at which the map is defined."""
        return self.flow_map.domain

    @property
    def null(self) -> Cond:
        """The null condition of one sample, or None."""
        return self.flow_map.null

    def mean_velocity(self, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """Returns v_{s,t}(x), shaped like x."""
        return self.flow_map.mean_velocity(self.params, s, t, x, cond, key=key)

    def jump(self, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """Returns X_{s,t}(x), shaped like x."""
        return self.flow_map.jump(self.params, s, t, x, cond, key=key)

    def velocity(self, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        """Returns b_t(x) = v_{t,t}(x), shaped like x."""
        return self.flow_map.velocity(self.params, t, x, cond, key=key)


def move(x: Event, s: Time, t: Time, v: Event) -> Event:
    """Returns the jump x + (t - s) v with mean velocity v, leaf by leaf."""
    return trees.axpy(jnp.asarray(t) - jnp.asarray(s), v, x)


def as_velocity(name: str, model: Velocity | FlowMap) -> Velocity:
    """Converts a model to a Velocity whose output is cast to the dtypes of x.

    The velocity of a FlowMap is v_{t,t}.

    Args:
      name: the argument's name in error messages.
      model: a FlowMap, or ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` for one sample.

    Returns:
      The Velocity. Equal models give equal results, so ``jit`` compiles once for both. When called, it raises ValueError if
      a concrete time is outside [0, 1] or the output is not shaped like x, and TypeError if the output is not
      floating-point.

    Raises:
      TypeError: if ``model`` is neither a Velocity nor a FlowMap, for example a network of two times.
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

    The FlowMap of a Velocity can be evaluated at s = t only, by its ``velocity``; its jumps raise ValueError.

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
    """The training data of one step. Every leaf has a leading batch axis.

    Attributes:
      x1: data, a pytree of arrays ``[B, ...]``.
      x0: base points paired with x1, ``[B, ...]``. If None, the objective draws them independently.
      cond: conditioning, a pytree of arrays ``[B, ...]``, or None.
    """

    x1: Event
    x0: Event | None = None
    cond: Cond = None


# The types that an objective accepts as its batch; see ``as_batch``.
BatchLike: TypeAlias = Batch | Array | np.ndarray | dict[str, Any]


def as_batch(batch: BatchLike, name: str = "batch") -> Batch:
    """Converts an array or a dictionary to a Batch.

    An array becomes x1. A dictionary may have the keys x1, x0 and cond, and must have x1 or x0. A plain tuple is rejected,
    because it could mean (data, labels) or (data, base points).

    Raises:
      TypeError: if ``batch`` has another type or other keys.
      ValueError: if a value of a host array does not fit the dtype to which jax converts it (``checks.fits``).
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
    """The inputs of an objective besides parameters and data. Checkpoints save them. All are traced pytrees.

    Attributes:
      step: the number of optimizer steps taken, an int32 scalar; curricula depend on it.
      ema: exponential moving average of the parameters, or None.
      teacher: frozen parameters of the teacher, or None.
      state: the objective's state (``objectives.init``); ``()`` for an objective without state.
    """

    step: Array | int = 0
    ema: Params = None
    teacher: Params = None
    state: PyTree = ()


def as_context(context: Context | None) -> Context:
    """Returns the context unchanged, or ``Context()`` if it is None.

    Raises:
      TypeError: if ``context`` is neither a Context nor None.
    """
    if context is None:
        return Context()
    if not isinstance(context, Context):
        raise TypeError(
            f"context: expected a Context(step=..., ema=..., teacher=..., state=...), got {type(context).__name__}"
        )
    return context


class Aux(NamedTuple):
    """The second output of an objective, next to the loss.

    Attributes:
      state: the objective's next state, with the structure, shapes and dtypes of ``context.state``.
      metrics: the metrics to log, reports by name (``jflow.reports``).
    """

    state: PyTree = ()
    metrics: dict[str, Any] = {}  # noqa: RUF012


class ObjectiveFn(Protocol):
    """The training objective: a function that returns the loss of each row of a batch, ``[B]``. The caller averages.

    An objective with state also has a method ``init(key, params) -> state``; see ``objectives.init``.
    """

    def __call__(self, params: Params, key: Key, batch: Batch, context: Context) -> tuple[Array, Aux]: ...
