"""Tests mirror the source: src/jflow/a/b.py is tested in tests/a/test_b.py."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "src" / "jflow"


def defines(path: Path) -> bool:
    """Whether a module has functions or classes of its own, beside what it re-exports."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body)


def test_every_module_has_its_file_of_tests():
    modules = {path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if not path.stem.startswith("__")}
    without = {
        module.as_posix()
        for module in modules
        if defines(SOURCE / module) and not (TESTS / module.parent / f"test_{module.name}").exists()
    }
    assert not without
