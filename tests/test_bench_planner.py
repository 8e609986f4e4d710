"""How fast the planner is. `make bench` prints the figures and holds them to what is promised."""

import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.bench

SEARCH = ["search", "--gpus", "16", "--out", "best.json"]


def seconds_of(command, cwd, runs=3):
    """The fastest of some runs: what else the machine does only adds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "planner.cli", *command], cwd=cwd, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize(("command", "limit"), [(["--help"], 1.0), (SEARCH, 5.0)], ids=["help", "search 16 GPUs"])
def test_commands_are_quick(tmp_path, command, limit):
    found = seconds_of(command, tmp_path)
    print(f"\nplan {' '.join(command)}: {found:.2f} s (limit {limit} s)")
    assert found <= limit
