"""Losses on groups of M samples that share one pair of times (s, t) and one condition.

A group is M consecutive rows of the batch, all on one device. Each row gets the loss of its group, so the mean over the
rows is the mean over the groups, and the objective can be combined with any other (``weighted_sum``). In a conditional
batch, the rows of a group must share one condition; ``datasets.grouped`` makes such batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jflow import bases, checks, couplings, interpolants, law_checks, reports, sharding, trees
from jflow import times as laws
from jflow.interpolants import Interpolant
from jflow.named import described, shown
from jflow.objectives import choices
from jflow.objectives.objective import BINS
from jflow.objectives.row import Leg
from jflow.types import (
    Array,
    Aux,
    BatchLike,
    Cond,
    Context,
    Event,
    FlowMap,
    Key,
    Params,
    PyTree,
    as_batch,
    as_context,
)

# The value of a choice that was not made; ``__post_init__`` replaces it by the default.
_UNSET: Any = None


class Group(NamedTuple):
    """M samples at one pair of times, the input of a group loss.

    Attributes:
      s, t: source and target time, scalars.
      x0, x1: the pairs, ``[M, ...]``.
      x: the points I_s, ``[M, ...]``.
      y: the points I_t of the same pairs, ``[M, ...]``.
      cond: the conditions, ``[M, ...]``, all equal, or None.
      key: a PRNG key for the loss, different for each group.
      step: the number of optimizer steps taken, an int32 scalar.
      own: the map being trained, as a ``Leg`` that holds the conditions and keys of all samples, ``[M, ...]``. ``jumps``
        evaluates it for each sample.
    """

    s: Array
    t: Array
    x0: Event
    x1: Event
    x: Event
    y: Event
    cond: Cond
    key: Key
    step: Array
    own: Leg

    def jumps(self) -> Event:
        """Returns X_{s,t}(I_s) of the map being trained, ``[M, ...]``."""

        def one(x: Event, cond: Cond, key: Key) -> Event:
            return self.own._replace(cond=cond, key=key).jump(self.s, self.t, x)

        return jax.vmap(one)(self.x, self.own.cond, self.own.key)


class Drawn(NamedTuple):
    """The random draws of G groups. s, t and key are ``[G]``, the others ``[G, M, ...]``; see ``Group``."""

    s: Array
    t: Array
    x0: Event
    x1: Event
    cond: Cond
    network_keys: Key
    key: Key


# A function that returns the loss of a group, a scalar.
GroupLoss = Callable[[Group], Array]


class GroupChoices(TypedDict, total=False):
    """The choices of every group loss; ``GroupObjective`` documents them."""

    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw]
    base: bases.Base
    coupling: couplings.Coupling


@dataclasses.dataclass(frozen=True)
class GroupObjective:
    """An objective with a loss on groups of samples; call it as ``objective(params, key, batch, context)``.

    Attributes:
      name: the name of the loss in the metrics.
      flow_map: the map that is trained.
      interpolant: the path.
      loss: ``Group -> loss``, a scalar.
      size: M, the number of samples in a group, at least 2; it must divide the number of rows of every batch.
      pairs: the law of (s, t), drawn once for each group.
      base: the law of x0. The default is the base of ``coupling`` if that is a ``couplings.Independent``, else the standard
        normal.
      coupling: ``(key, x1, cond) -> x0``, used if the batch holds no x0; ``couplings.Independent(base)`` by default.
      filled: the defaults that were filled in for the choices that were not made. ``dataclasses.replace`` copies it, so that
        in ``replace(objective, base=other)`` the filled-in defaults do not count as choices.

    Raises:
      ValueError: if ``size`` is below 2, ``pairs`` draws times outside the map's domain, or ``base`` is not the base of
        the coupling.
      TypeError: if an argument has a wrong type.
    """

    name: str
    flow_map: FlowMap
    interpolant: Interpolant
    loss: GroupLoss
    size: int
    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw] = dataclasses.field(default_factory=laws.triangle)
    base: bases.Base = _UNSET
    coupling: couplings.Coupling = _UNSET
    filled: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.flow_map, FlowMap):
            raise TypeError(f"flow_map: expected a FlowMap, got {described(self.flow_map)}")
        interpolants.check(self.interpolant)
        checks.function("loss", self.loss, "Group -> loss, a scalar")
        checks.integer("size", self.size, low=2)
        if not isinstance(self.pairs, laws.ByStep):
            checks.function("pairs", self.pairs, "(key, n) -> (s, t), a law of pairs of jflow.times")
        law_checks.check_pairs("pairs", laws.at_step(self.pairs, 0), self.flow_map.domain)
        self._choose_base()

    def _choose_base(self) -> None:
        """Fills in base and coupling, each from the other, and raises ValueError if they disagree."""
        base, coupling = (
            None if name in self.filled and getattr(self, name) is self.filled[name] else getattr(self, name)
            for name in ("base", "coupling")
        )
        if base is not None:
            bases.check(base)
        if coupling is not None:
            checks.function("coupling", coupling, "(key, x1, cond) -> x0, such as couplings.independent")
        made = choices.base_and_coupling(base, coupling)
        filled = {
            name: new
            for name, old, new in zip(("base", "coupling"), (base, coupling), made, strict=True)
            if new is not old
        }
        base, coupling = made
        choices.check_same_base(base, coupling)
        for name, value in (("base", base), ("coupling", coupling), ("filled", filled)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        names = ("size", "pairs", "base", "coupling")
        listed = {"path": self.interpolant.name, **{name: getattr(self, name) for name in names}}
        return f"{self.name}({', '.join(f'{name}={shown(value)}' for name, value in listed.items())})"

    def init(self, key: Key, params: Params) -> PyTree:
        """Returns the initial state, ``()``."""
        del key, params
        return ()

    def __call__(self, params: Params, key: Key, batch: BatchLike, context: Context | None = None) -> tuple[Array, Aux]:
        """Computes the loss of each row, and metrics.

        Args:
          params: the map's parameters.
          key: a PRNG key.
          batch: floating-point data, ``[B, ...]``. The rows of a group must have equal conditions.
          context: the step (``Context()`` by default).

        Returns:
          (loss [B], aux). Each row has the loss of its group. The metrics are ``NAME/loss``, its mean; ``NAME/loss_by_t``
          and ``NAME/loss_by_gap``, means over 8 equal bins of t and of abs(t - s); and, for a conditional batch,
          ``NAME/mixed_groups``, the number of groups with more than one condition. Under ``jit`` such a group cannot raise
          an error; its loss is NaN instead, and so is the gradient of the batch.

        Raises:
          ValueError: if the batch has no data, ``size`` does not divide the number of rows, x0 does not match x1, or,
            outside ``jit``, a group has more than one condition.
          TypeError: if the data is not floating-point, or an argument has a wrong type.
        """
        context = as_context(context)
        checks.key("key", key)
        batch = as_batch(batch)
        if batch.x1 is None:
            raise ValueError(f"batch.x1: expected data for {self.name}, got None")
        checks.floating("batch.x1", batch.x1)
        rows = checks.rows("batch", (batch.x1, batch.x0, batch.cond))
        if rows % self.size:
            raise ValueError(f"batch: expected a multiple of size = {self.size} rows, got {rows}")
        groups = rows // self.size
        coupling_key, pair_key, network_key, group_key = jax.random.split(key, 4)
        x0 = self.coupling(coupling_key, batch.x1, batch.cond) if batch.x0 is None else batch.x0
        checks.same_structure("batch.x0", x0, "batch.x1", batch.x1)
        dtype = trees.at_least_float32(batch.x1)
        s, t = (time.astype(dtype) for time in laws.at_step(self.pairs, context.step)(pair_key, groups))
        x0, x1, cond, network_keys = jax.tree.map(
            lambda leaf: leaf.reshape(groups, self.size, *leaf.shape[1:]),
            (x0, batch.x1, batch.cond, jax.random.split(network_key, rows)),
        )
        drawn = Drawn(s, t, x0, x1, cond, network_keys, jax.random.split(group_key, groups))
        (losses,) = sharding.each_device(self._evaluate, (params, context.step), drawn)
        losses, metrics = losses.astype(dtype), {}
        if jax.tree.leaves(cond):
            mixed = _mixed(cond, groups, self.size)
            # Multiply by NaN: with ``where``, this group's gradient would be zero and training would continue unnoticed.
            losses = losses * jnp.where(mixed, jnp.nan, 1.0).astype(dtype)
            metrics[f"{self.name}/mixed_groups"] = reports.Total(jnp.sum(mixed, dtype=jnp.int32))
        said = jax.lax.stop_gradient(losses)
        metrics |= {
            f"{self.name}/loss": reports.mean(said),
            f"{self.name}/loss_by_t": reports.binned(said, t, BINS),
            f"{self.name}/loss_by_gap": reports.binned(said, jnp.abs(t - s), BINS),
        }
        return jnp.repeat(losses, self.size), Aux((), metrics)

    def _evaluate(self, shared: tuple[Params, Array], drawn: Drawn) -> list[Array]:
        """Computes the losses of groups; each device calls it with its own groups."""
        params, step = shared

        def one(drawn: Drawn) -> Array:
            at = jax.vmap(self.interpolant.interpolate, (None, 0, 0))
            group = Group(
                s=drawn.s,
                t=drawn.t,
                x0=drawn.x0,
                x1=drawn.x1,
                x=at(drawn.s, drawn.x0, drawn.x1),
                y=at(drawn.t, drawn.x0, drawn.x1),
                cond=drawn.cond,
                key=drawn.key,
                step=jnp.asarray(step),
                own=Leg(self.flow_map, params, drawn.cond, drawn.network_keys),
            )
            loss = self.loss(group)
            checks.scalar("loss", loss)
            return loss

        return [jax.vmap(one)(drawn)]


def _mixed(cond: Cond, groups: int, size: int) -> Array:
    """Returns a mask of the groups with more than one condition, ``[G]``.

    Raises:
      ValueError: if the conditions are concrete and a group has more than one.
    """
    mixed = jnp.zeros((groups,), bool)
    for leaf in jax.tree.leaves(cond):
        mixed = mixed | jnp.any((leaf != leaf[:, :1]).reshape(groups, -1), axis=1)
    value = checks.concrete(mixed)
    if value is not None and value.any():
        raise ValueError(
            f"batch.cond: groups of {size} samples share one condition; expected one in each group of consecutive rows, "
            f"got several in {np.sum(value)} of {groups} groups (datasets.grouped makes such batches)"
        )
    return mixed
