"""The split of a batch into diagonal and off-diagonal rows."""

import jax
import numpy as np
import pytest

from jflow.objectives.batch_split import split_batch

SIZE, BLOCKS = 12, 3


def split(share=0.75, size=SIZE, blocks=BLOCKS, seed=0):
    return split_batch(jax.random.key(seed), size, share, blocks)


def test_each_block_has_its_share_at_places_drawn_anew():
    found, again, other = split(), split(), split(seed=1)
    assert found.counts == (9, 3)
    np.testing.assert_array_equal(found.mask.reshape(BLOCKS, -1).sum(1), 3)
    places = np.concatenate([found.diagonal, found.off_diagonal], 1)
    np.testing.assert_array_equal(np.sort(places, 1), np.tile(np.arange(4), (BLOCKS, 1)))
    np.testing.assert_array_equal(found.mask, again.mask)
    assert np.any(found.mask != other.mask)


def test_rows_are_taken_by_kind_and_put_back_in_batch_order():
    found = split()
    mask = np.asarray(found.mask)
    tree = {"x": np.arange(2.0 * SIZE).reshape(SIZE, 2), "label": np.arange(SIZE)}
    on, off = found.take(tree)
    # Within a block the order is that of the draw.
    np.testing.assert_array_equal(np.sort(on["label"]), np.flatnonzero(mask))
    np.testing.assert_array_equal(np.sort(off["label"]), np.flatnonzero(~mask))
    for rows in (on, off):
        np.testing.assert_array_equal(rows["x"], tree["x"][rows["label"]])
        np.testing.assert_array_equal(np.diff(rows["label"] // 4) >= 0, True)
    np.testing.assert_array_equal(found.put(on["label"], off["label"]), np.arange(SIZE))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_batch_of_one_kind_is_taken_whole(share):
    found, values = split(share), np.arange(SIZE)
    on, off = found.take(values)
    whole, other = (on, off) if share else (off, on)
    np.testing.assert_array_equal(whole, values)
    assert other is None
    np.testing.assert_array_equal(found.put(on, off), values)
    np.testing.assert_array_equal(found.mask, np.full(SIZE, bool(share)))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"blocks": 5}, "expected a size divisible by blocks = 5, got 12"),
        ({"share": 0.1}, "12 rows in 3 blocks leave none for one kind at diagonal = 0.1"),
        ({"share": 0.9}, "12 rows in 3 blocks leave none for one kind at diagonal = 0.9"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(choices, message):
    with pytest.raises(ValueError, match=f"^batch: {message}"):
        split(**choices)
