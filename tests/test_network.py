"""Ray nodes in network namespaces of their own, joined by a switch, as hosts are: each has its own
addresses, and a cable can be pulled while all processes live on. Needs root, and is skipped where
the system does not allow it."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupted import metrics_of
from processes import PATIENCE, descendants, end, end_agents, still_there, working
from test_cluster import spread

from executor.fleet.session import NO_CLUSTER

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2"),
]

ROOT = Path(__file__).parents[1]
HEAD = "10.77.0.1"  # on the switch, in the namespace of Ray's head and of the controller
HOSTS = 3
JOINED = f"""
import ray, sys, time
ray.init(address="{HEAD}:6379", logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) <= int(sys.argv[1]):
    time.sleep(0.1)
"""


def ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)


class Network:
    """A namespace with a switch, and one for each host, whose cable is a veth pair."""

    def __init__(self) -> None:
        self.name = f"sp{os.getpid()}"
        self.made = 0

    def build(self) -> None:
        """Raises OSError where that is not allowed."""
        for number in range(HOSTS + 1):
            ip(f"netns add {self.name}-{number}")
            self.made += 1
            ip(f"-n {self.name}-{number} link set lo up")
        ip(f"-n {self.name}-0 link add switch type bridge")
        ip(f"-n {self.name}-0 address add {HEAD}/24 dev switch")
        ip(f"-n {self.name}-0 link set switch up")
        for number in range(1, HOSTS + 1):
            here, there = f"{self.name}-0", f"{self.name}-{number}"
            ip(f"-n {here} link add cable{number} type veth peer name eth0 netns {there}")
            ip(f"-n {here} link set cable{number} master switch up")
            ip(f"-n {there} address add {self.address(number)}/24 dev eth0")
            ip(f"-n {there} link set eth0 up")

    def address(self, number: int) -> str:
        return f"10.77.0.{10 + number}"

    def command(self, number: int, *arguments: str | Path) -> list[str]:
        return ["ip", "netns", "exec", f"{self.name}-{number}", *map(str, arguments)]

    def pull(self, number: int) -> None:
        ip(f"-n {self.name}-0 link set cable{number} down")

    def remove(self) -> None:
        for number in range(self.made):
            ip(f"netns delete {self.name}-{number}")


@pytest.fixture
def network() -> Iterator[Network]:
    there = Network()
    try:
        there.build()
    except OSError as error:
        there.remove()
        pytest.skip(f"no network namespaces here: {error}")
    yield there
    there.remove()


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    temporary = tempfile.mkdtemp(prefix="s-")  # short, for sockets
    # Tests share a private Ray, which this process may still have open.
    own = {key: value for key, value in os.environ.items() if key != NO_CLUSTER}
    yield own | {
        "RAY_TMPDIR": temporary,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-only",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "2",
    }
    shutil.rmtree(temporary)


@pytest.fixture
def hosts(network: Network, environment: dict[str, str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The commands of docs/cluster.md, one on each: `ray start`. The first one is the head."""
    ray = str(Path(sys.executable).parent / "ray")
    started: list[subprocess.Popen[bytes]] = []

    def start(number: int, *arguments: str) -> None:
        command = network.command(number, ray, "start", "--block", *arguments)
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))

    pids: list[int] = []
    try:
        start(
            0,
            "--head",
            "--include-dashboard=false",
            "--port=6379",
            f"--node-ip-address={HEAD}",
            "--num-cpus=0",
        )
        wait_for(lambda: _listens(network, HEAD))
        for number in range(1, HOSTS + 1):
            start(
                number,
                f"--address={HEAD}:6379",
                f"--node-ip-address={network.address(number)}",
                "--num-cpus=1",
            )
            # One after the other: on one machine they share a directory, in which two at once take
            # each other's names.
            joined = network.command(0, sys.executable, "-c", JOINED, str(number))
            subprocess.run(
                joined, env=environment, check=True, capture_output=True, timeout=PATIENCE
            )
        yield started
    finally:
        pids = [pid for process in started for pid in (process.pid, *descendants(process.pid))]
        for process in reversed(started):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in started:
                process.wait(30)
        end(still_there(pids))
        for process in started:
            process.wait()
    assert not end_agents(pids)


def _listens(network: Network, address: str) -> bool:
    code = f"import socket; socket.create_connection(({address!r}, 6379), 1)"
    return not subprocess.run(
        network.command(0, sys.executable, "-c", code), capture_output=True
    ).returncode


def wait_for(there: object) -> None:
    deadline = time.monotonic() + PATIENCE
    assert callable(there)
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_host_whose_cable_is_pulled_is_replaced(
    network: Network,
    environment: dict[str, str],
    hosts: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    spread(2).write(tmp_path / "plan.json")
    options = ["--address", f"{HEAD}:6379", "--name", "r", "--runs", tmp_path, "--save-every", "2"]
    command = network.command(
        0, sys.executable, "-m", "planner.cli", "execute", tmp_path / "plan.json", *options
    )
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(
            lambda: process.poll() is not None or (tmp_path / "r/checkpoints/step-000002").exists()
        )
        assert process.poll() is None, process.communicate()
        training = [
            n for n in range(1, HOSTS + 1) if working(descendants(hosts[n].pid), ("Trainer",))
        ]
        assert len(training) == 2
        network.pull(training[-1])
        out, errors = process.communicate(timeout=PATIENCE)
    finally:
        end([process.pid])
    assert process.returncode == 0, errors
    assert "Restart 1 of 3, from step" in out
    assert [line["step"] for line in metrics_of(tmp_path / "r")] == list(range(30))
