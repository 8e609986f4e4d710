"""Predicted and measured step times of a study's plans, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from planner.report.picture import CHART_FONT, INK, SKY, VERMILION, hide_frame, new_chart, save

BAR_HEIGHT, BAR_SHIFT = 0.36, 0.19  # a plan has two bars, above and below its place


class StepBar(NamedTuple):
    """A plan with its predicted and measured seconds per step."""

    plan: str
    predicted: float
    measured: float


def draw(bars: Sequence[StepBar], title: str, path: Path) -> None:
    """Draw two bars per plan, the fastest measured on top, to a PNG, SVG or PDF file (by its
    suffix). Raises UserError if it cannot be written."""
    figure = new_chart(8.4, 1.3 + 0.48 * len(bars), title)
    axis = figure.subplots()
    ordered = sorted(bars, key=lambda bar: -bar.measured)
    places = range(len(ordered))
    for label, color, shift in (
        ("predicted", SKY, BAR_SHIFT),
        ("measured", VERMILION, -BAR_SHIFT),
    ):
        heights = [getattr(bar, label) for bar in ordered]
        axis.barh([y + shift for y in places], heights, BAR_HEIGHT, color=color, label=label)
    for y, bar in zip(places, ordered, strict=True):
        axis.annotate(
            f"{bar.predicted / bar.measured - 1:+.1%}",
            (max(bar.predicted, bar.measured), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=CHART_FONT - 1,
            color=INK,
        )
    axis.set_yticks(list(places), [bar.plan for bar in ordered])
    longest = max(max(bar.predicted, bar.measured) for bar in bars)
    axis.set_xlim(0, 1.12 * longest)
    label = "seconds per step (at each plan the error: predicted over measured, less 1)"
    axis.set_xlabel(label, fontsize=CHART_FONT)
    axis.tick_params(labelsize=CHART_FONT)
    axis.tick_params(axis="y", length=0)
    hide_frame(axis, "top", "right", "left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=CHART_FONT)
    save(figure, path)
