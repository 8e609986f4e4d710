"""Several Ray nodes on this machine, each at a loopback address of its own: placement as planned,
and nodes that go."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_plan, make_workload
from interrupted import metrics_of
from processes import PATIENCE, descendants, end, end_agents, working

from executor.fleet import pools
from executor.training.host import _interface
from planner.spec.cluster import Cluster, Device, Node
from planner.spec.plan import Plan

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="127.0.0.2 is an address on Linux alone"
)

ROOT = Path(__file__).parents[1]
NODES = 3  # beside the head, which has neither cores nor GPUs
# Prints its address and the process of each node; reads which nodes to kill.
RAY = f"""
import sys
from ray.cluster_utils import Cluster
head = {{"num_cpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False,
         "_system_config": {{"health_check_period_ms": 500, "health_check_failure_threshold": 2}}}}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [
    cluster.add_node(num_cpus=1, num_gpus=2 + n % 2, node_ip_address=f"127.0.0.{{n + 3}}")
    for n in range({NODES})
]
print(cluster.address, *(node.all_processes["raylet"][0].process.pid for node in nodes), flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[int(line)], allow_graceful=False)
cluster.shutdown()
"""


class Nodes:
    """A Ray cluster in a process of its own."""

    def __init__(self, temporary: str) -> None:
        self.environment = os.environ | {
            "RAY_TMPDIR": temporary,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-this-test-only",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", RAY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        assert self.process.stdout is not None
        self.address, *pids = self.process.stdout.readline().split()
        self.pids = [int(pid) for pid in pids]

    def kill_one_that_trains(self) -> None:
        """All of its processes."""
        number = next(
            n for n, pid in enumerate(self.pids) if working(descendants(pid), ("Trainer",))
        )
        assert self.process.stdin is not None
        print(number, file=self.process.stdin, flush=True)

    def close(self) -> None:
        """End all of it; checked by process id."""
        pids = descendants(self.process.pid)
        try:
            self.process.communicate(timeout=PATIENCE)
        finally:
            left = end_agents(pids)
            end([self.process.pid])
        assert pids and not left

    def python(self, code: str) -> Any:
        """What a program that has joined prints, as JSON."""
        joined = (
            "import json\nfrom executor.fleet.session import ray_session\naddress = "
            f"{self.address!r}\n"
        )
        joined += "with ray_session(cpus=None, address=address):\n"
        text = joined + "".join(f"    {line}\n" for line in code.strip().splitlines())
        done = subprocess.run(
            [sys.executable, "-c", text],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def plan(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "planner.cli",
            *map(str, arguments),
            "--address",
            self.address,
        ]
        return subprocess.Popen(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    temporary = tempfile.mkdtemp(prefix="s-")  # short, for sockets
    there = Nodes(temporary)
    yield there
    there.close()
    shutil.rmtree(temporary)


def cluster_of(*cores: int) -> Cluster:
    device = Device(
        kind="cpu",
        memory_bytes=2 * 10**9,
        flops=1e10,
        memory_bandwidth=1e10,
        link_bandwidth=1e9,
        host_bandwidth=1e10,
    )
    nodes = tuple(Node(gpus=count, device="core", host_memory_bytes=4 * 10**9) for count in cores)
    return Cluster(name="nodes", nodes=nodes, devices={"core": device})


def spread(nodes: int) -> Plan:
    """One pool, a core on each of so many nodes."""
    workload = make_workload(steps=30, critic=None, reference=None)
    plan = make_plan(
        workload,
        {"all": nodes},
        dict.fromkeys(workload.roles, "all"),
        cluster=cluster_of(nodes),
        blocking=True,
    )
    gpus = [[node, 0] for node in range(nodes)]
    data = {
        **plan.model_dump(),
        "cluster": cluster_of(*[1] * nodes),
        "pools": {"all": {"gpus": gpus}},
    }
    return Plan.model_validate(data)


PLACED = """
import ray
from executor.fleet import pools
from executor.fleet.asking import ask, to_each
from executor.fleet.worker import Worker
from planner.spec.errors import UserError
class Where(Worker):
    def where(self):
        import os, ray
        return ray.util.get_node_ip_address(), os.environ["CUDA_VISIBLE_DEVICES"]
fleet = pools.Fleet(((0, 0), (1, 2), (1, 0), (1, 1), (0, 1)), "GPU")
gpus = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
ranks = pools.connect([fleet.process(Where, (gpu,)) for gpu in gpus])
found = ask(to_each(ranks, Where.where)).results
fleet.close()
refused = []
for gpus in (
    [(node, 0) for node in range(4)],
    [(0, index) for index in range(4)],
    [(node, 0) for node in range(8)],
):
    try:
        pools.Fleet(gpus, "GPU")
    except UserError as error:
        refused.append(str(error))
print(json.dumps([found, refused]))
"""


def test_a_pool_lies_on_the_nodes_that_the_plan_says_in_the_order_of_their_gpus(
    nodes: Nodes,
) -> None:
    found, refused = nodes.python(PLACED)
    addresses = [address for address, _ in found]
    assert (
        addresses[0] == addresses[1] != addresses[2] == addresses[3] == addresses[4] == "127.0.0.4"
    )
    assert [device for _, device in found] == ["0", "1", "0", "1", "2"]
    assert "the plan uses 1 GPUs of its node 3, but Ray's matching node has 0" in refused[0]
    assert "the plan uses 4 GPUs of its node 0, but Ray's matching node has 3" in refused[1]
    assert "8 GPUs are needed and Ray has 7" in refused[2]


@pytest.mark.parametrize(
    ("named", "kind", "may"),
    [
        (["H200"], "h200", True),
        (["A100-80G"], "a100", True),
        (["A100"], "h200", False),
        ([], "h200", True),
        (["L4"], "ours", True),
    ],
)
def test_a_node_with_another_kind_of_gpu_is_left_out(
    named: list[str], kind: str, may: bool
) -> None:
    """A cluster file may call its GPUs what it likes, and Ray does not know every kind."""
    resources = {"GPU": 8.0, **{f"accelerator_type:{name}": 1.0 for name in named}}
    assert pools._may_be({"Resources": resources}, kind) is may


def test_the_interface_of_an_address_is_found() -> None:
    assert _interface("127.0.0.5") == "lo" and _interface("203.0.113.9") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:  # connecting sends nothing
        with contextlib.suppress(OSError):
            outward.connect(("203.0.113.9", 9))
        own = outward.getsockname()[0]
    assert own == "0.0.0.0" or _interface(own) in [name for _, name in socket.if_nameindex()]


@pytest.mark.nightly  # Ray tries for half a minute
def test_a_token_is_needed(nodes: Nodes, tmp_path: Path) -> None:
    spread(2).write(tmp_path / "plan.json")
    command = ["execute", tmp_path / "plan.json", "--runs", tmp_path]
    process = nodes.plan(*command, RAY_AUTH_TOKEN="another")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "export RAY_AUTH_MODE=token" in errors.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.nightly
def test_a_plan_for_more_nodes_than_there_are(nodes: Nodes, tmp_path: Path) -> None:
    spread(4).write(tmp_path / "plan.json")
    process = nodes.plan("execute", tmp_path / "plan.json", "--runs", tmp_path)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and len(errors.splitlines()) == 1, errors
    assert "4 CPUs are needed and Ray has 3" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.nightly
def test_a_node_that_disappears_is_replaced(nodes: Nodes, tmp_path: Path) -> None:
    """The last test of the module: it leaves one node of three."""
    spread(2).write(tmp_path / "plan.json")
    process = nodes.plan(
        "execute", tmp_path / "plan.json", "--name", "r", "--runs", tmp_path, "--save-every", "2"
    )
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "r/checkpoints/step-000002").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    nodes.kill_one_that_trains()
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "Restart 1 of 3, from step" in out
    assert [line["step"] for line in metrics_of(tmp_path / "r")] == list(range(30))
