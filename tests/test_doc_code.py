"""The code of the documentation's pages runs in its order; the numbers of steps and sizes are smaller here."""

import contextlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import Batch, bases, flow_map, nets, parameterizations, training
from jflow.training import distributed, ema, init_state

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
PAGES = {"running.md": 4, "likelihood.md": 1}
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


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_every_page_with_code_is_tested_here(page):
    assert len(code(page)) == PAGES.get(page, 0)


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
