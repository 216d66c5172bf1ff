"""Functions whose ``repr`` is the call that made them, such as ``logit_normal(mean=0.4, std=1.0)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Named(Generic[P, R]):
    """A function whose ``repr`` is the call that made it.

    ``inspect.signature`` returns the signature of the wrapped function.

    Attributes:
      name: the name of the function that made it.
      arguments: the arguments of that call, by name.
      function: the wrapped function.
    """

    name: str
    arguments: Mapping[str, object]
    function: Callable[P, R]

    def __post_init__(self) -> None:
        # ``inspect.signature`` reads __wrapped__; otherwise it would return the (*args, **kwargs) of __call__.
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the wrapped function."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={shown(value)}' for name, value in self.arguments.items())})"


def named(name: str, function: Callable[P, R], **arguments: object) -> Named[P, R]:
    """Wraps a function so that it prints as ``name(**arguments)``."""
    return Named(name, arguments, function)


def described(value: object) -> str:
    """Describes a value with its type, for error messages: ``str 'linear'``, ``function linear``, ``FlowMap``."""
    kind, text = type(value).__name__, shown(value)
    if isinstance(value, Named):
        return text
    return kind if text == kind else f"{kind} {text}"


def shown(value: object) -> str:
    """Returns a short text for a value: the name of a function, the entries of a tuple, or the type if the text would be long.

    For a ``Named`` it is the call that made it, without the arguments if they are long: ``mixed(...)``.
    """
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if callable(value) and hasattr(value, "func"):
        return f"partial({shown(value.func)})"
    text = repr(value)
    if len(text) <= 100 and "\n" not in text and " at 0x" not in text:
        return text
    return f"{value.name}(...)" if isinstance(value, Named) else type(value).__name__
