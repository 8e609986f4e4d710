"""How a vLLM engine takes weights over: vLLM's own ways, but straight into the parameters that it
computes with.

vLLM itself builds each layer again next to the old one, because a quantized layer has another
format than a checkpoint. Ours are bf16 and have the checkpoint's format, so the copy can be
spared: most of a transfer's time was spent on it. Imports vLLM, so it is imported where an engine
runs.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from executor.fleet import torch_private
from executor.rollout.vllm.private import (
    IPCWeightTransferEngine,
    NCCLWeightTransferEngine,
    unpack_tensor,
)


class OverNccl(NCCLWeightTransferEngine):
    """One broadcast per weight, all on the stream that loads them: nothing is packed, and nothing
    allocated again for streams that come and go."""

    def init_transfer_engine(self, init_info: Any) -> None:
        self.shutdown()  # a group is formed again when an engine in it was started again
        super().init_transfer_engine(init_info)

    def shutdown(self) -> None:
        if self.model_update_group is not None:
            self.model_update_group.destroy()
        super().shutdown()

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    @torch.no_grad()
    def receive_weights(self, update_info: Any) -> None:
        arriving = self._arriving(update_info.names, update_info.shapes)
        self.model.load_weights(arriving)
        deque(arriving, maxlen=0)  # what the model has no use for was sent nevertheless

    def _arriving(self, names: list[str], shapes: list[list[int]]) -> Iterator[tuple[str, Tensor]]:
        stream = torch.cuda.current_stream()
        for name, shape in zip(names, shapes, strict=True):
            weight = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
            self.model_update_group.broadcast(weight, src=0, stream=stream)
            yield name, weight


class OverIpc(IPCWeightTransferEngine):
    """A chunk's weights, read where they lie in the trainer's window."""

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    @torch.no_grad()
    def receive_weights(self, update_info: Any) -> None:
        gpu = str(torch.cuda.get_device_properties(self.device.index).uuid)
        window = torch_private.open_ipc(update_info.ipc_handles[gpu], self.device.index)
        window = window[: sum(update_info.tensor_sizes)]
        dtypes = [torch.bfloat16] * len(update_info.names)
        self.model.load_weights(
            unpack_tensor(
                window, update_info.names, update_info.shapes, dtypes, update_info.tensor_sizes
            )
        )


TRANSFERS = {"nccl": OverNccl, "ipc": OverIpc}
