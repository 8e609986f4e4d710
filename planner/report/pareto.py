"""Step time against GPUs and against dollars, as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from planner.report.gantt import format_of
from planner.spec.files import write_atomic

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's, as in gantt.py
MARKERS = ("o", "s", "^", "D", "v")
FONT = 9
DPI = 130

Dot = tuple[
    int, int, float, float
]  # GPUs, staleness allowed, seconds per step, dollars per step (0: unknown)


def draw(dots: Sequence[Dot], title: str, path: Path) -> None:
    """Draw a line per staleness to a PNG, SVG or PDF file (by its suffix). Raises UserError if it
    cannot be written."""
    panels = 2 if all(dollars > 0 for *_, dollars in dots) else 1
    figure = Figure(figsize=(5.6 * panels + 0.4, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=FONT + 2)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _against_gpus(axes[0], dots)
    if panels == 2:
        _against_dollars(axes[1], dots)
    for axis in axes:
        _dress(axis, [seconds for _, _, seconds, _ in dots] + _ideal(dots))
    axes[0].legend(frameon=False, fontsize=FONT, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format_of(path), dpi=DPI)
    write_atomic(path, buffer.getvalue())


def _lines(dots: Sequence[Dot]) -> list[tuple[int, list[Dot]]]:
    """The dots of each staleness by GPUs."""
    return [
        (k, sorted(dot for dot in dots if dot[1] == k)) for k in sorted({dot[1] for dot in dots})
    ]


def _ideal(dots: Sequence[Dot]) -> list[float]:
    """Seconds on each number of GPUs if those of the best plan on the fewest shrank in
    proportion."""
    first = min(dots, key=lambda dot: (dot[0], dot[2]))
    return [first[2] * first[0] / count for count in sorted({dot[0] for dot in dots})]


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5.5 - 0.5 * min(number, 3),
        "linewidth": 1.5,
    }


def _against_gpus(axis: Axes, dots: Sequence[Dot]) -> None:
    for number, (k, line) in enumerate(_lines(dots)):
        label = "on-policy" if k == 0 else f"staleness up to {k}"
        axis.plot(
            [dot[0] for dot in line],
            [dot[2] for dot in line],
            label=label,
            zorder=3,
            **_style(number),
        )
    counts = sorted({dot[0] for dot in dots})
    axis.plot(
        counts,
        _ideal(dots),
        color="#9A9A9A",
        linestyle=(0, (3, 3)),
        linewidth=1,
        label="twice the GPUs, half the time",
    )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(counts))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("GPUs", fontsize=FONT)
    axis.set_ylabel("seconds per step", fontsize=FONT)


def _against_dollars(axis: Axes, dots: Sequence[Dot]) -> None:
    lines = _lines(dots)
    for number, (_, line) in enumerate(lines):
        axis.plot([dot[3] for dot in line], [dot[2] for dot in line], zorder=3, **_style(number))
    for gpus, _, seconds, dollars in lines[-1][
        1
    ]:  # below and left of the best line nothing else is drawn
        axis.annotate(
            f"{gpus} GPUs",
            (dollars, seconds),
            xytext=(-7, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=FONT - 1,
            color="#333333",
        )
    low, high = min(dot[3] for dot in dots), max(dot[3] for dot in dots)
    axis.set_xlim(low - 0.25 * (high - low or high), high + 0.06 * (high - low or high))
    axis.set_xlabel("US dollars per step, idle GPUs paid", fontsize=FONT)


def _dress(axis: Axes, seconds: Sequence[float]) -> None:
    axis.set_yscale("log")
    axis.set_ylim(min(seconds) / 1.25, max(seconds) * 1.25)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.grid(color="#E6E6E6", linewidth=0.7)
    axis.tick_params(labelsize=FONT - 1, color="#888888")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#888888")
