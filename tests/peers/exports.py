"""The plans whose exports are given to the peers' own loaders, and what a shell makes of a launch
script."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from planner.exchange.expressing import expressed
from planner.search import SearchOptions, baseline, find
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

WORKLOADS = sorted((profiles_dir() / "workloads").glob("*.toml"))


def winner(framework: str, path: Path, gpus: int, **changes: object) -> Plan:
    """The best plan that a framework executes, for a workload with these changes; skips where
    there is none."""
    stale = changes.pop("max_staleness", None)
    assert stale is None or isinstance(stale, int)
    options = SearchOptions(framework=framework, scenarios=2, runners_up=0, max_staleness=stale)
    try:
        return find(load_workload(path).changed(**changes), make_cluster(gpus), options).best
    except UserError as error:
        pytest.skip(f"no plan on {gpus} GPUs: {str(error)[:60]}")


def expressed_baseline(framework: str, path: Path, name: str) -> tuple[Plan, Plan]:
    """A baseline on 16 GPUs, and the plan that a framework executes in its place; skips where there
    is none."""
    try:
        pins = ("actor=8",) if name == "one-step-off" else ()
        plan = baseline(name, load_workload(path), make_cluster(16), pins=pins)
        return plan, expressed(framework, plan, ()).plan
    except UserError as error:
        pytest.skip(str(error)[:80])


def program_and_options(
    script: str, folder: Path, variables: Mapping[str, str]
) -> tuple[str, list[str]]:
    """What the shell makes of a script: the module that python3 runs, and its arguments."""
    (folder / "run.sh").write_text(script)
    (folder / "python3").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "python3").chmod(0o755)
    known = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", folder / "run.sh"], env=known, capture_output=True, text=True, check=True
    )
    option, program, *options = done.stdout.splitlines()
    assert option == "-m"
    return program, options
