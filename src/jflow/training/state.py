"""The state of a training run: everything that the next step needs, and a checkpoint keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import objectives, trees
from jflow.training import ema as averages
from jflow.training.optimizers import Optimizer, check_optimizer
from jflow.types import Array, Key, ObjectiveFn, Params, PyTree

# A state prints the shapes of parts with at most so many arrays.
LEAVES_SHOWN = 12


class TrainState(NamedTuple):
    """The state of a run, a pytree of arrays.

    Attributes:
      step: the number of steps taken, an int32 scalar: the position in the data, and what the key is folded with.
      updates: the number of updates that the optimizer has made, an int32 scalar. Averages, curricula and updates of the
        teacher follow it. Below ``step`` where several steps make one update (``optax.MultiSteps``), or an update was left
        out (``optax.apply_if_finite``).
      broken: how many of the last steps, in a row, had a loss, gradient or update that was not finite; an int32 scalar.
      params: the parameters being trained.
      opt_state: the optimizer's state.
      ema: averages of the parameters by name ("0.999"), in at least float32.
      key: a typed PRNG key that never changes; step n draws from ``jax.random.fold_in(key, n)``.
      teacher: frozen parameters of a teacher, or None.
      objective_state: the objective's own state, ``()`` for one without.
    """

    step: Array
    updates: Array
    broken: Array
    params: Params
    opt_state: PyTree
    ema: dict[str, Params]
    key: Key
    teacher: Params = None
    objective_state: PyTree = ()

    def averaged(self, name: str | None = None) -> Params:
        """An average of the parameters, by default the first, in the dtypes of the parameters.

        Raises:
          ValueError: if there is no average of that name, or none at all.
        """
        if name is None and self.ema:
            name = next(iter(self.ema))
        if name not in self.ema:
            raise ValueError(f"name: expected an average of this state, {sorted(self.ema)}, got {name!r}")
        return averages.as_params(self.ema[name], self.params)

    def __repr__(self) -> str:
        """Shapes and dtypes, a line for each part."""
        parts = (f"  {name}={_shapes(value)}" for name, value in zip(self._fields, self, strict=True))
        return "TrainState(\n" + ",\n".join(parts) + ",\n)"


def init_state(
    params: Params,
    optimizer: Optimizer,
    key: Key,
    *,
    ema: averages.Averages = (),
    teacher: Params = None,
    objective: ObjectiveFn | None = None,
) -> TrainState:
    """The state before the first step.

    Every array is a copy of its own: a step donates the state's buffers, so none may be shared with the caller's
    parameters or twice within the state.

    Args:
      params: a pytree of arrays.
      optimizer: an optax ``GradientTransformation``, or ``optax.MultiSteps``.
      key: a typed PRNG key (``jax.random.key``).
      ema: decays, or names with schedules of ``training.ema``; give ``make_step`` the same.
      teacher: frozen parameters, or None.
      objective: the objective, whose ``init(key, params)`` makes its state; needed where it has one. Its key is
        ``jax.random.fold_in(key, 2**32 - 1)``, which no step uses.

    Raises:
      TypeError: when the key is no single typed key, or ``ema`` or the optimizer is of another type.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jflow import training
      >>> state = training.init_state({"w": jnp.zeros(2, jnp.float32)}, optax.adam(1e-3), jax.random.key(0), ema=(0.999,))
      >>> int(state.step), sorted(state.ema)
      (0, ['0.999'])
    """
    if not trees.is_key(key) or key.shape != ():
        raise TypeError(f"key: expected one typed PRNG key from jax.random.key, got {type(key).__name__} {key}")
    check_optimizer(optimizer)
    params = jax.tree.map(jnp.asarray, params)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        ema={name: averages.init(params) for name in averages.resolve(ema)},
        key=key,
        teacher=teacher,
        objective_state=()
        if objective is None
        else objectives.init(objective, jax.random.fold_in(key, 2**32 - 1), params),
    )
    return jax.tree.map(_private_copy, state)


def _private_copy(leaf: Any) -> Array:
    # The explicit dtype also makes a weakly typed leaf strong: else the second step would trace anew.
    return trees.on_words(lambda words: jnp.array(words, dtype=jnp.result_type(words), copy=True), leaf)


def _shapes(tree: PyTree) -> str:
    """A pytree of short texts such as float32[3, 2]; of one with many leaves, how many there are and their size."""
    leaves = jax.tree.leaves(tree)
    if len(leaves) > LEAVES_SHOWN:
        size = sum(jnp.size(leaf) for leaf in leaves)
        return f"<{len(leaves)} arrays, {size:,} numbers>"
    return str(jax.tree.map(_shape, tree))


class _shape:
    """A leaf that prints as its dtype and shape."""

    def __init__(self, leaf: Any) -> None:
        self.text = f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"

    def __repr__(self) -> str:
        return self.text
