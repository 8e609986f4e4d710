"""A name means one thing: no two modules define a class or a constant of the same name."""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path for package in ("planner", "executor") for path in (ROOT / package).rglob("*.py")
)


def classes(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            yield node.name


def constants(module: ast.Module) -> Iterator[str]:
    """Names that begin with a capital letter and get a value; type variables are each module's
    own."""
    for node in module.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or is_type_variable(node.value):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and part.id[0].isupper():
                    yield part.id


def is_type_variable(value: ast.expr | None) -> bool:
    named = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
    return named and value.func.id in ("TypeVar", "ParamSpec")


@pytest.mark.parametrize("names_of", [classes, constants])
def test_a_name_is_defined_in_one_module(names_of: Callable[[ast.Module], Iterator[str]]) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for name in names_of(ast.parse(path.read_text(encoding="utf-8"))):
            if not name.startswith("_"):
                found[name].append(str(path.relative_to(ROOT)))
    assert len(found) > 50
    assert {name: where for name, where in found.items() if len(where) > 1} == {}
