"""A timeline as a trace that opens in Perfetto (https://ui.perfetto.dev) and in chrome://tracing.

The format is Chrome's Trace Event Format, JSON object form: complete events (`ph` X) with `ts` and
`dur` in microseconds, and metadata events (`ph` M) that name the process and the threads.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from planner.report.tables import HOST
from planner.spec.files import write_atomic
from planner.spec.timeline import Span, Timeline

OVERLAP = 0.01  # seconds, by which clocks that are mapped may differ


def write(timeline: Timeline, path: Path) -> None:
    """Write the trace of a timeline. Raises UserError if the file cannot be written."""
    write_atomic(
        path,
        json.dumps({"traceEvents": events(timeline), "displayTimeUnit": "ms"}, allow_nan=False)
        + "\n",
    )


def events(timeline: Timeline) -> list[dict[str, Any]]:
    """One thread per pool, or as many as it has calls at a time where generation streams, and one
    for the host; a call on several pools is an event on each of them."""
    tracks = _tracks(timeline)
    pools = list(dict.fromkeys(track.pool for track in tracks.values()))
    order = sorted(set(tracks.values()), key=lambda t: (t.pool == HOST, pools.index(t.pool), t.row))
    threads = {track: number for number, track in enumerate(order, start=1)}
    found = [_meta("process_name", 0, name=f"{timeline.plan} ({timeline.source})")]
    for track, number in threads.items():
        name = f"{track.pool} {track.row + 1}" if track.row else track.pool
        found.append(_meta("thread_name", number, name=name))
        found.append(_meta("thread_sort_index", number, sort_index=number))
    for at, span in enumerate(timeline.spans):
        found += [_event(span, threads[tracks[at, pool]]) for pool in span.pools or (HOST,)]
    return found


class Track(NamedTuple):
    """A pool, and which of the calls that it has at a time, from 0 on."""

    pool: str
    row: int


def _tracks(timeline: Timeline) -> dict[tuple[int, str], Track]:
    """The track of each span on each of its pools: the first on which nothing else goes on."""
    found: dict[tuple[int, str], Track] = {}
    free: dict[str, list[float]] = {}  # when each track of a pool is free again
    by_start = sorted(enumerate(timeline.spans), key=lambda entry: entry[1].start)
    for at, span in by_start:
        for pool in span.pools or (HOST,):
            ends = free.setdefault(pool, [])
            rows = (row for row, end in enumerate(ends) if end <= span.start + OVERLAP)
            row = next(rows, len(ends))
            ends[row : row + 1] = [span.end]
            found[at, pool] = Track(pool, row)
    return {key: found[key] for key in sorted(found, key=lambda key: key[0])}


def _meta(kind: str, thread: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": thread, "name": kind, "args": args}


def _event(span: Span, thread: int) -> dict[str, Any]:
    args = {
        "role": span.role,
        "step": span.step,
        "chunk": span.chunk,
        "attempt": span.attempt,
        "weights_version": span.weights_version,
        "tokens": span.tokens,
        "issued_seconds": span.issued,
        "ready_seconds": span.ready,
        **{f"{part}_seconds": seconds for part, seconds in span.parts.items()},
    }
    return {
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "name": f"{span.call} {span.step}",
        "cat": span.call,
        "ts": 1e6 * span.start,
        "dur": 1e6 * span.seconds,
        "args": args,
    }
