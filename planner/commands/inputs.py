"""What the commands are given, read and checked: cluster, workload, profiles, and where to
write."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from planner.predict.profile import Profile, check_profiles, load_profiles, warnings_of
from planner.spec.cluster import Cluster, load_cluster, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import MOST_STEPS, names_a_file, profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload import Workload, load_workload

PLAIN_WIDTH = 120  # of what is printed into a file or a pipe


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`provenance` is what a plan remembers of the profiles: path -> sha256."""

    workload: Workload
    cluster: Cluster
    profiles: tuple[Profile, ...]
    provenance: dict[str, str]


def read_inputs(
    *,
    gpus: int | None,
    device: str | None,
    gpus_per_node: int | None,
    cluster: str | None,
    workload: str,
    profiles: Sequence[Path],
) -> Inputs:
    """Says on stderr what is odd about the profiles. Raises UserError."""
    found = _load(profiles, make_console(stderr=True))
    return Inputs(
        workload=read_workload(workload),
        cluster=read_cluster(
            gpus=gpus, device=device, gpus_per_node=gpus_per_node, cluster=cluster
        ),
        profiles=found,
        provenance={
            str(path): profile.sha256 for path, profile in zip(profiles, found, strict=True)
        },
    )


def read_cluster(
    *, gpus: int | None, device: str | None, gpus_per_node: int | None, cluster: str | None
) -> Cluster:
    """A number of shipped GPUs, a cluster file, or this machine. Raises UserError."""
    if cluster is None:
        if gpus is None:
            raise UserError(
                "say which GPUs to plan for: --gpus N, --cluster FILE or --cluster local"
            )
        return make_cluster(gpus, device or "h200", 8 if gpus_per_node is None else gpus_per_node)
    if device is not None or gpus_per_node is not None or (gpus is not None and cluster != "local"):
        raise UserError(
            f"--cluster {cluster} already says what there is; leave out --gpus, --device, "
            "--gpus-per-node"
        )
    if cluster == "local":
        from planner.commands.local import local_cluster

        return local_cluster(gpus)
    return load_cluster(Path(cluster))


def read_workload(name: str) -> Workload:
    """A workload file, or a shipped one by its name. Raises UserError."""
    shipped = {path.stem: path for path in sorted((profiles_dir() / "workloads").glob("*.toml"))}
    path = shipped.get(name) or Path(name)
    if not path.exists() and not names_a_file(name):
        raise UserError(
            f"no workload {name!r} is shipped, and no such file; shipped are {', '.join(shipped)}"
        )
    return load_workload(path)


def profiles_of(
    plan: Plan, path: Path, given: Sequence[Path], console: Console
) -> tuple[Profile, ...]:
    """The profiles to simulate a plan with: those given, else those that it was searched with,
    looked for where its provenance says and beside it. One that is gone or has changed is named,
    and left out. Raises UserError."""
    if given or plan.provenance is None:
        loaded = _load(given, console)
        check_profiles(loaded, plan.workload, plan.cluster)
        return loaded
    found = []
    for name, sha256 in plan.provenance.profiles.items():
        profile = _same_profile(
            (Path(name), path.parent / name, path.parent / Path(name).name), sha256
        )
        if profile is None:
            console.print(
                f"The profile {name} that {path} was searched with is gone or has changed; its "
                "costs come from the "
                "roofline model instead. Name it with --profile.",
                style="yellow", markup=False, soft_wrap=True,
            )  # fmt: skip
        else:
            found.append(profile)
    return tuple(found)


def _load(paths: Sequence[Path], console: Console) -> tuple[Profile, ...]:
    """Read profiles and say where what they measured is not monotone. Raises UserError."""
    found = load_profiles(paths)
    for path, profile in zip(paths, found, strict=True):
        for line in warnings_of(profile):
            console.print(f"{path}: {line}", style="yellow", markup=False, soft_wrap=True)
    return found


def _same_profile(places: Iterable[Path], sha256: str) -> Profile | None:
    for place in places:
        try:
            (profile,) = load_profiles((place,))
        except UserError:
            continue
        if profile.sha256 == sha256:
            return profile
    return None


def check_target(path: Path, *suffixes: str) -> None:
    """Refuse a place that cannot be written before the work is done, not after it. Raises
    UserError."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: give it a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file in it")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(
            f"{path}: cannot be written ({parent} is no directory); choose another place"
        )
    if not os.access(parent, os.W_OK):
        raise UserError(
            f"{path}: cannot be written ({parent} is read-only for this user); choose another place"
        )


def positive(name: str, value: int | None) -> None:
    """Raise UserError for an option that must be at least 1, and no more than any run has steps."""
    if value is not None and value < 1:
        raise UserError(f"{name} {value}: must be at least 1")
    if value is not None and value > MOST_STEPS:
        raise UserError(f"{name} {value}: must be at most {MOST_STEPS:,}")


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not fold what goes into a file or a pipe."""
    console = Console(stderr=stderr, highlight=False)
    return (
        console
        if console.is_terminal
        else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)
    )
