"""The pages that people read: links lead somewhere, commands exist, and the site can be built."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.core import ParameterSource
from processes import PATIENCE

from planner.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "reports/**/README.md", "profiles/*/README.md")
    for page in ROOT.glob(pattern)
)
BY_HAND = [  # the pages of `plan study` and `plan judge` have a line per paragraph
    page
    for page in PAGES
    if not (page.parent / "results.json").exists() and "profiles" not in page.parts
]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
EXTERNAL = ("https://", "http://", "mailto:")

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def command_of(words: list[str]) -> click.Command:
    assert words[0] in main.commands, f"there is no command {words[0]!r}"
    return main.commands[words[0]]


@page
def test_relative_links_lead_to_files(page: Path) -> None:
    prose = FENCED.sub("", page.read_text())
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose)]
    inside = [target for target in targets if target and not target.startswith(EXTERNAL)]
    assert not [target for target in inside if not (page.parent / target).exists()]


def shown(page: Path) -> list[list[str]]:
    """The words of the commands in a page's blocks, without `plan`."""
    blocks = [block.replace("\\\n", " ") for block in FENCED.findall(page.read_text())]
    lines = [line for block in blocks for line in re.findall(r"(?m)^ *plan ([a-z].*)$", block)]
    return [shlex.split(line, comments=True) for line in lines]


def is_given(context: click.Context, parameter: click.Parameter) -> bool:
    """Whether a command line has a parameter, which is not left at its default then."""
    source = context.get_parameter_source(parameter.name or "")
    return source is ParameterSource.COMMANDLINE


@page
def test_shown_commands_take_the_options_that_they_name_and_no_others(page: Path) -> None:
    """A value that is missing would take the option behind it; click refuses a word too many."""
    for words in shown(page):
        command = command_of(words)
        context = command.make_context(words[0], words[1:])
        options = [option for option in command.params if isinstance(option, click.Option)]
        named = [option for option in options if {*option.opts} & {*words}]
        assert [option for option in options if is_given(context, option)] == named


def test_the_tutorial_shows_what_the_search_prints() -> None:
    shown = (ROOT / "docs" / "tutorial.md").read_text().split("```")[5].splitlines()
    printed = (ROOT / "tests" / "golden" / "search-7b" / "stdout.txt").read_text().splitlines()
    lines = [line for line in shown if line]
    assert len(lines) == 6
    assert set(lines) <= {line.rstrip() for line in printed}


@page
def test_commands_in_sentences_have_the_options_that_they_name(page: Path) -> None:
    prose = FENCED.sub("", page.read_text())
    for text in re.findall(r"`plan ([a-z][^`]*)`", prose):
        words = text.split()
        known = {name for option in command_of(words).params for name in option.opts}
        named = {word.split("=")[0] for word in words if word.startswith("--")}
        assert named - {"--help"} <= known


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_is_wrapped_at_100_columns(page: Path) -> None:
    prose = re.sub(r"\]\([^)]*\)", "]", FENCED.sub("", page.read_text()))
    lines = [line for line in prose.splitlines() if not line.lstrip().startswith(("|", "!["))]
    assert not [line for line in lines if len(line) > 100]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    html = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert '<h2 id="plan-search">' in html  # made from the commands
    assert '<h3 id="algorithm">' in html  # made from the models of files
    fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", html)
    assert fetched and not [path for path in fetched if path.startswith(("http", "//"))]
