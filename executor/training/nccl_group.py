"""The NCCL group of a trainer (rank 0) and of the GPUs of engines elsewhere, by which weights are
sent. It is vLLM's, because torch's groups would take both ends for one program."""

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from executor.training.weights import Described


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        port: int = server.getsockname()[1]
        return port


def join(host: str, port: int, rank: int, world: int) -> Any:
    """The group that is formed at a port of rank 0's host. Returns when all have joined."""
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    return stateless_init_process_group(host, port, rank, world, torch.cuda.current_device())


def leave(group: Any) -> None:
    group.destroy()  # it holds buffers


def send(group: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Broadcast weights from rank 0, on the stream that makes them."""
    stream = torch.cuda.current_stream()
    for _, weight in weights:
        group.broadcast(weight, src=0, stream=stream)


def receive(group: Any, weights: Sequence[Described]) -> Iterator[tuple[str, Tensor]]:
    """The weights that rank 0 sends, in bf16: one broadcast each, all on the stream that uses them.
    Nothing is packed, and nothing allocated again for streams that come and go."""
    stream = torch.cuda.current_stream()
    for weight in weights:
        tensor = torch.empty(weight.shape, dtype=torch.bfloat16, device=group.device)
        group.broadcast(tensor, src=0, stream=stream)
        yield weight.name, tensor


def exhaust(arriving: Iterator[tuple[str, Tensor]]) -> None:
    """Receive what is left: what an engine has no use for was sent nevertheless."""
    deque(arriving, maxlen=0)
