"""The code of the documentation's pages runs in its order; the numbers of steps and sizes are smaller here.

The pages that train are among the slow tests.
"""

import contextlib
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import Batch, bases, flow_map, nets, parameterizations, training
from jflow.training import distributed, ema, init_state

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
PAGES = {
    "getting-started.md": 5,
    "notation.md": 1,
    "choosing-a-method.md": 1,
    "own-network.md": 6,
    "conditioning.md": 6,
    "images.md": 5,
    "training-log.md": 1,
    "running.md": 4,
    "dtypes.md": 1,
    "extending.md": 5,
    "likelihood.md": 1,
}
SMALLER = {
    "total_steps=4000": "total_steps=4",
    "log_every=100": "log_every=2",
    "checkpoint_every=1000, snapshot_every=100": "checkpoint_every=4, snapshot_every=2",
    # One device, because compiling for it is quicker.
    "sharding.mesh(fsdp=4)": "sharding.mesh(1, jax.devices()[:1])",
    "batch_size=512": "batch_size=16",
    'datasets.images("path/to/images", size=64)': "rows",
    "range(100, 5001, 100)": "range(2, 5, 2)",
    "16.0) for step in steps], 5000": "16.0) for step in steps], 4",
    "runs/digits": "runs/mine",
}
# The same for the other pages, which train in a few lines.
SHORTER = {
    "features=128, depth=4": "features=8, depth=1",
    "features=64, depth=2": "features=8, depth=1",
    "features=32, depth=2": "features=8, depth=1",
    "features=64, depth=3": "features=8, depth=1",
    "100, 3000)": "1, 10)",
    "steps=3000": "steps=10",
    "arange(1000)": "arange(100)",
    "key(1), 1000,": "key(1), 100,",
    "np.asarray(rows.cond))": "np.asarray(rows.cond), recipe=metrics.Recipe(epochs=1, width=16))",
    "steps=4000": "steps=10",
    "steps=8000": "steps=20",
    "steps=2000": "steps=10",
    "checkpoint_every=1000": "checkpoint_every=10",
    "(1000, 2)": "(16, 2)",
    "x1[:1000]": "x1[:16]",
    # Pages run in 32 bits here, by a context that outlives a change of the flag.
    'jax.config.update("jax_enable_x64", True)': "jax.enable_x64(True).__enter__()",
    '("lsd", "psd_m", "improved_mean_flow")': '("psd_m", "improved_mean_flow")',
}
MODULE = nets.MLP.plain(features=8, depth=1)
FLOW_MAP = flow_map(nets.from_linen(MODULE), parameterizations.mean_velocity_form())


class Rows:
    """What a page reads from files."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return Batch(np.full(2, index / 32, np.float32))


def code(page):
    """The blocks of Python of a page, made smaller."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    for was, now in SMALLER.items():
        blocks = [block.replace(was, now) for block in blocks]
    return blocks


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the code of a page in an empty directory, as a user does: in 32 bits, with jax's usual promotion."""
    monkeypatch.chdir(tmp_path)

    def run(page):
        space = {}
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for block in code(page):
                for was, now in SHORTER.items():
                    block = block.replace(was, now)
                exec(block, space)
        return space

    return run


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_every_page_with_code_is_tested_here(page):
    assert len(code(page)) == PAGES.get(page, 0)


@pytest.mark.slow
def test_running_trains_and_reads_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The tests have their devices already.
    monkeypatch.setattr(distributed, "processes", contextlib.nullcontext)
    averages = {"ema": ema.power(16.0)}
    optimizer = optax.sgd(0.1)

    def make_state(key):
        params = MODULE.init(key, 0.0, 0.0, jnp.zeros(2))["params"]
        return init_state(params, optimizer, key, ema=averages, objective=space["objective"])

    space = {
        "flow_map": FLOW_MAP,
        "optimizer": optimizer,
        "averages": averages,
        "make_state": make_state,
        "rows": Rows(),
    }
    assert all(was in (DOCS / "running.md").read_text() for was in SMALLER)
    metrics, combined, own, files = code("running.md")
    for block in (own, files, metrics, combined):
        exec(block, space)
    assert int(space["state"].step) == 4 and np.all(np.isfinite(dict(space["losses"])[4]))
    last, _ = training.restore_params("runs/mine", "ema")
    assert jax.tree.structure(space["params"]) == jax.tree.structure(last)
    # The weights of the two snapshots.
    np.testing.assert_allclose(np.sum(space["fit"].coefficients), 1.0, atol=1e-5)


@pytest.mark.slow
def test_likelihood_weights_remove_the_bias_of_the_sampler():
    space = {
        "bound": FLOW_MAP.bind(MODULE.init(jax.random.key(0), 0.0, 0.0, jnp.zeros(2))["params"]),
        "noise": jax.random.normal(jax.random.key(1), (256, 2)),
        "grid": jnp.array([0.0, 1.0]),
        "log_target": jax.vmap(bases.Normal(0.3).log_density),
        "f": lambda x: x,
    }
    for block in code("likelihood.md"):
        exec(block, space)
    np.testing.assert_array_less(np.abs(space["mean"] - 0.3), 4 * space["error"])


@pytest.mark.slow
def test_getting_started_trains_resumes_compares_and_plots(run, tmp_path):
    space = run("getting-started.md")
    assert int(space["state"].step) == 20
    rows = training.metrics_log.read("runs/first/metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"][-1] == 20
    one, four, solve = space["table"].rows
    assert (one.nfe, four.nfe) == (1, 4) and solve.nfe > 4
    # One jump that is drawn by hand is the one that the table measures.
    assert space["samples"].shape == (16, 2) and one.rmse > solve.rmse
    assert {path.name for path in tmp_path.glob("*.png")} == {"samples.png", "loss.png", "comparison.png"}
    lines = [line for block in code("getting-started.md") for line in block.splitlines() if line]
    assert len(lines) <= 25


def test_notation_reversed_time_carries_noise_to_data(run):
    np.testing.assert_allclose(run("notation.md")["end"], 2.0, atol=1e-3)


@pytest.mark.slow
def test_choosing_a_method_compares_methods_from_the_same_start(run):
    table = run("choosing-a-method.md")["table"]
    assert [row.nfe for row in table.rows] == [1, 2, 1, 2]
    assert all(np.isfinite(row.distances["energy"].value) for row in table.rows)


@pytest.mark.slow
def test_own_network_every_kind_becomes_a_map_that_moves_a_point(run):
    space = run("own-network.md")
    x = jnp.array([0.5, -1.0], jnp.float32)
    for kind in ("function", "linen", "nnx", "equinox"):
        made, params = space[f"{kind}_map"], space[f"{kind}_params"]
        np.testing.assert_array_equal(made.jump(params, 0.5, 0.5, x), x)
        moved = made.jump(params, 0.0, 1.0, x)
        assert moved.shape == (2,) and (kind == "function" or np.abs(moved - x).max() > 1e-3)
    velocity = space["velocity"](space["velocity_params"], jnp.float32(0.0), x)
    solved = space["solved_map"].jump(space["velocity_params"], 0.0, 0.01, x)
    np.testing.assert_allclose((solved - x) / 0.01, velocity, rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_images_are_drawn_and_scored(run):
    space = run("images.md")
    assert space["drawn"].shape == (100, 8, 8, 1) and np.isfinite(space["distance"].value)
    assert space["distance"].samples == 100 and space["model"].null == 10


@pytest.mark.slow
def test_conditioning_guides_and_distils(run):
    space = run("conditioning.md")
    model, teacher, x = space["model"], space["teacher"], space["noise"][0]
    cond, null = (np.asarray(model.velocity(teacher, 0.5, x, jnp.int32(label))) for label in (2, 3))
    assert np.abs(cond - null).max() > 0
    guided = np.asarray(space["guided"](teacher, 0.5, x, jnp.int32(2)))
    np.testing.assert_allclose(guided, 2 * cond - null, rtol=1e-5, atol=1e-6)
    outside = space["guided"](teacher, 0.95, x, jnp.int32(2))
    np.testing.assert_allclose(outside, model.velocity(teacher, 0.95, x, jnp.int32(2)), rtol=1e-6)
    weak = np.asarray(model.velocity(space["params"], 0.5, x, jnp.int32(2)))
    np.testing.assert_allclose(space["direction"], weak + 1.5 * (cond - weak), rtol=1e-5, atol=1e-6)
    assert space["jumped"].shape == space["samples"].shape == (64, 1)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (space["student"], teacher)), strict=True))


@pytest.mark.slow
def test_training_log_describes_every_column(run):
    last = run("training-log.md")["last"]
    page = (DOCS / "training-log.md").read_text()
    for name in last:
        shown = re.sub(r"^lagrangian/", "METHOD/", re.sub("_by_(t|gap)$", "", name)).replace(
            "tangent/loss", "METHOD/loss"
        )
        assert f"`{shown}`" in page, name


@pytest.mark.slow
def test_dtypes_bfloat16_products_keep_losses_and_outputs_in_float32(run):
    space = run("dtypes.md")
    assert space["loss"].dtype == space["output"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(space["params"]))


@pytest.mark.slow
def test_extending_examples_do_what_they_say(run):
    space = run("extending.md")
    assert space["loss"].shape == (16,) and np.all(np.isfinite(space["loss"]))
    assert float(space["aux"].metrics["semigroup/raw"].value()) >= 0
    np.testing.assert_allclose(space["difference"], 0.0, atol=1e-6)
    assert all(np.all(np.isfinite(slope)) for slope in space["slopes"])
    np.testing.assert_allclose(space["halves"], space["jumps"], rtol=1e-6)


def test_the_citation_names_the_version_of_the_package():
    root = DOCS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = dict(re.findall(r"^([a-z-]+): (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE))
    assert (lines["version"], lines["license"], lines["title"]) == (project["version"], project["license"], "jflow")
