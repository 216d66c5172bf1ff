"""The examples in docstrings: they run, and the names that a user calls first have one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import jflow

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# It starts a program of the shell when it is imported.
SCRIPTS = {"jflow.comparison.__main__"}


def with_examples() -> Iterator[doctest.DocTest]:
    """Every docstring of the package that has examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(jflow.__path__, "jflow."):
        if found.name not in SCRIPTS:
            module = importlib.import_module(found.name)
            yield from (test for test in finder.find(module) if test.examples)


DOCTESTS = list(with_examples())
BY_MODULE: dict[str, list[doctest.DocTest]] = {}
for _test in DOCTESTS:
    BY_MODULE.setdefault(str(_test.globs["__name__"]), []).append(_test)
    # Examples import what they use, so that they can be copied.
    _test.globs = {}


# Examples that train, or that run the longest checks, which tests/testing runs as well.
SLOW = {"jflow.testing", "jflow.training.loop", "jflow.training.train"}
assert set(BY_MODULE) >= SLOW


@pytest.mark.representatives(*(set(BY_MODULE) - SLOW))
@pytest.mark.parametrize("module", BY_MODULE)
def test_the_examples_of_a_module_run(module):
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    reports: list[str] = []
    for test in BY_MODULE[module]:
        runner.run(test, out=reports.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(reports)


def test_docstrings_have_examples():
    assert len(DOCTESTS) >= 80
    assert sum(len(test.examples) for test in DOCTESTS) >= 300
