"""Options as parts: flat names on the command line and in checkpoints, and only the options that are used."""

import pathlib

import jax.numpy as jnp
import pytest
import tyro

from experiments import bias, catalogue, density, digits, loading, mixture
from experiments.shared import options, run

OUT = pathlib.Path("unused")
# The entries that checkpoints of earlier versions keep; a run is resumed only if they are the same.
KEPT = set(
    "experiment path parameterization velocity steps batch learning_rate warmup clip beta2 ema features depth network residual "
    "decoupled octaves seed log_every".split()
)
METHOD = {"objective", "reduction", "diagonal", "diagonal_start", "full_jumps", "stratified"}


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (digits, METHOD),
        (mixture, METHOD | {"compared"}),
        (
            density,
            {"data", "looks", "jitter", "likelihood_steps", "likelihood_batch", "likelihood_rate", "map_steps"},
        ),
        (bias, {"likelihood_steps", "likelihood_batch", "likelihood_rate", "head_steps"}),
        (catalogue, {"budget", "pool"}),
    ],
)
def test_a_checkpoint_keeps_the_entries_of_earlier_versions(module, more):
    kept = module.Config(out=OUT).kept()
    assert set(kept) == KEPT | more
    assert kept["experiment"] == module.__name__.split(".")[-1]


def test_the_command_line_has_the_options_of_parts_under_their_own_names():
    arguments = (
        "--out here --features 8 --network plain --objective esd --no-residual --watch.grids 5 --resume auto".split()
    )
    config = tyro.cli(mixture.Config, args=arguments)
    values = {"features": 8, "network": "plain", "objective": "esd", "residual": False, "resume": "auto"}
    wanted = options.make(mixture.Config, out=pathlib.Path("here"), watch=options.WatchingSamples(grids=5), **values)
    assert config == wanted
    # What an option's part does not name keeps the default of the experiment.
    assert config.optimizer.learning_rate == 3e-3 and config.method.velocity == "batch"


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (bias, "--path"),
        (bias, "--network"),
        (bias, "--seed"),
        (bias, "--resume"),
        (bias, "--machine.processes"),
        (bias, "--watch.grids"),
        (catalogue, "--octaves"),
        (catalogue, "--overwrite"),
        (density, "--velocity"),
        (density, "--watch.grids"),
        (density, "--samples"),
    ],
)
def test_an_option_that_an_experiment_does_not_use_is_not_shown(module, option, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(module.Config, args=["--help"])
    said = capsys.readouterr().out
    assert "--features" in said and f"{option} " not in said


def test_options_that_do_not_exist_are_named():
    config = mixture.Config(out=OUT)
    with pytest.raises(TypeError, match="Config: expected options that it has, got colour, size"):
        options.replace(config, steps=3, colour="red", size=1)
    assert options.replace(config, steps=3, samples=5).optimizer.steps == 3


def test_a_model_is_rebuilt_from_what_its_checkpoint_keeps():
    config = options.make(mixture.Config, out=OUT, features=8, depth=2, path="trigonometric")
    kept = config.kept()
    values = {name: value for name, value in kept.items() if name != "experiment"}
    assert options.make(mixture.Config, out=OUT, **values) == config
    subject = loading.make({**kept, "make": "experiments.loading:make", "average": "ema"})
    assert subject.event.shape == (2,)


def option(tmp_path, **choices):
    return options.make(mixture.Config, out=tmp_path, **choices).check()


def experiment(tmp_path, **choices):
    """The trainer of an experiment, on the eight devices."""
    config = options.make(mixture.Config, out=tmp_path, **choices)
    config.check()
    return run.trainer(config, mixture.problem(config), None, lambda *_: None, params={"w": jnp.zeros(2)})


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
            lambda d: option(d, watch=options.WatchingSamples(grids=150)),
            ValueError,
            r"^--watch\.grids: expected 0 or a multiple of --log-every 100, got 150$",
            id="--watch.grids between rows",
        ),
        pytest.param(
            lambda d: experiment(d, machine=options.Machine(fsdp=3)),
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
