"""Imports go one way: a module of jflow may import from the rooms above its own in ``ROOMS``, and from no other.

The imports are read from the source, so that those inside functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# Data flows down this list and imports point up it. A new module gets its place here, or the tests fail.
ROOMS = (
    "checks",
    "trees",
    "named",
    "reports",
    "autodiff",
    "trip_counts",
    "flops",
    "domains",
    "types",
    "conditions",
    "parts",
    "sharding",
    "bases",
    "interpolants",
    "couplings",
    "law_checks",
    "times",
    "nets",
    "parameterizations",
    "conventions",
    "solvers",
    "oracles",
    "identities",
    "reductions",
    "objectives",
    "samplers",
    "guidance",
    "likelihood",
    "steering",
    "training",
    "datasets",
    "metrics",
    "diagnostics",
    "plots",
    "comparison",
    "testing",
    "sample",
)
# Slow to import or not installed everywhere: only inside the functions that need them.
HEAVY = set("diffrax equinox flax grain lineax optimistix orbax ott tensorboardX tyro wandb".split())
HEAVY |= set("PIL matplotlib scipy skimage sklearn".split())
# Names of jax that may vanish in any release; every other name with a leading underscore is private as well.
PRIVATE_JAX = ("core", "interpreters", "experimental.pjit")
IMPORTERS = ("importlib.import_module", "import_module", "__import__")
COMPUTED = "?"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
OUTSIDE = {"benchmarks", "experiments", "tests"}


class Use(NamedTuple):
    """A dotted name that a module imports or reaches by attribute; ``loads``: by being imported itself."""

    name: str
    line: int
    loads: bool
    imported: bool


def uses(source: str, module: str, is_package: bool) -> Iterator[Use]:
    """What a module uses: its imports, at the top and in functions, and attributes of what it imported."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}
    for node, loads in _walk(tree, loads=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
                yield Use(alias.name, node.lineno, loads, True)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{base}.{alias.name}"
                yield Use(f"{base}.{alias.name}", node.lineno, loads, True)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else COMPUTED
            yield Use(name, node.lineno, loads, True)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = _chain(node).partition(".")
            if root in bound:
                yield Use(f"{bound[root]}.{rest}", node.lineno, False, False)


def _walk(node: ast.AST, loads: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        guard = ast.unparse(node.test) if isinstance(node, ast.If) and child in node.body else ""
        here = loads and guard not in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        yield child, here
        yield from _walk(child, here and not isinstance(child, FUNCTIONS))


def _chain(node: ast.expr) -> str:
    """``a.b.c`` for an attribute of a name, the empty string for one of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _chain(node.value) if isinstance(node, ast.Attribute) else ""
    return inner and f"{inner}.{node.attr}"


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def private(use: Use) -> bool:
    """Whether the name is private to the package that it belongs to."""
    package, _, rest = use.name.partition(".")
    # The one documented name of the standard library that begins with an underscore.
    if package in ("jflow", "__future__", *OUTSIDE) or use.name == "os._exit":
        return False
    if any(part.startswith("_") and not part.endswith("__") for part in use.name.split(".")):
        return True
    return package == "jax" and any(f"{rest}.".startswith(f"{name}.") for name in PRIVATE_JAX)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of the jflow module ``module`` that break the rules, as ``line: reason``."""
    room = "" if module == "jflow" else module.split(".")[1]
    if room and room not in ROOMS:
        return [f"1: {room} has no place in ROOMS"]
    found = []
    for use in uses(source, module, is_package):
        reason = "is private" if private(use) else _against_the_flow(use, room) if use.imported else None
        if reason:
            found.append(f"{use.line}: {use.name} {reason}")
    return found


def _against_the_flow(use: Use, room: str) -> str | None:
    package, _, rest = use.name.partition(".")
    target = rest.partition(".")[0]
    if package == COMPUTED:
        return "is an import by a computed name" if room else None
    if package in OUTSIDE:
        return "lies outside the library"
    if package == "flax" and room != "nets":
        return "is for nets alone"
    if package in HEAVY and use.loads and (package, room) != ("flax", "nets"):
        return "belongs inside the function that needs it"
    if package != "jflow" or not room or target == room:
        return None
    if target not in ROOMS:
        return f"is no room: {room} imports from the module that defines a name"
    return f"is below {room}" if ROOMS.index(target) > ROOMS.index(room) else None


def modules() -> list[tuple[str, Path]]:
    """Every module of the library, as (dotted name, path)."""
    paths = sorted((SRC / "jflow").rglob("*.py"))
    dotted = (".".join(path.relative_to(SRC).with_suffix("").parts) for path in paths)
    return [(name.removesuffix(".__init__"), path) for name, path in zip(dotted, paths, strict=True)]


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_one_way(module, path):
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("folder", ["experiments", "benchmarks", "tests"])
def test_no_private_names_outside_the_library(folder):
    found = [
        f"{path.relative_to(ROOT)}:{use.line}: {use.name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for use in uses(path.read_text(), folder, is_package=True)
        if private(use)
    ]
    assert found == []


# Parts of one experiment: its tables, or its page.
PARTS_OF_ONE = {"bias": {"bias_tables"}, "catalogue_page": {"catalogue"}}


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_experiments_and_benchmarks_import_only_what_they_share_and_the_library(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        allowed = {f"experiments.{name}" for name in PARTS_OF_ONE.get(path.stem, ()) if folder == "experiments"}
        for use in uses(path.read_text(), dotted, is_package=path.name == "__init__.py"):
            package = use.name.partition(".")[0]
            shared = use.name == "experiments.shared" or use.name.startswith("experiments.shared.")
            if use.imported and package in OUTSIDE and not shared and not any(use.name == name for name in allowed):
                found.append(f"{path.relative_to(ROOT)}:{use.line}: {use.name}")
    assert found == []


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from jflow.objectives import Objective", "jflow.samplers.grids", None),
        ("from jflow.samplers import sample", "jflow.objectives.registry", "is below objectives"),
        ("from jflow import training", "jflow.types", "is below types"),
        ("import jflow.training.loop", "jflow.types", "is below types"),
        ("from . import training", "jflow.types", "is below types"),
        ("from ..training import loop", "jflow.nets.mlp", "is below nets"),
        ("def f():\n    from jflow.solvers import solve", "jflow.identities", None),
        ("def f():\n    from jflow.oracles import tilt", "jflow.solvers", "is below solvers"),
        ("if True:\n    def f():\n        import jflow.metrics", "jflow.training.loop", "is below training"),
        ("import importlib\nimportlib.import_module('jflow.metrics')", "jflow.types", "is below types"),
        ("import importlib\nimportlib.import_module(name)", "jflow.types", "computed name"),
        ("from jflow import FlowMap", "jflow.solvers", "is no room"),
        ("import jflow", "jflow.solvers", "is no room"),
        ("from jflow import checks", "jflow.cellar", "has no place"),
        ("from jflow.cellar import wine", "jflow.solvers", "is no room"),
        ("import experiments.digits", "jflow.training.loop", "outside the library"),
        ("from jax." + "_src import core", "jflow.types", "is private"),
        ("from jax import core", "jflow.types", "is private"),
        ("import jax." + "core as jc", "jflow.types", "is private"),
        ("def f():\n    import jax.interpreters.ad", "jflow.types", "is private"),
        ("from jax.experimental import pjit", "jflow.types", "is private"),
        ("from jax.experimental.pjit import pjit", "jflow", "is private"),
        ("import jax\nisinstance(x, jax." + "core.Tracer)", "jflow.types", "is private"),
        ("from optax._src import base", "jflow.training.step", "is private"),
        ("import jax.numpy as jnp\njnp._hidden(1)", "jflow.types", "is private"),
        ("from flax import linen", "jflow.nets.mlp", None),
        ("from flax import linen", "jflow.types", "is for nets alone"),
        ("def f():\n    import flax.linen as nn", "jflow.training.state", "is for nets alone"),
        ("import diffrax", "jflow.solvers", "belongs inside the function"),
        ("try:\n    import scipy.linalg\nexcept ImportError: 0", "jflow.metrics", "inside the function"),
        ("class A:\n    import matplotlib.pyplot as plt", "jflow.diagnostics", "belongs inside the function"),
        ("import orbax.checkpoint as ocp", "jflow", "belongs inside the function"),
        ("def f():\n    import diffrax", "jflow.solvers", None),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffrax", "jflow.solvers", None),
        ("from jflow import diagnostics, training", "jflow", None),
        ("import jax\nfrom jax import tree_util\njax.errors.KeyReuseError", "jflow.types", None),
        ("import jax\njax.__version__", "jflow.types", None),
    ],
)
def test_the_reader_of_imports(source, module, expected):
    found = violations(source, module)
    assert bool(found) == (expected is not None), found
    assert expected is None or expected in found[0]
