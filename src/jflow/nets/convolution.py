r"""Convolutions of one image, by XLA's convolution or by matmuls.

XLA differentiates a convolution by other convolutions. On a CPU these are slow, so ``method='matmul'`` writes a convolution
as the shifted images side by side, times a matrix. The values agree up to rounding, and so do all derivatives.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import checks
from jflow.types import Array

Dtype = Any
METHODS = ("lax", "matmul")


def convolve(x: Array, kernel: Array, method: str = "lax") -> Array:
    """The convolution of an image with a kernel of odd side, padded with zeros to the size of the image.

    Args:
      x: ``[H, W, C]``.
      kernel: ``[k, k, C, D]``, of the dtype of x.
      method: 'lax' (``jax.lax.conv_general_dilated``) or 'matmul'. The latter needs memory for k^2 images.

    Returns:
      ``[H, W, D]``. It costs 2 k^2 C D H W FLOPs as a matmul; 'lax' saves the products with the padding.

    Raises:
      ValueError: if the shapes do not match, or k is even.
    """
    checks.choice("method", method, METHODS)
    checks.shape("x", x, (None, None, None))
    side = kernel.shape[0]
    checks.shape("kernel", kernel, (side, side, x.shape[2], None))
    if not side % 2:
        raise ValueError(f"kernel: expected an odd side, got {side}")
    if side == 1:
        return x @ kernel[0, 0]
    if method == "lax":
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers)[0]
    around, (height, width, _) = side // 2, x.shape
    padded = jnp.pad(x, ((around, around), (around, around), (0, 0)))
    shifted = [padded[i : i + height, j : j + width] for i in range(side) for j in range(side)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[3])


class Convolution(nn.Module):
    """A convolution with a bias.

    Attributes:
      features: the number of output channels.
      side: the side of the kernel, odd.
      method: 'lax' or 'matmul' (``convolve``).
      zero_init: whether the kernel starts at zero.
      dtype, param_dtype: the dtypes of the convolution and of the parameters.
    """

    features: int
    side: int
    method: str
    dtype: Dtype
    param_dtype: Dtype
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The convolution of ``[H, W, C]``, ``[H, W, features]``."""
        init = nn.initializers.zeros_init() if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (self.side, self.side, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
        out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.method)
        return out + bias.astype(self.dtype)[None, None]


def halve(x: Array) -> Array:
    """The means of blocks of 2 x 2 entries of an image with even sides."""
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))


def double(x: Array) -> Array:
    """Each entry of an image as a block of 2 x 2 entries."""
    height, width, channels = x.shape
    blocks = jnp.broadcast_to(x[:, None, :, None], (height, 2, width, 2, channels))
    return blocks.reshape(2 * height, 2 * width, channels)
