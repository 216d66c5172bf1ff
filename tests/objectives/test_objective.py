"""What every objective does: the loss against its formula, the split of the batch, the report, and its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow import bases, interpolants, objectives, reductions, times, types

S, T = 0.2, 0.7
clone = jax.random.clone
FLOW_MAP_METHODS = ["esd", "improved_mean_flow", "lsd", "mean_flow", "psd_m", "psd_u"]


def mean_velocity(params, s, t, x, cond=None, *, key=None):
    """A small smooth map with two parameters, nonlinear in everything."""
    a, b = params
    return jnp.sin(a * x[::-1] + s * b) + b * jnp.cos(t + s * a) * x


FLOW_MAP = types.FlowMap(mean_velocity, types.BOTH)
PARAMS = jnp.array([0.8, -0.6])


def batch_of(n, seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    return types.Batch(jax.random.normal(first, (n, 2)) + 0.5, jax.random.normal(second, (n, 2)))


def make(name, path=None, **choices):
    path = interpolants.linear() if path is None else path
    method = objectives.METHODS[name]
    if method.cost:
        choices.setdefault("diagonal", 0.5)
    path = interpolants.INTERPOLANTS[method.paths[0]]() if method.paths else path
    return method.constructor(FLOW_MAP, path, **choices)


def central(f, z, h=1e-5):
    return (f(z + h) - f(z - h)) / (2 * h)


def formula(name, params, frozen, s, t, x, conditional, gamma, pair):
    """Each method's residual, from its docstring: ``frozen`` stands for the parameters under the stop-gradient.

    Derivatives by central differences, so that nothing of the library is used.
    """
    v = lambda p, s_, t_, x_: mean_velocity(p, s_, t_, x_)  # noqa: E731
    jump = lambda p, s_, t_, x_: x_ + (t_ - s_) * v(p, s_, t_, x_)  # noqa: E731
    if name == "lsd":
        moved = v(params, s, t, x) + (t - s) * central(lambda t_: v(params, s, t_, x), t)
        return moved - v(frozen, t, t, jump(frozen, s, t, x))
    if name == "esd":
        own = v(frozen, s, s, x)
        in_space = central(lambda h: v(frozen, s, t, x + h * own), 0.0)
        return v(params, s, t, x) - (t - s) * central(lambda s_: v(params, s_, t, x), s) - own - (t - s) * in_space
    if name in ("psd_m", "psd_u"):
        u = gamma * s + (1 - gamma) * t
        legs = (1 - gamma) * v(frozen, s, u, x) + gamma * v(frozen, u, t, jump(frozen, s, u, x))
        return v(params, s, t, x) - legs
    teacher = lambda t_, x_: v(TEACHER, t_, t_, x_)  # noqa: E731
    if name in ("lmd", "ayf_lmd"):
        moving = params if name == "lmd" else frozen
        moved = (t - s) * central(lambda t_: v(moving, s, t_, x), t)
        return v(params, s, t, x) + moved - teacher(t, jump(moving, s, t, x))
    if name in ("emd", "ayf_emd"):
        moving, own = params if name == "emd" else frozen, teacher(s, x)
        total = central(lambda h: v(moving, s + h, t, x + h * own), 0.0)
        return v(params, s, t, x) - own - (t - s) * total
    if name == "tvm":
        moved = v(params, s, t, x) + (t - s) * central(lambda t_: v(params, s, t_, x), t)
        return moved - v(EMA, t, t, jump(frozen, s, t, x))
    if name in ("pid", "free_flow"):
        moving = params if name == "pid" else frozen
        back = (v(moving, s, t, x) - v(moving, s, t - H, x)) / H
        return v(params, s, t, x) + (t - s) * back - teacher(t, jump(frozen, s, t, x))
    if name in ("alpha_flow", "soflow"):
        u = s + H * (t - s)
        difference = v(frozen, s, t, x) - H * conditional - (1 - H) * v(frozen, u, t, x + (u - s) * conditional)
        return v(params, s, t, x) - v(frozen, s, t, x) + difference / H
    if name in ("consistency_training", "consistency_distillation", "ect"):
        u = s + H * (t - s)
        there = x + (u - s) * teacher(s, x) if name == "consistency_distillation" else pair(u)
        return (jump(params, s, t, x) - jump(frozen, u, t, there)) / np.sqrt(u - s)
    if name == "ctm":
        u = gamma * s + (1 - gamma) * t
        two = jump(frozen, u, t, x + (u - s) * teacher(s, x))
        return jump(frozen, t, 1.0, jump(params, s, t, x)) - jump(frozen, t, 1.0, two)
    if name == "fmm":
        there = jump(params, s, t, x)
        velocity = central(lambda s_: jump(params, t, s_, there), s)
        return jnp.concatenate([velocity - conditional, jump(params, t, s, there) - x])
    if name == "sct":
        tau = 0.5 * np.pi * (t - s)
        total = central(lambda h: v(frozen, s + h, t, x + h * conditional), 0.0)
        tangent = np.cos(tau) * (2 / np.pi) * (v(frozen, s, t, x) - conditional - (t - s) * total)
        return (t - s) / np.sin(tau) * (v(params, s, t, x) - v(frozen, s, t, x)) + tangent
    along = conditional if name in ("mean_flow", "facm") else v(frozen, s, s, x)
    total = central(lambda h: v(frozen, s + h, t, x + h * along), 0.0)
    return v(params, s, t, x) - conditional - (t - s) * total


H = 0.1
EMA, TEACHER = jnp.array([0.5, -0.2]), jnp.array([0.7, -0.5])
# What makes the formulas' choices of the constructors.
CHOICES = {
    "pid": {"step": H},
    "free_flow": {"step": H},
    "alpha_flow": {"alpha": H},
    "soflow": {"fraction": H},
    "consistency_training": {"fraction": H},
    "ect": {"fraction": H},
    "consistency_distillation": {"fraction": H, "solver": "euler"},
    "ctm": {"solver": "euler"},
}
WRITTEN = [
    *FLOW_MAP_METHODS, "lmd", "ayf_lmd", "emd", "ayf_emd", "tvm", "pid", "free_flow", "alpha_flow", "soflow",
    "consistency_training", "consistency_distillation", "ect", "ctm", "fmm", "facm", "sct",
]  # fmt: skip
NOTHING_STOPPED = ("lmd", "emd", "fmm")


# Methods see a path through its coefficients alone.
@pytest.mark.representatives(*(f"linear-{name}" for name in WRITTEN if name != "sct"), "trigonometric-sct")
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("path_name", ["linear", "trigonometric"])
def test_loss_and_gradient_follow_the_formula(name, path_name, key):
    if name == "sct" and path_name == "linear":
        pytest.skip("the trigonometric path only")
    path = interpolants.INTERPOLANTS[path_name]()
    gamma = 0.3 if name in ("psd_u", "ctm") else 0.5
    objective = make(
        name,
        path,
        diagonal=0.0,
        pairs=times.independent(times.constant(S), times.constant(T)),
        **({"gammas": times.constant(gamma)} if name in ("psd_m", "psd_u", "ctm") else {}),
        **CHOICES.get(name, {}),
    )
    batch = batch_of(3)

    @jax.jit
    def expected(params, frozen):
        def one(x0, x1):
            x, conditional = path.interpolate(S, x0, x1), path.derivative(S, x0, x1)
            pair = lambda u: path.interpolate(u, x0, x1)  # noqa: E731
            return jnp.sum(formula(name, params, frozen, S, T, x, conditional, gamma, pair) ** 2)

        return jax.vmap(one)(batch.x0, batch.x1)

    def mean_loss(params):
        loss, aux = objective(params, key, batch, types.Context(ema=EMA, teacher=TEACHER))
        return loss.mean(), (loss, aux)

    gradient, (loss, aux) = jax.jit(jax.grad(mean_loss, has_aux=True))(PARAMS)
    np.testing.assert_allclose(loss, expected(PARAMS, PARAMS), rtol=1e-7)
    weight = H * (T - S) if objective.term.name == "consistency" else 1.0
    raw = aux.metrics[f"{objective.term.name}/raw"].value()
    np.testing.assert_allclose(raw, weight * loss.mean(), rtol=1e-12)
    for i in range(2):
        unit = jnp.zeros(2).at[i].set(1.0)
        slope = central(lambda h, u=unit: expected(PARAMS + h * u, PARAMS).mean(), 0.0)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-5)
        # The stop-gradient matters: the gradient with the target side let loose is another one.
        loose = central(lambda h, u=unit: expected(PARAMS + h * u, PARAMS + h * u).mean(), 0.0)
        assert name in NOTHING_STOPPED or abs(loose - slope) > 1e-3 * abs(slope)


def test_flow_matching_follows_its_formula(key):
    path = interpolants.trigonometric()
    batch = batch_of(3)
    objective = objectives.flow_matching(FLOW_MAP, path, times=times.constant(0.3))
    loss, aux = jax.jit(objective)(PARAMS, clone(key), batch)

    @jax.jit
    @jax.vmap
    def formula(x0, x1):
        v = mean_velocity(PARAMS, 0.3, 0.3, path.interpolate(0.3, x0, x1))
        return jnp.sum((v - path.derivative(0.3, x0, x1)) ** 2)

    np.testing.assert_allclose(loss, formula(batch.x0, batch.x1), rtol=1e-12)
    assert np.all(aux.metrics["diagonal_rows"].values)
    velocity = lambda p, t, x, cond=None, *, key=None: mean_velocity(p, t, t, x)  # noqa: E731
    bare = objectives.flow_matching(velocity, path, times=times.constant(0.3))
    np.testing.assert_array_equal(jax.jit(bare)(PARAMS, clone(key), batch)[0], loss)


@pytest.mark.representatives("4")
@pytest.mark.parametrize("blocks", [1, 4])
def test_losses_come_back_in_batch_order_with_the_mask_of_diagonal_rows(blocks, key):
    """With v = 0 the Lagrangian residual vanishes and a diagonal row's loss is |x1 - x0|^2, which tells the row."""
    zero = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: 0.0 * x)
    n = 32
    x1 = jnp.arange(1.0, n + 1)[:, None]
    objective = objectives.lsd(zero, interpolants.linear(), diagonal=0.75, blocks=blocks)
    run = jax.jit(lambda k: objective(None, k, types.Batch(x1, jnp.zeros_like(x1))))
    loss, aux = run(clone(key))
    mask = np.asarray(aux.metrics["diagonal_rows"].values)
    np.testing.assert_allclose(loss, np.where(mask, np.asarray(x1)[:, 0] ** 2, 0.0))
    assert np.all(mask.reshape(blocks, -1).sum(1) == 24 // blocks)
    masks = np.stack([run(k)[1].metrics["diagonal_rows"].values for k in jax.random.split(key, 200)])
    # Every row is diagonal in 3/4 of the batches, not the first 24 in all of them.
    assert np.all(np.abs(masks.mean(0) - 0.75) < 4.5 * np.sqrt(0.1875 / 200))


@pytest.mark.representatives("lsd")
@pytest.mark.parametrize("name", ["flow_matching", *FLOW_MAP_METHODS, "fmm", "ctm", "consistency_distillation"])
def test_methods_run_jitted_and_not_alike_once_traced_on_pytrees(name, key):
    def tree_velocity(params, s, t, x, cond=None, *, key=None):
        return {"a": mean_velocity(params, s, t, x["a"]) + cond, "b": jnp.tanh(params[0] * x["b"] + t - s)}

    flow_map = types.FlowMap(tree_velocity, types.BOTH)
    choices = {} if name == "flow_matching" else {"diagonal": 0.75}
    objective = objectives.METHODS[name].constructor(flow_map, interpolants.linear(), **choices)
    n = 16
    x1 = {"a": batch_of(n).x1, "b": batch_of(n, 1).x1[:, :1]}
    batch = types.Batch(x1, cond=jnp.linspace(0.0, 1.0, n)[:, None])
    traces = []

    @jax.jit
    def jitted(params, k):
        traces.append(1)
        return objective(params, k, batch, types.Context(step=jnp.int32(3), teacher=TEACHER))

    loss, aux = jitted(PARAMS, clone(key))
    metrics = aux.metrics
    jitted(PARAMS + 1.0, clone(key))
    assert len(traces) == 1
    if name in ("esd", "flow_matching"):  # without jit every operation is compiled by itself: dear
        plain, plain_aux = objective(PARAMS, clone(key), batch)
        np.testing.assert_allclose(loss, plain, rtol=1e-9)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), aux, plain_aux)
    assert loss.shape == (n,) and np.all(np.isfinite(loss))
    assert {"tangent/raw", "tangent/loss", "diagonal_rows"} <= set(metrics)
    if name != "flow_matching":
        term = objective.term.name
        assert set(metrics[f"{term}/raw"].by) == set(metrics[f"{term}/tangent_norm"].by) == {"t", "gap"}
        assert metrics[f"{term}/raw"].by["gap"].count.sum() == 4
        weighted = (12 * metrics["tangent/loss"].value() + 4 * metrics[f"{term}/loss"].value()) / n
        np.testing.assert_allclose(loss.mean(), weighted, rtol=1e-9)


# All methods go through one split of the batch: rows of one kind, of the other, and of both.
# Quick in test_sharding.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(objectives.METHODS))
def test_one_device_and_eight_agree(name, key):
    objective = make(name, blocks=8)
    batch, context = batch_of(64), types.Context(ema=EMA, teacher=TEACHER)
    step = jax.jit(jax.value_and_grad(lambda p, b: objective(p, clone(key), b, context)[0].mean()))
    single = step(PARAMS, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), single, step(PARAMS, spread))


def test_reductions_apply_off_the_diagonal_and_on_it(key):
    batch = batch_of(8)
    run = lambda **choices: jax.jit(make("lsd", **choices))(PARAMS, clone(key), batch)  # noqa: E731
    squared, aux = run()
    mask = np.asarray(aux.metrics["diagonal_rows"].values)
    off, _ = run(reduction=reductions.adaptive(1.0, 0.01))
    np.testing.assert_allclose(off, np.where(mask, squared, squared / (squared + 0.01)), rtol=1e-9)
    on, _ = run(diagonal_reduction=reductions.adaptive(1.0, 0.01))
    np.testing.assert_allclose(on, np.where(mask, squared / (squared + 0.01), squared), rtol=1e-9)


def test_the_finite_difference_of_lsd_tends_to_its_derivative(key):
    from jflow import identities

    batch = batch_of(8)
    run = lambda **choices: jax.jit(make("lsd", diagonal=0.0, **choices))(PARAMS, clone(key), batch)[0]  # noqa: E731
    exact = run()
    errors = [np.abs(run(derivative=identities.finite_difference(h)) - exact).max() for h in (1e-2, 1e-3)]
    assert 8 < errors[0] / errors[1] < 12  # first order


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: make("lsd", diagonal=1.5), ValueError, "diagonal"),
        (lambda k: make("lsd", blocks=0), ValueError, "blocks"),
        (lambda k: make("flow_matching", diagonal=0.5), ValueError, "diagonal"),
        (lambda k: make("lsd", blocks=3)(PARAMS, k, batch_of(8)), ValueError, "blocks = 3"),
        (lambda k: make("lsd", diagonal=0.99)(PARAMS, k, batch_of(8)), ValueError, "leave none"),
        (lambda k: make("lsd")(PARAMS, k, types.Batch(jnp.ones((8, 2), int))), TypeError, "batch.x1"),
        (lambda k: make("lsd")(PARAMS, k, types.Batch(jnp.ones((8, 2)), jnp.ones((8, 3)))), ValueError, "batch.x0"),
        (lambda k: make("lsd")(PARAMS, k, types.Batch(jnp.ones((8, 2)), jnp.ones((7, 2)))), ValueError, "leading axis"),
        (lambda k: make("lsd")(PARAMS, k, types.Batch(jnp.float32(1.0))), ValueError, "leading axis"),
    ],
)
def test_bad_input(call, error, message, key):
    with pytest.raises(error, match=message):
        call(key)


def row_of(path, t, batch, i):
    """A diagonal row as an estimate sees it."""
    leg = objectives.Leg(FLOW_MAP, PARAMS, None, None)
    x = path.interpolate(t, batch.x0[i], batch.x1[i])
    own = {"own": leg, "frozen": leg, "ema": None, "teacher": None, "estimate": objectives.velocity_estimates.pair}
    drawn = {"s": t, "t": t, "x0": batch.x0[i], "x1": batch.x1[i], "x": x, "cond": None, "key": None, "gamma": None}
    return objectives.Row(
        **drawn, **own, step=jnp.int32(0), data=batch.x1, interpolant=path, base=bases.STANDARD_NORMAL
    )


def test_the_batch_velocity_is_the_posterior_mean_over_the_batch(key):
    """Against Bayes' rule written out, on every path; the last row is near the data, where it is the pair's own."""
    batch = batch_of(6)
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    for name in interpolants.INTERPOLANTS:
        path = interpolants.INTERPOLANTS[name]()

        @jax.jit
        def run(batch, path=path):
            rows = [row_of(path, t[i], batch, i) for i in range(6)]
            pairs = jax.vmap(path.derivative)(t, batch.x0, batch.x1)
            return [objectives.velocity_estimates.batch(row) for row in rows], jax.vmap(path.coefficients)(t), pairs

        got, coefficients, pairs = jax.tree.map(np.asarray, run(batch))
        for i in range(6):
            c = jax.tree.map(lambda leaf, i=i: leaf[i], coefficients)
            x0, x1 = np.asarray(batch.x0), np.asarray(batch.x1)
            x = c.alpha * x0[i] + c.beta * x1[i]
            if c.alpha < 2e-2:
                np.testing.assert_allclose(got[i], pairs[i], rtol=1e-6)
                continue
            noise = (x[None] - c.beta * x1) / c.alpha
            weight = np.exp(-0.5 * np.sum(noise**2, 1))
            each = c.alpha_dot * noise + c.beta_dot * x1
            np.testing.assert_allclose(got[i], (weight[:, None] * each).sum(0) / weight.sum(), rtol=1e-8)


def test_the_batch_velocity_has_the_same_expected_gradient_and_less_variance(key):
    path = interpolants.linear()

    def gradients(estimate):
        objective = objectives.flow_matching(FLOW_MAP, path, velocity=estimate)

        def one(k):
            first, second = jax.random.split(k)
            skewed = types.Batch(jnp.exp(0.5 * jax.random.normal(first, (64, 2))))
            return jax.grad(lambda p: objective(p, second, skewed)[0].mean())(PARAMS)

        return np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=50))(jax.random.split(clone(key), 2000)))

    pair, batch = gradients(objectives.velocity_estimates.pair), gradients(objectives.velocity_estimates.batch)
    error = np.sqrt((pair - batch).var(0) / 2000)
    assert np.all(np.abs((pair - batch).mean(0)) < 4 * error)
    assert np.all(batch.var(0) < 0.8 * pair.var(0))


def test_the_batch_velocity_refuses_pairs_that_are_not_independent(key):
    objective = objectives.flow_matching(FLOW_MAP, interpolants.linear(), velocity=objectives.velocity_estimates.batch)
    with pytest.raises(ValueError, match="neither x0 nor cond"):
        objective(PARAMS, key, batch_of(4))


# Quick in test_combine.
@pytest.mark.slow
def test_sequence_computes_the_stage_in_force(key):
    alone, lsd = make("flow_matching"), make("lsd")
    both = objectives.sequence([(0, alone), (10, lsd)])
    batch = batch_of(8)
    for step, stage in ((9, alone), (10, lsd), (500, lsd)):
        loss, aux = jax.jit(both)(PARAMS, clone(key), batch, types.Context(step=jnp.int32(step)))
        expected, own = jax.jit(stage)(PARAMS, clone(key), batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        assert set(aux.metrics) == set(jax.eval_shape(lsd, PARAMS, clone(key), batch)[1].metrics)
        for name, report in aux.metrics.items():
            if name in own.metrics:
                np.testing.assert_allclose(report.value(), own.metrics[name].value(), rtol=1e-12)
            else:  # of the stage that is not in force: nothing, counted no times
                assert all(not np.any(leaf) for leaf in jax.tree.leaves(report)) and np.all(np.isnan(report.value()))
    assert objectives.sequence([(0, alone)]) is alone
    for stages in ([], [(1, alone)], [(0, alone), (0, lsd)]):
        with pytest.raises(ValueError, match="stages"):
            objectives.sequence(stages)


def test_a_choice_is_replaced_and_the_others_stay(key):
    """``dataclasses.replace``: what the objective chose by default is not taken for a choice of the caller's."""
    batch = types.Batch(batch_of(16).x1)
    for name in ("lsd", "lmd", "flow_matching"):
        objective = make(name, **({"teacher": FLOW_MAP} if name == "lmd" else {}))
        again = dataclasses.replace(objective, blocks=2)
        assert (again.blocks, again.diagonal, again.domain) == (2, objective.diagonal, objective.domain)
    alone = dataclasses.replace(make("lsd"), diagonal=0.0)
    run = lambda objective: jax.jit(objective)(PARAMS, clone(key), batch)[0]  # noqa: E731
    np.testing.assert_array_equal(run(alone), run(make("lsd", diagonal=0.0)))
    wide = dataclasses.replace(make("lsd"), base=bases.Normal(std=2.0))
    np.testing.assert_array_equal(run(wide), run(make("lsd", base=bases.Normal(std=2.0))))
    with pytest.raises(ValueError, match="times: expected no choice of it for lsd"):
        dataclasses.replace(make("lsd", times=times.constant(0.5)), diagonal=0.0)
