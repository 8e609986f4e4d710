"""Predicted beside measured step times of a study's plans, as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from planner.report.gantt import format_of
from planner.spec.files import write_atomic

PREDICTED, MEASURED = "#56B4E9", "#D55E00"  # of Okabe and Ito's palette, as in gantt.py
FONT = 9
DPI = 130

Bar = tuple[str, float, float]  # plan, predicted and measured seconds per step


def draw(bars: Sequence[Bar], title: str, path: Path) -> None:
    """Draw two bars per plan, the fastest measured on top, to a PNG, SVG or PDF file (by its
    suffix). Raises UserError if it cannot be written."""
    ordered = sorted(bars, key=lambda bar: -bar[2])
    figure = Figure(figsize=(8.4, 1.3 + 0.48 * len(bars)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=FONT + 2)
    axis = figure.subplots()
    places = range(len(ordered))
    axis.barh(
        [y + 0.19 for y in places],
        [bar[1] for bar in ordered],
        0.36,
        color=PREDICTED,
        label="predicted",
    )
    axis.barh(
        [y - 0.19 for y in places],
        [bar[2] for bar in ordered],
        0.36,
        color=MEASURED,
        label="measured",
    )
    for y, (_, predicted, measured) in zip(places, ordered, strict=True):
        axis.annotate(
            f"{predicted / measured - 1:+.1%}", (max(predicted, measured), y), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=FONT - 1, color="#333333",
        )  # fmt: skip
    axis.set_yticks(list(places), [bar[0] for bar in ordered])
    axis.set_xlim(0, 1.12 * max(max(predicted, measured) for _, predicted, measured in bars))
    axis.set_xlabel(
        "seconds per step (at each plan the error: predicted over measured, less 1)", fontsize=FONT
    )
    axis.tick_params(labelsize=FONT)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=FONT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format_of(path), dpi=DPI)
    write_atomic(path, buffer.getvalue())
