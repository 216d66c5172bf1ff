r"""Mixer: an MLP-Mixer on windows of an image, modulated by two times and conditions; a network of matmuls alone.

Matmuls and their derivatives are fast on every device. On a CPU this is the network of images to choose: gradients of
convolutions are slow there.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jflow import checks
from jflow.nets import conditioning, layers
from jflow.types import Array, Cond

Dtype = Any


class Mixer(layers.ImageNetwork):
    r"""An MLP-Mixer (2105.01601) of one image on windows that may overlap.

    With h_0 the N windows of x times a matrix, and :math:`\mathrm{rms}` the normalisation of each token, layer i is

    .. math::

        h &\leftarrow h + g_1\, \mathrm{MLP}_\text{tokens}\big( (1 + a_1)\, \mathrm{rms}(h) + d_1 \big), \\
        h &\leftarrow h + g_2\, \mathrm{MLP}_\text{channels}\big( (1 + a_2)\, \mathrm{rms}(h) + d_2 \big),

    where MLP_tokens mixes the N tokens of each channel, MLP_channels the channels of each token, and the vectors a, d and g
    are linear in silu(c) and start at zero (adaLN-zero). c(s, t, cond) is that of ``nets.conditioning``. The output is a
    matrix of :math:`(1 + a)\, \mathrm{rms}(h) + d`, the overlapping windows of which are added. It starts at zero.

    With ``decoupled`` above 0 (2510.24474), the last ``decoupled`` layers and the output see c(t, t), and the layers before
    them c(s, s), as in ``MLP``. The parameters do not depend on ``decoupled``, and for s = t neither does the output.

    For windows of P = window^2 C entries, N tokens, D features, widths K (tokens) and H (channels) and a trunk of T,
    matmuls cost

    .. math::

        4 N P D + \text{depth}\,(4 N K D + 4 N D H + 12\, T D) + 4\, T D + \text{conditioning} \quad \text{FLOPs.}

    Parameters are kept in ``param_dtype`` and used in ``dtype``; embeddings, conditions and normalisations are computed in
    float32, or float64 if the times are.

    Attributes:
      window: the side of a window, a multiple of the stride.
      stride: the distance of windows; equal to ``window`` for patches.
      features: the number D of channels of a token.
      depth: the number of layers.
      tokens_hidden: the width K of the perceptron over the tokens.
      channels_hidden: the width H of that over the channels.
      trunk: the size T of c.
      decoupled: the number of last layers that see the target time only, less than ``depth``.
      num_classes, cond_features, time_features, second, max_frequency, scalar_features, param_dtype: as of
        ``nets.conditioning.Conditioned``.
      remat: whether the gradient recomputes the layers.
      unroll: the number of layers in an iteration of the loop over them. On a CPU the gradient of a loop is slow, twice as
        slow for 5 layers; 1 gives the smallest program.
      zero_init: whether the output layer starts at zero.
      dtype: the dtype of the matmuls; None for that of x.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> net = nets.Mixer(window=4, stride=2, features=8, depth=2, tokens_hidden=8, channels_hidden=8, num_classes=10)
      >>> x = jnp.zeros((8, 8), jnp.float32)
      >>> params = jax.jit(net.init)(jax.random.key(0), 0.0, 1.0, x)
      >>> jax.jit(net.apply)(params, 0.0, 1.0, x, 3).shape, net.null_label
      ((8, 8), 10)
    """

    window: int = 8
    stride: int = 4
    features: int = 128
    depth: int = 4
    tokens_hidden: int = 64
    channels_hidden: int = 160
    trunk: int = 64
    unroll: int = 8

    def __post_init__(self) -> None:
        """Checks the fields at construction."""
        layers.check_numbers(self, "window stride features depth tokens_hidden channels_hidden trunk unroll")
        checks.integer("decoupled", self.decoupled, high=self.depth - 1)
        if self.window % self.stride:
            raise ValueError(f"window: expected a multiple of the stride {self.stride}, got {self.window}")
        super().__post_init__()

    def _output_of(self, picture: Array, s: Array, t: Array, cond: Cond, dtype: Dtype) -> Array:
        dtypes = {"dtype": dtype, "param_dtype": self.param_dtype}
        c = self._conditioned(self.features, s, t, cond)
        parts = layers.windows(picture, self.window, self.stride)
        h = nn.Dense(self.features, **dtypes, name="input")(parts.reshape(-1, parts.shape[-1]))
        fields = {"tokens_hidden": self.tokens_hidden, "channels_hidden": self.channels_hidden, **dtypes}
        by_layer = conditioning.over_layers(c, self.depth, self.decoupled) if self.decoupled else c
        h = layers.stack(_MixerLayer, self.depth, h, by_layer, remat=self.remat, unroll=self.unroll, fields=fields)
        out = layers.readout(self, h, c[-1], parts.shape[-1], dtype)
        return layers.overlap_add(out.reshape(parts.shape), picture.shape, self.window, self.stride)


class _MixerLayer(nn.Module):
    """A layer of ``Mixer``: (h [N, D], c) -> (h, None)."""

    tokens_hidden: int
    channels_hidden: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, h: Array, c: Array) -> tuple[Array, None]:
        tokens, features = h.shape
        a, d, g, b, e, f = layers.modulation(c, 6, features, self.dtype, self.param_dtype, "modulation")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mix = layers.Perceptron(tokens, self.tokens_hidden, "gelu", **dtypes, name="tokens")
        h = h + layers.per_channel(g, h) * mix(layers.scale_and_shift(layers.normalise(h), a, d).T).T
        mix = layers.Perceptron(features, self.channels_hidden, "gelu", **dtypes, name="channels")
        return h + layers.per_channel(f, h) * mix(layers.scale_and_shift(layers.normalise(h), b, e)), None
