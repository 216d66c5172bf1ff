"""The command lines of ``jflow.comparison`` and ``jflow.sample``, in this process, on a module that the test writes."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import comparison, sample, samplers
from jflow.comparison import shell

pytestmark = pytest.mark.usefixtures("tiny")
FAST = ["--steps", "1", "2", "--solvers", "euler", "--samples", "5", "--batch", "5", "--repeats", "1"]


@pytest.mark.slow
def test_a_function_is_compared_from_the_shell(tmp_path, capsys):
    arguments = ["tiny_subject:make", *FAST, "--distances", "energy", "frechet", "--out", str(tmp_path / "out")]
    shell.main(arguments)
    said = capsys.readouterr().out
    assert "dopri8, tolerance 1e-05, of the velocity of map; 5 samples" in said
    table = comparison.Comparison.from_json((tmp_path / "out" / "results.json").read_text())
    assert [row.name for row in table.rows] == ["map, 1 jump", "map, 2 jumps", "euler, 1 step", "euler, 2 steps"]
    assert all(row.rmse < 1e-5 and set(row.distances) == {"energy", "frechet"} for row in table.rows)
    assert table.markdown() in said and (tmp_path / "out" / "table.md").read_text() == table.markdown() + "\n"
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 0
    with pytest.raises(SystemExit, match="2"):
        shell.main(arguments)
    assert "out: expected a directory without results.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_compared_and_drawn_from(a_run, tmp_path):
    shell.main([str(a_run), *FAST, "--out", str(tmp_path / "out")])
    (row, *_) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["name"] == "map, 1 jump" and row["rmse"] < 1e-4
    drawn = {}
    for average in ("slow", "params"):
        sample.main([str(a_run), "--n", "4", "--out", str(tmp_path / "drawn.npy"), "--average", average])
        drawn[average] = np.load(tmp_path / "drawn.npy")
    # The conditions 0, 1, 2, 0 and the average 2 move the noise; 10 is the scale.
    subject = comparison.from_run(a_run)
    draw_key, _ = jax.random.split(jax.random.key(0))
    jumps = samplers.Jumps(subject.model.bind({"shift": jnp.float32(0.0)}))
    grid, cond = samplers.uniform_grid(1), jnp.asarray([0, 1, 2, 0])
    noise = samplers.draw(jumps, draw_key, 4, grid, cond, like=subject.event)
    np.testing.assert_allclose(drawn["slow"], 10.0 * (noise + 2.0), rtol=1e-5)
    np.testing.assert_allclose(drawn["slow"] - drawn["params"], 10.0, rtol=1e-5)


def test_a_picture_of_a_velocity_s_samples_is_drawn(tmp_path):
    from PIL import Image

    sample.main(
        [
            "tiny_subject:velocity",
            "--solver",
            "euler",
            "--steps",
            "2",
            "--n",
            "3",
            "--out",
            str(tmp_path / "a" / "x.png"),
        ]
    )
    assert Image.open(tmp_path / "a" / "x.png").size == (64, 64)
    assert sample.picture(np.zeros((4, 8, 8, 1))).shape == (17, 17, 3)
    with pytest.raises(ValueError, match="samples: expected images"):
        sample.picture(np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (shell.main, ["tiny_subject:nothing"], "make: expected a function that can be imported"),
        (shell.main, ["no_such_module:make"], "No module named 'no_such_module'"),
        (shell.main, ["tiny_subject:wrong"], "expected a function that returns comparison.Subject, got int 3"),
        (shell.main, ["no_such_run"], "no_such_run: no such directory"),
        (shell.main, ["tiny_subject:make", "--solvers", "magic"], "solvers: expected one of 'euler'"),
        (shell.main, ["tiny_subject:make", "--average", "slow"], "make, average: expected None beside a function"),
        (shell.main, ["tiny_subject:make", "--samples", "0"], "samples: expected a whole number"),
        (sample.main, ["tiny_subject:make", "--out", "x.gif"], "out: suffix: expected one of '.png'"),
        (sample.main, ["tiny_subject:make", "--out", "x.npy", "--jumps", "0"], "jumps: expected a whole number"),
        (sample.main, ["tiny_subject:make", "--out", "x.npy", "--steps", "3"], "steps: expected None without a solver"),
        (sample.main, ["tiny_subject:velocity", "--out", "x.npy"], "solver: expected the name of a solver"),
        (
            sample.main,
            ["tiny_subject:velocity", "--out", "x.npy", "--solver", "heun", "--jumps", "2"],
            "jumps: expected 1 beside a solver",
        ),
    ],
)
def test_mistakes_end_in_a_message(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "extra"), [("tyro", "experiments"), ("matplotlib.figure", "plots")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(missing, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit):
        shell.main(["tiny_subject:make", *FAST, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert missing.partition(".")[0] in said.lower() and f"pip install 'jflow[{extra}]'" in said
    # The measurement is not lost.
    assert (tmp_path / "results.json").exists() == (missing != "tyro")
