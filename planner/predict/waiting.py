"""What the pools of a plan do in a stretch of a timeline, predicted or measured: they work, or wait
for something."""

from collections.abc import Mapping, Sequence

from planner.spec.plan import Plan
from planner.spec.timeline import Span

# What a pool waits for while a call of this kind keeps the next one from starting.
CAUSES = {"generate": "generation", "transfer": "weights", "host": "host"}
WORKS, FOR_HOST, FOR_OTHER = "busy", "host", "other"
SHARES = (WORKS, "generation", "weights", FOR_HOST, FOR_OTHER)
NEAR = 1e-9  # seconds between the end of a call and the moment when the next one is ready


def pool_shares(
    plan: Plan, spans: Sequence[Span], begin: float, end: float
) -> dict[str, dict[str, float]]:
    """The shares of `[begin, end)` in which each pool works, and waits for each cause; those of a
    pool add up to 1.

    A pool that does nothing waits for what its next call waits for. Back from the start of that
    call: the time since it was ready is the host's. Before that the call whose end made it ready
    had its time, then that call waited in its turn, and so on back to the beginning of the gap.

    Example: on pool b a training call was ready at 9 and begins at 10. On pool a generation began
    at 2 and ended at 9. If b did nothing since 0, one second is the host's, seven are
    generation's, and what came before is what generation itself was waiting for."""
    kinds = {call.name: CAUSES.get(call.kind, FOR_OTHER) for call in plan.dataflow.calls}
    found = {}
    for pool in plan.pools:
        seconds = dict.fromkeys(SHARES, 0.0)
        own = sorted((span for span in spans if pool in span.pools), key=lambda span: span.start)
        reached = begin
        for span in own:
            if reached < min(span.start, end):
                gap = Gap(seconds, kinds, reached, min(span.start, end))
                gap.explain(spans, span.start, span.ready)
                reached = gap.end
            until = max(reached, min(span.end, end))
            seconds[WORKS] += until - reached
            reached = until
        if reached < end:
            Gap(seconds, kinds, reached, end).explain(spans, end, end)
        length = max(end - begin, NEAR)
        found[pool] = {name: taken / length for name, taken in seconds.items()}
    return found


class Gap:
    """A time in which a pool does nothing; the `seconds` of its causes are added up."""

    def __init__(
        self, seconds: dict[str, float], kinds: Mapping[str, str], begin: float, end: float
    ) -> None:
        self._seconds, self._kinds, self._begin, self.end = seconds, kinds, begin, end

    def _add(self, cause: str, since: float, until: float) -> None:
        """Count what of a time lies in the gap."""
        since, until = max(since, self._begin), min(until, self.end)
        self._seconds[cause] += max(0.0, until - since)

    def explain(self, spans: Sequence[Span], start: float, ready: float) -> None:
        """Find what a call waits for that was `ready` and then began at `start`."""
        self._add(FOR_HOST, ready, start)
        earlier = sorted(
            (span for span in spans if self._begin < span.end <= ready + NEAR),
            key=lambda span: span.end,
        )
        now = ready
        while now > self._begin:
            while earlier and earlier[-1].end > now + NEAR:
                earlier.pop()
            if not earlier:
                self._add(FOR_OTHER, self._begin, now)
                return
            before = earlier.pop()
            self._add(FOR_OTHER, before.end, now)
            self._add(self._kinds.get(before.call, FOR_OTHER), before.start, min(before.end, now))
            self._add(FOR_HOST, before.ready, before.start)
            now = min(before.ready, before.start)
