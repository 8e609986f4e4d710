"""The curves of a run: how the numbers of its steps went."""

from collections.abc import Mapping, Sequence
from typing import Any

from planner.report.picture import AXIS_INK, BLUE, hide_frame, new_chart

CURVES = {  # of metrics.jsonl, and what they are called
    "score": "score",
    "response_tokens": "tokens of a response",
    "kl": "KL to the reference",
    "seconds": "seconds of a step",
}
EACH, HEIGHT = 3.2, 2.2  # inches


def draw_curves(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """A small chart for each of the curves that a run has, side by side; None if it has none."""
    lines = {}
    for key in CURVES:
        points = [(row["step"], row[key]) for row in metrics if _is_number(row, key)]
        if len(points) > 1:
            lines[key] = points
    if not lines:
        return None
    figure = new_chart(EACH * len(lines), HEIGHT, "")
    for number, (key, points) in enumerate(lines.items(), 1):
        axis = figure.add_subplot(1, len(lines), number)
        axis.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.4)
        axis.set_title(CURVES[key], fontsize=9)
        axis.tick_params(labelsize=8, colors=AXIS_INK)
        hide_frame(axis, "top", "right")
    return figure


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float) and isinstance(row.get("step"), int)
