"""The choices of an objective: which are defaults, what replacing one does to the others, which nothing reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, couplings, identities, interpolants, objectives, reductions, times, types
from jflow.objectives import velocity_estimates

LINEAR = interpolants.linear()
WIDE, WIDER = bases.Normal(std=2.0), bases.Normal(std=3.0)
PARAMS = jnp.float32(0.5)


def network(params, s, t, x, cond=None, *, key=None):
    return jnp.tanh(params * x + s - t)


def velocity(params, t, x, cond=None, *, key=None):
    return params * x


FORWARD, BOTH, TO_DATA, FROM_NOISE, DYADIC = (
    types.FlowMap(network, domain)
    for domain in (types.FORWARD, types.BOTH, types.TO_DATA, types.FROM_NOISE, types.dyadic(3))
)


# --- Defaults and replacing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "changes", "found"),
    [
        ({}, {"coupling": couplings.Independent(WIDER)}, {"base": WIDER}),
        ({"base": WIDE}, {"base": WIDER}, {"coupling": couplings.Independent(WIDER)}),
        ({"coupling": couplings.Independent(WIDE)}, {"coupling": couplings.Independent(WIDER)}, {"base": WIDER}),
        ({}, {"flow_map": BOTH}, {"domain": types.BOTH}),
        (
            {"coupling": couplings.independent, "base": WIDE},
            {"base": WIDER, "coupling": couplings.Independent(WIDER)},
            {},
        ),
        ({"domain": types.FORWARD}, {"flow_map": BOTH}, {"domain": types.FORWARD}),
        ({}, {"diagonal": 0.0}, {"times": None, "diagonal_reduction": None}),
        ({}, {"diagonal": 1.0}, {"pairs": None, "reduction": None}),
        ({"domain": types.FORWARD}, {"pairs": times.to_data()}, {"domain": types.FORWARD}),
    ],
)
def test_what_was_not_chosen_follows_what_is_replaced(choices, changes, found):
    replaced = dataclasses.replace(objectives.lsd(FORWARD, LINEAR, **choices), **changes)
    chosen = {name: value for name, value in choices.items() if name not in changes}
    for name, value in {**changes, **chosen, **found}.items():
        assert getattr(replaced, name) == value, name


def test_replacing_the_teacher_changes_the_velocity_and_back():
    plain = objectives.mean_flow(FORWARD, LINEAR)
    taught = dataclasses.replace(plain, teacher=velocity)
    assert plain.velocity is velocity_estimates.pair and taught.velocity is velocity_estimates.teacher
    assert dataclasses.replace(taught, teacher=None).velocity is velocity_estimates.pair


def test_a_choice_equal_to_the_default_is_a_choice():
    """It stays where the default would follow, and is refused where nothing reads it."""
    chosen = objectives.lsd(FORWARD, LINEAR, coupling=couplings.Independent(WIDE), base=WIDE)
    with pytest.raises(ValueError, match=r"^base: expected that of the coupling"):
        dataclasses.replace(chosen, base=WIDER)
    with pytest.raises(ValueError, match=r"^velocity: expected no choice of it for lsd"):
        objectives.lsd(FORWARD, LINEAR, diagonal=0.0, velocity=velocity_estimates.pair)


def test_bases_are_the_same_by_their_values():
    base = bases.Normal(mean=jnp.zeros(2))
    objective = objectives.lsd(FORWARD, LINEAR, base=base, coupling=couplings.Independent(bases.Normal(np.zeros(2))))
    assert dataclasses.replace(objective, diagonal=0.5).base == base
    assert hash(objective) == hash(dataclasses.replace(objective))


# --- What nothing reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "method", "choices"),
    [
        ("teacher", "mean_flow", {"velocity": velocity_estimates.pair}),
        ("teacher", "flow_matching", {"velocity": velocity_estimates.batch}),
        ("reduction", "lsd", {"diagonal": 1.0}),
        ("pairs", "lsd", {"diagonal": 1.0}),
        ("gammas", "psd_m", {"diagonal": 1.0}),
        ("warmup", "mean_flow", {"diagonal": 1.0}),
        ("stop", "lsd", {"diagonal": 1.0}),
        ("times", "lsd", {"diagonal": 0.0}),
        ("diagonal_reduction", "lsd", {"diagonal": 0.0}),
    ],
)
def test_what_is_not_read_beside_other_choices_is_refused(choice, method, choices):
    values = {
        "teacher": velocity,
        "reduction": reductions.squared,
        "diagonal_reduction": reductions.squared,
        "pairs": times.triangle(),
        "gammas": times.constant(0.5),
        "times": times.uniform(),
        "warmup": lambda step: 1.0,
        "stop": "none",
    }
    constructor = getattr(objectives, method)
    constructor(FORWARD, LINEAR, **choices)
    with pytest.raises(ValueError, match=rf"^{choice}: expected no choice of it for {method}"):
        constructor(FORWARD, LINEAR, **choices, **{choice: values[choice]})


def test_what_was_not_chosen_is_no_choice():
    """None, and the default of the method's own keyword."""
    for method, choices in (("lsd", {"warmup": None}), ("mean_flow", {"warmup": None}), ("esd", {"leg": "own"})):
        assert getattr(objectives, method)(FORWARD, LINEAR, diagonal=1.0, **choices).diagonal == 1.0


def test_an_independent_coupling_by_name_follows_the_base():
    objective = objectives.lsd(FORWARD, LINEAR, coupling=couplings.independent, base=WIDE)
    assert dataclasses.replace(objective, base=WIDER).coupling == couplings.Independent(WIDER)


# --- Domains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "flow_map", "choices", "message"),
    [
        ("facm", FROM_NOISE, {}, "^pairs: expected pairs"),
        ("lsd", TO_DATA, {"domain": types.FORWARD}, "^pairs: expected pairs"),
        ("lsd", TO_DATA, {"pairs": times.to_data()}, "^domain: lsd asks"),
        ("psd_m", TO_DATA, {"pairs": times.to_data()}, "^domain: psd_m asks"),
        ("free_flow", TO_DATA, {"teacher": velocity}, "^(pairs|domain): "),
        ("lsd", DYADIC, {"pairs": times.dyadic(3)}, "^domain: lsd asks"),
        ("shortcut", DYADIC, {"levels": 4}, "^pairs: expected pairs"),
        ("shortcut", FORWARD, {"gammas": times.uniform()}, "^domain: shortcut asks"),
        ("shortcut", FORWARD, {"levels": 31}, "^levels: expected a whole number .* at most 23"),
    ],
)
def test_a_method_asks_no_times_that_the_map_does_not_have(method, flow_map, choices, message):
    with pytest.raises(ValueError, match=message):
        getattr(objectives, method)(flow_map, LINEAR, **choices)


@pytest.mark.parametrize(
    ("method", "flow_map", "choices"),
    [
        ("facm", TO_DATA, {}),
        ("ict", TO_DATA, {}),
        ("mean_flow", TO_DATA, {"pairs": times.to_data()}),
        ("shortcut", DYADIC, {"levels": 3}),
        ("free_flow", FROM_NOISE, {"teacher": velocity}),
        ("fmm", BOTH, {}),
    ],
)
def test_a_method_is_trained_on_the_domain_that_it_needs(method, flow_map, choices):
    assert getattr(objectives, method)(flow_map, LINEAR, **choices).flow_map is flow_map


# --- Terms, and what a call is given ---------------------------------------------------------------------------------


def of(residual):
    return objectives.Objective("made up", FORWARD, LINEAR, objectives.Term("made_up", residual))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: objectives.Term(lambda row: None, "name"), TypeError, "^name: expected a string"),
        (lambda: objectives.Term("a", "b"), TypeError, "^residual: expected a function"),
        (lambda: objectives.Term("a", len, "velocity"), TypeError, "^reads: expected a tuple"),
        (lambda: objectives.Term("a", len, ("gama",)), ValueError, "^reads: expected one of"),
        (lambda: objectives.Objective("a", FORWARD, LINEAR, len), TypeError, "^term: expected an objectives.Term"),
        (lambda: objectives.lsd(FORWARD, LINEAR, coupling=couplings.Independent), TypeError, "^coupling: .* the class"),
        (lambda: objectives.lsd(FORWARD, LINEAR, base=bases.Normal), TypeError, "^base: expected"),
        (lambda: objectives.flow_matching(network, LINEAR), TypeError, "^flow_map: expected a function"),
        (
            lambda: objectives.lsd(FORWARD, LINEAR, reduction=reductions.adaptive),
            TypeError,
            "^reduction: expected a func",
        ),
        (lambda: objectives.lsd(FORWARD, LINEAR, times=times.uniform), TypeError, "^times: expected a function"),
        (lambda: objectives.lsd(FORWARD, LINEAR, coupling=lambda key, x1: x1), TypeError, "^coupling: expected a func"),
        (lambda: objectives.sequence([objectives.lsd(FORWARD, LINEAR)]), TypeError, "^stages: expected pairs"),
        (lambda: objectives.sequence(objectives.lsd(FORWARD, LINEAR)), TypeError, "^stages: expected a sequence"),
        (lambda: objectives.sequence([(0, FORWARD)]), TypeError, "^stages: expected a function"),
        (lambda: objectives.weighted_sum(FORWARD), TypeError, "^objective: expected a function"),
        (lambda: objectives.weighted_sum(len, more=(3, 1.0)), TypeError, "^(objective|more): expected a function"),
        (lambda: objectives.init(3, jax.random.key(0), PARAMS), TypeError, "^objective: expected a function"),
    ],
)
def test_what_an_objective_is_made_of_is_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, k, x: o(PARAMS, k, x, {}), TypeError, "^context: expected a Context"),
        (lambda o, k, x: o(PARAMS, k, x, PARAMS), TypeError, "^context: expected a Context"),
        (lambda o, k, x: o(k, PARAMS, x), TypeError, "^key: expected a PRNG key"),
        (lambda o, k, x: o(PARAMS, 0, x), TypeError, "^key: expected a PRNG key"),
        (lambda o, k, x: o(PARAMS, k, types.Batch(x, cond=np.full(8, 1e40), x0=x)), ValueError, r"^batch\.cond.*fit"),
        (lambda o, k, x: of(lambda row: row.x)(PARAMS, k, x), TypeError, r"^term\.residual: expected it to return"),
        (
            lambda o, k, x: dataclasses.replace(o, reduction=lambda p, s, t, d: d**2)(PARAMS, k, x),
            ValueError,
            r"^what reduction returns: expected an array of shape \(\), got \(2,\)",
        ),
    ],
)
def test_what_a_call_is_given_is_checked(call, error, message):
    x = np.ones((8, 2), np.float32)
    with jax.enable_x64(False), pytest.raises(error, match=message):
        jax.eval_shape(lambda key: call(objectives.lsd(FORWARD, LINEAR), key, x), jax.random.key(0))


@pytest.mark.parametrize("wrong", [{"x1": np.full((8, 2), 1e40)}, {"cond": np.full(8, 2**32 + 1)}])
def test_host_arrays_that_do_not_fit_are_refused_at_a_call(wrong):
    batch = types.Batch(**{"x1": np.ones((8, 2)), **wrong})
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=rf"^batch\.{next(iter(wrong))}: expected values that fit"),
    ):
        objectives.lsd(FORWARD, LINEAR)(PARAMS, jax.random.key(0), batch)


def test_a_residual_without_a_derivative_reports_none(key):
    def residual(row):
        return identities.Residual(row.own.v(row.s, row.t, row.x), row.pair(row.s, row.t))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))
    loss, aux = jax.jit(of(residual))(jnp.float64(0.5), key, x)
    assert loss.shape == (8,) and "made_up/raw" in aux.metrics and "made_up/tangent_norm" not in aux.metrics
