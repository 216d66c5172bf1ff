"""What every objective does: the loss against its formula, the split of the batch, the report, and its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow import bases, interpolants, objectives, reductions, times, types
from tests.objectives.cases import FLOW_MAP, PARAMS, batch_of, make, mean_velocity

S, T = 0.2, 0.7
clone = jax.random.clone
FLOW_MAP_METHODS = ["esd", "improved_mean_flow", "lsd", "mean_flow", "psd_m", "psd_u"]


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


@pytest.mark.slow
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
