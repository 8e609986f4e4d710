"""What the commands are given, read and checked: cluster, workload, profiles, and where to
write."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from planner import __version__
from planner.commands.local import local_cluster
from planner.commands.options import JobOptions
from planner.predict.profile import Profile, check_profiles, load_profiles, warnings_of
from planner.spec.architectures import check_vllm
from planner.spec.cluster import Cluster, load_cluster, make_cluster
from planner.spec.engines import engine_for
from planner.spec.errors import UserError
from planner.spec.files import names_a_file, profiles_dir
from planner.spec.plan import Plan, Provenance
from planner.spec.workload import Workload
from planner.spec.workload_file import load_workload

PLAIN_WIDTH = 120  # of what is printed into a file or a pipe


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A job as it was read. `profile_hashes` are what a plan remembers of its profiles: path ->
    sha256."""

    workload: Workload
    cluster: Cluster
    profiles: tuple[Profile, ...]
    profile_hashes: dict[str, str]

    def provenance(self, command: str) -> Provenance:
        """What a plan says of how it was made."""
        return Provenance(
            version=__version__,
            seed=self.workload.seed,
            command=command,
            profiles=self.profile_hashes,
        )


def read_inputs(job: JobOptions) -> Inputs:
    """Read the files of a job, and say on stderr what is odd about its profiles. Raises
    UserError."""
    found = _load(job.profiles, make_console(stderr=True))
    hashes = {str(path): profile.sha256 for path, profile in zip(job.profiles, found, strict=True)}
    workload, cluster = read_workload(job.workload, job.settings), read_cluster(job)
    engines = {engine_for(device.kind) for device in cluster.devices.values()}
    if "vllm" in engines and workload.actor.path is not None:
        check_vllm(workload.actor.path, "actor")
    return Inputs(workload=workload, cluster=cluster, profiles=found, profile_hashes=hashes)


def read_cluster(job: JobOptions) -> Cluster:
    """A number of shipped GPUs, a cluster file, or this machine. Raises UserError."""
    if job.cluster is None:
        if job.gpus is None:
            raise UserError(
                "say which GPUs to plan for: --gpus N, --cluster FILE or --cluster local"
            )
        return make_cluster(job.gpus, job.device or "h200", job.gpus_per_node or 8)
    local = job.cluster == "local"
    others = job.device is not None or job.gpus_per_node is not None
    if others or (job.gpus is not None and not local):
        raise UserError(
            f"--cluster {job.cluster} already says what there is; leave out --gpus, --device, "
            "--gpus-per-node"
        )
    return local_cluster(job.gpus) if local else load_cluster(Path(job.cluster))


def read_workload(name: str, settings: Sequence[str] = ()) -> Workload:
    """A workload file, or a shipped one by its name, with other settings. Raises UserError."""
    shipped = {path.stem: path for path in sorted((profiles_dir() / "workloads").glob("*.toml"))}
    path = shipped.get(name) or Path(name)
    if not path.exists() and not names_a_file(name):
        raise UserError(
            f"no workload {name!r} is shipped, and no such file; shipped are {', '.join(shipped)}"
        )
    return load_workload(path, settings)


def profiles_of(
    plan: Plan, path: Path, given: Sequence[Path], console: Console
) -> tuple[Profile, ...]:
    """The profiles to simulate a plan with: those given, else those that it was searched with,
    looked for where its provenance says and next to it. One that is gone or has changed is named,
    and left out. Raises UserError."""
    if given or plan.provenance is None:
        loaded = _load(given, console)
        check_profiles(loaded, plan.workload, plan.cluster)
        return loaded
    found = []
    for name, sha256 in plan.provenance.profiles.items():
        places = (Path(name), path.parent / name, path.parent / Path(name).name)
        profile = _same_profile(places, sha256)
        if profile is not None:
            found.append(profile)
            continue
        console.print(
            f"The profile {name} that {path} was searched with is gone or has changed; its costs "
            "come from the roofline model instead. Name it with --profile.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
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


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not fold what goes into a file or a pipe."""
    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)
