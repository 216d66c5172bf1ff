r"""Layers that several networks share: normalisation, windows of an image, modulated perceptrons, and a stack of layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import checks
from jflow.nets import embeddings
from jflow.nets.conditioning import Conditioned, Conditioning, pairs
from jflow.types import Array, Cond, Event

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


def grid(shape: tuple[int, ...], stride: int) -> tuple[int, int]:
    """The numbers of rows and columns of windows on an image of shape [H, W, ...]: H and W over the stride, rounded up."""
    return -(-shape[0] // stride), -(-shape[1] // stride)


def windows(x: Array, window: int, stride: int) -> Array:
    """The windows of an image, for a matmul: patches if ``window`` is the stride, else they overlap.

    The image is padded with zeros on all sides, so that each entry is in at least one window: 28 x 28 has 49 windows of 8 x
    8 at stride 4. There are slices and reshapes only, which are cheap to differentiate.

    Args:
      x: ``[H, W, C]``.
      window: the side of a window, a multiple of the stride.
      stride: the distance of neighbouring windows.

    Returns:
      ``[rows, columns, window * window * C]``.
    """
    rows, columns = grid(x.shape, stride)
    overlap = window // stride
    pads = _pads(x.shape, window, stride)
    padded = jnp.pad(x, (*pads, (0, 0)))
    blocks = padded.reshape(rows + overlap - 1, stride, columns + overlap - 1, stride, x.shape[2])
    blocks = blocks.transpose(0, 2, 1, 3, 4).reshape(rows + overlap - 1, columns + overlap - 1, -1)
    parts = [blocks[i : i + rows, j : j + columns] for i in range(overlap) for j in range(overlap)]
    return parts[0] if overlap == 1 else jnp.concatenate(parts, axis=-1)


def overlap_add(values: Array, shape: tuple[int, ...], window: int, stride: int) -> Array:
    """The image of its windows: the transpose of ``windows``, over window/stride.

    Where windows overlap, (window/stride)^2 values are added; over window/stride, the sum of independent values keeps their
    variance.

    Args:
      values: ``[rows, columns, window * window * C]``.
      shape: that of the image, (H, W, C).
      window, stride: as of ``windows``.

    Returns:
      ``[H, W, C]``.
    """
    rows, columns = grid(shape, stride)
    overlap = window // stride
    parts = jnp.split(values, overlap**2, axis=-1)
    total = jnp.zeros((rows + overlap - 1, columns + overlap - 1, parts[0].shape[-1]), values.dtype)
    for index, part in enumerate(parts):
        i, j = divmod(index, overlap)
        total = total + jnp.pad(part, ((i, overlap - 1 - i), (j, overlap - 1 - j), (0, 0)))
    blocks = total.reshape(rows + overlap - 1, columns + overlap - 1, stride, stride, shape[2])
    padded = blocks.transpose(0, 2, 1, 3, 4).reshape(
        (rows + overlap - 1) * stride, (columns + overlap - 1) * stride, -1
    )
    (top, _), (left, _) = _pads(shape, window, stride)
    return padded[top : top + shape[0], left : left + shape[1]] / overlap


def _pads(shape: tuple[int, ...], window: int, stride: int) -> list[tuple[int, int]]:
    found = []
    for length, number in zip(shape[:2], grid(shape, stride), strict=True):
        missing = (number + window // stride - 1) * stride - length
        found.append((missing // 2, missing - missing // 2))
    return found


class Perceptron(nn.Module):
    """Two linear layers with an activation: 'gelu' (tanh form), or 'swiglu', silu(a) * b with [a, b] from the first layer.

    Attributes:
      features: the width of the output.
      hidden: the width between the layers.
      activation: 'gelu' or 'swiglu'; the latter costs 6 instead of 4 ``features * hidden`` FLOPs for each vector.
      dtype, param_dtype: the dtypes of the matmuls and of the parameters.
    """

    features: int
    hidden: int
    activation: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """The output for each vector along the last axis of h."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gated = self.activation == "swiglu"
        h = nn.Dense(self.hidden * (2 if gated else 1), **dtypes, name="hidden")(h)
        if gated:
            a, b = jnp.split(h, 2, axis=-1)
            h = jax.nn.silu(a) * b
        else:
            h = jax.nn.gelu(h)
        return nn.Dense(self.features, **dtypes, name="output")(h)


def hidden_width(features: int, ratio: float, activation: str) -> int:
    """The hidden width of a ``Perceptron``: ratio * features, or two thirds of it for 'swiglu', at the same cost."""
    return max(round(features * ratio * (2 / 3 if activation == "swiglu" else 1)), 1)


def modulation(c: Array, parts: int, features: int, dtype: Dtype, param_dtype: Dtype, name: str) -> list[Array]:
    """``parts`` vectors of a linear layer of silu(c) that starts at zero (adaLN-zero, 2212.09748); call it in a module."""
    zero = nn.initializers.zeros_init()
    dense = nn.Dense(parts * features, dtype=dtype, param_dtype=param_dtype, kernel_init=zero, name=name)
    return jnp.split(dense(jax.nn.silu(c).astype(dtype)), parts)


def stack(block: Any, depth: int, h: Array, by_layer: list[Array], *, remat: bool, unroll: int, fields: dict) -> Array:
    """Applies ``depth`` layers of one kind in a scan, so that the program does not grow with the depth; call it in a module.

    Args:
      block: the module of a layer, called as ``(h, c) -> (h, None)``.
      depth: the number of layers. Their parameters have a leading axis of this length, under the name "layers".
      h: the input of the first layer.
      by_layer: one array c for all layers, or one for each.
      remat: whether the gradient recomputes a layer instead of keeping its intermediate values (``flax.linen.remat``).
      unroll: the number of layers in an iteration of the loop; it has no effect on the parameters.
      fields: the fields of the block.
    """
    cls = nn.remat(block, prevent_cse=False) if remat else block
    same = len(by_layer) == 1
    axes: Any = nn.broadcast if same else 0
    scanned = nn.scan(
        cls,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=axes,
        length=depth,
        unroll=min(unroll, depth),
    )
    return scanned(**fields, name="layers")(h, by_layer[0] if same else jnp.stack(by_layer))[0]


def check_numbers(module: nn.Module, names: str) -> None:
    """Checks that these fields of a module are whole numbers of at least 1."""
    for name in names.split():
        checks.integer(name, getattr(module, name), low=1)


class ImageNetwork(Conditioned):
    """The base of networks of images: their common fields, and the call.

    A network defines ``_output_of(picture, s, t, cond, dtype)``, the output for an image [H, W, C] in the compute dtype.

    Attributes:
      trunk: the size T of c, the vector of ``nets.conditioning``; 0 for ``features``.
      decoupled: the number of last layers that see the target time only.
      remat: whether the gradient recomputes the layers.
      zero_init: whether the output layer starts at zero.
      dtype: the dtype of the matmuls; None for that of x.
      num_classes, ..., param_dtype: as of ``nets.conditioning.Conditioned``.
    """

    trunk: int = 0
    decoupled: int = 0
    remat: bool = False
    zero_init: bool = True
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Checks the fields at construction."""
        for name in ("trunk", "decoupled"):
            checks.integer(name, getattr(self, name))
        super().__post_init__()

    @nn.compact
    def __call__(self, s: Array | float, t: Array | float, x: Array, cond: Cond = None) -> Array:
        """net(s, t, x, cond).

        Args:
          s: source time, a scalar.
          t: target time, a scalar.
          x: one image, ``[H, W, C]`` or ``[H, W]``.
          cond: see ``nets.conditioning``.

        Returns:
          An array of the shape and dtype of x.

        Raises:
          ValueError: if a time has axes, x is not an image, or the condition does not match.
          TypeError: if x is not a floating-point array.
        """
        picture = image(x)
        dtype = jnp.dtype(self.dtype or x.dtype)
        s, t = embeddings.times(s, t)
        return self._output_of(picture.astype(dtype), s, t, cond, dtype).reshape(x.shape).astype(x.dtype)

    def _output_of(self, picture: Array, s: Array, t: Array, cond: Cond, dtype: Dtype) -> Array:
        raise NotImplementedError

    def _conditioned(self, features: int, s: Array, t: Array, cond: Cond) -> list[Array]:
        """The vectors c: [c(s, t)], or [c(s, s), c(t, t)] if the network is decoupled."""
        make = Conditioning(features=self.trunk or features, **self.conditioning_fields(), name="conditioning")
        return [make(*pair, cond) for pair in pairs(s, t, self.decoupled)]


def readout(module: Any, h: Array, c: Array | None, features: int, dtype: Dtype) -> Array:
    """The output layer of a network of tokens: a matrix of (1 + a) rms(h) + d; call it in the module.

    a and d are linear in silu(c), or learned vectors if c is None.
    """
    if c is None:
        zero = nn.initializers.zeros_init()
        a, d = module.param("output_modulation", zero, (2, h.shape[-1]), module.param_dtype).astype(dtype)
    else:
        a, d = modulation(c, 2, h.shape[-1], dtype, module.param_dtype, "output_modulation")
    init = nn.initializers.zeros_init() if module.zero_init else nn.initializers.lecun_normal()
    dense = nn.Dense(features, dtype=dtype, param_dtype=module.param_dtype, kernel_init=init, name="output")
    return dense(scale_and_shift(normalise(h), a, d))
