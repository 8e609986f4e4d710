"""Measuring the calls of a workload on this machine: steps of small plans, run by the very
processes and the very loop of a real run, and the median duration of each call. `groups.py` says
what is measured, `measure.py` runs it, and `samples.py` makes points of it."""

import contextlib
import hashlib
import time
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from executor.fleet import pools
from executor.fleet.session import ray_session
from executor.measuring import software
from executor.measuring.group import BatchSize, Group, fitting
from executor.measuring.groups import groups_here, groups_of
from executor.measuring.measure import Say, measure
from executor.running import preflight
from executor.running.processes import fleet_for
from planner.predict.points import Point
from planner.predict.profile import Profile
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.wording import counted
from planner.spec.workload import Workload


def profile(
    workload: Workload,
    cluster: Cluster,
    out: Path,
    *,
    progress: Say,
    minutes: float | None = None,
    only: str = "",
    command: str = "",
) -> Profile:
    """Measure the workload's calls on one node of the cluster and write the profile to `out`, after
    each group of measurements. Groups that `out` has already are not measured again. With `minutes`
    the least valuable ones are left out, as far as all take longer; with `only` those whose name
    does not contain it.

    Small pools are measured side by side, so calls share the host's memory and links as they do in
    a run. Raises UserError, before anything is started where that can be known before."""
    clock = _Clock(minutes, progress)
    workload = _plain(workload)
    empty = _empty(workload, cluster, command)
    result = _resumed(out, empty)
    groups = _groups(workload, cluster, only, progress)
    preflight.check(max(_plans(groups), key=pools.needed), local=True)
    missing = [group.only(batches) for group in groups if (batches := _missing(group, result))]
    _announce(missing, len(groups) - len(missing), minutes, progress)
    if not missing:
        return result
    if result is empty:
        result.write(out)  # now, rather than after the first group, if it cannot be written
    on_cores = pools.resource_of(groups[0].plans[0]) == "CPU"
    failed: list[str] = []
    session = ray_session(cpus=cluster.nodes[0].gpus if on_cores else None, address=None)
    with session, contextlib.closing(_measured(missing, _plans(groups), clock)) as measured:
        for group, found in measured:
            if found is None:
                failed.append(group.name)
            else:
                result = _with(result, group, *found, empty.command)
            result.write(out)
    clock.say("done")
    if failed:
        raise UserError(
            f"{'; '.join(failed)} could not be measured, as said above; the rest is in {out}"
        )
    return result


class _Clock:
    """The seconds of a measurement, of which there may be only so many `minutes`."""

    def __init__(self, minutes: float | None, progress: Say) -> None:
        self._minutes, self._progress = minutes, progress
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        self._progress(f"[{time.monotonic() - self._began:5.0f} s] {text}")

    @property
    def left(self) -> float:
        spent = time.monotonic() - self._began
        return np.inf if self._minutes is None else 60 * self._minutes - spent


def _groups(workload: Workload, cluster: Cluster, only: str, progress: Say) -> list[Group]:
    """What is to be measured on the one node of a cluster. Raises UserError if there is nothing."""
    if len(cluster.nodes) != 1:
        raise UserError(
            f"cluster {cluster.name!r} has {len(cluster.nodes)} nodes; measure on one node of each "
            "kind"
        )
    if every := groups_of(workload, cluster, only):  # GPUs that are missing come first
        preflight.check_count(max(_plans(every), key=pools.needed))
    groups = groups_here(workload, cluster, only, progress)
    if not groups:
        raise UserError(
            f"workload {workload.name!r} does not fit {counted(len(cluster.gpus), 'GPU')} of "
            f"{cluster.name} as one plan"
        )
    return groups


Found = tuple[Sequence[Point], Sequence[Point]]  # measured points, and held-out ones


def _measured(
    missing: Sequence[Group], plans: list[Plan], clock: _Clock
) -> Generator[tuple[Group, Found | None], None, None]:
    """The groups for which there is time, with their points, or None where they failed; on
    processes that all of `plans` can use."""
    with contextlib.ExitStack() as fleets:
        fleet: pools.Fleet | None = None
        for number in range(len(missing)):
            group = fitting(missing[number:], clock.left)[0]
            if group is None:
                clock.say(f"no time is left for {missing[number].name}")
                continue
            clock.say(f"{number + 1} of {len(missing)}: {group.name}, about {group.seconds:.0f} s")
            if fleet is None:
                fleet = fleets.enter_context(contextlib.closing(fleet_for(plans)))
            try:
                found = measure(group, fleet, clock.say)
            except UserError as error:  # other groups may do nevertheless, on new processes
                clock.say(f"failed: {error}")
                fleets.close()
                fleet = None
                yield group, None
                continue
            yield group, found


def _plans(groups: Sequence[Group]) -> list[Plan]:
    return [plan for group in groups for plan in group.plans]


def _announce(missing: Sequence[Group], there: int, minutes: float | None, progress: Say) -> None:
    """Say what will be measured, how long that takes, and what is left out. Raises UserError if
    that is all."""
    if there:
        progress(f"{_count(there)}: there already")
    if not missing:
        return
    chosen = fitting(missing, np.inf if minutes is None else 60 * minutes)
    kept = [group for group in chosen if group is not None]
    if not kept and minutes is not None:
        raise UserError(
            f"--minutes {minutes:g}: no group of measurements is that short; {missing[0].name} "
            f"takes about {missing[0].seconds:.0f} s with its start"
        )
    seconds = sum(group.seconds for group in kept)
    said = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
    progress(f"{_count(len(kept))}, about {said} with their start")
    for whole, part in zip(missing, chosen, strict=True):
        lost = [batch.name for batch in whole.batches if part is None or batch not in part.batches]
        if lost:
            progress(f"left out for lack of time: {whole.name}: {'; '.join(lost)}")


def _count(groups: int) -> str:
    return f"{counted(groups, 'group')} of measurements"


# --- the file ---


def _empty(workload: Workload, cluster: Cluster, command: str) -> Profile:
    """A profile without points, as this machine would make it."""
    # Without defaults, so that a key that comes later changes nothing.
    content = workload.model_dump_json(exclude={"name"}, exclude_defaults=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Profile(
        device=cluster.nodes[0].device,
        model=workload.actor.shape,
        versions=software.versions(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command or f"plan profile --cluster {cluster.name} (workload {workload.name})",
        workload=f"{workload.name} {digest[:12]}",
        points=(),
    )


def _resumed(out: Path, empty: Profile) -> Profile:
    """The profile that is there, if it is of the same workload, device and software. Raises
    UserError."""
    if not out.exists():
        return empty
    there = Profile.read(out)
    for what, old, new in (
        ("device", there.device, empty.device),
        ("workload", there.workload, empty.workload),
        ("software", there.versions, empty.versions),
    ):
        if old != new:
            raise UserError(
                f"{out}: was measured with another {what} ({old}, not {new}); name another file"
            )
    return there


def _missing(group: Group, there: Profile) -> list[BatchSize]:
    """The batches of a group that a profile does not have yet."""
    return [batch for batch in group.batches if group.label(batch) not in there.measured]


def _with(
    result: Profile, group: Group, points: Sequence[Point], held_out: Sequence[Point], command: str
) -> Profile:
    """A profile with the points of a group too."""
    commands = dict.fromkeys([*result.command.splitlines(), command])
    labels = tuple(group.label(batch) for batch in group.batches)
    return result.changed(
        command="\n".join(commands),
        points=(*result.points, *points),
        held_out=(*result.held_out, *held_out),
        measured=result.measured + labels,
    )


def _plain(workload: Workload) -> Workload:
    """The workload whose calls are measured: without evaluations, and without groups, for the
    planner knows what is shared in a group."""
    if workload.group > 1:
        advantage = "gae" if workload.algorithm.needs_critic else "reinforce++"
        plain = {"advantage": advantage, "oversampling_factor": 1.0}
        algorithm = workload.algorithm.changed(**plain)
        workload = workload.changed(samples_per_prompt=1, algorithm=algorithm)
    if workload.data is None:
        return workload
    data = workload.data.changed(evaluate_every=0, evaluate_first=False)
    return workload.changed(data=data, evaluation=())
