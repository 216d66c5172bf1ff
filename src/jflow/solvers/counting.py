"""A step size controller that counts the evaluations of the velocity. Diffrax is imported on first use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from jflow.solvers.methods import Cost
from jflow.types import Array, Event

if TYPE_CHECKING:
    import diffrax


class Count(NamedTuple):
    """The state of the controller.

    Attributes:
      controller: the state of the controller that is wrapped.
      evaluations: of the velocity so far, int32.
      restarts: whether the next step has nothing to inherit, bool.
    """

    controller: Any
    evaluations: Array
    restarts: Array


def counting(
    controller: diffrax.AbstractAdaptiveStepSizeController, cost: Cost
) -> diffrax.AbstractAdaptiveStepSizeController:
    """The same controller, whose state is a ``Count``. Rejected steps and restarts after a jump are counted."""
    return _class()(controller, cost)


@functools.cache
def _class() -> Callable[..., diffrax.AbstractAdaptiveStepSizeController]:
    import diffrax
    import equinox as eqx

    class CountingController(diffrax.AbstractAdaptiveStepSizeController):
        controller: diffrax.AbstractAdaptiveStepSizeController
        cost: Cost = eqx.field(static=True)

        @property
        def rtol(self) -> Any:
            return self.controller.rtol

        @property
        def atol(self) -> Any:
            return self.controller.atol

        @property
        def norm(self) -> Callable[[Event], Array]:
            return self.controller.norm

        def wrap(self, direction: Any) -> CountingController:
            return CountingController(self.controller.wrap(direction), self.cost)

        def init(self, *args: Any) -> tuple[Any, Count]:
            first, state = self.controller.init(*args)
            start = jnp.asarray(self.cost.start, jnp.int32)
            return first, Count(state, start, jnp.asarray(self.cost.start == 0))

        def adapt_step_size(self, *args: Any) -> tuple[Any, ...]:
            *others, count = args
            keep, start, end, jump, state, result = self.controller.adapt_step_size(*others, count.controller)
            extra = jnp.where(count.restarts, self.cost.restart, 0).astype(jnp.int32)
            evaluations = count.evaluations + self.cost.step + extra
            count = Count(state, evaluations, jnp.where(keep, jump, count.restarts))
            return keep, start, end, jump, count, result

    return CountingController
