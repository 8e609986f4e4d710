"""The hardware: nodes, their GPUs and the links between them."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from planner.spec.errors import UserError
from planner.spec.files import Bytes, Count, File, Spec, profiles_dir, read_data
from planner.spec.limits import MOST_GPUS

# Wide enough for any machine, and no quotient of them is infinite.
Rate = Annotated[float, Field(ge=1, le=1e21)]  # FLOP/s or bytes/s
Efficiency = Annotated[float, Field(ge=1e-6, le=1e3)]
Delay = Annotated[float, Field(ge=0, le=1e6)]


class Device(Spec):
    """One kind of GPU. With kind `cpu` it is one core that stands in for a GPU. Rates are the
    vendor's dense peaks or measured ones: FLOP/s in bf16, bytes/s of memory, bytes/s per GPU over
    the node's links (each way), bytes/s per GPU between device and host. `efficiency_*` are the
    fractions of the peak that the roofline model assumes."""

    kind: Literal["cuda", "cpu"] = "cuda"
    memory_bytes: Annotated[Bytes, Field(gt=0)]
    flops: Rate
    memory_bandwidth: Rate
    link_bandwidth: Rate
    host_bandwidth: Rate
    efficiency_compute: Efficiency = 0.5
    efficiency_memory: Efficiency = 0.7
    efficiency_link: Efficiency = 0.7
    overhead_seconds: Delay = 0.0  # of each call: dispatch, collation, optimizer launch
    launch_seconds: Delay = (
        0.0  # of a layer's forward pass, however few its tokens, its gathering or sending
    )
    context_bytes: Bytes = 0  # of each process on the GPU
    price_per_hour: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    source: str = ""


class Node(Spec):
    gpus: Count
    device: str
    host_memory_bytes: Annotated[Bytes, Field(gt=0)]


class Cluster(File):
    """Nodes of possibly unequal size; a GPU is named `(node, index)`. `network_bandwidth` is
    bytes/s per GPU between nodes, `network_latency_seconds` of one collective hop."""

    SCHEMA: ClassVar[str] = "splitplan/cluster/1"

    name: str
    nodes: tuple[Node, ...]
    devices: dict[str, Device]
    network_bandwidth: Rate = 50e9
    network_latency_seconds: Delay = 20e-6

    @model_validator(mode="after")
    def _known_devices(self) -> Self:
        if not self.nodes:
            raise ValueError("a cluster needs at least one node")
        if (gpus := sum(node.gpus for node in self.nodes)) > MOST_GPUS:
            raise ValueError(
                f"{gpus:,} GPUs are more than the {MOST_GPUS:,} that a plan may be for"
            )
        for number, node in enumerate(self.nodes):
            if node.device not in self.devices:
                raise ValueError(
                    f"node {number} has device {node.device!r}, which is not under devices"
                )
        return self

    @property
    def gpus(self) -> tuple[tuple[int, int], ...]:
        """Every GPU as (node, index), node by node."""
        return tuple((n, i) for n, node in enumerate(self.nodes) for i in range(node.gpus))

    def device_of(self, gpu: tuple[int, int]) -> Device:
        return self.devices[self.nodes[gpu[0]].device]


def load_device(name: str) -> Device:
    """A device of profiles/devices.toml. Raises UserError."""
    known = read_data(profiles_dir() / "devices.toml")
    if name not in known:
        raise UserError(
            f"no device {name!r} is shipped; choose one of {', '.join(sorted(known))}, or write a "
            "cluster file"
        )
    return Device.model_validate(known[name])


def make_cluster(
    gpus: int, device: str = "h200", gpus_per_node: int = 8, host_memory_bytes: int = 2 * 10**12
) -> Cluster:
    """`gpus` GPUs of a shipped device in full nodes, the last one perhaps smaller. Raises
    UserError."""
    if gpus < 1 or gpus_per_node < 1:
        raise UserError(f"{gpus} GPUs in nodes of {gpus_per_node}: both must be at least 1")
    if gpus > MOST_GPUS:
        raise UserError(
            f"{gpus:,} GPUs are more than the {MOST_GPUS:,} that a plan may be for; choose fewer"
        )
    sizes = [gpus_per_node] * (gpus // gpus_per_node) + [gpus % gpus_per_node] * (
        gpus % gpus_per_node > 0
    )
    nodes = tuple(
        Node(gpus=size, device=device, host_memory_bytes=host_memory_bytes) for size in sizes
    )
    return Cluster(name=f"{gpus}x{device}", nodes=nodes, devices={device: load_device(device)})


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file (TOML or JSON). Raises UserError."""
    return Cluster.read(path)
