"""The watch: what it says of an explosion, when it keeps silent, and that a resumed run says the same."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import reports
from jflow.training import Progress, RunDirectory, alarms, fit
from jflow.training.alarms import FACTOR, ROWS
from jflow.training.metrics_log import read

TERMS = ("eulerian", "lagrangian", "semigroup", "tangent")
NAMES = alarms.Watched(
    {f"{term}/raw": ("t", "gap") for term in TERMS}, {f"{term}/tangent_norm": ("t", "gap") for term in TERMS}
)


def Watch(rows=()):
    return alarms.Watch(NAMES, rows)


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
            eulerian__tangent_norm_by_t=bins,
            eulerian__tangent_norm_by_gap=bins[::-1],
        )
    )
    assert said == (
        f"steps 3001-3100: the tangent 'eulerian/tangent_norm' exploded: its norm 5.2e+04 is {5.2e4 / median:.3g} times "
        f"the median so far ({median:.2g}), worst at t in [0.875, 1] and t - s in [0, 0.125]; lower the learning rate, "
        "normalise or clip the tangent (jflow.reductions), or lengthen its warm-up"
    )


def test_the_message_of_a_residual_and_the_worst_of_several():
    watch = Watch(steady(tangent__raw=1.0))
    said = watch(row(1100, eulerian__tangent_norm=430.0, eulerian__raw=50.0, tangent__raw=90.0))
    assert said.startswith(
        "steps 1001-1100: the residual 'tangent/raw' exploded: its mean square 90 is 90 times the median"
    )
    assert "worst" not in said and "reduction" in said
    # The tangent is the cause, however large the residual.
    said = watch(row(1200, eulerian__tangent_norm=1e4, tangent__raw=1e4))
    assert said.startswith("steps 1101-1200: the tangent 'eulerian/tangent_norm'")
    assert watch({**row(1201, tangent__raw=90.0), "steps": 1}).startswith("step 1201: ")


def test_where_the_line_is():
    assert Watch(steady(tangent__raw=1.0))(row(1100, tangent__raw=0.999 * FACTOR)) is None
    assert Watch(steady(tangent__raw=1.0))(row(1100, tangent__raw=1.001 * FACTOR))
    # A median needs rows; before, it is compared with the start.
    assert "times the median so far" in Watch(steady(ROWS, tangent__raw=1.0))(row(1100, tangent__raw=1e9))
    assert "times that at the start" in Watch(steady(ROWS - 1, tangent__raw=1.0))(row(1100, tangent__raw=1e9))
    scale = max(1.0, steady(1)[0]["eulerian/raw"])
    assert Watch(steady(ROWS - 1, tangent__raw=1.0))(row(1100, tangent__raw=0.999 * FACTOR * scale)) is None
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
        one = jnp.ones_like(norm)
        bins = {"t": reports.Mean(jnp.stack([0.5 * norm, norm]) ** 2, jnp.stack([one, one]))}
        return state, {**metrics, "fit/tangent_norm": reports.Tangent(reports.Mean(norm**2, one), bins)}

    return chunk


def run(problem, out, steps, *, hooks=(), **kwargs):
    rows = []
    fit(
        problem.state(), explosive(problem), problem.dataset.data, total_steps=steps, log_every=8, chunk_steps=4,
        run=RunDirectory(out, checkpoint_every=8, **kwargs), hooks=[rows.append, *hooks],
    )  # fmt: skip
    return rows


@pytest.mark.slow
def test_the_loop_shows_and_keeps_it_and_resumed_runs_say_the_same(problem, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rows = run(problem, whole, 72, hooks=[Progress()])
    shown = capsys.readouterr().out
    warned = [(r["step"], r["warning"]) for r in rows if "warning" in r]
    assert [step for step, _ in warned] == [56, 72]
    assert warned[0][1].startswith("steps 49-56: the tangent 'fit/tangent_norm' exploded: its norm 1e+04 is ")
    assert "worst at t in [" in warned[0][1]
    # One line of its own, before that of the row.
    lines = shown.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {text}" for _, text in warned]
    assert lines[lines.index(f"warning: {warned[0][1]}") + 1].startswith("step 56/72")
    assert [r.get("warning") for r in read(whole / "metrics.jsonl")] == [r.get("warning") for r in rows]

    times = ("seconds", "steps_per_second")
    plain = lambda path: [{k: v for k, v in r.items() if k not in times} for r in read(path / "metrics.jsonl")]  # noqa: E731
    run(problem, broken, 48)
    run(problem, broken, 72, resume=True)
    assert plain(broken) == plain(whole)
    # Back to a step in the middle, the rows after it are dropped and said again.
    for step in (72, 64):
        shutil.rmtree(broken / "checkpoints" / str(step))
    again = run(problem, broken, 72, resume=True)
    assert [r["step"] for r in again] == [64, 72]
    assert plain(broken) == plain(whole)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_it_is_shown_above_the_bar(problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    run(problem, tmp_path, 56, hooks=[Progress()])
    shown = capsys.readouterr().out
    assert "warning: steps 49-56: the tangent 'fit/tangent_norm' exploded" in shown and "worst at t in [" in shown


def training(step, loss, grad_norm=None, **values):
    """A row of a hundred steps; grad_norm follows the loss's root unless given."""
    gradient = abs(loss) ** 0.5 if grad_norm is None else grad_norm
    return row(step, loss=loss, grad_norm=gradient, **values)


def said(rows):
    """The warnings of a run, by step."""
    watch = Watch()
    return {r["step"]: text for r in rows if (text := watch(r)) is not None}


@pytest.mark.parametrize(
    "losses",
    [
        (2.7e3, 2.8e5),
        (2.7e3, 2e4, 2.8e5),
        (2.7e3, 9e3, 3e4, 2.8e5),
        (2.7e3, 9e3, 2.0e4, 3.5e4, 5.3e4, 2.8e5),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_a_loss_that_explodes_in_the_first_rows(losses, raw):
    values = [{"lagrangian__raw": loss / 3, "tangent__raw": 400.0} if raw else {} for loss in losses]
    rows = [training(100 * (n + 1), loss, **v) for n, (loss, v) in enumerate(zip(losses, values, strict=True))]
    found = said(rows)
    assert list(found) == [100 * len(losses)]
    what = "residual 'lagrangian/raw' exploded: its mean square 9.3e+04" if raw else "loss exploded: its mean 2.8e+05"
    (text,) = found.values()
    assert what in text and "is 104 times that at the start" in text and "learning rate" in text


def test_a_loss_that_explodes_within_the_first_row():
    text = Watch()(training(100, 9e4, first_loss=2.7e3, last_loss=2.8e5))
    assert text.startswith(
        "steps 1-100: the loss exploded: its mean 9e+04 is 33.3 times that at the start (2.7e+03); lower"
    )
    # It is compared with the first step in the rows after it, too.
    found = said([training(100, 5e4, first_loss=2.7e3), training(200, 8e4, first_loss=4e4)])
    assert list(found) == [200]
    # The first step of a later row is nothing to compare with.
    assert not said([training(100, 2.0, first_loss=2.7e3), training(200, 1.5, first_loss=1e-3)])


def test_a_tangent_and_a_gradient_that_explode_in_the_first_rows():
    values = {"eulerian__raw": 2.0}
    rows = [training(100, 3.0, eulerian__tangent_norm=430.0, **values)]
    rows.append(training(200, 3.0, eulerian__tangent_norm=5.2e4, **values))
    (text,) = said(rows).values()
    assert text.startswith(
        "steps 101-200: the tangent 'eulerian/tangent_norm' exploded: its norm 5.2e+04 is 121 times that at the"
    )
    (text,) = said([training(100, 3.0, 1.0), training(200, 4.0, 500.0)]).values()
    assert text.startswith("steps 101-200: the gradient exploded: its norm 5e+02 is 500 times that at the start (1); ")
    assert not said([training(100, 3.0, 1.0), training(200, 3.0, FACTOR**2 - 1)])


@pytest.mark.parametrize("seed", range(5))
def test_no_absolute_alarm_at_healthy_runs(seed):
    random = np.random.default_rng(seed)

    def noise():
        return float(np.exp(0.5 * random.normal()))

    # Residuals between two outputs of a network start near zero, and rise to the scale of the data; a tangent warms up.
    rising = [
        training(
            100 * (n + 1),
            400.0 * 0.9**n * noise(),
            noise(),
            first_loss=500.0,
            tangent__raw=400.0 * 0.9**n * noise(),
            semigroup__raw=(1e-4 if n == 0 else 30.0) * noise(),
            eulerian__tangent_norm=(n + 0.5) * noise(),
        )
        for n in range(30)
    ]
    # Learned weights: the loss falls below zero, and crosses it.
    learned = [
        [
            training(100 * (n + 1), loss, noise(), first_loss=first, tangent__raw=50.0 * noise())
            for n, loss in enumerate([start, *(random.normal(size=30) * 5.0)])
        ]
        for first, start in ((60.0, 8.0), (0.02, 0.5), (-0.02, 0.5), (0.0, 0.5))
    ]
    # Gradients have heavy tails.
    tails = [training(100 * (n + 1), noise(), float(np.exp(1.2 * random.normal()))) for n in range(60)]
    for rows in (rising, *learned, tails):
        assert not said(rows)


def test_a_curriculum_that_changes_the_objective_is_no_explosion():
    before = [training(100 * (n + 1), 2.0, 1.0, tangent__raw=2.0, lagrangian__raw=0.0) for n in range(7)]
    # The stage begins within row 8: a mean of both.
    mixed = [training(800, 12.0, 30.0, tangent__raw=2.0, lagrangian__raw=0.3)]
    after = [training(100 * n, 2e3, 3e3, tangent__raw=2.1, lagrangian__raw=30.0) for n in range(9, 20)]
    assert not said([*before, *mixed, *after])
    assert not said([*before[:1], *mixed, *after])
    # The same terms with other weights: the loss and its gradient jump, the residuals do not.
    heavier = [training(100 * n, 2e3, 1e3, tangent__raw=2.1) for n in range(8, 12)]
    assert not said([*before, *heavier])
    # An explosion after the change is one.
    broken = training(2000, 2e5, 3e5, tangent__raw=300.0, lagrangian__raw=3e4)
    assert list(said([*before, *mixed, *after, broken])) == [2000]
    assert list(said([*before[:1], *mixed, *after[:1], broken])) == [2000]


def test_a_resumed_watch_says_the_same_at_every_row():
    random = np.random.default_rng(3)
    rows = []
    for n in range(14):
        scale = 1e3 if n in (1, 4, 9) else 1.0
        late = float(n > 5)
        rows.append(
            training(
                100 * (n + 1),
                scale * float(random.uniform(1, 3)) if n < 11 else -1.0,
                scale * float(random.uniform(1, 3)),
                first_loss=1.0,
                tangent__raw=scale * float(random.uniform(1, 3)),
                eulerian__tangent_norm=late * scale * float(random.uniform(1, 3)),
                eulerian__raw=late * float(random.uniform(1, 3)),
            )
        )
    whole = said(rows)
    assert list(whole) == [200, 500, 1000]
    for at in range(len(rows)):
        # As read from the file, with the warnings that were written and rows of other kinds.
        kept = [{**r, "warning": "said"} for r in rows[:at]] + [{"kind": "eval", "step": 100 * at, "loss": 1e9}]
        watch = Watch(json.loads(json.dumps(kept)))
        assert {r["step"]: text for r in rows[at:] if (text := watch(r))} == {
            step: text for step, text in whole.items() if step > 100 * at
        }
