r"""Layers that several networks share: normalisation, windows of an image, modulated perceptrons, and a stack of layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jflow import checks
from jflow.nets import embeddings
from jflow.types import Array, Event

Dtype = Any
MLPS = ("gelu", "swiglu")


def one_array(x: Event) -> Array:
    """The event as an array.

    Raises:
      TypeError: if it is not one floating-point array.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"x: expected one floating-point array, got {type(x).__name__}")
    checks.floating("x", x)
    return jnp.asarray(x)


def image(x: Event) -> Array:
    """The event as an image ``[H, W, C]``; an event ``[H, W]`` has one channel.

    Raises:
      TypeError: if it is not one floating-point array.
      ValueError: if it has other axes, or one of length 0.
    """
    x = one_array(x)
    if x.ndim not in (2, 3) or not x.size:
        raise ValueError(f"x: expected one image [H, W, C] or [H, W] (jax.vmap over a batch), got shape {x.shape}")
    return x if x.ndim == 3 else x[..., None]


def normalise(h: Array, norm: str | None = "rms", epsilon: float = 1e-6) -> Array:
    r"""The vectors along the last axis of h over their root mean square, without parameters.

    .. math:: h \Big/ \sqrt{\tfrac{1}{D} \textstyle\sum_i h_i^2 + \epsilon}

    Args:
      h: ``[..., D]``.
      norm: 'rms'; 'layer', which subtracts the mean over D first; or None, which returns h.
      epsilon: the number under the root.

    Returns:
      An array of the shape and dtype of h; the statistics are computed in float32 at least.
    """
    if norm is None:
        return h
    wide = embeddings.at_least_float32("h", h)
    if norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + epsilon)).astype(h.dtype)


def per_channel(vector: Array, h: Array) -> Array:
    """A vector of the last axis of h, with the axes of h before it: jax's strict rank promotion adds none."""
    return vector.reshape((1,) * (h.ndim - 1) + vector.shape)


def scale_and_shift(h: Array, a: Array, d: Array) -> Array:
    """(1 + a) h + d, with vectors a and d of the last axis of h."""
    return (1 + per_channel(a, h)) * h + per_channel(d, h)
