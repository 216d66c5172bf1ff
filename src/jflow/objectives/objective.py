"""Objective: split a batch, evaluate a residual for each row, reduce it to a loss, report metrics.

An objective is a function ``(params, key, batch, context) -> (loss [B], aux)``; the caller averages the loss. A batch is
split into fixed numbers of diagonal rows (s = t), which cost one pass and no derivative, and off-diagonal rows, which have
the method's residual. The rows are chosen at random within equal blocks of the batch, so that a batch sharded over devices
is split evenly on each device.

An objective with state (a discriminator with its optimizer, a running scale, a queue) is any object with::

    init(key, params) -> state
    __call__(params, key, batch, context) -> (loss [B], Aux(next state, metrics))

The state is passed in ``context.state``, and the next state is returned in the Aux, with the same structure, shapes and
dtypes. The training state stores it. In a direct call, pass ``Context(state=objectives.init(objective, key, params))``. An
objective without state needs no context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import bases, checks, conditions, couplings, reductions, reports, sharding, trees
from jflow import times as laws
from jflow.identities import Residual, tangent
from jflow.interpolants import Interpolant
from jflow.named import shown
from jflow.objectives import choices, velocity_estimates
from jflow.objectives.batch_split import BatchSplit, split_batch
from jflow.objectives.guided import Guidance
from jflow.objectives.row import Estimate, Leg, Row, Term
from jflow.types import (
    Array,
    Aux,
    Batch,
    BatchLike,
    Cond,
    Context,
    Domain,
    Event,
    FlowMap,
    Key,
    Params,
    PyTree,
    Velocity,
    as_batch,
    as_context,
)

# The number of equal bins of t, and of abs(t - s), in which means are reported.
BINS = 8


class Sample(NamedTuple):
    """The random draws for the rows of one kind, ``[n, ...]`` each: times, pairs, conditions and keys."""

    s: Array
    t: Array
    gamma: Array | None
    x0: Event
    x1: Event
    cond: Cond
    network_key: Key
    row_key: Key


class Found(NamedTuple):
    """The results for the rows of one kind, ``[n]`` each.

    Attributes:
      loss: the reduced loss.
      square: the squared norm of the residual.
      tangent: the squared norm of its derivative term, or None if there is none, as on the diagonal.
    """

    loss: Array
    square: Array
    tangent: Array | None


class Shared(NamedTuple):
    """The inputs shared by all rows: parameters, averaged and teacher parameters, and the data of the batch."""

    params: Params
    context: Context
    data: Event


@dataclasses.dataclass(frozen=True, repr=False)
class Objective:
    """The objective of a method: a term and its choices. Call it as ``objective(params, key, batch, context)``.

    Attributes:
      name: the method's name in ``METHODS``.
      flow_map: the map that is trained.
      interpolant: the path.
      term: the residual of a row with s < t, or None for flow matching alone.
      diagonal: the share of the batch with s = t, which trains the velocity; 0.75 by default.
      times: the law of t on the diagonal; uniform by default.
      pairs: the law of (s, t) off the diagonal; uniform on the triangle by default.
      gammas: the law of gamma, for semigroup residuals; 1/2 by default.
      reduction: the function from residual to loss off the diagonal; squared by default.
      diagonal_reduction: the function from residual to loss on the diagonal; squared by default.
      velocity: the estimate of b at the sampled points, in the tangent term and wherever the method has a conditional
        velocity. It is ``velocity_estimates.pair`` (the default); ``velocity_estimates.batch``, which needs independent pairs
        without conditioning; ``velocity_estimates.teacher`` (the default if ``teacher`` is given); or a function of the row.
      teacher: a Velocity or a FlowMap, evaluated at the parameters ``context.teacher``; by default ``flow_map``, if
        the context has such parameters.
      base: the law of x0. The default is the base of ``coupling`` if that is a ``couplings.Independent``, else the standard
        normal.
      coupling: ``(key, x1, cond) -> x0``, used if the batch holds no x0; ``couplings.Independent(base)`` by default.
      blocks: the number of equal blocks, in batch order, each of which is split into diagonal and off-diagonal rows. It
        should be a multiple of the number of devices over which a batch is sharded.
      label_dropout: the probability that a row's condition is replaced by the map's null condition (``FlowMap.null``). The
        coupling sees the condition itself, and the rows are independent of the split of the batch. 0 by default, 0.1 with
        ``guidance``.
      guidance: a ``Guidance``, if the map is to learn the guided velocity; None by default.
      domain: the domain on which the map is trained, if smaller than the map's own; ``pairs`` must draw from both.
      needs: further requirements of the method: "x0", the batch must hold pairs; "no data", x1 may be None.
      defaults: the method's defaults, where they differ from those above. The default of ``domain`` holds only together
        with the default of ``pairs``.
      filled: the defaults that were filled in for the choices that were not made. ``dataclasses.replace`` copies it, so that
        in ``replace(objective, diagonal=0.0)`` the filled-in defaults do not count as choices.

    Raises:
      ValueError: if a number is out of range, a law draws times outside [0, 1] or the domain or returns a wrong shape, the
        method evaluates times outside the map's domain, or a choice is not read by the objective.
      TypeError: if an argument has a wrong type.
    """

    name: str
    flow_map: FlowMap
    interpolant: Interpolant
    term: Term | None = None
    diagonal: float = choices.UNSET
    times: laws.Law | laws.ByStep[laws.Law] = choices.UNSET
    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw] = choices.UNSET
    gammas: laws.Law | laws.ByStep[laws.Law] = choices.UNSET
    reduction: reductions.Reduction = choices.UNSET
    diagonal_reduction: reductions.Reduction = choices.UNSET
    velocity: Estimate = choices.UNSET
    teacher: FlowMap | Velocity | None = None
    base: bases.Base = choices.UNSET
    coupling: couplings.Coupling = choices.UNSET
    blocks: int = 1
    label_dropout: float = choices.UNSET
    guidance: Guidance | None = None
    domain: Domain = choices.UNSET
    needs: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    filled: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, value in self.filled.items():
            if getattr(self, name) is value:
                self._set(name, None)
        choices.check(self)
        filled, unread = {}, choices.unread(self).keys() - {"domain"}
        for name, value in choices.defaults(self).items():
            if getattr(self, name) is None and name not in unread:
                filled[name] = value
                self._set(name, value)
        self._set("filled", filled)
        if self.coupling is couplings.independent and self.base is not bases.STANDARD_NORMAL:
            # ``couplings.independent`` stands for an independent coupling with the chosen base.
            filled["coupling"] = couplings.Independent(self.base)
            self._set("coupling", filled["coupling"])
        choices.check_base(self)
        choices.check_times(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the choices that the objective reads. Any other choice raises an error."""
        return tuple(name for name in choices.Choices.__annotations__ if name not in choices.unread(self))

    def __repr__(self) -> str:
        made = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("name", "flow_map", "interpolant", "term", "needs", "defaults", "filled")
        }
        parts = [f"{name}={shown(value)}" for name, value in made.items() if value is not None]
        return f"{self.name}({', '.join((f'path={self.interpolant.name!r}', *parts))})"

    def init(self, key: Key, params: Params) -> PyTree:
        """Returns the initial state, ``()``."""
        del key, params
        return ()

    def __call__(self, params: Params, key: Key, batch: BatchLike, context: Context | None = None) -> tuple[Array, Aux]:
        """Computes the loss of each row, in batch order, and metrics.

        Args:
          params: the map's parameters.
          key: a PRNG key.
          batch: floating-point data, ``[B, ...]``. If the method needs no data, x1 may be None and x0 must be given.
          context: step, averaged and teacher parameters (``Context()`` by default).

        Returns:
          (loss [B], aux). ``aux.metrics["diagonal_rows"]`` is the mask of the rows with s = t and, with ``label_dropout``,
          ``aux.metrics["null_rows"]`` that of the rows with the null condition. The other metrics are reported
          for each term, "tangent" on the diagonal and the method's term off it: ``TERM/raw``, the mean squared norm of the
          residual; ``TERM/loss``, the mean reduced loss; and, if the residual has a derivative term, ``TERM/tangent_norm``,
          its root mean square. ``raw`` and ``tangent_norm`` also have means over 8 equal bins of t, and, if there is a
          derivative term, of abs(t - s).

        Raises:
          ValueError: if the leaves have different lengths, the batch is too small to be split or its size is not divisible
            by ``blocks``, x0 does not match x1, or required data is missing.
          TypeError: if the data is not floating-point, the term does not return an ``identities.Residual``, or an
            argument has a wrong type.
        """
        context = as_context(context)
        checks.key("key", key)
        batch = self._complete(as_batch(batch))
        split, on, off = self._draw(key, batch, context)
        shared = Shared(params, context._replace(state=()), batch.x1)
        found = sharding.each_device(self._evaluate, shared, on, off)
        loss, aux = self._gather(split, (on, off), found)
        if self.label_dropout:
            null = jax.vmap(lambda cond: conditions.is_null(cond, self.flow_map.null))
            rows = [None if sample is None else null(sample.cond) for sample in (on, off)]
            aux.metrics["null_rows"] = reports.PerRow(split.put(*rows))
        return loss, aux

    def _complete(self, batch: Batch) -> Batch:
        """Checks the batch, and fills in x1 if the method needs no data."""
        if "x0" in self.needs and batch.x0 is None:
            raise ValueError(f"batch.x0: expected pairs for {self.name} (couplings.reflow makes them), got None")
        if batch.x1 is None:
            if "no data" not in self.needs or self.diagonal > 0:
                raise ValueError(f"batch.x1: expected data for {self.name}, got None")
            # The constructor has checked that the path starts at the base, so I_0 = x0 for any x1.
            batch = batch._replace(x1=batch.x0)
        checks.floating("batch.x1", batch.x1)
        if self.velocity is velocity_estimates.batch and (batch.x0 is not None or batch.cond is not None):
            raise ValueError(
                "batch: expected neither x0 nor cond with the batch's velocity, which assumes independence"
            )
        return batch

    def _draw(self, key: Key, batch: Batch, context: Context) -> tuple[BatchSplit, Sample | None, Sample | None]:
        """Splits the batch, and makes the random draws for the diagonal and the off-diagonal rows."""
        size = checks.rows("batch", (batch.x1, batch.x0, batch.cond))
        names = jax.random.split(key, 8)
        coupling_key, split_key, time_key, pair_key, gamma_key, network_key, row_key, condition_key = names
        x0 = self.coupling(coupling_key, batch.x1, batch.cond) if batch.x0 is None else batch.x0
        checks.same_structure("batch.x0", x0, "batch.x1", batch.x1)
        split = split_batch(split_key, size, self.diagonal, self.blocks)
        keys = jax.random.split(network_key, size), jax.random.split(row_key, size)
        dtype = trees.at_least_float32(batch.x1)
        cond = self._conditions(condition_key, batch.cond, size, dtype)
        first, second = split.take((x0, batch.x1, cond, *keys))

        def drawn(law: Any, law_key: Key, rows: int) -> Any:
            return jax.tree.map(lambda t: t.astype(dtype), laws.at_step(law, context.step)(law_key, rows))

        on = off = None
        diagonal, off_diagonal = split.counts
        if diagonal:
            t = drawn(self.times, time_key, diagonal)
            on = Sample(t, t, None, *first)
        if off_diagonal:
            gamma = None if self.gammas is None else drawn(self.gammas, gamma_key, off_diagonal)
            s, t = drawn(self.pairs, pair_key, off_diagonal)
            off = Sample(s, t, gamma, *second)
        return split, on, off

    def _conditions(self, key: Key, cond: Cond, rows: int, dtype: Any) -> Cond:
        """Drops a share of the conditions, and adds the guidance scale if the networks receive it."""
        if not self.label_dropout and self.guidance is None:
            return cond
        if cond is None:
            name = "guidance" if self.guidance is not None else "label_dropout"
            raise ValueError(f"batch.cond: expected conditions with {name}, got None")
        drop_key, guidance_key = jax.random.split(key)
        if self.label_dropout:
            cond = conditions.drop(drop_key, cond, self.flow_map.null, self.label_dropout)
        return cond if self.guidance is None else self.guidance.feed(guidance_key, cond, rows, dtype)

    def _evaluate(self, shared: Shared, on: Sample | None, off: Sample | None) -> list[Found | None]:
        """Computes losses and residuals of both kinds of rows; each device calls it with its own rows."""
        found = []
        for sample, one in ((on, self._on), (off, self._off)):
            each = jax.vmap(lambda drawn, one=one: one(shared.params, self._row(shared, drawn)))
            found.append(None if sample is None else each(sample))
        return found

    def _row(self, shared: Shared, drawn: Sample) -> Row:
        params, context, data = shared
        cond, key = drawn.cond, drawn.network_key
        teacher = None
        if self.teacher is not None or context.teacher is not None:
            model = self.flow_map if self.teacher is None else self.teacher
            teacher = Leg(model, context.teacher, cond, key)
        return Row(
            s=drawn.s,
            t=drawn.t,
            x0=drawn.x0,
            x1=drawn.x1,
            x=self.interpolant.interpolate(drawn.s, drawn.x0, drawn.x1),
            cond=cond,
            key=drawn.row_key,
            gamma=drawn.gamma,
            step=jnp.asarray(context.step),
            own=Leg(self.flow_map, params, cond, key),
            frozen=Leg(self.flow_map, jax.lax.stop_gradient(params), cond, key),
            ema=None if context.ema is None else Leg(self.flow_map, context.ema, cond, key),
            teacher=teacher,
            data=data,
            interpolant=self.interpolant,
            base=self.base,
            estimate=self.velocity,
            null=self.flow_map.null,
            guidance=None if self.velocity is velocity_estimates.teacher else self.guidance,
        )

    def _on(self, params: Params, row: Row) -> Found:
        """Computes and reduces the tangent residual of a diagonal row."""
        value = row.own.velocity(row.t, row.x)
        row = row._replace(here=jax.lax.stop_gradient(value))
        residual = tangent(lambda *_: value, row.t, row.x, row.conditional)
        difference = residual.difference
        loss = self.diagonal_reduction(params, row.t, row.t, difference)
        checks.shape("what diagonal_reduction returns", loss, ())
        return Found(loss, trees.sq_norm(difference), None)

    def _off(self, params: Params, row: Row) -> Found:
        """Computes and reduces the method's residual of an off-diagonal row."""
        assert self.term is not None
        residual = self.term.residual(row)
        if not isinstance(residual, Residual):
            raise TypeError(
                f"term.residual: expected it to return an identities.Residual(prediction, target, tangent), got "
                f"{type(residual).__name__}"
            )
        difference = residual.difference
        loss = self.reduction(params, row.s, row.t, difference)
        checks.shape("what reduction returns", loss, ())
        if not isinstance(residual.weight, float) or residual.weight != 1.0:
            loss = loss * jax.lax.stop_gradient(jnp.asarray(residual.weight).astype(loss.dtype))
        size = None if residual.tangent is None else trees.sq_norm(residual.tangent)
        return Found(loss, trees.sq_norm(difference), size)

    def _gather(
        self, split: BatchSplit, samples: tuple[Sample | None, Sample | None], found: list[Found | None]
    ) -> tuple[Array, Aux]:
        """Merges the losses into batch order, and collects the metrics of each term."""
        names = ("tangent", "" if self.term is None else self.term.name)
        metrics: dict[str, reports.Report] = {"diagonal_rows": reports.PerRow(split.mask)}
        for name, sample, part in zip(names, samples, found, strict=True):
            if sample is not None and part is not None:
                metrics |= _reported(name, sample, jax.lax.stop_gradient(part))
        dtype = trees.at_least_float32([s.x1 for s in samples if s is not None])
        losses = [None if part is None else part.loss.astype(dtype) for part in found]
        return split.put(*losses), Aux((), metrics)


def _reported(term: str, sample: Sample, found: Found) -> dict[str, reports.Report]:
    by = {"t": sample.t}
    if found.tangent is not None:
        by["gap"] = jnp.abs(sample.t - sample.s)

    def binned(values: Array) -> tuple[reports.Mean, dict[str, reports.Mean]]:
        return reports.mean(values), {key: reports.binned(values, place, BINS) for key, place in by.items()}

    metrics: dict[str, reports.Report] = {
        f"{term}/raw": reports.Residual(*binned(found.square)),
        f"{term}/loss": reports.mean(found.loss),
    }
    if found.tangent is not None:
        metrics[f"{term}/tangent_norm"] = reports.Tangent(*binned(found.tangent))
    return metrics
