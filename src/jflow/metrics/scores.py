"""Scores: values with everything that a reader needs to trust them, and the scores of features that need moments or kernels."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.metrics.features import Features, Statistics
from jflow.metrics.kernels import kernel_distance
from jflow.metrics.moments import GROUPS, GroupedMoments, Moments, as_labels, frechet
from jflow.metrics.samples import Points, both, rows

# What a score compares: features with their origin, or plain rows.
FeatureRows = Features | Points
Reference = Features | Statistics | GroupedMoments | Moments | Points


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of samples.

    Attributes:
      name: what is measured.
      value: the estimate as its definition gives it; the bias is not subtracted.
      standard_error: its standard error, or None.
      bias: an estimate of the expectation of ``value`` minus its limit for infinitely many samples, or None if it is unknown.
        It is 0 for unbiased estimates.
      samples: the number of samples.
      reference: the number of reference rows; 0 if there is no reference.
      network: the name of the feature network, or None for plain rows.
      network_hash: its hash, or None.
      samples_hash: the hash of the samples and their transform, or None.
      reference_hash: the same of the reference, or None.
      options: the options of the score.

    Example:
      >>> from jflow import metrics
      >>> score = metrics.Score("frechet", 3.5, 0.25, 0.5, samples=100, reference=200)
      >>> score.corrected
      3.0
      >>> metrics.Score.from_json(score.to_json()) == score
      True
    """

    name: str
    value: float
    standard_error: float | None = None
    bias: float | None = None
    samples: int = 0
    reference: int = 0
    network: str | None = None
    network_hash: str | None = None
    samples_hash: str | None = None
    reference_hash: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def corrected(self) -> float:
        """The value minus its estimated bias; it may be slightly negative.

        Raises:
          ValueError: if the bias is unknown.
        """
        if self.bias is None:
            raise ValueError(f"{self.name}: expected an estimate of the bias, there is none")
        return self.value - self.bias

    def to_json(self) -> str:
        """The score as one line of JSON, in which a number that is not finite is null."""
        plain = {key: _plain(value) for key, value in dataclasses.asdict(self).items()}
        return json.dumps(plain, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Score:
        """The score that ``to_json`` wrote; a null value becomes NaN.

        Raises:
          ValueError: if the text is not such a line.
        """
        try:
            found = json.loads(text)
            return Score(**{**found, "value": math.nan if found["value"] is None else found["value"]})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"text: expected a score as to_json writes it: {error}") from error


def frechet_score(x: Reference, y: Reference, *, groups: int = GROUPS, name: str = "frechet") -> Score:
    r"""The Fréchet distance of features, as the FID, with its standard error and its bias.

    The value is ``frechet_distance``, which is biased upward by an amount of order d²/n for n samples in d dimensions. The
    delete-a-group jackknife estimates the bias and the standard error: with :math:`F_{-j}` the distance without group j of g,

    .. math::

        \text{bias} = \sum (g - 1) (\bar F_{-\cdot} - F), \qquad
        \text{error}^2 = \sum \frac{g - 1}{g} \sum_j (F_{-j} - \bar F_{-\cdot})^2,

    where the outer sums are over the two sets. ``score.corrected``, the value minus the bias, extrapolates in 1/n to
    infinitely many samples, as FID-infinity (1911.07023) does by a line through several n; it may be slightly negative. A set
    given as ``Moments`` has no groups and is taken as the exact law.

    The distance of a set with itself is zero to rounding. Its bias is estimated as if the two sets were independent.

    Args:
      x: the samples: Features, Statistics, GroupedMoments, Moments, or rows ``[n, d]``.
      y: the reference, likewise.
      groups: g, for sets that are given as rows.
      name: the score's name.

    Returns:
      The Score. Standard error and bias are None if neither set has groups with at least one row each, and n > g + 1.

    Raises:
      ValueError: if there are fewer than 2 rows, the dimensions or the networks differ, or a row is not finite.
      TypeError: if a set is none of these types.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> rows = np.random.default_rng(0).normal(size=(2, 1000, 3))
      >>> score = metrics.frechet_score(rows[0], rows[1])
      >>> 0 < score.value < 0.05 and abs(score.corrected) < 4 * score.standard_error
      True
    """
    sets = [_moments(label, z, groups) for label, z in (("x", x), ("y", y))]
    wholes = [z.total if isinstance(z, GroupedMoments) else z for z in sets]
    value = frechet(*wholes)
    if not math.isfinite(value):
        raise ValueError("x, y: expected features whose squared distance float64 can hold, got a larger one")
    bias, variance, known = 0.0, 0.0, False
    for place, each in enumerate(sets):
        if not isinstance(each, GroupedMoments) or min(group.count for group in each.groups) == 0:
            continue
        left = each.without()
        if min(moments.count for moments in left) < 2:
            continue
        others = np.array([frechet(m, wholes[1]) if place == 0 else frechet(wholes[0], m) for m in left])
        factor = len(others) - 1
        bias += factor * (float(np.mean(others)) - value)
        variance += factor / len(others) * float(np.sum(np.square(others - np.mean(others))))
        known = True
    counts = {"samples": wholes[0].count, "reference": wholes[1].count}
    options = {
        "dimension": wholes[0].dimension,
        "groups": [len(z.groups) if isinstance(z, GroupedMoments) else 0 for z in sets],
    }
    error = math.sqrt(variance)
    deviation = (error, bias) if known else (None, None)
    return Score(name, value, *deviation, **counts, **origin(x, y), options=options)


def kernel_score(x: FeatureRows, y: FeatureRows, *, block: int = 1000, seed: int = 0, name: str = "kernel") -> Score:
    """The kernel distance of features, the KID (1801.01401): the mean of ``kernel_distance`` over disjoint blocks.

    The rows of both sets are permuted at random and cut into K = max(2, n // block) blocks, with n rows in the smaller set; the
    few rows left over, fewer than K in each set, are not used. The value is unbiased, and the standard error is that of a mean
    of K independent values. It costs K times less than ``kernel_distance`` of all rows, whose error is smaller.

    Args:
      x: Features, or rows ``[n, d]``.
      y: Features, or rows ``[m, d]``.
      block: the rows of the smaller set per block, at least 3.
      seed: the seed of the permutations.
      name: the score's name.

    Raises:
      ValueError: if a set has fewer than 6 rows, the dimensions or the networks differ, or a row is not finite.
      TypeError: if rows are not floating-point, or a number is not whole.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> rows = np.random.default_rng(0).normal(size=(2, 400, 3)).astype(np.float32)
      >>> score = metrics.kernel_score(rows[0], rows[1], block=100)
      >>> abs(score.value) < 1.0, score.samples, score.options["blocks"]
      (True, 400, 4)
    """
    checks.integer("block", block, low=3)
    checks.integer("seed", seed)
    a, b = (np.asarray(z) for z in both(feature_rows(x), feature_rows(y), least=6))
    count = max(2, min(len(a), len(b)) // block)
    random = np.random.default_rng(seed)
    parts = [random.permutation(len(z))[: len(z) // count * count].reshape(count, -1) for z in (a, b)]
    found = kernel_score_of_blocks(((a[i], b[j]) for i, j in zip(*parts, strict=True)), name=name)
    return dataclasses.replace(found, **origin(x, y))


def kernel_score_of_blocks(blocks: Iterable[tuple[Points, Points]], *, name: str = "kernel") -> Score:
    """As ``kernel_score``, for a stream of pairs of blocks, of which one is in memory at a time.

    The rows of a block must be random: blocks of sorted rows have different laws, and their mean is another quantity.

    Args:
      blocks: pairs (x ``[n, d]``, y ``[m, d]``) of rows, n, m >= 3; at least two pairs. Equal shapes compile once.
      name: the score's name.

    Raises:
      ValueError: if there are fewer than two pairs, and as ``kernel_distance``.
    """
    values, sizes = [], []
    for x, y in blocks:
        values.append(kernel_distance(x, y).value)
        sizes.append((len(x), len(y)))
    if len(values) < 2:
        raise ValueError(f"blocks: expected at least two pairs, for the standard error, got {len(values)}")
    found = np.asarray(jnp.stack(values), np.float64)
    samples, reference = (sum(counts) for counts in zip(*sizes, strict=True))
    error = float(np.std(found, ddof=1) / np.sqrt(len(found)))
    return Score(
        name, float(np.mean(found)), error, 0.0, samples=samples, reference=reference, options={"blocks": len(found)}
    )


def by_label(score: Any, x: Features, y: Features, **options: Any) -> dict[int, Score]:
    """A score of two sets for each label that both have, such as ``by_label(kernel_score, x, y, block=100)``.

    Args:
      score: ``(x, y, **options) -> Score`` of two Features.
      x: features with labels.
      y: features with labels.
      options: passed to the score.

    Raises:
      ValueError: if labels are missing or no label is in both, and as the score.
    """
    for name, each in (("x", x), ("y", y)):
        if not isinstance(each, Features) or each.labels is None:
            raise ValueError(f"{name}: expected Features with labels")
    assert x.labels is not None and y.labels is not None
    shared = np.intersect1d(x.labels, y.labels)
    if not len(shared):
        raise ValueError("x, y: expected labels that both have, got none")
    return {int(label): score(x.where(x.labels == label), y.where(y.labels == label), **options) for label in shared}


def label_accuracy(x: Features, labels: Points | None = None, *, name: str = "label accuracy") -> Score:
    """The share of samples that the network classifies as the label that was asked for, with its binomial standard error.

    Args:
      x: features of a network with logits.
      labels: the labels asked for, ``[n]``; by default ``x.labels``.
      name: the score's name.

    Raises:
      ValueError: if there are no logits or labels, a shape is wrong, or a label is not a class.
      TypeError: if x is not Features, or labels are not whole numbers.
    """
    if not isinstance(x, Features):
        raise TypeError(f"x: expected Features, got {type(x).__name__}")
    if x.logits is None:
        raise ValueError(f"x: expected features of a network with logits, got those of {x.network}")
    labels = x.labels if labels is None else labels
    if labels is None:
        raise ValueError("labels: expected those asked for, the features have none")
    labels = as_labels("labels", labels, len(x))
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= x.logits.shape[1]:
        got = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise ValueError(f"labels: expected one or more from 0 to {x.logits.shape[1] - 1}, got {got}")
    share = float(np.mean(np.argmax(x.logits, axis=1) == labels))
    error = math.sqrt(share * (1 - share) / len(labels))
    known: dict[str, Any] = {"network": x.network, "network_hash": x.network_hash, "samples_hash": x.data_hash}
    return Score(name, share, error, 0.0, samples=len(labels), **known)


def origin(x: Any, y: Any) -> dict[str, Any]:
    """The fields of a Score that say where two sets come from.

    Raises:
      ValueError: if both have a network and these differ.
    """
    known = [z for z in (x, y) if isinstance(z, (Features, Statistics))]
    if len({z.network_hash for z in known}) > 1:
        raise ValueError(
            f"x, y: expected features of one network, got {known[0].network} ({known[0].network_hash[:12]}) and "
            f"{known[1].network} ({known[1].network_hash[:12]})"
        )
    first = known[0] if known else None
    return {
        "network": first.network if first else None,
        "network_hash": first.network_hash if first else None,
        "samples_hash": getattr(x, "data_hash", None),
        "reference_hash": getattr(y, "data_hash", None),
    }


def feature_rows(x: FeatureRows) -> Points:
    """The rows of Features, or plain rows unchanged.

    Raises:
      TypeError: if there are moments in place of rows.
    """
    if isinstance(x, (Statistics, GroupedMoments, Moments)):
        raise TypeError(f"x, y: expected Features or rows [n, d], because the score needs rows, got {type(x).__name__}")
    return x.values if isinstance(x, Features) else x


def _moments(name: str, x: Reference, groups: int) -> GroupedMoments | Moments:
    if isinstance(x, Statistics):
        return x.moments
    if isinstance(x, (GroupedMoments, Moments)):
        return x
    if not isinstance(x, Features) and not hasattr(x, "shape"):
        raise TypeError(f"{name}: expected features or their moments, got {type(x).__name__}")
    return GroupedMoments.of(rows(name, feature_rows(x), least=2, device=False), groups=groups)


def _plain(value: Any) -> Any:
    """A JSON value; numbers that are not finite become None."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
