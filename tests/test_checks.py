"""Checks of arguments: values that fit a dtype, numbers, functions by their arguments."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import checks, sharding
from jflow.types import Batch

TOO_LARGE = [
    (np.int64(2**31), "int32", "2147483648"),
    (np.int64(-(2**31) - 1), "int32", "-2147483649"),
    (np.int64(2**32 + 1), "int32", "4294967297"),
    (np.uint64(2**64 - 1), "uint32", "18446744073709551615"),
    (np.float64(1e40), "float32", r"1e\+40"),
    (np.float64(-3.4028236e38), "float32", r"-3.4028236e\+38"),
    (np.complex128(1 - 1e40j), "complex64", r"\(1-1e\+40j\)"),
]
FITTING = [
    np.array([2**31 - 1, -(2**31)]),
    np.array([2**32 - 1], np.uint64),
    np.array([np.nan, np.inf, -np.inf, 1e-300, 0.1, float(np.finfo(np.float32).max)]),
    np.array([complex(np.inf, 1.0), complex(0.1, np.nan)]),
    np.zeros((0, 3)),
    np.ones(2, bool),
    np.ones(2, np.int8),
    jnp.bfloat16(3),
    5,
    0.1,
]


def place(array):
    """The values that arrive on the device, by every layout."""
    mesh = sharding.mesh(devices=jax.devices()[:2])
    yield lambda: checks.fits("data", {"a": array})
    yield lambda: sharding.place({"a": array}, sharding.whole(mesh))
    if np.ndim(array):
        yield lambda: sharding.split({"a": array}, mesh)


@pytest.mark.parametrize(("value", "dtype", "message"), TOO_LARGE, ids=[str(v) for v, *_ in TOO_LARGE])
def test_values_too_large_are_named(value, dtype, message):
    for array in (value, np.array([0, value, 0], value.dtype)):
        with jax.enable_x64(False):
            for call in place(array):
                with pytest.raises(ValueError, match=rf"\['a'\]: expected values that fit {dtype}.* got {message}"):
                    call()
        # With 64-bit types nothing is lost.
        for call in place(array):
            call()


@pytest.mark.parametrize("value", FITTING, ids=str)
def test_values_that_fit_pass(value):
    with jax.enable_x64(False):
        checks.fits("data", Batch(x1=value, cond=(value, None)))
        for call in place(value):
            call()


def test_traced_values_and_those_on_a_device_pass():
    big = jnp.asarray(2**40)
    with jax.enable_x64(False):
        checks.fits("data", big)
        jax.jit(lambda x: checks.fits("data", x))(1.0)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_mapped_arrays_are_read_in_blocks(tmp_path, monkeypatch, order):
    """One value in the last of many blocks is found, and no block is larger than it should be."""
    monkeypatch.setattr(checks, "_BLOCK", 64)
    array = np.asarray(np.zeros((1000, 7), np.int64), order=order)
    array[999, 6] = -(2**40)
    np.save(tmp_path / "rows.npy", array)
    mapped, sizes = np.load(tmp_path / "rows.npy", mmap_mode="r"), []
    lost = checks._lost
    monkeypatch.setattr(checks, "_lost", lambda block, dtype: sizes.append(block.size) or lost(block, dtype))
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"data.cond: .* got -1099511627776"):
        checks.fits("data", Batch(x1=np.zeros(1), cond=mapped))
    assert max(sizes) == 63 and sum(sizes) == 7001


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.asarray(0.5), jnp.float32(0.5), jnp.asarray(0.5), np.float16(0.5)]
)
def test_an_array_of_one_number_is_a_number(value):
    assert checks.number("value", value) == 0.5


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones(1), np.asarray(True), jnp.asarray(1j), "1", None])
def test_what_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match=r"^value: expected a number"):
        checks.number("value", value)


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda params, s, t, x, cond=None, *, key=None: x, True),
        (lambda params, s, t, x, cond, key=None: x, True),
        (lambda params, s, t, x, cond, key: x, True),
        (lambda params, s, t, x, cond, train=False, *, key=None: x, True),
        (lambda *args, **kwargs: args[3], True),
        (functools.partial(lambda scale, params, s, t, x, cond=None, key=None: x, 2.0), True),
        (jax.jit(lambda params, s, t, x, cond=None, key=None: x), True),
        (lambda params, t, x, cond=None, *, key=None: x, False),
        (lambda params, s, t, x: x, False),
        (lambda params, s, t, u, x, cond=None, *, key=None: x, False),
    ],
)
def test_models_by_their_arguments(function, takes):
    context = contextlib.nullcontext() if takes else pytest.raises(TypeError, match=r"^f: expected a function")
    with context:
        checks.accepts("f", function, "(params, s, t, x, cond=None, *, key=None)", 5)
