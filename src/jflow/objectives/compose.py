"""The one machine behind every objective: split a batch once, give each row the residual it needs, reduce, report.

An objective is ``(params, key, batch, context) -> (loss [B], info)``; the caller averages. A batch is split, statically, into
a fixed number of diagonal rows (s = t), which cost one pass and no derivative, and off-diagonal rows, which carry the
method's own residual. The rows are chosen at random, within equal blocks of the batch, so that a batch sharded over
devices is split evenly on each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jflow import checks, couplings, identities, reductions, sharding, trees
from jflow import times as laws
from jflow.interpolants import Interpolant
from jflow.objectives import velocities
from jflow.types import Array, Batch, Cond, Context, Domain, Event, FlowMap, Key, Params, PyTree, Time, Velocity

BINS = 8


class Leg(NamedTuple):
    """A map at certain parameters, with a sample's conditioning and key filled in.

    Attributes:
      v: ``(s, t, x) -> v_{s,t}(x)``.
      velocity: ``(t, x) -> v_{t,t}(x)``.
    """

    v: identities.MeanVelocityFn
    velocity: identities.VelocityFn


class Row(NamedTuple):
    """What the residual of one off-diagonal sample is made of.

    Attributes:
      own: the map being trained, through which gradients flow.
      frozen: the same map, with gradients to its points but not to its parameters.
      s, t: source and target time, scalars.
      x: the point I_s.
      conditional: an estimate of b_s(x) whose mean, given x, is b_s(x): I_s' of the sample's own pair, or better.
      pair: ``(s, u) -> (I_u - I_s)/(u - s)``, the mean velocity of the sample's own pair.
      gamma: where the middle time lies, from the objective's law (semigroup methods).
      ema: the map at the averaged parameters, or None where the context holds none.
      teacher: the teacher, or None.
      step: the optimizer's step, an int32 scalar.
    """

    own: Leg
    frozen: Leg
    s: Array
    t: Array
    x: Event
    conditional: Event
    pair: Callable[[Array, Array], Event]
    gamma: Array
    ema: Leg | None
    teacher: Leg | None
    step: Array

    def leg(self, which: str) -> Leg:
        """The map "own", "ema" or "teacher".

        Raises:
          ValueError: for another name, or one that the context does not hold.
        """
        checks.choice("leg", which, ("own", "ema", "teacher"))
        found = getattr(self, which)
        if found is None:
            raise ValueError(
                f"context.{which}: expected parameters, got None: the method needs "
                + ("an average of its own (make_step's ema)" if which == "ema" else "a teacher (init_state's teacher)")
            )
        return found


OffDiagonal = Callable[[Row], identities.Residual]


@dataclasses.dataclass(frozen=True)
class Objective:
    """An identity and the choices around it; call it as ``objective(params, key, batch, context) -> (loss [B], info)``.

    Attributes:
      name: as in ``METHODS``.
      flow_map: the map that is trained.
      interpolant: the path.
      off_diagonal: the residual of a sample with s < t, or None for flow matching alone.
      term: what that residual is called in ``info``.
      diagonal: the share of the batch with s = t, which learns the velocity of its pair.
      times: the law of t on the diagonal.
      pairs: the law of (s, t) off it.
      gammas: the law of gamma, for semigroup residuals.
      reduction: residual to loss, off the diagonal.
      diagonal_reduction: the same on the diagonal.
      velocity: the estimate of b at the sampled points, in the tangent term and wherever the method has a conditional
        velocity: ``velocities.pair``; ``velocities.batch``, which needs independent pairs without conditioning; or
        ``velocities.teacher``, the default where ``teacher`` is given.
      teacher: any Velocity, or a FlowMap, at the parameters ``context.teacher``; by default ``flow_map``, at these
        parameters, where there are any.
      coupling: ``(key, x1, cond) -> x0`` where the batch holds no x0.
      blocks: the number of equal blocks, in batch order, that are each split alike: a multiple of the number of
        devices that a batch is spread over.
      domain: where the map is trained, if it is less than the map's own domain.
      needs: what else the method needs: "x0", pairs made beforehand; "no data", whose x1 may be None.
    """

    name: str
    flow_map: FlowMap
    interpolant: Interpolant
    off_diagonal: OffDiagonal | None = None
    term: str = ""
    diagonal: float = 0.75
    times: laws.Law = dataclasses.field(default_factory=laws.uniform)
    pairs: laws.PairLaw = dataclasses.field(default_factory=laws.triangle)
    gammas: laws.Law = dataclasses.field(default_factory=lambda: laws.constant(0.5))
    reduction: reductions.Reduction = reductions.squared
    diagonal_reduction: reductions.Reduction = reductions.squared
    velocity: velocities.Estimate | None = None
    teacher: FlowMap | Velocity | None = None
    coupling: couplings.Coupling = couplings.independent
    blocks: int = 1
    domain: Domain | None = None
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.velocity is None:
            estimate = velocities.pair if self.teacher is None else velocities.teacher
            object.__setattr__(self, "velocity", estimate)
        if self.domain is None:
            object.__setattr__(self, "domain", self.flow_map.domain)
        if self.velocity is velocities.batch and self.coupling is not couplings.independent:
            raise ValueError("velocity: expected an independent coupling with the batch's velocity, which assumes it")
        checks.number("diagonal", self.diagonal, low=0.0, high=1.0)
        checks.integer("blocks", self.blocks, low=1)
        if self.off_diagonal is None and self.diagonal != 1.0:
            raise ValueError(f"diagonal: expected 1 for a method without off-diagonal rows, got {self.diagonal}")

    def rows(self, size: int) -> tuple[int, int]:
        """The numbers of diagonal and off-diagonal rows in a batch.

        Raises:
          ValueError: for a size that the blocks do not divide, or one too small for the share of either kind.
        """
        if size % self.blocks:
            raise ValueError(f"batch: expected a size divisible by blocks = {self.blocks}, got {size}")
        block = size // self.blocks
        diagonal = round(self.diagonal * block)
        if (self.diagonal > 0 and diagonal == 0) or (self.diagonal < 1 and diagonal == block):
            raise ValueError(
                f"batch: {size} rows in {self.blocks} blocks leave none for one kind at diagonal = {self.diagonal:g}; "
                "expected a larger batch or another share"
            )
        return diagonal * self.blocks, (block - diagonal) * self.blocks

    def __call__(
        self, params: Params, key: Key, batch: Batch, context: Context | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """The loss of each sample, in batch order, and what a person wants to look at.

        Args:
          params: the map's parameters.
          key: a PRNG key; split once, every use named.
          batch: data, ``[B, ...]``; floating point. x1 may be None beside an x0 where the method needs no data.
          context: step, averaged and teacher parameters (``Context()`` by default).

        Returns:
          (loss [B], info). ``info["diagonal_rows"]`` is the mask [B] of the rows with s = t. For each term, "tangent" on
          the diagonal and the method's own off it: ``TERM/raw``, the mean of |D|^2; ``TERM/loss``, the mean reduced
          loss; ``TERM/raw_by_t`` [8] with ``TERM/count_by_t`` [8], means by equal bins of t (0 in an empty bin); off
          the diagonal also ``TERM/raw_by_gap``, ``TERM/count_by_gap`` and ``TERM/tangent_norm``, the root mean square
          of the derivative term.

        Raises:
          ValueError, TypeError: while tracing, for leaves of different lengths, a size that cannot be split, an x0
            that does not match x1, or data that is not floating point.
        """
        context = Context() if context is None else context
        batch = self._complete(batch)
        size = _batch_size(batch)
        diagonal, off_diagonal = self.rows(size)
        coupling_key, split_key, time_key, pair_key, gamma_key, model_key = jax.random.split(key, 6)
        x0 = self.coupling(coupling_key, batch.x1, batch.cond) if batch.x0 is None else batch.x0
        checks.same_structure("batch.x0", x0, "batch.x1", batch.x1)
        if self.velocity is velocities.batch and (batch.x0 is not None or batch.cond is not None):
            raise ValueError(
                "batch: expected neither x0 nor cond with the batch's velocity, which assumes independence"
            )
        whole = (x0, batch.x1, batch.cond, jax.random.split(model_key, size))
        dtype = trees.at_least_float32(batch.x1)

        def drawn(law: Any, law_key: Key, rows: int) -> Any:
            return jax.tree.map(lambda t: t.astype(dtype), laws.at_step(law, context.step)(law_key, rows))

        first, second = _split(split_key, size, self.blocks, diagonal)
        on_diagonal = off_it = None
        if diagonal:
            t = drawn(self.times, time_key, diagonal)
            rows = _take(whole, first)
            on_diagonal = (t, self._estimate(context, t, rows, batch), *rows)
        if off_diagonal:
            pair = drawn(self.pairs, pair_key, off_diagonal)
            gamma = drawn(self.gammas, gamma_key, off_diagonal)
            rows = _take(whole, second)
            off_it = (*pair, gamma, self._estimate(context, pair[0], rows, batch), *rows)

        def evaluate(params: Params, context: Context, on_diagonal: Any, off_it: Any) -> Any:
            on = on_diagonal and jax.vmap(lambda *row: self._on(params, *row))(*on_diagonal)
            return on, off_it and jax.vmap(lambda *row: self._off(params, context, *row))(*off_it)

        # Each device with its own rows, so that the gradients of all terms are summed there first, and over devices once.
        on, off = _each_device(evaluate, params, context, on_diagonal, off_it)
        loss, info = jnp.zeros((size,), dtype), {}
        if diagonal:
            part, raw = on
            loss = _put(loss, first, part.astype(dtype))
            info.update(_report("tangent", part, raw, t=on_diagonal[0]))
        if off_diagonal:
            part, raw, derivative = off
            loss = _put(loss, second, part.astype(dtype))
            s, t = off_it[:2]
            info.update(_report(self.term, part, raw, t=t, gap=jnp.abs(t - s)))
            info[f"{self.term}/tangent_norm"] = jnp.sqrt(jnp.mean(jax.lax.stop_gradient(derivative)))
        info["diagonal_rows"] = _put(jnp.zeros((size,), bool), first, jnp.ones((diagonal,), bool))
        return loss, info

    def _complete(self, batch: Batch) -> Batch:
        if "x0" in self.needs and batch.x0 is None:
            raise ValueError(f"batch.x0: expected pairs for {self.name} (couplings.reflow makes them), got None")
        if batch.x1 is None:
            if "no data" not in self.needs or self.diagonal > 0:
                raise ValueError(f"batch.x1: expected data for {self.name}, got None")
            # I_0 is x0 whatever x1 is: the constructor has made sure that the path starts at the base.
            return batch._replace(x1=batch.x0)
        return batch

    def _estimate(self, context: Context, t: Array, rows: tuple, batch: Batch) -> Event:
        x0, x1, cond, keys = rows

        def taught(t_: Array, x_: Event) -> Event:
            return jax.vmap(lambda *row: self._teacher(context, *row[2:]).velocity(*row[:2]))(t_, x_, cond, keys)

        has_one = self.teacher is not None or context.teacher is not None
        return self.velocity(velocities.Points(self.interpolant, t, x0, x1, batch.x1, taught if has_one else None))

    def _teacher(self, context: Context, cond: Cond, key: Key) -> Leg | None:
        if self.teacher is None and context.teacher is None:
            return None
        teacher = self.flow_map if self.teacher is None else self.teacher
        if isinstance(teacher, FlowMap):
            return _leg(teacher, context.teacher, cond, key)

        def refuse(s: Array, t: Array, x: Event) -> Event:
            raise ValueError("teacher: expected a FlowMap, whose jumps the method needs, got a Velocity")

        return Leg(refuse, lambda t_, x_: teacher(context.teacher, t_, x_, cond, key=key))

    def _on(
        self, params: Params, t: Array, velocity: Event, x0: Event, x1: Event, cond: PyTree, key: Key
    ) -> tuple[Array, Array]:
        def v(s_: Time, t_: Time, x_: Event) -> Event:
            del s_
            return self.flow_map.velocity(params, t_, x_, cond, key=key)

        x = self.interpolant.interpolate(t, x0, x1)
        difference = identities.tangent(v, t, x, velocity).difference
        return self.diagonal_reduction(params, t, t, difference), trees.sq_norm(difference)

    def _off(
        self,
        params: Params,
        context: Context,
        s: Array,
        t: Array,
        gamma: Array,
        velocity: Event,
        x0: Event,
        x1: Event,
        cond: PyTree,
        key: Key,
    ) -> tuple[Array, Array, Array]:
        assert self.off_diagonal is not None
        residual = self.off_diagonal(
            Row(
                own=_leg(self.flow_map, params, cond, key),
                frozen=_leg(self.flow_map, jax.lax.stop_gradient(params), cond, key),
                s=s,
                t=t,
                x=self.interpolant.interpolate(s, x0, x1),
                conditional=velocity,
                pair=lambda s_, u_: self.interpolant.mean_derivative(s_, u_, x0, x1),
                gamma=gamma,
                ema=None if context.ema is None else _leg(self.flow_map, context.ema, cond, key),
                teacher=self._teacher(context, cond, key),
                step=jnp.asarray(context.step),
            )
        )
        difference = residual.difference
        loss = self.reduction(params, s, t, difference)
        if not isinstance(residual.weight, float) or residual.weight != 1.0:
            loss = loss * jax.lax.stop_gradient(jnp.asarray(residual.weight).astype(loss.dtype))
        return loss, trees.sq_norm(difference), trees.sq_norm(residual.tangent)


def _leg(flow_map: FlowMap, params: Params, cond: Cond, key: Key) -> Leg:
    return Leg(
        lambda s, t, x: flow_map.mean_velocity(params, s, t, x, cond, key=key),
        lambda t, x: flow_map.velocity(params, t, x, cond, key=key),
    )


def _batch_size(batch: Batch) -> int:
    checks.floating("batch.x1", batch.x1)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((batch.x1, batch.x0, batch.cond))}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"batch: expected every leaf to have the same leading axis, got {sorted(sizes)}")
    return int(next(iter(sizes))[0])


def _split(key: Key, size: int, blocks: int, diagonal: int) -> tuple[Array | None, Array | None]:
    """Places within each block, [blocks, n] of the diagonal and of the other rows, chosen at random; None for all rows."""
    if diagonal in (0, size):
        return None, None
    order = jax.vmap(lambda k: jax.random.permutation(k, size // blocks))(jax.random.split(key, blocks))
    cut = diagonal // blocks
    return order[:, :cut], order[:, cut:]


def _take(tree: PyTree, places: Array | None) -> PyTree:
    """The rows at these places, block after block: within blocks, so that no row leaves its device."""
    if places is None:
        return tree

    def leaf_rows(leaf: Array) -> Array:
        blocks = leaf.reshape(places.shape[0], -1, *leaf.shape[1:])
        return jax.vmap(lambda block, p: block[p])(blocks, places).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(leaf_rows, tree)


def _put(whole: Array, places: Array | None, values: Array) -> Array:
    """[B] with the values at the places from which ``_take`` took them."""
    if places is None:
        return values if values.size else whole
    blocks = whole.reshape(places.shape[0], -1)
    return jax.vmap(lambda block, p, v: block.at[p].set(v))(blocks, places, values.reshape(places.shape)).reshape(-1)


def _each_device(function: Callable[..., PyTree], params: Params, context: Context, *rows: PyTree) -> PyTree:
    """``function(params, context, *rows)``, each device with its share of the rows, on the mesh of the training step.

    Where every device has the whole parameters it works alone, so that the gradients of all terms are summed there first,
    and over devices once. Where they lie in parts, the compiler is told how the rows lie, and collects what it needs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != sharding.AXES:
        return function(params, context, *rows)
    spread, same = PartitionSpec(sharding.AXES), PartitionSpec()
    counts = [len(jax.tree.leaves(part)[0]) if jax.tree.leaves(part) else 0 for part in rows]
    padded = [_pad(part, -count % mesh.size) for part, count in zip(rows, counts, strict=True)]
    if mesh.shape["fsdp"] > 1:
        results = function(params, context, *jax.lax.with_sharding_constraint(padded, spread))
    else:
        specs = (same, same, *[spread] * len(rows))
        each = jax.shard_map(function, in_specs=specs, out_specs=spread, check_vma=False)
        results = each(params, context, *padded)
    return [jax.tree.map(lambda leaf, n=n: leaf[:n], part) for part, n in zip(results, counts, strict=True)]


def _pad(rows: PyTree, more: int) -> PyTree:
    """With the first row again, ``more`` times, at the end; whoever pads drops what comes of it."""

    def leaf_rows(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.concatenate([leaf, jnp.broadcast_to(leaf[:1], (more, *leaf.shape[1:]))])
        # Other keys: jax finds fault with one that is used twice.
        data = jax.random.key_data(leaf)
        data = jnp.concatenate([data, jnp.zeros((more, *data.shape[1:]), data.dtype)])
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(leaf_rows, rows) if more else rows


def _report(term: str, loss: Array, raw: Array, **by: Array) -> dict[str, Array]:
    raw = jax.lax.stop_gradient(raw)
    info = {f"{term}/raw": jnp.mean(raw), f"{term}/loss": jnp.mean(jax.lax.stop_gradient(loss))}
    for name, value in by.items():
        place = jnp.clip((value * BINS).astype(jnp.int32), 0, BINS - 1)
        count = jnp.zeros((BINS,), raw.dtype).at[place].add(1.0)
        total = jnp.zeros((BINS,), raw.dtype).at[place].add(raw)
        info[f"{term}/raw_by_{name}"] = total / jnp.maximum(count, 1.0)
        info[f"{term}/count_by_{name}"] = count
    return info
