"""Terms on groups: a loss that sees M samples at a time, all at one pair of times (s, t) and under one condition.

The rows of a batch are cut, in their order, into groups of M consecutive rows, which lie on one device. The loss of a group is
given to each of its rows, so that the mean over the rows is the mean over the groups, and the objective combines with any
other (``weighted_sum``). ``datasets.grouped`` draws batches whose groups share a class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, couplings, reports, sharding, trees
from jflow import times as laws
from jflow.interpolants import Interpolant
from jflow.named import described, shown
from jflow.objectives.objective import BINS
from jflow.objectives.row import Leg
from jflow.types import Array, Aux, BatchLike, Cond, Context, Event, FlowMap, Key, Params, PyTree, as_batch


class Group(NamedTuple):
    """M samples at one pair of times, and everything that their loss may be made of.

    Attributes:
      s, t: source and target time, scalars.
      x0, x1: the pairs, ``[M, ...]``.
      x: the points I_s, ``[M, ...]``.
      y: the points I_t of the same pairs, ``[M, ...]``.
      cond: the conditions, ``[M, ...]``, all equal, or None.
      key: for random numbers of the group's own.
      step: the optimizer's step, an int32 scalar.
      own: the map being trained, a leg whose cond and key are those of all samples, ``[M, ...]``; see ``jumps``.
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
        """X_{s,t}(I_s) of the map being trained, ``[M, ...]``."""

        def one(x: Event, cond: Cond, key: Key) -> Event:
            return self.own._replace(cond=cond, key=key).jump(self.s, self.t, x)

        return jax.vmap(one)(self.x, self.own.cond, self.own.key)


class Drawn(NamedTuple):
    """What is drawn for groups, ``[G, ...]`` or ``[G, M, ...]`` each; see ``Group``."""

    s: Array
    t: Array
    x0: Event
    x1: Event
    cond: Cond
    network_keys: Key
    key: Key


# The loss of a group, a scalar.
GroupLoss = Callable[[Group], Array]


class GroupChoices(TypedDict, total=False):
    """The choices of every loss on groups; see ``GroupObjective`` for what they are."""

    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw]
    coupling: couplings.Coupling


@dataclasses.dataclass(frozen=True)
class GroupObjective:
    """A loss on groups and the choices around it, called as every objective.

    Attributes:
      name: the label of its metrics.
      flow_map: the map that is trained.
      interpolant: the path.
      loss: of one group.
      size: M, the samples of a group; a batch holds a multiple of it, and so does each device's share.
      pairs: the law of (s, t), drawn once for a group.
      coupling: ``(key, x1, cond) -> x0`` where the batch holds no x0.

    Raises:
      ValueError: for a size below 2, or a law that draws times outside the map's domain; TypeError for other types.
    """

    name: str
    flow_map: FlowMap
    interpolant: Interpolant
    loss: GroupLoss
    size: int
    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw] = dataclasses.field(default_factory=laws.triangle)
    coupling: couplings.Coupling = couplings.independent

    def __post_init__(self) -> None:
        if not isinstance(self.flow_map, FlowMap):
            raise TypeError(f"flow_map: expected a FlowMap, got {described(self.flow_map)}")
        if not isinstance(self.interpolant, Interpolant):
            raise TypeError(f"interpolant: expected an Interpolant, got {described(self.interpolant)}")
        for name in ("loss", "coupling"):
            checks.function(name, getattr(self, name), "as GroupObjective documents it")
        checks.integer("size", self.size, low=2)
        laws.check_pairs("pairs", laws.at_step(self.pairs, 0), self.flow_map.domain)

    def __repr__(self) -> str:
        choices = {"path": self.interpolant.name, "size": self.size, "pairs": self.pairs, "coupling": self.coupling}
        return f"{self.name}({', '.join(f'{name}={shown(value)}' for name, value in choices.items())})"

    def init(self, key: Key, params: Params) -> PyTree:
        """The state before the first step: ``()``."""
        del key, params
        return ()

    def __call__(self, params: Params, key: Key, batch: BatchLike, context: Context | None = None) -> tuple[Array, Aux]:
        """The loss of each row, which is that of its group, and the metrics NAME/loss, NAME/loss_by_t, NAME/loss_by_gap.

        Args:
          params: the map's parameters.
          key: a PRNG key; split once, every use named.
          batch: data, ``[B, ...]``; floating point.
          context: the step (``Context()`` by default).

        Raises:
          ValueError: for a batch without data, or one that the group's size does not divide, or a group whose conditions
            differ. Traced conditions cannot be looked at: the loss of such a group is then NaN.
          TypeError: for data that is not floating point.
        """
        context = Context() if context is None else context
        batch = as_batch(batch)
        if batch.x1 is None:
            raise ValueError(f"batch.x1: expected data for {self.name}, got None")
        checks.floating("batch.x1", batch.x1)
        rows = checks.rows("batch", (batch.x1, batch.x0, batch.cond))
        if rows % self.size:
            raise ValueError(f"batch: expected a multiple of the group's {self.size} rows, got {rows}")
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
        losses = jnp.where(_agree(drawn.cond, groups), losses.astype(dtype), jnp.nan)
        said = jax.lax.stop_gradient(losses)
        metrics = {
            f"{self.name}/loss": reports.mean(said),
            f"{self.name}/loss_by_t": reports.binned(said, t, BINS),
            f"{self.name}/loss_by_gap": reports.binned(said, jnp.abs(t - s), BINS),
        }
        return jnp.repeat(losses, self.size), Aux((), metrics)

    def _evaluate(self, shared: tuple[Params, Array], drawn: Drawn) -> list[Array]:
        """Losses of the groups; each device calls it with its own."""
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


def _agree(cond: Cond, groups: int) -> Array:
    """Whether the conditions of each group are equal, ``[G]``; concrete ones that are not are refused."""
    agree = jnp.ones((groups,), bool)
    for leaf in jax.tree.leaves(cond):
        same = (leaf == leaf[:, :1]).reshape(groups, -1)
        agree = agree & jnp.all(same, axis=1)
    value = checks.concrete(agree)
    if value is not None and not value.all():
        raise ValueError(
            f"batch.cond: expected one condition in each group of consecutive rows, got several in {np.sum(~value)} of "
            f"{groups} groups (datasets.grouped draws such batches)"
        )
    return agree
