r"""Couplings: joint laws of base points x0 and data x1, whose marginals are the base and the data.

- ``Independent(base)`` draws x0 from the base, independently of x1. ``independent`` is this coupling for N(0, I).
- ``sinkhorn`` is entropic optimal transport between the B rows of a batch, on the device. It needs ott-jax.
- ``assignment`` is exact optimal transport between the B rows of a batch, on the host.
- ``reflow`` makes the pairs (x0, X_{0,1}(x0)) of a flow map (2209.03003).

The first two are functions ``(key, x1, cond=None) -> x0`` of a batch, which an objective calls in the training step. The
last two belong to the input pipeline: they put x0 into the ``Batch``, and the objective does not draw it.

Minibatch optimal transport (2302.00482, 2304.14772) draws B points of each law and pairs them by the permutation p with the
least cost:

.. math:: \min_p \frac{1}{B} \sum_i \left| x_1^{(i)} - x_0^{(p(i))} \right|^2

The law of a pair is the average of these pairings over all minibatches. Its marginals are exact, because each minibatch keeps
its points. It is not the optimal plan between base and data: its cost is higher and tends to the optimum only as B grows.

With conditioning, x0 must have the base's law *given cond*, because generation draws x0 from the base for every cond. Pairing
rows of different labels would violate this, so only rows of equal labels are permuted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import bases, checks, trees
from jflow.types import Array, Batch, BoundFlowMap, Cond, Event, Key, PyTree

# (key, x1, cond=None) -> x0 for a batch, leaves [B, ...]; x0 has the shapes and dtypes of x1.
Coupling = Callable[[Key, Event, Cond], Event]

# Sinkhorn stops when the total error of the marginal of x0 is below this; rounding the plan removes the rest.
_MARGINAL_ERROR = 1e-3


@dataclasses.dataclass(frozen=True)
class Independent:
    """The independent coupling: called with ``(key, x1, cond=None)``, it draws x0 from the base, independently of x1 and cond.

    Attributes:
      base: the law of x0.

    Raises:
      TypeError: if ``base`` is not a base; when called, if its ``sample`` raises TypeError.
      ValueError: when called, if the leaves of x1 do not have a common leading axis.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import bases, couplings
      >>> couple = couplings.Independent(bases.Normal(std=2.0))
      >>> couple(jax.random.key(0), jnp.zeros((8, 2), jnp.float32)).shape
      (8, 2)
    """

    base: bases.Base = bases.STANDARD_NORMAL

    def __post_init__(self) -> None:
        bases.check(self.base)

    def __call__(self, key: Key, x1: Event, cond: Cond = None) -> Event:
        """Draws x0 ~ base, ``[B, ...]``, with the shapes and dtypes of x1."""
        del cond
        size = checks.rows("x1", x1)
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), x1)
        return self.base.sample(key, one, (size,))


independent = Independent()


def sinkhorn(
    epsilon: float = 0.05, iterations: int = 2000, labels: bool = True, *, base: bases.Base = bases.STANDARD_NORMAL
) -> Coupling:
    r"""Returns the coupling by entropic optimal transport within a batch. It uses ott-jax and works under ``jit``.

    It draws B points x0 from the base. The cost C_ij is the squared distance of x1_i and x0_j, after subtraction of the
    batch means, divided by the mean over all B^2 pairs. Subtracting the means does not change the plan, and it makes epsilon
    independent of the location of the data. The plan is

    .. math::
        P = \operatorname{argmin}_P \sum_{ij} P_{ij} C_{ij} + \epsilon \sum_{ij} P_{ij} \log P_{ij}, \qquad
        \sum_i P_{ij} = \sum_j P_{ij} = \frac{1}{B}.

    Each x1_i gets one x0_j, drawn with probability B P_ij, so one x0 may be used twice and another not at all. The iterations
    leave an error in the column sums; rounding P onto its marginals (1705.09634, Algorithm 2) removes it. Each x0_j is then
    used once in expectation, and x0 ~ base holds for any epsilon and any number of iterations. Too few iterations only
    increase the transport cost. The pairs tend to those of ``assignment`` as epsilon tends to 0, and to independent pairs as
    epsilon tends to infinity.

    Args:
      epsilon: the strength of the entropy, relative to the mean cost. The required number of iterations grows about as
        1/epsilon.
      iterations: the largest number of iterations, in steps of ten; each reads the B x B costs.
      labels: if cond is given, pair only rows of equal cond: other pairs get a large finite cost, and their remaining mass
        is dropped. False ignores cond; then x0 given cond does not have the base's law.
      base: the law of x0.

    Returns:
      ``(key, x1, cond=None) -> x0``. The leaves of cond are integers or booleans ``[B, ...]``; x0 is shaped like x1.

    Raises:
      ImportError: if ott-jax is not installed.
      ValueError: if a number is out of range; when called, if leading axes differ.
      TypeError: if an argument has a wrong type; when called, if x1 is not floating-point, or, with ``labels``, if cond
        holds values other than integers and booleans.
    """
    checks.number("epsilon", epsilon, low=0.0, open_low=True)
    checks.integer("iterations", iterations, low=1)
    draw = Independent(base)
    try:
        import ott  # noqa: F401
    except ImportError as error:
        raise ImportError("sinkhorn: needs ott-jax, which is missing: pip install 'jflow[ott]'") from error

    def couple(key: Key, x1: Event, cond: Cond = None) -> Event:
        checks.floating("x1", x1)
        size = checks.rows("x1", x1)
        same = _same(cond, size) if labels else jnp.ones((size, size), bool)
        base_key, row_key = jax.random.split(key)
        x0 = draw(base_key, x1)
        plan = jax.lax.stop_gradient(_plan(_points(x0), _points(x1), same, epsilon, iterations))
        chosen = jax.random.categorical(row_key, jnp.log(plan), axis=1)
        return jax.tree.map(lambda leaf: leaf[chosen], x0)

    return couple


def transport_cost(x0: Event, x1: Event) -> Array:
    r"""Returns the mean squared distance of the pairs, a scalar.

    .. math:: \frac{1}{B} \sum_i \left| x_1^{(i)} - x_0^{(i)} \right|^2

    It is in squared units of the data and summed over dimensions. For the independent coupling with N(0, I) in d dimensions,
    its expectation is :math:`d + \mathbb{E}|x_1|^2`. It is computed in at least float32 and works under ``jit``.

    Raises:
      ValueError: if the shapes of x0 and x1 differ, or the leaves have different leading axes.
      TypeError: if an array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import couplings
      >>> float(couplings.transport_cost(jnp.zeros((4, 2), jnp.float32), jnp.ones((4, 2), jnp.float32)))
      2.0
    """
    size = _pair_rows(x0, x1)
    return jnp.sum(jnp.square(_points(x1) - _points(x0))) / size


class Assignment(NamedTuple):
    """An exact pairing of a minibatch.

    Attributes:
      x0: the permuted base points, numpy arrays in their input dtypes; row i is the partner of row i of x1.
      cost: the mean squared distance of these pairs (``transport_cost``), in squared units of the data, summed over
        dimensions.
      independent_cost: the mean squared distance of the input pairs. If x0 was drawn independently, it is an unbiased
        estimate of the cost of the independent coupling.
    """

    x0: Event
    cost: float
    independent_cost: float


def assignment(x0: Event, x1: Event, labels: PyTree = None) -> Assignment:
    """Permutes x0 to the least mean squared distance to x1, with scipy's ``linear_sum_assignment``.

    It belongs to the input pipeline: it takes and returns numpy arrays, computes in float64 and does not work under
    ``jit``. The time grows about as B^3: 256 rows take about 10 ms, 1024 rows about a second. ``datasets.coupled`` uses
    the pairs in training.

    Args:
      x0: base points, leaves ``[B, ...]``.
      x1: data, of the same structure and shapes.
      labels: integers or booleans, leaves ``[B, ...]``, or None. Rows are permuted only among rows whose labels are equal
        in every entry, which preserves the law of x0 given the labels.

    Returns:
      The Assignment. Its cost is at most that of the input pairs, up to rounding.

    Raises:
      ImportError: if scipy is not installed.
      ValueError: if structures or shapes differ, or points are not finite.
      TypeError: if points are not floating-point, labels are not integers or booleans, or arrays are traced.

    Example:
      >>> import numpy as np
      >>> from jflow import couplings
      >>> x0, x1 = np.array([[0.0], [10.0]], np.float32), np.array([[9.0], [1.0]], np.float32)
      >>> pairs = couplings.assignment(x0, x1)
      >>> float(pairs.cost)
      1.0
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("assignment: needs scipy, which is missing: pip install scipy") from error
    size = _pair_rows(x0, x1)
    x0 = jax.tree.map(functools.partial(_on_host, "x0"), x0)
    base, data = _host_points("x0", x0), _host_points("x1", x1)
    groups = [np.arange(size)] if labels is None else _groups(labels, size)
    order = np.arange(size)
    for rows in groups:
        # The permutation that maximises sum(x1 . x0) minimises sum(|x1 - x0|^2); subtracting the means does not change it.
        gain = (data[rows] - data[rows].mean(axis=0)) @ (base[rows] - base[rows].mean(axis=0)).T
        order[rows] = rows[linear_sum_assignment(gain, maximize=True)[1]]
    return Assignment(
        jax.tree.map(lambda leaf: leaf[order], x0),
        float(np.mean(np.sum((data - base[order]) ** 2, axis=1))),
        float(np.mean(np.sum((data - base) ** 2, axis=1))),
    )


def reflow(
    bound: BoundFlowMap,
    key: Key,
    like: Event,
    n: int,
    cond: Cond = None,
    chunk: int = 1024,
    *,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> Batch:
    """Makes training pairs with a map (2209.03003): z ~ base and x1 = X_{0,1}(z). Train on them with ``ArrayDataset``.

    The map is a solve of any velocity, ``solvers.solve(...).bind(params)``, or a learned map. x0 has the base's law. x1 has
    the law of the map's samples, including the map's errors, not that of the data. The map is jitted and runs on ``chunk``
    samples at a time.

    Args:
      bound: the map with its parameters; it is called without a key.
      key: a PRNG key for the base points.
      like: one event, without a batch axis: arrays, or ``jax.ShapeDtypeStruct``.
      n: the number of pairs.
      cond: conditioning, leaves ``[n, ...]``, or None.
      chunk: the number of samples that are mapped at once.
      base: the law of z.

    Returns:
      ``Batch(x1=X_{0,1}(z), x0=z, cond=cond)``, leaves ``[n, ...]``.

    Raises:
      ValueError: if (0, 1) is outside the map's domain, cond does not have length n, or a number is out of range.
      TypeError: if ``like`` is not floating-point, or an argument has a wrong type.
      RuntimeError: if an x1 is not finite, because a solve did not reach t = 1 or the map diverges.
    """
    checks.integer("n", n, low=1)
    checks.integer("chunk", chunk, low=1)
    if not bound.domain.contains(0.0, 1.0):
        raise ValueError(
            f"bound: expected a map defined at (s, t) = (0, 1), got one whose domain is {bound.domain.name}"
        )
    checks.floating("like", like)
    if cond is not None and checks.rows("cond", cond) != n:
        raise ValueError(f"cond: expected leaves with a leading axis of n = {n}, got {checks.rows('cond', cond)}")
    bases.check(base)
    z = base.sample(key, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like), (n,))
    x1 = _ends(bound, z, cond, chunk)
    bad = checks.concrete(_not_finite(x1))
    if bad is not None and bad > 0:
        raise RuntimeError(f"bound: X_(0,1) is not finite at {int(bad)} of {n} base points")
    return Batch(x1=x1, x0=z, cond=cond)


@functools.partial(jax.jit, static_argnames="chunk")
def _ends(bound: BoundFlowMap, z: Event, cond: Cond, chunk: int) -> Event:
    dtype = trees.at_least_float32(z)
    start, end = jnp.zeros((), dtype), jnp.ones((), dtype)
    return jax.lax.map(lambda row: bound.jump(start, end, row[0], row[1]), (z, cond), batch_size=chunk)


@jax.jit
def _not_finite(x: Event) -> Array:
    """Counts the rows that contain a value that is not finite."""
    finite = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(x)]
    return jnp.sum(~jnp.all(jnp.stack(finite), axis=0))


def _plan(x0: Array, x1: Array, same: Array, epsilon: float, iterations: int) -> Array:
    """Computes the entropic plan ``[B, B]`` with exact marginals. It is zero where not ``same``; row i belongs to x1_i."""
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    x0, x1 = x0 - jnp.mean(x0, axis=0, keepdims=True), x1 - jnp.mean(x1, axis=0, keepdims=True)
    # By default, accelerators round the factors to lower precision; the costs are small differences of large products.
    products = jnp.matmul(x1, x0.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(x1 * x1, axis=1)[:, None] + jnp.sum(x0 * x0, axis=1)[None, :]
    cost = jnp.maximum(squares - 2.0 * products, 0.0)
    mean = jnp.mean(cost)
    # In a batch of one row, the mean cost is zero.
    cost = cost / jnp.where(mean > 0.0, mean, 1.0)
    # Potentials are bounded by the largest cost, so pairs of different labels get less than e^-100 of the mass.
    apart = 2.0 * jnp.max(cost) + 100.0 * epsilon
    # ott relies on promotions that jax may be configured to reject.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        geometry = Geometry(cost_matrix=jnp.where(same, cost, cost + apart), epsilon=epsilon)
        solver = Sinkhorn(threshold=_MARGINAL_ERROR, max_iterations=iterations)
        solved = solver(LinearProblem(geometry))
    # The potential f is not needed: it only makes the rows sum to 1/B, which softmax does here.
    potential = solved.g.astype(cost.dtype)[None, :]
    plan = jax.nn.softmax(jnp.where(same, (potential - cost) / epsilon, -jnp.inf), axis=1) / x1.shape[0]
    return _round(plan, same)


def _round(plan: Array, same: Array) -> Array:
    """Rounds a plan ``[B, B]`` with row sums of at most 1/B to marginals 1/B, within equal labels.

    Columns with too large a sum are scaled down. The missing mass of the rows is then added to the columns with too small a
    sum.
    """
    share = 1.0 / plan.shape[0]
    plan = plan * jnp.minimum(share / jnp.maximum(jnp.sum(plan, axis=0), share), 1.0)[None, :]
    lacking = jnp.maximum(share - jnp.sum(plan, axis=1), 0.0)
    room = jnp.where(same, jnp.maximum(share - jnp.sum(plan, axis=0), 0.0)[None, :], 0.0)
    total = jnp.sum(room, axis=1, keepdims=True)
    return plan + lacking[:, None] * room / jnp.where(total > 0.0, total, 1.0)


def _points(x: Event) -> Array:
    """Returns the rows as vectors ``[B, d]``, in the widest dtype of the leaves and float32."""
    dtype = trees.at_least_float32(x)
    return jnp.concatenate([jnp.reshape(leaf, (len(leaf), -1)).astype(dtype) for leaf in jax.tree.leaves(x)], axis=1)


def _host_points(name: str, x: Event) -> np.ndarray:
    """Returns the rows as vectors ``[B, d]`` in float64. Raises ValueError if they are not finite."""
    leaves = [_on_host(name, leaf) for leaf in jax.tree.leaves(x)]
    points = np.concatenate([leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in leaves], axis=1)
    bad = np.count_nonzero(~np.isfinite(points).all(axis=1))
    if bad:
        raise ValueError(f"{name}: expected finite points, got {bad} of {len(points)} rows that are not")
    return points


def _on_host(name: str, leaf: Array) -> np.ndarray:
    values = checks.concrete(leaf)
    if values is None:
        raise TypeError(f"{name}: expected arrays of known values, got a traced one: this is not for use under jax.jit")
    return values


def _pair_rows(x0: Event, x1: Event) -> int:
    """Checks that two batches of points match, and returns their length B."""
    checks.floating("x0", x0)
    checks.floating("x1", x1)
    checks.same_structure("x0", x0, "x1", x1)
    return checks.rows("x1", x1)


def _discrete(name: str, labels: PyTree, size: int) -> list[Array]:
    """Checks the labels, and returns their leaves."""
    leaves = jax.tree.leaves(labels)
    for leaf in leaves:
        dtype = jax.dtypes.result_type(leaf)
        if not (jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_):
            raise TypeError(
                f"{name}: expected whole numbers or booleans, got dtype {dtype}; conditioning that is continuous leaves no "
                "rows that may be exchanged"
            )
    if checks.rows(name, labels) != size:
        raise ValueError(f"{name}: expected a leading axis of {size} rows as in x1, got {checks.rows(name, labels)}")
    return leaves


def _same(cond: Cond, size: int) -> Array:
    """Returns whether two rows have the same cond, ``[B, B]``; all True if cond is None."""
    same = jnp.ones((size, size), bool)
    for leaf in [] if cond is None else _discrete("cond", cond, size):
        flat = jnp.reshape(leaf, (size, -1))
        same = same & jnp.all(flat[:, None, :] == flat[None, :, :], axis=2)
    return same


def _groups(labels: PyTree, size: int) -> list[np.ndarray]:
    """Returns the row indices of each distinct label."""
    leaves = [_on_host("labels", leaf).reshape(size, -1) for leaf in _discrete("labels", labels, size)]
    # Treat each leaf separately: concatenation would promote different dtypes.
    names = np.stack([np.unique(leaf, axis=0, return_inverse=True)[1].reshape(size) for leaf in leaves], axis=1)
    _, group = np.unique(names, axis=0, return_inverse=True)
    group = group.reshape(size)
    return [np.flatnonzero(group == k) for k in range(group.max() + 1)]
