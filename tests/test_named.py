"""Functions that print as the call that made them."""

from __future__ import annotations

import functools
import inspect

import pytest

from jflow.named import described, named, shown


def test_a_named_function_is_called_and_shows_its_signature():
    made = named("scaled", lambda x, by=2: x * by, factor=3.0)
    assert made(4) == 8 and made(4, by=5) == 20
    assert list(inspect.signature(made).parameters) == ["x", "by"]
    assert repr(made) == "scaled(factor=3.0)"


@pytest.mark.parametrize(
    ("value", "short", "long"),
    [
        ("linear", "'linear'", "str 'linear'"),
        ((1, len), "(1, len)", "tuple (1, len)"),
        ((1,), "(1,)", "tuple (1,)"),
        (functools.partial(len), "partial(len)", "partial partial(len)"),
        (object(), "object", "object"),
        (named("f", len, a=1), "f(a=1)", "f(a=1)"),
        (named("f", len, a="x" * 90, b="y" * 90), "f(...)", "f(...)"),
    ],
)
def test_values_are_shown_in_short(value, short, long):
    assert shown(value) == short and described(value) == long
