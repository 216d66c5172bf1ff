"""Whole numbers and bools that are known while tracing, and the iterations of while loops that count with them.

A loop over a counter, as that of Diffrax over the stages of a step, becomes a ``while`` primitive whose number of iterations
stands nowhere. These functions follow the counter through the traced program (its jaxpr) with Python's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jflow import checks

# The iterations of a while loop that are followed at most.
MOST_TRIPS = 1_000_000
CALLS = ("pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2")

_SCALAR: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "min": min,
    "max": max,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: not a if isinstance(a, bool) else ~a,
    "select_n": lambda which, *cases: cases[int(which)],
    "convert_element_type": lambda a: a,
    "stop_gradient": lambda a: a,
    "copy": lambda a: a,
    # Equinox's, of one value for the whole batch.
    "unvmap_any": lambda a: a,
    "unvmap_all": lambda a: a,
    "unvmap_max": lambda a: a,
    "nonbatchable": lambda a: a,
    "select_if_vmap": lambda which, a, b: a if which else b,
}


def opened(jaxpr: Any) -> Any:
    """The jaxpr of a closed jaxpr, or an open one itself."""
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def inner(params: Mapping[str, Any]) -> Any:
    """The program that a primitive calls: of jit, checkpoint, custom derivatives, shard_map; None if it calls none."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if hasattr(opened(params.get(name)), "eqns"):
            return params[name]
    return None


def is_literal(var: Any) -> bool:
    """Whether an operand is a number written into the program, and not a variable."""
    return hasattr(var, "val")


def value(var: Any, known: Mapping[Any, Any]) -> Any:
    """The known value of a variable or a literal, or None."""
    return _number(var.val) if is_literal(var) else known.get(var)


def follow(jaxpr: Any, values: Sequence[Any]) -> dict[Any, Any]:
    """The values of all variables of a program that are known.

    Args:
      jaxpr: the program, open or closed.
      values: those of its inputs; None for an unknown one.
    """
    program = opened(jaxpr)
    constants = zip(program.constvars, map(_number, getattr(jaxpr, "consts", ())), strict=False)
    known = {var: each for var, each in (*zip(program.invars, values, strict=True), *constants) if each is not None}
    for eqn in program.eqns:
        for var, each in zip(eqn.outvars, _results(eqn, known), strict=False):
            if each is not None:
                known[var] = each
    return known


def while_trips(eqn: Any, known: Mapping[Any, Any]) -> int | None:
    """The number of iterations of a while loop whose condition depends on known counters alone; None if it does not."""
    params = eqn.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    values = [value(var, known) for var in eqn.invars]
    cond_consts, body_consts, carry = values[:first], values[first : first + second], values[first + second :]
    for trips in range(MOST_TRIPS):
        (more,) = _outputs(params["cond_jaxpr"], cond_consts + carry)
        if more is None:
            return None
        if not more:
            return trips
        after = _outputs(params["body_jaxpr"], body_consts + carry)
        if after == carry:
            return None  # It would never end.
        carry = after
    return None


def _outputs(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    known = follow(jaxpr, values)
    return [value(var, known) for var in opened(jaxpr).outvars]


def _number(found: Any) -> Any:
    """A concrete whole number or bool as Python's, or None."""
    array = None if getattr(found, "shape", ()) != () else checks.concrete(found)
    return array.item() if array is not None and array.dtype.kind in "iub" else None


def _results(eqn: Any, known: Mapping[Any, Any]) -> list[Any]:
    """The values of an equation's outputs that follow from the known ones; empty if none does."""
    values = [value(var, known) for var in eqn.invars]
    if eqn.primitive.name in CALLS and (called := inner(eqn.params)) is not None:
        return _outputs(called, values)
    dtype = getattr(eqn.outvars[0].aval, "dtype", None) if eqn.outvars else None
    simple = dtype is not None and dtype.name.startswith(("int", "uint", "bool"))
    function = _SCALAR.get(eqn.primitive.name)
    if function is None or not simple or any(each is None for each in values):
        return []
    return [_wrapped(function(*values), dtype)]


def _wrapped(value: Any, dtype: Any) -> Any:
    """The value of Python's arithmetic as the dtype has it: integers wrap around."""
    if dtype.name == "bool":
        return bool(value)
    limits = jnp.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    return low + (int(value) - low) % (high - low + 1)
