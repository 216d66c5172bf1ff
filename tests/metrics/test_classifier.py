"""The classifier: it learns, it is deterministic, and it survives a round trip through a file."""

from __future__ import annotations

import numpy as np
import pytest

from jflow import metrics

RECIPE = metrics.Recipe(width=32, features=8, epochs=6, batch_size=32, dropout=0.1, shift=1, learning_rate=1e-2)


def stripes(n, seed):
    """Noisy 6x6 images of three classes: bright rows, bright columns, and a bright square."""
    rng = np.random.default_rng(seed)
    patterns = np.zeros((3, 6, 6, 1))
    patterns[0, ::2], patterns[1, :, ::2], patterns[2, 2:4, 2:4] = 1, 1, 1
    labels = rng.integers(0, 3, n)
    return np.clip(80 + 90 * patterns[labels] + rng.normal(0, 40, (n, 6, 6, 1)), 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained():
    return metrics.train_classifier(*stripes(320, 0), recipe=RECIPE, name="stripes")


@pytest.mark.slow
def test_it_learns_and_is_deterministic(trained):
    images, labels = stripes(200, 1)
    found = metrics.features(trained, images, labels=labels)
    assert found.values.shape == (200, 8) and found.logits.shape == (200, 3)
    assert metrics.label_accuracy(found).value > 0.95
    again = metrics.train_classifier(*stripes(320, 0), recipe=RECIPE, name="stripes")
    assert again.hash == trained.hash


@pytest.mark.slow
def test_a_file_holds_the_network(trained, tmp_path):
    path = tmp_path / "net.npz"
    metrics.save_classifier(path, trained)
    loaded = metrics.load_classifier(path)
    assert (loaded.name, loaded.hash) == ("stripes", trained.hash)
    images, _ = stripes(20, 2)
    np.testing.assert_array_equal(metrics.features(loaded, images).values, metrics.features(trained, images).values)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["layer0.bias"][0] += np.float32(1e-3)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"^load_classifier: .*net.npz: expected parameters with the hash"):
        metrics.load_classifier(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"net.npz is not a file of save_classifier"):
        metrics.load_classifier(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"net.npz is not a file of save_classifier"):
        metrics.load_classifier(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match=r"net.npz is not a file of save_classifier"):
        metrics.load_classifier(path)
    with pytest.raises(FileNotFoundError, match=r"^load_classifier: .*none.npz does not exist"):
        metrics.load_classifier(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"^path: expected a name that ends in \.npz"):
        metrics.save_classifier(tmp_path / "net", trained)
    other = metrics.FeatureNet("other", {}, lambda p, x: metrics.Outputs(x))
    with pytest.raises(ValueError, match=r"^net: expected a network of train_classifier, got other$"):
        metrics.save_classifier(path, other)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"images": np.zeros((9, 4), np.uint8)}, "^images: expected an array of shape"),
        (TypeError, {"images": np.zeros((9, 4, 4, 1), int)}, "^images: expected floating-point"),
        (ValueError, {"images": np.full((9, 4, 4, 1), np.nan)}, "^images: expected finite values$"),
        (ValueError, {"labels": np.zeros(8, int)}, "^labels: expected an array of shape"),
        (TypeError, {"labels": np.zeros(9)}, "^labels: expected whole numbers"),
        (ValueError, {"labels": np.arange(9) - 1}, "^labels: expected 0 to 7, got -1 to 7$"),
        (
            ValueError,
            {"images": np.zeros((0, 4, 4, 1), np.uint8), "labels": np.arange(0)},
            "^images: expected arrays with",
        ),
        (ValueError, {"classes": 5}, "^labels: expected 0 to 4, got 0 to 8$"),
    ],
)
def test_refusals(error, change, message):
    arguments = {"images": np.zeros((9, 4, 4, 1), np.uint8), "labels": np.arange(9)}
    with pytest.raises(error, match=message):
        metrics.train_classifier(**arguments | change)
    with pytest.raises(TypeError, match=r"^flips: expected True or False, got 'no'$"):
        metrics.Recipe(flips="no")
    with pytest.raises(ValueError, match=r"^epochs: expected"):
        metrics.Recipe(epochs=0)
