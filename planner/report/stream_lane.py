"""The lane of a pool whose generation streams: the batches that are in flight, a row for each, the
versions of the weights as bands, and the syncs that interrupt."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from planner.report.picture import INK
from planner.spec.timeline import Span, Timeline

BANDS = ("#F1F1F1", "#E2E2E2")  # of versions in turn
SMALL_FONT = 7.0
TITLE = 0.16  # inches above the batches, for the versions
LETTER = 0.008  # of the axis's width, that a letter of a label needs


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a lane is: bottom and height in inches, and the seconds of the timeline at its left and
    right end."""

    bottom: float
    height: float
    begin: float
    end: float

    def clipped(self, at: float) -> float:
        """Seconds of the picture, of seconds of the timeline."""
        return min(max(at, self.begin), self.end) - self.begin


def draw_stream(
    axis: Axes, timeline: Timeline, pool: str, rows: int, box: Box, colors: Sequence[str]
) -> None:
    """Draw a pool with at most so many batches in flight at a time. `colors` are those of steps in
    turn. A batch is as high as the share of it that has not ended; all of it until its end where
    the timeline does not know."""
    there = [span for span in timeline.spans if pool in span.pools]
    syncs = [span for span in there if not span.call.startswith(("generate", "evaluate"))]
    _draw_versions(axis, syncs, box)
    row = (box.height - TITLE) / rows
    for span in there:
        if span.call != "generate" or span.end <= box.begin or span.start >= box.end:
            continue
        bottom = box.bottom + row * (rows - 1 - span.step % rows)
        parts = timeline.ended_parts.get(span.step, (span.end,))
        corners = _shape(span, parts, bottom, 0.85 * row, box)
        color = colors[span.step % len(colors)]
        axis.add_patch(Polygon(corners, facecolor=color, edgecolor="none", zorder=2))
        ink = "white" if span.start >= box.begin else INK  # a batch from before is low by now
        _label(axis, f"{span.step}", box, (span.start, box.end), bottom + 0.4 * row, ink)
    for span in syncs:
        if box.begin <= span.end and span.start <= box.end:
            left, right = box.clipped(span.start), box.clipped(span.end)
            corner = left, box.bottom
            axis.add_patch(
                Rectangle(corner, right - left, box.height, color=INK, linewidth=0.6, zorder=3)
            )


def _shape(
    span: Span, parts: Sequence[float], bottom: float, height: float, box: Box
) -> list[tuple[float, float]]:
    """The corners of a batch that shrinks by an equal part at each of these times."""
    corners = [(box.clipped(span.start), bottom), (box.clipped(span.start), bottom + height)]
    left = 1.0
    for at in parts:
        corners.append((box.clipped(at), bottom + height * left))
        left -= 1 / len(parts)
        corners.append((box.clipped(at), bottom + height * max(left, 0.0)))
    return corners


def _draw_versions(axis: Axes, syncs: Sequence[Span], box: Box) -> None:
    """A band from each sync to the next, with the version that it installs."""
    ends = [span.end for span in syncs]
    bands = zip([box.begin, *ends], [*ends, box.end], [None, *syncs], strict=True)
    for begin, end, span in bands:
        left, right = box.clipped(begin), box.clipped(end)
        if right <= left:
            continue
        version = 0 if span is None or span.weights_version is None else span.weights_version
        shade = BANDS[version % len(BANDS)]
        axis.add_patch(
            Rectangle((left, box.bottom), right - left, box.height, color=shade, zorder=1.5)
        )
        if span is not None and begin >= box.begin:
            top = box.bottom + box.height - TITLE / 2
            _label(axis, f"weights {version}", box, (begin, end), top, INK)


def _label(
    axis: Axes, text: str, box: Box, between: tuple[float, float], middle: float, ink: str
) -> None:
    """A word at the left of something between two seconds, where there is room for it."""
    left, right = map(box.clipped, between)
    width = LETTER * (box.end - box.begin)
    if left + width * len(text) <= right:
        at = left + width / 2, middle
        axis.annotate(text, at, ha="left", va="center", color=ink, fontsize=SMALL_FONT, zorder=5)
