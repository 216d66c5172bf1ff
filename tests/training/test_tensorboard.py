"""Events as they are read back from the files, through the protocol buffers alone."""

from __future__ import annotations

import contextlib
import io
import struct
import sys

import jax
import numpy as np
import pytest

from jflow.training import fit, image_grids
from jflow.training.hooks import Started
from jflow.training.tensorboard import TensorBoard

pytest.importorskip("tensorboardX", reason="pip install 'jflow[tensorboard]'")


def events_of(path):
    """The events of one file: each is its length, a checksum, the message and another checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, place, events = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += length + 16
    return events


def shown(directory):
    """{(tag, step): value} as TensorBoard shows it: a restart at a step hides what came before it at that step or later."""
    values = {}
    for path in sorted(directory.iterdir()):
        for event in events_of(path):
            # The first record of a file has the field as well, with the status left unset.
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                values = {(tag, step): value for (tag, step), value in values.items() if step < event.step}
            for value in event.summary.value:
                values[value.tag, event.step] = value
    return values


def numbers(directory):
    return {place: value.simple_value for place, value in shown(directory).items()}


@contextlib.contextmanager
def started(directory, step=0):
    """A hook within a run that begins after so many steps."""
    with TensorBoard(directory) as board:
        board.start(Started(step, 100, None, None, None))
        yield board


def test_numbers_vectors_and_texts(tmp_path):
    with started(tmp_path) as board:
        board.row(
            {
                "kind": "train",
                "step": 8,
                "loss": np.float32(0.25),
                "finite": np.True_,
                "fit/raw_by_t": np.asarray([1.5, 2.5]),
                "matrix": np.ones((2, 2)),
                "warning": "a tangent has exploded",
            }
        )
        board.row({"kind": "eval", "step": 8, "distance": 3})
    values = shown(tmp_path)
    text = values.pop(("train/warning/text_summary", 8))
    assert text.tensor.string_val == [b"a tangent has exploded"]
    assert {place: value.simple_value for place, value in values.items()} == {
        ("train/loss", 8): 0.25,
        ("train/finite", 8): 1.0,
        ("train/fit/raw_by_t/0", 8): 1.5,
        ("train/fit/raw_by_t/1", 8): 2.5,
        ("eval/distance", 8): 3.0,
    }


def test_resumed_runs_hide_the_later_events(tmp_path):
    with started(tmp_path) as board:
        for step in (8, 16, 24):
            board.row({"kind": "train", "step": step, "loss": 1.0})
    # Within the second of the first file.
    with started(tmp_path, 16) as board:
        board.row({"kind": "train", "step": 32, "loss": 2.0})
    assert len(list(tmp_path.iterdir())) == 2
    assert numbers(tmp_path) == {("train/loss", 8): 1.0, ("train/loss", 16): 1.0, ("train/loss", 32): 2.0}


def test_images_are_a_grid(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 1))
    with started(tmp_path) as board:
        board.images(16, "samples/one_jump", images)
    value = shown(tmp_path)["samples/one_jump", 16]
    with image_grids.pillow().open(io.BytesIO(value.image.encoded_image_string)) as read:
        np.testing.assert_array_equal(np.asarray(read), image_grids.tile(images))


def test_every_row_of_a_run_is_there(problem, tmp_path):
    rows = []
    fit(
        problem.state(),
        problem.chunk,
        problem.dataset.data,
        total_steps=16,
        log_every=8,
        chunk_steps=4,
        hooks=[rows.append, TensorBoard(tmp_path)],
    )
    values = numbers(tmp_path)
    assert [row["step"] for row in rows] == [8, 16]
    for row in rows:
        assert values["train/loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)
        for place, entry in enumerate(row["fit/raw_by_t"]):
            assert values[f"train/fit/raw_by_t/{place}", row["step"]] == pytest.approx(entry, rel=1e-6)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    directory = tmp_path / "events"
    with started(directory, 3) as board:
        board.row({"kind": "train", "step": 8, "loss": 1.0})
        board.images(8, "samples", np.zeros((1, 2, 2, 1)))
    assert not directory.exists()


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"jflow\[tensorboard\]"):
        TensorBoard(tmp_path)
