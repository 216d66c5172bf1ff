"""The watch: what it says of an explosion, when it keeps silent, and that a resumed run says the same."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jflow.training import fit
from jflow.training.divergence import FACTOR, ROWS, Watch
from jflow.training.metrics_log import read


def row(step, **values):
    return {"kind": "train", "step": step, "steps": 100, **{name.replace("__", "/"): v for name, v in values.items()}}


def steady(count=10, **more):
    """Rows of a run with a tangent of about 430 and a residual of about 2."""
    random = np.random.default_rng(0)
    return [
        row(100 * (n + 1), eulerian__tangent_norm=430 * np.exp(0.3 * z), eulerian__raw=2 * np.exp(0.5 * z), **more)
        for n, z in enumerate(random.normal(size=count))
    ]


def test_the_message_of_a_tangent():
    watch = Watch(rows := steady(30))
    median = np.median([r["eulerian/tangent_norm"] for r in rows])
    bins = np.array([0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.2, 9.0])
    said = watch(
        row(
            3100,
            eulerian__tangent_norm=5.2e4,
            eulerian__raw=1e6,
            eulerian__raw_by_t=bins,
            eulerian__raw_by_gap=bins[::-1],
        )
    )
    assert said == (
        f"steps 3001-3100: the tangent of 'eulerian' exploded: its norm 5.2e+04 is {5.2e4 / median:.3g} times the median "
        f"so far ({median:.2g}), worst at t in [0.875, 1] and t - s in [0, 0.125]; lower the learning rate, normalise or "
        "clip the tangent (jflow.reductions), or lengthen its warm-up"
    )


def test_the_message_of_a_residual_and_the_worst_of_several():
    watch = Watch(steady(tangent__raw=1.0))
    said = watch(row(1100, eulerian__tangent_norm=430.0, eulerian__raw=50.0, tangent__raw=90.0))
    assert said.startswith(
        "steps 1001-1100: the residual of 'tangent' exploded: its mean square 90 is 90 times the median"
    )
    assert "worst" not in said and "reduction" in said
    # The tangent is the cause, however large the residual.
    said = watch(row(1200, eulerian__tangent_norm=1e4, tangent__raw=1e4))
    assert said.startswith("steps 1101-1200: the tangent of 'eulerian'")
    assert watch({**row(1201, tangent__raw=90.0), "steps": 1}).startswith("step 1201: ")


def test_where_the_line_is():
    assert Watch(steady(tangent__raw=1.0))(row(1100, tangent__raw=0.999 * FACTOR)) is None
    assert Watch(steady(tangent__raw=1.0))(row(1100, tangent__raw=1.001 * FACTOR))
    # A median needs rows.
    assert Watch(steady(ROWS - 1, tangent__raw=1.0))(row(1100, tangent__raw=1e9)) is None
    assert Watch(steady(ROWS, tangent__raw=1.0))(row(1100, tangent__raw=1e9))
    # One row that exploded does not move it, nor does it silence the next.
    watch = Watch(steady(tangent__raw=1.0))
    assert watch(row(1100, tangent__raw=1e9)) and watch(row(1200, tangent__raw=1e9))


@pytest.mark.parametrize("seed", range(3))
def test_no_alarm_at_noise_that_decreases_grows_slowly_or_starts_late(seed):
    random, watch = np.random.default_rng(seed), Watch()
    for n in range(500):
        noise = np.exp(0.6 * random.normal(size=4))
        values = {
            "semigroup__raw": 10.0 * 0.98**n * noise[0],
            "lagrangian__tangent_norm": (1 + n / 20) * noise[1],
            "tangent__raw": noise[2],
            # A curriculum reports zeros for a term that is not in force yet, and then a share of its first row.
            "eulerian__tangent_norm": 0.0 if n < 100 else 0.01 if n == 100 else 30 * noise[3],
        }
        assert watch(row(100 * (n + 1), **values)) is None


def test_zeros_nulls_and_other_rows_count_for_nothing():
    noise = [row(n, tangent__raw=value) for n, value in enumerate((0.0, None, float("nan"), float("inf")) * 5)]
    others = [{"kind": "eval", "step": n, "tangent/raw": 1e-9} for n in range(10)]
    watch = Watch(noise + others + steady(tangent__raw=1.0))
    assert watch(row(1100, tangent__raw=float("inf"))) is None  # for the loop to refuse
    assert watch(row(1200, tangent__raw=FACTOR - 1)) is None
    assert watch(row(1300, tangent__raw=FACTOR + 1))


def test_a_watch_made_of_the_rows_that_were_written_is_the_same():
    rows = [*steady(tangent__raw=np.float64(1 / 3)), row(1100, tangent__raw=1e9), *steady(5, tangent__raw=0.7)]
    written = [json.loads(json.dumps(r)) for r in rows]
    watch = Watch()
    for r in rows:
        watch(r)
    assert watch._seen == Watch(written)._seen


def explosive(problem):
    """The problem's chunk with a tangent that explodes within steps 49 to 56 and 65 to 72."""

    def chunk(state, data, steps):
        state, metrics = problem.chunk(state, data, steps)
        exploded = ((state.step > 48) & (state.step <= 56)) | (state.step > 64)
        norm = jnp.where(exploded, 1e4, 1.0 + 0.1 * jnp.sin(state.step.astype(jnp.float32)))
        return state, {**metrics, "fit/tangent_norm": norm}

    return chunk


def run(problem, out, steps, **kwargs):
    rows = []
    fit(
        problem.state(), explosive(problem), problem.dataset.data, total_steps=steps, log_every=8, chunk_steps=4,
        checkpoint_every=8, out_dir=out, callbacks=[rows.append], **kwargs,
    )  # fmt: skip
    return rows


def test_the_loop_shows_and_keeps_it_and_resumed_runs_say_the_same(problem, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rows = run(problem, whole, 72)
    shown = capsys.readouterr().out
    warned = [(r["step"], r["warning"]) for r in rows if "warning" in r]
    assert [step for step, _ in warned] == [56, 72]
    assert warned[0][1].startswith("steps 49-56: the tangent of 'fit' exploded: its norm 1e+04 is ")
    assert "worst at t in [" in warned[0][1]
    # One line of its own, before that of the row.
    lines = shown.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {text}" for _, text in warned]
    assert lines[lines.index(f"warning: {warned[0][1]}") + 1].startswith("step 56/72")
    assert [r.get("warning") for r in read(whole / "metrics.jsonl")] == [r.get("warning") for r in rows]

    times = ("seconds", "steps_per_second")
    plain = lambda path: [{k: v for k, v in r.items() if k not in times} for r in read(path / "metrics.jsonl")]  # noqa: E731
    run(problem, broken, 48, show_progress=False)
    run(problem, broken, 72, resume=True, show_progress=False)
    assert plain(broken) == plain(whole)
    # Back to a step in the middle, the rows after it are dropped and said again.
    for step in (72, 64):
        shutil.rmtree(broken / "checkpoints" / str(step))
    again = run(problem, broken, 72, resume=True, show_progress=False)
    assert [r["step"] for r in again] == [64, 72]
    assert plain(broken) == plain(whole)
    assert capsys.readouterr().out == ""


def test_it_is_shown_above_the_bar(problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    run(problem, tmp_path, 56)
    shown = capsys.readouterr().out
    assert "warning: steps 49-56: the tangent of 'fit' exploded" in shown and "worst at t in [" in shown
