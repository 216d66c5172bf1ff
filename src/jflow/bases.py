r"""Bases: the law of x0 at time 0, as an object that can be sampled and has a log-density and a score.

A base has four members::

    sample(key, like, shape=())   draws points shaped like the event ``like``, with leading axes ``shape``
    log_density(x)                returns log rho_0(x) of one event, in nats
    score(x)                      returns grad log rho_0(x) of one event
    name                          the name in error messages

Every function that needs a base takes the argument ``base=``, ``STANDARD_NORMAL`` by default. Jumps, solves, couplings,
objectives and densities accept any object with these members. Formulas that hold only for independent normal entries
(conversions to and from the score, the SDE, re-noising, the batch's velocity, oracles) use the mean and standard deviation of
a ``Normal`` and raise ValueError for any other base (``gaussian``).

A custom base is a class with these members. This one is for events of a single array::

    class Laplace:
        name = "laplace"

        def sample(self, key, like, shape=()):
            return jax.random.laplace(key, (*shape, *like.shape), like.dtype)

        def log_density(self, x):
            return -jnp.sum(jnp.abs(x)) - x.size * jnp.log(2.0)

        def score(self, x):
            return -jnp.sign(x)

    objective = objectives.lsd(flow_map, interpolants.linear(), base=Laplace())
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees
from jflow.types import Array, Event, Key, PyTree

_HALF_LOG_TAU = 0.5 * float(np.log(2.0 * np.pi))


@runtime_checkable
class Base(Protocol):
    """The law of x0: any object with these four members.

    To pass a custom base as an argument to a ``jax.jit`` function, register its class as a pytree; ``Normal`` is registered.
    """

    @property
    def name(self) -> str:
        """The name in error messages."""
        ...

    def sample(self, key: Key, like: Event, shape: tuple[int, ...] = ()) -> Event:
        """Draws independent points.

        Args:
          key: a PRNG key.
          like: one event, arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are read.
          shape: leading axes, for example ``(n,)`` for a batch of n points.

        Returns:
          Points with leaves of shape ``shape + leaf.shape``, in the dtypes of ``like``.
        """
        ...

    def log_density(self, x: Event) -> Array:
        """Returns log rho_0(x) of one event in nats, a scalar; minus infinity outside the support."""
        ...

    def score(self, x: Event) -> Event:
        """Returns grad log rho_0(x) of one event, shaped like x."""
        ...


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Normal:
    """The normal law with independent entries, N(mean, diag(std^2)). It is a pytree of mean and std.

    Two Normals are equal if their entries are equal, so an objective that holds one can be a static argument of ``jax.jit``.
    A Normal with traced entries equals only a Normal of the same tracers.

    Attributes:
      mean: a number for all entries, or a pytree with the structure of an event, whose leaves are numbers or arrays of
        the event's shapes.
      std: the standard deviation, positive, in the same format as the mean.

    Raises:
      TypeError: if an entry is not a real number or an array of real numbers.
      ValueError: if a concrete entry is not finite, or a standard deviation is not positive; when a method is called, if
        mean or std does not have the structure and shapes of the event.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import bases
      >>> base = bases.Normal(mean=1.0, std=2.0)
      >>> base.sample(jax.random.key(0), jnp.zeros(3, jnp.float32), (4,)).shape
      (4, 3)
      >>> print(base.score(jnp.full(2, 5.0, jnp.float32)))
      [-1. -1.]
    """

    mean: PyTree = 0.0
    std: PyTree = 1.0

    def __post_init__(self) -> None:
        _check_entries("mean", self.mean, -np.inf)
        _check_entries("std", self.std, 0.0)

    def __repr__(self) -> str:
        return f"Normal(mean={_short(self.mean)}, std={_short(self.std)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normal) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        """Returns the structure and values of mean and std, for comparison."""
        leaves, structure = jax.tree.flatten((self.mean, self.std))
        values = map(checks.concrete, leaves)
        # Adding zero turns -0.0 into 0.0: the two are equal but have different bytes.
        return structure, *(
            id(leaf) if value is None else (value.shape, (value.astype(np.float64) + 0.0).tobytes())
            for leaf, value in zip(leaves, values, strict=True)
        )

    @property
    def name(self) -> str:
        """The name in error messages."""
        return "normal"

    def moments(self, like: Event) -> tuple[Event, Event]:
        """Returns the mean and standard deviation with the structure and dtypes of an event.

        Args:
          like: one event, arrays or ``jax.ShapeDtypeStruct``.

        Returns:
          (mean, std). Each leaf is a scalar or has the shape of the leaf of ``like``.

        Raises:
          ValueError: if mean or std has another structure or other shapes.
        """
        return _fitted("mean", self.mean, like), _fitted("std", self.std, like)

    def sample(self, key: Key, like: Event, shape: tuple[int, ...] = ()) -> Event:
        """Draws mean + std z with z ~ N(0, I), in at least float32, with a separate key for each leaf; see ``Base.sample``."""
        leaves, structure = jax.tree.flatten(like)
        keys = jax.random.split(key, len(leaves))

        def draw(key: Key, leaf: Any, mean: Array, std: Array) -> Array:
            z = jax.random.normal(key, (*shape, *leaf.shape), mean.dtype)
            # Broadcast explicitly, because jax may be configured to reject rank promotion, [n, d] + [d].
            mean, std = jnp.broadcast_to(mean, z.shape), jnp.broadcast_to(std, z.shape)
            return (mean + std * z).astype(leaf.dtype)

        moments = (jax.tree.leaves(moment) for moment in self.moments(_widened(like)))
        return jax.tree.unflatten(structure, list(map(draw, keys, leaves, *moments)))

    def log_density(self, x: Event) -> Array:
        r"""Returns the log-density of x, computed in at least float32.

        With the mean m and the standard deviation sigma it is

        .. math::
            \log \rho_0(x) = -\sum_i \left( \frac{(x_i - m_i)^2}{2 \sigma_i^2} + \log \sigma_i + \tfrac12 \log 2\pi \right).

        Raises:
          TypeError: if x is not floating-point.

        Example:
          >>> import jax.numpy as jnp
          >>> from jflow import bases
          >>> round(float(bases.STANDARD_NORMAL.log_density(jnp.zeros(2, jnp.float32))), 4)
          -1.8379
        """
        checks.floating("x", x)
        wide = trees.at_least_float32(jax.tree.map(jnp.asarray, x))
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(wide), x)
        mean, std = self.moments(x)
        whitened = jax.tree.map(lambda leaf, m, s: (leaf - m) / s, x, mean, std)
        logs = jax.tree.map(lambda leaf, s: jnp.sum(jnp.broadcast_to(jnp.log(s), leaf.shape)), x, std)
        size = sum(leaf.size for leaf in jax.tree.leaves(x))
        return -0.5 * trees.sq_norm(whitened) - sum(jax.tree.leaves(logs)) - size * _HALF_LOG_TAU

    def score(self, x: Event) -> Event:
        """Returns the score -(x - mean)/std^2, computed in at least float32, with the shape and dtype of x.

        Raises:
          TypeError: if x is not floating-point.
        """
        checks.floating("x", x)
        x = jax.tree.map(jnp.asarray, x)
        mean, std = self.moments(_widened(x))
        return jax.tree.map(
            lambda leaf, m, s: ((m - leaf.astype(m.dtype)) / jnp.square(s)).astype(leaf.dtype), x, mean, std
        )

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        """Flattens for jax; the children are mean and std."""
        return (self.mean, self.std), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> Normal:
        """Unflattens for jax, without checks, because jax also puts objects that are not arrays into pytrees."""
        self = object.__new__(cls)
        object.__setattr__(self, "mean", children[0])
        object.__setattr__(self, "std", children[1])
        return self


def check(base: Base, name: str = "base") -> None:
    """Checks that an argument is a base.

    Raises:
      TypeError: if the argument is not a base.
    """
    if isinstance(base, type) or not isinstance(base, Base):
        got = base.__name__ + " itself" if isinstance(base, type) else type(base).__name__
        raise TypeError(
            f"{name}: expected a base, an object with name, sample, log_density and score as bases.Normal(), got {got}"
        )


def gaussian(base: Base, who: str) -> Normal:
    """Returns the base if it is a ``Normal``.

    Args:
      base: any base.
      who: the name of the function that requires a normal base, for the error message.

    Raises:
      TypeError: if ``base`` is not a base.
      ValueError: if ``base`` is not a ``Normal``.
    """
    check(base)
    if not isinstance(base, Normal):
        raise ValueError(f"base: {who} holds for a Gaussian base only, expected a bases.Normal, got {base.name!r}")
    return base


def _is_number(value: Any) -> bool:
    """Returns whether the value is a single number: a Python or numpy number, or an array without axes."""
    return jax.tree.structure(value) == jax.tree.structure(0) and np.shape(value) == ()


def _fitted(name: str, value: Any, like: Event) -> Event:
    """Returns the value for each leaf of the event, in the leaf's dtype."""
    leaves, structure = jax.tree.flatten(like)
    if _is_number(value):
        values = [value] * len(leaves)
    elif jax.tree.structure(value) == structure:
        values = jax.tree.leaves(value)
    else:
        raise ValueError(
            f"base.{name}: expected a number, or the event's pytree structure, {structure}, got {jax.tree.structure(value)}"
        )
    for entry, leaf in zip(values, leaves, strict=True):
        if np.shape(entry) not in ((), tuple(leaf.shape)):
            raise ValueError(
                f"base.{name}: expected numbers or the event's shape, {tuple(leaf.shape)}, got shape {np.shape(entry)}"
            )
    return jax.tree.unflatten(
        structure, [jnp.asarray(entry).astype(leaf.dtype) for entry, leaf in zip(values, leaves, strict=True)]
    )


def _widened(like: Event) -> Event:
    """Returns the shapes of an event, with dtypes of at least float32."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, trees.at_least_float32(leaf)), like)


def _check_entries(name: str, value: Any, above: float) -> None:
    leaves = jax.tree.leaves(value)
    if not leaves:
        raise TypeError(f"{name}: expected a number, or arrays shaped like an event, got {value!r}")
    for leaf in leaves:
        try:
            dtype = jax.dtypes.result_type(leaf)
        except TypeError:
            dtype = None
        if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            got = type(leaf).__name__ if dtype is None else dtype
            raise TypeError(f"{name}: expected real numbers, or arrays of them, got {got}")
        entries = checks.concrete(leaf)
        if entries is None:
            continue
        entries = entries.astype(np.float64)
        if not np.all(np.isfinite(entries) & (entries > above)):
            expected = "finite numbers" if above < 0 else "positive finite numbers"
            raise ValueError(f"{name}: expected {expected}, got {np.array2string(entries, threshold=20)}")


def _short(value: Any) -> str:
    """Formats a number as itself, and an array by its dtype and shape."""

    def of(leaf: Any) -> str:
        if not hasattr(leaf, "dtype"):
            return repr(leaf)
        number = checks.concrete(leaf) if np.shape(leaf) == () else None
        return f"{leaf.dtype}{list(np.shape(leaf))}" if number is None else f"{number:g}"

    if jax.tree.structure(value) == jax.tree.structure(0):
        return of(value)
    return str(jax.tree.map(of, value)).replace("'", "")


STANDARD_NORMAL = Normal()
