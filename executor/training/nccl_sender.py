"""The trainer's end of vLLM's weight transfer over NCCL."""

import socket
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        port: int = server.getsockname()[1]
        return port


def connect(host: str, port: int, world: int) -> Any:
    """The NCCL group of a sender (rank 0) and the GPUs of its receivers. Returns when all have
    joined."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    info = {"master_address": host, "master_port": port, "world_size": world}
    return NCCLWeightTransferEngine.trainer_init(info)


def disconnect(group: Any) -> None:
    group.destroy()  # it holds buffers


def send(group: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Broadcast weights on the stream that makes them."""
    stream = torch.cuda.current_stream()
    for _, weight in weights:
        group.broadcast(weight, src=0, stream=stream)
