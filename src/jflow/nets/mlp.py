r"""A multilayer perceptron net(s, t, x, cond) of two times and one sample, with an output shaped like x.

There are two presets. ``MLP()`` embeds the times and modulates every layer with them; it suits points and small images (8x8).
``MLP.plain()`` is the network of the published two-dimensional experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.nets import conditioning, embeddings
from jflow.nets.layers import normalise, one_array
from jflow.types import Cond

Array = jax.Array
Dtype = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}
CONDITIONINGS = ("film", "concat")
TIMES = ("sinusoidal", "raw")
POINTS = ("raw", "octaves", "fourier")
NORMS = (None, "rms", "layer")


class MLP(conditioning.Labelled, nn.Module):
    r"""A multilayer perceptron of one sample with ``depth`` hidden layers.

    The layers are

    .. math::

        h_1 &= W_1 p(x) + b_1, \\
        h_{i+1} &= W_{i+1}\, g_i(h_i) + b_{i+1} \quad (+\, h_i \text{ if residual}), \qquad i = 1, \dots, \text{depth} - 1, \\
        \mathrm{net} &= W_\text{out}\, g_\text{depth}(h_\text{depth}) + b_\text{out},

    where p(x) are features of x. With ``conditioning='film'``

    .. math::

        g_i(h) = \mathrm{act}\big( (1 + a_i(c))\, \mathrm{norm}(h) + d_i(c) \big), \qquad c = \mathrm{act}(W_c e + b_c),
        \qquad e = [\phi(s), \phi(t - s), \text{label}, \text{other conditions}],

    where a_i and d_i are linear layers. With ``conditioning='concat'``, g_i(h) = act(norm(h)), and the input of the first layer
    is [p(x), e]. The vector c is the trunk, of width ``trunk``. A vmapped network computes a trunk for each sample, so the
    trunk is narrow, and the matmuls of features x features dominate the cost. The pair (s, t - s) is MeanFlow's (2505.13447).

    W_out and b_out start at zero, so a flow map in the v-formulation starts as the identity. The first gradient is then
    zero for all other parameters.

    With ``decoupled`` above 0 (2510.24474), the last ``decoupled`` layers depend on the target time only, through c(t, t)
    in place of c(s, t), and the other layers on the source time only, through c(s, s). The parameters do not depend on
    ``decoupled``, and for s = t neither does the output. Parameters of a velocity trained with s = t can therefore be used
    unchanged. The derivative in t passes through the last layers only.

    The condition is a label, floating-point numbers, or both (``jflow.nets.conditioning``). The null label ``net.null_label``,
    which is ``num_classes``, is also used if there is no label (``cond=None``). Outside the range a concrete label raises an
    error, and a traced one gives NaN. Floating-point leaves (a guidance scale, an observation) are flattened and
    concatenated to ``cond_features`` numbers.

    Parameters are kept in ``param_dtype`` and used in ``dtype``. The embeddings and the trunk are computed in float32, or in
    float64 if a time is float64. The output has the dtype of x.

    Attributes:
      features: the width of the hidden layers.
      depth: the number of hidden layers; depth - 1 of their matmuls are features x features.
      activation: 'gelu' (tanh form) or 'silu'.
      conditioning: 'film' (scale and shift at every layer) or 'concat' (at the input).
      times: 'sinusoidal' (features of s and of t - s) or 'raw' (s and t themselves).
      time_features: the number of features of each time, even.
      max_frequency: their highest frequency, in cycles per unit of time. The derivatives in s and t grow with it.
      trunk: the width of the trunk.
      decoupled: the number of last hidden layers that depend on t only, less than depth; 0 if all layers depend on both
        times. It needs ``conditioning='film'``.
      points: the features of x: 'raw' (x itself), or x with 'octaves' or 'fourier' features.
      point_frequencies: the number of octaves, or of random frequencies.
      point_damping: at source time s, octave k is multiplied by exp(-(damping pi 2^k (1 - s))^2 / 2). This damps frequencies
        that the noise in x, of scale 1 - s, hides. 0 for no damping.
      point_scale: the standard deviation of the random frequencies, in cycles per unit of x.
      residual: whether each hidden layer except the first adds its input to its output.
      norm: None, 'rms' or 'layer': a normalisation of h before every activation, without parameters.
      num_classes: the number of labels, 0 for none.
      cond_features: the size of the floating-point condition, or a mapping from the names of its leaves to their sizes.
      zero_init: whether the output layer starts at zero.
      dtype: the dtype of the matmuls; None for that of x.
      param_dtype: the dtype of the parameters.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import nets
      >>> net = nets.MLP(features=8, depth=1)
      >>> x = jnp.zeros(2, jnp.float32)
      >>> params = net.init(jax.random.key(0), 0.0, 1.0, x)
      >>> net.apply(params, 0.0, 1.0, x).shape
      (2,)
    """

    features: int = 512
    depth: int = 5
    activation: str = "gelu"
    conditioning: str = "film"
    times: str = "sinusoidal"
    time_features: int = 32
    max_frequency: float = 2.0
    trunk: int = 64
    decoupled: int = 0
    points: str = "raw"
    point_frequencies: int = 4
    point_damping: float = 0.0
    point_scale: float = 0.5
    residual: bool = True
    norm: str | None = None
    num_classes: int = 0
    cond_features: conditioning.CondFeatures = 0
    zero_init: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @classmethod
    def plain(cls, **fields: Any) -> MLP:
        r"""The network of the published two-dimensional experiments (2505.18825): input (s, t, x), 5 x 512, GELU.

        It has no embeddings and no residual connections. Apart from the activations, a forward pass costs

        .. math::

            2 \cdot 512\, (d + 2) + 8 \cdot 512^2 + 2 \cdot 512\, d \quad \text{FLOPs.}

        Args:
          **fields: the fields of ``MLP``; they override the preset.
        """
        preset = {"conditioning": "concat", "times": "raw", "residual": False}
        return cls(**{**preset, **fields})

    def __post_init__(self) -> None:
        """Checks the fields at construction."""
        for name in ("features", "depth", "trunk", "time_features", "point_frequencies"):
            checks.integer(name, getattr(self, name), low=1)
        conditioning.check_fields(self.num_classes, self.cond_features)
        checks.choice("activation", self.activation, ACTIVATIONS)
        checks.choice("conditioning", self.conditioning, CONDITIONINGS)
        checks.choice("times", self.times, TIMES)
        checks.choice("points", self.points, POINTS)
        checks.choice("norm", self.norm, NORMS)
        # At least one layer must depend on s.
        checks.integer("decoupled", self.decoupled, high=self.depth - 1)
        if self.decoupled and self.conditioning != "film":
            raise ValueError(f"decoupled: expected 0 with conditioning={self.conditioning!r}, got {self.decoupled}")
        super().__post_init__()

    @nn.compact
    def __call__(self, s: Array | float, t: Array | float, x: Array, cond: Cond = None) -> Array:
        """net(s, t, x, cond).

        Args:
          s: source time, a scalar.
          t: target time, a scalar.
          x: one sample, of any event shape.
          cond: see the class.

        Returns:
          An array of the shape and dtype of x.

        Raises:
          ValueError: if s or t has axes, or the condition does not match ``num_classes`` and
            ``cond_features``.
          TypeError: if x is not a floating-point array.
        """
        x = one_array(x)
        dtype = jnp.dtype(self.dtype or x.dtype)
        act = ACTIVATIONS[self.activation]
        s, t = embeddings.times(s, t)
        conditions = self._conditions(cond, s.dtype)
        h = self._points(s, x.reshape(-1))
        if self.conditioning == "concat":
            # Keep the precision of the embeddings: the times must not be rounded to the compute dtype first.
            h = jnp.concatenate([h.astype(s.dtype), *self._embed(s, t), *conditions])
            h = self._dense("input", self.features, s.dtype)(h).astype(dtype)
            modulation = [None] * self.depth
        else:
            trunk = self._dense("trunk", self.trunk, s.dtype)
            pairs = conditioning.pairs(s, t, self.decoupled)
            trunks = [act(trunk(jnp.concatenate([*self._embed(*pair), *conditions]))).astype(dtype) for pair in pairs]
            h = self._dense("input", self.features, dtype)(h)
            layers = conditioning.over_layers(trunks, self.depth, self.decoupled)
            modulation = [self._dense(f"film_{i}", 2 * self.features, dtype)(c) for i, c in enumerate(layers)]
        for i in range(self.depth - 1):
            update = self._dense(f"hidden_{i}", self.features, dtype)(act(_modulate(h, modulation[i], self.norm)))
            h = h + update if self.residual else update
        h = act(_modulate(h, modulation[-1], self.norm))
        init = nn.initializers.zeros_init() if self.zero_init else nn.initializers.lecun_normal()
        return self._dense("output", x.size, dtype, init)(h).reshape(x.shape).astype(x.dtype)

    def _dense(self, name: str, features: int, dtype: Dtype, init: Any = None) -> nn.Dense:
        init = init or nn.initializers.lecun_normal()
        return nn.Dense(features, dtype=dtype, param_dtype=self.param_dtype, kernel_init=init, name=name)

    def _embed(self, s: Array, t: Array) -> list[Array]:
        """[phi(s), phi(t - s)]."""
        if self.times == "raw":
            return [jnp.stack([s, t])]
        return conditioning.times(s, t, self.time_features, highest=self.max_frequency)

    def _conditions(self, cond: Cond, dtype: Dtype) -> list[Array]:
        """The list [label, other conditions], in the precision of the embeddings."""
        label, other = conditioning.split(cond, self.num_classes, self.cond_features)
        parts = [leaf.reshape(-1).astype(dtype) for leaf in other]
        if not self.num_classes:
            return parts
        table = conditioning.label_table(self, self.num_classes, self.trunk, self.param_dtype)
        return [embeddings.label(table.astype(dtype), label, name="cond"), *parts]

    def _points(self, s: Array | float, x: Array) -> Array:
        if self.points == "octaves":
            waves = embeddings.octaves(x, self.point_frequencies)
            if not self.point_damping:
                return waves
            k = np.repeat(np.arange(self.point_frequencies), x.size)
            rate = jnp.asarray(self.point_damping * np.pi * 2.0 ** np.concatenate([k, k]), waves.dtype)
            damping = jnp.exp(-0.5 * (rate * (1.0 - jnp.asarray(s).astype(waves.dtype))) ** 2)
            return jnp.concatenate([waves[: x.size], damping * waves[x.size :]])
        if self.points == "fourier":
            return embeddings.random_fourier(x, 2 * self.point_frequencies, scale=self.point_scale)
        return x


def _modulate(h: Array, modulation: Array | None, norm: str | None) -> Array:
    """(1 + a) norm(h) + d with modulation = [a, d]."""
    h = normalise(h, norm)
    if modulation is None:
        return h
    a, d = jnp.split(modulation, 2)
    return (1 + a) * h + d
