"""`plan import`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.commands.inputs import make_console
from planner.exchange.imported_run import (
    STEP,
    ImportedRun,
    profile_of,
    seconds_of_calls,
    timeline_of,
)
from planner.exchange.toml_text import toml_text
from planner.predict.forecast import durations, predict
from planner.predict.profile import Profile
from planner.report.imported import calls_of_run, sentences_of_run
from planner.spec.directories import check_free, whole_directory
from planner.spec.files import File
from planner.spec.plan import Plan, Provenance
from planner.spec.timeline import Timeline
from planner.spec.workload import Workload

PROFILE = "profile.json"


@dataclass(frozen=True, kw_only=True)
class Files:
    """What an import writes."""

    plan: Plan
    timeline: Timeline
    profile: Profile


def import_run(read: Callable[[], ImportedRun], out: Path, version: str, command: str) -> None:
    """Import what `read` returns into the directory `out`, and say where a step goes."""
    check_free(out)
    run = read()
    steps = seconds_of_calls(run)
    profile = profile_of(run, steps, command)
    hashes = {PROFILE: profile.sha256}
    plan = run.plan.changed(
        predicted=predict(run.plan, (profile,)),
        provenance=Provenance(version=version, command=command, profiles=hashes),
    )
    files = Files(plan=plan, timeline=timeline_of(run, steps), profile=profile)
    _write(files, run, out)
    console = make_console()
    counted = steps[run.warmup :]
    roofline = {name: float(x.seconds.mean()) for name, x in durations(run.plan).items()}
    measured = [step[STEP] for step in run.steps[run.warmup :]]
    console.print(calls_of_run(plan, counted, roofline, measured))
    console.print()
    for sentence in sentences_of_run(plan, measured, predict(run.plan).step_seconds):
        console.print(sentence, soft_wrap=True)
    for note in run.notes:
        console.print(f"- {note}", markup=False, soft_wrap=True)
    console.print(f"Wrote {out}: {', '.join(_names(files))}.", markup=False, soft_wrap=True)


def _named(files: Files) -> Mapping[str, File]:
    plan = files.plan
    return {
        "workload.toml": plan.workload,
        "cluster.toml": plan.cluster,
        "plan.json": plan,
        "timeline.json": files.timeline,
        PROFILE: files.profile,
    }


def _names(files: Files) -> list[str]:
    return list(_named(files))


def _body(file: File) -> dict[str, Any]:
    """The keys of a file that are not at their defaults, and the kinds of its lengths."""
    body = file.model_dump(mode="json", exclude_defaults=True)
    if isinstance(file, Workload):
        body |= {"prompt": file.prompt.model_dump(), "response": file.response.model_dump()}
    return {"schema": file.SCHEMA, **body}


def _write(files: Files, run: ImportedRun, out: Path) -> None:
    with whole_directory(out) as made:
        for name, file in _named(files).items():
            path = made / name
            if path.suffix == ".toml":
                path.write_text(toml_text(_body(file), run.notes))
            else:
                file.write(path)
