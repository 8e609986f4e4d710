"""Step time against GPUs and against dollars, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from planner.report.picture import (
    AXIS_INK,
    BLUE,
    CHART_FONT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    VERMILION,
    hide_frame,
    new_chart,
    save,
)
from planner.search.questions.pareto import ParetoPoint
from planner.spec.wording import counted

LINE_COLORS = (BLUE, VERMILION, GREEN, PINK, ORANGE)
MARKERS = ("o", "s", "^", "D", "v")


def draw(points: Sequence[ParetoPoint], title: str, path: Path) -> None:
    """Draw a line per staleness to a PNG, SVG or PDF file (by its suffix). Raises UserError if it
    cannot be written."""
    save(chart(points, title), path)


def chart(points: Sequence[ParetoPoint], title: str) -> Figure:
    """The picture that `draw` writes."""
    panels = 2 if all(point.dollars > 0 for point in points) else 1
    figure = new_chart(5.6 * panels + 0.4, 4.4, title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _against_gpus(axes[0], points)
    if panels == 2:
        _against_dollars(axes[1], points)
    for axis in axes:
        _dress(axis, [point.seconds for point in points] + _ideal(points))
    axes[0].legend(frameon=False, fontsize=CHART_FONT, loc="upper right")
    return figure


def _lines(points: Sequence[ParetoPoint]) -> list[tuple[int, list[ParetoPoint]]]:
    """The points of each staleness, by GPUs."""
    found = []
    for staleness in sorted({point.max_staleness for point in points}):
        own = [point for point in points if point.max_staleness == staleness]
        found.append((staleness, sorted(own, key=lambda point: point.gpus)))
    return found


def _counts(points: Sequence[ParetoPoint]) -> list[int]:
    """Every number of GPUs once, in rising order."""
    return sorted({point.gpus for point in points})


def _ideal(points: Sequence[ParetoPoint]) -> list[float]:
    """Seconds on each number of GPUs if those of the best plan on the fewest shrank in
    proportion."""
    first = min(points, key=lambda point: (point.gpus, point.seconds))
    return [first.seconds * first.gpus / count for count in _counts(points)]


def _style(number: int) -> dict[str, Any]:
    return {
        "color": LINE_COLORS[number % len(LINE_COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5.5 - 0.5 * min(number, 3),
        "linewidth": 1.5,
        "zorder": 3,
    }


def _against_gpus(axis: Axes, points: Sequence[ParetoPoint]) -> None:
    for number, (staleness, line) in enumerate(_lines(points)):
        gpus, seconds = [point.gpus for point in line], [point.seconds for point in line]
        label = "on-policy" if staleness == 0 else f"staleness up to {staleness}"
        axis.plot(gpus, seconds, label=label, **_style(number))
    counts = _counts(points)
    axis.plot(
        counts,
        _ideal(points),
        color=GREY,
        linestyle=(0, (3, 3)),
        linewidth=1,
        label="twice the GPUs, half the time",
    )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(counts))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("GPUs", fontsize=CHART_FONT)
    axis.set_ylabel("seconds per step", fontsize=CHART_FONT)


def _against_dollars(axis: Axes, points: Sequence[ParetoPoint]) -> None:
    lines = _lines(points)
    for number, (_, line) in enumerate(lines):
        dollars, seconds = [point.dollars for point in line], [point.seconds for point in line]
        axis.plot(dollars, seconds, **_style(number))
    best_line = lines[-1][1]  # below and left of it nothing else is drawn
    for point in best_line:
        axis.annotate(
            counted(point.gpus, "GPU"),
            (point.dollars, point.seconds),
            xytext=(-7, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=CHART_FONT - 1,
            color=INK,
        )
    low, high = min(point.dollars for point in points), max(point.dollars for point in points)
    width = high - low or high
    axis.set_xlim(low - 0.25 * width, high + 0.06 * width)
    axis.set_xlabel("US dollars per step, idle GPUs paid", fontsize=CHART_FONT)


def _dress(axis: Axes, seconds: Sequence[float]) -> None:
    """The scale of seconds, and the frame."""
    axis.set_yscale("log")
    axis.set_ylim(min(seconds) / 1.25, max(seconds) * 1.25)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.grid(color="#E6E6E6", linewidth=0.7)
    axis.tick_params(labelsize=CHART_FONT - 1, color=AXIS_INK)
    hide_frame(axis, "top", "right")
    for side in ("left", "bottom"):
        axis.spines[side].set_color(AXIS_INK)
