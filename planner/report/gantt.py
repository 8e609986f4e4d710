"""Timelines as a picture: a lane per pool, a colour per call, idle time left empty."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.textpath import TextPath

from planner.report.compare import occupancy
from planner.report.picture import (
    AXIS_INK,
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    YELLOW,
    format_of,
    hide_frame,
    rendered,
)
from planner.report.stream_lane import Box, draw_stream
from planner.report.tables import HOST, seconds
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.timeline import Span, Timeline, occupied_seconds, step_seconds
from planner.spec.wording import plural

Color = tuple[float, float, float]

# What takes little time is dark or grey.
CALL_COLORS = {
    "generate": BLUE,
    "score": YELLOW,
    "select": "#8C6D1F",
    "ref_logprobs": PINK,
    "old_logprobs": SKY,
    "values": GREEN,
    "advantages": "#7A2A52",
    "update_critic": ORANGE,
    "update_actor": VERMILION,
    "sync_weights": "#1A1A1A",
    "evaluate": GREY,
}
STREAM_COLORS = (BLUE, "#4D9CC9")  # of batches in turn
EMPTY = "#F1F1F1"

WIDTH = 13.0  # inches
LANE = 0.85  # inches of the largest pool's lane
SMALLEST_LANE, HOST_LANE = 0.55, 0.32  # shares of it: a smaller pool has a lower lane
STREAM_LANE = 1.7  # share of it, of a pool with several batches in flight
FONT = 8.5
PIXELS_PER_POINT = 100 / 72  # while the picture is laid out


@dataclass(frozen=True, kw_only=True)
class DrawnWindow:
    """Seconds of a timeline that are drawn, and the steps that end in it."""

    begin: float
    end: float
    ends: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A pool's strip of the picture; bottom and height are inches."""

    name: str
    label: str
    bottom: float
    height: float


def draw(timelines: Sequence[Timeline], plan: Plan, path: Path, *, steps: int = 3) -> None:
    """Draw `steps` steady-state steps of one timeline, or of two above each other on one time axis,
    to a PNG, SVG or PDF file (by its suffix). Raises UserError if it cannot be written."""
    write_atomic(path, render(timelines, plan, format_of(path), steps=steps))


def render(
    timelines: Sequence[Timeline], plan: Plan, file_format: str = "png", *, steps: int = 3
) -> bytes:
    """The bytes of the picture that `draw` writes."""
    assert 1 <= len(timelines) <= 2
    windows = [window_of(timeline, steps) for timeline in timelines]
    lanes = [
        lanes_of(timeline, plan, window)
        for timeline, window in zip(timelines, windows, strict=True)
    ]
    figure, axes = _panels([sum(lane.height for lane in group) for group in lanes])
    figure.suptitle(
        _title(plan),
        x=0.012,
        y=1 - 0.16 / figure.get_figheight(),
        ha="left",
        va="top",
        fontweight="bold",
    )
    for axis, timeline, window, group in zip(axes, timelines, windows, lanes, strict=True):
        axis.set_xlim(0, max(w.end - w.begin for w in windows))
        _draw_panel(axis, timeline, plan, window, group, alone=len(timelines) == 1)
    axes[-1].set_xlabel("seconds", fontsize=FONT)
    shown = dict.fromkeys(
        s.call for t, w in zip(timelines, windows, strict=True) for s in _visible(t, w)
    )
    order = [*CALL_COLORS, *(call for call in shown if call not in CALL_COLORS)]
    handles = [
        Patch(color=CALL_COLORS.get(call, GREY), label=call) for call in order if call in shown
    ]
    handles.append(Patch(facecolor=EMPTY, edgecolor="#BBBBBB", label="idle"))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=FONT,
        handlelength=1.1,
        columnspacing=1.3,
        handletextpad=0.4,
        borderaxespad=0.3,
    )
    return rendered(figure, file_format)


def window_of(timeline: Timeline, steps: int) -> DrawnWindow:
    """The part of a timeline that is drawn: `steps` steps that count, from the end of the last
    warm-up step; the whole timeline if none count."""
    ends = timeline.ends
    first = timeline.warmup - 1
    last = min(first + steps, max(filter(timeline.counts, ends), default=-1))
    if first not in ends or last <= first:
        return DrawnWindow(begin=0.0, end=timeline.makespan or 1.0, ends=ends)
    shown = {step: end for step, end in ends.items() if first <= step <= last}
    return DrawnWindow(begin=ends[first], end=ends[last], ends=shown)


def busy_in(timeline: Timeline, window: DrawnWindow) -> dict[str, float]:
    """Share of the window in which each pool runs a call: what the picture shows."""
    busy = occupied_seconds(timeline.spans, window.begin, window.end)
    return {pool: seconds / (window.end - window.begin) for pool, seconds in busy.items()}


def lanes_of(timeline: Timeline, plan: Plan, window: DrawnWindow) -> list[Lane]:
    """The lanes from top to bottom: the pools in the plan's order, then the host if it does
    something."""
    busy = busy_in(timeline, window)
    largest = max(len(pool.gpus) for pool in plan.pools.values())
    wanted = [
        (
            name,
            _lane_label(plan, name, busy.get(name, 0.0)),
            STREAM_LANE
            if name in _streaming(plan)
            else max(SMALLEST_LANE, (len(pool.gpus) / largest) ** 0.5),
        )
        for name, pool in plan.pools.items()
    ]
    if any(not span.pools for span in timeline.spans):
        wanted.append((HOST, HOST, HOST_LANE))
    lanes, bottom = [], 0.0
    for name, label, share in reversed(wanted):
        height = share * LANE
        lanes.append(Lane(name=name, label=label, bottom=bottom, height=height))
        bottom += height
    return lanes[::-1]


def _streaming(plan: Plan) -> tuple[str, ...]:
    """The pools whose generation streams."""
    return plan.rollout.pools if plan.streams else ()


def _panels(heights: list[float]) -> tuple[Figure, list[Axes]]:
    """A figure with an axis per panel of the given heights in inches; one data unit of y is one
    inch."""
    left, right, top, between, bottom = 2.15, 0.2, 0.88, 0.72, 0.82
    total = top + sum(heights) + between * (len(heights) - 1) + bottom
    figure = Figure(figsize=(WIDTH, total), dpi=72 * PIXELS_PER_POINT, facecolor="white")
    FigureCanvasAgg(figure)
    axes, edge = [], total - top
    for height in heights:
        box = (
            left / WIDTH,
            (edge - height) / total,
            (WIDTH - left - right) / WIDTH,
            height / total,
        )
        axis = figure.add_axes(box)
        axis.set_ylim(0, height)
        axes.append(axis)
        edge -= height + between
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    return figure, axes


def _title(plan: Plan) -> str:
    gpus, used = len(plan.cluster.gpus), plan.gpus_of(tuple(plan.pools))
    idle = f", {gpus - used} of them unused" if used < gpus else ""
    there = f"{gpus} {_unit(plan, gpus)} ({plan.cluster.name}){idle}"
    stale = f"staleness {plan.staleness}{', weights in flight' * plan.streams}"
    return f"{plan.name} · {plan.workload.name} on {there}, {stale}"


def _unit(plan: Plan, count: int) -> str:
    """What stands for a GPU here, in the singular or plural."""
    on_cores = all(device.kind == "cpu" for device in plan.cluster.devices.values())
    return plural("core" if on_cores else "GPU", count)


def _lane_label(plan: Plan, pool: str, busy: float) -> str:
    roles = [role for role, layout in plan.roles.items() if pool in layout.pools]
    gpus = len(plan.pools[pool].gpus)
    head = textwrap.wrap(" + ".join(roles) or pool, 27)
    return "\n".join([*head, f"{gpus} {_unit(plan, gpus)} · {busy:.0%} busy"])


def _visible(timeline: Timeline, window: DrawnWindow) -> list[Span]:
    return [span for span in timeline.spans if span.end > window.begin and span.start < window.end]


def _draw_panel(
    axis: Axes,
    timeline: Timeline,
    plan: Plan,
    window: DrawnWindow,
    lanes: list[Lane],
    *,
    alone: bool,
) -> None:
    busy = occupancy(plan, busy_in(timeline, window))
    text = f"{_pace(timeline, plan, alone)}, {busy:.0%} of all {_unit(plan, 1)} time busy"
    axis.set_title(text, loc="left", fontsize=FONT + 1, pad=17)
    length = window.end - window.begin
    for lane in lanes:
        gap = 0.07 if lane.name != HOST else 0.05
        axis.add_patch(
            Rectangle((0, lane.bottom + gap), length, lane.height - 2 * gap, color=EMPTY, zorder=1)
        )
        if lane.name in _streaming(plan):
            box = Box(
                bottom=lane.bottom + gap,
                height=lane.height - 2 * gap,
                begin=window.begin,
                end=window.end,
            )
            draw_stream(axis, timeline, lane.name, plan.staleness + 1, box, STREAM_COLORS)
            continue
        for span in _visible(timeline, window):
            if lane.name in (span.pools or (HOST,)):
                low, high = max(span.start, window.begin), min(span.end, window.end)
                inner = replace(lane, bottom=lane.bottom + gap, height=lane.height - 2 * gap)
                _draw_bar(axis, span, inner, low - window.begin, high - window.begin)
    _draw_step_ends(axis, window)
    axis.set_yticks(
        [lane.bottom + lane.height / 2 for lane in lanes], [lane.label for lane in lanes]
    )
    axis.tick_params(axis="y", length=0, labelsize=FONT)
    axis.tick_params(axis="x", labelsize=FONT, color=AXIS_INK)
    hide_frame(axis, "top", "left", "right")
    axis.spines["bottom"].set_color(AXIS_INK)


def _pace(timeline: Timeline, plan: Plan, alone: bool) -> str:
    """Seconds per step, in words. A prediction that is drawn alone has the plan's own figure first:
    its few steps are longer or shorter than the mean."""
    drawn = seconds(step_seconds(timeline))
    if timeline.source == "measured":
        return f"measured: {drawn} s per step"
    own = seconds(plan.predicted.step_seconds) if alone and plan.predicted else drawn
    if own == drawn:
        return f"predicted: {own} s per step"
    counted = len([step for step in timeline.ends if timeline.counts(step)])
    return f"predicted: {own} s per step ({drawn} s over the {counted or timeline.steps} simulated)"


def _draw_bar(axis: Axes, span: Span, lane: Lane, low: float, high: float) -> None:
    """One span in one lane; steps alternate between the call's colour and a lighter shade of it."""
    color = to_rgb(CALL_COLORS.get(span.call, GREY))
    if span.step % 2:
        color = _lighter(color, 0.28)
    pixels = axis.transData.transform([(low, lane.bottom), (high, lane.bottom + lane.height)])
    width, height = pixels[1] - pixels[0]
    edge = "white" if width > 4 else color
    axis.add_patch(
        Rectangle(
            (low, lane.bottom),
            high - low,
            lane.height,
            facecolor=color,
            edgecolor=edge,
            linewidth=0.7,
            zorder=2,
        )
    )
    for label in (f"{span.call} {span.step}", f"{span.call}\n{span.step}", f"{span.step}"):
        text_width, text_height = _text_size(label)
        if text_width + 6 <= width and text_height + 4 <= height:
            middle = ((low + high) / 2, lane.bottom + lane.height / 2)
            axis.annotate(
                label,
                middle,
                ha="center",
                va="center",
                color=_ink(color),
                fontsize=FONT,
                zorder=5,
                bbox={
                    "facecolor": color,
                    "edgecolor": "none",
                    "pad": 1,
                },  # no step's end runs through the words
            )
            break


def _draw_step_ends(axis: Axes, window: DrawnWindow) -> None:
    """A dotted line where each step's `update_actor` ends, labelled above the lanes where there is
    room."""
    taken = -1e9
    for step, end in sorted(window.ends.items()):
        x = end - window.begin
        axis.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=4, clip_on=False)
        label = f"end of step {step}"
        half = _text_size(label)[0] / 2
        at = axis.transData.transform((x, 0))[0]
        left, right = axis.transData.transform([(axis.get_xlim()[0], 0), (axis.get_xlim()[1], 0)])[
            :, 0
        ]
        side = "left" if at - half < left else "right" if at + half > right else "center"
        begin = at if side == "left" else at - 2 * half if side == "right" else at - half
        if begin > taken + 8:
            axis.annotate(
                label,
                (x, axis.get_ylim()[1]),
                xytext=(0, 3),
                textcoords="offset points",
                ha=side,
                va="bottom",
                fontsize=FONT - 1,
                color=INK,
                annotation_clip=False,
            )
            taken = begin + 2 * half


@cache
def _text_size(text: str) -> tuple[float, float]:
    """Width and height of a text in pixels of the figure."""
    lines = text.splitlines()
    width = max(TextPath((0, 0), line, size=FONT).get_extents().width for line in lines)
    return width * PIXELS_PER_POINT, 1.25 * FONT * len(lines) * PIXELS_PER_POINT


def _lighter(color: Color, share: float) -> Color:
    red, green, blue = (part + (1 - part) * share for part in color)
    return red, green, blue


def _ink(color: Color) -> str:
    """Black or white, whichever is easier to read on the colour (relative luminance of WCAG 2,
    without gamma)."""
    red, green, blue = color
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"
