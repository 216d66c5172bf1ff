"""Objective: split a batch, evaluate a residual for each row, reduce it to a loss, report metrics.

An objective is ``(params, key, batch, context) -> (loss [B], aux)``; the caller averages. A batch is split, statically, into
a fixed number of diagonal rows (s = t), which cost one pass and no derivative, and off-diagonal rows, which carry the
method's own residual. The rows are chosen at random, within equal blocks of the batch, so that a batch that is sharded over
devices is split evenly on each.

An objective with a state of its own (a discriminator with its optimizer, a running scale, a queue) is any object with

    init(key, params) -> state
    __call__(params, key, batch, context) -> (loss [B], Aux(next state, metrics))

The state comes in ``context.state``, and the next one goes out in the Aux, of the same structure, shapes and dtypes. The
training state keeps it. At a direct call, pass ``Context(state=objectives.init(objective, key, params))``; an objective
without a state needs no context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jflow import bases, checks, couplings, reductions, reports, sharding, trees
from jflow import times as laws
from jflow.identities import Derivative, Residual, tangent
from jflow.interpolants import Interpolant
from jflow.named import described, shown
from jflow.objectives import velocity_estimates
from jflow.objectives.batch_split import BatchSplit, split_batch
from jflow.objectives.curriculum import Schedule
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

# Means by t and by t - s are taken over this many equal bins.
BINS = 8
# A choice that was not made: the default takes its place where the method reads it.
_UNSET: Any = None


# The choices of an objective that has not made others; a method may have defaults of its own.
DEFAULTS: dict[str, Any] = {
    "diagonal": 0.75,
    "times": laws.uniform(),
    "pairs": laws.triangle(),
    "gammas": laws.constant(0.5),
    "reduction": reductions.squared,
    "diagonal_reduction": reductions.squared,
}


# What the choices that are functions take and return, for messages.
_SIGNATURES = {
    "times": "(key, n) -> times, a law of jflow.times",
    "pairs": "(key, n) -> (s, t), a law of pairs of jflow.times",
    "gammas": "(key, n) -> times, a law of jflow.times",
    "reduction": "(params, s, t, difference) -> loss, such as reductions.squared",
    "diagonal_reduction": "(params, s, t, difference) -> loss, such as reductions.squared",
    "velocity": "row -> velocity, such as velocity_estimates.pair",
    "coupling": "(key, x1, cond) -> x0, such as couplings.independent",
    "teacher": "(params, t, x, cond=None, *, key=None) -> b_t(x), or a FlowMap",
}


class RowChoices(TypedDict, total=False):
    """How rows are drawn and reduced: the choices of every objective; see ``Objective`` for what they are."""

    diagonal: float
    times: laws.Law | laws.ByStep[laws.Law]
    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw]
    gammas: laws.Law | laws.ByStep[laws.Law]
    reduction: reductions.Reduction
    diagonal_reduction: reductions.Reduction
    base: bases.Base
    coupling: couplings.Coupling
    blocks: int
    domain: Domain


class Choices(RowChoices, total=False):
    """The choices of every method of the catalogue, which say whose velocity is learned as well."""

    velocity: Estimate
    teacher: FlowMap | Velocity | None


class DerivativeChoices(Choices, total=False):
    """The choices of a method with a derivative in its residual."""

    warmup: Schedule | None
    derivative: Derivative


class Sample(NamedTuple):
    """What is drawn for rows of one kind, ``[n, ...]`` each: times, pairs, conditions and keys."""

    s: Array
    t: Array
    gamma: Array | None
    x0: Event
    x1: Event
    cond: Cond
    network_key: Key
    row_key: Key


class Found(NamedTuple):
    """What is found for rows of one kind, ``[n]`` each.

    Attributes:
      loss: the reduced loss.
      square: |D|^2 of the raw residual.
      tangent: |.|^2 of its derivative term; None on the diagonal.
    """

    loss: Array
    square: Array
    tangent: Array | None


class Shared(NamedTuple):
    """What all rows see: parameters, averaged and teacher parameters, and the data of the batch."""

    params: Params
    context: Context
    data: Event


@dataclasses.dataclass(frozen=True, repr=False)
class Objective:
    """A term and the choices around it; call it as ``objective(params, key, batch, context) -> (loss [B], aux)``.

    Attributes:
      name: as in ``METHODS``.
      flow_map: the map that is trained.
      interpolant: the path.
      term: the residual of a row with s < t, or None for flow matching alone.
      diagonal: the share of the batch with s = t, which learns the velocity of its pair; 0.75 by default.
      times: the law of t on the diagonal; uniform by default.
      pairs: the law of (s, t) off it; uniform on the triangle by default.
      gammas: the law of gamma, for semigroup residuals; 1/2 by default.
      reduction: residual to loss, off the diagonal; squared by default.
      diagonal_reduction: the same on the diagonal.
      velocity: the estimate of b at the sampled points, in the tangent term and wherever the method has a conditional
        velocity: ``velocity_estimates.pair``; ``velocity_estimates.batch``, which needs independent pairs without
        conditioning; ``velocity_estimates.teacher``, the default where ``teacher`` is given; or a function of the row.
      teacher: any Velocity, or a FlowMap, at the parameters ``context.teacher``; by default ``flow_map``, at these
        parameters, where there are any.
      base: the law of x0; that of the coupling if it is ``couplings.Independent``, else the standard normal by default.
      coupling: ``(key, x1, cond) -> x0`` where the batch holds no x0; ``couplings.Independent(base)`` by default.
      blocks: the number of equal blocks, in batch order, that are each split alike: a multiple of the number of
        devices that a batch is spread over.
      domain: where the map is trained, if it is less than the map's own domain; ``pairs`` must draw from both.
      needs: what else the method needs: "x0", pairs made beforehand; "no data", whose x1 may be None.
      defaults: the method's own defaults of these choices, where they are not those above. That of ``domain`` goes with
        that of ``pairs``: it holds unless other pairs are chosen.
      filled: the choices that were not made, and the defaults that took their places. ``dataclasses.replace`` carries it
        over, so that ``replace(objective, diagonal=0.0)`` does not take a default for a choice.

    Raises:
      ValueError: for numbers out of range, a law that draws times outside [0, 1] or the domain or that returns another
        shape than asked for, a map whose domain does not hold the times that the method asks, or a choice that nothing
        reads.
      TypeError: for arguments of another type.
    """

    name: str
    flow_map: FlowMap
    interpolant: Interpolant
    term: Term | None = None
    diagonal: float = _UNSET
    times: laws.Law | laws.ByStep[laws.Law] = _UNSET
    pairs: laws.PairLaw | laws.ByStep[laws.PairLaw] = _UNSET
    gammas: laws.Law | laws.ByStep[laws.Law] = _UNSET
    reduction: reductions.Reduction = _UNSET
    diagonal_reduction: reductions.Reduction = _UNSET
    velocity: Estimate = _UNSET
    teacher: FlowMap | Velocity | None = None
    base: bases.Base = _UNSET
    coupling: couplings.Coupling = _UNSET
    blocks: int = 1
    domain: Domain = _UNSET
    needs: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    filled: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, value in self.filled.items():
            if getattr(self, name) is value:
                self._set(name, None)
        self._check()
        filled, unread = {}, self._unread().keys() - {"domain"}
        for name, value in self._defaults().items():
            if getattr(self, name) is None and name not in unread:
                filled[name] = value
                self._set(name, value)
        self._set("filled", filled)
        self._check_base()
        self._check_times()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _defaults(self) -> dict[str, Any]:
        """What takes the place of the choices that are None."""
        own = {name: value for name, value in self.defaults.items() if name != "domain" or self.pairs is None}
        found = {**DEFAULTS, "domain": self.flow_map.domain, **own}
        found["velocity"] = velocity_estimates.pair if self.teacher is None else velocity_estimates.teacher
        if isinstance(self.coupling, couplings.Independent) and self.coupling is not couplings.independent:
            found["base"] = self.coupling.base
        else:
            found["base"] = bases.STANDARD_NORMAL
        found["coupling"] = couplings.independent if self.base is None else couplings.Independent(self.base)
        return found

    def _check(self) -> None:
        if not isinstance(self.flow_map, FlowMap):
            raise TypeError(
                "flow_map: expected a FlowMap (jflow.flow_map(network, form) makes one of a network), got "
                f"{described(self.flow_map)}"
            )
        if not isinstance(self.interpolant, Interpolant):
            raise TypeError(
                f"interpolant: expected an Interpolant, such as interpolants.linear(), got {described(self.interpolant)}"
            )
        if self.term is not None and not isinstance(self.term, Term):
            raise TypeError(f"term: expected an objectives.Term(name, residual), got {described(self.term)}")
        if self.domain is not None and not isinstance(self.domain, Domain):
            raise TypeError(f"domain: expected a Domain, such as types.FORWARD, got {described(self.domain)}")
        if self.diagonal is not None:
            checks.number("diagonal", self.diagonal, low=0.0, high=1.0)
        checks.integer("blocks", self.blocks, low=1)
        if self.base is not None:
            bases.check(self.base)
        if self.term is None and self.diagonal not in (None, 1.0):
            raise ValueError(f"diagonal: expected 1 for a method without off-diagonal rows, got {self.diagonal}")
        for name, signature in _SIGNATURES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, (FlowMap, laws.ByStep)):
                checks.function(name, value, signature)
        for name, why in self._unread().items():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected no choice of it for {self.name}, {why}; got {shown(getattr(self, name))}"
                )

    def _check_base(self) -> None:
        """Refuses a base that is not that of the coupling, and the batch's velocity where it does not hold."""
        if self.coupling is couplings.independent and self.base is not bases.STANDARD_NORMAL:
            # The independent coupling by name, of the base that was chosen.
            self._set("coupling", couplings.Independent(self.base))
        independent = isinstance(self.coupling, couplings.Independent)
        if independent and self.coupling.base != self.base:
            raise ValueError(f"base: expected that of the coupling, {self.coupling.base!r}, got {self.base!r}")
        if self.velocity is velocity_estimates.batch:
            bases.gaussian(self.base, "velocity_estimates.batch")
            if not independent:
                raise ValueError(
                    "velocity: expected an independent coupling with the batch's velocity, which assumes it"
                )

    def _check_times(self) -> None:
        """Draws from the laws, and refuses times that are outside [0, 1] or the domain, or at which the map has none."""
        drawn = {}
        for name in ("times", "gammas"):
            if getattr(self, name) is not None:
                drawn[name] = laws.check_law(name, laws.at_step(getattr(self, name), 0))
        if self.pairs is None:
            return
        law = laws.at_step(self.pairs, 0)
        pair = laws.check_pairs("pairs", law, self.domain)
        if self.domain != self.flow_map.domain:
            laws.check_pairs("pairs", law, self.flow_map.domain)
        if self.term is None or self.term.asks is None or pair is None:
            return
        gamma = drawn.get("gammas")
        for s, t in self.term.asks(*pair, np.full_like(pair[0], 0.5) if gamma is None else gamma):
            for domain in (self.flow_map.domain, self.domain):
                outside = np.flatnonzero(~domain.contains_all(s, t))
                if outside.size:
                    raise ValueError(
                        f"domain: {self.name} asks the map at (s, t) = ({s[outside[0]]:g}, {t[outside[0]]:g}), too, for "
                        f"these pairs and gammas; expected a domain that holds them, got {domain.name}"
                    )

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the choices that the method reads; any other is refused."""
        return tuple(name for name in Choices.__annotations__ if name not in self._unread())

    def _unread(self) -> dict[str, str]:
        """The choices that nothing reads, and why."""
        diagonal = self.defaults.get("diagonal", DEFAULTS["diagonal"]) if self.diagonal is None else self.diagonal
        off = self.term is not None and diagonal < 1.0
        reads = self.term.reads if self.term is not None and off else ()
        unread = {}
        if "gamma" not in reads:
            unread["gammas"] = "which has no middle time"
        if not off:
            where = "" if self.term is None else " with diagonal=1"
            unread |= dict.fromkeys(
                ("pairs", "reduction", "gammas", "domain"), f"which has no off-diagonal rows{where}"
            )
        if diagonal == 0.0:
            unread |= dict.fromkeys(("times", "diagonal_reduction"), "which has no diagonal rows")
        if diagonal == 0.0 and "velocity" not in reads:
            unread["velocity"] = "which reads no conditional velocity"
        estimates = (velocity_estimates.pair, velocity_estimates.batch)
        if "teacher" not in reads and ("velocity" in unread or self.velocity in estimates):
            unread["teacher"] = "which reads no teacher" + ("" if "velocity" in unread else " with that velocity")
        return unread

    def __repr__(self) -> str:
        choices = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("name", "flow_map", "interpolant", "term", "needs", "defaults", "filled")
        }
        made = (f"{name}={shown(value)}" for name, value in choices.items() if value is not None)
        return f"{self.name}({', '.join((f'path={self.interpolant.name!r}', *made))})"

    def init(self, key: Key, params: Params) -> PyTree:
        """The state before the first step: ``()``, for a term has none."""
        del key, params
        return ()

    def __call__(self, params: Params, key: Key, batch: BatchLike, context: Context | None = None) -> tuple[Array, Aux]:
        """The loss of each sample, in batch order, and what a person wants to look at.

        Args:
          params: the map's parameters.
          key: a PRNG key; split once, every use named.
          batch: data, ``[B, ...]``; floating point. x1 may be None beside an x0 where the method needs no data.
          context: step, averaged and teacher parameters (``Context()`` by default).

        Returns:
          (loss [B], aux). ``aux.metrics["diagonal_rows"]`` says which rows have s = t. For each term, "tangent" on the
          diagonal and the method's own off it: ``TERM/raw``, the mean of |D|^2, with means by 8 equal bins of t, and off
          the diagonal of t - s; ``TERM/loss``, the mean reduced loss; off the diagonal also ``TERM/tangent_norm``, the root
          mean square of the derivative term, with the same bins.

        Raises:
          ValueError, TypeError: while tracing, for leaves of different lengths, a size that cannot be split, an x0
            that does not match x1, data that is not floating point, a residual that is not an ``identities.Residual``, or
            an argument of another type.
        """
        context = as_context(context)
        checks.key("key", key)
        batch = self._complete(as_batch(batch))
        split, on, off = self._draw(key, batch, context)
        shared = Shared(params, context._replace(state=()), batch.x1)
        found = sharding.each_device(self._evaluate, shared, on, off)
        return self._gather(split, (on, off), found)

    def _complete(self, batch: Batch) -> Batch:
        """The batch, checked, with x1 filled in where the method needs no data."""
        if "x0" in self.needs and batch.x0 is None:
            raise ValueError(f"batch.x0: expected pairs for {self.name} (couplings.reflow makes them), got None")
        if batch.x1 is None:
            if "no data" not in self.needs or self.diagonal > 0:
                raise ValueError(f"batch.x1: expected data for {self.name}, got None")
            # I_0 is x0 whatever x1 is: the constructor has made sure that the path starts at the base.
            batch = batch._replace(x1=batch.x0)
        checks.floating("batch.x1", batch.x1)
        if self.velocity is velocity_estimates.batch and (batch.x0 is not None or batch.cond is not None):
            raise ValueError(
                "batch: expected neither x0 nor cond with the batch's velocity, which assumes independence"
            )
        return batch

    def _draw(self, key: Key, batch: Batch, context: Context) -> tuple[BatchSplit, Sample | None, Sample | None]:
        """The split of the batch, and what is drawn for either kind of rows."""
        size = checks.rows("batch", (batch.x1, batch.x0, batch.cond))
        coupling_key, split_key, time_key, pair_key, gamma_key, network_key, row_key = jax.random.split(key, 7)
        x0 = self.coupling(coupling_key, batch.x1, batch.cond) if batch.x0 is None else batch.x0
        checks.same_structure("batch.x0", x0, "batch.x1", batch.x1)
        split = split_batch(split_key, size, self.diagonal, self.blocks)
        keys = jax.random.split(network_key, size), jax.random.split(row_key, size)
        first, second = split.take((x0, batch.x1, batch.cond, *keys))
        dtype = trees.at_least_float32(batch.x1)

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

    def _evaluate(self, shared: Shared, on: Sample | None, off: Sample | None) -> list[Found | None]:
        """Losses and residuals of both kinds of rows; each device calls it with its own rows."""
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
        )

    def _on(self, params: Params, row: Row) -> Found:
        """The tangent residual of a diagonal row, reduced."""
        residual = tangent(lambda _, t, x: row.own.velocity(t, x), row.t, row.x, row.conditional)
        difference = residual.difference
        return Found(self.diagonal_reduction(params, row.t, row.t, difference), trees.sq_norm(difference), None)

    def _off(self, params: Params, row: Row) -> Found:
        """The method's residual of an off-diagonal row, reduced."""
        assert self.term is not None
        residual = self.term.residual(row)
        if not isinstance(residual, Residual):
            raise TypeError(
                f"term.residual: expected it to return an identities.Residual(prediction, target, tangent), got "
                f"{type(residual).__name__}"
            )
        difference = residual.difference
        loss = self.reduction(params, row.s, row.t, difference)
        if not isinstance(residual.weight, float) or residual.weight != 1.0:
            loss = loss * jax.lax.stop_gradient(jnp.asarray(residual.weight).astype(loss.dtype))
        size = None if residual.tangent is None else trees.sq_norm(residual.tangent)
        return Found(loss, trees.sq_norm(difference), size)

    def _gather(
        self, split: BatchSplit, samples: tuple[Sample | None, Sample | None], found: list[Found | None]
    ) -> tuple[Array, Aux]:
        """Losses in batch order, and the metrics of each term."""
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
