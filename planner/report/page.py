"""A plan, and a run of it, as one page for the person who decides: nothing on it is fetched."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure
from rich.markup import render as without_markup
from rich.table import Table
from rich.text import Text

from planner import __version__
from planner.report.picture import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    YELLOW,
    inline_svg,
    rendered,
)
from planner.report.tables import layout_text, seconds
from planner.spec.plan import Plan
from planner.spec.wording import counted

POOL_COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW)
DARK = (BLUE, GREEN, VERMILION)  # colours on which letters are white
UNUSED_COLOR = "#FFFFFF"
TEMPLATE = "page.html.j2"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table of the page: its columns (title, and whether it has numbers) and rows of text."""

    columns: tuple[dict[str, Any], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    sentences: tuple[str, ...] = ()
    tables: tuple[Shown, ...] = ()
    texts: tuple[str, ...] = ()
    picture: str = ""


def as_shown(table: Table) -> Shown:
    """A table of the console as one of the page."""
    columns = [
        {"title": _plain(column.header), "number": column.justify == "right"}
        for column in table.columns
    ]
    cells = [[_plain(cell) for cell in column.cells] for column in table.columns]
    return Shown(columns=tuple(columns), rows=tuple(zip(*cells, strict=True)))


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else without_markup(str(cell)).plain


def svg_of(figure: Figure, name: str) -> str:
    return inline_svg(lambda: rendered(figure, "svg"), name)


def page(
    plan: Plan,
    *,
    answer: str,
    timeline: str,
    measured: bool,
    sections: Sequence[Section],
    command: str,
) -> str:
    """The page as HTML."""
    home = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=home, autoescape=select_autoescape(["j2"]), undefined=StrictUndefined
    )
    colors = {pool: POOL_COLORS[n % len(POOL_COLORS)] for n, pool in enumerate(plan.pools)}
    return environment.get_template(TEMPLATE).render(
        title=f"{plan.workload.name} on {counted(len(plan.cluster.gpus), 'GPU')}",
        answer=answer,
        nodes=list(_nodes(plan, colors)),
        pools=[{"color": colors[pool], "text": _pool_text(plan, pool)} for pool in plan.pools],
        layouts=_layouts(plan),
        timeline=timeline,
        measured=measured,
        sections=sections,
        version=__version__,
        command=command,
    )


def _nodes(plan: Plan, colors: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    owner = {gpu: pool for pool, each in plan.pools.items() for gpu in each.gpus}
    for number, node in enumerate(plan.cluster.nodes):
        gpus = []
        for index in range(node.gpus):
            pool = owner.get((number, index))
            color = colors[pool] if pool else UNUSED_COLOR
            ink = "#FFFFFF" if color in DARK else "#222222"
            title = pool or "not used"
            gpus.append({"index": index, "color": color, "ink": ink, "title": title})
        yield {"name": f"node {number}: {node.gpus} × {node.device}", "gpus": gpus}


def _pool_text(plan: Plan, pool: str) -> str:
    roles = [role for role, layout in plan.roles.items() if pool in layout.pools]
    busy = plan.predicted.busy.get(pool) if plan.predicted else None
    told = f", busy {busy:.0%} of the time" if busy is not None else ""
    return f"{counted(len(plan.pools[pool].gpus), 'GPU')}: {', '.join(roles)}{told}"


def _layouts(plan: Plan) -> Shown:
    columns = ({"title": "role", "number": False}, {"title": "layout", "number": False})
    rows = tuple((role, layout_text(layout)) for role, layout in plan.roles.items())
    return Shown(columns=columns, rows=rows)


def answer_of(plan: Plan, baseline: str, baseline_seconds: float | None) -> str:
    """The answer in a sentence or two: what a step takes and costs, and against what."""
    assert plan.predicted
    step = plan.predicted.step_seconds
    cluster = plan.cluster
    per_hour = sum(cluster.device_of(gpu).price_per_hour for gpu in cluster.gpus)
    money = f" and {per_hour * step / 3600:.3g} dollars" if per_hour else ""
    kinds = ", ".join(cluster.devices)
    text = (
        f"A step takes {seconds(step)} s{money} on {counted(len(cluster.gpus), 'GPU')} ({kinds}), "
        f"{plan.predicted.tokens_per_second:,.0f} tokens a second"
    )
    if baseline_seconds:
        text += f": {baseline_seconds / step:.2f} times as fast as {baseline}"
    stale = counted(plan.staleness, "update")
    text += f". Sequences are {stale} old." if plan.staleness else ". All sequences are fresh."
    proof = {"optimal": " No plan of the searched space is faster.", "none": ""}
    return text + proof.get(plan.predicted.proof.status, " It is not proven to be the fastest.")
