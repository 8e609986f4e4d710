"""docs/design.md names every module of the packages, in the room where it is, and no other; and no
page names a module that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| `((?:planner|executor)[\w/]*)` \| .* \| (.*) \|$", re.MULTILINE)


def test_layout():
    page = (ROOT / "docs" / "design.md").read_text()
    said = {
        f"{room}/{module}.py"
        for room, modules in ROW.findall(page)
        for module in re.findall(r"`(\w+)`", modules)
    }
    files = [*ROOT.glob("planner/**/*.py"), *ROOT.glob("executor/**/*.py")]
    there = {str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"}
    assert said == there, f"docs/design.md lacks {there - said}, and names {said - there}"


@pytest.mark.parametrize(
    "page",
    [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))],
    ids=lambda page: page.stem,
)
def test_modules_that_a_page_names(page):
    paths = re.findall(r"`((?:planner|executor|tests|docs)/[\w/]+\.py)\b", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []
