"""The public package: names, docstrings, version, time of import; and the strict settings of the tests."""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jflow

ROOT = Path(__file__).resolve().parents[1]
# Modules for the library's own use: importable, but not part of the public interface.
HELPERS = {"autodiff", "checks", "law_checks", "named", "parts", "trees", "trip_counts"}


def in_new_process(code: str) -> str:
    """The output of the code in a new interpreter with the same jflow."""
    paths = [str(Path(jflow.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", jflow.__all__)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(jflow, name)
    assert name in dir(jflow)
    if inspect.ismodule(value) or inspect.isroutine(value) or inspect.isclass(value):
        doc = value.__doc__ or ""
        # Data classes and named tuples without a docstring get their signature for one.
        assert doc.strip() and not doc.startswith(f"{value.__name__}("), f"{name} has no docstring"


def test_every_public_module_is_listed():
    modules = (module.name for module in pkgutil.iter_modules(jflow.__path__))
    found = {name for name in modules if not name.startswith("_")}
    listed = {name for name in jflow.__all__ if inspect.ismodule(getattr(jflow, name))}
    assert found - HELPERS == listed


def test_names_are_listed_once_and_others_raise():
    assert len(set(jflow.__all__)) == len(jflow.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        jflow.no_such_name  # noqa: B018


def test_a_star_import_brings_every_name():
    code = "from jflow import *; import jflow; print(set(jflow.__all__) - set(dir()))"
    assert in_new_process(code).strip() == "set()"


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert jflow.__version__ == project["version"] == newest[1]


def test_type_checkers_see_the_annotations():
    assert (Path(jflow.__file__).parent / "py.typed").is_file()


def test_import_is_light():
    """At most one second more than ``import jax``. Noise only adds time, so the fastest of up to five processes counts."""
    code = """
import json, sys, time
start = time.perf_counter()
import jax
between = time.perf_counter()
import jflow
end = time.perf_counter()
heavy = {"diffrax", "equinox", "flax", "grain", "matplotlib", "optax", "orbax", "ott", "PIL", "rich", "scipy", "sklearn"}
heavy |= {"tensorboardX", "tyro", "wandb"}
loaded = sorted(heavy & set(sys.modules))
print(json.dumps({"seconds": end - between, "jax": between - start, "heavy": loaded}))
"""
    times = []
    while len(times) < 5:
        measured = json.loads(in_new_process(code))
        assert measured["heavy"] == []
        times.append(measured["seconds"])
        if times[-1] <= 1.0:
            return
    pytest.fail(f"import jflow took {sorted(times)} s on top of import jax, {measured['jax']:.1f} s")


def test_the_session_is_strict(key):
    assert jax.device_count() == 8 and jax.default_backend() == "cpu"
    assert jnp.zeros(()).dtype == jnp.float64
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((3, 2)) + jnp.ones(2)
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.float64)
    jax.random.normal(key)
    with pytest.raises(jax.errors.KeyReuseError):
        jax.random.normal(key)


def test_mean_within_standard_errors(assert_mean, key):
    samples = jax.random.normal(key, (400, 2)) + jnp.array([[1.0, -2.0]])
    assert_mean(samples, [1.0, -2.0])
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(samples, [1.3, -2.0])


def test_constraints_are_made_for_every_extra_but_those_that_no_command_installs():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (line,) = re.findall(r"^CONSTRAINED := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split()) == extras - {"flow-matching", "wandb"}
