"""The catalogue of methods: each entry has a constructor, a description in words, and declared properties."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from jflow import checks
from jflow.named import shown
from jflow.objectives.choices import Choices
from jflow.objectives.objective import Objective

Constructor = TypeVar("Constructor", bound=Callable[..., Objective])

# The cost of each operation, in forward passes of the network on one sample.
PASSES = {
    "forward": 1,
    "backward": 2,  # of one forward pass, to the parameters
    "jvp": 2,  # the value and one derivative
    "tangent": 1,  # a further derivative at the same point
    "jvp_backward": 4,  # through the value and the derivative
    "input_backward": 1,  # of one forward pass, to its input x only
}


STATIONARY = ("exact", "order", "limit")
NEEDS = ("teacher", "map teacher", "ema", "pairs", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """An entry of the catalogue; the decorator ``method`` makes it.

    Attributes:
      constructor: ``(flow_map, interpolant, **choices) -> Objective``.
      title: the method's name in its paper.
      source: arXiv ids.
      identity, velocity, stop_gradient, derivative: the parts of the method, in words.
      when: when to use the method, in words.
      cost: the cost of one off-diagonal sample: how often each operation of ``PASSES`` occurs. Empty if there are no such
        samples.
      stationary: whether the exact map is stationary under the squared reduction: "exact", the expected gradient is zero;
        "order", it is of order ``order`` in a small number h; "limit", the same where h is the method's own parameter.
      order: see ``stationary``.
      at: ``h -> choices``, the choices for which h is this small number.
      needs: the required inputs: "teacher" (a velocity), "map teacher" (a FlowMap), "ema", "pairs" (x0 in the batch),
        "backward" (a map with both directions).
      paths: the interpolants for which the method is defined; empty for all.
      forms: the parameterizations for which the method is defined; empty for all.
      published: a function that returns the paper's choices where they differ from the defaults. Pass them to the
        constructor.
      published_passes: the forward passes per sample with every term on the full batch, as counted in the literature.
    """

    constructor: Callable[..., Objective]
    title: str
    source: str
    identity: str
    velocity: str
    when: str
    stop_gradient: str = "-"
    derivative: str = "-"
    cost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stationary: str = "exact"
    order: int = 0
    at: Callable[[Any], dict[str, Any]] | None = None
    needs: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    published: Callable[[], dict[str, Any]] = dict
    published_passes: int | None = None

    def __post_init__(self) -> None:
        for piece in self.cost:
            checks.choice("cost", piece, PASSES)
        checks.choice("stationary", self.stationary, STATIONARY)
        for need in self.needs:
            checks.choice("needs", need, NEEDS)
        if self.stationary != "exact" and self.at is None:
            raise ValueError(f'at: expected h -> choices with stationary="{self.stationary}", got None')

    @property
    def off_diagonal_passes(self) -> int | None:
        """The cost of one off-diagonal sample in forward passes; None if there are no such samples."""
        return sum(PASSES[piece] * count for piece, count in self.cost.items()) or None


# The arguments that every method takes.
_COMMON = ("flow_map", "interpolant", *Choices.__annotations__)

# The catalogue: every method declared with ``method``, by the name of its constructor.
METHODS: dict[str, Method] = {}


def method(**row: Any) -> Callable[[Constructor], Constructor]:
    """Decorates a constructor and adds it to the catalogue, as ``METHODS[name]`` with the function's name.

    The decorated constructor raises ValueError if one of its own keywords (those not in ``Choices``) is passed to an
    objective without off-diagonal rows, which would not read it. If the same function is defined again, for example in a
    notebook cell that runs twice, it replaces the first.

    Args:
      **row: the attributes of ``Method`` except the constructor: title, source, identity, velocity, when, and any
        other that differs from its default.

    Raises:
      ValueError: if the catalogue has another function of this name, or a name in ``cost``, ``stationary`` or ``needs`` is
        unknown.
      TypeError: if a required attribute of ``Method`` is missing, or an attribute is unknown.
    """

    def declare(constructor: Constructor) -> Constructor:
        name = constructor.__name__
        earlier = METHODS.get(name)
        if earlier is not None and _place(earlier.constructor) != _place(constructor):
            raise ValueError(
                f"method: the catalogue has a method {name!r} already, of {_place(earlier.constructor)[0]}"
            )

        defaults = {name: each.default for name, each in inspect.signature(constructor).parameters.items()}

        @functools.wraps(constructor)
        def checked(*args: Any, **choices: Any) -> Objective:
            objective = constructor(*args, **choices)
            unread = [
                choice
                for choice, value in choices.items()
                if choice not in _COMMON and value is not None and value is not defaults.get(choice)
            ]
            if unread and objective.diagonal == 1.0 and objective.term is not None:
                raise ValueError(
                    f"{unread[0]}: expected no choice of it for {name} with diagonal=1, which has no off-diagonal rows; "
                    f"got {shown(choices[unread[0]])}"
                )
            return objective

        METHODS[name] = Method(constructor=checked, **row)
        return cast(Constructor, checked)

    return declare


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
