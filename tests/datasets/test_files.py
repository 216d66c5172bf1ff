"""Rows read from files; batches of them that no number of processes, threads or restarts changes."""

from __future__ import annotations

import builtins
import importlib.util
import itertools
import json

import jax
import numpy as np
import pytest

from jflow import datasets
from jflow.training import Feed
from jflow.types import Batch

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(7, 3, 2)).astype(np.float16)
LABELS = np.arange(7, dtype=np.int8) * 3

needs_grain = pytest.mark.skipif(not importlib.util.find_spec("grain"), reason="grain is not installed")


def assert_rows(source, x1, cond=None):
    """All rows of a source are these, each a copy of its own."""
    source_rows = list(source)
    assert len(source) == len(source_rows) == len(x1)
    for index, row in enumerate(source_rows):
        assert isinstance(row, Batch) and row.x0 is None and type(row.x1) is np.ndarray
        assert row.x1.dtype == x1.dtype and (row.cond is None) == (cond is None)
        np.testing.assert_array_equal(row.x1, x1[index])
        if cond is not None:
            assert row.cond.dtype == cond.dtype
            np.testing.assert_array_equal(row.cond, cond[index])
        row.x1[...] = 0
        np.testing.assert_array_equal(source[np.int64(index)].x1, x1[index])
    for index in (len(x1), -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz(tmp_path, save, order):
    path = tmp_path / "rows.npz"
    save(path, x1=np.asarray(X, order=order), other=LABELS, y=np.asarray(X[..., 0].astype(np.float64), order=order))
    assert_rows(datasets.npz(path), X)
    source = datasets.npz(str(path), x1="y", cond="other")
    assert_rows(source, X[..., 0].astype(np.float64), LABELS)
    mapped = [isinstance(array, np.memmap) for array in jax.tree.leaves(source._parts)]
    assert mapped == [save is np.savez] * 2


def test_array_folder(tmp_path):
    for name, part in {"b": slice(3, 3), "a": slice(0, 3), "c": slice(3, 7)}.items():
        np.save(tmp_path / f"{name}.npy", X[part])
    np.save(tmp_path / ".hidden.npy", X[:, 0])
    (tmp_path / "README").write_text("")
    assert_rows(datasets.array_folder(tmp_path), X)
    for name, part in {"b": slice(3, 3), "a": slice(0, 3), "c": slice(3, 7)}.items():
        np.save(tmp_path / f"{name}.cond.npy", LABELS[part])
    assert_rows(datasets.array_folder(tmp_path), X, LABELS)


def save_all(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name.replace('_', '.')}.npy", array)
    return folder


def folder_of(**arrays):
    return lambda tmp: datasets.array_folder(save_all(tmp / "folder", **arrays))


def npz_of(names=("x1",), **arrays):
    def call(tmp):
        np.savez(tmp / "rows.npz", **arrays)
        return datasets.npz(tmp / "rows.npz", *names)

    return call


def with_bytes(name, content, read):
    def call(tmp):
        (tmp / name).write_bytes(content)
        return read(tmp)

    return call


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            FileNotFoundError,
            lambda tmp: datasets.npz(tmp / "no"),
            "npz: .*no does not exist; .* pass the path of an .npz",
        ),
        (FileNotFoundError, lambda tmp: datasets.array_folder(tmp / "no"), "array_folder: .*no does not exist"),
        (ValueError, lambda tmp: datasets.npz(tmp), "expected an .npz file, .* got the folder"),
        (ValueError, with_bytes("a", b"", lambda tmp: datasets.array_folder(tmp / "a")), "got the file"),
        (
            ValueError,
            with_bytes("a", b"x" * 99, lambda tmp: datasets.npz(tmp / "a")),
            "a cannot be read as an .npz file",
        ),
        (ValueError, npz_of(a=X, b=X), "rows.npz has no array 'x1', expected one of a, b"),
        (ValueError, npz_of(("x1", "y"), x1=X, y=LABELS[:6]), r"rows.npz: expected arrays \[n, ...\] with one n"),
        (ValueError, npz_of(x1=np.float32(3)), r"expected arrays \[n, ...\]"),
        (ValueError, npz_of(x1=X[:0]), "x1 has no rows"),
        (ValueError, npz_of(x1=np.array([{}, {}])), "rows.npz: x1 cannot be read"),
        (ValueError, datasets.array_folder, "expected files NAME.npy in .* found none"),
        (ValueError, folder_of(a=X[:0]), "expected rows in the files"),
        (
            ValueError,
            with_bytes("a.npz", b"", datasets.array_folder),
            "expected the arrays in files NAME.npy, got .*a.npz",
        ),
        (
            ValueError,
            with_bytes("a.NPY", b"", datasets.array_folder),
            "expected the arrays in files NAME.npy, got .*a.NPY",
        ),
        (
            ValueError,
            folder_of(a=X, b=X[:, :2]),
            r"b.npy: expected rows like those of a.npy, .*\[3, 2\].* got .*\[2, 2\]",
        ),
        (ValueError, folder_of(a=X, b=X.astype(np.float32)), "b.npy: expected .* got .*float32"),
        (ValueError, folder_of(a=X, a_cond=LABELS, b=X), "b.cond.npy is missing, while other files have theirs"),
        (ValueError, folder_of(a=X, a_cond=LABELS, b_cond=LABELS), "b.cond.npy has no data file"),
        (ValueError, folder_of(a=X, a_cond=LABELS[:3]), r"a.npy: expected arrays \[n, ...\] with one n"),
        (ValueError, folder_of(a=np.array([{}, {}])), "a.npy cannot be read"),
        (ValueError, with_bytes("a.npy", b"\x93NUMPY", datasets.array_folder), "a.npy cannot be read as an .npy file"),
        (ValueError, with_bytes("a.npy", b"", datasets.array_folder), "a.npy cannot be read as an .npy file"),
    ],
)
def test_arrays_refused(tmp_path, error, call, message):
    with pytest.raises(error, match=message):
        call(tmp_path)


@pytest.fixture
def save():
    image = pytest.importorskip("PIL.Image")

    def write(path, levels, mode=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(levels).convert(mode or image.fromarray(levels).mode).save(path)

    return write


LEVELS = RANDOM.integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)


def test_images(tmp_path, save):
    for index, name in enumerate(["b.png", "a.PNG", "c.png"]):
        save(tmp_path / name, LEVELS[index])
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "empty").mkdir()
    source = datasets.images(tmp_path)
    assert [path.rpartition("/")[2] for path in source.paths] == ["a.PNG", "b.png", "c.png"] and source.classes == ()
    expected = LEVELS[[1, 0, 2]] / np.float32(127.5) - 1
    assert_rows(source, expected)
    assert expected.min() < -0.98 and expected.max() > 0.98
    grey = datasets.images(tmp_path, channels=1)[0].x1
    assert grey.shape == (6, 5, 1)
    np.testing.assert_allclose(grey[..., 0], expected[0] @ [0.299, 0.587, 0.114], atol=1 / 127)


def test_images_in_folders_have_labels(tmp_path, save):
    for index, name in enumerate(["dog/1.png", "cat/deep/2.png", "cat/1.png", "dog/0.jpg"]):
        save(tmp_path / name, LEVELS[index])
    source = datasets.images(tmp_path)
    assert source.classes == ("cat", "dog")
    rows = list(source)
    assert [int(row.cond) for row in rows] == [0, 0, 1, 1] and rows[0].cond.dtype == np.int32
    np.testing.assert_array_equal(rows[3].x1, LEVELS[0] / np.float32(127.5) - 1)


# What turns the stored pixels upright, for each value of the tag.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}
ENDINGS = ["png", "TIFF", "tif", "webp", "jpg", "JPEG", "bmp", "gif"]


def write_oriented(path, levels, orientation, **options):
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = orientation
    image.fromarray(levels).save(path, exif=exif, **options)


@pytest.mark.parametrize("ending", ENDINGS[:6])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(tmp_path, ending, orientation):
    """The reader applies each of the eight orientations, and ignores a ninth value; the size is that of the turned image.

    The pixels are in blocks of 16, which JPEG's compression keeps.
    """
    stored = np.repeat(np.repeat(LEVELS[0], 16, axis=0), 16, axis=1)
    exact = ending.lower() not in ("jpg", "jpeg")
    options = {"lossless": True} if ending == "webp" else {} if exact else {"quality": 100, "subsampling": 0}
    path = tmp_path / f"a.{ending}"
    write_oriented(path, stored, orientation, **options)
    upright = TURNS[orientation](stored) / np.float32(127.5) - 1
    source = datasets.images(tmp_path)
    np.testing.assert_allclose(source[0].x1, upright, atol=0 if exact else 0.03)
    # Where the square is cut out depends on the orientation as well.
    low = (upright.shape[0] - 80) // 2
    left = (upright.shape[1] - 80) // 2
    cut = upright[low : low + 80, left : left + 80]
    np.testing.assert_allclose(datasets.images(tmp_path, size=80)[0].x1, cut, atol=0 if exact else 0.03)


def test_sizes_are_compared_upright(tmp_path, save):
    write_oriented(tmp_path / "a.png", LEVELS[0], 6)
    save(tmp_path / "b.png", np.ascontiguousarray(LEVELS[1].transpose(1, 0, 2)))
    assert [row.x1.shape for row in datasets.images(tmp_path)] == [(5, 6, 3)] * 2
    save(tmp_path / "b.png", LEVELS[1])
    with pytest.raises(ValueError, match=r"a.png is 6x5 pixels, .*b.png is 5x6"):
        datasets.images(tmp_path)


def test_an_orientation_after_the_pixels_of_a_png_file_is_seen(tmp_path):
    write_oriented(tmp_path / "a.png", LEVELS[0], 8)
    whole = (tmp_path / "a.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    chunk = whole[start : start + 12 + int.from_bytes(whole[start : start + 4], "big")]
    rest = whole.replace(chunk, b"")
    (tmp_path / "a.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    np.testing.assert_array_equal(datasets.images(tmp_path)[0].x1, np.rot90(LEVELS[0]) / np.float32(127.5) - 1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_images_of_every_ending_are_read(tmp_path, save, ending):
    flat = np.full((4, 4, 3), 96, np.uint8)
    save(tmp_path / f"a.{ending}", flat)
    np.testing.assert_allclose(datasets.images(tmp_path)[0].x1, flat / np.float32(127.5) - 1, atol=0.01)


@pytest.mark.parametrize("name", ["a.ppm", "a.heic", "a.AVIF", "a.npy", "notes.txt", "a", "cat/labels.csv"])
def test_other_files_are_named(tmp_path, save, name):
    """Only hidden files are left out."""
    save(tmp_path / ("cat/a.png" if "/" in name else "a.png"), LEVELS[0])
    save(tmp_path / ".hidden" / "a.png", LEVELS[0])
    (tmp_path / ".DS_Store").write_text("")
    assert len(datasets.images(tmp_path)) == 1
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"expected images alone .*, got .*{name}"):
        datasets.images(tmp_path)


def test_several_frames_are_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    frames = [image.fromarray(levels) for levels in LEVELS[:2]]
    for ending in ("gif", "tif", "png", "webp"):
        (tmp_path / ending).mkdir()
        frames[0].save(tmp_path / ending / f"a.{ending}", save_all=True, append_images=frames[1:])
        source = datasets.images(tmp_path / ending)
        with pytest.raises(ValueError, match=rf"a.{ending}: expected one image"):
            source[0]


def test_classes_are_in_natural_order(tmp_path, save):
    names = ["10", "2", "007", "7", "1", "a10", "a2", "a", "B", "b3c20", "b3c4", "é1"]
    for name in names:
        save(tmp_path / name / "10.png", LEVELS[0])
        save(tmp_path / name / "9.png", LEVELS[1])
    source = datasets.images(tmp_path)
    assert source.classes == ("1", "2", "007", "7", "10", "B", "a", "a2", "a10", "b3c4", "b3c20", "é1")
    assert [int(row.cond) for row in source] == [label for label in range(12) for _ in range(2)]
    np.testing.assert_array_equal(source[0].x1, LEVELS[1] / np.float32(127.5) - 1)


def test_array_files_are_in_natural_order(tmp_path):
    for name, part in {"10": slice(3, 7), "9": slice(0, 3)}.items():
        np.save(tmp_path / f"{name}.npy", X[part])
        np.save(tmp_path / f"{name}.cond.npy", LABELS[part])
    assert_rows(datasets.array_folder(tmp_path), X, LABELS)


def test_images_are_cut_in_the_centre_and_resized(tmp_path, save):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = [255, 0, 128]
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", np.ascontiguousarray(wide.transpose(1, 0, 2)))
    save(tmp_path / "c.png", np.full((3, 3), 255, np.uint8))
    source = datasets.images(tmp_path, size=4)
    for index in (0, 1):
        np.testing.assert_allclose(source[index].x1, np.tile([1.0, -1.0, 0.0039], (4, 4, 1)), atol=1e-4)
    np.testing.assert_array_equal(source[2].x1, np.ones((4, 4, 3), np.float32))


def test_images_refused(tmp_path, save):
    with pytest.raises(FileNotFoundError, match=r"images: .*no does not exist; .* a folder of images"):
        datasets.images(tmp_path / "no")
    with pytest.raises(ValueError, match=r"expected images .* in"):
        datasets.images(tmp_path)
    save(tmp_path / "sizes" / "a.png", LEVELS[0])
    save(tmp_path / "sizes" / "b.png", LEVELS[0][:5])
    with pytest.raises(ValueError, match=r"size=.*a.png is 5x6 pixels, .*b.png is 5x5"):
        datasets.images(tmp_path / "sizes")
    with pytest.raises(ValueError, match=r"got .*sizes/a.png as well"):
        save(tmp_path / "sizes" / "cat" / "a.png", LEVELS[0])
        datasets.images(tmp_path / "sizes")
    (tmp_path / "sizes" / "dog").mkdir()
    with pytest.raises(ValueError, match="sizes/dog has none"):
        datasets.images(tmp_path / "sizes")
    for kwargs, error, message in [({"size": 0}, ValueError, "size"), ({"channels": 4}, ValueError, "channels")]:
        with pytest.raises(error, match=message):
            datasets.images(tmp_path / "sizes", **kwargs)

    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"damaged/a.png cannot be read"):
        datasets.images(tmp_path / "damaged")
    whole = (tmp_path / "sizes" / "a.png").read_bytes()
    (tmp_path / "damaged" / "a.png").write_bytes(whole[: len(whole) // 2])
    # The header is whole.
    source = datasets.images(tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"damaged/a.png cannot be read"):
        source[0]


def test_images_that_would_lose_something_are_refused(tmp_path, save):
    save(tmp_path / "deep" / "a.png", LEVELS[0, ..., 0].astype(np.uint16) * 256)
    with pytest.raises(ValueError, match=r"deep/a.png: expected at most 8 bits"):
        datasets.images(tmp_path / "deep")[0]
    opaque = np.concatenate([LEVELS[0], np.full((6, 5, 1), 255, np.uint8)], axis=-1)
    save(tmp_path / "alpha" / "a.png", opaque)
    source = datasets.images(tmp_path / "alpha")
    np.testing.assert_array_equal(source[0].x1, LEVELS[0] / np.float32(127.5) - 1)
    opaque[2, 3, 3] = 254
    save(tmp_path / "alpha" / "a.png", opaque)
    with pytest.raises(ValueError, match=r"alpha/a.png: expected an opaque image"):
        source[0]


# Ten batches are four epochs.
SIZE, BATCH = 20, 8


class Numbered:
    """Row i is i, and the rows read are counted."""

    def __init__(self, size=SIZE):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return Batch(x1=np.full((2,), index, np.float32), cond=np.int32(index))


def noisy(row, rng):
    return row._replace(x1=row.x1 + rng.random(2, np.float32) / 2)


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def batches(count=10, state=None, source=None, **kwargs):
    """Stacked batches of one process, [count, rows, ...]."""
    iterator = datasets.pipeline(source or Numbered(), BATCH, **{"transform": noisy, "threads": 2, **kwargs})
    if state is not None:
        iterator.set_state(state)
    return take(iterator, count)


@needs_grain
def test_an_epoch_holds_every_row_once():
    order, other = (batches(seed=seed).cond.reshape(4, SIZE) for seed in (0, 1))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(SIZE), (4, 1)))
    # Every epoch of every seed has its own order.
    assert len(np.unique(np.concatenate([order, other]), axis=0)) == 8


@needs_grain
@pytest.mark.parametrize("count", [2, 4, 8])
def test_batches_do_not_depend_on_the_number_of_processes(count, assert_equal):
    sources = [Numbered() for _ in range(count)]
    parts = [batches(5, process_index=p, process_count=count, source=sources[p], threads=0) for p in range(count)]
    assert_equal(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts), batches(5))
    # Each reads its own rows alone.
    assert [len(source.read) for source in sources] == [5 * BATCH // count] * count


@needs_grain
@pytest.mark.parametrize("threads", [0, 3])
def test_a_transform_is_a_function_of_seed_and_position(threads, assert_equal):
    drawn = batches()
    noise = drawn.x1 - drawn.cond[..., None]
    # float32 keeps 2^-20 of the row's number at least.
    assert noise.min() >= 0 and noise.max() < 0.5 and len(np.unique(np.round(noise, 5))) > 0.99 * noise.size
    assert_equal(batches(threads=threads, buffer=5), drawn)
    other = batches(seed=1)
    assert (
        not np.intersect1d(np.round(other.x1 - other.cond[..., None], 5), np.round(noise, 5)).size > 0.01 * noise.size
    )
    assert_equal(batches(transform=None).cond, drawn.cond)


@needs_grain
def test_resumed_with_another_number_of_processes(assert_equal):
    iterator = datasets.pipeline(Numbered(), BATCH, transform=noisy, process_index=1, process_count=2)
    take_some = list(itertools.islice(iterator, 7))
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert len(take_some) == 7 and state == {"next_index": 7}
    parts = [batches(6, state, process_index=p, process_count=4) for p in range(4)]
    whole = jax.tree.map(lambda leaf: leaf[7:], batches(13))
    assert_equal(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts), whole)


@needs_grain
def test_fed_to_training(assert_equal):
    expected = batches(12)
    with Feed(datasets.pipeline(Numbered(), BATCH, transform=noisy, threads=2)) as feed:
        feed.start(0, None, lambda step: 3, 12)
        taken = [feed.take(), feed.take()]
        position = json.loads(json.dumps(feed.position))
    assert position == {"next_index": 6}
    with Feed(datasets.pipeline(Numbered(), BATCH, transform=noisy, threads=2)) as feed:
        feed.start(6, position, lambda step: 3, 12)
        taken += [feed.take(), feed.take()]
    assert_equal(jax.tree.map(lambda *leaves: np.concatenate(leaves), *(data.batches for data in taken)), expected)


@needs_grain
def test_what_a_row_raises_comes_out(tmp_path):
    def broken(row, rng):
        if row.cond == 5:
            raise OSError("row five")
        return row

    with pytest.raises(OSError, match="row five"):
        batches(transform=broken)
    with Feed(datasets.pipeline(Numbered(), BATCH, transform=broken)) as feed, pytest.raises(OSError, match="row five"):
        feed.start(0, None, lambda step: 1, SIZE)
        for _ in range(SIZE):
            feed.take()


@needs_grain
@pytest.mark.parametrize(
    ("error", "kwargs", "message"),
    [
        (ValueError, {"process_index": 0, "process_count": 3}, "batch_size: expected a multiple .* 3, got 8"),
        (ValueError, {"process_index": 2, "process_count": 2}, "process_index"),
        (ValueError, {"process_count": 2}, "expected both or neither"),
        (ValueError, {"seed": -1}, "seed"),
        (ValueError, {"threads": -1}, "threads"),
        (ValueError, {"buffer": 0}, "buffer"),
        (TypeError, {"seed": 1.0}, "seed"),
        (ValueError, {"source": Numbered(0)}, "source: expected at least one row"),
    ],
)
def test_pipelines_refused(error, kwargs, message):
    source = kwargs.pop("source", Numbered())
    with pytest.raises(error, match=message):
        datasets.pipeline(source, BATCH, **kwargs)


@pytest.mark.parametrize(
    ("package", "call", "message"),
    [
        ("grain", lambda: datasets.pipeline(Numbered(), BATCH), r"pip install 'jflow\[grain\]'"),
        ("PIL", lambda: datasets.images("."), "pip install pillow"),
    ],
)
def test_missing_packages_are_named(monkeypatch, package, call, message):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=message):
        call()


@pytest.fixture
def assert_equal():
    """Two pytrees of arrays are equal, dtypes included."""

    def check(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)

    return check


ROWS = np.ones((16, 3), np.float32)


def text(path, content):
    path.write_text(content)
    return path


def npz(folder, arrays, **names):
    np.savez(folder / "data.npz", **arrays)
    return datasets.npz(folder / "data.npz", **names)


def npy(folder, **arrays):
    """The files of a folder; __ stands for a dot."""
    for name, array in arrays.items():
        np.save(folder / f"{name.replace('__', '.')}.npy", array)
    return datasets.array_folder(folder)


def batches_of(source, *arguments, **options):
    pytest.importorskip("grain")
    return datasets.pipeline(source, *arguments, **options)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d: batches_of("images/train", 8),
            TypeError,
            r"^source: expected rows with len\(\) and \[i\], as images\(path\), got str$",
            id="a path as the source",
        ),
        pytest.param(
            lambda d: datasets.npz(text(d / "data.npz", "x,y\n1,2\n")),
            ValueError,
            r"^npz: .*data\.npz cannot be read as an \.npz file: File is not a zip file$",
            id="a file of another kind",
        ),
        pytest.param(
            lambda d: npz(d, {"x": ROWS, "y": ROWS}, x1="images"),
            ValueError,
            r"^npz: .*data\.npz has no array 'images', expected one of x, y$",
            id="arrays of another name",
        ),
        pytest.param(
            lambda d: npz(d, {"x1": ROWS, "y": ROWS[:7]}, cond="y"),
            ValueError,
            r"^npz: .*expected arrays \[n, \.\.\.\] with one n, got shapes Batch\(x1=\(16, 3\), x0=None, cond=\(7, 3\)\)$",
            id="labels of other rows",
        ),
        pytest.param(
            lambda d: datasets.array_folder(d),
            ValueError,
            r"^array_folder: expected files NAME\.npy in .*, found none$",
            id="a folder with no arrays",
        ),
        pytest.param(
            lambda d: npy(d, a=ROWS, a__cond=ROWS, b=ROWS),
            ValueError,
            r"^array_folder: .*b\.cond\.npy is missing, while other files have theirs$",
            id="a part without labels",
        ),
        pytest.param(
            lambda d: npy(d, a=ROWS, b=ROWS[:, :2]),
            ValueError,
            r"^array_folder: .*b\.npy: expected rows like those of a\.npy, .*float32\[3\].*, got .*float32\[2\]",
            id="parts of different shapes",
        ),
        pytest.param(
            lambda d: batches_of(ROWS, 8, process_index=0, process_count=3),
            ValueError,
            "^batch_size: expected a multiple of the number of processes, 3, got 8$",
            id="a batch that processes do not share",
        ),
        pytest.param(
            lambda d: batches_of(ROWS, 8, process_index=0),
            ValueError,
            "^process_index, process_count: expected both or neither$",
            id="one process of none",
        ),
        pytest.param(
            lambda d: batches_of([], 8),
            ValueError,
            r"^source: expected at least one row, and at most 2\^32, got 0$",
            id="a source without rows",
        ),
        pytest.param(
            lambda d: batches_of(ROWS, 8, threads=-1),
            ValueError,
            "^threads: expected a whole number of at least 0, got -1$",
            id="less than no threads",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path)
    # Not by a sub-class that means something else.
    assert caught.type is error
