"""A row of the catalogue: a method's constructor, its parts in words, and what it declares of itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from jflow.named import shown
from jflow.objectives.choices import Choices
from jflow.objectives.objective import Objective

Constructor = TypeVar("Constructor", bound=Callable[..., Objective])

# What a piece of work costs, in forward passes of the network on one sample.
PASSES = {
    "forward": 1,
    "backward": 2,  # of one forward pass, to the parameters
    "jvp": 2,  # the value and one derivative
    "tangent": 1,  # a further derivative at the same point
    "jvp_backward": 4,  # through the value and the derivative
    "input_backward": 1,  # of one forward pass, to its point alone
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the catalogue; ``method`` makes it, above the constructor.

    Attributes:
      constructor: ``(flow_map, interpolant, **choices) -> Objective``.
      title: the method's name in its paper.
      source: arXiv ids.
      identity, velocity, stop_gradient, derivative: the parts, in words.
      when: when to use it, in a sentence.
      cost: of one off-diagonal sample, as numbers of the pieces of ``PASSES``; empty without such samples.
      stationary: how the exact map is stationary under the squared reduction: "exact", the expected gradient is zero;
        "order", it is of order ``order`` in a small number h; "limit", the same where h is the method's own parameter.
      order: see ``stationary``.
      at: ``h -> choices`` under which h is that small number.
      needs: what must be there: "teacher" (a velocity), "map teacher" (a FlowMap), "ema", "pairs" (x0 in the batch),
        "backward" (a map with both directions).
      paths: the interpolants on which it is defined; empty for all.
      forms: the parameterizations with which it is defined; empty for all.
      published: the paper's choices, to be passed to the constructor, where they differ from its defaults.
      published_passes: the forward passes of a sample with every term on the full batch, as counted in the literature.
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

    @property
    def off_diagonal_passes(self) -> int | None:
        """The cost of one off-diagonal sample in forward passes, None without such samples."""
        return sum(PASSES[piece] * count for piece, count in self.cost.items()) or None


# The arguments that every method takes.
_COMMON = ("flow_map", "interpolant", *Choices.__annotations__)

# The catalogue: every method that ``method`` declares, by the name of its constructor.
METHODS: dict[str, Method] = {}


def method(**row: Any) -> Callable[[Constructor], Constructor]:
    """Declares the function below as a method of the catalogue: ``METHODS[its name]``, for the whole session.

    The function refuses its own keywords (those beside ``Choices``) where the objective has no off-diagonal rows to read
    them. The same function defined again, as in a notebook cell that runs twice, takes the place of the first.

    Args:
      **row: the attributes of ``Method``, but for the constructor: title, source, identity, velocity and when, and any
        other that differs from its default.

    Raises:
      ValueError: for a name that another function has in the catalogue; TypeError for attributes that ``Method`` does not
        have, or without one that it needs.
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
