"""A timeline as a trace that opens in Perfetto (https://ui.perfetto.dev) and in chrome://tracing.

The format is Chrome's Trace Event Format, JSON object form: complete events (`ph` X) with `ts` and
`dur` in microseconds, and metadata events (`ph` M) that name the process and the threads.
"""

import json
from pathlib import Path
from typing import Any

from planner.report.tables import HOST
from planner.spec.files import write_atomic
from planner.spec.timeline import Span, Timeline


def write(timeline: Timeline, path: Path) -> None:
    """Write the trace of a timeline. Raises UserError if the file cannot be written."""
    write_atomic(
        path,
        json.dumps({"traceEvents": events(timeline), "displayTimeUnit": "ms"}, allow_nan=False)
        + "\n",
    )


def events(timeline: Timeline) -> list[dict[str, Any]]:
    """One thread per pool, and one for the host; a call on several pools is an event on each of
    them."""
    pools = dict.fromkeys(pool for span in timeline.spans for pool in span.pools or (HOST,))
    threads = {
        pool: number
        for number, pool in enumerate(sorted(pools, key=lambda pool: pool == HOST), start=1)
    }
    found = [_meta("process_name", 0, name=f"{timeline.plan} ({timeline.source})")]
    for pool, number in threads.items():
        found.append(_meta("thread_name", number, name=pool))
        found.append(_meta("thread_sort_index", number, sort_index=number))
    for span in timeline.spans:
        found += [_event(span, threads[pool]) for pool in span.pools or (HOST,)]
    return found


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
