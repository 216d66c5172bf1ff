r"""DiT: a transformer on patches of an image, conditioned on two times, a label and numbers.

The conditions modulate the layers (adaLN-zero), or are tokens that the patches attend to (``conditions='tokens'``).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow import checks
from jflow.nets import conditioning, layers
from jflow.nets.attention import angles_2d, attention, rotate
from jflow.types import Array, Cond

Dtype = Any
CONDITIONS = ("adaln", "tokens")
POSITIONS = ("learned", "rotary", "both")


class DiT(layers.ImageNetwork):
    r"""A diffusion transformer (2212.09748) of one image [H, W, C] or [H, W], of any size and number of channels.

    The image is padded to patches of patch x patch entries, and the output is cropped. Layer i is

    .. math::

        h &\leftarrow h + g_1\, W_o\, \mathrm{attention}(q, k, v), \qquad [q, k, v] = W\, \big( (1 + a_1)\, \mathrm{rms}(h)
        + d_1 \big), \\ h &\leftarrow h + g_2\, \mathrm{MLP}\big( (1 + a_2)\, \mathrm{rms}(h) + d_2 \big),

    where queries and keys are RMS-normalised head by head, with learned scales. With ``conditions='adaln'``, the vectors a,
    d and g are linear in silu(c(s, t, cond)) and start at zero (adaLN-zero). With ``conditions='tokens'`` (improved MeanFlow,
    2512.02012), every condition is ``condition_tokens`` tokens before those of the patches; a, d and g are then learned
    vectors, g starts at zero, and no parameters are spent on modulation. The output layer starts at zero in both.

    ``bottleneck`` above 0 makes the patch embedding a product of two matrices of this rank, without an activation (JiT,
    2511.13720; pixel MeanFlow, 2601.22158), for large patches of pixels.

    With ``decoupled`` above 0 (2510.24474), the last ``decoupled`` layers and the output see c(t, t), and the layers before
    them c(s, s), as in ``MLP``; with tokens, the embeddings of (t, t) take the place of those of (s, s) at the first of
    these layers. The parameters do not depend on ``decoupled``, and for s = t neither does the output.

    For N tokens of D features, of them M of patches, with P = patch^2 C entries, a perceptron of width H (``mlp_ratio`` D,
    or two thirds of it with 'swiglu') and a trunk of T, matmuls cost

    .. math::

        4 M P D + \text{depth}\,(8 N D^2 + 4 N^2 D + 4 N D H + 12\, T D) + 4\, T D + \text{conditioning} \quad \text{FLOPs},

    with 6 N D H for 'swiglu', without the two terms of T for 'tokens', and 2 M (P + D) b instead of one 2 M P D with a
    bottleneck b.

    Parameters are kept in ``param_dtype`` and used in ``dtype``; embeddings, conditions, normalisations and softmax are
    computed in float32, or float64 if the times are.

    Attributes:
      patch: the side of a patch.
      features: the width D, a multiple of ``heads``.
      depth: the number of layers.
      heads: the number of heads. With rotary positions, features/heads must be a multiple of 4.
      mlp_ratio: the width of the perceptron over D.
      mlp: 'gelu' or 'swiglu'.
      positions: 'learned' (a parameter for each patch, so all images have one size), 'rotary' (by row and column,
        2104.09864), or 'both'.
      conditions: 'adaln' or 'tokens'.
      condition_tokens: the number of tokens of each condition, with 'tokens'.
      bottleneck: the rank of the patch embedding; 0 for a full matrix.
      trunk: the size T of c; 0 for ``features``.
      decoupled: the number of last layers that see the target time only, less than ``depth``.
      num_classes, cond_features, time_features, second, max_frequency, scalar_features, param_dtype: as of
        ``nets.conditioning.Conditioned``.
      remat: whether the gradient recomputes the layers.
      unroll: the number of layers in an iteration of the loop over them.
      zero_init: whether the output layer starts at zero.
      dtype: the dtype of the matmuls; None for that of x.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> net = nets.DiT(patch=4, features=8, depth=2, heads=2, num_classes=10)
      >>> x = jnp.zeros((8, 6, 3), jnp.float32)
      >>> params = jax.jit(net.init)(jax.random.key(0), 0.0, 1.0, x)
      >>> jax.jit(net.apply)(params, 0.0, 1.0, x, net.null_label).shape
      (8, 6, 3)
    """

    patch: int = 2
    features: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    positions: str = "learned"
    conditions: str = "adaln"
    condition_tokens: int = 4
    bottleneck: int = 0
    unroll: int = 1

    @classmethod
    def in_context(cls, **fields: Any) -> DiT:
        """The transformer of improved and pixel MeanFlow: conditions as tokens, SwiGLU, rotary and learned positions.

        Args:
          **fields: the fields of ``DiT``; they override the preset.
        """
        return cls(**{"conditions": "tokens", "mlp": "swiglu", "positions": "both", **fields})

    @classmethod
    def base(cls, **fields: Any) -> DiT:
        """DiT-B: 12 layers of 768 features with 12 heads. The defaults of the class are DiT-S."""
        return cls(**{"features": 768, "depth": 12, "heads": 12, **fields})

    @classmethod
    def large(cls, **fields: Any) -> DiT:
        """DiT-L: 24 layers of 1,024 features with 16 heads."""
        return cls(**{"features": 1024, "depth": 24, "heads": 16, **fields})

    @classmethod
    def extra_large(cls, **fields: Any) -> DiT:
        """DiT-XL: 28 layers of 1,152 features with 16 heads."""
        return cls(**{"features": 1152, "depth": 28, "heads": 16, **fields})

    def __post_init__(self) -> None:
        """Checks the fields at construction."""
        layers.check_numbers(self, "patch features depth heads condition_tokens unroll")
        checks.integer("bottleneck", self.bottleneck)
        checks.number("mlp_ratio", self.mlp_ratio, low=0.0, open_low=True)
        checks.choice("mlp", self.mlp, layers.MLPS)
        checks.choice("positions", self.positions, POSITIONS)
        checks.choice("conditions", self.conditions, CONDITIONS)
        checks.integer("decoupled", self.decoupled, high=self.depth - 1)
        multiple = self.heads * (1 if self.positions == "learned" else 4)
        if self.features % multiple:
            raise ValueError(
                f"features: expected a multiple of {multiple} with heads={self.heads} and "
                f"positions={self.positions!r}, got {self.features}"
            )
        super().__post_init__()

    def _output_of(self, picture: Array, s: Array, t: Array, cond: Cond, dtype: Dtype) -> Array:
        h, rows, columns = self._patches(picture, dtype)
        tokens = self.conditions == "tokens"
        if tokens:
            first, by_layer = self._condition_tokens(s, t, cond, dtype)
            h, last, before = jnp.concatenate([first, h]), None, first.shape[0]
        else:
            c = self._conditioned(self.features, s, t, cond)
            by_layer = conditioning.over_layers(c, self.depth, self.decoupled) if self.decoupled else c
            last, before = c[-1], 0
        fields = {
            "heads": self.heads,
            "hidden": layers.hidden_width(self.features, self.mlp_ratio, self.mlp),
            "mlp": self.mlp,
            "angles": None if self.positions == "learned" else (rows, columns, before),
            "modulated": not tokens,
            "dtype": dtype,
            "param_dtype": self.param_dtype,
        }
        h = layers.stack(DiTLayer, self.depth, h, by_layer, remat=self.remat, unroll=self.unroll, fields=fields)[
            before:
        ]
        size = self.patch**2 * picture.shape[2]
        out = layers.readout(self, h, last, size, dtype).reshape(rows, columns, size)
        return layers.overlap_add(out, picture.shape, self.patch, self.patch)

    def _patches(self, picture: Array, dtype: Dtype) -> tuple[Array, int, int]:
        """The embedded patches ``[rows * columns, features]``, and the numbers of rows and columns."""
        dtypes = {"dtype": dtype, "param_dtype": self.param_dtype}
        h = layers.windows(picture, self.patch, self.patch)
        rows, columns = h.shape[:2]
        h = h.reshape(rows * columns, -1)
        if self.bottleneck:
            h = nn.Dense(self.bottleneck, use_bias=False, **dtypes, name="bottleneck")(h)
        h = nn.Dense(self.features, **dtypes, name="input")(h)
        if self.positions != "rotary":
            shape = (rows * columns, self.features)
            learned = self.param("positions_learned", nn.initializers.normal(0.02), shape, self.param_dtype)
            h = h + learned.astype(dtype)
        return h, rows, columns

    def _condition_tokens(self, s: Array, t: Array, cond: Cond, dtype: Dtype) -> tuple[Array, list[Array]]:
        """The tokens at the input, and what each layer adds to them: the difference of (t, t) and (s, s), at one layer."""
        make = conditioning.ConditionTokens(
            features=self.features,
            count=self.condition_tokens,
            **self.conditioning_fields(),
            name="condition_tokens_of",
        )
        found = [make(*pair, cond) for pair in conditioning.pairs(s, t, self.decoupled)]
        none = jnp.zeros_like(found[0]).astype(dtype)
        if not self.decoupled:
            return found[0].astype(dtype), [none[:0]]
        change = (found[1] - found[0]).astype(dtype)
        at = self.depth - self.decoupled
        return found[0].astype(dtype), [change if i == at else none for i in range(self.depth)]


class DiTLayer(nn.Module):
    """A layer of ``DiT``: (h [N, D], c) -> (h, None).

    Attributes:
      heads, hidden, mlp: the number of heads, the width of the perceptron, and its activation.
      angles: (rows, columns, tokens before them) of rotary positions, or None.
      modulated: whether c modulates the layer; else c is added to the first tokens.
      dtype, param_dtype: the dtypes of the matmuls and of the parameters.
    """

    heads: int
    hidden: int
    mlp: str
    angles: tuple[int, int, int] | None
    modulated: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, h: Array, c: Array) -> tuple[Array, None]:
        """The layer's output."""
        features = h.shape[-1]
        if self.modulated:
            a, d, g, b, e, f = layers.modulation(c, 6, features, self.dtype, self.param_dtype, "modulation")
        else:
            zero = nn.initializers.zeros_init()
            learned = self.param("modulation", zero, (6, features), self.param_dtype)
            a, d, g, b, e, f = learned.astype(self.dtype)
            h = h.at[: c.shape[0]].add(c) if c.shape[0] else h
        h = h + layers.per_channel(g, h) * self._attention(layers.scale_and_shift(layers.normalise(h), a, d))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mlp = layers.Perceptron(features, self.hidden, self.mlp, **dtypes, name="mlp")
        return h + layers.per_channel(f, h) * mlp(layers.scale_and_shift(layers.normalise(h), b, e)), None

    def _attention(self, h: Array) -> Array:
        features, size = h.shape[-1], h.shape[-1] // self.heads
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = nn.Dense(3 * features, **dtypes, name="qkv")(h).reshape(-1, 3, self.heads, size)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        q, k = (self._normalised(name, value) for name, value in (("query", q), ("key", k)))
        if self.angles is not None:
            rows, columns, before = self.angles
            angles = jnp.asarray(angles_2d(rows, columns, size, before=before))
            q, k = rotate(q, angles), rotate(k, angles)
        out = attention(q, k, v).reshape(-1, features)
        return nn.Dense(features, **dtypes, name="attended")(out)

    def _normalised(self, name: str, value: Array) -> Array:
        one = nn.initializers.ones_init()
        scale = self.param(f"{name}_scale", one, (value.shape[-1],), self.param_dtype)
        return layers.per_channel(scale.astype(self.dtype), value) * layers.normalise(value)
