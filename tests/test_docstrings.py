"""Docstrings are sentences: none starts with a preposition and leaves out its subject."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("planner/**/*.py"), *ROOT.glob("executor/**/*.py")])
FRAGMENTS = (
    *("About", "After", "Against", "Among", "As", "At", "Before", "Below", "Beside", "Between"),
    *("But", "By", "During", "For", "From", "In", "Inside", "Into", "Like", "Of", "On", "Out"),
    *("Over", "Since", "Than", "Through", "Till", "To", "Under", "Until", "Up", "Upon", "With"),
    *("Within", "Without"),
)


def docstrings(file):
    """Name and text of every docstring of a file."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_begin_with_a_subject(file):
    odd = [
        f"{name}: {text.splitlines()[0]}"
        for name, text in docstrings(file)
        if text.split(maxsplit=1)[0] in FRAGMENTS
    ]
    assert not odd, "\n".join(odd)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_that_docstrings_name_are_there(file):
    modules = {path.name for path in [*FILES, *ROOT.glob("tests/*.py")]}
    odd = [
        f"{name}: {found}"
        for name, text in docstrings(file)
        for found in re.findall(r"`(?:[a-z_]+/)*([a-z_]+\.py)`", text)
        if found not in modules
    ]
    assert not odd, "\n".join(odd)
