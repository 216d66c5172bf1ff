"""What takes a law refuses everything else, by the name of the argument."""

import pytest

from jflow import interpolants, law_checks, objectives, times, types


def of_list(key, n):
    return [times.constant(0.2)(key, n), times.constant(0.7)(key, n)]


STILL = types.FlowMap(lambda params, s, t, x, cond=None, *, key=None: x)
# How each argument is given: by whom, under which name, and whether it is a law of pairs.
TAKERS = {
    "ordered": (times.ordered, "law", False),
    "ordered, other": (lambda law: times.ordered(times.uniform(), law), "other", False),
    "independent": (lambda law: times.independent(law, times.uniform()), "source", False),
    "independent, target": (lambda law: times.independent(times.uniform(), law), "target", False),
    "gapped": (times.gapped, "gap", False),
    "to_data": (times.to_data, "source", False),
    "source": (times.source, "pair", True),
    "mixed": (lambda law: times.mixed([times.triangle(), law], [0.5, 0.5]), r"laws\[1\]", True),
    "check_law": (lambda law: law_checks.check_law("times", law), "times", False),
    "check_pairs": (lambda law: law_checks.check_pairs("pairs", law, types.FORWARD), "pairs", True),
    "objective": (lambda law: objectives.lsd(STILL, interpolants.linear(), times=law), "times", False),
    "objective, pairs": (lambda law: objectives.lsd(STILL, interpolants.linear(), pairs=law), "pairs", True),
}


@pytest.mark.parametrize("taker", sorted(TAKERS))
def test_what_is_not_a_law_is_refused_by_name(taker):
    take, name, pairs = TAKERS[taker]
    of_its_kind, other = (times.triangle, times.uniform)[:: 1 if pairs else -1]
    take(of_its_kind())
    wrong = [of_its_kind, times.cells, 0.5, [times.uniform()], None, lambda key: key, lambda: of_its_kind()]
    if taker in ("ordered, other", "to_data", "objective", "objective, pairs"):
        wrong.remove(None)
    for law in wrong:
        with pytest.raises(TypeError, match=f"^{name}: expected a function \\(key, n\\) -> "):
            take(law)
    for law in (other(), of_list):
        with pytest.raises(ValueError, match=f"^{name}: expected a law that returns .*, it returned (a|one) "):
            take(law)
