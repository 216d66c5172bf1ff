"""Extra arguments for optax optimizers, and a test of whether an optimizer has made an update."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from jflow.nets import magnitude
from jflow.types import Array, PyTree

# Wrappers that return zero updates at some calls, and whose states do not show at which.
SILENT = (optax.ConditionallyMaskState, optax.ApplyEvery)


class Optimizer(Protocol):
    """An optax optimizer: any ``GradientTransformation``, or ``optax.MultiSteps``, which is not one."""

    @property
    def init(self) -> optax.TransformInitFn:
        """``params -> state``."""
        ...

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """``(gradient, state, params) -> (update, state)``; it may take extra arguments by keyword."""
        ...


def check_optimizer(optimizer: Optimizer) -> None:
    """Checks that this is an optimizer, and not, for example, a learning rate or ``optax.adam`` without a call.

    Raises:
      TypeError: if it has no ``init`` and ``update``; the message names its type.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer: expected an optax GradientTransformation, as optax.adam(1e-3), got {type(optimizer).__name__}"
        )


def with_extra_args(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """The optimizer with an ``update`` that accepts extra arguments, and ignores them if the optimizer does not use them.

    Unlike ``optax.with_extra_args_support`` it looks at the signature of ``update``, not at the class of the optimizer.
    ``optax.MultiSteps`` and its ``gradient_transformation()`` thus receive the extra arguments, and pass them on to the
    optimizer that they wrap.
    """
    if _takes_keywords(optimizer.update):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optax.GradientTransformation(optimizer.init, optimizer.update))


def forced_weight_normalisation(
    marked: Callable[[tuple[str, ...]], bool] = lambda path: path[-1] == magnitude.KERNEL,
) -> optax.GradientTransformation:
    r"""Forced weight normalisation of EDM2 (2312.02696): after every update the marked kernels have weights of magnitude 1.

    The update u of a kernel w becomes

    .. math:: \mathrm{normalised}(w + u) - w,

    where ``nets.magnitude.normalise_weights`` divides the weights of each output by their root mean square. It is the last
    transformation of a chain, after the learning rate. The learning rate then is the size of an update relative to the
    weights.

    Args:
      marked: ``path -> bool``, whether a parameter is normalised; the path holds the names of its module and of itself. By
        default those of ``nets.UNet(mp=True)``, which are called "mp_kernel".

    Returns:
      A GradientTransformation without a state. Its update raises ValueError without ``params``.

    Example:
      >>> import optax
      >>> from jflow import training
      >>> optimizer = optax.chain(optax.adam(1e-2), training.forced_weight_normalisation())
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params: expected the parameters in optimizer.update(gradient, state, params), got None")

        def one(path: tuple[Any, ...], u: Array, w: Array) -> Array:
            names = tuple(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)
            return (magnitude.normalise_weights(w + u) - w).astype(u.dtype) if marked(names) else u

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def has_updated(before: PyTree, after: PyTree, changed: Array) -> Array:
    """Whether the optimizer has made an update between two of its states: a scalar bool.

    It has if the parameters have changed. If they have not (the learning rate is zero, or the update is below rounding), the
    states decide, at any depth of nesting::

        MultiSteps                          an update was made if ``gradient_step`` has moved
        apply_if_finite                     if the last gradient was finite
        conditionally_mask, apply_every     their states do not show it, so an update that changes nothing is not counted
        none of these                       every call makes an update

    With several of them, all must indicate an update.

    A transformation that moves the parameters by itself, such as ``optax.add_decayed_weights``, must be inside
    ``optax.MultiSteps``. Chained after it, the transformation changes the parameters at every call, so every call counts as
    an update: averages, curricula and ``teacher_updates`` then move at every step.

    Args:
      before: the optimizer's state before the call.
      after: the optimizer's state after the call.
      changed: whether any parameter has changed, a scalar bool.
    """
    said = [
        new.gradient_step != old.gradient_step
        for old, new in zip(_states(before, optax.MultiStepsState), _states(after, optax.MultiStepsState), strict=True)
    ]
    said += [state.last_finite for state in _states(after, optax.ApplyIfFiniteState)]
    said += [jnp.asarray(False) for kind in SILENT for _ in _states(after, kind)]
    return changed | jnp.all(jnp.asarray(said, bool))


def _states(state: PyTree, kind: type) -> list[Any]:
    """All states of one class within an optimizer's state, including nested ones."""
    found = optax.tree.get_all_with_path(state, kind.__name__, lambda _, value: isinstance(value, kind))
    return [value for _, value in found]


def _takes_keywords(update: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(update).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
