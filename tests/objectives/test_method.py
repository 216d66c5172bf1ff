"""The catalogue's entries: declared once, complete, and short to write; a method of N legs as an example."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

from jflow import identities, interpolants, objectives, testing, times, trees, types
from tests.objectives.conditional_map import MAP, PARAMS, batch_of

clone = jax.random.clone

LEGS = 4


@objectives.method(
    title="self-distillation of N legs",
    source="-",
    identity="semigroup of N legs, + tangent",
    velocity="self legs",
    stop_gradient="all legs",
    when="tests",
    cost={"forward": 1 + LEGS, "backward": 1},
)
def n_legs(flow_map, interpolant, *, legs=LEGS, **choices):
    """R( v_{s,t} - sg (X_{u_N-1,t} o ... o X_{s,u_1}(x) - x)/(t - s) ) + tangent, with legs of equal gaps."""

    def residual(row):
        there, total = row.x, trees.zeros_like(row.x)
        for i in range(legs):
            a, b = (row.s + (row.t - row.s) * j / legs for j in (i, i + 1))
            v = row.frozen.v(a, b, there)
            there, total = types.move(there, a, b, v), trees.axpy(1.0 / legs, v, total)
        own = row.own.v(row.s, row.t, row.x)
        return identities.Residual(own, jax.lax.stop_gradient(total), jax.lax.stop_gradient(trees.sub(v, own)))

    return objectives.Objective("n_legs", flow_map, interpolant, objectives.Term("legs", residual), **choices)


N_LEGS = objectives.METHODS.pop("n_legs")


def test_a_method_of_one_row_takes_less_than_thirty_lines():
    assert len(inspect.getsource(n_legs).splitlines()) < 30


@pytest.mark.slow
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_a_target_of_n_legs_gets_every_property(path):
    testing.check_method(N_LEGS, paths=[interpolants.INTERPOLANTS[path]()])


def test_two_legs_are_midpoint_self_distillation(key):
    make = lambda c, **more: c(MAP, interpolants.linear(), diagonal=0.5, **more)  # noqa: E731
    run = jax.jit(
        lambda k: [
            make(c, **m)(PARAMS, clone(k), batch_of(8))[0] for c, m in ((n_legs, {"legs": 2}), (objectives.psd_m, {}))
        ]
    )
    np.testing.assert_allclose(*run(clone(key)), rtol=1e-10)


def test_rows_of_the_catalogue():
    titles = [m.title for m in objectives.METHODS.values()]
    assert len(set(titles)) == len(titles)
    for name, method in objectives.METHODS.items():
        assert method.constructor.__name__ == name and getattr(objectives, name) is method.constructor
        assert method.constructor.__doc__ and len(method.constructor.__doc__) > 60
        assert method.source and all(
            len(part.strip()) in (9, 10) and part.strip()[4] == "." for part in method.source.split(",")
        )
        for text in (method.title, method.identity, method.velocity, method.when):
            assert text.strip()
        assert set(method.cost) <= set(objectives.PASSES)
        kinds = {p.kind for p in list(inspect.signature(method.constructor).parameters.values())[2:]}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
        path = interpolants.INTERPOLANTS[(method.paths or ("linear",))[0]]()
        assert method.constructor(MAP, path).name == name
        assert method.constructor(MAP, path, **method.published()).name == name


def test_a_name_is_declared_once():
    before = dict(objectives.METHODS)
    row = {"title": "again", "source": "-", "identity": "-", "velocity": "-", "when": "-"}

    def lsd(flow_map, interpolant, **choices):
        """Another."""

    with pytest.raises(ValueError, match="already"):
        objectives.method(**row)(lsd)

    def new(flow_map, interpolant, **choices):
        """New."""

    for wrong in ({**row, "titel": "x"}, {k: v for k, v in row.items() if k != "when"}):
        with pytest.raises(TypeError, match=r"titel|when"):
            objectives.method(**wrong)(new)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objectives.METHODS["lsd"].title = "x"
    assert objectives.METHODS == before


def test_a_method_defined_again_takes_the_place_of_the_first_and_no_other_does():
    def declare(times_of_it):
        def made_up_again(flow_map, interpolant, **choices):
            return objectives.flow_matching(flow_map, interpolant, times=times_of_it, **choices)

        return made_up_again

    row = {"title": "Made up", "source": "-", "identity": "-", "velocity": "-", "when": "Never."}
    try:
        for law in (times.constant(0.2), times.constant(0.3)):
            objectives.method(**row)(declare(law))
        assert objectives.METHODS["made_up_again"].constructor(MAP, interpolants.linear()).times is law

        def made_up_again(flow_map, interpolant, **choices):
            return objectives.flow_matching(flow_map, interpolant, **choices)

        with pytest.raises(ValueError, match=r"^method: the catalogue has a method 'made_up_again' already"):
            objectives.method(**row)(made_up_again)
    finally:
        objectives.METHODS.pop("made_up_again", None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cost": {"jvps": 1}}, "^cost: expected .*'jvp'.*got 'jvps'"),
        ({"stationary": "exactly"}, "^stationary: expected .*'exact'.*got 'exactly'"),
        ({"stationary": "order", "order": 1}, '^at: expected h -> choices with stationary="order", got None'),
        ({"needs": ("a teacher",)}, "^needs: expected .*'teacher'.*got 'a teacher'"),
    ],
)
def test_a_declaration_of_what_does_not_exist_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(objectives.METHODS["lsd"], **wrong)


def test_a_method_without_a_cost_is_named_before_its_stationarity_is_checked():
    with pytest.raises(AssertionError, match=r"^cost: expected one exactly if there is a term, got \{\}"):
        testing.check_method(dataclasses.replace(objectives.METHODS["lsd"], cost={}))


def test_a_residual_that_reads_more_than_it_declares_is_refused(key):
    residual = lambda row: identities.eulerian(row.own.v, row.s, row.t, row.x, row.conditional)  # noqa: E731
    objective = objectives.Objective(
        "mine", MAP, interpolants.linear(), objectives.Term("mine", residual), diagonal=0.0
    )
    with pytest.raises(ValueError, match=r'^term\.reads: expected "velocity" in it'):
        jax.eval_shape(objective, PARAMS, key, batch_of())
