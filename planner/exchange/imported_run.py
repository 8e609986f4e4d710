"""A run of another framework: its placement as a plan, and the seconds of its steps. Here they
become a timeline and a profile.

A framework says how long the phases of a step took. A phase is one call of ours or several, which
then share it as the roofline has them. What a step took beyond its phases is the controller's, and
counts to `advantages`, the call that runs there. So the calls of a step add up to the step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import Any

from planner.predict.cost import CostModel, place_of
from planner.predict.costs.estimates import Estimate, Moves
from planner.predict.forecast import durations
from planner.predict.points import Point, point_of
from planner.predict.profile import Profile
from planner.predict.schedule import tasks_of
from planner.predict.simulate import simulate
from planner.spec.dataflow import Call
from planner.spec.errors import UserError
from planner.spec.lengths import Fixed, sample
from planner.spec.plan import Plan, TrainerRole
from planner.spec.timeline import Timeline

STEP = "step"  # the phase that is the whole step
NOTHING = 1e-6  # seconds of a call that has no time of its own
OVER = 1.02  # times a step that its phases may take together, for their clocks are read one by one
LEAST_SHARE = 0.3  # of a measured call that is not its moves


@dataclass(frozen=True, kw_only=True)
class ImportedRun:
    """A plan without predictions, and for each step the seconds of its phases. `phases` says which
    calls each phase has; that of none is inside of another. The first `warmup` steps do not count.
    `notes` say what was taken for granted."""

    plan: Plan
    steps: tuple[Mapping[str, float], ...]
    phases: Mapping[str, tuple[str, ...]]
    warmup: int
    notes: tuple[str, ...] = field(default=())


def default_warmup(steps: int) -> int:
    """How many of a run's first steps are left out: two if enough are left, for they load, compile
    and fill caches."""
    return 2 if steps >= 5 else 1 if steps >= 2 else 0


def seconds_of_calls(run: ImportedRun) -> list[dict[str, float]]:
    """Seconds of each call for each step, in the program's order. Raises UserError where a call is
    in no phase, or phases take longer than their step."""
    names = [item.call for item in run.plan.program if hasattr(item, "call")]
    told = {phase: calls for phase, calls in run.phases.items() if phase in run.steps[-1]}
    listed = [call for calls in told.values() for call in calls]
    for call in names:
        if call not in listed and run.plan.dataflow[call].kind != "host":
            raise UserError(f"the log says nothing of how long {call} takes; it cannot be imported")
    roofline = {name: float(x.seconds.mean()) for name, x in durations(run.plan).items()}
    found = []
    for number, step in enumerate(run.steps, 1):
        taken = sum(step.get(phase, 0.0) for phase in run.phases)
        if taken > OVER * step[STEP]:
            raise UserError(
                f"step {number}: its calls take {taken:.4g} s and the step {step[STEP]:.4g} s; are "
                "both in seconds, and do the calls run one after the other?"
            )
        seconds = dict.fromkeys(names, 0.0)
        for phase, calls in run.phases.items():
            total = _makespan(run.plan, calls, roofline)
            for call in calls:
                seconds[call] += step.get(phase, 0.0) * roofline[call] / total
        seconds[_controller(run.plan)] += max(0.0, step[STEP] - taken)
        found.append(seconds)
    return found


def _makespan(plan: Plan, calls: Sequence[str], seconds: Mapping[str, float]) -> float:
    """Seconds of calls that are issued at once: those of one pool take turns, as do those of the
    controller, which wait for the others."""
    total: dict[tuple[str, ...], float] = {}
    for call in calls:
        pools = plan.pools_of(plan.dataflow[call])
        total[pools] = total.get(pools, 0.0) + seconds[call]
    return total.pop((), 0.0) + max(total.values(), default=0.0)


def _controller(plan: Plan) -> str:
    """The call that stands for what the controller does between the others."""
    return [call.name for call in plan.dataflow.calls if call.kind == "host"][-1]


def timeline_of(run: ImportedRun, steps: Sequence[Mapping[str, float]]) -> Timeline:
    """The measured steps, in which calls follow one another as the plan has them."""
    plan = run.plan
    spans = simulate(
        tasks_of(plan, len(steps)), lambda task: steps[task.step].get(task.call.name, 0.0)
    )
    return Timeline(
        source="measured",
        plan=plan.name,
        steps=len(steps),
        warmup=run.warmup,
        step_ends_with=plan.dataflow.ends_step.name,
        spans=spans,
    )


# --- the profile ---


def profile_of(run: ImportedRun, steps: Sequence[Mapping[str, float]], command: str) -> Profile:
    """The mean seconds of each call over the steps that count, as points. Means add up to the mean
    step, which medians do not. The seconds of waking what is offloaded are not told apart in a log:
    what the device's rates say is taken off."""
    plan = run.plan
    estimates = durations(plan, model=CostModel(plan.workload, plan.cluster))
    points = []
    for call in plan.dataflow.steady.calls:
        seconds = [step[call.name] for step in steps[run.warmup :]]
        alone = _without_moves(fmean(seconds), estimates[call.name])
        figures = {
            "seconds": max(NOTHING, alone),
            "spread": _half_of_quartiles(seconds),
            "repeats": len(seconds),
        }
        points.append(_point(plan, call, figures))
    return Profile(
        device=plan.cluster.nodes[0].device,
        model=plan.workload.actor.shape,
        command=command,
        points=tuple(points),
        workload=plan.workload.name,
    )


def _without_moves(seconds: float, estimate: Estimate) -> float:
    moves = sum(
        float(estimate.parts[part].mean()) for part in Moves._fields & estimate.parts.keys()
    )
    return max(LEAST_SHARE * seconds, seconds - moves)


def _half_of_quartiles(seconds: Sequence[float]) -> float:
    """Half of the interquartile range, as profiles have it."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2


def _point(plan: Plan, call: Call, figures: Mapping[str, Any]) -> Point:
    workload = plan.workload
    if call.kind == "host":
        size = _batch(plan, workload.batch)
        return point_of(call="host", role=call.name, **size, **figures)
    if call.kind == "generate":
        rollout, place = plan.rollout, place_of(plan, plan.rollout.pools)
        return point_of(
            call="generate",
            role="rollout",
            gpus=place.gpus,
            nodes=len(place.parts),
            tensor_parallel=rollout.tensor_parallel,
            engines=rollout.replicas,
            concurrency=rollout.concurrency,
            **_batch(plan, workload.generated),
            **figures,
        )
    role = call.roles[0]
    layout = plan.trainers[role]
    place = place_of(plan, layout.pools)
    split = {"gpus": layout.gpus, "nodes": len(place.parts), "shard": layout.shard}
    if call.kind == "transfer":
        shared = set(layout.pools) >= set(plan.rollout.pools)
        engines = {
            "tensor_parallel": plan.rollout.tensor_parallel,
            "engines": plan.rollout.replicas,
        }
        return point_of(
            call="transfer",
            role=role,
            shared=shared,
            **split,
            **engines,
            **_own(plan, role),
            **figures,
        )
    return _trainer_point(plan, call, layout, split, figures)


def _trainer_point(
    plan: Plan, call: Call, layout: TrainerRole, split: dict[str, int], figures: Mapping[str, Any]
) -> Point:
    workload, role = plan.workload, call.roles[0]
    update = {}
    if call.kind == "train":
        update = {"minibatch": workload.minibatch, "epochs": workload.algorithm.epochs}
    return point_of(
        call=call.kind,
        role=role,
        micro_batch_tokens=layout.micro_batch_tokens,
        recompute=layout.recompute and call.kind == "train",
        **split,
        **update,
        **_batch(plan, workload.inferred_by(role)),
        **_own(plan, role),
        **figures,
    )


def _own(plan: Plan, role: str) -> dict[str, Any]:
    """The shape of a role's model where it is not the actor's, which is the profile's."""
    shape = plan.workload.models[role].shape
    return {} if shape == plan.workload.actor.shape else {"model": shape}


def _batch(plan: Plan, sequences: int) -> dict[str, Any]:
    """A batch with the lengths that scenario 0 of the workload has."""
    workload = plan.workload
    key = workload.seed, 0
    prompts = sample(workload.prompt, sequences // workload.group, *key, 0).sum() * workload.group
    responses = sample(workload.response, sequences, *key, 1)
    size = {
        "sequences": sequences,
        "prompt_tokens": int(prompts),
        "response_tokens": int(responses.sum()),
    }
    if isinstance(workload.response, Fixed):
        return size
    return size | {"response_lengths": tuple(responses.tolist())}
