"""docs/glossary.md: its terms are in use, and what it names exists where it says."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
ROW = re.compile(r"^\| (?!term|---)([^|]+) \| ([^|]+) \| (.+) \|$", re.MULTILINE)
ROWS = [tuple(row) for row in ROW.findall(GLOSSARY.read_text())]
CODE = [*ROOT.glob("planner/**/*.py"), *ROOT.glob("executor/**/*.py")]

# Words that were given up, and the search no longer uses: the glossary has others for them.
GIVEN_UP = {"arrangement", "site", "seat", "pick"}


def defined(path):
    """Names that a module defines at its top level."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@pytest.mark.parametrize(("term", "meaning", "where"), ROWS, ids=[row[0] for row in ROWS])
def test_term(term, meaning, where):
    names, path = re.fullmatch(r"((?:`\w+`(?:, )?)+) \(`([\w/]+\.py)`\)", where).groups()
    assert set(re.findall(r"\w+", names)) <= set(defined(path))
    assert meaning[0].isupper() and meaning.endswith(".")
    spelled = r"\b" + re.sub("[ -]", r"[\\s_-]*", term)  # micro-batch, micro_batch, MicroBatch
    said = re.compile(spelled, re.IGNORECASE)
    assert any(said.search(file.read_text()) for file in CODE), f"no code says {term}"


def test_no_term_is_defined_twice():
    assert len(ROWS) > 35
    assert [term for term, count in Counter(row[0] for row in ROWS).items() if count > 1] == []


def words_of(name):
    """The words of an identifier, without a plural's s: ["placement", "family"]."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return {word.lower().removesuffix("s") for word in words}


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("planner/search/**/*.py")), ids=lambda file: file.stem
)
def test_words_that_were_given_up(file):
    names = {file.stem}
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
    assert not {name for name in names if words_of(name) & GIVEN_UP}
