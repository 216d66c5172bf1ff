"""A step size controller that counts the evaluations of the velocity. Diffrax is imported on first use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from jflow.solvers.methods import Cost
from jflow.types import Array, Event, Time

if TYPE_CHECKING:
    import diffrax


class Count(NamedTuple):
    """The state of the counting controller.

    Attributes:
      controller: the state of the wrapped controller.
      evaluations: the number of evaluations of the velocity so far, int32.
      restarts: whether the next step cannot reuse a stage of the previous step, bool.
    """

    controller: Any
    evaluations: Array
    restarts: Array


def counting(
    controller: diffrax.AbstractAdaptiveStepSizeController, cost: Cost
) -> diffrax.AbstractAdaptiveStepSizeController:
    """Wraps a controller so that its state is a ``Count``. The count includes rejected steps and restarts after a jump."""
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
        def norm(self) -> Callable[[Event], Any]:
            return self.controller.norm

        def wrap(self, direction: Any) -> diffrax.AbstractAdaptiveStepSizeController:
            return dataclasses.replace(self, controller=self.controller.wrap(direction))

        def init(
            self,
            terms: diffrax.AbstractTerm,
            t0: Time,
            t1: Time,
            y0: Event,
            dt0: Time,
            args: Any,
            func: Callable[..., Event],
            error_order: Any,
        ) -> tuple[Time, Count]:
            first, state = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
            start = jnp.asarray(self.cost.start, jnp.int32)
            return first, Count(state, start, jnp.asarray(self.cost.start == 0))

        def adapt_step_size(
            self,
            t0: Time,
            t1: Time,
            y0: Event,
            y1_candidate: Event,
            args: Any,
            y_error: Event,
            error_order: Any,
            controller_state: Count,
        ) -> tuple[Any, Time, Time, Any, Count, diffrax.RESULTS]:
            inner, evaluations, restarts = controller_state
            keep, start, end, jump, inner, result = self.controller.adapt_step_size(
                t0, t1, y0, y1_candidate, args, y_error, error_order, inner
            )
            extra = jnp.where(restarts, self.cost.restart, 0).astype(jnp.int32)
            count = Count(inner, evaluations + self.cost.step + extra, jnp.where(keep, jump, restarts))
            return keep, start, end, jump, count, result

    return CountingController
