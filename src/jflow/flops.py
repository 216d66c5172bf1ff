r"""Floating-point operations of a function, with loops multiplied by their numbers of iterations.

XLA's cost analysis counts the body of a loop once, so a network of 8 scanned layers seems to cost an eighth of the same
network written out. ``count`` walks the traced program (its jaxpr) instead. It counts operations as XLA does before
optimisation, and multiplies

- the body of a ``jax.lax.scan`` (also ``fori_loop`` of static bounds, ``map``, scanned layers) by its length,
- the body of a ``while_loop`` by its number of iterations, if its condition depends only on counters whose values are known
  while tracing, as in the loops of Diffrax over the stages of a step,
- the body of a ``shard_map`` by the number of devices, and that of a Pallas kernel by its grid.

Of the branches of a conditional the most expensive one counts. Operations whose results are not used do not count. Anything
that is recomputed (``jax.checkpoint``) counts again, because it is work.

The units are those of XLA: a multiplication and an addition are one operation each, so a product of [m, k] and [k, n] costs
2 m k n; elementwise arithmetic costs one operation per entry, for integers and comparisons as well; transcendental functions
(exp, tanh, sqrt) cost nothing, nor does moving data, a gather or a library call (``jax.numpy.linalg``). Cumulative sums cost
one operation per entry, where XLA's count is quadratic on a CPU.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jflow import checks, trip_counts

# Operations of XLA's expansions per entry of the output, for primitives that are more than one operation.
PER_ENTRY = {
    "erf_inv": 37,
    "logistic": 3,
    "asinh": 11,
    "acosh": 7,
    "atanh": 6,
    "asin": 5,
    "acos": 3,
    "sinh": 10,
    "cosh": 3,
    "exp2": 1,
    "lgamma": 53,
    "digamma": 73,
    "erfc": 62,
    "igamma": 183,
    "nextafter": 24,
    # 20 rounds of threefry for two words of 32 bits, with the injections of the key.
    "random_bits": 57,
    "threefry2x32": 57,
    "random_split": 57,
    "random_fold_in": 57,
    "random_seed": 0,
}
TRANSCENDENTAL = "erf log log1p exp expm1 tanh sin cos tan sqrt rsqrt cbrt pow atan atan2".split()
MOVES = (
    "broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice concatenate stack "
    "unstack pad gather "
    "rev iota copy copy_p device_put stop_gradient optimization_barrier split tile empty empty2 create_token bitcast "
    "random_wrap random_unwrap random_clone sharding_constraint mesh_cast reshard layout_constraint pvary pcast name "
    "all_gather all_to_all ppermute axis_index debug_callback pure_callback io_callback debug_print custom_partitioning "
    "cholesky eig eigh svd qr lu triangular_solve geqrf householder_product tridiagonal_solve schur hessenberg "
    "lu_pivots_to_permutation top_k approx_top_k fft get swap addupdate "
    "unvmap_any unvmap_all unvmap_max nonbatchable select_if_vmap"
).split()
CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp".split()
_FREE = frozenset(TRANSCENDENTAL + MOVES)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor psum pmax pmin".split()
)


class UnknownTripCountError(ValueError):
    """The number of iterations of a while loop depends on values that are not known while tracing."""


def count(function: Callable[..., Any], *args: Any, while_trips: int | None = None) -> float:
    """The floating-point operations of ``function(*args)``, with loops multiplied by their numbers of iterations.

    Args:
      function: a function, jitted or not. A jitted one may have static arguments. It is traced, and neither compiled nor run.
      *args: its arguments, or their shapes and dtypes (``jax.ShapeDtypeStruct``).
      while_trips: the number of iterations of every while loop whose number is not known while tracing.

    Returns:
      The number of operations, of all devices together.

    Raises:
      UnknownTripCountError: if the number of iterations of a while loop is not known and ``while_trips`` is None.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import flops
      >>> layers = jnp.zeros((8, 64, 64), jnp.float32)
      >>> def network(layers, x):
      ...     return jax.lax.scan(lambda h, w: (w @ h, None), x, layers)[0]
      >>> flops.count(network, layers, jnp.zeros(64, jnp.float32)) == 8 * 2 * 64**2
      True
    """
    return float(sum(by_primitive(function, *args, while_trips=while_trips).values()))


def by_primitive(function: Callable[..., Any], *args: Any, while_trips: int | None = None) -> dict[str, float]:
    """The operations of ``count`` by the name of the primitive: 'dot_general' for matmuls, 'conv_general_dilated', 'add', ...

    Args:
      function, args, while_trips: as of ``count``.

    Raises:
      UnknownTripCountError: as ``count``.
    """
    if while_trips is not None:
        checks.integer("while_trips", while_trips)
    traced: Any = function if hasattr(function, "trace") else jax.jit(function)
    return dict(_total(traced.trace(*args).jaxpr, _Walk(while_trips, True)))


def compiled(function: Callable[..., Any], *args: Any, while_trips: int | None = None) -> float:
    """The operations of the optimised program: XLA's count, corrected by the iterations of loops that it leaves out.

    XLA merges equal subexpressions and drops what is not used, and its count holds for one device of several. The
    correction is that of the program before optimisation, so work that XLA moves out of a loop counts in every iteration.

    Args:
      function, args, while_trips: as of ``count``.

    Raises:
      UnknownTripCountError: as ``count``.
    """
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    traced = jitted.trace(*args)
    analysis: Any = traced.lower().compile().cost_analysis()
    whole, once = (sum(_total(traced.jaxpr, _Walk(while_trips, loops)).values()) for loops in (True, False))
    return float(analysis["flops"] + whole - once)


class _Walk:
    """Options of a walk: the iterations of unknown while loops, and whether loops are multiplied at all."""

    def __init__(self, while_trips: int | None, loops: bool) -> None:
        self.while_trips = while_trips
        self.loops = loops

    def trips(self, eqn: Any, known: Mapping[Any, Any]) -> int:
        if not self.loops:
            return 1
        found = trip_counts.while_trips(eqn, known)
        if found is None and self.while_trips is None:
            raise UnknownTripCountError(
                "function: has a while loop whose number of iterations is not known while tracing; pass while_trips=, the "
                "number to assume"
            )
        return self.while_trips or 0 if found is None else found


Count = collections.Counter


def _total(closed: Any, walk: _Walk) -> Count:
    return _jaxpr(
        closed, [True] * len(trip_counts.opened(closed).outvars), [None] * len(trip_counts.opened(closed).invars), walk
    )[0]


def _jaxpr(jaxpr: Any, used: Sequence[bool], values: Sequence[Any], walk: _Walk) -> tuple[Count, list[bool], list[Any]]:
    """Counts a jaxpr.

    Args:
      jaxpr: it, open or closed.
      used: which of its outputs are used.
      values: the known scalar values of its inputs, None for those that are not known.
      walk: the options.

    Returns:
      (counts, inputs, outputs): which inputs are used, and the known values of the outputs.
    """
    opened, known = trip_counts.opened(jaxpr), trip_counts.follow(jaxpr, values)
    live = {var for var, needed in zip(opened.outvars, used, strict=True) if needed and not trip_counts.is_literal(var)}
    counts: Count = collections.Counter()
    for eqn in reversed(opened.eqns):
        needed = [var in live for var in eqn.outvars]
        if not any(needed) and not eqn.effects:
            continue
        found, inputs = _equation(eqn, needed, known, walk)
        counts.update(found)
        live |= {var for var, each in zip(eqn.invars, inputs, strict=True) if each and not trip_counts.is_literal(var)}
    return counts, [var in live for var in opened.invars], [trip_counts.value(var, known) for var in opened.outvars]


def _equation(eqn: Any, needed: list[bool], known: Mapping[Any, Any], walk: _Walk) -> tuple[Count, list[bool]]:
    """The counts of one equation, and which of its inputs are used."""
    name, params, everything = eqn.primitive.name, eqn.params, [True] * len(eqn.invars)
    if name == "scan":
        return _scan(eqn, needed, known, walk)
    if name == "while":
        parts = [_total(params[part], walk) for part in ("cond_jaxpr", "body_jaxpr")]
        trips = walk.trips(eqn, known)
        # The condition is evaluated once more than the body.
        return _times(parts[0], trips + walk.loops) + _times(parts[1], trips), everything
    if name == "cond":
        branches = [_total(branch, walk) for branch in params["branches"]]
        return max(branches, key=lambda counts: sum(counts.values())), everything
    if name == "custom_linear_solve":
        return _total(params["jaxprs"].solve, walk), everything
    if name == "pallas_call":
        grid = getattr(params.get("grid_mapping"), "grid", ()) or ()
        size = math.prod(each for each in grid if isinstance(each, int))
        return _times(_total(params["jaxpr"], walk), size), everything
    rule = _rule(name)
    if rule is not None:
        return collections.Counter({name: rule(eqn)}), everything
    inner = trip_counts.inner(params)
    if inner is None:
        return collections.Counter({name: PER_ENTRY.get(name, 1) * _size(eqn.outvars[0])}), everything
    opened = trip_counts.opened(inner)
    factor = math.prod(dict(params["mesh"].shape).values()) if name == "shard_map" else 1
    if len(opened.invars) == len(eqn.invars) and len(opened.outvars) == len(eqn.outvars):
        # Without the values: those of a shard are others.
        values = [trip_counts.value(var, known) if name != "shard_map" else None for var in eqn.invars]
        counts, inputs, _ = _jaxpr(inner, needed, values, walk)
        return _times(counts, factor), inputs
    return _times(_total(inner, walk), factor), everything


def _scan(eqn: Any, needed: list[bool], known: Mapping[Any, Any], walk: _Walk) -> tuple[Count, list[bool]]:
    params = eqn.params
    body = trip_counts.opened(params["jaxpr"])
    # The parameters that say so differ between versions of jax. Only what is scanned over has one axis more outside.
    carry = sum(out.aval.ndim == inner.aval.ndim for out, inner in zip(eqn.outvars, body.outvars, strict=True))
    scanned = sum(var.aval.ndim != inner.aval.ndim for var, inner in zip(eqn.invars, body.invars, strict=True))
    consts = len(eqn.invars) - carry - scanned
    values = [trip_counts.value(var, known) for var in eqn.invars[:consts]]
    values += [None] * (len(eqn.invars) - consts)
    needed = list(needed)
    # A carry that an iteration uses was used in the iteration before.
    while True:
        counts, inputs, _ = _jaxpr(params["jaxpr"], needed, values, walk)
        grown = [a or b for a, b in zip(needed[:carry], inputs[consts : consts + carry], strict=True)] + needed[carry:]
        if grown == needed:
            return _times(counts, params["length"] if walk.loops else 1), inputs
        needed = grown


def _times(counts: Count, factor: float) -> Count:
    return collections.Counter({name: number * factor for name, number in counts.items()})


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _rule(name: str) -> Callable[[Any], float] | None:
    """The count of an equation of a primitive, as a function; None for elementwise primitives and calls."""
    if name in _FREE:
        return lambda eqn: 0
    if name in _REDUCTIONS:
        return lambda eqn: sum(
            max(_size(var) - _size(out), 0) for var, out in zip(eqn.invars, eqn.outvars, strict=False)
        )
    if name in CUMULATIVE:
        return lambda eqn: _size(eqn.outvars[0])
    if name in ("argmax", "argmin"):
        return lambda eqn: 9 * _size(eqn.invars[0])
    if name.startswith("scatter"):
        return lambda eqn: 0 if name == "scatter" else _size(eqn.invars[2])
    if name.startswith(("reduce_window", "select_and_scatter", "select_and_gather")):
        return lambda eqn: max(math.prod(eqn.params["window_dimensions"]) - 1, 0) * _size(eqn.outvars[0])
    return _RULES.get(name)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(shape[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    """Two operations for each product of an entry of the kernel with an entry of the image, padding left out."""
    params, image, kernel = eqn.params, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    numbers = params["dimension_numbers"]
    out = eqn.outvars[0].aval.shape
    pairs = 1
    for i, (in_axis, kernel_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        stride, (low, _) = params["window_strides"][i], params["padding"][i]
        spread, dilation = params["lhs_dilation"][i], params["rhs_dilation"][i]
        at = np.arange(out[out_axis])[:, None] * stride + np.arange(kernel[kernel_axis])[None, :] * dilation - low
        inside = (at >= 0) & (at % spread == 0) & (at // spread < image[in_axis])
        pairs *= int(inside.sum())
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * pairs * batch * features * kernel[numbers.rhs_spec[1]] // params["batch_group_count"]


def _power(eqn: Any) -> float:
    power = abs(eqn.params["y"])
    multiplications = max(power.bit_length() - 1 + bin(power).count("1") - 1, 0)
    return (multiplications + (eqn.params["y"] < 0)) * _size(eqn.outvars[0])


def _generic_reduce(eqn: Any) -> float:
    arrays = len(eqn.invars) // 2
    each = sum(_total(eqn.params["jaxpr"], _Walk(None, True)).values())
    return each * (_size(eqn.invars[0]) - _size(eqn.outvars[0])) if arrays else 0


def _sort(eqn: Any) -> float:
    length = eqn.invars[0].aval.shape[eqn.params["dimension"]]
    return _size(eqn.invars[0]) * max(length - 1, 0).bit_length()


def _converted(eqn: Any) -> float:
    """A change of dtype is an operation; one to the same dtype is none."""
    return 0 if eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype else _size(eqn.outvars[0])


_RULES: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "integer_pow": _power,
    "convert_element_type": _converted,
    "reduce": _generic_reduce,
    "sort": _sort,
}
