r"""Diagnostics of flow maps: identity residuals, and comparison with a reference.

- ``residual_grid`` computes the RMS of the tangent, Eulerian, Lagrangian and semigroup residuals on a grid of (s, t).
- ``consistency_report`` averages the same residuals over a law of (s, t) and returns a few numbers to log.
- ``compare`` compares K jumps of several maps with one jump of a reference.

The residuals are those of the mean velocity (``jflow.identities``). Every RMS is over samples and entries of x, in the
units of a velocity. If the velocity in the residuals is the map's own diagonal, they only test whether the map is the flow
of some velocity; X = id passes. With a reference's velocity, they and the tangent residual test whether it is the flow of
that velocity.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, identities, samplers, times, trees
from jflow.interpolants import Interpolant
from jflow.times import PairLaw
from jflow.types import Array, BoundFlowMap, Cond, Domain, Event, Key, PyTree, Time

T = TypeVar("T")

IDENTITIES = ("tangent", "eulerian", "lagrangian", "semigroup")


class ResidualGrid(NamedTuple):
    """The RMS residuals at every pair of source and target time, numpy arrays.

    Entries are NaN where the map's domain does not define the residual (``defined``).

    Attributes:
      s: the source times, ``[n_s]``.
      t: the target times, ``[n_t]``.
      tangent: the RMS of v_{s,s} - b_s with the reference's velocity b, ``[n_s]``; NaN without a reference.
      eulerian: the RMS of the Eulerian residual, ``[n_s, n_t]``.
      lagrangian: the RMS of the Lagrangian residual, ``[n_s, n_t]``.
      semigroup: the RMS of the semigroup residual, ``[n_s, n_t]``.
    """

    s: np.ndarray
    t: np.ndarray
    tangent: np.ndarray
    eulerian: np.ndarray
    lagrangian: np.ndarray
    semigroup: np.ndarray


def defined(domain: Domain, identity: str, s: float, t: float, gamma: float = 0.5) -> bool:
    """Returns whether a residual at (s, t) needs only pairs of times inside the map's domain.

    The pair itself must be inside. A derivative also needs neighbouring times: a dyadic grid has none, and neither has a
    fixed target time in t or a fixed source time in s. The semigroup residual needs both of its legs.

    Raises:
      ValueError: if the identity is unknown.
    """
    checks.choice("identity", identity, IDENTITIES)
    if identity == "tangent":
        return domain.contains(s, s)
    if not domain.contains(s, t):
        return False
    if identity == "semigroup":
        u = gamma * s + (1.0 - gamma) * t
        return domain.contains(s, u) and domain.contains(u, t)
    fixed = domain.target if identity == "lagrangian" else domain.source
    return domain.levels is None and fixed is None


class _Squares(NamedTuple):
    """The mean squares over the entries of one sample's residuals, and of its velocity; scalars."""

    tangent: Array
    eulerian: Array
    lagrangian: Array
    semigroup: Array
    velocity: Array


def _residuals(
    bound: BoundFlowMap,
    reference: BoundFlowMap,
    s: Time,
    t: Time,
    x: Event,
    cond: Cond,
    gamma: Array,
) -> _Squares:
    def v(s_: Time, t_: Time, x_: Event) -> Event:
        return bound.mean_velocity(s_, t_, x_, cond)

    def b(t_: Time, x_: Event) -> Event:
        return reference.velocity(t_, x_, cond)

    here = b(s, x)
    # Use the map's ``velocity``, as samplers do; an override may differ from v on the diagonal.
    tangent = identities.tangent(lambda s_, _, x_: bound.velocity(s_, x_, cond), s, x, here)
    found = (
        tangent.difference,
        identities.eulerian(v, s, t, x, here).difference,
        identities.lagrangian(v, s, t, x, b).difference,
        identities.semigroup(v, s, t, x, gamma).difference,
        here,
    )
    return _Squares(*(trees.sq_norm(r) / _entries(r) for r in found))


def _entries(x: Event) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(x))


def _each(function: Callable[..., T], arguments: tuple[PyTree, ...], batch_size: int | None) -> T:
    """Maps a function of one sample over the leading axis, all at once or in batches."""
    if batch_size is None:
        return jax.vmap(lambda a: function(*a))(arguments)
    return jax.lax.map(lambda a: function(*a), arguments, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("interpolant", "batch_size"))
def _squares_at_samples(
    bound: BoundFlowMap,
    reference: BoundFlowMap,
    interpolant: Interpolant,
    s: Array,
    t: Array,
    x0: Event,
    x1: Event,
    cond: Cond,
    gamma: Array,
    batch_size: int | None,
) -> _Squares:
    """Computes means over samples, each with its own pair (s, t), ``[N]``."""

    def one(s_: Array, t_: Array, x0_: Event, x1_: Event, cond_: Cond) -> _Squares:
        return _residuals(bound, reference, s_, t_, interpolant.interpolate(s_, x0_, x1_), cond_, gamma)

    return jax.tree.map(jnp.mean, _each(one, (s, t, x0, x1, cond), batch_size))


@functools.partial(jax.jit, static_argnames=("interpolant", "batch_size"))
def _squares_at_pairs(
    bound: BoundFlowMap,
    reference: BoundFlowMap,
    interpolant: Interpolant,
    s: Array,
    t: Array,
    x0: Event,
    x1: Event,
    cond: Cond,
    gamma: Array,
    batch_size: int | None,
) -> _Squares:
    """Computes means over all samples at every pair (s, t), ``[P]``."""

    def at_pair(pair: tuple[Array, Array]) -> _Squares:
        s_, t_ = (jnp.broadcast_to(time, (_count(x0),)) for time in pair)
        return _squares_at_samples(bound, reference, interpolant, s_, t_, x0, x1, cond, gamma, batch_size)

    return jax.lax.map(at_pair, (s, t))


def _count(x: Event) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _check_samples(x0: Event, x1: Event, cond: Cond, batch_size: int | None) -> tuple[Event, Event, Cond]:
    checks.floating("x0", x0)
    checks.floating("x1", x1)
    checks.same_structure("x0", x0, "x1", x1)
    _check_leading("x0", x0, cond)
    if batch_size is not None:
        checks.integer("batch_size", batch_size, low=1)
    return jax.tree.map(jnp.asarray, (x0, x1, cond))


def _check_leading(name: str, x: Event, cond: Cond) -> None:
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((x, cond))}
    if len(lengths) != 1 or lengths == {()} or lengths == {(0,)}:
        raise ValueError(
            f"{name}: expected one leading axis of samples on every leaf of {name} and cond, got {lengths}"
        )


def residual_grid(
    bound: BoundFlowMap,
    interpolant: Interpolant,
    x0: Event,
    x1: Event,
    s: Sequence[float] | np.ndarray,
    t: Sequence[float] | np.ndarray,
    *,
    reference: BoundFlowMap | None = None,
    gamma: float = 0.5,
    cond: Cond = None,
    batch_size: int | None = None,
) -> ResidualGrid:
    """Computes the RMS residuals of a map at every (s, t), at points I_s of the same pairs (x0, x1).

    Args:
      bound: the flow map with its parameters. The residuals compute its jumps as x + (t-s) v, without ``jump_override``.
      interpolant: the path, which gives the points I_s.
      x0: base points, a pytree of arrays ``[N, ...]``.
      x1: data points, shaped like x0.
      s: source times, ``[n_s]``.
      t: target times, ``[n_t]``. Pairs with s > t are used if the domain goes backward.
      reference: the map whose velocity enters the residuals; if None, the map's own diagonal.
      gamma: the position of the middle time of the semigroup residual, u = gamma s + (1 - gamma) t, in [0, 1].
      cond: conditioning, leaves ``[N, ...]``.
      batch_size: the number of samples evaluated at a time; None for all.

    Returns:
      The ResidualGrid. Entries are NaN where the domain does not define a residual.

    Raises:
      ValueError: if x0 and x1 have different shapes, there are no samples, or a time is outside [0, 1].
      TypeError: if x0 or x1 is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, diagnostics, interpolants
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: jnp.ones_like(x)).bind(None)
      >>> x0, x1 = jnp.zeros((2, 1), jnp.float32), jnp.ones((2, 1), jnp.float32)
      >>> grid = diagnostics.residual_grid(bound, interpolants.linear(), x0, x1, [0.0, 0.5], [0.5, 1.0])
      >>> float(grid.semigroup[0, 1])
      0.0
    """
    x0, x1, cond = _check_samples(x0, x1, cond, batch_size)
    gamma = checks.number("gamma", gamma, low=0.0, high=1.0)
    s, t = _check_times("s", s), _check_times("t", t)
    # First each source time on the diagonal, for the tangent residual, then the pairs inside the domain.
    inside = [(i, j) for i in range(s.size) for j in range(t.size) if bound.domain.contains(s[i], t[j])]
    sources = np.concatenate([s, [s[i] for i, _ in inside]])
    targets = np.concatenate([s, [t[j] for _, j in inside]])
    dtype = trees.at_least_float32(x0)
    squares = _squares_at_pairs(
        bound,
        bound if reference is None else reference,
        interpolant,
        jnp.asarray(sources, dtype),
        jnp.asarray(targets, dtype),
        x0,
        x1,
        cond,
        jnp.asarray(gamma, dtype),
        batch_size,
    )
    rms = jax.tree.map(lambda leaf: np.sqrt(np.asarray(leaf, np.float64)), squares)
    grids = {name: np.full((s.size, t.size), np.nan) for name in IDENTITIES[1:]}
    for name, grid in grids.items():
        for (i, j), value in zip(inside, getattr(rms, name)[s.size :], strict=True):
            if defined(bound.domain, name, s[i], t[j], gamma):
                grid[i, j] = value
    tangent = np.full(s.size, np.nan) if reference is None else rms.tangent[: s.size]
    return ResidualGrid(s, t, tangent, **grids)


def _check_times(name: str, given: Sequence[float] | np.ndarray, least: int = 1) -> np.ndarray:
    values = np.asarray(given, np.float64)
    if values.ndim != 1 or values.size < least or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name}: expected {least} or more times in [0, 1], got {values}")
    return values


def _law_of(domain: Domain) -> PairLaw:
    if domain.levels is not None:
        # Draw gaps of at least two cells, so that the midpoints lie on the grid.
        both_ends = times.independent(times.constant(0.0), times.constant(1.0))
        return times.dyadic(domain.levels - 1) if domain.levels > 1 else both_ends
    if domain.target is not None:
        return times.independent(times.uniform(), times.constant(domain.target))
    if domain.source is not None:
        return times.independent(times.constant(domain.source), times.uniform())
    return times.independent(times.uniform(), times.uniform()) if domain.backward else times.triangle()


def consistency_report(
    bound: BoundFlowMap,
    interpolant: Interpolant,
    key: Key,
    x0: Event,
    x1: Event,
    *,
    reference: BoundFlowMap | None = None,
    pairs: PairLaw | None = None,
    gamma: float = 0.5,
    cond: Cond = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Computes RMS residuals over samples, each at its own pair (s, t), as a few numbers to log during training.

    Args:
      bound: as in ``residual_grid``.
      interpolant: as in ``residual_grid``.
      key: a PRNG key for the times.
      x0: base points, ``[N, ...]``.
      x1: data points, shaped like x0.
      reference: as in ``residual_grid``.
      pairs: the law of (s, t), which must stay inside the domain; if None, a law that covers the domain, uniform except on a
        dyadic grid.
      gamma: as in ``residual_grid``; use 1/2 on a dyadic grid.
      cond: conditioning, leaves ``[N, ...]``.
      batch_size: the number of samples evaluated at a time; None for all.

    Returns:
      The RMS of "tangent" (with a reference), "eulerian", "lagrangian" and "semigroup", without the residuals that the
      domain does not define; and of "velocity", the velocity itself, for scale.

    Raises:
      ValueError: as ``residual_grid``, and if the law draws a pair outside the domain.
      TypeError: if x0 or x1 is not floating-point.
    """
    x0, x1, cond = _check_samples(x0, x1, cond, batch_size)
    gamma = checks.number("gamma", gamma, low=0.0, high=1.0)
    dtype = trees.at_least_float32(x0)
    s, t = (time.astype(dtype) for time in (pairs or _law_of(bound.domain))(key, _count(x0)))
    concrete = list(zip(np.asarray(s), np.asarray(t), strict=True))
    for s_, t_ in concrete:
        if not bound.domain.contains(s_, t_):
            raise ValueError(f"pairs: the pair ({s_:g}, {t_:g}) is outside the map's domain, {bound.domain.name}")
    squares = _squares_at_samples(
        bound,
        bound if reference is None else reference,
        interpolant,
        s,
        t,
        x0,
        x1,
        cond,
        jnp.asarray(gamma, dtype),
        batch_size,
    )
    names = [
        name
        for name in IDENTITIES
        if (name != "tangent" or reference is not None)
        and all(defined(bound.domain, name, s_, t_, gamma) for s_, t_ in concrete)
    ]
    return {name: float(getattr(squares, name)) ** 0.5 for name in (*names, "velocity")}


class Comparison(NamedTuple):
    """The errors of several maps on several grids, compared with one jump of a reference; numpy arrays.

    The error of a sample is the root mean square over the entries of the difference at the end of the grid, in units of x.

    Attributes:
      maps: the names of the maps, ``n_m`` of them.
      grids: the names of the grids, ``n_g`` of them.
      jumps: the number of jumps of each grid, ``[n_g]``.
      errors: the errors of the samples, ``[n_m, n_g, N]``; NaN if the grid is outside a map's domain.
      rmse: the root mean square over samples, ``[n_m, n_g]``.
      median: the median over samples, ``[n_m, n_g]``.
    """

    maps: tuple[str, ...]
    grids: tuple[str, ...]
    jumps: np.ndarray
    errors: np.ndarray
    rmse: np.ndarray
    median: np.ndarray

    def rows(self) -> list[dict[str, str | int | float]]:
        """Returns the table as rows (map, grid, jumps, rmse, median), without grids outside the map's domain."""
        return [
            {
                "map": name,
                "grid": grid,
                "jumps": int(self.jumps[j]),
                "rmse": float(self.rmse[i, j]),
                "median": float(self.median[i, j]),
            }
            for i, name in enumerate(self.maps)
            for j, grid in enumerate(self.grids)
            if not np.isnan(self.errors[i, j]).all()
        ]


@functools.partial(jax.jit, static_argnames="batch_size")
def _run_jumps(bound: BoundFlowMap, x0: Event, grid: Array, cond: Cond, batch_size: int | None) -> Event:
    return _each(lambda x, c: samplers.jumps(bound, x, grid, c), (x0, cond), batch_size)


@jax.jit
def _errors(ends: Event, truth: Event) -> Array:
    return jax.vmap(lambda a, b: jnp.sqrt(trees.sq_norm(trees.sub(a, b)) / _entries(a)))(ends, truth)


def compare(
    maps: Mapping[str, BoundFlowMap],
    reference: BoundFlowMap,
    x0: Event,
    grids: Mapping[str, Sequence[float] | np.ndarray] | Sequence[int],
    *,
    cond: Cond = None,
    batch_size: int | None = None,
) -> Comparison:
    """Computes the errors of the jumps of several maps, compared with one jump of a reference from the same x0.

    Args:
      maps: bound flow maps (learned, solved or exact) by name.
      reference: the bound flow map taken as exact: an oracle, or a solve at a fine tolerance.
      x0: the states at the first time of every grid, a pytree of arrays ``[N, ...]``.
      grids: grids of times by name, or numbers of equal jumps from 0 to 1.
      cond: conditioning, leaves ``[N, ...]``.
      batch_size: the number of samples evaluated at a time; None for all.

    Returns:
      The Comparison.

    Raises:
      ValueError: if there are no maps, grids or samples, a grid has fewer than two times or times outside [0, 1], or the
        jump from a grid's first time to its last is outside the reference's domain.
      TypeError: if x0 is not floating-point.
    """
    x0, _, cond = _check_samples(x0, x0, cond, batch_size)
    if not isinstance(grids, Mapping):
        grids = {str(count): samplers.uniform_grid(count) for count in grids}
    if not maps or not grids:
        raise ValueError(f"maps, grids: expected at least one of each, got {len(maps)} and {len(grids)}")
    dtype = trees.at_least_float32(x0)
    truths: dict[tuple[float, float], Event] = {}
    errors = np.full((len(maps), len(grids), _count(x0)), np.nan)
    for j, (name, values) in enumerate(grids.items()):
        values = _check_times(f"grids[{name!r}]", values, least=2)
        ends = values[[0, -1]]
        reference.domain.check_grid(ends)
        if tuple(ends) not in truths:
            truths[tuple(ends)] = _run_jumps(reference, x0, jnp.asarray(ends, dtype), cond, batch_size)
        for i, bound in enumerate(maps.values()):
            if all(bound.domain.contains(a, b) for a, b in itertools.pairwise(values)):
                there = _run_jumps(bound, x0, jnp.asarray(values, dtype), cond, batch_size)
                errors[i, j] = _errors(there, truths[tuple(ends)])
    return Comparison(
        tuple(maps),
        tuple(grids),
        np.array([len(values) - 1 for values in grids.values()]),
        errors,
        np.sqrt(np.mean(errors**2, axis=-1)),
        np.median(errors, axis=-1),
    )
