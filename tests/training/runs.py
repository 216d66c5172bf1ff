"""Short runs of the small problem of the tests, and an iterator: what several refusals begin with."""

from __future__ import annotations

import jax
import numpy as np

from jflow.training import Checkpoints, RunDirectory, fit, init_state

ROWS = np.ones((16, 3), np.float32)
DECAYS = (0.9, 0.99)


def train(problem, out=None, steps=8, **options):
    """A run with checkpoints, if ``out`` is given, at steps 8, 16, ..."""
    loop = {"log_every": 8, "chunk_steps": 4, "total_steps": steps, "hooks": ()}
    loop |= {name: options.pop(name) for name in (*loop, "evaluation", "forgive") if name in options}
    state, chunk = options.pop("state", problem.state()), options.pop("chunk", problem.chunk)
    data = options.pop("data", problem.dataset.data)
    options = {"checkpoint_every": 8, "config": {"rate": 1e-2}, **options}
    return fit(state, chunk, data, run=None if out is None else RunDirectory(out, **options), **loop)


def again(problem, out, **options):
    """A run of 8 steps, and another call in its directory."""
    train(problem, out)
    return train(problem, out, **{"steps": 16, "resume": True, **options})


def state(problem, **options):
    given = {"params": problem.params, "optimizer": problem.optimizer, "key": jax.random.key(1), "ema": DECAYS}
    return init_state(**{**given, **options})


def saved(out, *states, position=None, **options):
    with Checkpoints(out, **options) as checkpoints:
        for each in states:
            checkpoints.save(each, position=position)


class Batches:
    """Some batches, then the end; an error among them is raised."""

    def __init__(self, *batches):
        self.batches, self.place = batches, 0

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        if isinstance(self.batches[self.place - 1], Exception):
            raise self.batches[self.place - 1]
        return self.batches[self.place - 1]

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def text(path, content):
    path.write_text(content)
    return path
