"""The row as one value: guided targets, random middle times, stops and legs; the walk through the code; what prints."""

import functools
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import identities, interpolants, objectives, reductions, times, trees, types
from tests.objectives.conditional_map import EMA, MAP, PARAMS, TEACHER, S, T, batch_of, fixed, mean_velocity

clone = jax.random.clone
NULL = jnp.float64(-3.0)


def point(batch, s=S):
    return (1 - s) * batch.x0 + s * batch.x1


# --- A target that the map guides by itself --------------------------------------------------------------------------


def guided(row, w=2.5):
    """pair + (w - 1)(b(x | cond) - b(x | null)), with the map's own velocities at frozen parameters."""
    towards, away = row.frozen, row.frozen._replace(cond=NULL)
    difference = trees.sub(towards.velocity(row.s, row.x), away.velocity(row.s, row.x))
    return trees.axpy(w - 1.0, difference, objectives.velocity_estimates.pair(row))


@pytest.mark.representatives("own")
@pytest.mark.parametrize("leg", ["frozen", "own"])
def test_a_target_guided_by_the_maps_own_legs(leg, key):
    """The loss against the formula on both kinds of rows, and its gradient that of a target held fixed."""
    batch = batch_of()

    def estimate(row):
        return guided(row._replace(frozen=row.leg(leg)))

    def formula(params, at, s, t):
        def one(x0, x1, cond):
            x = (1 - s) * x0 + s * x1
            towards, away = (mean_velocity(at, s, s, x, c) for c in (cond, NULL))
            target = x1 - x0 + 1.5 * (towards - away)
            v = lambda s_, x_: mean_velocity(params, s_, t, x_, cond)  # noqa: E731
            value, total = jax.jvp(lambda s_, x_: mean_velocity(at, s_, t, x_, cond), (s, x), (1.0, target))
            del value
            return jnp.sum((v(s, x) - target - (t - s) * total) ** 2)

        return jax.vmap(one)(batch.x0, batch.x1, batch.cond)

    for name, t, choices in (
        ("flow_matching", S, {"times": times.constant(S)}),
        ("mean_flow", T, {"pairs": fixed(), "diagonal": 0.0}),
    ):
        objective = objectives.METHODS[name].constructor(MAP, interpolants.linear(), velocity=estimate, **choices)

        def mean(params, k, objective=objective):
            return objective(params, k, batch)[0].mean()

        value, slope = jax.jit(jax.value_and_grad(mean))(PARAMS, clone(key))
        expected = functools.partial(formula, at=PARAMS, s=S, t=t)
        right = jax.jit(jax.value_and_grad(lambda p, e=expected: e(p).mean()))(PARAMS)
        np.testing.assert_allclose(value, right[0], rtol=1e-10)
        np.testing.assert_allclose(slope, right[1], rtol=1e-10)
        loose = jax.jit(jax.grad(lambda p, t=t: formula(p, p, S, t).mean()))(PARAMS)
        assert np.abs(loose - slope).max() > 1e-3


def test_no_gradient_passes_through_the_rows_velocity(key):
    """In a residual that stops nothing itself, with an estimate through the trained leg."""

    def residual(row):
        return identities.Residual(row.own.v(row.s, row.t, row.x), row.conditional, row.x)

    def loss(params, at, k):
        def estimate(row):
            return row.own._replace(params=row.own.params if at is None else at).velocity(row.s, row.x)

        term = objectives.Term("open", residual, ("velocity",))
        choices = {"diagonal": 0.0, "pairs": fixed(), "velocity": estimate}
        return objectives.Objective("open", MAP, interpolants.linear(), term, **choices)(params, k, batch_of())[0].sum()

    slope = jax.jit(jax.grad(lambda p, k: loss(p, None, k)))(PARAMS, clone(key))
    expected = jax.jit(jax.grad(lambda p, k: loss(p, PARAMS, k)))(PARAMS, clone(key))
    np.testing.assert_allclose(slope, expected, rtol=1e-12)
    assert np.abs(slope).max() > 1e-2


@pytest.mark.slow
def test_a_residual_sees_every_leg(key):
    """own, frozen, ema and teacher, each at its own parameters, with the row's condition; gradients through own alone."""

    def residual(row):
        legs = [row.leg(which).v(row.s, row.t, row.x) for which in ("own", "frozen", "ema", "teacher")]
        total = functools.reduce(trees.add, [trees.scale(i + 1.0, leg) for i, leg in enumerate(legs)])
        return identities.Residual(total, row.pair(row.s, row.t), trees.zeros_like(total))

    term = objectives.Term("legs", residual, ("teacher",))
    objective = objectives.Objective("legs", MAP, interpolants.linear(), term, diagonal=0.0, pairs=fixed())
    batch = batch_of()
    context = types.Context(ema=EMA, teacher=TEACHER)

    def formula(params):
        def one(x, x0, x1, cond):
            at = zip((1.0, 2.0, 3.0, 4.0), (params, PARAMS, EMA, TEACHER), strict=True)
            return jnp.sum((sum(w * mean_velocity(p, S, T, x, cond) for w, p in at) - (x1 - x0)) ** 2)

        return jax.vmap(one)(point(batch), batch.x0, batch.x1, batch.cond)

    loss = jax.jit(objective)(PARAMS, clone(key), batch, context)[0]
    np.testing.assert_allclose(loss, formula(PARAMS), rtol=1e-12)
    slope = jax.jit(jax.grad(lambda p: objective(p, clone(key), batch, context)[0].sum()))(PARAMS)
    np.testing.assert_allclose(slope, jax.grad(lambda p: formula(p).sum())(PARAMS), rtol=1e-10)
    for missing, message in (("ema", r"context\.ema"), ("teacher", r"context\.teacher")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda c: objective(PARAMS, clone(key), batch, c)[0], context._replace(**{missing: None}))


# --- Random numbers of a row's own -----------------------------------------------------------------------------------


def drawn(use):
    """A residual whose loss is the square of the row's own uniform number."""

    def residual(row):
        u = jax.random.uniform(row.key_for(use), dtype=row.s.dtype)
        return identities.Residual(u * jnp.ones(1), jnp.zeros(1), jnp.zeros(1))

    still = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: 0.0 * x, types.BOTH)
    term = objectives.Term("drawn", residual)
    return objectives.Objective("drawn", still, interpolants.linear(), term, diagonal=0.0)


def test_a_row_draws_numbers_of_its_own_for_each_use(key):
    batch = types.Batch(jnp.zeros((64, 1)))
    run = lambda use, k: np.sqrt(jax.jit(drawn(use))(None, k, batch)[0])  # noqa: E731
    first, again, probe = run("middle", clone(key)), run("middle", clone(key)), run("probe", clone(key))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first)) == 64 and np.abs(first - probe).min() > 0
    assert abs(np.corrcoef(first, probe)[0, 1]) < 0.5
    assert np.abs(first - run("middle", jax.random.key(1))).min() > 0
    assert abs(first.mean() - 0.5) < 4 / np.sqrt(12 * 64)
    # The same row has the same numbers wherever it is asked.
    leg = objectives.Leg(MAP, PARAMS, None, None)
    fields = dict.fromkeys(objectives.Row._fields, leg) | {"key": jax.random.key(5)}
    row = objectives.Row(**fields)
    same = [jax.random.key_data(row._replace(t=i).key_for("middle")) for i in range(2)]
    np.testing.assert_array_equal(*same)
    assert np.any(same[0] != jax.random.key_data(row.key_for("other")))


def test_a_middle_time_drawn_in_the_row(key):
    """PSD with a middle of the row's own: stationary at the exact map, and the formula at the middles that were drawn."""

    def residual(row):
        gamma = jax.random.uniform(row.key_for("middle"), dtype=row.s.dtype)
        two = identities.semigroup(row.own.v, row.s, row.t, row.x, gamma)
        return two._replace(tangent=gamma * jnp.ones_like(row.x))

    term = objectives.Term("middle", residual)
    objective = objectives.Objective("psd", MAP, interpolants.linear(), term, diagonal=0.0, pairs=fixed())
    batch = batch_of(cond=False)
    loss, aux = jax.jit(objective)(PARAMS, clone(key), batch)
    # The row's keys, as the objective splits them: seven uses, then one for each row.
    keys = jax.random.split(jax.random.split(clone(key), 7)[6], 4)
    gammas = jax.vmap(lambda k: jax.random.uniform(row_key(k, "middle"), dtype=jnp.float64))(keys)
    v = functools.partial(mean_velocity, PARAMS)

    def one(x, gamma):
        u = gamma * S + (1 - gamma) * T
        first = v(S, u, x)
        return jnp.sum((v(S, T, x) - (1 - gamma) * first - gamma * v(u, T, x + (u - S) * first)) ** 2)

    np.testing.assert_allclose(loss, jax.vmap(one)(point(batch), gammas), rtol=1e-9)
    norm = aux.metrics["middle/tangent_norm"].value()
    np.testing.assert_allclose(norm, np.sqrt(2 * np.mean(np.asarray(gammas) ** 2)), rtol=1e-9)


def row_key(key, use):
    fields = dict.fromkeys(objectives.Row._fields) | {"key": key}
    return objectives.Row(**fields).key_for(use)


# --- Methods of the catalogue: stop and leg --------------------------------------------------------------------------


LEGS_OF = {"own": PARAMS, "ema": EMA, "teacher": TEACHER}
STOPS = [("lsd", stop) for stop in ("velocity", "target", "none")]
STOPS += [("esd", stop) for stop in ("spatial", "target", "velocity", "none")]
STOPS += [(name, stop) for name in ("psd_m", "psd_u", "shortcut") for stop in ("target", "none")]


@pytest.mark.representatives(
    "lsd-target-ema", "esd-spatial-own", "esd-velocity-teacher", "psd_m-none-teacher", "shortcut-target-teacher"
)
@pytest.mark.parametrize("leg", LEGS_OF)
@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_stop_and_leg_are_those_of_the_identities(name, stop, leg, key):
    """Loss and gradient of each row against ``identities``, with the leg at its own parameters."""
    levels = {"levels": 3} if name == "shortcut" else {}
    law = fixed(0.0, 0.5)
    choices = {"pairs": law, "diagonal": 0.0, "leg": leg, "stop": stop, **levels}
    choices |= {"gammas": times.constant(0.3)} if name == "psd_u" else {}
    objective = objectives.METHODS[name].constructor(MAP, interpolants.linear(), **choices)
    batch = batch_of()
    context = types.Context(ema=EMA, teacher=TEACHER)
    s, t = jnp.float64(0.0), jnp.float64(0.5)

    def expected(params):
        at = params if leg == "own" else LEGS_OF[leg]

        def one(x, cond):
            v = lambda p: lambda a, b, z: mean_velocity(p, a, b, z, cond)  # noqa: E731
            if name == "lsd":
                r = identities.lagrangian(v(params), s, t, x, lambda a, z: v(at)(a, a, z), stop=stop)
            elif name == "esd":
                r = identities.eulerian(v(params), s, t, x, v(at)(s, s, x), stop=stop)
            else:
                gamma = 0.3 if name == "psd_u" else 0.5
                r = identities.semigroup(v(params), s, t, x, gamma, legs=v(at), stop=stop)
            return trees.sq_norm(r.difference)

        return jax.vmap(one)(batch.x0, batch.cond)

    def got(params):
        return objective(params, clone(key), batch, context)[0]

    compare = jax.jit(lambda p: [(f(p), jax.grad(lambda q, f=f: f(q).sum())(p)) for f in (got, expected)])
    found, wanted = compare(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, wanted)


@pytest.mark.parametrize("name", ["lsd", "esd", "psd_m", "psd_u", "tvm", "shortcut", "consistency_training"])
def test_a_stop_or_a_leg_that_does_not_exist_is_refused(name, key):
    make = objectives.METHODS[name].constructor
    wrong = [("leg", "average")] + ([("stop", "all")] if "stop" in inspect.signature(make).parameters else [])
    for choice, value in wrong:
        with pytest.raises(ValueError, match=f"^{choice}: expected one of"):
            objective = make(MAP, interpolants.linear(), **{choice: value})
            jax.eval_shape(lambda: objective(PARAMS, clone(key), batch_of(16), types.Context(ema=EMA)))  # noqa: B023


# --- A walk of the code ----------------------------------------------------------------------------------------------


SOURCE = str(pathlib.Path(jflow.__file__).parent)


class Stop(Exception):
    pass


def frames_to_the_network(objective, batch, context, on_call):
    """The functions of the library between the call of the objective and the n-th call of its network, outermost first."""
    calls = []

    def network(params, s, t, x, cond=None, *, key=None):
        calls.append(1)
        if len(calls) == on_call:
            raise Stop
        return params * x

    objective = objective(types.FlowMap(network, types.BOTH))
    with pytest.raises(Stop) as caught:
        objective(jnp.float64(1.0), jax.random.key(0), batch, context)
    return [entry.frame for entry in caught.traceback if str(entry.path).startswith(SOURCE)]


MAKERS = {name: functools.partial(lambda n, m: objectives.METHODS[n].constructor(m, interpolants.linear()), name)
          for name in ("flow_matching", "lsd", "psd_m", "mean_flow", "lmd", "ctm", "shortcut")}  # fmt: skip
MAKERS["energy"] = lambda m: objectives.energy_distance(m, interpolants.linear(), size=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("on_call", [1, 2])
def test_eight_functions_from_the_call_to_the_loss(name, on_call):
    """Down to the network, on the diagonal (the first call) and off it; none with more than six positional arguments."""
    if on_call == 2 and name in ("flow_matching", "energy"):
        pytest.skip("one call of the network")
    context = types.Context(ema=jnp.float64(0.5), teacher=jnp.float64(0.5))
    frames = frames_to_the_network(MAKERS[name], types.Batch(jnp.ones((16, 1))), context, on_call)
    # Those that lead to the loss: the identities, the leg and the map's own arithmetic below it are the mathematics.
    parts = ("objectives/", "sharding.py")
    walk = [f.code for f in frames if str(f.code.path)[len(SOURCE) + 1 :].startswith(parts)]
    walk = [code for code in walk if not str(code.path).endswith("row.py")]
    names = [code.raw.co_qualname for code in walk]
    assert 3 <= len(walk) <= 8, names
    for code in walk:
        raw = code.raw
        positional = raw.co_argcount - (raw.co_varnames[:1] == ("self",))
        assert positional <= 6, (raw.co_qualname, positional)


def test_no_function_of_the_objectives_takes_more_than_six_positional_arguments():
    for path in pathlib.Path(SOURCE, "objectives").glob("*.py"):
        module = importlib.import_module(f"jflow.objectives.{path.stem}".removesuffix(".__init__"))
        functions = [f for _, f in inspect.getmembers(module, inspect.isfunction)]
        classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        functions += [
            f
            for c in classes
            for _, f in inspect.getmembers(c, inspect.isfunction)
            if f.__name__ not in ("__init__", "__new__")
        ]
        for function in functions:
            if function.__module__ != module.__name__:
                continue
            kinds = [p.kind for p in inspect.signature(function).parameters.values()]
            positional = [
                k for k in kinds if k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            ]
            names = list(inspect.signature(function).parameters)
            assert len(positional) - (names[:1] == ["self"]) <= 6, function


# --- What prints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(objectives.METHODS))
def test_an_objective_prints_its_choices_shortly(name):
    method = objectives.METHODS[name]
    path = interpolants.INTERPOLANTS[(method.paths or ("linear",))[0]]()
    for choices in ({}, method.published()):
        text = repr(method.constructor(MAP, path, **choices))
        assert text.startswith(f"{name}(") and len(text) < 600 and " at 0x" not in text and "\n" not in text, text
        assert path.name in text
    half = {"diagonal": 0.375, "blocks": 4} if method.cost else {"blocks": 4}
    text = repr(method.constructor(MAP, path, **half, coupling=lambda key, x1, cond: x1))
    assert all(f"{k}={v}" in text for k, v in half.items()) and " at 0x" not in text and len(text) < 600


def test_objectives_of_objectives_and_groups_print_shortly():
    lsd, energy = (
        objectives.lsd(MAP, interpolants.linear()),
        objectives.energy_distance(MAP, interpolants.linear(), size=4),
    )
    published = objectives.decoupled_mean_flow(
        MAP, interpolants.linear(), **objectives.METHODS["decoupled_mean_flow"].published()
    )
    for whole in (
        energy,
        objectives.weighted_sum(lsd, energy=(energy, 0.25)),
        objectives.sequence([(0, lsd), (700, published)]),
    ):
        text = repr(whole)
        assert len(text) < 1200 and " at 0x" not in text, text
    assert "size=4" in repr(energy) and len(repr(energy)) < 600
    assert "700" in repr(objectives.sequence([(0, lsd), (700, energy)]))
    assert "0.25" in repr(objectives.weighted_sum(lsd, energy=(energy, 0.25)))


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (times.uniform(0.1, 0.6, stratified=True), ["uniform", "0.1", "0.6", "stratified=True"]),
        (times.logit_normal(0.4, 1.3), ["logit_normal", "0.4", "1.3"]),
        (times.ordered(times.logit_normal(0.2, 1.0), times.uniform()), ["ordered", "logit_normal", "0.2", "uniform"]),
        (times.source(times.ordered(times.constant(0.3))), ["source", "ordered", "constant", "0.3"]),
        (times.independent(times.constant(0.0), times.uniform()), ["independent", "constant", "uniform"]),
        (times.cells(7), ["cells", "7"]),
        (times.dyadic(5), ["dyadic", "5"]),
        (times.to_data(), ["uniform", "constant", "1.0"]),
        (times.gapped(times.constant(0.25)), ["gapped", "0.25"]),
        (times.mixed([times.triangle(), times.to_data()], [0.7, 0.3]), ["mixed", "0.7", "triangle"]),
        (times.ByStep(lambda step: times.cells(step + 1)), ["ByStep"]),
        (reductions.adaptive(0.5, 1e-3), ["adaptive", "0.5", "0.001"]),
        (reductions.weighted(lambda square: square), ["weighted"]),
        (reductions.shaped(lambda d: d), ["shaped"]),
        (
            reductions.clamped(1.5, then=reductions.per_entry(reductions.cauchy(0.3))),
            ["clamped", "1.5", "cauchy", "0.3"],
        ),
        (reductions.scaled(2.5, reductions.squared), ["scaled", "2.5", "squared"]),
        (reductions.learned(lambda p, s, t: t, of=reductions.normalised(0.2)), ["learned", "normalised", "0.2"]),
        (reductions.pseudo_huber(0.02, times_root_size=True), ["pseudo_huber", "0.02", "times_root_size=True"]),
    ],
)
def test_a_law_and_a_reduction_print_their_parameters(value, parts):
    text = repr(value)
    assert all(part in text for part in parts), text
    assert len(text) < 600 and " at 0x" not in text
