"""Counters that are followed through traced programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jflow import trip_counts


def trips(function, *args):
    """The iterations of the first while loop of a function."""
    jaxpr = jax.jit(function).trace(*args).jaxpr
    eqns = trip_counts.opened(jaxpr).eqns
    known = trip_counts.follow(jaxpr, [None] * len(trip_counts.opened(jaxpr).invars))
    return trip_counts.while_trips(next(eqn for eqn in eqns if eqn.primitive.name == "while"), known)


def loop(first, last, by, dtype=jnp.int32):
    """A loop over a counter that also changes an unknown number."""

    def run(x):
        start = jnp.asarray(first, dtype)
        return jax.lax.while_loop(lambda c: c[0] < last, lambda c: (c[0] + by, c[1] * 2.0), (start, x))

    return run


@pytest.mark.parametrize(
    ("first", "last", "by", "expected"), [(0, 7, 1, 7), (3, 20, 5, 4), (-4, 5, 3, 3), (9, 5, 1, 0)]
)
def test_a_counter_with_any_ends_and_step(first, last, by, expected):
    assert trips(loop(first, last, by), 1.0) == expected


def test_counters_wrap_around_in_their_dtype():
    """uint8: 250, 253, 0, 3, ..., 99: the counter passes 255 once."""
    assert trips(loop(250, 255, 3, jnp.uint8), 1.0) is not None
    count, i = 0, 250
    while i < 255:
        count, i = count + 1, (i + 3) % 256
        if count > 10_000:
            break
    assert trips(loop(250, 255, 3, jnp.uint8), 1.0) == count


def test_counters_inside_a_called_function_and_of_two_carries():
    @jax.jit
    def advance(i, j):
        return i + j, jnp.minimum(j + 1, 4)

    def run(x):
        carry = (jnp.int32(0), jnp.int32(1), x)
        return jax.lax.while_loop(lambda c: c[0] < 20, lambda c: (*advance(c[0], c[1]), c[2] * 2.0), carry)

    # The sums of 1, 2, 3, 4, 4, 4, 4: 1, 3, 6, 10, 14, 18, 22.
    assert trips(run, 1.0) == 7


def test_what_depends_on_data_or_never_ends_is_unknown():
    assert trips(lambda n: jax.lax.while_loop(lambda i: i < n, lambda i: i + 1, jnp.int32(0)), jnp.int32(3)) is None
    assert trips(loop(0, 5, 0), 1.0) is None
    assert trips(lambda x: jax.lax.while_loop(lambda y: y < 5.0, lambda y: y + x, x), 1.0) is None
