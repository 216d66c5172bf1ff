r"""Magnitude-preserving layers (EDM2, 2312.02696): the root mean square of activations stays near 1 throughout a network.

There are no biases. The weights of each output are normalised when they are used, so that a training step cannot change their
size; ``training.forced_weight_normalisation`` also normalises what is stored.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.nets import embeddings
from jflow.nets.convolution import convolve
from jflow.types import Array

Dtype = Any
# The name of the parameters that are normalised.
KERNEL = "mp_kernel"
EPSILON = 1e-4


def normalise_weights(kernel: Array) -> Array:
    r"""A kernel whose weights of each output (all axes but the last) have root mean square 1.

    .. math:: w \mapsto \frac{w}{\epsilon + \mathrm{rms}(w)}, \qquad \epsilon = 10^{-4}
    """
    square = jnp.mean(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    # The root at zero has no derivative; EDM2 has the same value elsewhere.
    rms = jnp.sqrt(jnp.maximum(square, jnp.finfo(kernel.dtype).tiny))
    return kernel / (EPSILON + rms)


def mp_silu(x: Array) -> Array:
    """silu(x)/0.596, which has root mean square 1 for a standard normal x."""
    return jax.nn.silu(x) / 0.596


def mp_sum(a: Array, b: Array, weight: float = 0.5) -> Array:
    """((1 - w) a + w b)/sqrt((1 - w)^2 + w^2), which keeps the magnitude of independent a and b."""
    return ((1.0 - weight) * a + weight * b) / math.hypot(1.0 - weight, weight)


def mp_concatenate(a: Array, b: Array, weight: float = 0.5) -> Array:
    """[a, b] along the last axis, with factors by which both contribute as (1 - w) to w and the magnitude is kept."""
    n, m = a.shape[-1], b.shape[-1]
    scale = math.sqrt((n + m) / ((1.0 - weight) ** 2 + weight**2))
    return jnp.concatenate([scale / math.sqrt(n) * (1.0 - weight) * a, scale / math.sqrt(m) * weight * b], axis=-1)


def pixel_norm(x: Array) -> Array:
    """The vectors along the last axis over (1e-4 + their root mean square), computed in float32 at least."""
    wide = embeddings.at_least_float32("x", x)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide / (EPSILON + jnp.sqrt(jnp.maximum(square, jnp.finfo(wide.dtype).tiny)))).astype(x.dtype)


class MPConvolution(nn.Module):
    """A convolution, or with ``side=0`` a linear layer, whose weights are normalised at use and divided by sqrt(fan-in).

    Attributes:
      features: the number of output channels.
      side: the side of the kernel, odd; 0 for a linear layer of the last axis.
      method: 'lax' or 'matmul' (``convolution.convolve``).
      dtype, param_dtype: the dtypes of the convolution and of the parameters. The normalisation is in ``param_dtype``.
    """

    features: int
    side: int
    method: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, gain: Array | None = None) -> Array:
        """The convolution of x, times ``gain`` if it is given; the parameter is called "mp_kernel"."""
        shape = ((self.side, self.side) if self.side else ()) + (x.shape[-1], self.features)
        kernel = self.param(KERNEL, nn.initializers.normal(1.0), shape, self.param_dtype)
        kernel = normalise_weights(kernel) / math.sqrt(math.prod(shape[:-1]))
        kernel = (kernel if gain is None else kernel * gain).astype(self.dtype)
        return convolve(x.astype(self.dtype), kernel, self.method) if self.side else x.astype(self.dtype) @ kernel
