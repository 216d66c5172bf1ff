"""A network with one output for each leaf of an event that is a pytree."""

from __future__ import annotations

import flax.linen as nn
import jax
from jax.flatten_util import ravel_pytree

from jflow import checks
from jflow.types import Array, Cond, Event


class MultiOutput(nn.Module):
    """Applies a network of one flat array to a pytree, with an output for each leaf.

    All leaves of x are concatenated, in a dtype that holds all of theirs, the network is called once, and its output is
    split into the shapes and dtypes of the leaves.

    For a ``WithLogDensity`` (x, log rho) of ``jflow.likelihood``, one pass gives an output shaped like x and a scalar output:
    ``nets.MultiOutput(nets.MLP())``.

    Attributes:
      net: a module of one flat array, such as ``MLP``, called as ``(s, t, x, cond=None)``. Its output is shaped like x.
    """

    net: nn.Module

    @nn.compact
    def __call__(self, s: Array | float, t: Array | float, x: Event, cond: Cond = None) -> Event:
        """net(s, t, x, cond), with the structure, shapes and dtypes of x.

        Raises:
          TypeError: if x is not floating point.
        """
        checks.floating("x", x)
        # Leaves of different dtypes are concatenated in the dtype that holds them all, also under strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            flat, cut = ravel_pytree(x)
        return cut(self.net(s, t, flat, cond))
