"""What an objective refuses when it is made or called, by the argument's name: every method, every choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, interpolants, objectives, parameterizations, reductions, times, types

clone = jax.random.clone
METHODS = objectives.METHODS
PARAMS = jnp.array([0.8, -0.6])
EMA, TEACHER = jnp.array([0.5, -0.2]), jnp.array([0.7, -0.5])


def mean_velocity(params, s, t, x, cond=None, *, key=None):
    a, b = params
    c = 0.0 if cond is None else cond
    return jnp.sin(a * x[::-1] + s * b + c) + b * jnp.cos(t + s * a) * x


MAP = types.FlowMap(mean_velocity, types.BOTH, null=0.0)
FORWARD = types.FlowMap(mean_velocity, types.FORWARD)
HALF = lambda key, n: jnp.full((n,), 0.5)  # noqa: E731


def path_of(name):
    return interpolants.INTERPOLANTS[(METHODS[name].paths or ("linear",))[0]]()


def make(name, flow_map=MAP, **choices):
    return METHODS[name].constructor(flow_map, path_of(name), **choices)


def batch_of(n=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, n, 2))
    return types.Batch(jnp.asarray(x[0] + 0.5), jnp.asarray(x[1]))


# --- Laws ------------------------------------------------------------------------------------------------------------


def pairs(s, t):
    return lambda key, n: (jnp.full((n,), s), jnp.full((n,), t))


WRONG_TIMES = {
    "up to 999": lambda key, n: 999.0 * jax.random.uniform(key, (n,)),
    "negative": lambda key, n: jnp.full((n,), -1e-3),
    "nan": lambda key, n: jnp.full((n,), jnp.nan),
    "infinite": lambda key, n: jnp.full((n,), jnp.inf),
    "one of them": lambda key, n: jnp.full((n,), 0.5).at[n - 1].set(1.5),
    "scalar": lambda key, n: jnp.float64(0.5),
    "python number": lambda key, n: 0.5,
    "wrong size": lambda key, n: jnp.full((n + 1,), 0.5),
    "one time": lambda key, n: jnp.full((1,), 0.5),
    "matrix": lambda key, n: jnp.full((n, 1), 0.5),
    "pair": pairs(0.2, 0.7),
    "whole numbers": lambda key, n: jnp.zeros((n,), int),
    "truth values": lambda key, n: jnp.zeros((n,), bool),
    "nothing": lambda key, n: None,
}
WRONG_PAIRS = {
    "t < s": pairs(0.7, 0.2),
    "now and then t < s": lambda key, n: (jnp.full((n,), 0.5), 0.45 + 0.5 * jax.random.uniform(key, (n,))),
    "s beyond one": pairs(1.2, 1.3),
    "t negative": pairs(0.2, -0.3),
    "nan": pairs(0.2, jnp.nan),
    "three values": lambda key, n: (HALF(key, n),) * 3,
    "one value": lambda key, n: (HALF(key, n),),
    "an array": lambda key, n: jnp.full((2, n), 0.5),
    "one time": HALF,
    "scalars": lambda key, n: (0.2, 0.7),
    "sizes that differ": lambda key, n: (jnp.full((n,), 0.2), jnp.full((n + 1,), 0.7)),
    "whole numbers": lambda key, n: (jnp.zeros((n,), int), jnp.ones((n,), int)),
    "nothing": lambda key, n: None,
}


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("law", sorted(WRONG_TIMES))
@pytest.mark.parametrize("argument", ["times", "gammas"])
def test_a_law_of_times_is_drawn_when_the_objective_is_made(argument, law, by_step):
    law = WRONG_TIMES[law]
    law = times.ByStep(lambda step, law=law: law) if by_step else law
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        make("psd_m", **{argument: law})


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("law", sorted(WRONG_PAIRS))
def test_a_law_of_pairs_is_drawn_when_the_objective_is_made(law, by_step):
    law = WRONG_PAIRS[law]
    law = times.ByStep(lambda step, law=law: law) if by_step else law
    with pytest.raises((ValueError, TypeError), match=r"^pairs: expected"):
        make("lsd", FORWARD, pairs=law)
    with pytest.raises((ValueError, TypeError), match=r"^pairs: expected"):
        objectives.energy_distance(FORWARD, interpolants.linear(), size=4, pairs=law)


@pytest.mark.parametrize("argument", ["times", "gammas", "pairs"])
@pytest.mark.parametrize("law", [0.5, "uniform", times.ByStep(lambda step: 0.5)])
def test_what_is_no_law_is_refused(argument, law):
    with pytest.raises(TypeError, match=f"^{argument}: expected a function"):
        make("psd_m", **{argument: law})
    with pytest.raises(TypeError, match=r"^law: expected a function step -> law"):
        times.ByStep(law if not callable(law) and not isinstance(law, times.ByStep) else 0.5)
    if argument == "pairs":
        with pytest.raises(TypeError, match=r"^pairs: expected a function"):
            objectives.energy_distance(MAP, interpolants.linear(), size=4, pairs=law)


@pytest.mark.parametrize(
    ("domain", "law"),
    [
        (types.TO_DATA, times.triangle()),
        (types.TO_DATA, pairs(0.2, 0.9)),
        (types.FROM_NOISE, times.triangle()),
        (types.FROM_NOISE, times.to_data()),
        (types.dyadic(3), pairs(0.25, 0.625)),
        (types.dyadic(3), times.dyadic(4)),
        (types.dyadic(3), times.triangle()),
        (types.FORWARD, times.independent(times.uniform(), times.uniform())),
        (types.FORWARD, times.ordered(times.uniform(), times.uniform())),
    ],
)
def test_pairs_outside_the_domain_are_refused(domain, law):
    """Of the map, or chosen for the objective; those inside pass."""
    inside = law.name == "ordered" if hasattr(law, "name") else False
    for flow_map, choices in ((types.FlowMap(mean_velocity, domain), {}), (MAP, {"domain": domain})):
        call = functools.partial(make, "lsd", flow_map, pairs=law, **choices)
        if inside:
            assert call().domain is domain
            continue
        with pytest.raises(ValueError, match=r"^pairs: expected pairs \(s, t\) within the domain"):
            call()


def test_a_map_of_one_end_is_trained_there_with_the_methods_own_law():
    """A map that is defined at t = 1 alone: the default law of lsd leaves its domain, that of facm does not."""
    to_data = types.FlowMap(mean_velocity, types.TO_DATA)
    assert make("facm", to_data).domain is types.TO_DATA
    with pytest.raises(ValueError, match=r"^pairs: expected pairs"):
        make("lsd", to_data)


def test_a_law_of_traced_values_passes_under_jit(key):
    """And the objective made of it computes what one of the concrete values does."""

    @jax.jit
    def loss(s, t, gamma, k):
        full = lambda value: lambda key, n: jnp.full((n,), value)  # noqa: E731
        law = lambda key, n: (jnp.full((n,), s), jnp.full((n,), t))  # noqa: E731
        objective = make("psd_m", FORWARD, pairs=law, gammas=full(gamma), times=full(s), diagonal=0.5)
        return objective(PARAMS, k, batch_of())[0]

    expected = make(
        "psd_m", FORWARD, pairs=pairs(0.2, 0.7), gammas=times.constant(0.3), times=times.constant(0.2), diagonal=0.5
    )
    got = loss(0.2, 0.7, 0.3, clone(key))
    np.testing.assert_allclose(got, jax.jit(expected)(PARAMS, clone(key), batch_of())[0], rtol=1e-12)


def test_a_wrong_law_is_refused_under_jit_too():
    """Nothing of the law is traced there: its numbers can be looked at."""
    with pytest.raises(ValueError, match=r"^pairs: expected"):
        jax.jit(lambda x: make("lsd", FORWARD, pairs=pairs(0.7, 0.2)) and x)(1.0)


# --- What is given in the place of something else --------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_map_and_the_path_are_refused_by_name(name):
    constructor, path = METHODS[name].constructor, path_of(name)
    network = lambda p, s, t, x, cond=None, *, key=None: x  # noqa: E731
    for wrong in ("linear", interpolants.linear, None, types.FORWARD, network, 3):
        with pytest.raises((TypeError, ValueError), match=r"^interpolant: .*got"):
            constructor(MAP, wrong)
    with pytest.raises(TypeError, match=r"^(flow_map|interpolant): expected"):
        constructor(path, MAP)
    for wrong in (path, None, "lsd", {"w": 1.0}, parameterizations.mean_velocity_form()):
        with pytest.raises(TypeError, match=r"^flow_map: expected a (Velocity or a )?FlowMap"):
            constructor(wrong, path)
    if name not in ("flow_matching", "reflow"):
        # A network, or a form that was not called: neither is a map. (A function alone is a Velocity to flow matching.)
        for wrong in (network, parameterizations.mean_velocity_form):
            with pytest.raises(TypeError, match=r"^flow_map: expected a FlowMap.*got function"):
                constructor(wrong, path)


def test_groups_refuse_the_same():
    path = interpolants.linear()
    make_energy = functools.partial(objectives.energy_distance, size=4)
    for flow_map, wrong in ((MAP, "linear"), (MAP, interpolants.linear), (MAP, MAP)):
        with pytest.raises(TypeError, match=r"^interpolant: expected"):
            make_energy(flow_map, wrong)
    for wrong in (path, lambda p, s, t, x: x, None):
        with pytest.raises(TypeError, match=r"^flow_map: expected"):
            make_energy(wrong, path)


def given(name):
    """(objective, batch, context), everything there that any method needs."""
    choices = {"teacher": MAP} if "map teacher" in METHODS[name].needs else {}
    return make(name, **choices), batch_of(16), types.Context(step=jnp.int32(0), ema=EMA, teacher=TEACHER)


@pytest.mark.representatives("lsd")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_batch_from_what_is_unambiguous_and_a_refusal_of_the_rest(name, key):
    objective, batch, context = given(name)
    shapes = lambda b: jax.eval_shape(lambda: objective(PARAMS, clone(key), b, context))[0].shape  # noqa: E731
    pairs = {"x1": batch.x1, "x0": batch.x0}
    assert shapes(batch) == shapes(pairs) == shapes({**pairs, "cond": None}) == (16,)
    for alone in (batch.x1, np.asarray(batch.x1), {"x1": batch.x1}):
        if "pairs" in METHODS[name].needs:
            with pytest.raises(ValueError, match=r"^batch\.x0: expected pairs"):
                shapes(alone)
        else:
            assert shapes(alone) == (16,)
    for wrong in (
        (batch.x1, batch.x0),
        tuple(batch),
        [batch.x1],
        {"data": batch.x1},
        {"x1": batch.x1, "labels": batch.x0},
        {},
        {"cond": batch.x0},
        None,
        "x1",
    ):
        with pytest.raises(TypeError, match=r"^batch: expected a Batch"):
            shapes(wrong)


@pytest.mark.slow
def test_an_array_and_a_dictionary_are_their_batch(key):
    batch = batch_of(16)
    conditional = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: mean_velocity(p, s, t, x) + cond)
    run = jax.jit(objectives.lsd(conditional, interpolants.linear(), diagonal=0.5))
    cond = jnp.linspace(0.0, 1.0, 16)
    expected = run(PARAMS, clone(key), batch._replace(cond=cond))[0]
    got = run(PARAMS, clone(key), {"cond": cond, "x0": batch.x0, "x1": batch.x1})[0]
    np.testing.assert_array_equal(got, expected)
    energy = jax.jit(objectives.energy_distance(MAP, interpolants.linear(), size=4))
    np.testing.assert_array_equal(
        energy(PARAMS, clone(key), batch.x1)[0], energy(PARAMS, clone(key), types.Batch(batch.x1))[0]
    )
    with pytest.raises(TypeError, match=r"^batch: expected a Batch"):
        energy(PARAMS, clone(key), (batch.x1, batch.x0))


# --- Choices that nothing reads --------------------------------------------------------------------------------------


def teacher_model(params, t, x, cond=None, *, key=None):
    return params[0] * x + t


# For each choice, a value that is not the default of any method.
OTHER = {
    "diagonal": 0.5,
    "times": times.constant(0.37),
    "pairs": times.independent(times.constant(0.125), times.constant(0.875)),
    "gammas": times.constant(0.21),
    "reduction": reductions.scaled(3.0, reductions.squared),
    "diagonal_reduction": reductions.scaled(5.0, reductions.squared),
    "velocity": lambda row: 2.0 * objectives.velocity_estimates.pair(row),
    "teacher": types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: p[0] * x + t, types.BOTH),
    "base": bases.Normal(mean=0.3, std=2.0),
    "coupling": lambda key, x1, cond: x1 + 1.0,
    "blocks": 2,
    "domain": dataclasses.replace(types.BOTH, name="both directions, of another name"),
    "label_dropout": 0.6,
    "guidance": objectives.Guidance(2.5, 0.3),
}
assert set(OTHER) == set(objectives.Choices.__annotations__)
# The ones read by methods as they stand by default, and with half of the rows on the diagonal.
ALWAYS = {"diagonal", "base", "coupling", "blocks", "label_dropout"}


def off_reads(name):
    """What a method's own term reads of the choices, from its formula."""
    found = {"pairs", "reduction", "domain"}
    if name in ("psd_m", "psd_u", "shortcut", "split_mean_flow", "progressive_distillation", "ctm"):
        found.add("gammas")
    conditional = ("mean_flow", "improved_mean_flow", "pixel_mean_flow", "decoupled_mean_flow", "facm", "sct")
    if name in (*conditional, "alpha_flow", "soflow", "fmm"):
        found |= {"velocity", "teacher", "guidance"}
    if name in ("consistency_training", "ict", "ect"):
        found.add("guidance")
    if set(METHODS[name].needs) & {"teacher", "map teacher"}:
        found.add("teacher")
    return found


def read(name, diagonal):
    found = set(ALWAYS) if METHODS[name].cost else ALWAYS - {"diagonal"}
    if METHODS[name].cost:
        found |= off_reads(name)
    if diagonal > 0:
        found |= {"times", "diagonal_reduction", "velocity", "teacher", "guidance"}
    return found


def beside(name, choice):
    """What goes with it: ``domain`` with the pairs of a method of one end, gammas off the grid with pairs off it."""
    grid = choice == "gammas" and name == "shortcut"
    return {"pairs": OTHER["pairs"]} if choice == "domain" or grid else {}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_choice_that_a_method_does_not_read_is_refused(name, half):
    """By its name and the method's, and accepted where it is read."""
    rows = {"diagonal": 0.5} if half and METHODS[name].cost else {}
    reads = read(name, make(name, **rows).diagonal)
    for choice in sorted(set(OTHER) - ALWAYS):
        if choice in reads:
            made = make(name, **rows, **{choice: OTHER[choice]}, **beside(name, choice))
            assert getattr(made, choice) is OTHER[choice], choice
            continue
        with pytest.raises(ValueError, match=rf"^{choice}: expected no choice of it for {name}, which") as caught:
            make(name, **rows, **{choice: OTHER[choice]})
        assert " at 0x" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_choice_that_is_accepted_is_read(name, key):
    """Each changes the losses of the batch, or the gradient, with half of the rows on the diagonal."""
    half = {"diagonal": 0.5} if METHODS[name].cost else {}
    batch = batch_of(8)
    batch = batch if "pairs" in METHODS[name].needs else types.Batch(batch.x1)
    batch = batch._replace(cond=jnp.linspace(0.5, 1.5, 8))
    context = types.Context(step=jnp.int32(0), ema=EMA, teacher=TEACHER)
    chosen = sorted(read(name, 0.5) - {"domain", "blocks"})
    if "pairs" in METHODS[name].needs:
        chosen = [choice for choice in chosen if choice not in ("base", "coupling")]  # its batch holds x0

    def losses(**choices):
        return make(name, **{**half, **choices})(PARAMS, clone(key), batch, context)[0]

    @jax.jit
    def run():
        plain, changed = losses(), {}
        for choice in chosen:
            other = {choice: 0.25 if choice == "diagonal" else OTHER[choice]}
            without = losses(**more) if (more := beside(name, choice)) else plain
            changed[choice] = losses(**other, **more) - without
        return changed

    for choice, difference in run().items():
        assert np.abs(difference).max() > 1e-6, choice


def test_a_name_that_is_no_choice_is_refused():
    for name in sorted(METHODS):
        with pytest.raises(TypeError, match="diagnal"):
            make(name, diagnal=0.5)


@pytest.mark.parametrize("choice", ["reduction", "diagonal_reduction", "velocity", "coupling", "teacher"])
def test_what_is_no_function_is_refused(choice):
    for wrong in (3.0, "squared"):
        with pytest.raises(TypeError, match=f"^{choice}: expected a (function|Velocity)"):
            make("mean_flow", **{choice: wrong})
    if choice != "teacher":
        with pytest.raises(TypeError, match=f"^{choice}: expected a (function|Velocity)"):
            make("mean_flow", **{choice: MAP})


@pytest.mark.parametrize("choice", ["domain"])
def test_what_is_no_domain_is_refused(choice):
    with pytest.raises(TypeError, match=f"^{choice}: expected a Domain"):
        make("lsd", **{choice: "forward"})
