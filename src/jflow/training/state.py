"""The state of a training run: everything that the next step needs and a checkpoint saves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import objectives, trees
from jflow.training import ema as averages
from jflow.training.optimizers import Optimizer, check_optimizer
from jflow.types import Array, Key, ObjectiveFn, Params, PyTree

# The repr of a state lists the shapes of a part with at most this many arrays.
LEAVES_SHOWN = 12


class TrainState(NamedTuple):
    """The state of a run, a pytree of arrays.

    Attributes:
      step: the number of steps taken, an int32 scalar. It selects the batch and is folded into the key.
      updates: the number of updates that the optimizer has made, an int32 scalar. Averages, curricula and updates of the
        teacher depend on it. It is below ``step`` if several steps make one update (``optax.MultiSteps``), or updates were
        skipped (``optax.apply_if_finite``).
      broken: the number of consecutive steps, up to the last one, whose loss, gradient or update was not finite; an int32
        scalar.
      params: the parameters being trained.
      opt_state: the optimizer's state.
      ema: averages of the parameters by name ("0.999"), in at least float32.
      key: a typed PRNG key that never changes; step n draws from ``jax.random.fold_in(key, n)``.
      teacher: frozen parameters of a teacher, or None.
      objective_state: the objective's state; ``()`` if it has none.
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
        """An average of the parameters, in their dtypes; by default the first average.

        Raises:
          ValueError: if there is no average of that name, or none at all.
        """
        if name is None and self.ema:
            name = next(iter(self.ema))
        if name not in self.ema:
            raise ValueError(f"name: expected an average of this state, {sorted(self.ema)}, got {name!r}")
        return averages.as_params(self.ema[name], self.params)

    def __repr__(self) -> str:
        """The shapes and dtypes, with one line per field."""
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

    Every array is copied: a step donates the state's buffers, so they must not be shared with the caller's parameters or
    within the state.

    Args:
      params: a pytree of arrays.
      optimizer: an optax ``GradientTransformation``, or ``optax.MultiSteps``.
      key: a typed PRNG key (``jax.random.key``).
      ema: decays, or a mapping of names to schedules of ``training.ema``; pass the same to ``make_step``.
      teacher: frozen parameters, or None.
      objective: the objective; needed if it has a state, which its ``init(key, params)`` makes. The key for it is
        ``jax.random.fold_in(key, 2**32 - 1)``, which no step uses.

    Raises:
      ValueError: if a decay is outside [0, 1].
      TypeError: if the key is not a single typed key, a leaf of params is not an array, or ``ema`` or the optimizer has
        another type.

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
    params = jax.tree_util.tree_map_with_path(_as_array, params)
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


def _as_array(path: tuple[Any, ...], leaf: Any) -> Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"params{jax.tree_util.keystr(path)}: expected an array, got {type(leaf).__name__}; pass the arrays of a module "
            "alone, for example equinox.filter(module, equinox.is_inexact_array)"
        ) from error


def _private_copy(leaf: Any) -> Array:
    # The explicit dtype also removes weak types; otherwise the second step would be traced again.
    return trees.on_words(lambda words: jnp.array(words, dtype=jnp.result_type(words), copy=True), leaf)


def _shapes(tree: PyTree) -> str:
    """The shapes in a pytree, such as float32[3, 2]; for many leaves only their number and total size."""
    leaves = jax.tree.leaves(tree)
    if len(leaves) > LEAVES_SHOWN:
        size = sum(jnp.size(leaf) for leaf in leaves)
        return f"<{len(leaves)} arrays, {size:,} numbers>"
    return str(jax.tree.map(_shape, tree))


class _shape:
    """A leaf whose repr is its dtype and shape."""

    def __init__(self, leaf: Any) -> None:
        self.text = f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"

    def __repr__(self) -> str:
        return self.text
