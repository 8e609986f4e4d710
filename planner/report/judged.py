"""How good estimates are, as tables: on the terminal, and as the page that lies next to profiles."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from planner.predict.judge import Errors, Judged, errors_of
from planner.predict.layouts import MICRO_BATCH_TOKENS
from planner.predict.measurement import OnGpus
from planner.predict.points import MovePoint, RolloutPoint, TrainerPoint
from planner.predict.profile import Profile
from planner.report.markdown import markdown_list, markdown_table
from planner.spec.cluster import Device
from planner.spec.workload import TENSOR_PARALLEL

KEPT = "\n## Notes\n"  # from here on a page is written by hand
TITLES = (
    "call",
    "role",
    "points",
    "repeats ±",
    "estimate: median",
    "worst",
    "roofline: median",
    "worst",
)
THIRDS = "Each third of the points in turn, estimated from the rest"
UNSEEN = "A batch and lengths that no point has, estimated from all points"

EXPLAINED = """\
An error is estimated over measured seconds, less 1; the median is of errors without their sign. `repeats ±` is half the
interquartile range of a point's repeats over its seconds, the median of the points. `estimate` is what `plan search`
uses: the roofline's seconds times the measured ratio of the points that are like the call. Points of one layout and
number of sequences are held out together, whosever they are. `roofline` is the same cost model without any profile. A
dash: no point like these was left."""


def tables(judged: Sequence[Judged]) -> list[Table]:
    """A table for the thirds and one for the unseen, as far as there are points."""
    found = []
    for title, rows in _rows(judged):
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, column in enumerate(TITLES):
            table.add_column(column, justify="left" if number < 2 else "right")
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def page(
    named: Sequence[tuple[str, Profile]],
    devices: Sequence[Device],
    judged: Sequence[Judged],
    command: str,
) -> str:
    """Profiles that lie next to the page, each with its file's name and device, as Markdown."""
    device_names = sorted({profile.device for _, profile in named})
    parts = [
        f"# Measured costs: {', '.join(device_names)}",
        f"Made by\n\n```\n{command}\n```",
        EXPLAINED,
    ]
    for (name, profile), device in zip(named, devices, strict=True):
        parts.append(f"## {name}\n\n{_conditions(profile)}")
        for title, rows in _rows([each for each in judged if each.profile is profile]):
            parts.append(f"{title}:\n\n{markdown_table(TITLES, rows)}")
        measured = profile.measured or ("see its points",)
        parts.append(f"Measured:\n\n{markdown_list(measured)}")
        parts.append(f"Not measured:\n\n{markdown_list(not_measured(profile, device))}")
    return "\n\n".join(parts) + "\n"


def with_notes(text: str, before: str) -> str:
    """A page with the notes of the one that it replaces."""
    _, heading, notes = before.partition(KEPT)
    return text + heading + notes


def not_measured(profile: Profile, device: Device) -> list[str]:
    """What a search may choose and no point has."""
    points = profile.points
    calls = ("generate", "infer", "train", "transfer", "host")
    found = [
        f"any {call} call" for call in calls if not any(point.call == call for point in points)
    ]
    if device.kind != "cpu":
        found += _layouts_not_measured(profile)
    if not any(isinstance(point, OnGpus) and point.nodes > 1 for point in points):
        found.append("more than one node")
    return [*found, "what calls cost each other that run beside each other on one host"]


_OFFLOADS = {"optimizer": "the optimizer alone", "all": "weights and optimizer"}


def _layouts_not_measured(profile: Profile) -> list[str]:
    """Layouts on GPUs that no point has."""
    trainers = [point for point in profile.points if isinstance(point, TrainerPoint)]
    rollouts = [point for point in profile.points if isinstance(point, RolloutPoint)]
    woken = [
        point for point in profile.points if isinstance(point, MovePoint) and point.call == "wake"
    ]
    micro_batches = [point.micro_batch_tokens for point in trainers]
    splits = [size for size in TENSOR_PARALLEL if profile.model.splits_into(size)]
    found = [
        *_missing("micro-batches of", " tokens", MICRO_BATCH_TOKENS, micro_batches),
        *_missing("shard", "", (1, 2, 4, 8), [point.shard for point in trainers]),
        *_missing("tensor-parallel", "", splits, [point.tensor_parallel for point in rollouts]),
    ]
    if not any(point.recompute for point in trainers):
        found.append("updates with recomputation")
    offloaded = {point.offload for point in woken if point.role != "rollout"}
    found += [f"offloading of {what}" for key, what in _OFFLOADS.items() if key not in offloaded]
    if not any(point.role == "rollout" for point in woken):
        found.append("engines that sleep")
    return found


def _missing(
    before: str, after: str, wanted: Iterable[int], there: Iterable[int | None]
) -> list[str]:
    """The wanted values that are not there, in one line (none if all are)."""
    known = set(there)
    left = [f"{value:,}" for value in wanted if value not in known]
    if not left:
        return []
    *most, last = left
    listed = f"{', '.join(most)} or {last}" if most else last
    return [f"{before} {listed}{after}"]


def _conditions(profile: Profile) -> str:
    shape = profile.model
    heads = f"{shape.heads} heads ({shape.kv_heads} of keys and values)"
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    return (
        f"Hidden {shape.hidden}, {shape.layers} layers, {heads}, intermediate "
        f"{shape.intermediate}, vocabulary {shape.vocab}; {len(profile.points)} points and "
        f"{len(profile.held_out)} held out. Measured {profile.date}; {versions}; workload "
        f"{profile.workload}; sha256 of the content {profile.sha256[:12]}."
        f"\n\n```\n{profile.command}\n```"
    )


def _rows(judged: Sequence[Judged]) -> list[tuple[str, list[list[str]]]]:
    """The title and the rows of each table that has some."""
    found = []
    for title, unseen in ((THIRDS, False), (UNSEEN, True)):
        own = [each for each in judged if each.unseen == unseen]
        rows = [_cells(errors) for errors in errors_of(own)]
        if rows:
            found.append((title, rows))
    return found


def _cells(errors: Errors) -> list[str]:
    estimated = _pair(errors.interpolation) if errors.interpolation else ["–", "–"]
    return [
        errors.call,
        errors.role,
        str(errors.points),
        f"{errors.noise:.1%}",
        *estimated,
        *_pair(errors.roofline),
    ]


def _pair(errors: tuple[float, float]) -> list[str]:
    return [f"{errors[0]:.1%}", f"{errors[1]:+.1%}"]
