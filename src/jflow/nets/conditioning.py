r"""Conditioning of a network: two times, a class label with a null label, and floating-point conditions.

A condition is any pytree: an integer, an array, a dictionary or a NamedTuple. Its integer leaf is a **class label**, a scalar
from 0 to ``num_classes - 1``; there is at most one. ``num_classes`` itself is the **null label**, which stands for "no
label" and is used if the condition has none. ``network.null_label`` is the one place from which objectives and samplers
take it. The floating-point leaves (a guidance scale, the interval of guidance, an observation) are ``cond_features``
numbers in all, in the order of ``jax.tree.leaves``. If ``cond_features`` is a mapping from names to sizes, the leaves are
found by their names (keys of a dictionary, fields of a NamedTuple), and each name must be there with its size.

``Conditioning`` makes a vector of all this, and ``ConditionTokens`` makes tokens. The embeddings are computed in float32, or in
float64 if a time is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import checks
from jflow.nets import embeddings
from jflow.types import Array, Cond

Dtype = Any
CondFeatures = int | Mapping[str, int]

# The second time that a network sees beside s: the gap t - s, or the target t.
TIMES = ("gap", "target")
SCALARS = ("sinusoidal", "raw")


class Labelled:
    """A network with a field ``num_classes``; the base of all networks with labels."""

    num_classes: int

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", ``num_classes``; None if the network takes no labels."""
        return self.num_classes or None


def check_fields(num_classes: object, cond_features: object) -> None:
    """Checks the fields of a network that say which conditions it takes.

    Raises:
      TypeError: if a number is not an integer.
      ValueError: if a number is negative, or a size in a mapping is not positive.
    """
    checks.integer("num_classes", num_classes)
    if not isinstance(cond_features, Mapping):
        checks.integer("cond_features", cond_features)
        return
    for name, size in cond_features.items():
        checks.integer(f"cond_features[{name!r}]", size, low=1)


class Conditioned(Labelled, nn.Module):
    """The base of modules that embed two times and a condition: their common fields, which are checked at construction.

    Attributes:
      num_classes: the number of labels, 0 for none.
      cond_features: the size of the floating-point condition, or a mapping from the names of its leaves to their sizes.
      time_features: the number F of features of each time, even.
      second: whether the second time is the 'gap' t - s or the 'target' t.
      max_frequency: the highest frequency of the features, in cycles per unit of time.
      scalar_features: the number of sinusoidal features of each floating-point number (``scalars``), even; 0 for raw numbers.
      param_dtype: the dtype of the parameters.
    """

    num_classes: int = 0
    cond_features: CondFeatures = 0
    time_features: int = 64
    second: str = "gap"
    max_frequency: float = 2.0
    scalar_features: int = 16
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Checks the fields at construction.

        Raises:
          TypeError: if one has another type.
          ValueError: if one is out of range.
        """
        check_fields(self.num_classes, self.cond_features)
        for name, low in (("time_features", 2), ("scalar_features", 0)):
            if checks.integer(name, getattr(self, name), low=low) % 2:
                raise ValueError(
                    f"{name}: expected an even number, a sine and a cosine each, got {getattr(self, name)}"
                )
        checks.number("max_frequency", self.max_frequency, low=embeddings.LOWEST)
        checks.choice("second", self.second, TIMES)
        super().__post_init__()

    def conditioning_fields(self) -> dict[str, Any]:
        """The values of these fields, for another module of this kind."""
        # Flax adds the two others to every module.
        return {name: getattr(self, name) for name in Conditioned.__annotations__ if name not in ("parent", "name")}

    def _features(self, s: Array, t: Array, cond: Cond) -> tuple[list[Array], list[Array], Array | int]:
        """The features of both times, those of the floating-point leaves, and the label."""
        label, leaves = split(cond, self.num_classes, self.cond_features)
        pair = times(s, t, self.time_features, second=self.second, highest=self.max_frequency)
        flat = [leaf.reshape(-1).astype(s.dtype) for leaf in leaves]
        return pair, [scalars(leaf, self.scalar_features).reshape(-1) for leaf in flat], label

    def _label(self, features: int, label: Array | int, dtype: Dtype) -> Array:
        """The row of a label in a learned table, which has a row for each label and one for the null label."""
        table = label_table(self, self.num_classes, features, self.param_dtype)
        return embeddings.label(table.astype(dtype), label, name="cond")


def times(s: Array, t: Array, features: int, *, second: str = "gap", highest: float = 2.0) -> list[Array]:
    r"""Features of two times: :math:`[\phi(s), \phi(t - s)]`, or :math:`[\phi(s), \phi(t)]` with ``second='target'``.

    Args:
      s, t: scalar times, as ``embeddings.times`` returns them.
      features: the number of features of each, even.
      second: 'gap' or 'target'.
      highest: the highest frequency (``embeddings.sinusoidal``).

    Returns:
      Two arrays ``[features]`` in the dtype of the times.

    Raises:
      ValueError: if ``features`` is odd, or ``second`` is neither.
    """
    checks.choice("second", second, TIMES)
    return [embeddings.sinusoidal(u, features, highest=highest) for u in (s, t - s if second == "gap" else t)]


def pairs(s: Array, t: Array, decoupled: int) -> list[tuple[Array, Array]]:
    """The pairs of times that the layers see: (s, t), or first (s, s) and then (t, t) in a decoupled network (2510.24474)."""
    return [(s, s), (t, t)] if decoupled else [(s, t)]


def over_layers(values: list[Any], depth: int, decoupled: int) -> list[Any]:
    """The value for each of ``depth`` layers: the first of ``values``, and the last of them in the last ``decoupled``."""
    return [values[0]] * (depth - decoupled) + [values[-1]] * decoupled


def split(cond: Cond, num_classes: int, cond_features: CondFeatures) -> tuple[Array | int, list[Array]]:
    """The label and the floating-point leaves of a condition.

    Args:
      cond: a pytree, or None.
      num_classes: the number of labels, 0 for none.
      cond_features: the size of the floating-point leaves together, or the size of each by name.

    Returns:
      (label, leaves): the label as it is in the condition, or the null label ``num_classes``; and the floating-point leaves, in
      the order of ``jax.tree.leaves`` or of the names.

    Raises:
      ValueError: if the number of labels or the sizes differ, or a value does not fit the dtype that jax gives it.
      TypeError: if a leaf is neither integer nor floating-point.
    """
    checks.fits("cond", cond)
    named = jax.tree_util.tree_leaves_with_path(cond)
    values = [value for _, value in named]
    leaves = [jnp.asarray(value) for value in values]
    # The label is not converted: under jit, an array made from a concrete label would be traced and could not be checked.
    labels = [value for value, leaf in zip(values, leaves, strict=True) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    other = [
        (_name(path), leaf)
        for (path, _), leaf in zip(named, leaves, strict=True)
        if not jnp.issubdtype(leaf.dtype, jnp.integer)
    ]
    for name, leaf in other:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = f"cond[{name!r}]" if name else "cond"
            raise TypeError(f"{where}: expected an integer label or floating-point numbers, got dtype {leaf.dtype}")
    if len(labels) > (1 if num_classes else 0):
        raise ValueError(
            f"cond: expected {'at most one label' if num_classes else 'no label (num_classes=0)'}, "
            f"got {len(labels)} integer leaves; write other numbers as floating-point ones, such as 2.0"
        )
    chosen = _by_name(other, cond_features) if isinstance(cond_features, Mapping) else _by_size(other, cond_features)
    return labels[0] if labels else num_classes, chosen


def scalars(values: Array, features: int, *, highest: float = 2.0) -> Array:
    r"""Features of each number v of a floating-point condition.

    .. math::

        [a, \phi(a)], \qquad a = \operatorname{asinh}(v),

    where :math:`\phi` are the sinusoidal features of ``embeddings.sinusoidal``. A network of images learns little from one
    raw number beside hundreds of features of the times. The map asinh is the identity near 0 and a logarithm far from it, so
    that times in [0, 1] and guidance scales up to 100 are both resolved, with derivatives of at most 2 pi ``highest``.

    Args:
      values: ``[n]``, float32 or float64.
      features: the number of sinusoidal features of each number, even; 0 for the raw numbers alone.
      highest: their highest frequency.

    Returns:
      ``[n, 1 + features]`` in the dtype of the values.

    Raises:
      ValueError: if the values are not a vector, or ``features`` is odd.
    """
    checks.shape("values", values, (None,))
    if not features:
        return values[:, None]
    flat = jnp.arcsinh(values)
    waves = jax.vmap(lambda v: embeddings.sinusoidal(v, features, highest=highest))(flat)
    return jnp.concatenate([flat[:, None], waves], axis=1)


class Conditioning(Conditioned):
    r"""The vector c(s, t, cond) that modulates the layers of a network of images.

    .. math::

        c = W_2\, \mathrm{silu}(W_1 [\phi(s), \phi(t - s), \text{scalars}] + b_1) + b_2 + \text{table}[\text{label}]

    Attributes:
      features: the size D of c.
      num_classes, ..., param_dtype: as of ``Conditioned``.

    A pass costs 2 D (2 F + n (1 + scalar_features) + D) FLOPs in matmuls, for n floating-point numbers.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow.nets.conditioning import Conditioning
      >>> net = Conditioning(features=8, num_classes=10, cond_features={"scale": 1})
      >>> cond = {"label": 3, "scale": 1.5}
      >>> s, t = jnp.float32(0.0), jnp.float32(1.0)
      >>> params = net.init(jax.random.key(0), s, t, cond)
      >>> net.apply(params, s, t, cond).shape
      (8,)
    """

    features: int = 64

    @nn.compact
    def __call__(self, s: Array, t: Array, cond: Cond = None) -> Array:
        """c(s, t, cond), ``[features]``, in the dtype of the times.

        Raises:
          ValueError: if the condition does not match ``num_classes`` and ``cond_features``.
          TypeError: if a leaf of the condition is neither integer nor floating-point.
        """
        s, t = embeddings.times(s, t)
        pair, numbers, label = self._features(s, t, cond)
        dtypes = {"dtype": s.dtype, "param_dtype": self.param_dtype}
        h = jax.nn.silu(nn.Dense(self.features, **dtypes, name="hidden")(jnp.concatenate(pair + numbers)))
        c = nn.Dense(self.features, **dtypes, name="output")(h)
        return c + self._label(self.features, label, s.dtype) if self.num_classes else c


class ConditionTokens(Conditioned):
    r"""Tokens of the times and conditions, for a transformer that attends to them (improved MeanFlow, 2512.02012).

    Every condition j (s, then t - s, then each floating-point leaf, then the label) has an embedding e_j of ``features``
    numbers and ``count`` tokens :math:`e_j + k_{j,i}` with learned k. The embeddings of the times and of the floating-point
    leaves are two-layer perceptrons of their features, that of the label is a row of a table.

    Attributes:
      features: the size of a token.
      count: the number of tokens of each condition.
      num_classes, ..., param_dtype: as of ``Conditioned``.
    """

    features: int = 64
    count: int = 4

    @nn.compact
    def __call__(self, s: Array, t: Array, cond: Cond = None) -> Array:
        """The tokens, ``[conditions * count, features]``, in the dtype of the times.

        Raises:
          ValueError, TypeError: as of ``Conditioning``.
        """
        s, t = embeddings.times(s, t)
        pair, numbers, label = self._features(s, t, cond)
        dtypes = {"dtype": s.dtype, "param_dtype": self.param_dtype}

        def embedded(name: str, features: Array) -> Array:
            h = jax.nn.silu(nn.Dense(self.features, **dtypes, name=f"{name}_hidden")(features))
            return nn.Dense(self.features, **dtypes, name=f"{name}_output")(h)

        names = ["source", self.second, *(f"scalar_{i}" for i in range(len(numbers)))]
        found = [embedded(name, e) for name, e in zip(names, pair + numbers, strict=True)]
        if self.num_classes:
            found.append(self._label(self.features, label, s.dtype))
        shape = (len(found), self.count, self.features)
        learned = self.param("tokens", nn.initializers.normal(0.02), shape, self.param_dtype)
        return (jnp.stack(found)[:, None] + learned.astype(s.dtype)).reshape(-1, self.features)


def label_table(module: nn.Module, num_classes: int, features: int, dtype: Dtype, name: str = "label") -> Array:
    """The parameter ``[num_classes + 1, features]`` of a module: a row for each label, and the last for the null label."""
    return module.param(name, nn.initializers.normal(1.0), (num_classes + 1, features), dtype)


def _name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its last key or field; '' for a leaf without one."""
    for entry in reversed(path):
        name = getattr(entry, "key", getattr(entry, "name", None))
        if isinstance(name, str):
            return name
    return ""


def _by_size(leaves: list[tuple[str, Array]], size: int) -> list[Array]:
    got = sum(leaf.size for _, leaf in leaves)
    if got != size:
        raise ValueError(f"cond: expected {size} floating-point numbers (cond_features), got {got}")
    return [leaf for _, leaf in leaves]


def _by_name(leaves: list[tuple[str, Array]], sizes: Mapping[str, int]) -> list[Array]:
    names = [name for name, _ in leaves]
    if sorted(names) != sorted(sizes):
        raise ValueError(
            f"cond: expected floating-point leaves named {sorted(sizes)} (cond_features), got {sorted(names)}"
        )
    found = dict(leaves)
    for name, size in sizes.items():
        if found[name].size != size:
            raise ValueError(f"cond[{name!r}]: expected {size} numbers (cond_features), got {found[name].size}")
    return [found[name] for name in sizes]
