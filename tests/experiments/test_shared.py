"""What experiments and benchmarks share: files of results, interleaved times, and sweeps that go on where they stopped."""

import json
import time

import numpy as np
import pytest

from experiments.shared import results, sweep, timing


def test_results_are_written_with_their_environment_and_not_replaced_unasked(tmp_path, capsys):
    out = tmp_path / "new"
    results.refuse_existing(out, False)
    results.write(out, {"value": np.float32(0.5), "commit": "mine"}, "| a |")
    written = json.loads((out / "results.json").read_text())
    assert written["value"] == 0.5 and written["commit"] == "mine"
    assert {"command", "date", "device", "versions"} <= set(written)
    assert (out / "table.md").read_text() == "| a |\n" == capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"--out: .* holds results already; pass --overwrite"):
        results.refuse_existing(out, False)
    results.refuse_existing(out, True)


def test_tables_have_three_digits():
    assert results.labelled("k", {1: {"a": 0.12345, "b": 2}}) == "| k | a | b |\n| --- | --- | --- |\n| 1 | 0.123 | 2 |"


def test_calls_are_interleaved_and_the_first_round_is_apart():
    order = []

    def call(argument):
        order.append(argument)
        # The first round is the slowest, as that of a program that compiles is.
        time.sleep(0.03 if argument[1] == 0 else 0.001 if argument[0] == "fast" else 0.01)

    times = timing.interleaved({"fast": call, "slow": call}, 3, lambda name, number: (name, number))
    assert order == [(name, number) for number in range(4) for name in ("fast", "slow")]
    assert times.seconds["wall"]["fast"].shape == (3,) and set(times.seconds) == {"wall", "processor"}
    assert times.first["fast"] >= 0.03 > times.median("slow") >= 0.01
    assert times.ratio("slow", "fast") == np.median(times.ratios("slow", "fast")) > 1


def test_a_sweep_keeps_the_rows_that_are_there_and_refuses_those_of_another_configuration(tmp_path):
    ran = []

    def job(name):
        def run():
            ran.append(name)
            return {"name": name, "table": {"1": {"rmse": len(ran)}}}

        return sweep.Job(name, sweep.directory(tmp_path, "a, b c", name), run)

    config = {"steps": 3, "jumps": (1, 2)}
    sweep.run_missing([job("one")], config)
    sweep.run_missing([job("one"), job("two")], config)
    assert ran == ["one", "two"]
    rows = [sweep.read(tmp_path / "a-b_c" / name, config) for name in ran]
    assert sweep.values([*rows, {"table": {}}], "table", "1", "rmse") == [1, 2]
    assert sweep.read(tmp_path / "three", config) is None
    with pytest.raises(ValueError, match="was written with another steps; choose another directory"):
        sweep.run_missing([job("two")], {**config, "steps": 4})
    with pytest.raises(ValueError, match="another more;"):
        sweep.read(tmp_path / "a-b_c" / "two", {**config, "more": 1})
