"""Couplings against brute force, sorting and closed forms; their marginals; the pool of pairs for training."""

from __future__ import annotations

import builtins
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import couplings, datasets, interpolants, oracles, solvers
from jflow.datasets import ArrayDataset, SampledDataset
from jflow.types import Batch, Domain, FlowMap


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def square(x1, x0):
    return ((x1 - x0) ** 2).reshape(len(x1), -1).sum(axis=1).mean()


def without(monkeypatch, package):
    """Makes the import of a package fail."""
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_independent_is_normal_whatever_cond(assert_mean):
    x1 = {"a": jnp.full((20_000, 1), 5.0, jnp.float32), "b": jnp.zeros((20_000, 1, 1))}
    x0 = couplings.independent(jax.random.key(0), x1, jnp.zeros(20_000, jnp.int32))
    again = couplings.independent(jax.random.key(0), x1)
    assert x0["a"].dtype == jnp.float32 and x0["b"].shape == (20_000, 1, 1)
    np.testing.assert_array_equal(x0["a"], again["a"])
    z = np.concatenate([np.asarray(x0["a"], np.float64), x0["b"][..., 0]], axis=1)
    assert_mean(z, 0.0)
    assert_mean(z**2, 1.0)
    assert_mean(z[:, 0] * z[:, 1], 0.0)


# Exact assignment.


def test_in_one_dimension_the_assignment_sorts():
    x0, x1 = normal(0, 100, 1), 3.0 + 0.2 * normal(1, 100, 1) ** 3
    found = couplings.assignment(x0, x1)
    ranks = np.argsort(np.argsort(x1[:, 0]))
    np.testing.assert_array_equal(found.x0[:, 0], np.sort(x0[:, 0])[ranks])
    assert found.cost == pytest.approx(square(np.sort(x1, axis=0), np.sort(x0, axis=0)), rel=1e-12)
    assert found.independent_cost == pytest.approx(square(x1, x0), rel=1e-12)


@pytest.mark.parametrize("labels", [None, np.array([0, 1, 0, 1, 1, 0])])
@pytest.mark.parametrize("seed", range(3))
def test_no_permutation_costs_less(seed, labels):
    x0, x1 = normal(seed, 6, 2), normal(seed + 10, 6, 2)
    allowed = [list(p) for p in itertools.permutations(range(6)) if labels is None or (labels[list(p)] == labels).all()]
    assert len(allowed) == (720 if labels is None else 36)
    best = min(allowed, key=lambda p: square(x1, x0[p]))
    found = couplings.assignment(x0, x1, labels)
    np.testing.assert_array_equal(found.x0, x0[best])
    assert found.cost == pytest.approx(square(x1, x0[best]), rel=1e-12)
    assert found.cost <= found.independent_cost


def test_an_offset_does_not_hide_the_points():
    x0, x1 = normal(0, 50, 2), normal(1, 50, 2)
    far = couplings.assignment(x0 + 1e7, x1 + 1e7)
    np.testing.assert_allclose(far.x0 - 1e7, couplings.assignment(x0, x1).x0, atol=1e-8)


def test_trees_of_events_are_paired_as_one_vector():
    x0, x1 = normal(0, 20, 3, 2), normal(1, 20, 3, 2)

    def tree(x):
        return {"a": jnp.asarray(x[:, :1]), "b": (x[:, 1:, 0], x[:, 1:, 1])}

    whole, leaves = couplings.assignment(x0, x1), couplings.assignment(tree(x0), tree(x1))
    np.testing.assert_array_equal(leaves.x0["a"], whole.x0[:, :1])
    np.testing.assert_array_equal(leaves.x0["b"][1], whole.x0[:, 1:, 1])
    assert leaves.cost == pytest.approx(whole.cost, rel=1e-12)
    narrow = couplings.assignment(jnp.asarray(x0, jnp.bfloat16), jnp.asarray(x1, jnp.bfloat16))
    assert narrow.x0.dtype == jnp.bfloat16 and isinstance(narrow.x0, np.ndarray)


@pytest.mark.parametrize(
    "labels",
    [
        np.repeat([3, -1, 7], 20),
        np.repeat([True, False, True], 20),
        np.repeat(np.eye(3, dtype=np.int8), 20, axis=0),
        {"a": np.arange(60) % 2, "b": np.repeat([0, 1], 30).astype(np.uint8)},
    ],
    ids=["whole numbers", "booleans", "one-hot", "tree"],
)
def test_rows_move_within_their_label_alone(labels):
    x0, x1 = normal(0, 60, 2), normal(1, 60, 2)
    found = couplings.assignment(x0, x1, labels)
    came_from = np.array([np.flatnonzero((x0 == row).all(axis=1))[0] for row in found.x0])
    np.testing.assert_array_equal(np.sort(came_from), np.arange(60))
    for leaf in jax.tree.leaves(labels):
        np.testing.assert_array_equal(leaf[came_from], leaf)
    free = couplings.assignment(x0, x1)
    assert free.cost < found.cost < found.independent_cost


def expected_order_statistics(n):
    """E z_(i) of n standard normals, by quadrature: z_(i) is the normal quantile of a Beta(i, n + 1 - i)."""
    from scipy import special, stats

    z = np.linspace(-9.0, 9.0, 20_001)
    u = special.ndtr(z)[:, None]
    i = np.arange(1, n + 1)[None, :]
    density = stats.beta.pdf(u, i, n + 1 - i) * stats.norm.pdf(z)[:, None]
    return (z[:, None] * density).sum(axis=0) * (z[1] - z[0])


def minibatch_cost(n, mean, std):
    r"""The expected cost of pairing n points of N(0, 1) with n of N(mean, std^2), which is that of sorting both:

    mean^2 + 1 + std^2 - 2 std (1/n) sum_i (E z_(i))^2,    and W_2^2 = mean^2 + (std - 1)^2 as n -> infinity.
    """
    return mean**2 + 1 + std**2 - 2 * std * np.mean(expected_order_statistics(n) ** 2)


def test_the_closed_form_of_the_cost():
    # Expected maxima of two and three standard normals.
    assert minibatch_cost(2, 0.0, 1.0) == pytest.approx(2 - 2 / np.pi, rel=1e-9)
    assert minibatch_cost(3, 0.0, 1.0) == pytest.approx(2 - 3 / np.pi, rel=1e-9)
    costs = [minibatch_cost(n, 0.7, 2.0) for n in (1, 2, 8, 64, 512)]
    assert (np.diff(costs) < 0).all() and costs[0] == pytest.approx(0.7**2 + 1 + 4)
    assert 0 < costs[-1] - (0.7**2 + 1) < 0.03


@pytest.mark.parametrize(("n", "minibatches"), [(2, 4000), (3, 4000), (64, 600)])
def test_gaussian_costs_in_one_dimension(n, minibatches, assert_mean):
    x0, x1 = normal(0, minibatches, n, 1), 0.7 + 2.0 * normal(1, minibatches, n, 1)
    found = [couplings.assignment(*pair) for pair in zip(x0, x1, strict=True)]
    assert_mean([one.cost for one in found], minibatch_cost(n, 0.7, 2.0))
    assert_mean([one.independent_cost for one in found], 0.7**2 + 1 + 4)


def test_base_points_given_the_label_stay_normal(assert_mean):
    """Labels lie left and right: pairing within them keeps N(0, 1) in each, pairing across them does not."""
    label = np.tile([0, 1], (400, 16))
    x0, x1 = normal(0, 400, 32, 1), np.where(label == 1, 3.0, -3.0)[..., None] + normal(1, 400, 32, 1)
    aware = np.stack([couplings.assignment(*one).x0 for one in zip(x0, x1, label, strict=True)])
    blind = np.stack([couplings.assignment(*one).x0 for one in zip(x0, x1, strict=True)])
    for k in (0, 1):
        mine = aware[label == k].reshape(400, 16)
        # Rows of a minibatch depend on each other; minibatches do not.
        assert_mean(mine.mean(axis=1), 0.0)
        assert_mean((mine**2).mean(axis=1), 1.0)
    # Split at the median: the halves have the means of half-normals.
    assert abs(blind[label == 1].mean() - np.sqrt(2 / np.pi)) < 0.05
    # The law of one row does not depend on its place in the minibatch.
    assert_mean(aware[:, 0], 0.0)
    assert_mean(aware[:, 0] ** 2, 1.0)


def test_transport_cost(key):
    x0, x1 = {"a": normal(0, 7, 2), "b": normal(1, 7)}, {"a": normal(2, 7, 2), "b": normal(3, 7)}
    expected = square(x1["a"], x0["a"]) + square(x1["b"], x0["b"])
    assert jax.jit(couplings.transport_cost)(x0, x1) == pytest.approx(expected, rel=1e-12)
    assert couplings.assignment(x0, x1).independent_cost == pytest.approx(expected, rel=1e-12)
    low = couplings.transport_cost(jnp.ones((3, 2), jnp.bfloat16), jnp.zeros((3, 2), jnp.bfloat16))
    assert low.dtype == jnp.float32 and low == 2


# Sinkhorn. One program serves all its tests: 48 points, two labels.


@pytest.fixture(scope="module")
def entropic():
    """(epsilon, iterations, labels) -> the jitted coupling over many keys."""
    pytest.importorskip("ott")
    made = {}

    def make(*choices):
        if choices not in made:
            made[choices] = jax.jit(jax.vmap(couplings.sinkhorn(*choices), in_axes=(0, None, None)))
        return made[choices]

    return make


LABEL = jnp.arange(48, dtype=jnp.int32) % 2
POINTS = 1.5 * normal(5, 48, 2) + 4.0 * (np.arange(48) % 2)[:, None]
KEYS = 24


def draws(entropic, *choices, cond=None, seed=0):
    return np.asarray(entropic(*choices)(jax.random.split(jax.random.key(seed), KEYS), POINTS, cond))


def test_sinkhorn_tends_to_the_assignment_and_to_independence(entropic):
    """As epsilon -> 0 the pairs are optimal for their points; as epsilon -> infinity they are independent."""
    tight, middle, loose = (draws(entropic, epsilon, 3000, False) for epsilon in (1e-3, 3e-2, 1e4))
    fresh = [couplings.assignment(normal(i, 48, 2), POINTS) for i in range(KEYS)]
    exact, independent = (np.array([getattr(one, name) for one in fresh]) for name in ("cost", "independent_cost"))
    costs = [np.array([square(POINTS, x) for x in x0]) for x0 in (tight, middle, loose)]
    # Cost relative to the exact pairing of the same points.
    excess = [
        np.mean(c) - np.mean([couplings.assignment(x, POINTS).cost for x in x0])
        for c, x0 in zip(costs[:2], (tight, middle), strict=True)
    ]
    assert independent.mean() > 1.5 * exact.mean()
    assert 0 <= excess[0] < 0.005 * exact.mean() < excess[1]
    assert abs(costs[0].mean() - exact.mean()) < 4 * exact.std() * np.sqrt(2 / KEYS)
    assert abs(costs[2].mean() - independent.mean()) < 4 * independent.std() * np.sqrt(2 / KEYS)
    # The share of points that are used: nearly all, and 1 - 1/e of those drawn with replacement.
    served = [np.mean([len(np.unique(x, axis=0)) for x in drawn]) for drawn in (tight, loose)]
    assert served[0] > 40 and abs(served[1] - 48 * (1 - np.exp(-1))) < 1.5


@pytest.mark.parametrize("iterations", [3000, 1])
def test_sinkhorn_keeps_the_marginal(entropic, iterations, assert_mean):
    """Also if it stops before it has converged, because the plan is rounded onto its marginals."""
    x0 = np.concatenate([draws(entropic, 3e-2, iterations, False, seed=seed) for seed in range(1, 9)])
    assert_mean(x0.mean(axis=1), 0.0)
    assert_mean((x0**2).mean(axis=1), 1.0)


def test_sinkhorn_pairs_within_labels(entropic, assert_mean):
    x0 = np.concatenate([draws(entropic, 3e-2, 3000, True, cond=LABEL, seed=seed) for seed in range(1, 9)])
    blind = draws(entropic, 3e-2, 3000, False, cond=LABEL)
    for k in (0, 1):
        mine = x0[:, np.asarray(LABEL) == k]
        assert_mean(mine.mean(axis=1), 0.0)
        assert_mean((mine**2).mean(axis=1), 1.0)
        assert abs(blind[:, np.asarray(LABEL) == k].mean()) > 0.3
    exact = [couplings.assignment(x, POINTS, np.asarray(LABEL)).cost for x in normal(0, KEYS, 48, 2)]
    costs = [square(POINTS, x) for x in x0]
    assert np.mean(exact) < np.mean(costs) < 1.1 * np.mean(exact)


def test_the_plan_has_its_marginals_and_no_mass_across_labels():
    pytest.importorskip("ott")
    x0, same = jnp.asarray(normal(0, 48, 2)), LABEL[:, None] == LABEL[None, :]
    for iterations in (1, 3000):
        plan = np.asarray(couplings._plan(x0, POINTS, same, 1e-2, iterations))
        assert plan.min() >= 0 and (plan[~np.asarray(same)] == 0).all()
        np.testing.assert_allclose(plan.sum(axis=0), 1 / 48, rtol=1e-10)
        np.testing.assert_allclose(plan.sum(axis=1), 1 / 48, rtol=1e-10)
    # Converged, it is the one plan diag(u) exp(-C/epsilon) diag(v) with these marginals (Sinkhorn), here made by scaling.
    plan = np.asarray(couplings._plan(x0, POINTS, jnp.ones((48, 48), bool), 0.1, 3000))
    x0, x1 = np.asarray(x0 - x0.mean(axis=0, keepdims=True)), POINTS - POINTS.mean(axis=0)
    cost = ((x1[:, None] - x0[None]) ** 2).sum(axis=-1)
    expected = np.exp(-cost / cost.mean() / 0.1)
    for _ in range(500):
        expected /= 48 * expected.sum(axis=0)
        expected /= 48 * expected.sum(axis=1, keepdims=True)
    # The iterations stop at an error of 1e-3 in the marginals, and rounding adds at most twice that.
    assert np.abs(plan - expected).sum() < 5e-3


def test_where_the_data_lie_does_not_matter_to_the_plan():
    pytest.importorskip("ott")
    plan = jax.jit(lambda x0, x1: couplings._plan(x0, x1, jnp.ones((48, 48), bool), 3e-2, 3000))
    x0 = jnp.asarray(normal(0, 48, 2), jnp.float32)
    near, far = plan(x0, jnp.asarray(POINTS, jnp.float32)), plan(x0, jnp.asarray(POINTS + 1e3, jnp.float32))
    # At 1e3 single precision holds points to 6e-5.
    assert np.abs(near - far).sum() < 0.02
    single = couplings._plan(x0[:1], x0[1:2], jnp.ones((1, 1), bool), 3e-2, 10)
    np.testing.assert_array_equal(single, [[1.0]])


def test_sinkhorn_takes_trees_in_single_precision(key):
    pytest.importorskip("ott")
    x1 = {"a": jnp.asarray(normal(0, 8, 1), jnp.float32), "b": jnp.asarray(normal(1, 8), jnp.bfloat16)}
    coupling = jax.jit(couplings.sinkhorn())
    x0 = coupling(key, x1, {"k": jnp.zeros((8, 3), jnp.int32)})
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), x0) == jax.tree.map(lambda a: (a.shape, a.dtype), x1)
    assert "callback" not in str(jax.make_jaxpr(coupling)(jax.random.key(1), x1))


# The pool.


def cells(key, n):
    """Labelled points: label 1 to the right."""
    label = jnp.arange(n, dtype=jnp.int32) % 2
    # Drawn like base points: the same keys would give the same numbers.
    x = couplings.independent(key, jnp.zeros((n, 2))) + 4.0 * label[:, None].astype(float)
    return Batch(x1=x, cond=label)


@pytest.fixture(scope="module")
def pool():
    return datasets.coupled(SampledDataset(cells, 32, seed=0), 20, batch_size=24)


def test_a_pool_holds_the_pairs_of_its_minibatches(pool):
    source = SampledDataset(cells, 32, seed=0)
    assert pool.size == 640 and pool.batch_size == 24
    x0, x1 = (np.asarray(leaf).reshape(20, 32, 2) for leaf in (pool.data.x0, pool.data.x1))
    costs = []
    for k in range(20):
        batch = source.batch(None, jnp.int32(k))
        np.testing.assert_allclose(x1[k], batch.x1, rtol=1e-12)
        again = couplings.assignment(x0[k], x1[k], np.asarray(batch.cond))
        np.testing.assert_array_equal(again.x0, x0[k])
        costs.append(again.cost)
    assert pool.cost == pytest.approx(np.mean(costs), rel=1e-12)
    # Independent: 2 + E|x1|^2 = 20. Each label's optimum is a translation, by (0, 0) or (4, 4): 16 on average.
    assert pool.independent_cost == pytest.approx(20, rel=0.05)
    assert 16 < pool.cost < 18


def test_the_marginals_of_a_pool(pool, assert_mean):
    x0, x1, label = (np.asarray(leaf) for leaf in (pool.data.x0, pool.data.x1, pool.data.cond))
    for k in (0, 1):
        mine = x0[label == k]
        assert_mean(mine, 0.0)
        assert_mean(mine**2, 1.0)
        assert_mean(x1[label == k], 4.0 * k)
    # The base points do not come from the keys of the samples, although both seeds are 0.
    drawn = x1 - 4.0 * label[:, None]
    assert not np.isin(np.round(x0, 9), np.round(drawn, 9)).any()


@pytest.mark.slow
def test_batches_of_a_pool_are_functions_of_the_step(pool):
    take = jax.jit(pool.batch)
    batch = take(pool.data, np.int32(5))
    assert batch.x0.shape == batch.x1.shape == (24, 2) and batch.cond.shape == (24,)
    jax.tree.map(np.testing.assert_array_equal, batch, take(pool.data, np.int32(5)))
    jax.tree.map(np.testing.assert_array_equal, batch, pool.batch(pool.data, jnp.int32(5)))
    same = datasets.coupled(SampledDataset(cells, 32, seed=0), 20, batch_size=24)
    jax.tree.map(np.testing.assert_array_equal, batch, same.batch(same.data, jnp.int32(5)))

    # As in training: a scan that resumes at step 3 equals the unbroken one.
    @jax.jit
    def run(data, steps):
        return jax.lax.scan(lambda _, step: (None, pool.batch(data, step)), None, steps)[1]

    whole, rest = run(pool.data, jnp.arange(8)), run(pool.data, jnp.arange(3, 11))
    np.testing.assert_array_equal(whole.x0[3:], rest.x0[:5])
    np.testing.assert_array_equal(whole.x0[5], batch.x0)
    assert "callback" not in str(jax.make_jaxpr(run)(pool.data, jnp.arange(8)))
    # Pairs stay pairs.
    known = {(*a, *b) for a, b in zip(np.asarray(pool.data.x0), np.asarray(pool.data.x1), strict=True)}
    assert {(*a, *b) for a, b in zip(np.asarray(batch.x0), np.asarray(batch.x1), strict=True)} <= known


def test_a_pool_of_rows_in_memory():
    rows = ArrayDataset(Batch(x1=normal(0, 30, 2).astype(np.float32)), batch_size=10)
    pool = datasets.coupled(rows, 6, seed=3)
    assert pool.batch_size == 10 and pool.data.cond is None and pool.data.x0.dtype == jnp.float32
    # Six batches of ten are two epochs of thirty rows.
    count = np.unique(pool.data.x1, axis=0, return_counts=True)[1]
    np.testing.assert_array_equal(count, np.full(30, 2))
    other = datasets.coupled(rows, 6, seed=4)
    assert not np.isin(np.asarray(other.data.x0), np.asarray(pool.data.x0)).any()
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), one.data) for one in (pool, other)]
    assert shapes[0] == shapes[1]
    reverse = datasets.coupled(rows, 6, seed=3, couple=lambda x0, x1, cond: couplings.Assignment(x0[::-1], 2.0, 4.0))
    assert (reverse.cost, reverse.independent_cost) == (2.0, 4.0)
    assert not np.array_equal(reverse.data.x0, pool.data.x0)


# Reflow.


GAUSSIAN = oracles.gaussian_params([1.0, -2.0], [0.25, 9.0])


def test_reflow_pairs_of_a_gaussian_are_affine(assert_mean):
    oracle = oracles.gaussian(interpolants.linear())
    bound, like = oracle.flow_map.bind(GAUSSIAN), jax.ShapeDtypeStruct((2,), jnp.float64)
    # 1003 rows: the last block is not whole.
    pairs = jax.device_get(couplings.reflow(bound, jax.random.key(0), like, 1003, chunk=100))
    assert pairs.x0.shape == (1003, 2) and pairs.cond is None
    np.testing.assert_allclose(pairs.x1, [1.0, -2.0] + np.asarray(pairs.x0) * [0.5, 3.0], rtol=1e-10, atol=1e-12)
    assert_mean(pairs.x0, 0.0)
    assert_mean(pairs.x0**2, 1.0)
    solved = solvers.solve(oracle.velocity).bind(GAUSSIAN)
    again = jax.device_get(couplings.reflow(solved, jax.random.key(0), like, 1003, chunk=1003))
    np.testing.assert_array_equal(again.x0, pairs.x0)
    np.testing.assert_allclose(again.x1, pairs.x1, atol=1e-6)
    dataset = ArrayDataset(pairs, 10)
    batch = jax.device_get(jax.jit(dataset.batch)(dataset.data, jnp.int32(0)))
    np.testing.assert_allclose(batch.x1[:, 1], -2.0 + 3.0 * batch.x0[:, 1], rtol=1e-10, atol=1e-12)
    # The map of a Gaussian is the optimal one: its pairs cost W_2^2 = |m|^2 + sum (sigma - 1)^2 = 9.25.
    assert_mean(((pairs.x1 - pairs.x0) ** 2).sum(axis=1), 5 + 0.25 + 4)


def test_reflow_hands_on_trees_and_conditioning():
    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        assert x["a"].shape == () and s.dtype == jnp.float32
        return {"a": params * cond.astype(jnp.float32), "b": -x["b"]}

    like = {"a": np.float32(0), "b": jnp.zeros(2, jnp.bfloat16)}
    bound = FlowMap(mean_velocity).bind(jnp.float32(10))
    pairs = couplings.reflow(bound, jax.random.key(0), like, 5, jnp.arange(5), chunk=2)
    np.testing.assert_allclose(pairs.x1["a"], np.asarray(pairs.x0["a"]) + 10 * np.arange(5), rtol=1e-6)
    assert pairs.x1["b"].dtype == jnp.bfloat16 and (pairs.x1["b"] == 0).all()
    np.testing.assert_array_equal(pairs.cond, np.arange(5))


def test_reflow_refuses_what_is_not_finite():
    bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: x / params).bind(jnp.zeros(()))
    with pytest.raises(RuntimeError, match=r"bound: X_\(0,1\) is not finite at 7 of 7 base points"):
        couplings.reflow(bound, jax.random.key(0), jnp.zeros(2), 7)


# Errors.

HALF = FlowMap(lambda *args, **kwargs: args[3], domain=Domain("t = 1/2 only", target=0.5)).bind(None)
WHOLE = FlowMap(lambda *args, **kwargs: args[3]).bind(None)
X = np.zeros((4, 2))


def fresh():
    return jax.random.key(0)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: couplings.assignment(X, X[:3]), "x0: expected the shape of x1"),
        (ValueError, lambda: couplings.assignment(X, {"a": X}), "x0: expected the pytree structure of x1"),
        (ValueError, lambda: couplings.assignment({"a": X, "b": X[:3]}, {"a": X, "b": X[:3]}), "x1: .* leading axis"),
        (ValueError, lambda: couplings.assignment(X[:0], X[:0]), "x1: expected arrays with one common leading axis"),
        (TypeError, lambda: couplings.assignment(X.astype(int), X), "x0: expected floating-point"),
        (ValueError, lambda: couplings.assignment(X, X + np.inf), "x1: expected finite points, got 4 of 4"),
        (ValueError, lambda: couplings.assignment(X + np.nan, X), "x0: expected finite points"),
        (TypeError, lambda: couplings.assignment(X, X, np.zeros(4)), "labels: expected whole numbers or booleans"),
        (ValueError, lambda: couplings.assignment(X, X, np.zeros(3, int)), "labels: expected a leading axis of 4 rows"),
        (TypeError, lambda: jax.jit(couplings.assignment)(X, X), "x0: expected arrays of known values, .* jax.jit"),
        (ValueError, lambda: couplings.transport_cost(X, X[:, :1]), "x0: expected the shape of x1"),
        (TypeError, lambda: couplings.transport_cost(X, X.astype(int)), "x1: expected floating-point"),
        (ValueError, lambda: couplings.sinkhorn(0.0), "epsilon"),
        (ValueError, lambda: couplings.sinkhorn(iterations=0), "iterations"),
        (ValueError, lambda: couplings.reflow(HALF, fresh(), X[0], 3), r"bound: .* \(0, 1\), .* t = 1/2 only"),
        (ValueError, lambda: couplings.reflow(WHOLE, fresh(), X[0], 0), "n: expected a whole number"),
        (ValueError, lambda: couplings.reflow(WHOLE, fresh(), X[0], 3, chunk=0), "chunk"),
        (ValueError, lambda: couplings.reflow(WHOLE, fresh(), X[0], 3, np.zeros(4)), "cond: .* axis of n = 3, got 4"),
        (TypeError, lambda: couplings.reflow(WHOLE, fresh(), np.zeros(2, int), 3), "like: expected floating-point"),
        (ValueError, lambda: datasets.coupled(ArrayDataset(Batch(X), 2), 0), "batches"),
        (ValueError, lambda: datasets.coupled(ArrayDataset(Batch(X), 2), 1, seed=-1), "seed"),
        (ValueError, lambda: datasets.coupled(ArrayDataset(Batch(X), 2), 1, batch_size=0), "batch_size"),
        (ValueError, lambda: datasets.coupled(ArrayDataset(Batch(X, X), 2), 1), "dataset: .* without x0"),
        (ValueError, lambda: datasets.coupled(ArrayDataset(X, 2), 1), "dataset: .* a Batch without x0"),
        (TypeError, lambda: datasets.coupled(ArrayDataset(Batch(X, cond=X), 2), 1), "labels: expected whole numbers"),
    ],
)
def test_refusals_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_sinkhorn_refuses_labels_that_are_not_discrete():
    pytest.importorskip("ott")
    coupling = couplings.sinkhorn()
    with pytest.raises(TypeError, match="cond: expected whole numbers or booleans"):
        coupling(fresh(), jnp.asarray(X), jnp.zeros(4))
    with pytest.raises(ValueError, match="cond: expected a leading axis of 4 rows"):
        coupling(fresh(), jnp.asarray(X), jnp.zeros(3, jnp.int32))
    with pytest.raises(TypeError, match="x1: expected floating-point"):
        coupling(fresh(), jnp.zeros((4, 2), jnp.int32))


def test_a_missing_package_is_named(monkeypatch):
    without(monkeypatch, "ott")
    with pytest.raises(ImportError, match=r"pip install 'jflow\[ott\]'"):
        couplings.sinkhorn()
    without(monkeypatch, "scipy")
    with pytest.raises(ImportError, match="pip install scipy"):
        couplings.assignment(X, X)
