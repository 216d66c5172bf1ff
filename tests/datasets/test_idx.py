"""IDX files: bytes written by hand, round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from jflow import datasets
from jflow.datasets import idx

# Two images of 2 x 3, as the format's description lays them out.
BYTES = struct.pack(">HBBIII", 0, 0x08, 3, 2, 2, 3) + bytes(range(12))


def saved(folder, content, name="a-idx3-ubyte"):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bytes_written_by_hand_are_read(tmp_path, pack):
    """Compression is seen from the content; the ending does not matter."""
    for name in ("a", "a.gz"):
        array = datasets.read_idx(saved(tmp_path, pack(BYTES), name))
        assert array.dtype == np.uint8 and array.flags.writeable
        np.testing.assert_array_equal(array, np.arange(12).reshape(2, 2, 3))
    wide = struct.pack(">HBBI", 0, 0x0B, 1, 3) + struct.pack(">hhh", 1, -2, 300)
    np.testing.assert_array_equal(datasets.read_idx(saved(tmp_path, pack(wide))), [1, -2, 300])
    wide = struct.pack(">HBBI", 0, 0x0D, 1, 2) + struct.pack(">ff", 1.5, -(2.0**-20))
    np.testing.assert_array_equal(datasets.read_idx(saved(tmp_path, pack(wide))), [1.5, -(2.0**-20)])
    np.testing.assert_array_equal(datasets.read_idx(saved(tmp_path, pack(b"\0\0\x0e\0" + struct.pack(">d", 0.1)))), 0.1)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", idx.CODES)
def test_round_trip(tmp_path, name, order):
    values = np.random.default_rng(0).integers(0, 256, size=(2, 3, 4, 5), dtype=np.uint8)
    wide = values.astype(np.dtype(name).newbyteorder(order))
    for array in (wide, wide.T, wide[0, 0, 0], wide[0, 0, 0, 0], wide[:0], wide[None, :, None]):
        for path in (tmp_path / "a", tmp_path / "a.gz"):
            datasets.write_idx(path, array)
            got = datasets.read_idx(path)
            assert got.dtype == np.dtype(name) and got.dtype.isnative and got.shape == array.shape
            np.testing.assert_array_equal(got, array)
    first = (tmp_path / "a.gz").read_bytes()
    assert first[:2] == idx.GZIP_MAGIC and first[4:8] == b"\0\0\0\0"
    datasets.write_idx(tmp_path / "a", np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert (tmp_path / "a").read_bytes() == BYTES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file: .* got an empty file$"),
        (b"\0\0\x08", "is not an IDX file: .* got 00 00 08$"),
        (
            b"\x89PNG0000",
            "is not an IDX file: expected the bytes 00 00, one of 08, 09, 0b, 0c, 0d, 0e, and the rank, got 89 50",
        ),
        (b"\0\0\x0a\x01" + BYTES[4:], "is not an IDX file"),
        (b"\x03\x08\0\0" + BYTES[4:], "is not an IDX file.*; it is in little-endian order$"),
        (
            BYTES[:4] + struct.pack("<III", 2, 2, 3) + BYTES[16:],
            "is truncated.* got 12; its sizes fit in little-endian order$",
        ),
        (b"\0\0\x08\x41" + bytes(400), "expected a rank of at most 64, got 65$"),
        (BYTES[:15], "is truncated: expected a header of 16 bytes for rank 3, got 15$"),
        (BYTES[:-1], r"is truncated: expected 12 bytes after the header for uint8\[2, 2, 3\], got 11$"),
        (BYTES[:4], "is truncated: expected a header of 16 bytes"),
        (BYTES + b"\0", r"has trailing bytes: expected 12 bytes after the header for uint8\[2, 2, 3\], got 13$"),
        (BYTES[:4] + b"\xff" * 12, r"is truncated: expected \d+ bytes"),
        (BYTES[:4] + b"\0\0\0\0" + b"\xff" * 8, r"numpy cannot hold the shape \[0, 4294967295, 4294967295\]"),
        (gzip.compress(BYTES)[:-9], "is damaged or truncated"),
        (gzip.compress(BYTES)[:12], "is damaged or truncated"),
        (gzip.compress(BYTES) + b"rest", "is damaged or truncated"),
        (gzip.compress(BYTES)[:-5] + b"12345", "is damaged or truncated"),
        (gzip.compress(BYTES[:-2]), "is truncated"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, content, message):
    path = saved(tmp_path, content, "wrong-idx3-ubyte")
    with pytest.raises(ValueError, match=f"^read_idx: .*wrong-idx3-ubyte.*{message}"):
        datasets.read_idx(path)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^read_idx: .*none does not exist"):
        datasets.read_idx(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^read_idx: expected an IDX file, got the folder"):
        datasets.read_idx(tmp_path)
    for array in (np.arange(3), np.zeros(3, bool), np.zeros(3, np.float16), np.array(["a"])):
        with pytest.raises(TypeError, match=f"^array: expected a dtype of the IDX format, .* got {array.dtype}$"):
            datasets.write_idx(tmp_path / "a", array)
    assert not (tmp_path / "a").exists()


IMAGES = {"train": np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3), "t10k": np.ones((2, 4, 3), np.uint8)}
LABELS = {"train": np.array([3, 1, 4, 1, 5], np.uint8), "t10k": np.array([9, 2], np.uint8)}


def write_folder(folder, mark="-", ending="", images=IMAGES, labels=LABELS):
    for part in ("train", "t10k"):
        datasets.write_idx(folder / f"{part}-images{mark}idx3-ubyte{ending}", images[part])
        datasets.write_idx(folder / f"{part}-labels{mark}idx1-ubyte{ending}", labels[part])


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
def test_a_folder_under_each_of_its_names(tmp_path, mark, ending):
    write_folder(tmp_path, mark, ending)
    for split in (datasets.mnist_folder(tmp_path), datasets.fashion_mnist(str(tmp_path))):
        for part, batch in zip(("train", "t10k"), (split.train, split.held_out), strict=True):
            assert batch.x1.dtype == np.uint8 and batch.cond.dtype == np.int32 and batch.x0 is None
            np.testing.assert_array_equal(batch.x1, IMAGES[part][..., None])
            np.testing.assert_array_equal(batch.cond, LABELS[part])


def test_the_plain_file_is_read_before_the_compressed_one(tmp_path):
    write_folder(tmp_path, ending=".gz")
    datasets.write_idx(tmp_path / "train-labels.idx1-ubyte", LABELS["train"] + np.uint8(1))
    np.testing.assert_array_equal(datasets.mnist_folder(tmp_path).train.cond, LABELS["train"] + 1)


def test_missing_files_name_the_package(tmp_path):
    package = "they are in the Debian package dataset-fashion-mnist: apt install dataset-fashion-mnist$"
    with pytest.raises(FileNotFoundError, match=f"no does not exist.*{package}"):
        datasets.fashion_mnist(tmp_path / "no")
    write_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    expected = "has none of t10k-labels-idx1-ubyte, t10k-labels.idx1-ubyte, t10k-labels-idx1-ubyte.gz, "
    with pytest.raises(FileNotFoundError, match=f"^mnist_folder: .*{expected}.*{package}"):
        datasets.fashion_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\.gz$"):
        datasets.mnist_folder(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ({"t10k": np.ones((2, 4), np.uint8)}, {}, r"t10k-images.*expected images uint8\[n, H, W\], got uint8\[2, 4\]$"),
        ({"t10k": np.ones((2, 4, 3), np.int8)}, {}, r"got int8\[2, 4, 3\]$"),
        ({"train": np.ones((0, 4, 3), np.uint8)}, {}, r"got uint8\[0, 4, 3\]$"),
        (
            {"t10k": np.ones((2, 4, 4), np.uint8)},
            {},
            r"images of one size, got \[4, 3\] for train and \[4, 4\] for t10k$",
        ),
        ({}, {"train": np.ones((5, 1), np.uint8)}, r"train-labels.*expected whole numbers \[n\], got uint8\[5, 1\]$"),
        ({}, {"train": np.ones(5, np.float32)}, r"train-labels.*expected whole numbers \[n\], got float32\[5\]$"),
        (
            {},
            {"train": np.ones(4, np.uint8)},
            "train-labels.*a label for each of the 5 images of train-images.*, got 4$",
        ),
    ],
)
def test_folders_whose_arrays_do_not_belong_together_are_refused(tmp_path, images, labels, message):
    write_folder(tmp_path, images=IMAGES | images, labels=LABELS | labels)
    with pytest.raises(ValueError, match=f"^mnist_folder: .*{message}"):
        datasets.mnist_folder(tmp_path)
