"""`plan judge`: what profiles are worth."""

from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import check_target, make_console, read_cluster
from planner.commands.options import JobOptions
from planner.predict.judge import judge as judged_points
from planner.predict.measurement import OnGpus
from planner.predict.profile import Profile, load_profiles, warnings_of
from planner.report.judged import page, tables, with_notes
from planner.spec.cluster import Cluster, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import write_atomic


def judge(profiles: Sequence[Path], cluster: str | None, out: Path | None, command: str) -> None:
    if out is not None:
        check_target(out, ".md")
    found = load_profiles(profiles)
    there = _cluster_of(found) if cluster is None else _given(cluster, found)
    console = make_console()
    for path, profile in zip(profiles, found, strict=True):
        for line in warnings_of(profile):
            console.print(f"{path}: {line}", markup=False, soft_wrap=True)
    judged = judged_points(found, there)
    for table in tables(judged):
        console.print(table)
    if out is not None:
        named = list(zip((path.name for path in profiles), found, strict=True))
        text = page(named, [there.devices[profile.device] for profile in found], judged, command)
        before = out.read_text(encoding="utf-8") if out.exists() else ""
        write_atomic(out, with_notes(text, before))
        console.print(f"Wrote {out}.", markup=False, soft_wrap=True)


def _given(cluster: str, profiles: Sequence[Profile]) -> Cluster:
    there = read_cluster(JobOptions(cluster=cluster))
    for profile in profiles:
        if profile.device not in there.devices:
            has = ", ".join(there.devices)
            raise UserError(
                f"a profile is of device {profile.device!r} and the cluster has {has}; name its "
                "cluster"
            )
    return there


def _cluster_of(profiles: Sequence[Profile]) -> Cluster:
    """Nodes of the shipped device that the points fit on, or this machine's cores. Raises
    UserError."""
    devices = {profile.device for profile in profiles}
    if len(devices) > 1:
        raise UserError(
            f"the profiles are of {', '.join(sorted(devices))}; judge those of one device at a time"
        )
    if devices == {"cpu"}:
        return _given("local", profiles)
    points = [
        point
        for profile in profiles
        for point in (*profile.points, *profile.held_out)
        if isinstance(point, OnGpus)
    ]
    gpus = max((point.gpus for point in points), default=1)
    nodes = max((point.nodes for point in points), default=1)
    return make_cluster(gpus, devices.pop(), -(-gpus // nodes))
