r"""UNet: residual blocks of convolutions at several resolutions, modulated by two times and conditions.

``UNet.magnitude_preserving()`` is the network of EDM2 (2312.02696).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import checks
from jflow.nets import conditioning, convolution, layers, magnitude
from jflow.nets.attention import attention
from jflow.types import Array, Cond

Dtype = Any


class UNet(layers.ImageNetwork):
    r"""A convolutional network of one image [H, W, C] or [H, W], of any size and number of channels.

    The image is padded with zeros to a multiple of 2^(levels - 1), and the output is cropped. Level l has
    ``features * multipliers[l]`` channels and a 2^l times lower resolution (means of 2 x 2 entries). Every level has
    ``blocks`` residual blocks on the way down, and as many on the way up, each with the output of its counterpart beside
    its input; two more are between. A block is

    .. math::

        h = W_1 * \mathrm{silu}(\mathrm{rms}(x)), \qquad
        y = \mathrm{skip}(x) + W_2 * \mathrm{silu}\big( (1 + a)\, \mathrm{rms}(h) + d \big),

    followed by attention over the entries at the levels of ``attention``. rms normalises the channels of each entry; a and
    d are linear in silu(c(s, t, cond)), the vector of ``nets.conditioning``, and start at zero, as do W_2 and the output
    layer.

    With ``mp=True`` the magnitudes of activations are preserved: weights are normalised at use, there are no biases, sums and
    concatenations are weighted, and the blocks of the way down normalise their input (EDM2). The vector c is normalised, and
    modulates by (1 + gain a), with a gain that starts at zero. The output has a gain that starts at zero. Train it with
    ``training.forced_weight_normalisation``.

    With ``decoupled`` above 0 (2510.24474), the last ``decoupled`` blocks and the output see the target time only, through
    c(t, t), and the other blocks c(s, s). The parameters do not depend on ``decoupled``, and for s = t neither does the
    output.

    A block from C to D channels on n entries costs 18 n (C D + D^2) FLOPs in convolutions, 2 n C D in the skip if C is not
    D, and 4 T D in the modulation (2 T D with ``mp``). Attention costs 8 n D^2 + 4 n^2 D.

    Attributes:
      features: the number of channels of the first level.
      multipliers: the channels of each level over ``features``.
      blocks: the number of residual blocks of a level, in each direction.
      attention: the levels with attention, such as (2,).
      heads: the number of heads of attention.
      mp: whether the network preserves magnitudes.
      convolution: 'lax' or 'matmul'. With equal values, 'matmul' has fast derivatives on a CPU, and needs memory for 9 images.
      trunk: the size T of c; 0 for ``features``.
      decoupled: the number of last blocks that see the target time only.
      num_classes, cond_features, time_features, second, max_frequency, scalar_features, param_dtype: as of
        ``nets.conditioning.Conditioned``.
      remat: whether the gradient recomputes the blocks.
      zero_init: whether the output layer starts at zero.
      dtype: the dtype of the convolutions; None for that of x.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> net = nets.UNet(features=4, multipliers=(1, 2), blocks=1)
      >>> x = jnp.zeros((7, 5, 3), jnp.float32)
      >>> params = jax.eval_shape(net.init, jax.random.key(0), 0.0, 1.0, x)
      >>> jax.eval_shape(net.apply, params, 0.0, 1.0, x).shape
      (7, 5, 3)
    """

    features: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    heads: int = 4
    mp: bool = False
    convolution: str = "lax"

    @classmethod
    def magnitude_preserving(cls, **fields: Any) -> UNet:
        """The network of EDM2: ``mp=True``.

        Args:
          **fields: the fields of ``UNet``; they override the preset.
        """
        return cls(**{"mp": True, **fields})

    def __post_init__(self) -> None:
        """Checks the fields at construction."""
        layers.check_numbers(self, "features blocks heads")
        checks.choice("convolution", self.convolution, convolution.METHODS)
        for name in ("multipliers", "attention"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise TypeError(f"{name}: expected a tuple of whole numbers, got {getattr(self, name)!r}")
        if not self.multipliers:
            raise ValueError("multipliers: expected at least one level, got ()")
        for multiplier in self.multipliers:
            checks.integer("multipliers", multiplier, low=1)
        for level in self.attention:
            checks.integer("attention", level, high=len(self.multipliers) - 1)
            if self.features * self.multipliers[level] % self.heads:
                raise ValueError(f"heads: expected a divisor of the channels of level {level}, got {self.heads}")
        checks.integer("decoupled", self.decoupled, high=self.total_blocks - 1)
        super().__post_init__()

    @property
    def total_blocks(self) -> int:
        """The number of residual blocks."""
        return 2 * self.blocks * len(self.multipliers) + 2

    def _output_of(self, picture: Array, s: Array, t: Array, cond: Cond, dtype: Dtype) -> Array:
        found = self._conditioned(self.features, s, t, cond)
        found = [layers.normalise(c) if self.mp else c for c in found]
        by_block = iter(conditioning.over_layers(found, self.total_blocks, self.decoupled))
        last = len(self.multipliers) - 1
        h, crop = _padded(picture, 2**last)
        if self.mp:
            # A channel of ones in place of a bias.
            h = jnp.concatenate([h, jnp.ones_like(h[..., :1])], axis=-1)
        h = self._convolution("input", self.features, dtype)(h)
        skips = []
        for level in range(last + 1):
            h = convolution.halve(h) if level else h
            for i in range(self.blocks):
                h = self._block(f"down_{level}_{i}", level, dtype, encoder=True)(h, next(by_block))
                skips.append(h)
        for i in range(2):
            h = self._block(f"middle_{i}", last, dtype)(h, next(by_block))
        for level in reversed(range(last + 1)):
            h = convolution.double(h) if level < last else h
            for i in range(self.blocks):
                h = magnitude.mp_concatenate(h, skips.pop()) if self.mp else jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._block(f"up_{level}_{i}", level, dtype)(h, next(by_block))
        return self._output(h, found[-1], picture.shape[2], dtype)[crop]

    def _output(self, h: Array, c: Array, channels: int, dtype: Dtype) -> Array:
        if self.mp:
            init = nn.initializers.zeros_init() if self.zero_init else nn.initializers.ones_init()
            gain = self.param("output_gain", init, (), self.param_dtype)
            return self._convolution("output", channels, dtype)(h, gain)
        a, d = layers.modulation(c, 2, h.shape[-1], dtype, self.param_dtype, "output_modulation")
        h = jax.nn.silu(layers.scale_and_shift(layers.normalise(h), a, d))
        return self._convolution("output", channels, dtype, zero_init=self.zero_init)(h)

    def _convolution(self, name: str, features: int, dtype: Dtype, **fields: Any) -> Any:
        cls = magnitude.MPConvolution if self.mp else convolution.Convolution
        return cls(features, 3, self.convolution, dtype, self.param_dtype, **fields, name=name)

    def _block(self, name: str, level: int, dtype: Dtype, *, encoder: bool = False) -> Any:
        kind = _MPBlock if self.mp else _Block
        return (nn.remat(kind) if self.remat else kind)(
            features=self.features * self.multipliers[level],
            heads=self.heads if level in self.attention else 0,
            method=self.convolution,
            encoder=encoder,
            dtype=dtype,
            param_dtype=self.param_dtype,
            name=name,
        )


class _Block(nn.Module):
    """A residual block: (x [H, W, C], c) -> [H, W, features]; ``heads`` is 0 without attention."""

    features: int
    heads: int
    method: str
    encoder: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        rest = (self.method, self.dtype, self.param_dtype)
        a, d = layers.modulation(c, 2, self.features, self.dtype, self.param_dtype, "modulation")
        h = jax.nn.silu(layers.normalise(x))
        h = convolution.Convolution(self.features, 3, *rest, name="first")(h)
        h = jax.nn.silu(layers.scale_and_shift(layers.normalise(h), a, d))
        h = convolution.Convolution(self.features, 3, *rest, zero_init=True, name="second")(h)
        if x.shape[-1] != self.features:
            x = convolution.Convolution(self.features, 1, *rest, name="skip")(x)
        x = x + h
        if not self.heads:
            return x
        h = layers.normalise(x).reshape(-1, self.features)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = nn.Dense(3 * self.features, **dtypes, name="qkv")(h).reshape(
            -1, 3, self.heads, self.features // self.heads
        )
        q, k = layers.normalise(qkv[:, 0]), layers.normalise(qkv[:, 1])
        h = attention(q, k, qkv[:, 2]).reshape(-1, self.features)
        zero = nn.initializers.zeros_init()
        return x + nn.Dense(self.features, **dtypes, kernel_init=zero, name="attended")(h).reshape(x.shape)


class _MPBlock(nn.Module):
    """A residual block of EDM2, with the fields of ``_Block``; ``encoder``: whether it normalises its input."""

    features: int
    heads: int
    method: str
    encoder: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        def layer(name: str, features: int, side: int) -> magnitude.MPConvolution:
            return magnitude.MPConvolution(features, side, self.method, self.dtype, self.param_dtype, name=name)

        if self.encoder:
            x = layer("skip", self.features, 1)(x) if x.shape[-1] != self.features else x
            x = magnitude.pixel_norm(x)
        h = layer("first", self.features, 3)(magnitude.mp_silu(x))
        gain = self.param("gain", nn.initializers.zeros_init(), (), self.param_dtype)
        scale = 1 + layer("modulation", self.features, 0)(magnitude.mp_silu(c), gain)
        h = magnitude.mp_silu(layers.per_channel(scale, h) * h)
        h = layer("second", self.features, 3)(h)
        if x.shape[-1] != self.features:
            x = layer("skip", self.features, 1)(x)
        x = magnitude.mp_sum(x, h, 0.3)
        if not self.heads:
            return x
        qkv = layer("qkv", 3 * self.features, 0)(x).reshape(-1, 3, self.heads, self.features // self.heads)
        q, k, v = (magnitude.pixel_norm(qkv[:, i]) for i in range(3))
        h = attention(q, k, v).reshape(x.shape)
        return magnitude.mp_sum(x, layer("attended", self.features, 0)(h), 0.3)


def _padded(x: Array, multiple: int) -> tuple[Array, tuple[slice, slice]]:
    """The image padded with zeros to multiples of a number, and the slices that undo it."""
    missing = [-length % multiple for length in x.shape[:2]]
    pads = [(m // 2, m - m // 2) for m in missing]
    crop = tuple(slice(low, low + length) for (low, _), length in zip(pads, x.shape[:2], strict=True))
    return jnp.pad(x, (*pads, (0, 0))), (crop[0], crop[1])
