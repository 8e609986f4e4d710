"""When a call counts as stuck, and the one line that a run ends with when something goes wrong on
its processes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from executor.fleet.worker import OutOfMemory, Overdue, WorkerError
from executor.running.options import DEADLINE_FLOOR_SECONDS
from executor.running.pace import Pace
from planner.predict.memory import plan_memory, trainer_allowance
from planner.predict.schedule import Task
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.rewards import RewardServer
from planner.spec.timeline import Span

FACTOR = 10.0  # of what is predicted, or of what the latest calls took
EARLY = 10.0  # of the floor: the first calls load libraries and compile, and so does the start
EARLY_CALLS = 2  # of each name
UNPREDICTED_SECONDS = 1800.0
READ_BYTES_PER_SECOND = 1e8  # a slow shared file system
# A collective among trainers may take longer than any call that waits for it, however long
# responses become: so a run ends with the name of the call.
COLLECTIVE_SECONDS = 7 * 24 * 3600.0
ONE_IN = (
    8  # samples of a batch may fail in the reward function; more count as a function that is wrong
)


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds that a plan's calls and its start may take: ten times the prediction
    (`predicted(task)`, by default the plan's own) or what the latest calls took, whichever is
    longer, but never less than `floor`, and in the beginning ten times that. An evaluation of more
    prompts (`held_out`) than a batch has takes as many times more."""

    plan: Plan
    floor: float = DEADLINE_FLOOR_SECONDS
    predicted: Callable[[Task], float] | None = None
    held_out: int = 0
    pace: Pace = field(default_factory=Pace)

    def note(self, span: Span) -> None:
        """Let what a call took count for the later ones: responses may grow."""
        flow = self.plan.dataflow
        if span.call not in flow.names:  # it is of a run under another plan
            return
        batches = self._batches if flow[span.call].monitor else 1
        self.pace.note(span.call, span.step, span.seconds / batches)
        if span.call == flow.generates.name:
            self.pace.note_generated(span.step, span.tokens)

    def of_call(self, task: Task, early: bool) -> float:
        """Seconds allowed for a task; `early` ones are the first of a call."""
        if task.call.streams:  # which is asked for slice by slice, with a limit for each
            return math.inf
        floor = self.floor * (EARLY if early else 1.0)
        if task.call.scores and not task.call.roles:
            return self._of_scoring() + floor
        expected = self.expected(task)
        allowed = max(floor, UNPREDICTED_SECONDS if expected is None else FACTOR * expected)
        return self._of_evaluation(allowed) if task.call.monitor else allowed

    @property
    def of_first_evaluation(self) -> float:
        """Seconds allowed for an evaluation before the first step."""
        calls = self.plan.predicted.call_seconds if self.plan.predicted else {}
        longest = max(calls.values(), default=UNPREDICTED_SECONDS / FACTOR)
        return self._of_evaluation(max(EARLY * self.floor, FACTOR * longest))

    def _of_evaluation(self, of_batch: float) -> float:
        """Seconds for all held-out prompts, if a batch may take so many to be generated."""
        return self._batches * (of_batch + self._of_scoring())

    @property
    def _batches(self) -> int:
        """Batches of held-out prompts."""
        return max(1, math.ceil(self.held_out / self.plan.workload.generated))

    def _of_scoring(self) -> float:
        """Seconds that the rewards may take for a batch on the host: each try has its own limit,
        which comes first. Samples that processes score as they finish have it each, and
        so has every request to a server."""
        batch, found = self.plan.workload.generated, [0.0]
        for reward in self.plan.workload.host_rewards:
            tries = 4 + batch // ONE_IN
            if reward.processes is not None:
                tries += 2 * math.ceil(batch / reward.processes)
            if isinstance(reward, RewardServer):
                requests = math.ceil(batch / reward.samples_per_request)
                tries = (tries + requests) * (1 + reward.retries)
            found.append(tries * reward.timeout_seconds)
        return max(found)

    def of_silence(self, task: Task, early: bool) -> float:
        """Seconds after which a call must have ended one way or the other, as its deadline has
        passed; an engine that dies may be started again meanwhile."""
        again = self.of_start if task.call.kind in ("generate", "transfer") else 0.0
        return self.of_call(task, early) + self.floor + again

    def expected(self, task: Task) -> float | None:
        """Seconds of a call (for an evaluation: of a batch) by its prediction, or by the latest
        calls if those took longer."""
        known = [found for found in (self.predict(task), self.lately(task)) if found is not None]
        return max(known, default=None)

    def lately(self, task: Task) -> float | None:
        """Seconds that the latest calls of a task's name took; an evaluation also generates."""
        names = [task.call.name]
        if task.call.monitor:
            names.append(self.plan.dataflow.generates.name)
        known = [self.pace.of(name, task.step) for name in names]
        return max((seconds for seconds in known if seconds is not None), default=None)

    def predict(self, task: Task) -> float | None:
        """Predicted seconds; the longest call's for one that a prediction leaves out, such as an
        evaluation."""
        if self.predicted is not None:
            return self.predicted(task)
        calls = self.plan.predicted.call_seconds if self.plan.predicted else {}
        return calls.get(task.call.name, max(calls.values(), default=None))

    def why(self, task: Task, allowed: float) -> str:
        """Where a deadline comes from, in words."""
        if task.call.streams:
            return f" ({self.floor:.3g} s allowed for a slice of decoding)"
        predicted, lately = self.predict(task), self.lately(task)
        words = "nothing" if predicted is None else f"{predicted:.2g} s"
        words = f" ({allowed:.3g} s allowed, {words} predicted"
        if lately is not None and lately > (predicted or 0):
            words += f", {lately:.2g} s lately"
        return f"{words})"

    @property
    def of_start(self) -> float:
        """Seconds allowed for the start, and for writing the models at the end: loading libraries,
        and the models' bytes."""
        models = self.plan.workload.models
        size = sum(4 * model.shape.parameters() for model in models.values())
        return EARLY * self.floor + size / READ_BYTES_PER_SECOND


@contextlib.contextmanager
def one_line(
    plan: Plan, what: str, pools: Sequence[str], call: str, limit: str = ""
) -> Iterator[None]:
    """Turn what goes wrong on a process during `what` into a UserError. `call` and `pools` say
    whose memory it was, `limit` where the deadline came from."""
    try:
        yield
    except WorkerError as error:
        if isinstance(error, OutOfMemory):
            line = f"{error}; {memory_of(plan, pools, error)}; {remedy(plan, call, pools)}"
        elif isinstance(error, Overdue):
            line = (
                f"{error}{limit}; the processes were ended. If it was only slow, raise "
                "--deadline-floor"
            )
        else:
            line = f"{error}; the traceback is in the run's log.txt"
        raise UserError(f"{what}: {line}") from error


def memory_of(plan: Plan, pools: Sequence[str], error: OutOfMemory) -> str:
    """The measured, the predicted and the allowed memory per GPU, in words."""
    found, told = plan_memory(plan), []
    for pool in pools:
        predicted = found[pool].peak
        if plan.predicted is not None:
            predicted = int(plan.predicted.memory_bytes.get(pool, predicted))
        told.append(
            f"pool {pool} was predicted {_gb(predicted)} of {_gb(found[pool].allowed)} allowed per "
            "GPU"
        )
        if plan.device_of(pool).kind == "cuda" and any(
            pool in layout.pools for layout in plan.trainers.values()
        ):
            told.append(f"its trainers may take {_gb(trainer_allowance(plan, pool))}")
    used, own = error.peak.get("used"), error.peak.get("allocated")
    if used is not None:
        told.append(
            f"the GPU had {_gb(used)} in use at the peak, of which this process's tensors "
            f"{_gb(own or 0)}"
        )
    return ", ".join(told) or "the host's memory did not suffice"


def remedy(plan: Plan, call: str, pools: Sequence[str]) -> str:
    """What to change in the plan, most promising first; `call` may be the start."""
    names = [name for name, layout in plan.roles.items() if set(layout.pools) & set(pools)]
    known = next((known for known in plan.dataflow.calls if known.name == call), None)
    roles, kind = (known.roles, known.kind) if known else ((), "start")
    use = []
    if "rollout" in names and ("rollout" in roles or not roles):
        use.append(f"lower roles.rollout.memory_fraction (now {plan.rollout.memory_fraction:g})")
        use.append(f"lower roles.rollout.concurrency (now {plan.rollout.concurrency})")
    for role in roles:
        if role not in plan.trainers or kind == "transfer":
            continue
        layout = plan.trainers[role]
        if layout.micro_batch_tokens > plan.workload.longest:
            use.append(f"lower roles.{role}.micro_batch_tokens (now {layout.micro_batch_tokens})")
        if kind == "train" and not layout.recompute:
            use.append(f"set roles.{role}.recompute to true")
        if layout.shard < plan.gpus_of(layout.pools):
            use.append(f"raise roles.{role}.shard (now {layout.shard})")
    idle = [
        role for role in names if role not in roles and plan.roles[role].offload in ("none", False)
    ]
    use += [f"offload roles.{role} while idle" for role in idle]
    return (
        f"in the plan {', or '.join(use[:4])}; or search again with a lower memory_bytes of the "
        "device in --cluster"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
