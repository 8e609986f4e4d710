"""Hooks of mkdocs (mkdocs.yml): the site's pages from outside docs/, those made from the code, and
where links lead.

Pages are written to be read in the repository: a link is a path that starts at the file it stands
in. On the site a link to another page leads there, and a link to any other file leads to the
repository on the web. A link to a file that does not exist is a warning, and `make docs` is strict.
"""

import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from planner.cli import main
from planner.commands.check import KINDS

ROOT = Path(__file__).parents[1]
ELSEWHERE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "profiles/*/README.md",
    "reports/**/README.md",
    "reports/**/*.png",
)
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
log = get_plugin_logger("links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that do not lie in docs/, and the pages made from the code."""
    for pattern in ELSEWHERE:
        for source in sorted(ROOT.glob(pattern)):
            path = site_path(source.relative_to(ROOT).as_posix())
            files.append(File.generated(config, path, abs_src_path=str(source)))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "schemas.md", content=schemas()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page, outside code, into links of the site."""

    def turned(match: re.Match[str]) -> str:
        return link(match[1], page.file.src_uri, config, files) + (match[2] or "")

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(turned, prose) for prose in parts[::2]]
    return "".join(parts)


def link(target: str, page: str, config: MkDocsConfig, files: Files) -> str:
    """Return the link of a site's page for a path that is relative to the page's source.

    From `explain.md` the target `search.md` stays as it is, `../README.md` becomes `index.md`, and
    `../planner/cli.py` becomes the address of that file in the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_path(page)), target))
    if files.get_file_from_path(site_path(path + "/README.md")):
        path += "/README.md"
    if files.get_file_from_path(site_path(path)):
        return posixpath.relpath(site_path(path), posixpath.dirname(page) or ".")
    if not (ROOT / path).exists():
        log.warning(f"'{page}' links to '{target}', and there is no '{path}' in the repository")
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"


def site_path(source: str) -> str:
    """Where the site has a file of the repository: docs/ is its root, README.md its first page."""
    return "index.md" if source == "README.md" else source.removeprefix("docs/")


def source_path(page: str) -> str:
    """Where the repository has a page of the site."""
    if page == "index.md":
        return "README.md"
    return page if (ROOT / page).exists() else f"docs/{page}"


def commands() -> str:
    """The page with every command and its options, from what `--help` prints."""
    lines = [
        "# Commands",
        "",
        f"{main.help} Every command says this with `--help`; a mistake in the input ends it",
        "with one line and exit code 2.",
    ]
    for name, command in main.commands.items():
        context = click.Context(command, info_name=f"plan {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        lines += ["", f"## plan {name}", "", inspect.cleandoc(command.help or "")]
        lines += [
            "",
            "```",
            f"plan {name} {usage}",
            "```",
            "",
            "| option | meaning |",
            "| --- | --- |",
        ]
        for parameter in command.params:
            if record := parameter.get_help_record(context):
                meaning = record[1].replace("|", "\\|")
                lines.append(f"| `{record[0]}` | {meaning} |")
    return "\n".join(lines) + "\n"


def schemas() -> str:
    """The page with the keys of every kind of file, from the models that read them. A part that
    several kinds have is shown under the first one."""
    lines = [
        "# Schemas of the files",
        "",
        "Keys, types and bounds, made from the models that read the files. `plan schema KIND`",
        "prints the same as JSON Schema. [Files](formats.md) says what the keys mean.",
    ]
    shown = {model.__name__ for model in KINDS.values()}
    for kind in dict.fromkeys(("workload", "cluster", *KINDS)):
        schema = KINDS[kind].json_schema()
        anchor = KINDS[kind].__name__.lower()
        lines += ["", f"## {kind}: `{KINDS[kind].SCHEMA}` {{ #{anchor} }}", "", *keys(schema)]
        for name, part in schema.get("$defs", {}).items():
            if name not in shown:
                lines += ["", f"### {name} {{ #{name.lower()} }}", "", *keys(part)]
                shown.add(name)
    return "\n".join(lines) + "\n"


def keys(schema: dict[str, Any]) -> list[str]:
    """The rows of a table: each key with its type, bounds and default."""
    needed = schema.get("required", ())
    rows = ["| key | type | default |", "| --- | --- | --- |"]
    for key, value in schema.get("properties", {}).items():
        default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
        rows.append(f"| `{key}` | {type_of(value)} | {'required' if key in needed else default} |")
    return rows


def type_of(value: dict[str, Any]) -> str:
    """A JSON Schema in words, with links to the tables of its parts."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in value:
            return " or ".join(type_of(one) for one in value[several])
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    if "prefixItems" in value:
        return "array of " + " and ".join(type_of(one) for one in value["prefixItems"])
    text = str(value.get("type", "any"))
    if text == "array" and "items" in value:
        return f"array of {type_of(value['items'])}"
    if isinstance(value.get("additionalProperties"), dict):
        return f"object of {type_of(value['additionalProperties'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {number(value[word])}" for word, sign in signs.items() if word in value]
    return ", ".join([text, *bounds])


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
