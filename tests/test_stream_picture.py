"""What a timeline and a picture show of generation that streams."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from test_stream import streamed_plan

from planner.predict.forecast import forecast
from planner.report import trace
from planner.report.gantt import busy_in, render, window_of
from planner.report.stream_lane import Box, draw_stream
from planner.spec.timeline import Span, Timeline, occupied_seconds


def span(call: str, step: int, start: float, end: float, version: int | None = None) -> Span:
    return Span(
        call=call,
        role="rollout",
        pools=("r",),
        step=step,
        issued=start,
        ready=start,
        start=start,
        end=end,
        weights_version=version,
    )


SPANS = (
    span("generate", 0, 0, 10),
    span("generate", 1, 0, 14),
    span("sync_weights", 0, 11, 12, version=1),
    span("generate", 2, 12, 20),
)


def test_a_pool_is_occupied_once_at_a_time():
    assert occupied_seconds(SPANS) == {"r": 20}
    assert occupied_seconds(SPANS, 13, 15) == {"r": 2}
    assert occupied_seconds((SPANS[0], SPANS[3])) == {"r": 18}


def test_a_batch_shrinks_as_its_sequences_end():
    timeline = Timeline(
        source="simulated",
        plan="x",
        steps=3,
        warmup=0,
        spans=SPANS,
        ended_parts={0: (4, 10), 1: (6, 14)},
    )
    axis = Figure().add_subplot()
    FigureCanvasAgg(axis.figure)
    draw_stream(
        axis, timeline, "r", 2, Box(bottom=0, height=1.16, begin=2, end=18), ("red", "blue")
    )
    batches = [patch.get_xy() for patch in axis.patches if isinstance(patch, Polygon)]
    assert len(batches) == 3
    first = [(float(x), round(float(y), 4)) for x, y in batches[0]]
    # From the left end of the picture: all of it until second 4, half of it until second 10.
    assert first[:6] == [(0, 0.5), (0, 0.925), (2, 0.925), (2, 0.7125), (8, 0.7125), (8, 0.5)]
    whole = [float(x) for x, _ in batches[2]]  # nothing is known of its parts
    assert (min(whole), max(whole)) == (10, 16)
    bands = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    assert [(band.get_x(), band.get_width()) for band in bands] == [(0, 10), (10, 6), (9, 1)]


def test_a_forecast_is_drawn_with_its_stream():
    plan = streamed_plan(2)
    timeline = forecast(plan, 10)
    assert set(timeline.ended_parts) == set(range(10))
    for step, parts in timeline.ended_parts.items():
        ended = next(s.end for s in timeline.spans if (s.call, s.step) == ("generate", step))
        assert parts[-1] == pytest.approx(ended, abs=0.05)
        assert list(parts) == sorted(parts)
    assert max(busy_in(timeline, window_of(timeline, 3)).values()) <= 1
    measured = timeline.changed(source="measured", ended_parts={})
    assert render([timeline, measured], plan).startswith(b"\x89PNG")
    assert Timeline.model_validate_json(timeline.to_json()) == timeline


def test_a_trace_has_a_track_for_each_batch_in_flight():
    timeline = Timeline(source="measured", plan="x", steps=3, warmup=0, spans=SPANS)
    events = [event for event in trace.events(timeline) if event["ph"] == "X"]
    assert [event["name"] for event in events] == [f"{span.call} {span.step}" for span in SPANS]
    assert [event["tid"] for event in events] == [1, 2, 1, 1]
