"""The log weight w(s, t) of a learned reduction, and a flow map whose parameters include it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import checks, parts
from jflow.nets import embeddings
from jflow.types import Array, FlowMap, Params, Time


class LogWeight(nn.Module):
    r"""A network for the log weight w(s, t), a scalar (2312.02696, here for two times).

    .. math::

        w(s, t) = W_\text{out}\, \mathrm{silu}(W e + b) + b_\text{out}, \qquad e = [\phi(s), \phi(t - s)]

    It balances the loss of ``reductions.learned``, ``e^{-w} |D|^2 + w``, over the times. W_out and b_out start at zero, so
    w = 0, and training starts with the plain loss ``|D|^2``.

    Attributes:
      features: the width of the hidden layer.
      time_features: the number of sines and cosines of each time, even.
      max_frequency: their highest frequency, in cycles per unit of time.
      param_dtype: the dtype of the parameters.
    """

    features: int = 64
    time_features: int = 32
    max_frequency: float = 2.0
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the fields at construction."""
        checks.integer("features", self.features, low=1)
        checks.integer("time_features", self.time_features, low=2)
        super().__post_init__()

    @nn.compact
    def __call__(self, s: Array | float, t: Array | float) -> Array:
        """w(s, t).

        Args:
          s: source time, a scalar.
          t: target time, a scalar.

        Returns:
          A scalar in float32, or in float64 if either time is float64.

        Raises:
          ValueError: if a time has axes, or ``time_features`` is odd.
        """
        s, t = embeddings.times(s, t)
        e = [embeddings.sinusoidal(u, self.time_features, highest=self.max_frequency) for u in (s, t - s)]
        dtypes = {"dtype": s.dtype, "param_dtype": self.param_dtype}
        h = jax.nn.silu(nn.Dense(self.features, **dtypes, name="hidden")(jnp.concatenate(e)))
        zero = nn.initializers.zeros_init()
        return nn.Dense(1, **dtypes, kernel_init=zero, name="output")(h)[0]


class Weighted(NamedTuple):
    """The parameters of a flow map and of the log weight that is trained with it.

    Attributes:
      map: the parameters of the map; keep these after training.
      log_weight: the parameters of the log weight.
    """

    map: Params
    log_weight: Params


def with_log_weight(flow_map: FlowMap, module: LogWeight) -> tuple[FlowMap, Callable[[Weighted, Time, Time], Array]]:
    """Makes a flow map and a log weight that share one pair of parameters, so that they are trained together.

    For example::

        flow, log_weight = nets.with_log_weight(flow_map, module)
        objective = objectives.lsd(flow, path, reduction=reductions.learned(log_weight))
        params = nets.Weighted(map_params, module.init(key, 0.0, 0.0)["params"])

    The parameters of a teacher or an average are such a pair too.

    Args:
      flow_map: the flow map.
      module: the log weight, or any linen module called with (s, t).

    Returns:
      (flow_map, log_weight): the same FlowMap with ``Weighted`` params, and ``(params, s, t) -> w(s, t)``.

    Raises:
      TypeError: at a call, if the params are not ``Weighted``.
    """

    def apply(weights: Params, s: Time, t: Time) -> Array:
        # Without ``mutable``, apply returns the output alone.
        return cast(Array, module.apply({"params": weights}, s, t))

    return parts.map_on_part(Weighted, "map", flow_map), parts.on_part(Weighted, "log_weight", apply)
