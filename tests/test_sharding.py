"""Layouts: the same numbers on any mesh, and independent solves on each device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jflow
from jflow import interpolants, objectives, parameterizations, sharding, solvers
from jflow.datasets import ArrayDataset
from jflow.training import Checkpoints, init_state, make_chunk, make_step
from jflow.types import Batch

MESHES = {"1": (1, 1), "8 x 1": (8, 1), "4 x 2": (8, 2), "1 x 8": (8, 8)}
BATCH = 48


def mesh_of(name):
    devices, fsdp = MESHES[name]
    return sharding.mesh(fsdp, jax.devices()[:devices])


def net(params, s, t, x, cond=None, *, key=None):
    h = jnp.tanh(params["in"] @ jnp.concatenate([jnp.stack([s, t]), x]) + params["bias"])
    return params["out"] @ jnp.tanh(params["mid"] @ h)


def init_params(key, width=16):
    keys = jax.random.split(key, 3)
    shapes = {"in": (width, 5), "mid": (width, width), "out": (3, width)}
    params = {name: 0.5 * jax.random.normal(k, shapes[name], jnp.float64) for k, name in zip(keys, shapes, strict=True)}
    return {**params, "bias": jnp.zeros(width, jnp.float64)}


FLOW_MAP = jflow.flow_map(net, parameterizations.mean_velocity_form())
METHODS = {
    "lsd": objectives.lsd(FLOW_MAP, interpolants.linear()),
    "flow_matching": objectives.flow_matching(FLOW_MAP, interpolants.linear()),
}
ROWS = np.random.default_rng(0).normal(size=(101, 3)) * [1.0, 0.5, 0.2] + [0.3, 0.0, -1.0]


def make_state():
    params_key, key = jax.random.split(jax.random.key(3))
    return init_state(init_params(params_key), optax.adam(1e-2), key, ema=(0.9,))


def run_of(method, mesh, split=False):
    """The state, the chunk and the data."""
    dataset = ArrayDataset(Batch(ROWS), BATCH, seed=1, mesh=mesh if split else None)
    step = make_step(METHODS[method], optax.adam(1e-2), ema=(0.9,))
    if mesh is None:
        return make_state(), make_chunk(step, dataset.batch), dataset.data
    state = sharding.init(make_state, mesh)
    shardings = sharding.parts(state, mesh, smallest=16)
    chunk = make_chunk(step, dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=shardings)
    data = dataset.data if split else sharding.place(dataset.data, sharding.whole(mesh))
    return sharding.place(state, shardings), chunk, data


def trained(method, mesh, split=False):
    """The state, the losses and the norms of the gradients after three chunks of two steps."""
    state, chunk, data = run_of(method, mesh, split)
    losses, norms = [], []
    for _ in range(3):
        state, metrics = chunk(state, data, 2)
        losses.append(metrics["loss"].value())
        norms.append(metrics["grad_norm"].value())
    return state, np.array(losses), np.array(norms)


@pytest.fixture(scope="module")
def plain():
    return functools.cache(lambda method: trained(method, None))


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("lsd", "4 x 2"),
        *(pytest.param("lsd", mesh, marks=pytest.mark.slow) for mesh in MESHES if mesh != "4 x 2"),
        pytest.param("flow_matching", "4 x 2", marks=pytest.mark.slow),
    ],
)
def test_loss_gradient_and_average_do_not_depend_on_the_layout(method, mesh, plain):
    state, losses, norms = trained(method, mesh_of(mesh))
    expected, expected_losses, expected_norms = plain(method)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-11)
    for got, want in zip(jax.tree.leaves(state[1:4]), jax.tree.leaves(expected[1:4]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_run_goes_on_on_fewer_devices(tmp_path):
    """A state saved by eight devices is restored bit for bit, and the following losses agree to rounding."""
    state, chunk, data = run_of("flow_matching", None)
    expected = []
    for _ in range(4):
        state, metrics = chunk(state, data, 2)
        expected.append(float(metrics["loss"].value()))
    state, chunk, data = run_of("flow_matching", mesh_of("4 x 2"))
    state, _ = chunk(state, data, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for devices in (1, 2, 4):
            template, chunk, data = run_of("flow_matching", sharding.mesh(min(2, devices), jax.devices()[:devices]))
            here, _ = checkpoints.restore_latest(template)
            for got, want in zip(
                *(jax.tree.leaves(sharding.local(tree.params)) for tree in (here, state)), strict=True
            ):
                assert got.tobytes() == want.tobytes()
            losses = []
            for _ in range(3):
                here, metrics = chunk(here, data, 2)
                losses.append(float(metrics["loss"].value()))
            np.testing.assert_allclose(losses, expected[1:], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fsdp"),
    [
        pytest.param("lsd", 1, marks=pytest.mark.slow),
        pytest.param("lsd", 2, marks=pytest.mark.slow),
        ("flow_matching", 1),
    ],
)
def test_devices_share_the_work(method, fsdp):
    """Counts FLOPs, because the numbers would also agree if each of eight devices did everything."""
    dataset = ArrayDataset(Batch(ROWS), 1024)
    step = make_step(METHODS[method], optax.sgd(1e-2))
    state = init_state(init_params(jax.random.key(0), width=128), optax.sgd(1e-2), jax.random.key(1))
    mesh = sharding.mesh(fsdp)
    shardings = sharding.parts(state, mesh, smallest=16)
    spread = make_chunk(step, dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=shardings)
    placed = sharding.place(
        (state, dataset.data), (shardings, jax.tree.map(lambda _: sharding.whole(mesh), dataset.data))
    )
    each = spread.lower(*placed, 1).compile().cost_analysis()["flops"]
    one = make_chunk(step, dataset.batch).lower(state, dataset.data, 1).compile().cost_analysis()["flops"]
    assert each < 0.2 * one


def collectives(objective, **of):
    """The communication of a gradient's program on eight devices, each with the whole parameters: how often each."""
    mesh = sharding.mesh()
    params = jax.eval_shape(init_params, jax.random.key(0))
    batch = Batch(jax.ShapeDtypeStruct((64, 3), jnp.float64), **of)

    def step(params, key, batch):
        return jax.value_and_grad(lambda p: jnp.mean(objective(p, key, batch)[0]))(params)

    whole, rows = sharding.whole(mesh), sharding.rows(mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(step, in_shardings=(whole, whole, rows), out_shardings=whole)
        text = jitted.lower(params, jax.eval_shape(lambda: jax.random.key(1)), batch).compile().as_text()
    words = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    return {word: text.count(f" {word}(") + text.count(f" {word}-start(") for word in words}


PATH = interpolants.linear()
ALONE = {
    "lsd": objectives.lsd(FLOW_MAP, PATH, blocks=8),
    "psd_m": objectives.psd_m(FLOW_MAP, PATH, blocks=8),
    "mean_flow": objectives.mean_flow(FLOW_MAP, PATH, blocks=8),
    "energy": objectives.energy_distance(FLOW_MAP, PATH, size=4),
}


@pytest.mark.representatives("psd_m")
@pytest.mark.parametrize("name", ALONE)
def test_no_row_leaves_its_device(name):
    """Gradients are summed over devices, and nothing is collected: not the data of the batch, which only the batch's
    velocity looks at, nor the rows of either kind."""
    found = collectives(ALONE[name])
    assert found["all-reduce"] > 0
    assert not any(found[word] for word in ("all-gather", "all-to-all", "collective-permute")), found


def test_the_batch_velocity_collects_the_data():
    """The count finds a collection where there is one."""
    batch = objectives.velocity_estimates.batch
    assert collectives(objectives.lsd(FLOW_MAP, PATH, blocks=8, velocity=batch))["all-gather"] > 0


@pytest.mark.slow
def test_parts_stay_parts(plain):
    state, losses, _ = trained("lsd", mesh_of("1 x 8"), split=True)
    np.testing.assert_allclose(losses, plain("lsd")[1], rtol=1e-12)
    for tree in (state.params, state.ema["0.9"], state.opt_state[0].mu):
        assert tree["mid"].addressable_shards[0].data.shape == (2, 16)
        assert tree["in"].addressable_shards[3].data.shape == (2, 5)
        assert tree["out"].addressable_shards[0].data.shape == (3, 2)
    assert state.step.sharding.is_fully_replicated and state.key.sharding.is_fully_replicated


def test_what_parts_are():
    mesh = sharding.mesh(4)
    tree = {"a": jnp.zeros((3, 64, 128)), "b": jnp.zeros((64, 64)), "c": jnp.zeros((8191,)), "d": jnp.zeros((4, 1000))}
    specs = jax.tree.map(lambda s: s.spec, sharding.parts(tree, mesh))
    # The longest axis that four divides; what is too small, or divides nowhere, stays whole.
    assert specs == {"a": P(None, None, "fsdp"), "b": P("fsdp"), "c": P(), "d": P()}
    assert all(s.spec == P() for s in jax.tree.leaves(sharding.parts(tree, sharding.mesh())))
    assert sharding.rows(mesh).spec == P(("data", "fsdp"))


def test_a_state_is_made_in_parts():
    mesh = sharding.mesh(8)
    state = sharding.init(lambda key: {"w": jax.random.normal(key, (64, 128)), "key": key}, mesh, jax.random.key(1))
    assert state["w"].addressable_shards[0].data.shape == (64, 16)
    np.testing.assert_array_equal(state["w"], jax.random.normal(jax.random.key(1), (64, 128)))


def test_places_and_back():
    mesh = sharding.mesh(2)
    tree = {"w": np.arange(24.0).reshape(8, 3), "key": jax.random.key(4), "n": np.int32(3)}
    placed = sharding.place(tree, sharding.whole(mesh))
    assert placed["key"].dtype == jax.random.key(4).dtype and placed["key"].sharding.mesh == mesh
    local = sharding.local(sharding.place({"w": tree["w"]}, {"w": sharding.rows(mesh)}))
    np.testing.assert_array_equal(local["w"], tree["w"])
    back = sharding.local(placed)
    assert isinstance(back["n"], np.ndarray) and back["n"] == 3
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(jax.random.key(4)))
    # The state of a run is donated: what it was made of must stay.
    jax.jit(lambda x: x + 1, donate_argnums=0)(placed["w"])
    np.testing.assert_array_equal(tree["w"], np.arange(24.0).reshape(8, 3))


def test_split_rows_read_only_their_own():
    mesh, read = sharding.mesh(), []

    class Rows:
        shape, dtype = (13, 2), np.dtype(np.float32)

        def __getitem__(self, index):
            read.append((index.start, index.stop))
            return np.arange(26, dtype=np.float32).reshape(13, 2)[index]

    whole = sharding.split(Rows(), mesh)
    assert whole.shape == (16, 2) and {stop - start for start, stop in read} <= {2, 1, -1}
    np.testing.assert_array_equal(whole[:13], np.arange(26).reshape(13, 2))
    np.testing.assert_array_equal(whole[13:], 0)


@pytest.mark.slow
def test_solves_do_not_wait_for_one_another():
    """Stiffer rows need more steps: the plain vmap asks every device at every step, ours asks none."""

    def velocity(params, t, x, cond=None, *, key=None):
        return -params * cond * (x - jnp.cos(3 * t))

    solved = solvers.solve(velocity, "tsit5", rtol=1e-7, atol=1e-7)
    mesh = sharding.mesh()
    x, stiffness = jnp.linspace(-1.0, 1.0, 32)[:, None], jnp.geomspace(0.1, 60.0, 32)

    def end(params, x, k):
        return solved.jump(params, 0.0, 1.0, x, k)

    alone = jax.jit(sharding.vmap(end, mesh, in_axes=(None, 0, 0)))
    rows = jax.device_put((x, stiffness), sharding.rows(mesh))
    expected = jax.vmap(end, (None, 0, 0))(1.0, x, stiffness)
    np.testing.assert_allclose(alone(1.0, *rows), expected, rtol=1e-12, atol=1e-14)
    communication = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    text = alone.lower(1.0, *rows).compile().as_text()
    assert not any(word in text for word in communication)
    together = jax.jit(jax.vmap(end, (None, 0, 0))).lower(1.0, *rows).compile().as_text()
    assert any(word in together for word in communication)


def test_gradients_through_rows_on_their_own():
    mesh = sharding.mesh()
    x = jnp.linspace(0.0, 1.0, 16)

    def total(w, vmap):
        return jnp.sum(vmap(lambda w, x: jnp.sin(w * x), in_axes=(None, 0))(w, x))

    expected = jax.grad(total)(0.7, jax.vmap)
    found = jax.jit(jax.grad(lambda w: total(w, lambda f, in_axes: sharding.vmap(f, mesh, in_axes))))(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_objectives_run_under_pmap(method):
    """As code under pmap does it: a key per device, gradients averaged over the axis."""
    objective, params = METHODS[method], init_params(jax.random.key(0))
    batch = Batch(jnp.asarray(ROWS[:64]).reshape(8, 8, 3))
    keys, again = (jax.random.split(jax.random.key(1), 8) for _ in range(2))

    def loss(params, key, batch):
        return jnp.mean(objective(params, key, batch)[0])

    def gradient(params, key, batch):
        value, grads = jax.value_and_grad(loss)(params, key, batch)
        return jax.lax.pmean((value, grads), "devices")

    value, grads = jax.pmap(gradient, "devices", in_axes=(None, 0, 0))(params, keys, batch)
    values, each = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, 0)))(params, again, batch)
    np.testing.assert_allclose(value, np.full(8, np.mean(values)), rtol=1e-12)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(got[5], np.mean(want, axis=0), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharding.mesh(3), "fsdp: expected a divisor of the number of devices, 8, got 3"),
        (lambda: sharding.mesh(0), "fsdp: expected a whole number of at least 1"),
        (lambda: sharding.vmap(jnp.sin, sharding.mesh())(jnp.zeros(12)), "a multiple of 8 devices"),
        (lambda: sharding.vmap(jnp.sin, sharding.mesh())(jnp.float64(0)), "a multiple of 8 devices"),
        (lambda: sharding.vmap(jnp.sin, sharding.mesh(), None)(jnp.zeros(8)), "in_axes: expected 0 or None"),
        (lambda: sharding.vmap(jnp.sin, sharding.mesh(), 1)(jnp.zeros(8)), "in_axes: expected 0 or None"),
        (lambda: sharding.vmap(jnp.add, sharding.mesh(), (0,))(jnp.zeros(8), 1), "each of 2 arguments"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="fsdp"):
        sharding.mesh(2.0)


TREE = {"hidden": {"kernel": np.zeros((3, 8))}, "out": {"kernel": np.zeros((8, 2))}}


def row_map(*rows, in_axes=0):
    return sharding.vmap(lambda *x: x[0], sharding.mesh(), in_axes)(*rows)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda: sharding.mesh(devices=[]),
            ValueError,
            "^devices: expected at least one, got none$",
            id="no devices",
        ),
        pytest.param(
            lambda: sharding.parts(TREE, jax.make_mesh((8,), ("model",))),
            ValueError,
            r"^mesh: expected the axes \('data', 'fsdp'\), as sharding\.mesh makes them, got \('model',\)$",
            id="another mesh",
        ),
        pytest.param(
            lambda: sharding.place(TREE, sharding.parts(TREE["out"], sharding.mesh())),
            ValueError,
            "^shardings: expected one, or the pytree structure of the arrays, .*got ",
            id="a layout of another state",
        ),
        pytest.param(
            lambda: sharding.split({"x1": ROWS, "scale": 2.0}, sharding.mesh()),
            ValueError,
            r"^tree: expected arrays \[N, \.\.\.\], got float without a leading axis$",
            id="a number to split",
        ),
        pytest.param(
            lambda: sharding.mesh(fsdp=3),
            ValueError,
            "^fsdp: expected a divisor of the number of devices, 8, got 3$",
            id="parts that do not divide",
        ),
        pytest.param(
            lambda: sharding.mesh(0.5),
            TypeError,
            r"^fsdp: expected a whole number, got float 0\.5$",
            id="half as many parts",
        ),
        pytest.param(
            lambda: row_map(jnp.zeros(12)),
            ValueError,
            r"^rows: expected one number of rows, a multiple of 8 devices, got \[\(12,\)\]$",
            id="rows that do not divide",
        ),
        pytest.param(
            lambda: row_map(jnp.zeros(8), jnp.zeros(16)),
            ValueError,
            r"^rows: expected one number of rows, a multiple of 8 devices, got \[\(8,\), \(16,\)\]$",
            id="rows of different number",
        ),
        pytest.param(
            lambda: row_map(jnp.zeros((8, 8)), in_axes=1),
            ValueError,
            "^in_axes: expected 0 or None for each of 1 arguments, and one 0, got 1$",
            id="columns",
        ),
        pytest.param(
            lambda: row_map(jnp.zeros(8), 1.0, in_axes=(0,)),
            ValueError,
            r"^in_axes: expected 0 or None for each of 2 arguments, and one 0, got \(0,\)$",
            id="an axis too few",
        ),
    ],
)
def test_refused_in_words(attempt, error, message):
    with pytest.raises(error, match=message) as caught:
        attempt()
    # Not by a sub-class that means something else.
    assert caught.type is error
