"""The command line of the experiments."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from experiments import catalogue, common, mixture
from experiments.running import Machine, Watching


def option(tmp_path, **options):
    return mixture.Config(out=tmp_path, **options).check()


def experiment(tmp_path, **options):
    """The trainer of an experiment, on the eight devices."""
    config = mixture.Config(out=tmp_path, **options)
    config.check()
    return common.trainer(config, mixture.problem(config), None, lambda *_: None, params={"w": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d: option(d, steps=0),
            ValueError,
            "^--steps: expected a positive whole number, got 0$",
            id="--steps 0",
        ),
        pytest.param(
            lambda d: option(d, steps=200),
            ValueError,
            "^--warmup: expected at least 0 and less than --steps 200, got 200$",
            id="--warmup as long as the run",
        ),
        pytest.param(
            lambda d: option(d, learning_rate=float("nan")),
            ValueError,
            "^--learning-rate: expected a positive number, got nan$",
            id="--learning-rate nan",
        ),
        pytest.param(
            lambda d: option(d, beta2=1.5),
            ValueError,
            r"^--beta2: expected a number from 0 to 1, got 1\.5$",
            id="--beta2 1.5",
        ),
        pytest.param(
            lambda d: option(d, diagonal=1.0),
            ValueError,
            "^--diagonal: expected less than 1: a flow map is learned on the off-diagonal rows$",
            id="--diagonal 1",
        ),
        pytest.param(
            lambda d: option(d, decoupled=4),
            ValueError,
            "^--decoupled: expected a whole number from 0 to --depth - 1, got 4$",
            id="--decoupled as deep as the network",
        ),
        pytest.param(
            lambda d: option(d, seed=-1), ValueError, "^--seed: expected a whole number from 0, got -1$", id="--seed -1"
        ),
        pytest.param(
            lambda d: option(d, resume="auto", overwrite=True),
            ValueError,
            "^--resume, --overwrite: expected at most one of them$",
            id="--resume --overwrite",
        ),
        pytest.param(
            lambda d: option(d, watch=Watching(grids=150)),
            ValueError,
            r"^--watch\.grids: expected 0 or a multiple of --log-every 100, got 150$",
            id="--watch.grids between rows",
        ),
        pytest.param(
            lambda d: experiment(d, machine=Machine(fsdp=3)),
            ValueError,
            "^fsdp: expected a divisor of the number of devices, 8, got 3$",
            id="--machine.fsdp 3 of 8 devices",
        ),
        pytest.param(
            lambda d: experiment(d, batch=12),
            ValueError,
            "^--batch: expected a multiple of the 8 devices, got 12$",
            id="--batch 12 on 8 devices",
        ),
        pytest.param(
            lambda d: catalogue.Config(out=d, methods=("lsd", "esdd")).check(),
            ValueError,
            "^--methods: unknown esdd; expected some of .*esd, ",
            id="--methods with a misprint",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path)
    # Not by a sub-class that means something else.
    assert caught.type is error
