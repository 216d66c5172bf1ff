r"""Streaming moments of features on the host, in float64: count, mean and centred second moment.

They are held as a factor. With n rows x_i, of mean m, ``Moments`` has a root R with

.. math:: R^\top R = \sum_i (x_i - m)(x_i - m)^\top,

which a QR decomposition updates when rows are added. Forming the sum itself would lose half of the digits of the small
eigenvalues, and the Fréchet distance depends on their square roots. Rows are held relative to one of them, so a large common
offset costs no digits either.

``GroupedMoments`` deals the rows of a stream to a few groups. By the jackknife, their moments give the bias and the standard
error of any function of the moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jflow import checks
from jflow.metrics.samples import Points, rows

# The rows that one QR decomposition takes at a time; more than the dimension, so that few decompositions are needed.
_BLOCK = 4096
# The number of groups of the jackknife.
GROUPS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment of rows ``[n, d]``. Make one with ``Moments.of`` or ``Moments.from_covariance``.

    Attributes:
      count: n.
      centre: a point near the rows, ``[d]``, float64.
      offset: the mean minus the centre, ``[d]``, float64.
      root: R with R'R the centred second moment, ``[k, d]`` with k <= d, float64.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> rows = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
      >>> found = metrics.Moments.of(rows[:1]).add(rows[1:])
      >>> found.count, found.mean.tolist()
      (3, [2.0, 2.0])
      >>> np.allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-12)
      True
    """

    count: int
    centre: np.ndarray
    offset: np.ndarray
    root: np.ndarray

    @staticmethod
    def of(points: Points, keep: Points | None = None) -> Moments:
        """The moments of rows.

        Args:
          points: ``[n, ...]``, flattened to ``[n, d]``; floating-point, concrete.
          keep: booleans ``[n]``; rows where it is False, such as those that pad a batch, are left out. None keeps all.

        Raises:
          ValueError: if a row that is kept is not finite, or a shape is wrong.
          TypeError: if the rows are not floating-point, or ``keep`` is not boolean.
        """
        values = kept("points", points, keep)
        return Moments.empty(values.shape[1])._joined(values)

    @staticmethod
    def empty(dimension: int) -> Moments:
        """The moments of no rows."""
        checks.integer("dimension", dimension, low=1)
        zeros = np.zeros(dimension)
        return Moments(0, zeros, zeros, np.zeros((0, dimension)))

    @staticmethod
    def from_covariance(count: int, mean: Points, covariance: Points) -> Moments:
        """Moments with a given mean and covariance (divided by n - 1), such as published statistics of a data set.

        Eigenvalues below rounding, d eps times the largest, are set to zero, negative ones with them. A covariance has half
        of the digits of a root: it changes Fréchet distances by about 1e-8 times its trace for each eigenvalue that is zero.

        Args:
          count: n, at least 2.
          mean: ``[d]``.
          covariance: ``[d, d]``, symmetric to 1e-6 of its largest entry.

        Raises:
          ValueError: if a shape is wrong, a value is not finite, or the covariance is not symmetric, or has an eigenvalue
            below -1e-6 times the largest.
          TypeError: if ``count`` is not a whole number.
        """
        checks.integer("count", count, low=2)
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        checks.shape("mean", mean, (None,))
        checks.shape("covariance", covariance, (len(mean), len(mean)))
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean, covariance: expected finite values")
        if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
            raise ValueError("covariance: expected a symmetric matrix")
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        largest = np.abs(values).max()
        if values[0] < -1e-6 * largest:
            raise ValueError(f"covariance: expected no negative eigenvalues, got {values[0]:.3g}")
        values = np.where(values > len(mean) * np.finfo(np.float64).eps * largest, values, 0.0)
        return Moments(count, mean, np.zeros_like(mean), np.sqrt((count - 1) * values)[:, None] * vectors.T)

    @property
    def dimension(self) -> int:
        """The dimension d of the rows."""
        return len(self.centre)

    @property
    def mean(self) -> np.ndarray:
        """The mean, ``[d]``, float64."""
        return self.centre + self.offset

    @property
    def second_moment(self) -> np.ndarray:
        """The centred second moment, the sum of (x - mean)(x - mean)' over the rows, ``[d, d]``, float64."""
        return self.root.T @ self.root

    @property
    def covariance(self) -> np.ndarray:
        """The covariance, divided by n - 1, ``[d, d]``, float64.

        Raises:
          ValueError: if there are fewer than 2 rows.
        """
        factor = self.factor("moments")
        return factor.T @ factor

    def factor(self, name: str) -> np.ndarray:
        """A with A'A the covariance, ``[k, d]``.

        Raises:
          ValueError: if there are fewer than 2 rows; the message begins with ``name``.
        """
        if self.count < 2:
            raise ValueError(f"{name}: expected moments of at least 2 samples, got {self.count}")
        return self.root / np.sqrt(self.count - 1)

    def add(self, points: Points, keep: Points | None = None) -> Moments:
        """The moments with more rows, as in ``of``.

        Raises:
          ValueError: as ``of``, and if the dimension differs.
          TypeError: as ``of``.
        """
        values = kept("points", points, keep)
        self._check("points", values.shape[1])
        return self._joined(values)

    def merge(self, other: Moments) -> Moments:
        """The moments of the rows of both. The result does not depend on the order or the grouping, up to rounding.

        Raises:
          ValueError: if the dimensions differ.
          TypeError: if the other is not a Moments.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other: expected a Moments, got {type(other).__name__}")
        self._check("other", other.dimension)
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        # The centres are close to each other and to the means, so these differences lose no digits.
        step = (other.centre - self.centre) + (other.offset - self.offset)
        bridge = np.sqrt(self.count / count * other.count) * step
        root = _triangle(np.concatenate([self.root, other.root, bridge[None]]))
        return Moments(count, self.centre, self.offset + other.count / count * step, root)

    def _joined(self, values: np.ndarray) -> Moments:
        """The moments with the rows of checked values [n, d], block by block."""
        found, size = self, max(_BLOCK, 2 * self.dimension)
        for start in range(0, len(values), size):
            block = values[start : start + size].astype(np.float64)
            centre = block[0] if self.count == 0 and start == 0 else found.centre
            block = block - centre
            if not np.isfinite(block).all():
                raise ValueError("points: expected rows whose differences float64 can hold, got larger ones")
            offset = np.mean(block, axis=0)
            found = found.merge(Moments(len(block), centre, offset, _triangle(block - offset)))
        return found

    def _check(self, name: str, dimension: int) -> None:
        if dimension != self.dimension:
            raise ValueError(f"{name}: expected rows of dimension {self.dimension}, got {dimension}")


@dataclasses.dataclass(frozen=True, eq=False)
class GroupedMoments:
    """Moments of a stream of rows in g groups of equal size, up to one row, for the jackknife.

    The group of a row depends only on its place in the stream: of every g consecutive rows, each group gets one, in an order
    that a hash of the place decides. The groups are therefore the same however the stream is cut into batches, and rows that
    are sorted, or that repeat with a period, such as classes in turn, are spread over all groups.

    Attributes:
      groups: the moments of each group.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> rows = np.random.default_rng(0).normal(size=(50, 3))
      >>> found = metrics.GroupedMoments.of(rows[:7], groups=5).add(rows[7:])
      >>> [group.count for group in found.groups]
      [10, 10, 10, 10, 10]
      >>> found.total.count
      50
    """

    groups: tuple[Moments, ...]

    @staticmethod
    def of(points: Points, keep: Points | None = None, *, groups: int = GROUPS) -> GroupedMoments:
        """The grouped moments of rows, as in ``Moments.of``.

        Raises:
          ValueError: as ``Moments.of``, and if ``groups`` is below 2.
          TypeError: as ``Moments.of``, and if ``groups`` is not a whole number.
        """
        checks.integer("groups", groups, low=2)
        values = kept("points", points, keep)
        return GroupedMoments((Moments.empty(values.shape[1]),) * groups)._joined(values)

    @property
    def count(self) -> int:
        """The number of rows."""
        return sum(group.count for group in self.groups)

    @property
    def dimension(self) -> int:
        """The dimension of the rows."""
        return self.groups[0].dimension

    @property
    def total(self) -> Moments:
        """The moments of all rows."""
        return _merged(self.groups)

    def add(self, points: Points, keep: Points | None = None) -> GroupedMoments:
        """The grouped moments with more rows at the end of the stream.

        Raises:
          ValueError, TypeError: as ``Moments.add``.
        """
        values = kept("points", points, keep)
        self.groups[0]._check("points", values.shape[1])
        return self._joined(values)

    def merge(self, other: GroupedMoments) -> GroupedMoments:
        """The grouped moments of two streams; group by group, the smallest of one with the largest of the other.

        Raises:
          ValueError: if the dimensions or the numbers of groups differ.
        """
        if len(self.groups) != len(other.groups):
            raise ValueError(f"other: expected {len(self.groups)} groups, got {len(other.groups)}")
        ascending = sorted(self.groups, key=lambda group: group.count)
        descending = sorted(other.groups, key=lambda group: -group.count)
        return GroupedMoments(tuple(a.merge(b) for a, b in zip(ascending, descending, strict=True)))

    def without(self) -> tuple[Moments, ...]:
        """For each group the moments of all rows but those of the group."""
        empty = Moments.empty(self.dimension)
        before, after = [empty], [empty]
        for group in self.groups[:-1]:
            before.append(before[-1].merge(group))
        for group in self.groups[:0:-1]:
            after.append(after[-1].merge(group))
        return tuple(a.merge(b) for a, b in zip(before, reversed(after), strict=True))

    def _joined(self, values: np.ndarray) -> GroupedMoments:
        group = group_of(self.count, len(values), len(self.groups))
        return GroupedMoments(tuple(each._joined(values[group == place]) for place, each in enumerate(self.groups)))


def moments_by_label(points: Points, labels: Points, start: Mapping[int, Moments] | None = None) -> dict[int, Moments]:
    """The moments of the rows of each label.

    Args:
      points: as in ``Moments.of``.
      labels: whole numbers ``[n]``.
      start: the moments of earlier rows, to which these are added.

    Returns:
      A dictionary from each label, in increasing order, to its Moments.

    Raises:
      ValueError: as ``Moments.of``, and if the labels have another shape.
      TypeError: as ``Moments.of``, and if the labels are not whole numbers.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> found = metrics.moments_by_label(np.array([[1.0], [2.0], [5.0]]), np.array([7, 3, 7]))
      >>> {label: float(moments.mean[0]) for label, moments in found.items()}
      {3: 2.0, 7: 3.0}
    """
    values, labels = kept("points", points, None), as_labels("labels", labels, len(points))
    found = dict(start or {})
    for label in np.unique(labels):
        earlier = found.get(int(label), Moments.empty(values.shape[1]))
        found[int(label)] = earlier.add(values[labels == label])
    return dict(sorted(found.items()))


def merge_by_label(first: Mapping[int, Moments], second: Mapping[int, Moments]) -> dict[int, Moments]:
    """Merges two results of ``moments_by_label``.

    Raises:
      ValueError: if dimensions differ.
    """
    merged = dict(first)
    for label, moments in second.items():
        merged[label] = merged[label].merge(moments) if label in merged else moments
    return dict(sorted(merged.items()))


def as_labels(name: str, labels: Points, count: int) -> np.ndarray:
    """Checks labels, and returns them as int64 ``[count]``.

    Raises:
      ValueError: if the shape is not [count].
      TypeError: if they are not whole numbers.
    """
    checks.shape(name, labels, (count,))
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected whole numbers, got dtype {labels.dtype}")
    return labels.astype(np.int64)


def kept(name: str, points: Points, keep: Points | None) -> np.ndarray:
    """The rows ``[n, d]``, checked, that ``keep`` keeps, as a numpy array in their own dtype.

    Raises:
      ValueError: if a row that is kept is not finite, or a shape is wrong.
      TypeError: if the rows are not floating-point, or ``keep`` is not boolean.
    """
    if keep is not None:
        mask = np.asarray(keep)
        if mask.dtype != bool:
            raise TypeError(f"keep: expected booleans, got dtype {mask.dtype}")
        checks.shape("keep", mask, (len(points),))
        points = np.asarray(points)[mask]
    found = rows(name, points, least=0, device=False)
    if not isinstance(found, np.ndarray):
        raise TypeError(f"{name}: expected concrete arrays, got a traced one; moments are computed on the host")
    return found


def group_of(start: int, count: int, groups: int) -> np.ndarray:
    """The groups of the rows at places start, ..., start + count - 1 of a stream, ``[count]``."""
    first = start // groups
    places = np.arange(first * groups, -(-(start + count) // groups) * groups, dtype=np.uint64)
    # The finaliser of SplitMix64: a bijection of 64-bit words that mixes all their bits.
    word = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    order = np.argsort(word.reshape(-1, groups), axis=1, kind="stable").reshape(-1)
    return order[start - first * groups :][:count]


def frechet(x: Moments, y: Moments) -> float:
    r"""Returns the squared Fréchet distance of two Gaussians with these moments; infinite if it exceeds float64.

    With factors A of the covariances, :math:`C = A^\top A`, it is the shortest distance of rotated factors,
    :math:`|m_x - m_y|^2 + \min_{Q^\top Q = I} |A_x - Q A_y|^2`, which is never negative.

    Raises:
      ValueError: if there are fewer than 2 rows, or the dimensions differ.
    """
    a, b = x.factor("x"), y.factor("y")
    y._check("x", x.dimension)
    shift = (x.centre - y.centre) + (x.offset - y.offset)
    largest = max(float(np.abs(z).max(initial=0.0)) for z in (shift, a, b))
    if not np.isfinite(largest):
        return np.inf
    # Scale by a power of two, which is exact, so that no square overflows or underflows.
    exponent = int(np.frexp(largest)[1])
    # Pad with rows of zeros to equal sizes, so that one factor can be rotated onto the other.
    size = max(len(a), len(b))
    a, b = (np.ldexp(np.pad(z, ((0, size - len(z)), (0, 0))), -exponent) for z in (a, b))
    left, _, right = np.linalg.svd(a @ b.T)
    value = np.sum(np.square(np.ldexp(shift, -exponent))) + np.sum(np.square(a - left @ right @ b))
    with np.errstate(over="ignore"):
        return float(np.ldexp(value, 2 * exponent))


def _triangle(matrix: np.ndarray) -> np.ndarray:
    """R of the QR decomposition of a matrix."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _merged(parts: Sequence[Moments]) -> Moments:
    found = parts[0]
    for part in parts[1:]:
        found = found.merge(part)
    return found
