"""Batches in groups of one label: the label's share, independence within a label, resumption and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import datasets, types

LABELS = np.repeat([3, 0, 7], [50, 30, 20])[np.random.default_rng(0).permutation(100)]
DATA = types.Batch(x1=np.arange(100.0)[:, None], cond=LABELS)


def batches(dataset, steps):
    run = jax.jit(jax.vmap(dataset.batch, (None, 0)))
    return run(dataset.data, jnp.arange(steps, dtype=jnp.int32))


def test_groups_share_a_label_that_comes_as_often_as_in_the_data():
    dataset = datasets.grouped(DATA, batch_size=12, size=4, seed=1)
    found = batches(dataset, 2000)
    labels = np.asarray(found.cond).reshape(-1, 4)
    assert np.all(labels == labels[:, :1])
    # Rows stay with their labels.
    np.testing.assert_array_equal(LABELS[np.asarray(found.x1, int).ravel()], labels.ravel())
    for label, share in ((3, 0.5), (0, 0.3), (7, 0.2)):
        frequency = np.mean(labels[:, 0] == label)
        assert abs(frequency - share) < 4 * np.sqrt(share * (1 - share) / len(labels))
    # Every row of a label comes as often as another, also as the first and as the last of its group.
    rows = np.asarray(found.x1, int).reshape(-1, 4)
    for column in (0, 3):
        counts = np.bincount(rows[:, column], minlength=100)
        assert np.all(np.abs(counts - len(rows) / 100) < 5 * np.sqrt(len(rows) / 100))
    # Two rows of a group are independent: they are the same row in one of count cases.
    same = np.mean(rows[labels[:, 0] == 7][:, 0] == rows[labels[:, 0] == 7][:, 1])
    assert abs(same - 1 / 20) < 4 * np.sqrt(0.05 * 0.95 / np.sum(labels[:, 0] == 7))


def test_a_batch_is_a_function_of_seed_and_step():
    dataset, again = (datasets.grouped(DATA, 8, 4, seed=5) for _ in range(2))
    first, other = batches(dataset, 3), batches(datasets.grouped(DATA, 8, 4, seed=6), 3)
    jax.tree.map(np.testing.assert_array_equal, first, batches(again, 3))
    assert not np.array_equal(first.x1, other.x1) and not np.array_equal(first.x1[0], first.x1[1])


def test_labels_of_their_own():
    dataset = datasets.grouped(types.Batch(DATA.x1), 8, 4, labels=LABELS)
    found = batches(dataset, 50)
    assert found.cond is None
    labels = LABELS[np.asarray(found.x1, int).reshape(-1, 4)]
    assert np.all(labels == labels[:, :1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: datasets.grouped(DATA, 10, 4), ValueError, "batch_size: expected a multiple"),
        (lambda: datasets.grouped(DATA, 8, 0), ValueError, "size"),
        (lambda: datasets.grouped(types.Batch(DATA.x1), 8, 4), ValueError, "labels"),
        (lambda: datasets.grouped(DATA, 8, 4, labels=LABELS[:50]), ValueError, "labels"),
        (
            lambda: datasets.grouped(DATA, 8, 4, labels=LABELS.astype(float)),
            TypeError,
            "labels: expected whole numbers",
        ),
        (lambda: datasets.grouped(DATA._replace(cond=LABELS[:9]), 8, 4), ValueError, "data"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
