"""Progress of a run as it happens: step, reward, tokens per second, and which pool is doing
what."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from planner.predict.schedule import Task
from planner.report.tables import HOST, roles_of, seconds
from planner.spec.plan import Plan
from planner.spec.timeline import Span

REFRESHES_PER_SECOND = 2  # drawing competes with the run where cores stand in for GPUs
SHOWN_METRICS = (
    ("reward", "reward"),
    ("exact_match", "exact match"),
    ("evaluation_score", "evaluation score"),
    ("tokens_per_second", "tokens/s"),
)


def evaluated(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The score, or the share that is right, of each evaluation that has a name."""
    names = {key: key.split("/") for key in metrics if key.startswith("evaluation/")}
    return {
        parts[1]: metrics[key]
        for key, parts in names.items()
        if parts[-1] in ("score", "exact_match")
    }


class LiveProgress:
    """A table that is redrawn in place on a terminal; a line per step where there is none. Use it
    in a `with`."""

    def __init__(self, plan: Plan, steps: int, console: Console) -> None:
        self.plan, self.steps, self.console = plan, steps, console
        self.done = 0
        self.metrics: dict[str, Any] = {}
        self._doing: dict[str, tuple[str, float]] = {}
        self._on_host: dict[tuple[str, int], float] = {}  # calls without a pool, and their steps
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self._table, console=console, refresh_per_second=REFRESHES_PER_SECOND
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def on_start(self, task: Task) -> None:
        for pool in task.pools:
            self._doing[pool] = (f"{task.call.name} {task.step}", time.monotonic())
        if not task.pools:
            self._on_host[task.call.name, task.step] = time.monotonic()

    def on_end(self, span: Span) -> None:
        for pool in span.pools:
            self._doing.pop(pool, None)
        self._on_host.pop((span.call, span.step), None)

    def on_step(self, metrics: dict[str, Any]) -> None:
        self.done = metrics["step"] + 1
        self.metrics |= metrics
        if not self.console.is_terminal:
            self.console.print(self._headline(), soft_wrap=True)

    def on_note(self, text: str) -> None:
        # As Text, since markup=False would also print the table with its markup as it stands.
        self.console.print(Text(text), soft_wrap=True)

    def on_plan(self, plan: Plan) -> None:
        """The run goes on under another plan."""
        self.plan = plan
        self._doing.clear()
        self._on_host.clear()

    def _headline(self) -> str:
        parts = [f"step {self.done}/{self.steps}"]
        parts += [
            f"{title} {_number(self.metrics[key])}"
            for key, title in SHOWN_METRICS
            if key in self.metrics
        ]
        parts += [f"{title} {_number(value)}" for title, value in evaluated(self.metrics).items()]
        if "seconds" in self.metrics:
            parts.append(f"{seconds(self.metrics['seconds'])} s")
        return "  ·  ".join(parts)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(
            Text(self.plan.name, style="bold"), Text(self._headline() if self.done else "starting")
        )
        table.add_row("", ProgressBar(total=self.steps, completed=self.done, width=60))
        now = time.monotonic()
        for pool, place in self.plan.pools.items():
            call, since = self._doing.get(pool, ("–", now))
            label = f"{escape(roles_of(self.plan, pool))} ({len(place.gpus)})"
            table.add_row(
                label, f"{call}  {now - since:.0f} s" if call != "–" else "[dim]idle[/dim]"
            )
        for (name, step), since in list(self._on_host.items()):
            table.add_row(self._who(name), f"{name} {step}  {now - since:.0f} s")
        table.add_row("", f"[dim]{now - self._began:.0f} s since the start[/dim]")
        return table

    def _who(self, name: str) -> str:
        """Who works while a call of this name runs that has no pool."""
        call, rewards = self.plan.dataflow[name], self.plan.workload.host_rewards
        if call.scores and not call.roles:
            return escape("reward " + ", ".join(reward.label for reward in rewards))
        return HOST


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
