"""Every method of the catalogue through the checks of jflow.testing; the equalities between methods; refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import identities, interpolants, objectives, parameterizations, reductions, testing, times, types
from jflow.testing import quadrature

METHODS = objectives.METHODS
LINEAR = interpolants.linear()
STATIONARY = [
    (n, path) for n in sorted(METHODS) for path in ("linear", "trigonometric") if path in (METHODS[n].paths or [path])
]
# Methods see a path through its coefficients alone: one path for each is among the quick tests.
QUICK = [f"{n}-{path}" for n, path in dict(reversed(STATIONARY)).items()]


@pytest.mark.representatives(*QUICK)
@pytest.mark.parametrize(("name", "path"), STATIONARY)
def test_the_exact_map_is_stationary_as_declared(name, path):
    testing.check_stationary(METHODS[name], interpolants.INTERPOLANTS[path]())


@pytest.mark.representatives("mean_flow")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_report(name):
    testing.check_report(METHODS[name])


# --- Equalities ------------------------------------------------------------------------------------------------------


PAIRS = quadrature.noisy_pairs(LINEAR)


def gradient(method, pair=(0.2, 0.7), theta=quadrature.OFF, this=PAIRS, **choices):
    """The exact expected gradient of a method's own term at one pair of times, on the linear path."""
    method = METHODS[method] if isinstance(method, str) else method

    def run(theta):
        return quadrature.expected_gradient(method, LINEAR, theta, pair, this=this, **choices)[0]

    return np.asarray(jax.jit(run)(jnp.asarray(theta)))


def method_of(residual, name="own"):
    def constructor(flow_map, interpolant, **choices):
        term = objectives.Term(name, residual, ("velocity",))
        return objectives.Objective("ad hoc", flow_map, interpolant, term, **choices)

    return dataclasses.replace(METHODS["mean_flow"], constructor=constructor)


def eulerian_self(row):
    own = row.own.velocity(row.s, row.x)
    return identities.eulerian(row.own.v, row.s, row.t, row.x, own, stop="target")


def test_mean_flow_has_the_expected_gradient_of_eulerian_distillation_from_the_exact_velocity():
    """And it is the Eulerian residual with the pair's velocity and the whole target stopped."""
    conditional = method_of(
        lambda row: identities.eulerian(row.own.v, row.s, row.t, row.x, row.conditional, stop="target")
    )
    np.testing.assert_array_equal(gradient("mean_flow"), gradient(conditional))
    np.testing.assert_allclose(gradient("mean_flow"), gradient("ayf_emd"), rtol=1e-12)
    np.testing.assert_array_equal(gradient("mean_flow"), gradient("decoupled_mean_flow"))
    np.testing.assert_array_equal(gradient("ayf_emd"), gradient("mean_flow", teacher=PAIRS.exact))


def test_improved_mean_flow_differs_from_mean_flow_in_the_tangent_alone():
    """Where the map's diagonal is the exact velocity the two agree in expectation; elsewhere they do not."""
    same = [gradient(name, on_diagonal=False) for name in ("mean_flow", "improved_mean_flow")]
    np.testing.assert_allclose(*same, rtol=1e-12)
    other = [gradient(name) for name in ("mean_flow", "improved_mean_flow")]
    assert np.abs(other[0] - other[1]).max() > 1e-2 * np.abs(other[0]).max()
    np.testing.assert_array_equal(gradient("improved_mean_flow"), gradient("pixel_mean_flow"))


def test_consistency_training_tends_to_the_eulerian_identity_at_one():
    """Its gradient over 1 - s, less MeanFlow's at t = 1, is of the order of the step."""
    limit = gradient("mean_flow", pair=(0.2, 1.0))
    steps = np.array([0.04, 0.02, 0.01])
    errors = [np.abs(gradient("consistency_training", pair=(0.2, 1.0), fraction=h) / 0.8 - limit).max() for h in steps]
    assert abs(np.polyfit(np.log(steps), np.log(errors), 1)[0] - 1.0) < 0.1
    assert errors[-1] < 0.05 * np.abs(limit).max()


def test_alpha_flow_goes_from_the_pairs_velocity_to_mean_flow():
    """At alpha = 1 it regresses v_{s,t} on I_s' for every t; as alpha falls its gradient tends to MeanFlow's."""
    regression = method_of(
        lambda row: identities.Residual(row.own.v(row.s, row.t, row.x), row.conditional, row.conditional)
    )
    np.testing.assert_allclose(gradient("alpha_flow", alpha=1.0), gradient(regression), rtol=1e-12)
    alphas = np.array([0.04, 0.02, 0.01])
    errors = [np.abs(gradient("alpha_flow", alpha=a) - gradient("mean_flow")).max() for a in alphas]
    assert abs(np.polyfit(np.log(alphas), np.log(errors), 1)[0] - 1.0) < 0.1
    np.testing.assert_array_equal(gradient("alpha_flow", alpha=0.04), gradient("soflow", fraction=0.04))


def test_the_semigroup_gradient_tends_to_eulerian_self_distillation():
    """Over 1 - gamma, as u -> s; and to MeanFlow's in expectation where v_{s,s} is the exact velocity."""
    limit = gradient(method_of(eulerian_self))
    mean_flow = gradient("mean_flow", on_diagonal=False)
    shares = np.array([0.04, 0.02, 0.01])
    errors, exact = [], []
    for share in shares:
        gammas = times.constant(1.0 - share)
        errors.append(np.abs(gradient("psd_m", gammas=gammas) / share - limit).max())
        exact.append(np.abs(gradient("psd_m", gammas=gammas, on_diagonal=False) / share - mean_flow).max())
    for found in (errors, exact):
        assert abs(np.polyfit(np.log(shares), np.log(found), 1)[0] - 1.0) < 0.15


def test_shortcut_is_midpoint_self_distillation_on_a_dyadic_grid(key):
    flow_map = quadrature.student(PAIRS, LINEAR, False)
    theta, path = jnp.asarray(quadrature.OFF), interpolants.linear()
    batch = jax.tree.map(lambda leaf: jnp.tile(leaf, (4, 1)), PAIRS.batch(0.2))
    # Gaps of at least two cells of the finer grid: over one cell the legs are asked at s = t (test_semigroup).
    longer = {"pairs": times.dyadic(5), "domain": types.dyadic(6)}
    one = objectives.shortcut(flow_map, path, levels=6, leg="own", **longer)
    two = objectives.psd_m(flow_map, path, pairs=times.dyadic(5), diagonal=0.875)
    averaged = objectives.shortcut(flow_map, path, levels=6, **longer)
    run = jax.jit(
        lambda k: [o(theta, jax.random.clone(k), batch, types.Context(ema=theta))[0] for o in (one, two, averaged)]
    )
    first, second, third = run(key)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, third, rtol=1e-12)
    s, t = times.dyadic(5)(jax.random.key(1), 1000)
    on_grid = objectives.shortcut(flow_map, path, levels=5).domain
    assert all(on_grid.contains(a, b) for a, b in zip(np.asarray(s), np.asarray(t), strict=True))


def test_terminal_velocity_matching_with_its_own_velocity_is_lagrangian_self_distillation():
    np.testing.assert_array_equal(gradient("tvm", leg="own"), gradient("lsd"))
    np.testing.assert_allclose(gradient("tvm"), gradient("lsd"), rtol=1e-12)


def test_the_noise_of_mean_flow_is_that_of_improved_mean_flow_times_the_maps_jacobian():
    """At the exact map MeanFlow's gradient is grad X_{s,t} times improved MeanFlow's, for every pair: the latter has less
    variance where the map expands and more where it contracts. The ratios are in docs/catalogue.md."""
    this = quadrature.noisy_pairs(LINEAR, -2.0)
    flow_map, pairs = quadrature.student(this, LINEAR, False), this.batch(0.2)

    def gradients(name):
        law = times.independent(times.constant(0.2), times.constant(0.9))
        objective = METHODS[name].constructor(flow_map, LINEAR, diagonal=0.0, pairs=law)

        def one(row):
            batch = types.Batch(row.x1[None], row.x0[None])
            key = jax.random.key(0)
            return jax.grad(lambda th: objective(th, key, batch)[0][0])(jnp.zeros(quadrature.FEATURES))

        return np.asarray(jax.jit(jax.vmap(one))(pairs))

    x = 0.8 * pairs.x0 + 0.2 * pairs.x1
    slope = np.asarray(jax.jit(jax.vmap(jax.grad(lambda z: this.exact.jump(this.truth, 0.2, 0.9, z)[0])))(x))
    plain, improved = gradients("mean_flow"), gradients("improved_mean_flow")
    np.testing.assert_allclose(plain, slope * improved, rtol=1e-12, atol=1e-12)
    variances = [np.sum(this.weights[:, None] * g**2, axis=1) for g in (improved, plain)]
    expanding, contracting = (
        np.divide(*(each[rows].sum() for each in variances)) for rows in (slope[:, 0] > 1, slope[:, 0] < 1)
    )
    np.testing.assert_allclose((expanding, contracting), (0.44, 2.7), rtol=0.02)


WARMED = ["lsd", "tvm", "lmd", "ayf_lmd", "esd", "emd", "ayf_emd", "mean_flow", "improved_mean_flow", "facm"]
WARMED += ["decoupled_mean_flow", "pixel_mean_flow"]


@pytest.mark.representatives("lsd", "esd", "mean_flow")
@pytest.mark.parametrize("name", WARMED)
def test_a_tangent_warm_up_goes_from_a_regression_to_the_method(name):
    """At r = 0 the derivative is gone from value and gradient; at r = 1 nothing has changed; r follows the step."""
    method = METHODS[name]
    flow_map, path = types.FlowMap(small_map, types.BOTH), interpolants.linear()
    choices = {"diagonal": 0.0, "pairs": times.independent(times.constant(0.2), times.constant(0.7))}
    choices |= {"teacher": lambda p, t, x, cond=None, *, key=None: p * x} if "teacher" in method.needs else {}
    params = {"a": jnp.array(0.7), "b": jnp.array(-0.4)}
    batch = types.Batch(jnp.array([[0.5, 1.0], [-0.3, 0.2]]), jnp.array([[0.1, -1.0], [0.8, 0.4]]))

    def loss(step, **more):
        objective = method.constructor(flow_map, path, **choices, **more)
        context = types.Context(step=jnp.int32(step), ema=params, teacher=jnp.array(0.3))
        return objective(params, jax.random.key(0), batch, context)[0]

    def none(function, primals, *tangents):
        value = function(*primals)
        return value, tuple(jnp.zeros_like(value) for _ in tangents)

    run = jax.jit(
        lambda: (loss(0, warmup=lambda k: k / 4), loss(0, derivative=none), loss(4, warmup=lambda k: k / 4), loss(0))
    )
    without, expected, whole, plain = run()
    np.testing.assert_allclose(without, expected, rtol=1e-12)
    np.testing.assert_allclose(whole, plain, rtol=1e-12)
    assert np.abs(without - whole).max() > 1e-3


# --- What a reduction does to the exact map --------------------------------------------------------------------------


BIASED = {
    "adaptive": reductions.adaptive(1.0, 0.01),
    "pseudo_huber": reductions.pseudo_huber(0.03),
    "cauchy": reductions.cauchy(1.0),
    "normalised": reductions.normalised(0.1),
    "clamped": reductions.clamped(1.0),
}


@pytest.mark.representatives("adaptive")
@pytest.mark.parametrize("name", sorted(BIASED))
def test_a_weight_that_depends_on_the_residual_biases_a_conditional_target(name):
    """At the exact map the gradient of MeanFlow does not vanish; that of LSD and AYF, whose residuals do, does."""
    # The pair's velocity, given x, is not symmetric about its mean; if it were, such a weight would have no bias.
    choices = {"reduction": BIASED[name]}
    zero = np.zeros(quadrature.FEATURES)
    biased = np.abs(gradient("mean_flow", theta=zero, **choices)).max()
    assert biased > 1e-2 * np.abs(gradient("mean_flow", **choices)).max()
    for other in ("lsd", "ayf_emd"):
        assert np.abs(gradient(other, theta=zero, **choices)).max() < 1e-12


# --- Reductions, and refusals, with every method ----------------------------------------------------------------------


def small_map(params, s, t, x, cond=None, *, key=None):
    return jnp.sin(params["a"] * x + s * params["b"]) + params["b"] * jnp.cos(t + s) * x


def every_reduction(params, s, t, difference):
    """The sum of all of them: one gradient through each."""
    log_weight = lambda p, s_, t_: p["w"] * (t_ + s_ + 0.5)  # noqa: E731
    chosen = [make() for make in reductions.REDUCTIONS.values()]
    chosen += [
        reductions.learned(log_weight),
        reductions.learned(log_weight, of=reductions.normalised(0.1)),
        reductions.learned_cauchy(log_weight),
        reductions.clamped(1.0, then=reductions.pseudo_huber(0.1)),
    ]
    return sum(reduction(params, s, t, difference) for reduction in chosen)


# Off the diagonal alone, from pairs: nothing of them reads a teacher's velocity.
UNTAUGHT = ("consistency_training", "ect", "ict")


@pytest.mark.representatives("mean_flow")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_every_reduction_and_a_teacher(name, key):
    method = METHODS[name]
    path = interpolants.INTERPOLANTS[method.paths[0] if method.paths else "linear"]()
    flow_map = types.FlowMap(small_map, types.BOTH)
    params = {"a": jnp.array(0.7), "b": jnp.array(-0.4), "w": jnp.array(0.3)}
    choices = {"reduction": every_reduction} if method.cost else {"diagonal_reduction": every_reduction}
    if name in UNTAUGHT:
        with pytest.raises(ValueError, match="teacher: expected no choice of it"):
            method.constructor(flow_map, path, teacher=flow_map)
    else:
        velocity = lambda p, t, x, cond=None, *, key=None: p * x  # noqa: E731
        choices["teacher"] = flow_map if "map teacher" in method.needs else velocity
    objective = method.constructor(flow_map, path, **choices)
    first, second = jax.random.split(jax.random.key(4))
    batch = types.Batch(jax.random.normal(first, (16, 2)) + 0.5, jax.random.normal(second, (16, 2)))
    teacher = params if "map teacher" in method.needs else jnp.array(0.3)
    context = types.Context(ema=params, teacher=teacher)
    value, slope = jax.jit(jax.value_and_grad(lambda p: objective(p, key, batch, context)[0].mean()))(params)
    assert np.isfinite(value) and all(np.isfinite(leaf) for leaf in jax.tree.leaves(slope))
    assert slope["w"] != 0 and slope["a"] != 0


def x_form(path):
    return parameterizations.flow_map(lambda p, s, t, x, cond=None, *, key=None: x, parameterizations.data_form(path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objectives.sct(types.FlowMap(small_map), interpolants.linear()), "trigonometric path"),
        (lambda: objectives.scd(types.FlowMap(small_map), interpolants.linear()), "trigonometric path"),
        (lambda: objectives.fmm(types.FlowMap(small_map), interpolants.linear()), "both directions"),
        (lambda: objectives.pid(types.FlowMap(small_map), interpolants.variance_preserving()), "starts at the base"),
        (lambda: objectives.free_flow(types.FlowMap(small_map), interpolants.cosine()), "starts at the base"),
        (
            lambda: objectives.pid(types.FlowMap(small_map, form="noise"), interpolants.linear()),
            "noise form is singular",
        ),
        (
            lambda: objectives.pixel_mean_flow(types.FlowMap(small_map, form="v"), interpolants.linear()),
            "predicts the data",
        ),
        (lambda: objectives.shortcut(types.FlowMap(small_map), interpolants.linear(), levels=0), "levels"),
    ],
)
def test_combinations_that_are_not_allowed_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert objectives.pixel_mean_flow(x_form(interpolants.linear()), interpolants.linear()).term.name == "eulerian"


def test_what_a_method_lacks_is_named(key):
    path, flow_map = interpolants.linear(), types.FlowMap(small_map)
    params = {"a": jnp.array(0.7), "b": jnp.array(-0.4)}
    batch = types.Batch(jnp.ones((8, 2)))
    run = lambda objective, b=batch: jax.eval_shape(objective, params, key, b)  # noqa: E731
    for name in ("lmd", "emd", "ayf_emd", "pid", "progressive_distillation", "consistency_distillation"):
        with pytest.raises(ValueError, match="teacher"):
            run(METHODS[name].constructor(flow_map, path))
    for name in ("tvm", "shortcut"):
        with pytest.raises(ValueError, match=r"context\.ema"):
            run(METHODS[name].constructor(flow_map, path))
    with pytest.raises(ValueError, match=r"couplings\.reflow"):
        run(objectives.reflow(flow_map, path))
    with pytest.raises(ValueError, match="expected data for lsd"):
        run(objectives.lsd(flow_map, path), types.Batch(None, jnp.ones((8, 2))))
    velocity = lambda p, t, x, cond=None, *, key=None: x  # noqa: E731
    with pytest.raises(ValueError, match="whose jumps"):
        run(objectives.progressive_distillation(flow_map, path, teacher=velocity))


def test_data_free_methods_need_no_data(key):
    params = {"a": jnp.array(0.7), "b": jnp.array(-0.4)}
    objective = objectives.pid(
        types.FlowMap(small_map), interpolants.linear(), teacher=lambda p, t, x, c=None, *, key=None: x
    )
    x0 = jax.random.normal(jax.random.clone(key), (8, 2))
    run = jax.jit(lambda x1, k: objective(params, k, types.Batch(x1, x0))[0])
    without = run(None, jax.random.clone(key))
    np.testing.assert_array_equal(without, run(jnp.full((8, 2), 9.0), jax.random.clone(key)))


def test_a_velocity_as_the_first_teacher_of_progressive_distillation(key):
    """Euler's legs of the exact velocity: the student's target is two Euler steps over the cell."""
    flow_map = types.FlowMap(small_map)
    params = {"a": jnp.array(0.7), "b": jnp.array(-0.4)}
    velocity = lambda p, t, x, cond=None, *, key=None: p * x * (1 + t)  # noqa: E731
    objective = objectives.progressive_distillation(
        flow_map, interpolants.linear(), cells=lambda step: 4 // (step + 1), solver="euler", teacher=velocity
    )
    x0 = jnp.linspace(-1.0, 1.0, 8)[:, None]
    batch = types.Batch(x0 + 1.0, x0)
    for step, cell in ((0, 0.25), (1, 0.5), (3, 1.0)):
        context = types.Context(step=jnp.int32(step), teacher=jnp.array(0.5))
        loss, aux = jax.jit(lambda c: objective(params, jax.random.clone(key), batch, c))(context)
        assert np.isfinite(loss).all()
        gap = np.flatnonzero(np.asarray(aux.metrics["semigroup/raw"].by["gap"].count))
        assert set(gap) == {min(int(cell * 8), 7)}
    s, t, b = 0.0, 1.0, 0.5
    half = x0 + 0.5 * b * x0 * (1 + s)
    two = half + 0.5 * b * half * (1.5)
    target = (two - x0) / (t - s)
    expected = jnp.sum((jax.vmap(lambda x: small_map(params, s, t, x))(x0) - target) ** 2, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
