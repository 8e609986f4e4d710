"""The same inputs give the same bytes, whatever the hash seed and the number of cores."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import cpu_cluster, make_workload

SIXTEEN = ["--gpus", "16"]
SMALL = ["--cluster", "cluster.json", "--workload", "workload.json", "--max-staleness", "2"]


def plan_bytes(directory, options, hash_seed, cores):
    """The plan that a search in a process of its own writes, its timing taken out."""
    directory.mkdir()
    cpu_cluster(4).write(directory / "cluster.json")
    make_workload().write(directory / "workload.json")
    command = [
        sys.executable,
        "-m",
        "planner.cli",
        "search",
        *options,
        "--no-picture",
        "--out",
        "best.json",
    ]
    if cores and shutil.which("taskset"):
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    environment = {
        name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")
    }
    environment["PYTHONHASHSEED"] = hash_seed
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written, found = re.subn(
        rb'"search_seconds": [\d.e-]+', b"", (directory / "best.json").read_bytes()
    )
    assert found == 1
    return written


@pytest.mark.slow
@pytest.mark.parametrize("options", [SIXTEEN, SMALL], ids=["16 GPUs", "small"])
def test_hash_seed_and_cores_do_not_matter(tmp_path, options):
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    one = plan_bytes(tmp_path / "one", options, "1", cores[:1])
    assert plan_bytes(tmp_path / "all", options, "2", cores) == one
